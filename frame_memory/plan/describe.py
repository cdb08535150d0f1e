"""The table of a long video that an artist reads before the run. All frame numbers in it are pixel frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .frames import BLANK, END, START, pixel_span, runs

if TYPE_CHECKING:
    from .sections import LongVideoPlan, Section

_NAMES = {START: "start", END: "end", BLANK: "empty"}
# Frame 0 of a video of clips: the start picture as it looks at the end of a still clip.
_STILL = "still"


def describe_plan(plan: LongVideoPlan) -> str:
    """Length first, then one aligned row a section in the order of making."""
    window = plan.schedule.window
    count = len(plan.sections)
    sections = "1 section" if count == 1 else f"{count} sections"
    made = f"{sections} of {window} latent frames make{'s' * (count == 1)} {plan.pixel_frames} frames"
    # Of a video of clips the frame in front is not shown.
    latent_frames = plan.total_frames - plan.clips
    lines = [
        f"{made} = {plan.seconds:.2f} s at {plan.fps:g} fps ({latent_frames} latent frames).",
        f"Schedule {plan.schedule.text}, order {plan.order}. Sections are listed in the order they are made.",
    ]
    if plan.given_frames:
        first, last = pixel_span(0, plan.given_frames)
        lines.append(f"The given video is frames {first}-{last}.")
    if plan.clips:
        lines.append("Each section is decoded alone, as this model was trained; the start picture is not shown.")
    rates = plan.schedule.kernels
    tails = any(section.tail for section in plan.sections)
    head = ["section", "makes frames", "seconds", *(f"sees at {rate}x" for rate in rates), *["tail"] * tails, "needs"]
    rows = [_row(plan, section, rates, tails) for section in plan.sections]
    return "\n".join([*lines, "", *align([head, *rows])])


def align(rows: list[list[str]]) -> list[str]:
    """Rows of cells to lines with columns of one width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(plan: LongVideoPlan, section: Section, rates: tuple[int, ...], tails: bool) -> list[str]:
    first, last = pixel_span(section.start, section.stop, plan.clip)
    begin, end = plan.span_seconds(section)
    cells = [str(section.index + 1), f"{first}-{last}", f"{begin:.2f}-{end:.2f}"]
    for rate in rates:
        seen = [_frames(group.frames, plan.clip) for group in section.groups if group.kernel == rate]
        cells.append(", ".join(seen))
    if tails:
        cells.append(_frames(section.tail.frames, plan.clip) if section.tail else "-")
    cells.append(", ".join(str(i + 1) for i in section.depends_on) or "-")
    return cells


def _frames(frames: tuple[int, ...], clip: int) -> str:
    parts = []
    if clip and 0 in frames:
        frames, parts = tuple(frame for frame in frames if frame != 0), [_STILL]
    for start, stop in runs(frames):
        first, last = pixel_span(start, stop, clip)
        parts.append(_NAMES[start] if start < 0 else str(first) if first == last else f"{first}-{last}")
    return ", ".join(parts)
