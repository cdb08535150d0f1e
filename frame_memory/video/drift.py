"""Whether a video gets worse while it is made: first against last 15 % in the order of making, curves and slopes.

Frames come in pieces and are not kept; per frame a few numbers are (`measures`), per second at most one or a few
vectors of a CLIP vision model. In order of making means: an inverted video was begun at its end, so its end is where
nothing can have drifted yet (reference/memorypack.md section 5). Frames that were given, such as the start picture, do
not count.

Shape suffixes: T time, H height, W width, C colours, D features.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .guards import (
    CAUSES,
    FROZEN_LEVELS,
    LUMA_STEP,
    SATURATION_STEP,
    SHARPNESS_STEP,
    SLOPE_WINDOW,
    GuardSection,
    VideoGuards,
    drift_of,
    warnings_of,
)
from .likeness import as_picture, background_of, features_of, mask_for, subject_of
from .measures import STRIDE

NODE = "Drift Meter"
# Share of the frames at each end that are compared, as FramePack and MemoryPack measure drift.
ENDS = 0.15
# Up to here every frame's colours and sharpness are looked at, not every fourth: short videos have few frames.
SHORT = 240
# Looks of the CLIP vision model at each end at least, where there are so many frames.
LOOKS = 3
# Pixel frames of a section where nobody says where they begin: what FramePack makes at a time.
SECTION = 36
# A fall of the cosine that is told as drift: about what CLIP gives for another picture of the same subject.
LIKENESS_FALL = 0.1
# Motion that is left, as a share, below which it is told: half of it.
MOTION_LEFT = 0.5

# What the guards advise, and what is no advice for a video that was made that way.
ADVISES_INVERTED = "Use order 'inverted' (F0) or a schedule"
# Of pictures that came from anywhere nobody knows that a model made them, and none of them can be re-rolled.
STANDS_STILL = (
    "If a model made it, usual causes are a LoRA that is too strong or belongs to another model, a prompt without an "
    "action, guidance at 1, or TeaCache-like skipping set too high. Name a movement in the prompt."
)

# Name in the JSON, in a guard's measures, words for the report, unit, bound of the difference between the ends, and
# whether that bound is a share.
MEASURES = (
    ("brightness", "luma", ("gets brighter", "gets darker"), LUMA_STEP, False),
    ("saturation", "saturation", ("gets more colourful", "loses its colours"), SATURATION_STEP, False),
    ("sharpness", "sharpness", ("gets sharper", "gets softer"), SHARPNESS_STEP, True),
    ("motion", "motion", ("moves more", "moves less"), MOTION_LEFT, True),
)
LIKENESS = {"identity": "subject", "background": "background", "picture": "whole picture"}


@dataclass(frozen=True)
class Timing:
    """frames: all of the video, `given` in front were not made. sections: (number, first pixel frame, one
    past the last), in order of time.

    order: "forward", "inverted" or "both ends first". named: whether the sections are the ones it was made in.
    """

    frames: int
    fps: float
    order: str = "forward"
    given: int = 0
    sections: tuple[tuple[int, int, int], ...] = ()
    named: bool = True

    @staticmethod
    def guessed(frames: int, fps: float, order: str) -> Timing:
        """Of a video of which only the rate is known: sections of 1.2 s behind the first picture."""
        length = max(round(SECTION / 30 * fps), 1)
        starts = [0, *range(1 + length, max(frames - length // 2, 1), length)]
        spans = zip(range(1, len(starts) + 1), starts, [*starts[1:], frames])
        return Timing(frames, fps, order, 0, tuple(spans), named=False)

    def making(self) -> list[int]:
        """The frames that were made, in the order of making; those of one section in order of time where that matters.

        Inverted runs backwards as a whole, so that each end of it is one stretch of the video.
        """
        made = list(range(self.given, self.frames))
        if self.order == "inverted":
            return made[::-1]
        if self.order == "both ends first" and self.sections:
            border = max(self.sections[-1][1], self.given)
            return [*range(border, self.frames), *range(self.given, border)]
        return made


@dataclass
class Curve:
    """A measure of some frames by their place in the order of making. `first`, `last`: means of the ends."""

    at: np.ndarray
    values: np.ndarray
    first: float = math.nan
    last: float = math.nan
    slope: float | None = None

    @property
    def difference(self) -> float:
        return self.last - self.first


@dataclass
class Drift:
    """What was found. curves: by name, in the order of making; per_second: `(seconds made, mean)` of each of them."""

    timing: Timing
    curves: dict[str, Curve]
    per_second: dict[str, list[tuple[float, float]]]
    sections: list[dict]
    warnings: list[str]
    ends: int
    notes: list[str] = field(default_factory=list)


class DriftMeter:
    """Fed with a video's pieces in any order: `meter.look(first_frame, frames_THWC)`; then `meter.result()`.

    clip_vision: any CLIP_VISION, or None. mask_BHW: 1 where the subject is, one for all frames or one a frame; without
    it the whole picture is compared. interrupt: called before each look of the model. Frames are uint8 or floats 0..1.
    """

    def __init__(
        self, timing: Timing, clip_vision=None, mask_BHW: Tensor | None = None,
        interrupt: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.timing, self.clip_vision, self.mask_BHW, self.interrupt = timing, clip_vision, mask_BHW, interrupt
        spans = [(n, max(start, timing.given), min(stop, timing.frames)) for n, start, stop in timing.sections]
        sections = [GuardSection(*span) for span in spans if span[2] > span[1]]
        stride = STRIDE if timing.frames > SHORT else 1
        self.guards = VideoGuards(sections, stride)
        self.making = timing.making()
        self.ends = max(round(ENDS * len(self.making)), 1)
        step = max(min(round(timing.fps), self.ends // LOOKS), 1)
        self._wanted = {*self.making[::step], *self.making[-1:]} if clip_vision is not None else set()
        self._seen: dict[str, dict[int, Tensor]] = {}

    def look(self, first: int, frames_THWC) -> None:
        """Measure frames [first, first + T); they are not kept."""
        frames_THWC = frames_THWC[..., :3]
        if frames_THWC.shape[-1] == 1:
            frames_THWC = torch.as_tensor(frames_THWC).expand(-1, -1, -1, 3)
        self.guards.add(first, frames_THWC)
        for number in range(first, first + len(frames_THWC)):
            if number in self._wanted:
                self._see(number, frames_THWC[number - first])

    def _see(self, number: int, frame_HWC) -> None:
        self.interrupt()
        picture_BHWC = as_picture(frame_HWC)
        parts: dict[str, Tensor | None] = {"picture": picture_BHWC}
        if self.mask_BHW is not None:
            size = (picture_BHWC.shape[1], picture_BHWC.shape[2])
            mask_HW = mask_for(self.mask_BHW, number, self.timing.frames, size, "mask", NODE)
            parts = {"identity": subject_of(picture_BHWC, mask_HW), "background": background_of(picture_BHWC, mask_HW)}
        for name, part_BHWC in parts.items():
            if part_BHWC is not None:
                self._seen.setdefault(name, {})[number] = features_of(self.clip_vision, part_BHWC, NODE)[0]

    def result(self) -> Drift:
        """Everything that was found of the frames that have come."""
        series = self.guards.series
        rows = {
            "brightness": series.luma,
            "saturation": {f: look[0] for f, look in series.look.items()},
            "sharpness": {f: look[1] for f, look in series.look.items()},
            "motion": series.motion,
            **{name: self._alike(seen) for name, seen in self._seen.items()},
        }
        curves = {name: self._curve(row) for name, row in rows.items()}
        curves = {name: curve for name, curve in curves.items() if len(curve.at)}
        per_second = {name: _per_second(curve, self.timing.fps) for name, curve in curves.items()}
        sections = self._sections()
        found = Drift(self.timing, curves, per_second, sections, [], self.ends)
        found.warnings = [*frozen_warnings(sections), *self._drift_warnings(found)]
        if self.timing.order == "inverted":
            found.warnings = [text.replace(ADVISES_INVERTED, "Use a schedule") for text in found.warnings]
        if not self.timing.named:
            found.warnings = [text.replace(CAUSES["frozen"], STANDS_STILL) for text in found.warnings]
        if self.mask_BHW is not None and self.clip_vision is None:
            found.warnings.insert(
                0,
                f"'mask' of '{NODE}' was not used: only a model at 'clip_vision' looks at the subject. "
                "Connect one from 'Load CLIP Vision'.",
            )
        elif self.mask_BHW is not None and "identity" not in self._seen:
            found.warnings.insert(
                0,
                f"'mask' of '{NODE}' shows nothing in the frames that were looked at, so there is no "
                "likeness of the subject. Expected white where it is.",
            )
        if len(self.making) < 2 * SECTION:
            found.notes.append("The video is short: the ends are few frames, and slopes mean little.")
        return found

    def _alike(self, seen: Mapping[int, Tensor]) -> dict[int, float]:
        """Mean cosine of each look to those at the beginning of the making.

        Itself left out: else a look of the beginning would be nearer to it than any other of the same scene.
        """
        ordered = [f for f in self.making if f in seen]
        early = ordered[: max(sum(f in seen for f in self.making[: self.ends]), 1)]
        cosines_TE = torch.stack([*seen.values()]) @ torch.stack([seen[f] for f in early]).T
        found = {}
        for f, cosines_E in zip(seen, cosines_TE):
            others = [float(cosine) for other, cosine in zip(early, cosines_E) if other != f]
            found[f] = statistics.fmean(others) if others else 1.0
        return found

    def _curve(self, row: Mapping[int, float]) -> Curve:
        places = [(place, row[f]) for place, f in enumerate(self.making) if f in row]
        at, values = np.array([p for p, _ in places], dtype=float), np.array([v for _, v in places], dtype=float)
        curve = Curve(at, values)
        first, last = values[at < self.ends], values[at >= len(self.making) - self.ends]
        curve.first = float(first.mean()) if len(first) else math.nan
        curve.last = float(last.mean()) if len(last) else math.nan
        if len(values) > 1 and at[-1] > at[0]:
            curve.slope = float(np.polyfit(at / self.timing.fps, values, 1)[0])
        return curve

    def _sections(self) -> list[dict]:
        """Means of every complete section, in the order of making."""
        place = {frame: i for i, frame in enumerate(self.making)}
        complete = [s for s in self.guards.sections if self.guards.complete(s)]
        ordered = sorted(complete, key=lambda s: min(place[f] for f in (s.start_frame, s.stop_frame - 1)))
        found = []
        for section in ordered:
            means = self.guards.measures(section)
            kept = {name: means[name] for name in ("luma", "saturation", "sharpness", "motion") if name in means}
            kept |= drift_of([*(row["means"] for row in found[-SLOPE_WINDOW + 1 :]), kept])
            span = {"start": section.start_frame, "stop": section.stop_frame}
            found.append({"number": section.number, **span, "means": kept})
        return found

    def _drift_warnings(self, found: Drift) -> list[str]:
        """Fault 15: the measures that slide or are off, with the number of the section."""
        warnings = []
        for name, key, words, bound, share in MEASURES[:3]:
            sliding = []
            for row in found.sections:
                text = warnings_of(row["number"], {f"{key}_slope": row["means"].get(f"{key}_slope", 0.0)})
                if text:
                    sliding.append((row["number"], text[0]))
            if sliding:
                seen = f" Seen in sections {_runs([number for number, _ in sliding])}." if len(sliding) > 1 else ""
                warnings.append(sliding[0][1] + seen)
                continue
            off = _first_off(found, name, key, bound, share)
            if off is not None:
                curve = found.curves[name]
                warnings.append(
                    f"Section {off} is the first whose {name} is far from the beginning's; the video "
                    f"{_word(curve, words)}: {curve.first:.1f} at first, {curve.last:.1f} at last (levels of 255). "
                    f"{CAUSES['slope']}"
                )
        for name in LIKENESS:
            curve = found.curves.get(name)
            if curve is not None and -curve.difference > LIKENESS_FALL:
                warnings.append(
                    f"The {LIKENESS[name]} is less and less like its beginning: similarity {curve.first:.3f} at first, "
                    f"{curve.last:.3f} at last. {CAUSES['slope']}"
                )
        return warnings


def _first_off(found: Drift, name: str, key: str, bound: float, share: bool) -> int | None:
    """The first section made whose mean is further from the beginning than allowed, if the video stays there."""
    curve = found.curves.get(name)
    if curve is None or math.isnan(curve.difference):
        return None
    scale = max(curve.first, 1e-3) if share else 1.0
    if abs(curve.difference) / scale <= bound:
        return None
    for row in found.sections:
        if key in row["means"] and abs(row["means"][key] - curve.first) / scale > bound:
            return row["number"]
    return found.sections[-1]["number"] if found.sections else None


def frozen_warnings(sections: Sequence[Mapping]) -> list[str]:
    """Fault 16: which sections stand still, with the usual causes."""
    known = [(row["means"]["motion"], row["number"]) for row in sections if "motion" in row["means"]]
    still = [(motion, number) for motion, number in known if motion < FROZEN_LEVELS]
    if not still:
        return []
    if len(still) == 1:
        return [*warnings_of(still[0][1], {"motion": still[0][0]})]
    which = f"All {len(still)} sections" if len(still) == len(sections) else f"Sections {_runs([n for _, n in still])}"
    return [
        f"{which} are frozen: in their last thirds the busiest part changes by less than {FROZEN_LEVELS:g} level of "
        f"255. {CAUSES['frozen']}"
    ]


def _runs(numbers: Sequence[int]) -> str:
    """Numbers as people write them: 2, 5 to 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in runs)


def _word(curve: Curve, words: tuple[str, str]) -> str:
    return words[0] if curve.difference > 0 else words[1]


def _per_second(curve: Curve, fps: float) -> list[tuple[float, float]]:
    """(middle of a second of making, mean of the measure in it); what is left at the end counts from half a second."""
    seconds = curve.at / fps
    last = max(int(math.floor(seconds[-1] + 0.5)) - 1, 0)
    bins = np.minimum(np.floor(seconds), last).astype(int)
    found = []
    for b in sorted(set(bins.tolist())):
        inside = bins == b
        found.append((float(seconds[inside].mean()), float(curve.values[inside].mean())))
    return found


def motion_share(curve: Curve) -> float:
    """Motion at the end as a share of that at the beginning; 1 where there was none to lose."""
    return curve.last / curve.first if curve.first > FROZEN_LEVELS else 1.0


def median_motion(sections: Sequence[Mapping]) -> float | None:
    """The middle of the sections' motion, levels of 255; None without any."""
    values = [row["means"]["motion"] for row in sections if "motion" in row["means"]]
    return statistics.median(values) if values else None
