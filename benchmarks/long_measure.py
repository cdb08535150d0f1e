"""Measures a long video of the world against its truth: does the same visitor come back, where and when it must?

A video may begin with frames that were given to it, as one that goes on from another does. They say who the visitor
of the first visit is. Means are over what was made behind them; drift is how far the end is from the beginning, which
are the given frames.

Shape legend: T frames, H W pixels, 3 colour channels; images are float, 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .long_world import LongScene, away, centres, ground, render, wholly_there
from .measure import FOUND_SHARE, best_overlap, sprite_pixels
from .world import SHAPES, SIZE, SPRITE_COLOURS, TIDY_RADIUS, shape_mask

# An absence that FramePack's 19 latent frames (76 frames) do not span; the world's own are 4 * 32 frames.
ABSENCE = 76
# The paper's drift compares the first and the last 15 % of the frames in the order they are made.
DRIFT_SHARE = 0.15
STEP = 4  # frames between two that motion is taken from: one latent frame
FULL_SIZE = 0.8  # of the visitor's area: a spot of less has its shape cut off by the edge


@dataclass(frozen=True)
class LongMeasures:
    """One value for each frame `[T]`; NaN where there is nothing to judge.

    colour, shape: indices of what is seen (-1: none found). presence: 1 where the visitor is seen when it must be
    wholly there, or not at all when it must be away; 0 otherwise; NaN while it is in between. distance: pixels from
    where it must be, where it is seen when it must be there. background: PSNR in dB of all that is no sprite. motion:
    mean absolute change over a latent frame, as a share of the true video's (dynamic degree; 1 is right, 0 is still).
    identity: 1 where the visitor is seen and is the one seen first, 0 where it must be there and is not, or another is.
    first: colour and shape of the first visit. recall: see `_recall`; colour_recall: the same for the colour alone.
    given: frames in front that were not made.
    """

    colour: np.ndarray
    shape: np.ndarray
    presence: np.ndarray
    distance: np.ndarray
    background: np.ndarray
    motion: np.ndarray
    identity: np.ndarray
    first: tuple[int, int] | None
    recall: float
    colour_recall: float
    given: int

    def row(self, backwards: bool) -> dict[str, float]:
        """Means over what was made, and the video's drift. backwards: the end was made first (FramePack F0)."""
        out = {"recall": self.recall, "colour recall": self.colour_recall}
        for name in ("identity", "presence", "distance", "background", "motion"):
            values = getattr(self, name)
            out[name] = _mean(values[self.given :])
            out[f"drift of {name}"] = drift(values, backwards)
        return out


def drift(values: np.ndarray, backwards: bool) -> float:
    """|mean of the first 15 % - mean of the last 15 %| of the frames in the order of their making."""
    made = values[::-1] if backwards else values
    part = max(round(DRIFT_SHARE * len(made)), 1)
    return abs(_mean(made[:part]) - _mean(made[-part:]))


def measure_long(video_THWC: np.ndarray, scene: LongScene, given: int = 0) -> LongMeasures:
    """Measure a video of a scene from its first frame on. given: frames in front that were not made."""
    video = np.asarray(video_THWC, dtype=np.float32)
    frames = np.arange(len(video))
    mask, nearest = sprite_pixels(video, scene)
    area = shape_mask(scene.shape, TIDY_RADIUS, np.array([[SIZE / 2, SIZE / 2]])).sum()
    count = mask.sum(axis=(1, 2))
    seen = (count > FOUND_SHARE[0] * area) & (count < FOUND_SHARE[1] * area)
    gone, there, truth = away(scene, frames), wholly_there(scene, frames), centres(scene, frames)
    colour, shape = np.full(len(video), -1), np.full(len(video), -1)
    distance = np.full(len(video), np.nan)
    for t in np.flatnonzero(seen):
        spot = mask[t]
        colour[t] = np.bincount(nearest[t][spot], minlength=len(SPRITE_COLOURS)).argmax()
        if count[t] > FULL_SIZE * area and not _cut_off(spot):
            shape[t] = int(np.argmax([best_overlap(spot, s, TIDY_RADIUS) for s in SHAPES]))
        if there[t]:
            distance[t] = np.hypot(*(_middle(spot) - truth[t]))
    first = _first_seen(colour, shape)
    nobody = np.zeros(len(video), dtype=bool)
    same_colour = colour == first[0] if first is not None else nobody
    same = same_colour & ((shape == first[1]) | (shape < 0)) if first is not None else nobody
    identity = _kept(same, seen, there, first is not None)
    presence = np.where(there, seen, np.where(gone, count < 0.1 * area, np.nan)).astype(float)
    return LongMeasures(
        colour, shape, presence, distance,
        background=_background(video, scene, frames, mask),
        motion=_motion(video, scene, frames),
        identity=identity,
        first=first,
        recall=_recall(seen, identity, scene, frames),
        colour_recall=_recall(seen, _kept(same_colour, seen, there, first is not None), scene, frames),
        given=given,
    )  # fmt: skip


def _kept(same: np.ndarray, seen: np.ndarray, there: np.ndarray, known: bool) -> np.ndarray:
    """1 where the visitor is seen and `same`, 0 where it is another or must be there and is not seen, else NaN.

    known: whether there was a first visit to compare with; without one only its absence counts.
    """
    judged = np.where(seen & known, same, np.nan).astype(float)
    return np.where(there, np.nan_to_num(judged, nan=0.0), judged)


def _first_seen(colour: np.ndarray, shape: np.ndarray) -> tuple[int, int] | None:
    """The commonest colour and shape up to the first long absence; None where nobody came."""
    until = _returns(colour >= 0)[0]
    colours, shapes = colour[:until][colour[:until] >= 0], shape[:until][shape[:until] >= 0]
    if not len(colours) or not len(shapes):
        return None
    return int(np.bincount(colours).argmax()), int(np.bincount(shapes).argmax())


def _returns(seen: np.ndarray) -> tuple[int, list[int]]:
    """(frame at which the first visit is over, frames at which the visitor is back after a long absence)."""
    times = np.flatnonzero(seen)
    if not len(times):
        return len(seen), []
    gaps = np.flatnonzero(np.diff(times) > ABSENCE)
    return (int(times[gaps[0]]) + 1 if len(gaps) else len(seen)), [int(times[g + 1]) for g in gaps]


def _recall(seen: np.ndarray, identity: np.ndarray, scene: LongScene, frames: np.ndarray) -> float:
    """The share of the frames after a long absence, seen or due, that show the visitor of the first visit.

    Frames count from its first return on, as the video has it or as the truth has it, whichever is earlier; so a
    visitor that never comes back is not remembered either. NaN where the video is too short for a return.
    """
    due = _due_again(scene, frames)
    if due is None:
        return float("nan")
    back = _returns(seen)[1]
    judged = identity[min([due, *back]) :]
    return _mean(judged)


def _due_again(scene: LongScene, frames: np.ndarray) -> int | None:
    """The first frame at which the visitor must be wholly there after its first absence, None where there is none."""
    there, gone = wholly_there(scene, frames), away(scene, frames)
    # The video may begin with the visitor out of sight: its first absence is the one after it was there.
    came = np.flatnonzero(there)
    left = np.flatnonzero(gone[came[0] :]) if len(came) else came
    if not len(left):
        return None
    back = np.flatnonzero(there[came[0] + left[0] :])
    return int(came[0] + left[0] + back[0]) if len(back) else None


def _cut_off(spot: np.ndarray) -> bool:
    return bool(spot[0].any() or spot[-1].any() or spot[:, 0].any() or spot[:, -1].any())


def _middle(spot: np.ndarray) -> np.ndarray:
    """Middle of the spot's box (x, y)."""
    rows, columns = np.flatnonzero(spot.any(1)), np.flatnonzero(spot.any(0))
    return np.array([columns[[0, -1]].mean() + 0.5, rows[[0, -1]].mean() + 0.5])


def _background(video: np.ndarray, scene: LongScene, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    grown = mask.copy()
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        grown |= np.roll(mask, step, axis)
    error = np.square(video - ground(scene, frames)).mean(-1)
    kept = np.where(grown, 0, error).sum(axis=(1, 2)) / np.maximum((~grown).sum(axis=(1, 2)), 1)
    return -10 * np.log10(np.maximum(kept, 1e-8))


def _motion(video: np.ndarray, scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """Change over STEP frames against the truth's; NaN where the true picture hardly changes."""
    out = np.full(len(video), np.nan)
    if len(video) <= STEP:
        return out
    truth = render(scene, frames)
    made = np.abs(video[STEP:] - video[:-STEP]).mean(axis=(1, 2, 3))
    real = np.abs(truth[STEP:] - truth[:-STEP]).mean(axis=(1, 2, 3))
    moving = real > 0.2 * real.max()
    out[STEP:] = np.where(moving, made / np.maximum(real, 1e-6), np.nan)
    return out


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


__all__ = ["ABSENCE", "DRIFT_SHARE", "LongMeasures", "drift", "measure_long"]
