"""What is measured of a video's pixels: brightness, saturation, sharpness, motion, the change at a cut. One definition.

The guards of a running video, Drift Meter, Memory Recall and the search for cuts in Video Clips all use these.
Levels are 8-bit: 0 to 255, whatever the pixels are stored as.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

# Longest side at which frames are compared. Averaging over 5 to 10 pixels takes out grain, not motion.
THUMBNAIL_SIDE = 96
# Motion is measured over one latent frame: a VAE gives the four frames of a still latent a pattern of its own, 14
# levels strong in the shipped one, which repeats with this period and must not pass as motion.
LAG = 4
# Share of a picture that counts as where something moves: one small figure in a large still room is motion.
BUSIEST = 0.005
# Saturation and sharpness are taken from every fourth frame: they are means, and cost most.
STRIDE = 4
# The usual change is what nine of ten frames near the join stay under: a video whose motion comes in steps, every
# second frame still, is no row of jumps.
SEAM_USUAL = 0.9
# Frames on each side of a join from which the usual change is taken: a third of a section.
SEAM_REACH = 12
# Levels added to the usual change, so that a nearly still scene does not make every flicker a jump.
SEAM_FLOOR = 0.25
# A line must explain this share of a row's variance: what a scene shows goes up and down, drift goes one way.
SLOPE_FIT = 0.8
LUMA = (0.2126, 0.7152, 0.0722)


@dataclass
class _Stretch:
    """Thumbnails at the two ends of a run of frames that has arrived; the first and the last few of them."""

    start: int
    stop: int
    head: list[np.ndarray] = field(default_factory=list)
    tail: list[np.ndarray] = field(default_factory=list)


class FrameSeries:
    """The numbers of every frame that has come, in pieces and in any order; a piece that comes twice counts once.

    By frame number: luma; look, (saturation, sharpness) of every `stride`th; change, the mean change from the frame
    before; motion, the change of the busiest part from 4 frames before. All in levels. Thumbnails are kept only at the
    ends of pieces, so that changes across a cut are measured too; ten minutes of video are about 5 MB.
    """

    def __init__(self, stride: int = STRIDE) -> None:
        self.stride = stride
        self.luma: dict[int, float] = {}
        self.look: dict[int, tuple[float, float]] = {}
        self.change: dict[int, float] = {}
        self.motion: dict[int, float] = {}
        self.stretches: list[_Stretch] = []

    def add(self, start_frame: int, frames_THWC: torch.Tensor | np.ndarray) -> None:
        """Measure frames [start_frame, start_frame + T)."""
        if len(frames_THWC) == 0 or start_frame in self.luma:
            return
        new = _Stretch(start_frame, start_frame)
        for offset in range(len(frames_THWC)):
            frame_HWC, number = as_tensor(frames_THWC[offset]), start_frame + offset
            small_HW = thumbnail(frame_HWC)
            self.luma[number] = float(small_HW.mean())
            if number % self.stride == 0:
                self.look[number] = look_of(frame_HWC)
            self._grow(new, small_HW)
        self._connect(new)

    def _grow(self, stretch: _Stretch, luma_HW: np.ndarray) -> None:
        """Append one frame and compare it with the ones before."""
        self._compare(stretch.tail, [luma_HW], stretch.stop)
        if len(stretch.head) < LAG:
            stretch.head.append(luma_HW)
        stretch.tail = [*stretch.tail, luma_HW][-LAG:]
        stretch.stop += 1

    def _compare(self, before: list[np.ndarray], after: list[np.ndarray], frame: int) -> None:
        """Changes of the frames `after`, the first of which is number `frame`, to those that end just before it."""
        for i, now_HW in enumerate(after):
            known = [*before, *after[:i]]
            if known:
                self.change[frame + i] = float(np.abs(now_HW - known[-1]).mean())
            if len(known) >= LAG:
                self.motion[frame + i] = busiest(np.abs(now_HW - known[-LAG]))

    def _connect(self, new: _Stretch) -> None:
        """Join a stretch with its neighbours, measuring across the cut."""
        for other in list(self.stretches):
            first, second = (other, new) if other.stop == new.start else (new, other)
            if first.stop != second.start:
                continue
            self._compare(first.tail, second.head, second.start)
            head = [*first.head, *second.head][:LAG] if first.stop - first.start < LAG else first.head
            tail = [*first.tail, *second.tail][-LAG:] if second.stop - second.start < LAG else second.tail
            self.stretches.remove(other)
            new = _Stretch(first.start, second.stop, head, tail)
        self.stretches.append(new)


def steady_slope(values: list[float]) -> float:
    """Slope of a straight line through the values, 0 where no line explains them."""
    at = np.arange(len(values))
    slope, level = np.polyfit(at, values, 1)
    spread = float(np.var(values))
    left = float(np.mean((np.asarray(values) - (slope * at + level)) ** 2))
    return float(slope) if spread > 0 and 1 - left / spread >= SLOPE_FIT else 0.0


def as_tensor(frame_HWC: torch.Tensor | np.ndarray) -> torch.Tensor:
    """A picture as a tensor, whatever it came as."""
    if isinstance(frame_HWC, np.ndarray):
        frame_HWC = torch.from_numpy(np.ascontiguousarray(frame_HWC))
    return frame_HWC


def _levels(frame_HWC: torch.Tensor) -> float:
    """What a stored value is multiplied by to be in 8-bit levels."""
    return 255.0 if frame_HWC.is_floating_point() else 1.0


def _luma(frame_HWC: torch.Tensor) -> torch.Tensor:
    """Luma [H,W] of a frame in its own units; NaN counts as black."""
    luma_HW = frame_HWC.float() @ torch.tensor(LUMA, device=frame_HWC.device)
    return luma_HW.nan_to_num_(0.0, 0.0, 0.0)


def thumbnail(frame_HWC: torch.Tensor) -> np.ndarray:
    """Luma averaged over squares, [h,w], in 8-bit levels."""
    factor = max(2, -(-max(frame_HWC.shape[:2]) // THUMBNAIL_SIDE))
    small_HW = torch.nn.functional.avg_pool2d(_luma(frame_HWC)[None, None], factor, ceil_mode=True)[0, 0]
    return (small_HW * _levels(frame_HWC)).clamp_(0, 255).cpu().numpy()


def look_of(frame_HWC: torch.Tensor) -> tuple[float, float]:
    """(saturation, sharpness) of a frame, in 8-bit levels.

    Sharpness is the mean gradient over two pixels: what blur takes away first, while single-pixel grain counts less.
    """
    spread_HW = frame_HWC.amax(dim=-1).float() - frame_HWC.amin(dim=-1).float()
    luma_HW = _luma(frame_HWC)
    edges = [(luma_HW[2:] - luma_HW[:-2]).abs(), (luma_HW[:, 2:] - luma_HW[:, :-2]).abs()]
    sharpness = sum(float(part.mean()) for part in edges if part.numel())
    scale = _levels(frame_HWC)
    return float(spread_HW.nan_to_num(0.0, 0.0, 0.0).mean()) * scale, sharpness * scale


def busiest(change_HW: np.ndarray) -> float:
    """Mean of the largest 0.5 % of a thumbnail's changes, at least one."""
    count = max(1, round(change_HW.size * BUSIEST))
    return float(np.partition(change_HW.ravel(), -count)[-count:].mean())


def jump_at(change: Mapping[int, float], join: int, width: int = 1) -> tuple[float, float] | None:
    """(multiple of the usual change near it, levels above the usual) of the largest change at `join` +- `width` frames.

    change: mean change from the frame before, by frame number. None where too few frames around are known.
    """
    at = [change[f] for f in range(join - width, join + width + 1) if f in change]
    near = [f for f in range(join - SEAM_REACH, join + SEAM_REACH + 1) if abs(f - join) > 1 and f in change]
    if join not in change or len(near) < LAG:
        return None
    usual = float(np.quantile([change[f] for f in near], SEAM_USUAL))
    return max(at) / (usual + SEAM_FLOOR), max(at) - usual
