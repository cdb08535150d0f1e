"""Measures on the finished pixels of every section: frozen, seam, drift. Reported, never acted on (faults 15 to 17).

Frames come in pieces and in any order of making. Every frame is reduced to a few numbers at once; thumbnails are kept
only at the ends of pieces, so that changes across a cut are measured too. Ten minutes of video (18000
frames) are about 5 MB.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
# 8-bit levels by which even the busiest part changes in 4 frames. Below one level an 8-bit video stores nothing; a slow
# breath or a drifting cloud makes 3 or more.
FROZEN_LEVELS = 1.0
# Share of a section, at its end, in which motion is measured. A causal VAE takes time to come to rest: the shipped one
# still moves for 5 to 7 of the 9 latent frames after the section before, though these latents are all the same.
SETTLED = 1 / 3
# The usual change is what nine of ten frames near the join stay under: a video whose motion comes in steps, every
# second frame still, is no row of jumps.
SEAM_USUAL = 0.9
# A change at a join above this many times the usual near it is seen as a jump; ordinary motion varies within a factor
# of two from frame to frame.
SEAM_RATIO = 2.5
# ...and it must be this many 8-bit levels above the usual, on average: what the eye sees on a whole picture.
SEAM_LEVELS = 2.0
# Frames on each side of a join from which the usual change is taken: a third of a section.
SEAM_REACH = 12
# Levels added to the usual change, so that a nearly still scene does not make every flicker a jump.
SEAM_FLOOR = 0.25
# 8-bit levels between the means of neighbouring sections: 3 % of the range, visible on a flat wall from cut to cut.
LUMA_STEP = 8.0
# The same for the mean distance of the largest and the smallest colour of a pixel.
SATURATION_STEP = 8.0
# Share of the sharpness lost or won from one section to the next. A change of scene content makes up to about 20 %.
SHARPNESS_STEP = 0.35
# 8-bit levels a section, fitted over the last sections: 15 levels after ten sections, the drift that users report.
LUMA_SLOPE = 1.5
SATURATION_SLOPE = 1.5
# Share a section: a third of the sharpness is gone after ten.
SHARPNESS_SLOPE = 0.04
# A slope needs this many sections; fewer are steps.
SLOPE_SECTIONS = 6
# ...and a line must explain this share of their variance: what a scene shows goes up and down, drift goes one way.
SLOPE_FIT = 0.8
SLOPE_WINDOW = 12
LUMA = (0.2126, 0.7152, 0.0722)

CAUSES = {
    "frozen": (
        "Usual causes: a LoRA that is too strong or belongs to another model, a prompt without an action, guidance at "
        "1, or TeaCache-like skipping set too high. Name a movement in the prompt of this section, or re-roll it."
    ),
    "seam": (
        "Usual causes: the prompt changes there, or the history does not reach the model (schedule, VAE). Raise "
        "blend_sections in 'Prompt Timeline', or re-roll the section."
    ),
    "step": "Usual causes: a change of prompt or light at this place, or the start of drift. Re-roll the section.",
    "slope": (
        "This is drift: each section inherits a little error of the last. Use order 'inverted' (F0) or a schedule with "
        "a pinned start, lower guidance, or re-roll from the section where it begins."
    ),
}


@dataclass(frozen=True)
class GuardSection:
    """A section in video time: the number an artist knows it by, its pixel frames [start_frame, stop_frame)."""

    number: int
    start_frame: int
    stop_frame: int


@dataclass
class _Stretch:
    """Thumbnails at the two ends of a run of frames that has arrived; the first and the last few of them."""

    start: int
    stop: int
    head: list[np.ndarray] = field(default_factory=list)
    tail: list[np.ndarray] = field(default_factory=list)


class VideoGuards:
    """Fed with pieces in any order: `guards.add(piece.start_frame, piece.frames_THWC)`; asked section by section.

    `sections` in video order, without overlap. Frames are uint8, or floats 0..1, on any device; they are not kept and
    not mutated. A piece that comes twice counts once.
    """

    def __init__(self, sections: Sequence[GuardSection]) -> None:
        self.sections = tuple(sorted(sections, key=lambda section: section.start_frame))
        self._luma: dict[int, float] = {}
        self._look: dict[int, tuple[float, float]] = {}
        self._change: dict[int, float] = {}
        self._motion: dict[int, float] = {}
        self._stretches: list[_Stretch] = []

    def add(self, start_frame: int, frames_THWC: torch.Tensor | np.ndarray) -> None:
        """Measure frames [start_frame, start_frame + T)."""
        if len(frames_THWC) == 0 or start_frame in self._luma:
            return
        new = _Stretch(start_frame, start_frame)
        for offset in range(len(frames_THWC)):
            frame_HWC, number = _as_tensor(frames_THWC[offset]), start_frame + offset
            small_HW = _thumbnail(frame_HWC)
            self._luma[number] = float(small_HW.mean())
            if number % STRIDE == 0:
                self._look[number] = _look(frame_HWC)
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
                self._change[frame + i] = float(np.abs(now_HW - known[-1]).mean())
            if len(known) >= LAG:
                self._motion[frame + i] = _busiest(np.abs(now_HW - known[-LAG]))

    def _connect(self, new: _Stretch) -> None:
        """Join a stretch with its neighbours, measuring across the cut."""
        for other in list(self._stretches):
            first, second = (other, new) if other.stop == new.start else (new, other)
            if first.stop != second.start:
                continue
            self._compare(first.tail, second.head, second.start)
            head = [*first.head, *second.head][:LAG] if first.stop - first.start < LAG else first.head
            tail = [*first.tail, *second.tail][-LAG:] if second.stop - second.start < LAG else second.tail
            self._stretches.remove(other)
            new = _Stretch(first.start, second.stop, head, tail)
        self._stretches.append(new)

    def complete(self, section: GuardSection) -> bool:
        """Whether every frame of a section has come."""
        return all(frame in self._luma for frame in range(section.start_frame, section.stop_frame))

    def measures(self, section: GuardSection) -> dict[str, float]:
        """Numbers of one section, of the frames that have come; empty without any.

        luma, saturation, sharpness: means (8-bit levels). motion: change of the busiest part of the picture over 4
        frames, the median of the section's last third (levels). change: mean change from frame to frame (levels). seam:
        change at the join with the section before, as a multiple of the usual near it; seam_levels: how far above the
        usual it is. *_step: difference to the section before (sharpness: share). *_slope: per section, over the last 12
        at most (sharpness: share). What needs frames that have not come is left out.
        """
        frames = [f for f in range(section.start_frame, section.stop_frame) if f in self._luma]
        if not frames:
            return {}
        found = self._means(section)
        settled = section.stop_frame - (section.stop_frame - section.start_frame) * SETTLED
        motion = [self._motion[f] for f in frames if f in self._motion and f >= settled]
        change = [self._change[f] for f in frames if f in self._change]
        if motion:
            found["motion"] = statistics.median(motion)
        if change:
            found["change"] = statistics.fmean(change)
        found |= self._seam(section)
        found |= self._drift(section)
        return found

    def _means(self, section: GuardSection) -> dict[str, float]:
        span = range(section.start_frame, section.stop_frame)
        found = {"luma": [self._luma[f] for f in span if f in self._luma]}
        found["saturation"] = [self._look[f][0] for f in span if f in self._look]
        found["sharpness"] = [self._look[f][1] for f in span if f in self._look]
        return {name: statistics.fmean(values) for name, values in found.items() if values}

    def _seam(self, section: GuardSection) -> dict[str, float]:
        join = section.start_frame
        at = [self._change[f] for f in (join - 1, join, join + 1) if f in self._change]
        near = [f for f in range(join - SEAM_REACH, join + SEAM_REACH + 1) if abs(f - join) > 1 and f in self._change]
        if join not in self._change or len(near) < LAG:
            return {}
        usual = float(np.quantile([self._change[f] for f in near], SEAM_USUAL))
        return {"seam": max(at) / (usual + SEAM_FLOOR), "seam_levels": max(at) - usual}

    def _drift(self, section: GuardSection) -> dict[str, float]:
        index = self.sections.index(section)
        run = []
        for earlier in reversed(self.sections[max(0, index - SLOPE_WINDOW + 1) : index + 1]):
            if not self.complete(earlier):
                break
            run.insert(0, self._means(earlier))
        found: dict[str, float] = {}
        for name in ("luma", "saturation", "sharpness"):
            values = [means[name] for means in run if name in means]
            if len(values) < max(2, len(run)):
                continue
            share = name == "sharpness"
            found[f"{name}_step"] = (values[-1] - values[-2]) / (max(values[-2], 1e-3) if share else 1.0)
            if len(values) >= SLOPE_SECTIONS:
                found[f"{name}_slope"] = _slope(values) / (max(statistics.fmean(values), 1e-3) if share else 1.0)
        return found

    def warnings(self, section: GuardSection) -> tuple[str, ...]:
        """What an artist should know about one section, in plain sentences with the usual causes."""
        return warnings_of(section.number, self.measures(section))


def warnings_of(number: int, measures: dict[str, float]) -> tuple[str, ...]:
    """Warnings for the measures of section `number`, also for measures that were read from a manifest."""
    found, name = [], f"Section {number}"
    motion = measures.get("motion")
    if motion is not None and motion < FROZEN_LEVELS:
        found.append(
            f"{name} is frozen: in its last third the busiest part changes by {motion:.2f} levels of 255. "
            f"{CAUSES['frozen']}"
        )
    if measures.get("seam", 0) > SEAM_RATIO and measures.get("seam_levels", 0) > SEAM_LEVELS:
        found.append(f"{name} begins with a jump, {measures['seam']:.1f} times the usual change. {CAUSES['seam']}")
    rows = (
        ("luma", "brightness", "levels of 255", LUMA_STEP, LUMA_SLOPE, 1),
        ("saturation", "saturation", "levels of 255", SATURATION_STEP, SATURATION_SLOPE, 1),
        ("sharpness", "sharpness", "%", SHARPNESS_STEP, SHARPNESS_SLOPE, 100),
    )
    for key, word, unit, step_bound, slope_bound, factor in rows:
        step, slope = measures.get(f"{key}_step", 0.0), measures.get(f"{key}_slope", 0.0)
        if abs(step) > step_bound:
            found.append(f"{name}: {word} steps by {step * factor:+.1f} {unit} from the one before. {CAUSES['step']}")
        if abs(slope) > slope_bound:
            found.append(f"{name}: {word} drifts by {slope * factor:+.1f} {unit} a section. {CAUSES['slope']}")
    return tuple(found)


def _slope(values: list[float]) -> float:
    """Slope of a straight line through the values, 0 where no line explains them."""
    at = np.arange(len(values))
    slope, level = np.polyfit(at, values, 1)
    spread = float(np.var(values))
    left = float(np.mean((np.asarray(values) - (slope * at + level)) ** 2))
    return float(slope) if spread > 0 and 1 - left / spread >= SLOPE_FIT else 0.0


def _as_tensor(frame_HWC: torch.Tensor | np.ndarray) -> torch.Tensor:
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


def _thumbnail(frame_HWC: torch.Tensor) -> np.ndarray:
    """Luma averaged over squares, [h,w], in 8-bit levels."""
    factor = max(2, -(-max(frame_HWC.shape[:2]) // THUMBNAIL_SIDE))
    small_HW = torch.nn.functional.avg_pool2d(_luma(frame_HWC)[None, None], factor, ceil_mode=True)[0, 0]
    return (small_HW * _levels(frame_HWC)).clamp_(0, 255).cpu().numpy()


def _look(frame_HWC: torch.Tensor) -> tuple[float, float]:
    """(saturation, sharpness) of a frame, in 8-bit levels.

    Sharpness is the mean gradient over two pixels: what blur takes away first, while single-pixel grain counts less.
    """
    spread_HW = frame_HWC.amax(dim=-1).float() - frame_HWC.amin(dim=-1).float()
    luma_HW = _luma(frame_HWC)
    edges = [(luma_HW[2:] - luma_HW[:-2]).abs(), (luma_HW[:, 2:] - luma_HW[:, :-2]).abs()]
    sharpness = sum(float(part.mean()) for part in edges if part.numel())
    scale = _levels(frame_HWC)
    return float(spread_HW.nan_to_num(0.0, 0.0, 0.0).mean()) * scale, sharpness * scale


def _busiest(change_HW: np.ndarray) -> float:
    """Mean of the largest 0.5 % of a thumbnail's changes, at least one."""
    count = max(1, round(change_HW.size * BUSIEST))
    return float(np.partition(change_HW.ravel(), -count)[-count:].mean())
