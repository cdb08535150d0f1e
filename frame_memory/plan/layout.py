"""Geometry of a picture: what a schedule keeps at which rate.

Only rectangles, texts and colours (0xRRGGBB ints) in pixels with the origin at the top left; the node draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from .schedule import Schedule
from .tokens import schedule_tokens

BACKGROUND, INK, FAINT = 0x1B1D21, 0xE8E6E1, 0x6B7078
WINDOW_COLOUR, TAIL_COLOUR = 0xF2A33A, 0x8A6FB0
KERNEL_COLOURS = {1: 0xBFE3F5, 2: 0x6FB6E0, 4: 0x2F7FB8, 8: 0x1C4E78}

_MARGIN, _LINE, _TITLE = 16, 20, 14
_BAR = 96  # height of a full-rate frame
_SKIP_UNITS = 2  # width of a skip or a tail, in frames


@dataclass(frozen=True)
class Rect:
    """A filled rectangle. kind: 'window', 'context', 'tail' or 'key'."""

    x: int
    y: int
    width: int
    height: int
    colour: int
    kind: str


@dataclass(frozen=True)
class Label:
    """A text whose top left corner is at (x, y); size in pixels."""

    x: int
    y: int
    text: str
    size: int
    colour: int


@dataclass(frozen=True)
class PackingPicture:
    """All there is to draw, inside width x height."""

    width: int
    height: int
    background: int
    rects: tuple[Rect, ...]
    labels: tuple[Label, ...]


def packing_picture(
    schedule: Schedule, *, latent_height: int = 76, latent_width: int = 80, width: int = 960
) -> PackingPicture:
    """One section in time order: each frame a bar whose height falls with its rate, and a key with token counts.

    latent_height, latent_width: size for the token counts; default 640x608 pixels.
    """
    counts = schedule_tokens(schedule, latent_height, latent_width)
    parts = _parts(schedule)
    ends = list(accumulate(units for _, units, _ in parts))
    inner = width - 2 * _MARGIN
    top = _MARGIN + _LINE
    labels = [Label(_MARGIN, _MARGIN, schedule.text, _TITLE, INK)]
    rects: list[Rect] = []
    for (kind, units, kernel), end in zip(parts, ends):
        left, right = (_MARGIN + inner * edge // ends[-1] for edge in (end - units, end))
        if kind == "skip":
            labels.append(Label(left, top + _BAR - _TITLE, "...", _TITLE, FAINT))
            continue
        height = _BAR // kernel
        colour = {"window": WINDOW_COLOUR, "tail": TAIL_COLOUR}.get(kind) or KERNEL_COLOURS[kernel]
        rects += _bars(left, right, units if kind != "tail" else 1, top + _BAR - height, height, colour, kind)
    y = top + _BAR + _LINE // 2
    for text, colour in _key(schedule, counts):
        rects.append(Rect(_MARGIN, y + 3, 12, 12, colour, "key"))
        labels.append(Label(_MARGIN + 20, y, text, _TITLE, INK))
        y += _LINE
    total = f"{counts.video:,} tokens at {8 * latent_width}x{8 * latent_height}, of them {counts.context:,} context"
    labels.append(Label(_MARGIN, y, total, _TITLE, INK))
    return PackingPicture(width, y + _LINE + _MARGIN, BACKGROUND, tuple(rects), tuple(labels))


def _parts(schedule: Schedule) -> list[tuple[str, int, int]]:
    """(kind, units of width, kernel) from left to right."""

    def context(groups):
        return [("context", group.frames, group.kernel) for group in groups]

    skip, tail = ("skip", _SKIP_UNITS, 1), ("tail", _SKIP_UNITS, 8)
    return [
        *context(schedule.anchor_before),
        *[skip] * (schedule.skip_before or schedule.tail_before == "d"),
        *[tail] * (schedule.tail_before in ("a", "c")),
        *context(schedule.history_before),
        ("window", schedule.window, 1),
        *context(schedule.history_after),
        *[tail] * (schedule.tail_after in ("a", "c")),
        *[skip] * (schedule.skip_after or schedule.tail_after == "d"),
        *context(schedule.anchor_after),
    ]


def _bars(left: int, right: int, count: int, y: int, height: int, colour: int, kind: str) -> list[Rect]:
    """`count` bars with a gap of one pixel between them; one solid bar where there is no room for gaps."""
    if right - left < 3 * count:
        return [Rect(left, y, max(right - left, 1), height, colour, kind)]
    edges = [left + (right - left) * i // count for i in range(count + 1)]
    return [Rect(a, y, b - a - 1, height, colour, kind) for a, b in pairwise(edges)]


def _key(schedule: Schedule, counts) -> list[tuple[str, int]]:
    lines = [(f"window: {_frames(schedule.window)} made together, {counts.window:,} tokens", WINDOW_COLOUR)]
    for kernel in reversed(schedule.kernels):
        tokens = sum(n for group, n in zip(schedule.groups, counts.groups) if group.kernel == kernel)
        frames = sum(group.frames for group in schedule.groups if group.kernel == kernel)
        lines.append((f"{kernel}x: {_frames(frames)}, {tokens:,} tokens", KERNEL_COLOURS[kernel]))
    tails = {schedule.tail_before, schedule.tail_after} & {"a", "c"}
    if tails:
        text = "one token a frame" if "a" in tails else "one token in all"
        lines.append((f"tail: all that is farther away, {text}", TAIL_COLOUR))
    return lines


def _frames(count: int) -> str:
    return f"{count} latent frame{'s' * (count != 1)}"
