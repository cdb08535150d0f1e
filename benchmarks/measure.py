"""Measures a video of the synthetic world against its truth: is the sprite there, of its colour and shape, where it
should be, and is the background as it was.

Shape legend: T frames, H W pixels, 3 colour channels; images are float, 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import DIRECTIONS, GROUND_COLOURS, SHAPES, SIZE, SPRITE_COLOURS, Scene, background, positions, shape_mask

FOUND_SHARE = (0.45, 1.8)
MISSING = np.nan
PACE_FRAMES = 8


@dataclass(frozen=True)
class FrameMeasures:
    """One value for each frame; NaN where no sprite was found.

    found: a sprite-coloured spot of about the right size. colour: its commonest colour is the scene's. colour_error:
    mean absolute RGB difference. shape: the best fitting shape is the scene's. overlap: intersection over union with
    the true shape at the spot's own place. distance: pixels from where the sprite should be. across: pixels off its
    straight track. pace: speed along the track as a share of the true one, over `PACE_FRAMES` frames. background: PSNR
    in dB of everything that is no sprite.

    F0 makes the end first and is not told how far away the start is, so where on the track its sprite is at a given
    time is not settled by its input; that it keeps to the track at the right speed is.
    """

    found: np.ndarray
    colour: np.ndarray
    colour_error: np.ndarray
    shape: np.ndarray
    overlap: np.ndarray
    distance: np.ndarray
    across: np.ndarray
    pace: np.ndarray
    background: np.ndarray

    def means(self, part: slice) -> dict[str, float]:
        """Mean of each measure over a part of the video (missing frames left out, except in `found`)."""

        def mean(values: np.ndarray) -> float:
            kept = values[part][~np.isnan(values[part])]
            return float(kept.mean()) if len(kept) else MISSING

        return {name: mean(getattr(self, name)) for name in self.__dataclass_fields__}


def sprite_pixels(video_THWC: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels show any sprite colour `[T, H, W]`, and which colour (index into SPRITE_COLOURS)."""
    sprites = np.array(list(SPRITE_COLOURS.values()), dtype=np.float32)
    grounds = np.array(GROUND_COLOURS[scene.ground_colour], dtype=np.float32)
    grounds = np.concatenate([grounds, grounds.mean(0, keepdims=True)])
    palette = np.concatenate([sprites, grounds])
    planes = [np.ascontiguousarray(video_THWC[..., channel]) for channel in range(3)]
    nearest, least = np.zeros(video_THWC.shape[:-1], dtype=np.intp), np.full(video_THWC.shape[:-1], np.inf)
    for index, colour in enumerate(palette):
        distance = sum(np.square(plane - value) for plane, value in zip(planes, colour, strict=True))
        nearest[distance < least] = index
        least = np.minimum(least, distance)
    return nearest < len(sprites), nearest


def measure(video_THWC: np.ndarray, scene: Scene, first_frame: int = 0) -> FrameMeasures:
    """Measure every frame of `video`, whose first is frame `first_frame` of the scene."""
    frames = np.arange(first_frame, first_frame + len(video_THWC))
    video = np.asarray(video_THWC, dtype=np.float32)
    mask, nearest = sprite_pixels(video, scene)
    truth = positions(scene, frames)
    area = shape_mask(scene.shape, scene.radius, np.array([[SIZE / 2, SIZE / 2]])).sum()
    count = mask.sum(axis=(1, 2))
    found = (count > FOUND_SHARE[0] * area) & (count < FOUND_SHARE[1] * area)
    columns = np.full((5, len(video)), MISSING)
    offsets_T2 = np.full((len(video), 2), MISSING)
    grid = np.arange(SIZE) + 0.5
    wanted = list(SPRITE_COLOURS).index(scene.colour)
    true_colour = np.array(SPRITE_COLOURS[scene.colour], dtype=np.float32)
    for t in np.flatnonzero(found):
        spot = mask[t]
        centre = np.array([(spot.sum(0) * grid).sum(), (spot.sum(1) * grid).sum()]) / spot.sum()
        shown = np.bincount(nearest[t][spot], minlength=len(SPRITE_COLOURS)).argmax()
        error = np.abs(np.median(video[t][spot], axis=0) - true_colour).mean()
        overlaps = {shape: best_overlap(spot, shape, scene.radius) for shape in SHAPES}
        best = max(overlaps, key=overlaps.get)
        offsets_T2[t] = centre - _centroid(scene, truth[t])
        columns[:, t] = (
            shown == wanted,
            error,
            best == scene.shape,
            overlaps[scene.shape],
            np.hypot(*offsets_T2[t]),
        )
    direction = np.array(DIRECTIONS[scene.direction])
    along_T = (offsets_T2 + truth) @ direction
    travelled_T = np.abs(along_T[PACE_FRAMES:] - along_T[:-PACE_FRAMES]) / PACE_FRAMES
    pace_T = np.append(travelled_T / scene.pace, np.full(min(PACE_FRAMES, len(video)), MISSING))[: len(video)]
    return FrameMeasures(
        found.astype(float),
        *columns,
        across=np.abs(offsets_T2 @ direction[::-1]),
        pace=pace_T,
        background=_background_psnr(video, scene, frames, mask),
    )


def _centroid(scene: Scene, centre: np.ndarray) -> np.ndarray:
    """Centre of mass of the sprite at `centre` (a triangle's is not its middle)."""
    ideal = shape_mask(scene.shape, scene.radius, centre[None])[0]
    grid = np.arange(SIZE) + 0.5
    return np.array([(ideal.sum(0) * grid).sum(), (ideal.sum(1) * grid).sum()]) / max(ideal.sum(), 1e-6)


def best_overlap(spot: np.ndarray, shape: str, radius: float) -> float:
    """Highest intersection over union of the spot with the shape moved to the spot's bounding box middle or mass."""
    rows, columns = np.flatnonzero(spot.any(1)), np.flatnonzero(spot.any(0))
    middle = np.array([columns[[0, -1]].mean() + 0.5, rows[[0, -1]].mean() + 0.5])
    shifts = [(0.0, 0.0), (0.0, radius * 0.2), (0.0, -radius * 0.2)]
    ideals = shape_mask(shape, radius, np.array([middle + s for s in shifts])) > 0.5
    return max(float((spot & i).sum() / (spot | i).sum()) for i in ideals)


def _background_psnr(video: np.ndarray, scene: Scene, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    grown = mask.copy()
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        grown |= np.roll(mask, step, axis)
    error = np.square(video - background(scene, frames)).mean(-1)
    kept = np.where(grown, 0, error).sum(axis=(1, 2)) / np.maximum((~grown).sum(axis=(1, 2)), 1)
    return -10 * np.log10(np.maximum(kept, 1e-8))
