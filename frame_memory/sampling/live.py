"""The video of a project on disk while its sections are still being made: decoded, encoded and joined piece by piece.

Shape legend: B batch, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..journal.project import Project
from ..plan import LongVideoPlan, Section
from ..video.ladder import DecodeLadder
from ..video.segments import Segment, join_segments, read_segment, segment_problem, write_segment
from ..video.stream import Piece, PieceRange, StreamDecoder, plan_pieces
from .frames import LatentFrames
from .identity import short, spread
from .judged import SHEET, Judged
from .section_loop import Made

SEGMENTS = "segments"
PREVIEW = "preview.mp4"
UNFINISHED = "{}-unfinished.mp4"

# Up to so many pieces the preview is joined after each section, up to twice as many after every second one, and so on:
# each join copies the whole video.
JOINED_EACH = 50

log = logging.getLogger(__name__)


class LiveVideo:
    """Watches a run: every section that is there makes more of the video final, and that is written at once.

    Of a batch the first video is shown. Pieces that an earlier run has written from the same sections are kept.
    show: gets the path of a playable mp4 of what is finished so far, after every section that was made.
    """

    def __init__(
        self, project: Project, plan: LongVideoPlan, vae, *, crf: float = 18, metadata=None,
        show: Callable[[Path], None] = lambda _: None, announce: Callable[[str], None] = log.warning,
        interrupt: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.project, self.plan, self.crf, self.metadata = project, plan, crf, metadata
        self.show, self.interrupt = show, interrupt
        self.decode = DecodeLadder(vae, announce)
        self.made_by = short([{k: spread(v) for k, v in vae.first_stage_model.state_dict().items()}, crf, plan.fps])
        self.folder = project.folder / SEGMENTS
        self.segments: dict[tuple[int, int], Segment] = {}
        self.sections: dict[int, tuple[Section, str]] = {}
        self.fed: set[int] = set()
        self.frames: LatentFrames | None = None
        self.decoder: StreamDecoder | None = None
        self.numbers = {s.index: n for n, s in enumerate(sorted(plan.sections, key=lambda s: s.start), 1)}
        self.judge = Judged([(s.start, s.stop) for s in plan.sections], plan.fps)
        self.judged: set[int] = set()
        self.warnings: list[str] = []
        self.sheet = project.folder / SHEET
        self.joined = 0

    def on_section(self, made: Made, frames: LatentFrames) -> None:
        """Take note of a section; write what it makes final, unless it was found: then more may be found at once."""
        self.frames = frames
        self.sections[made.section.index] = (made.section, made.key)
        if made.seconds:
            self._write()
            self._show()

    def finish(self) -> Path:
        """Write what is left and join the whole video; returns the path of its mp4."""
        self._write()
        path = self.join(self.project.folder / f"{self.project.name}.mp4")
        self._remove(PREVIEW, UNFINISHED.format(self.project.name))
        self.judge.sheet.save(self.sheet)
        return path

    def keep(self) -> Path | None:
        """After Cancel or an error: a playable mp4 of what is finished, or None where nothing is."""
        if self.frames is None or not self._something():
            return None
        self.judge.sheet.save(self.sheet)
        path = self.join(self.project.folder / UNFINISHED.format(self.project.name), unfinished=True)
        self.show(path)
        self._remove(PREVIEW)
        return path

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # Windows keeps what a player has open
                (self.project.folder / name).unlink()

    def _something(self) -> bool:
        """Whether any pixel is there: order 'both ends first' begins with a section that lends only its end."""
        return bool(self.segments) or (self.decoder is not None and self.decoder.edge() is not None)

    def _show(self) -> None:
        """Join what is there and play it; of a long video less often, since joining copies all of it."""
        if self._something() and len(self.segments) - self.joined >= len(self.segments) // JOINED_EACH:
            self.joined = len(self.segments)
            self.show(self.join(self.project.folder / PREVIEW, unfinished=True))

    def join(self, path: Path, unfinished: bool = False) -> Path:
        """Join the finished pieces; unfinished: also the last frames, which the next section will be blended over."""
        pieces = sorted(self.segments.values(), key=lambda s: s.start_frame)
        edge = self.decoder.edge() if unfinished and self.decoder is not None else None
        last: list[Segment] = []
        if edge is not None:
            last.append(write_segment(self.folder, edge, self.plan.fps, crf=self.crf, key="not final"))
        try:
            ordered = sorted([*pieces, *last], key=lambda s: s.start_frame)
            join_segments(self.folder, ordered, path, self.plan.fps, self.metadata)
        finally:
            for segment in last:
                (self.folder / segment.name).unlink(missing_ok=True)
        return path

    def _write(self) -> None:
        """Decode and encode everything that has become final."""
        if self.decoder is None:
            self._begin()
        for index, (section, _) in list(self.sections.items()):
            if index in self.fed:
                continue
            self.fed.add(index)
            for piece in self.decoder.finished(section.start, section.stop):
                self._write_piece(piece)
                del piece
        self._judge()

    def _begin(self) -> None:
        """Start the decoder with the pieces that are on disk already."""
        for piece in plan_pieces(self.plan.order, self.plan.total_frames, self.plan.schedule.window):
            segment = self._written_before(piece)
            if segment is not None:
                self._add(segment)
                for first, frames in read_segment(self.folder, segment):
                    self._look_at(first, frames)
        plan = self.plan
        self.decoder = StreamDecoder(
            self.decode, plan.order, plan.total_frames, plan.schedule.window, self._latents,
            have=tuple(self.segments), interrupt=self.interrupt,
        )  # fmt: skip
        for piece in self.decoder.finished(0, self.frames.first.shape[2]):
            self._write_piece(piece)

    def _latents(self, start: int, stop: int) -> Tensor:
        return self.frames.between(start, stop)[:1]

    def _written_before(self, piece: PieceRange) -> Segment | None:
        for record in self.project.manifest.segments.values():
            if (record["start_frame"], record["stop_frame"]) == (piece.start_frame, piece.stop_frame):
                segment = Segment(**{**record, "black_frames": tuple(record["black_frames"])})
                key = self._key(piece)
                if key is not None and segment.key == key and segment_problem(self.folder, segment) is None:
                    return segment
        return None

    def _key(self, piece: PieceRange) -> str | None:
        """What a piece is made from; None where a section of it is not there yet."""
        parts: list[str] = [self.made_by, short(self.frames.first)]
        for section in self.plan.sections:
            if section.start < piece.latent_stop and piece.latent_start < section.stop:
                if section.index not in self.sections:
                    return None
                parts.append(self.sections[section.index][1])
        return short(parts)

    def _write_piece(self, piece: Piece) -> None:
        (planned,) = (p for p in self.decoder.pieces if p.start_frame == piece.start_frame)
        segment = write_segment(self.folder, piece, self.plan.fps, crf=self.crf, key=self._key(planned) or "")
        self.project.set_segment(segment.name, segment.as_dict())
        self._add(segment)
        self._look_at(piece.start_frame, piece.frames_THWC)

    def _add(self, segment: Segment) -> None:
        self.segments[segment.start_frame, segment.stop_frame] = segment

    def _look_at(self, first: int, frames_THWC) -> None:
        self.judge.look(first, frames_THWC)

    def _judge(self) -> None:
        """Measures and warnings of sections whose pixels are all final, into the manifest."""
        for index, number in self.numbers.items():
            if index in self.judged or index not in self.sections or not self.judge.complete(number):
                continue
            self.judged.add(index)
            measures, warnings = self.judge.result(number)
            self.project.annotate(index, measures, warnings)
            self.warnings += warnings
            for warning in warnings:
                log.warning("%s: %s", self.project.name, warning)
