"""Curves with axes, units and bounds as a PNG, with pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL_HEIGHT = 1200, 420
LEFT, RIGHT, TOP, BOTTOM = 90, 40, 60, 70
INK, FAINT, BOUND = (40, 40, 40), (222, 222, 222), (200, 60, 50)
LINES = ((31, 105, 180), (20, 130, 90), (150, 90, 20))
TICKS = 5
# Steps between the marks of an axis, times a power of ten.
ROUND_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Curve:
    """One line: `y` over `x`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One diagram. `bounds` are `(height, words)`; the vertical axis goes from 0 to `top`."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    bounds: Sequence[tuple[float, str]]
    top: float


def round_step(span: float) -> float:
    """A round distance between about `TICKS` marks of an axis."""
    power = 1.0
    while power * 10 < span / TICKS:
        power *= 10
    while power > span / TICKS:
        power /= 10
    return next(step * power for step in ROUND_STEPS if step * power >= span / TICKS * 0.999)


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels below each other."""
    image = Image.new("RGB", (WIDTH, PANEL_HEIGHT * len(panels)), "white")
    for index, panel in enumerate(panels):
        _draw(ImageDraw.Draw(image), panel, index * PANEL_HEIGHT)
    image.save(path, optimize=True)


def _draw(draw: ImageDraw.ImageDraw, panel: Panel, offset: int) -> None:
    font, small = ImageFont.load_default(22), ImageFont.load_default(17)
    base, height = offset + PANEL_HEIGHT - BOTTOM, PANEL_HEIGHT - BOTTOM - TOP
    right = max(x for curve in panel.curves for x in curve.x)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / right, base - height * y / panel.top

    draw.text((LEFT, offset + 16), panel.title, INK, font)
    for mark in _marks(panel.top):
        draw.line([place(0, mark), place(right, mark)], FAINT)
        draw.text((LEFT - 8, place(0, mark)[1]), f"{mark:g}", INK, small, anchor="rm")
    for mark in _marks(right):
        draw.line([place(mark, 0), (place(mark, 0)[0], base + 6)], INK)
        draw.text((place(mark, 0)[0], base + 10), f"{mark:g}", INK, small, anchor="mt")
    draw.line([place(0, panel.top), place(0, 0), place(right, 0)], INK, 2)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, base + 36), panel.x_label, INK, small, anchor="mt")
    draw.text((12, offset + TOP - 26), panel.y_label, INK, small)
    for level, words in panel.bounds:
        draw.line([place(0, level), place(right, level)], BOUND, 2)
        draw.text((WIDTH - RIGHT, place(0, level)[1] - 6), words, BOUND, small, anchor="rb")
    for colour, curve in zip(LINES, panel.curves):
        points = [place(x, y) for x, y in zip(curve.x, curve.y)]
        draw.line(points, colour, 3, joint="curve")
        text = f"{curve.name}, at the end {curve.y[-1]:.0f} {panel.y_label}"
        draw.text((points[-1][0], points[-1][1] + 24), text, colour, small, anchor="rt")


def _marks(top: float) -> list[float]:
    step = round_step(top)
    return [step * i for i in range(int(top / step + 1e-9) + 1)]
