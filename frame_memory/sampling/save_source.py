"""What Save Long Video is to decode: a LATENT, or a project on disk; and what is looked for in its pixels."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

from ..journal.files import JournalError
from ..plan.decode import DecodeWindow
from ..plan.mark import KEY, read_mark
from ..video.decode import DecodeError
from ..video.save import video_latents
from .judged import NOTHING_FOUND, SHEET, Judged, marked_sections
from .stored import NODE, StoredVideo, annotate_stored, open_stored

log = logging.getLogger(__name__)


class SaveSource:
    """A LATENT dict to save, with its project where there is one.

    windows: those to decode it in; None for the usual ones. lines: what an artist should know of the choice.
    """

    def __init__(self, samples: Mapping, stored: StoredVideo | None, windows: tuple[DecodeWindow, ...] | None = None):
        self.samples, self.stored, self.windows = samples, stored, windows
        self.lines: list[str] = []
        self.judge: Judged | None = None

    def begin(self, fps: Fraction) -> Callable[[int, object], None]:
        """Start on one video of the batch; returns what takes its pixels."""
        if self.stored is not None:
            self.judge = Judged(self.stored.sections, fps, self.stored.first_frame, self.stored.mark.clip)
        else:
            mark = read_mark(self.samples)
            sections = marked_sections(mark, self.samples["samples"].shape[2])
            self.judge = Judged(sections, fps, clip=mark.clip if mark else 0)
        return self.judge.look

    def end(self, first: bool = True) -> list[str]:
        """Lines for the report of the video that was just saved. first: it is the batch's first, the project's own."""
        assert self.judge is not None
        results = self.judge.results()
        warnings = [warning for _, (_, found) in sorted(results.items()) for warning in found]
        for warning in warnings:
            log.warning("%s: %s", NODE, warning)
        lines = [*self.lines, *(f"Warning: {warning}" for warning in warnings)]
        if results and not warnings:
            lines.append(NOTHING_FOUND.format(len(results)))
        if first and self.stored is not None:
            lines += self._into_project(results)
        return lines

    def _into_project(self, results) -> list[str]:
        assert self.stored is not None and self.judge is not None
        refused = annotate_stored(self.stored, results)
        sheet = self.stored.folder / SHEET
        try:
            self.judge.sheet.save(sheet)
        except OSError as error:
            return [f"Warning: the contact sheet was not written ({error})."] + ([refused] if refused else [])
        return [f"Contact sheet: {self.stored.folder.name}/{SHEET}"] + ([refused] if refused else [])


def choose(root: Path, samples: Mapping | None, project: str) -> SaveSource:
    """Decide what is saved. root: the folder of all projects.

    Raises DecodeError where neither or two different videos are given, JournalError for a project that cannot be read.
    """
    if project.strip():
        stored = open_stored(root, project)
        if samples is None:
            source = SaveSource(stored.samples(), stored, None if stored.whole else stored.windows)
            source.lines = [stored.describe(), *(f"Warning: {note}" for note in stored.notes)]
            return source
        if not stored.same_as(video_latents(samples)):
            raise DecodeError(
                f"'{NODE}' got two different videos: a latent in 'samples', and the project {stored.folder.name!r}. "
                "Expected one of them. Disconnect 'samples' to save the project, or leave 'project' empty."
            )
        source = SaveSource(samples, stored)
        source.lines = [f"'samples' and the project {stored.folder.name!r} are the same video: 'samples' was saved"]
        return source
    if samples is None:
        raise DecodeError(
            f"'{NODE}' got nothing to save: 'samples' is not connected and 'project' is empty. Connect 'samples' of "
            "'Anti-Drift Sampler', or type the name of a folder in output/frame_memory into 'project'."
        )
    return SaveSource(samples, _behind(root, samples))


def _behind(root: Path, samples: Mapping) -> StoredVideo | None:
    """The project that a LATENT says it comes from, if it still holds that very video."""
    mark = read_mark({KEY: samples.get(KEY)})
    if mark is None or not mark.project:
        return None
    with contextlib.suppress(JournalError):
        stored = open_stored(root, mark.project)
        if stored.same_as(video_latents(samples)):
            return stored
    return None
