"""Guards and contact sheet over finished pixels, wherever a video is decoded: beside the sampler or when it is saved.

Shape legend: T frames, H W pixels, C colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..plan import pixel_frames
from ..plan.mark import LatentMark
from ..video.contact import ContactSheet, SheetSection
from ..video.guards import GuardSection, VideoGuards

# The contact sheet's file in a project.
SHEET = "contact_sheet.png"
NOTHING_FOUND = (
    "Checked {} sections: none is frozen, no jump, no drift of brightness, colours or sharpness. Shapes and faces are "
    "not judged."
)


def pixel_spans(sections: Sequence[tuple[int, int]], clip: int = 0) -> list[tuple[int, int, int]]:
    """`(number from 1, first pixel frame, one past the last)` of sections given as latent frames, in order of time.

    clip: latent frames of each clip of a video of clips, 0 for a running video.
    """
    numbered = enumerate(sorted(sections), 1)
    return [(n, pixel_frames(start, clip), pixel_frames(stop, clip)) for n, (start, stop) in numbered]


def marked_sections(mark: LatentMark | None, total: int) -> list[tuple[int, int]]:
    """The sections, in latent frames, of a LATENT whose mark says where they begin; none where it does not.

    total: latent frames. A latent that was cut since no longer fits the mark: none either.
    """
    if mark is None or mark.given < 1 or total <= mark.given or (total - mark.given) % mark.window:
        return []
    return [(start, start + mark.window) for start in range(mark.given, total, mark.window)]


class Judged:
    """Takes the pixels of a video piece by piece, in any order, and says what an artist should know of each section.

    sections: latent frames `(start, stop)` of all of them. first_frame: pixel frame of the video that frame 0 given to
    `look` is, for a part of a longer video. clip: latent frames of each clip of a video of clips.
    """

    def __init__(
        self, sections: Sequence[tuple[int, int]], fps: Fraction | float, first_frame: int = 0, clip: int = 0
    ):  # fmt: skip
        spans = pixel_spans(sections, clip)
        self.guarded = {number: GuardSection(number, *frames) for number, *frames in spans}
        self.guards = VideoGuards(list(self.guarded.values()))
        self.sheet = ContactSheet([SheetSection(*span) for span in spans], fps)
        self.first_frame = first_frame

    def look(self, first: int, frames_THWC) -> None:
        """Take frames, uint8 or floats 0..1; they are not kept."""
        self.sheet.add(self.first_frame + first, frames_THWC)
        self.guards.add(self.first_frame + first, frames_THWC)

    def complete(self, number: int) -> bool:
        """Whether every frame of a section has come."""
        return self.guards.complete(self.guarded[number])

    def result(self, number: int) -> tuple[dict[str, float], tuple[str, ...]]:
        """Measures and warnings of a complete section."""
        section = self.guarded[number]
        return self.guards.measures(section), self.guards.warnings(section)

    def results(self) -> dict[int, tuple[dict[str, float], tuple[str, ...]]]:
        """Those of every complete section, by number."""
        return {number: self.result(number) for number in self.guarded if self.complete(number)}
