"""Stretches of a video without a cut, and whether anything moves in them. Nothing but numbers is held.

A cut is a frame that differs from the one before far more than its neighbours do (`measures.jump_at`); a fade is not
seen. A stretch is still where, most of the time, not even its busiest part changes (`guards.FROZEN_LEVELS`).

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from .guards import FROZEN_LEVELS, SEAM_RATIO
from .measures import LAG, FrameSeries, jump_at
from .transition import LEAST_JUMP

# 8-bit levels above the usual change that a cut has at least, as for the canvas of FFGo: 3 % of the range on average.
CUT_LEVELS = 255 * LEAST_JUMP


@dataclass(frozen=True)
class Stretch:
    """Frames [start, stop) between two cuts. motion: levels of 255, see `is_still`."""

    start: int
    stop: int
    motion: float

    @property
    def frames(self) -> int:
        return self.stop - self.start

    @property
    def is_still(self) -> bool:
        """Whether half of its frames or more show no motion: what fault 16 calls frozen."""
        return self.motion < FROZEN_LEVELS


def find_stretches(chunks: Iterable[np.ndarray | torch.Tensor]) -> list[Stretch]:
    """All stretches of a video that comes as chunks [T,H,W,C], uint8 or floats 0..1; they cover every frame."""
    series, count = FrameSeries(), 0
    for chunk_THWC in chunks:
        series.add(count, chunk_THWC)
        count += len(chunk_THWC)
    borders = [0, *(f for f in range(1, count) if is_cut(series, f)), count]
    return [Stretch(a, b, _motion(series, a, b)) for a, b in zip(borders, borders[1:]) if b > a]


def is_cut(series: FrameSeries, frame: int) -> bool:
    """Whether another shot begins with a frame."""
    jump = jump_at(series.change, frame, width=0)
    return jump is not None and jump[0] > SEAM_RATIO and jump[1] > CUT_LEVELS


def _motion(series: FrameSeries, start: int, stop: int) -> float:
    """Change of the busiest part over 4 frames, the median of the stretch; 0 where it is too short to say."""
    found = [series.motion[f] for f in range(start + LAG, stop) if f in series.motion]
    return statistics.median(found) if found else 0.0
