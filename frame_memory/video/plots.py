"""Curves with axes, units and bounds as a picture, with pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL_HEIGHT = 1200, 420
LEFT, RIGHT, TOP, BOTTOM = 90, 40, 60, 70
INK, FAINT, BOUND, SHADE = (40, 40, 40), (222, 222, 222), (200, 60, 50), (236, 242, 250)
LINES = ((31, 105, 180), (20, 130, 90), (150, 90, 20))
TICKS = 5
# Height of the smaller letters, in pixels.
SMALL = 17
# Steps between the marks of an axis, times a power of ten.
ROUND_STEPS = (1, 2, 2.5, 5, 10)
# Room above and below the highest and the lowest point of a curve whose axis is chosen for it, as a share of its span.
MARGIN = 0.15
# A curve of so few points gets a dot at each: a line through one point cannot be seen.
FEW_POINTS, DOT = 12, 5


@dataclass(frozen=True)
class Curve:
    """One line: `y` over `x`. note: what stands beside it; None for its name and the value at its end."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    note: str | None = None


@dataclass(frozen=True)
class Panel:
    """One diagram. `bounds` are `(height, words)`; the vertical axis goes from `bottom` to `top`.

    shades: stretches `(from, to)` of the horizontal axis that are set apart.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    bounds: Sequence[tuple[float, str]]
    top: float
    bottom: float = 0.0
    shades: Sequence[tuple[float, float]] = ()


def fitted(values: Sequence[float], least: float) -> tuple[float, float]:
    """(bottom, top) of an axis for some values, at least `least` apart: a still curve must not look like a wild one."""
    low, high = min(values), max(values)
    room = max(least - (high - low), 2 * MARGIN * (high - low)) / 2
    return low - room, high + room


def round_step(span: float) -> float:
    """A round distance between about `TICKS` marks of an axis."""
    power = 1.0
    while power * 10 < span / TICKS:
        power *= 10
    while power > span / TICKS:
        power /= 10
    return next(step * power for step in ROUND_STEPS if step * power >= span / TICKS * 0.999)


def draw_panels(panels: Sequence[Panel], height: int = PANEL_HEIGHT) -> Image.Image:
    """The panels below each other, each `height` pixels."""
    image = Image.new("RGB", (WIDTH, height * len(panels)), "white")
    for index, panel in enumerate(panels):
        _draw(ImageDraw.Draw(image), panel, index * height, height)
    return image


def save_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels as a PNG."""
    draw_panels(panels).save(path, optimize=True)


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture as a ComfyUI IMAGE [1, height, width, 3], 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def _draw(draw: ImageDraw.ImageDraw, panel: Panel, offset: int, panel_height: int) -> None:
    font, small = ImageFont.load_default(22), ImageFont.load_default(SMALL)
    base, height = offset + panel_height - BOTTOM, panel_height - BOTTOM - TOP
    ends = [end for _, end in panel.shades]
    right = max([*ends, *(x for curve in panel.curves for x in curve.x)], default=0) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        share = (y - panel.bottom) / (panel.top - panel.bottom)
        return LEFT + (WIDTH - LEFT - RIGHT) * x / right, base - height * share

    for begin, end in panel.shades:
        draw.rectangle([place(begin, panel.top), place(end, panel.bottom)], fill=SHADE)
    draw.text((LEFT, offset + 6), panel.title, INK, font)
    for mark in _marks(panel.bottom, panel.top):
        draw.line([place(0, mark), place(right, mark)], FAINT)
        draw.text((LEFT - 8, place(0, mark)[1]), f"{mark:g}", INK, small, anchor="rm")
    for mark in _marks(0, right):
        left = place(mark, panel.bottom)[0]
        draw.line([(left, base), (left, base + 6)], INK)
        draw.text((left, base + 10), f"{mark:g}", INK, small, anchor="mt")
    draw.line([place(0, panel.top), place(0, panel.bottom), place(right, panel.bottom)], INK, 2)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, base + 36), panel.x_label, INK, small, anchor="mt")
    draw.text((12, offset + TOP - 26), panel.y_label, INK, small)
    for level, words in panel.bounds:
        draw.line([place(0, level), place(right, level)], BOUND, 2)
        draw.text((WIDTH - RIGHT, place(0, level)[1] - 6), words, BOUND, small, anchor="rb")
    for colour, curve in zip(LINES, panel.curves):
        points = [place(x, y) for x, y in zip(curve.x, curve.y)]
        if not points:
            continue
        draw.line(points, colour, 3, joint="curve")
        for x, y in points if len(points) <= FEW_POINTS else ():
            draw.ellipse([x - DOT, y - DOT, x + DOT, y + DOT], colour)
        text = f"{curve.name}, at the end {curve.y[-1]:.0f} {panel.y_label}" if curve.note is None else curve.note
        end = points[-1][1]
        below = end + 24 + SMALL < base  # else it would stand on the numbers of the horizontal axis
        draw.text((points[-1][0], end + 24 if below else end - 12), text, colour, small, anchor="rt" if below else "rb")


def _marks(bottom: float, top: float) -> list[float]:
    step = round_step(top - bottom)
    first, last = math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]
