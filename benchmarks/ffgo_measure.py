"""What a video shows of an FFGo composition, measured against the world of shots: is the canvas gone, and is every
reference there, in its own colour and shape.

Shape legend: T frames, H W pixels (96 x 96), 3 colour channels; images are float, 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import world
from .shots import COLOURS, HEIGHT, RADIUS, SHAPES, STUDIO, WIDTH, Shot, Sprite

# Looked at after the cut, away from the latent frame that is part canvas: once in each later latent frame.
LOOKED_AT = (10, 14, 18, 22)
WHITE_SHARE = 0.3
FOUND_SHARE = (0.45, 1.8)
LEAST_OVERLAP = 0.5


def _palette() -> tuple[np.ndarray, list[str]]:
    """Every colour of this world by name: sprites, grounds (dark, light, between), white."""
    colours = {f"sprite {name}": value for name, value in COLOURS.items()}
    for name, (dark, light) in world.GROUND_COLOURS.items():
        middle = tuple((a + b) / 2 for a, b in zip(dark, light, strict=True))
        colours |= {f"ground {name} 0": dark, f"ground {name} 1": light, f"ground {name} 2": middle}
    colours[STUDIO] = (1.0, 1.0, 1.0)
    return np.array(list(colours.values()), dtype=np.float32), list(colours)


PALETTE, NAMES = _palette()


@dataclass(frozen=True)
class Shown:
    """One video. cut: the canvas is gone. found, right: of each reference, the share of the frames looked at that show
    a spot of its colour and size, and one of its shape as well. ground: its colour is the background's.
    """

    cut: bool
    found: tuple[float, ...]
    right: tuple[float, ...]
    ground: bool

    @property
    def activated(self) -> bool:
        """The canvas is gone and every reference is there in most frames."""
        return self.cut and min(self.found) > 0.5


def measure(video_THWC: np.ndarray, shot: Shot) -> Shown:
    """Measure a video that was asked to show `shot`'s cast over its ground."""
    frames = np.asarray(video_THWC, dtype=np.float32)[list(LOOKED_AT)]
    nearest = nearest_colours(frames)
    white = (nearest == NAMES.index(STUDIO)).mean(axis=(1, 2))
    gone = white < WHITE_SHARE
    found, right = [], []
    for sprite in shot.cast:
        spots = nearest == NAMES.index(f"sprite {sprite.colour}")
        seen = [look(spot, sprite) if g else (False, False) for spot, g in zip(spots, gone, strict=True)]
        found.append(float(np.mean([s[0] for s in seen])))
        right.append(float(np.mean([s[1] for s in seen])))
    return Shown(bool(gone.mean() > 0.5), tuple(found), tuple(right), _ground(nearest, shot))


def nearest_colours(frames_THWC: np.ndarray) -> np.ndarray:
    """The colour of this world that is nearest to each pixel, `[T, H, W]`: an index of NAMES."""
    return np.stack([np.square(frames_THWC - c).sum(-1) for c in PALETTE], axis=-1).argmin(-1)


def _ground(nearest_THW: np.ndarray, shot: Shot) -> bool:
    """The commonest ground colour of the picture is the shot's."""
    grounds = [NAMES[i].split()[1] for i in nearest_THW.ravel() if NAMES[i].startswith("ground")]
    return bool(grounds) and max(set(grounds), key=grounds.count) == shot.ground_colour


def look(spot_HW: np.ndarray, sprite: Sprite) -> tuple[bool, bool]:
    """Whether a spot of one colour is a sprite, and one of the right shape."""
    ideal = world.shape_mask(sprite.shape, RADIUS, np.array([[WIDTH / 2, HEIGHT / 2]]), WIDTH, HEIGHT).sum()
    if not FOUND_SHARE[0] * ideal < spot_HW.sum() < FOUND_SHARE[1] * ideal:
        return False, False
    overlaps = {shape: _overlap(spot_HW, shape) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return overlaps[best] > LEAST_OVERLAP, overlaps[best] > LEAST_OVERLAP and best == sprite.shape


def _overlap(spot_HW: np.ndarray, shape: str) -> float:
    """Highest intersection over union with the shape near the spot's median point."""
    rows, columns = np.nonzero(spot_HW)
    y, x = np.median(rows) + 0.5, np.median(columns) + 0.5
    places = [(x + dx, y + dy) for dx in (-2, 0, 2) for dy in (-4, -2, 0, 2)]
    ideals = world.shape_mask(shape, RADIUS, np.array(places), WIDTH, HEIGHT) > 0.5
    return max(float((spot_HW & i).sum() / (spot_HW | i).sum()) for i in ideals)


def wilson(hits: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score)."""
    if not tries:
        return 0.0, 1.0
    p, centre = hits / tries, (hits / tries + z * z / (2 * tries)) / (1 + z * z / tries)
    half = z * math.sqrt(p * (1 - p) / tries + z * z / (4 * tries * tries)) / (1 + z * z / tries)
    return max(centre - half, 0.0), min(centre + half, 1.0)
