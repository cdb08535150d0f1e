"""The video of a project on disk while its sections are still being made: decoded, encoded and joined piece by piece.

A section is decoded before the next one is sampled, since both need all of a GPU. What a CPU does with its pixels goes
on beside that sampling, on a thread of its own: encoding, measuring, joining, and the manifest of it.

Shape legend: B batch, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..journal.project import Project
from ..plan import LongVideoPlan, Section
from ..video.beside import Beside
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
NOT_SHOWN = "The video so far cannot be played on the node"

log = logging.getLogger(__name__)


class LiveVideo:
    """Watches a run: every section that is there makes more of the video final, and that is written at once.

    Of a batch the first video is written. Pieces that an earlier run has written from the same sections are kept.
    show: gets the path of a playable mp4 of what is finished so far, after every section that was made. What only
    shows the video, this and the contact sheet, never ends a run: `announce` hears once why it failed. say: words
    about the work at hand. `show` and `announce` may be called on another thread. A piece that cannot be written ends
    the run: `check`, called at every step, raises why. `finish` or `keep` must be called at the end.
    """

    def __init__(
        self, project: Project, plan: LongVideoPlan, vae, *, crf: float = 18, metadata=None,
        show: Callable[[Path], None] = lambda _: None, announce: Callable[[str], None] = log.warning,
        interrupt: Callable[[], None] | None = None, say: Callable[[str], None] = log.info,
    ):  # fmt: skip
        self.project, self.plan, self.crf, self.metadata = project, plan, crf, metadata
        self.show, self.announce, self.say, self.interrupt = show, announce, say, interrupt
        self.announced: set[str] = set()
        self.decode = DecodeLadder(vae, announce)
        self.made_by = short([{k: spread(v) for k, v in vae.first_stage_model.state_dict().items()}, crf, plan.fps])
        self.folder = project.folder / SEGMENTS
        self.segments: dict[tuple[int, int], Segment] = {}
        self.sections: dict[int, tuple[Section, str]] = {}
        self.unfed: list[Section] = []
        self.frames: LatentFrames | None = None
        self.decoder: StreamDecoder | None = None
        self.unread: list[Segment] = []
        self.numbers = {s.index: n for n, s in enumerate(sorted(plan.sections, key=lambda s: s.start), 1)}
        self.judge = Judged([(s.start, s.stop) for s in plan.sections], plan.fps, clip=plan.clip)
        self.judged: set[int] = set()
        self.warned: set[str] = set()
        self.written_from = 4 * plan.total_frames  # the first pixel frame that this run has written itself
        self.sheet = project.folder / SHEET
        self.joined = 0
        self.stopped = False
        self.beside = Beside("video of a project")

    def on_section(self, made: Made, frames: LatentFrames) -> None:
        """Take note of a section; write what it makes final, unless it was found: then more may be found at once."""
        self.frames = frames
        self.sections[made.section.index] = (made.section, made.key)
        self.unfed.append(made.section)
        if made.seconds:
            self._write()
            self.beside.give(partial(self._tell, self._edge()))

    def check(self) -> None:
        """Raise why a piece could not be written, at once: what is sampled meanwhile could not be shown either."""
        self.beside.check()

    def finish(self) -> Path:
        """Write what is left and join the whole video; returns the path of its mp4."""
        self._write()
        self.beside.give(self._judge)
        self.beside.close()
        self._may_fail("The last measures cannot be stored in the project", lambda: self._judge(again=True))
        path = self.join(self.project.folder / f"{self.project.name}.mp4", list(self.segments.values()))
        self._remove(PREVIEW, UNFINISHED.format(self.project.name))
        self._save_sheet()
        return path

    def keep(self) -> Path | None:
        """After Cancel or an error: a playable mp4 of what is finished, or None where nothing is.

        A second Cancel only ends the decoding of what was not decoded yet. Raises Exception where no file can be made.
        """
        self.stopped = True
        self._or_without("What was being written is left out of the mp4", self.beside.close)
        if self.frames is None:
            return None
        if self.decoder is None:  # stopped before a section was made, so nothing of an earlier run was looked at
            self._or_without("What is finished but was not decoded yet is left out of the mp4", self._catch_up)
        self.interrupt = None
        edge = self._or_without("The last frames are left out of the mp4", self._edge)
        if not self.segments and edge is None:
            return None
        if not self.unread:  # else the sheet of the earlier run shows more
            self._save_sheet()
        path = self.join_unfinished(UNFINISHED.format(self.project.name), edge)
        self._may_fail(NOT_SHOWN, lambda: self.show(path))
        self._remove(PREVIEW)
        return path

    def _catch_up(self) -> None:
        self._begin()
        self._decode()

    def _or_without(self, lacking: str, work: Callable):
        """The result of work that an mp4 of what is finished can do without; None where it failed or was cancelled."""
        try:
            return work()
        except (Exception, InterruptProcessingException) as error:
            log.warning("%s: %s", lacking, str(error) or "it was cancelled")
            return None

    def _may_fail(self, trouble: str, work: Callable[[], None]) -> None:
        """Do what no finished work depends on; why it fails is said once for each `trouble`."""
        try:
            work()
        except Exception as error:
            log.warning("%s", trouble, exc_info=True)
            if trouble not in self.announced:
                self.announced.add(trouble)
                self.announce(f"{trouble}: {error} The video is not affected.")

    def _save_sheet(self) -> None:
        """Write the contact sheet. One that cannot be replaced is taken away: it would show another video."""

        def save() -> None:
            try:
                self.judge.sheet.save(self.sheet)
            except Exception:
                self._remove(SHEET)
                raise

        self._may_fail("The contact sheet cannot be written", save)

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # Windows keeps what a player has open
                (self.project.folder / name).unlink()

    def _edge(self) -> Piece | None:
        """The last frames, which the next section will be blended over; order 'both ends first' begins with them."""
        edge = None if self.decoder is None else self.decoder.edge()
        return None if edge is None else _on_cpu(edge)

    def _tell(self, edge: Piece | None) -> None:
        """Measure what has become final, and play what there is. One job, so that the sampler waits for no room."""
        self._judge()
        self._may_fail(NOT_SHOWN, lambda: self._show(edge))

    def _show(self, edge: Piece | None) -> None:
        """Join what is there and play it; of a long video less often, since joining copies all of it.

        Not any more after Cancel, which joins all that is finished itself.
        """
        if self.stopped or (not self.segments and edge is None):
            return
        if len(self.segments) - self.joined >= len(self.segments) // JOINED_EACH:
            self.joined = len(self.segments)
            self.show(self.join_unfinished(PREVIEW, edge))

    def join_unfinished(self, name: str, edge: Piece | None) -> Path:
        """Join the finished pieces, and the last frames where they are given, into a file of the project."""
        last: list[Segment] = []
        if edge is not None:
            last.append(write_segment(self.folder, edge, self.plan.fps, crf=self.crf, key="not final"))
        try:
            return self.join(self.project.folder / name, _longest_stretch([*self.segments.values(), *last]))
        finally:
            self._remove(*(f"{SEGMENTS}/{segment.name}" for segment in last))

    def join(self, path: Path, segments: list[Segment]) -> Path:
        """Join pieces of the project into one file; returns its path: .mkv where mp4 cannot be had."""
        joined = join_segments(self.folder, segments, path, self.plan.fps, self.metadata, announce=self.announce)
        return joined.path

    def _write(self) -> None:
        """Decode everything that has become final, and let it be encoded.

        What was left to do of the sections before comes first: no more than one is ever behind, and the edge of the
        decoded frames, which is encoded too, is blended over by the next decode.
        """
        self.beside.wait()
        if self.decoder is None:
            self._begin()
        if self.unread:  # it looks at pieces on this thread, and what `_begin` has given looks at its own
            self.beside.wait()
        self._read_again()
        self._decode()

    def _decode(self) -> None:
        assert self.decoder is not None
        while self.unfed:
            section = self.unfed.pop(0)
            self._write_pieces(self.decoder.finished(section.start, section.stop))

    def _begin(self) -> None:
        """Start the decoder with the pieces that are on disk already."""
        plan = self.plan
        batch = self.frames.first.shape[0]
        if batch > 1:
            self.announce(
                f"The node plays and writes the first of {batch} videos, as {self.project.name}.mp4. 'Save Long Video' "
                "makes a file of each from 'samples'."
            )
        for piece in plan_pieces(plan.order, plan.total_frames, plan.schedule.window, plan.clips):
            segment = self._written_before(piece)
            if segment is not None:
                self._add(segment)
                self.unread.append(segment)
        self.decoder = StreamDecoder(
            self.decode, plan.order, plan.total_frames, plan.schedule.window, self._latents,
            clips=plan.clips, have=tuple(self.segments), interrupt=self._check,
        )  # fmt: skip
        self._write_pieces(self.decoder.finished(0, self.frames.first.shape[2]))

    def _check(self) -> None:
        """Raise where the artist has pressed Cancel."""
        if self.interrupt is not None:
            self.interrupt()

    def _read_again(self) -> None:
        """Look at the pieces that an earlier run has written. It can take minutes, so Cancel ends it between chunks."""
        count = len(self.unread)
        while self.unread:
            self.say(f"Looking through what is finished: piece {count - len(self.unread) + 1} of {count}.")
            for first, frames in read_segment(self.folder, self.unread[0]):
                self._check()
                self._look_at(first, frames)
            del self.unread[0]

    def _latents(self, start: int, stop: int) -> Tensor:
        return self.frames.between(start, stop)[:1]

    def _written_before(self, piece: PieceRange) -> Segment | None:
        for record in self.project.manifest.segments.values():
            if (record["start_frame"], record["stop_frame"]) == (piece.start_frame, piece.stop_frame):
                segment = Segment(**record)
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

    def _write_pieces(self, pieces: Iterable[Piece]) -> None:
        for made in pieces:
            piece = _on_cpu(made)
            (planned,) = (p for p in self.decoder.pieces if p.start_frame == piece.start_frame)
            self.beside.give(partial(self._write_piece, piece, self._key(planned) or ""))
            del made, piece

    def _write_piece(self, piece: Piece, key: str) -> None:
        segment = write_segment(self.folder, piece, self.plan.fps, crf=self.crf, key=key)
        self.project.set_segment(segment.name, segment.as_dict())
        self.written_from = min(self.written_from, piece.start_frame)
        self._add(segment)
        self._look_at(piece.start_frame, piece.frames_THWC)

    def _add(self, segment: Segment) -> None:
        self.segments[segment.start_frame, segment.stop_frame] = segment

    def _look_at(self, first: int, frames_THWC) -> None:
        self.judge.look(first, frames_THWC)

    def _judge(self, again: bool = False) -> None:
        """Measures of sections whose pixels are all final, into the manifest.

        again: of all of them, since drift is measured against sections before it in time, which F0 makes later. Numbers
        of an earlier run stay where this one has written nothing up to the section's end.
        """
        found: dict[int, dict[str, float]] = {}
        for index, number in self.numbers.items():
            if (index in self.judged and not again) or index not in self.sections or not self.judge.complete(number):
                continue
            self.judged.add(index)
            ends = self.judge.guarded[number].stop_frame
            if self.project.manifest.sections[index].measures and ends <= self.written_from:
                continue
            found[index], warnings = self.judge.result(number)
            for warning in warnings:
                if warning not in self.warned:
                    log.warning("%s: %s", self.project.name, warning)
                self.warned.add(warning)
        self.project.annotate(found)


def _on_cpu(piece: Piece) -> Piece:
    """With --gpu-only pixels lie on the GPU, where each look at them would wait for what is sampled meanwhile."""
    return replace(piece, frames_THWC=piece.frames_THWC.cpu())


def _longest_stretch(segments: Iterable[Segment]) -> list[Segment]:
    """The longest row without a gap: all of them, except where Cancel came while a damaged one was made again."""
    rows: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: s.start_frame):
        if not rows or rows[-1][-1].stop_frame != segment.start_frame:
            rows.append([])
        rows[-1].append(segment)
    return max(rows, key=lambda row: row[-1].stop_frame - row[0].start_frame, default=[])
