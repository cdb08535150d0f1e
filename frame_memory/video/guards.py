"""Measures on the finished pixels of every section: frozen, seam, drift. Reported, never acted on (faults 15 to 17).

Frames come in pieces and in any order of making. Every frame is reduced to a few numbers at once; thumbnails are kept
only at the ends of pieces, so that changes across a cut are measured too. Ten minutes of video (18000
frames) are about 5 MB.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .measures import STRIDE, FrameSeries, jump_at, steady_slope

# 8-bit levels by which even the busiest part changes in 4 frames. Below one level an 8-bit video stores nothing; a slow
# breath or a drifting cloud makes 3 or more.
FROZEN_LEVELS = 1.0
# Share of a section, at its end, in which motion is measured. A causal VAE takes time to come to rest: the shipped one
# still moves for 5 to 7 of the 9 latent frames after the section before, though these latents are all the same.
SETTLED = 1 / 3
# A change at a join above this many times the usual near it is seen as a jump; ordinary motion varies within a factor
# of two from frame to frame.
SEAM_RATIO = 2.5
# ...and it must be this many 8-bit levels above the usual, on average: what the eye sees on a whole picture.
SEAM_LEVELS = 2.0
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
SLOPE_WINDOW = 12

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


class VideoGuards:
    """Fed with pieces in any order: `guards.add(piece.start_frame, piece.frames_THWC)`; asked section by section.

    `sections` in video order, without overlap. Frames are uint8, or floats 0..1, on any device; they are not kept and
    not mutated. A piece that comes twice counts once. stride: of the frames whose saturation and sharpness count.
    """

    def __init__(self, sections: Sequence[GuardSection], stride: int = STRIDE) -> None:
        self.sections = tuple(sorted(sections, key=lambda section: section.start_frame))
        self.series = FrameSeries(stride)

    def add(self, start_frame: int, frames_THWC: torch.Tensor | np.ndarray) -> None:
        """Measure frames [start_frame, start_frame + T)."""
        self.series.add(start_frame, frames_THWC)

    def complete(self, section: GuardSection) -> bool:
        """Whether every frame of a section has come."""
        return all(frame in self.series.luma for frame in range(section.start_frame, section.stop_frame))

    def measures(self, section: GuardSection) -> dict[str, float]:
        """Numbers of one section, of the frames that have come; empty without any.

        luma, saturation, sharpness: means (8-bit levels). motion: change of the busiest part of the picture over 4
        frames, the median of the section's last third (levels). change: mean change from frame to frame (levels). seam:
        change at the join with the section before, as a multiple of the usual near it; seam_levels: how far above the
        usual it is. *_step: difference to the section before (sharpness: share). *_slope: per section, over the last 12
        at most (sharpness: share). What needs frames that have not come is left out.
        """
        frames = [f for f in range(section.start_frame, section.stop_frame) if f in self.series.luma]
        if not frames:
            return {}
        found = self._means(section)
        settled = section.stop_frame - (section.stop_frame - section.start_frame) * SETTLED
        motion = [self.series.motion[f] for f in frames if f in self.series.motion and f >= settled]
        change = [self.series.change[f] for f in frames if f in self.series.change]
        if motion:
            found["motion"] = statistics.median(motion)
        if change:
            found["change"] = statistics.fmean(change)
        found |= self._seam(section)
        found |= self._drift(section)
        return found

    def _means(self, section: GuardSection) -> dict[str, float]:
        span = range(section.start_frame, section.stop_frame)
        found = {"luma": [self.series.luma[f] for f in span if f in self.series.luma]}
        found["saturation"] = [self.series.look[f][0] for f in span if f in self.series.look]
        found["sharpness"] = [self.series.look[f][1] for f in span if f in self.series.look]
        return {name: statistics.fmean(values) for name, values in found.items() if values}

    def _seam(self, section: GuardSection) -> dict[str, float]:
        found = jump_at(self.series.change, section.start_frame)
        return {} if found is None else {"seam": found[0], "seam_levels": found[1]}

    def _drift(self, section: GuardSection) -> dict[str, float]:
        index = self.sections.index(section)
        run = []
        for earlier in reversed(self.sections[max(0, index - SLOPE_WINDOW + 1) : index + 1]):
            if not self.complete(earlier):
                break
            run.insert(0, self._means(earlier))
        return drift_of(run)

    def warnings(self, section: GuardSection) -> tuple[str, ...]:
        """What an artist should know about one section, in plain sentences with the usual causes."""
        return warnings_of(section.number, self.measures(section))


def drift_of(run: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """*_step and *_slope of the last of a run of sections, whose means are given in the order in which they count.

    Steps from two sections on, slopes from 6 on; of sharpness as a share. Empty for less.
    """
    found: dict[str, float] = {}
    for name in ("luma", "saturation", "sharpness"):
        values = [means[name] for means in run if name in means]
        if len(values) < max(2, len(run)):
            continue
        share = name == "sharpness"
        found[f"{name}_step"] = (values[-1] - values[-2]) / (max(values[-2], 1e-3) if share else 1.0)
        if len(values) >= SLOPE_SECTIONS:
            found[f"{name}_slope"] = steady_slope(values) / (max(statistics.fmean(values), 1e-3) if share else 1.0)
    return found


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
