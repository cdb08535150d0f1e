"""What Drift Meter found, for people: words, curves as a picture, and everything as JSON."""

from __future__ import annotations

import json
import math
from fractions import Fraction

from PIL import Image

from .drift import ENDS, LIKENESS, LIKENESS_FALL, MEASURES, MOTION_LEFT, NODE, Curve, Drift, median_motion, motion_share
from .plots import Curve as Line
from .plots import Panel, draw_panels, fitted

PLOT_HEIGHT = 300
# Least span of the plot's axes, levels of 255 or a share, so that what nobody sees is drawn flat.
LEAST_SPAN = {"brightness": 16.0, "saturation": 16.0, "sharpness": 4.0, "motion": 16.0}
LEAST_LIKENESS = 0.2
# With fewer seconds than these every frame is drawn: means of seconds would not reach the ends, which are compared.
FEW_SECONDS = 8
PERCENT = f"{ENDS:.0%}".replace("%", " %")
DIRECTIONS = {
    "forward": "from its first frame to its last",
    "inverted": "from its end to its beginning",
    "both ends first": "its last section first, then from the beginning",
}


def words_of(found: Drift, source: str) -> str:
    """The report: warnings and the verdict first, since the plot leaves room for few lines on the node.

    source: what was measured, as a sentence.
    """
    timing = found.timing
    made = timing.frames - timing.given
    measured = [
        source,
        f"{_frames(timing.frames)}, {timing.frames / timing.fps:.2f} s at {timing.fps:g} fps, made "
        f"{DIRECTIONS[timing.order]}. The first {PERCENT} as made, {_frames(found.ends)}, against the last.",
    ]
    if timing.given:
        were = "was given, not made; it does" if timing.given == 1 else "were given, not made; they do"
        measured.append(f"{_frames(timing.given)} in front {were} not count ({made} do).")
    lines = [f"Warning: {text}" for text in found.warnings]
    if made < 2:
        what = "One picture was made" if made else "No picture was made"
        lines.append(f"{what}: there is nothing to compare, so drift cannot be measured. Give '{NODE}' a whole video.")
        return "\n".join([*lines, *found.notes, *measured])
    if not found.warnings and not _said(found):
        lines.append("Nothing drifts beyond its bound, and nothing stands still.")
    lines += _said(found)
    if not LIKENESS.keys() & found.curves.keys():
        lines.append("Shapes and faces are not judged: for that, connect 'clip_vision'.")
    lines += [*(_line(found, name) for name in found.curves), *measured]
    if not timing.named:
        lines.append("Sections are counted by 1.2 s, as Anti-Drift Sampler makes them.")
    return "\n".join([*lines, *found.notes])


def _said(found: Drift) -> list[str]:
    """What is no fault, but should be known."""
    motion = found.curves.get("motion")
    if motion is None or math.isnan(motion.difference):
        return []
    share = motion_share(motion)
    if share < MOTION_LEFT:
        return [f"Note: it moves less and less, at the end {share:.0%} as much as at the beginning."]
    return []


def _line(found: Drift, name: str) -> str:
    curve = found.curves[name]
    if math.isnan(curve.difference):
        why = "it is not seen at both ends" if name in LIKENESS else "the ends are too short to compare"
        return f"{_title(name)}: {curve.values.mean():.3f}; {why}."
    digits = 4 if name in LIKENESS else 2
    slope = "" if curve.slope is None else f", slope {_signed(curve.slope, digits)} a second"
    if name in LIKENESS:
        kept = "kept" if -curve.difference <= LIKENESS_FALL else "lost"
        return f"{_title(name)}: {curve.first:.3f} → {curve.last:.3f} ({_signed(curve.difference, 3)}{slope}): {kept}."
    _, _, words, bound, share = next(row for row in MEASURES if row[0] == name)
    relative = curve.difference / max(curve.first, 1e-3)
    large = abs(relative if share else curve.difference) > bound
    word = (words[0] if curve.difference > 0 else words[1]) if large else "steady"
    percent = f", {_signed(100 * relative, 0)} %" if share and curve.first > 1e-3 else ""
    difference = _signed(curve.difference, 1)
    return f"{_title(name)}: {curve.first:.1f} → {curve.last:.1f} ({difference}{percent}{slope}): {word}."


def _signed(value: float, digits: int) -> str:
    """With its sign, and no sign before a zero: rounding noise has no direction."""
    text = f"{value:+.{digits}f}"
    return text if any(figure in text for figure in "123456789") else text[1:]


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _title(name: str) -> str:
    return f"Similarity of the {LIKENESS[name]}" if name in LIKENESS else name.capitalize()


def as_json(found: Drift) -> str:
    """Everything as one JSON object; what is not known is null."""
    timing = found.timing
    rate = Fraction(timing.fps).limit_denominator(1001)
    whole = {
        "node": NODE,
        "frames": timing.frames,
        "fps": float(rate) if rate.denominator == 1 else timing.fps,
        "seconds": timing.frames / timing.fps,
        "order": timing.order,
        "given_frames": timing.given,
        "end_frames": found.ends,
        "units": {"brightness": "levels of 255", "saturation": "levels of 255", "sharpness": "levels of 255",
                  "motion": "levels of 255 in 4 frames", "slope": "a second of making", "similarity": "cosine"},
        "measures": {name: _numbers(curve, found.per_second[name]) for name, curve in found.curves.items()},
        "sections": [
            {"number": row["number"], "start_s": row["start"] / timing.fps, "stop_s": row["stop"] / timing.fps,
             **row["means"]}
            for row in found.sections
        ],
        "median_section_motion": median_motion(found.sections),
        "warnings": found.warnings,
    }  # fmt: skip
    return json.dumps(_rounded(whole), ensure_ascii=False, indent=1)


def _numbers(curve: Curve, per_second: list[tuple[float, float]]) -> dict:
    return {
        "first": curve.first,
        "last": curve.last,
        "difference": curve.difference,
        "slope": curve.slope,
        "per_second": [value for _, value in per_second],
        "at_seconds": [at for at, _ in per_second],
    }


def _rounded(value):
    """Numbers to six digits, NaN as null: JSON knows none."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def plot(found: Drift) -> Image.Image:
    """The curves below each other in the order of making, the two ends shaded; of short videos frame by frame."""
    timing, panels = found.timing, []
    seconds = (timing.frames - timing.given) / timing.fps
    ends = found.ends / timing.fps
    backwards = " (the video's end is at the left)" if timing.order == "inverted" else ""
    for name, points in found.per_second.items():
        likeness = name in LIKENESS
        curve = found.curves[name]
        if len(points) < FEW_SECONDS:
            points = list(zip((curve.at / timing.fps).tolist(), curve.values.tolist()))
        values = [value for _, value in points]
        bottom, top = fitted(values, LEAST_LIKENESS if likeness else LEAST_SPAN[name])
        digits = 3 if likeness else 1
        ends_words = "" if math.isnan(curve.difference) else f": {curve.first:.{digits}f} to {curve.last:.{digits}f}"
        unit = "cosine to the beginning" if likeness else "levels of 255"
        panels.append(
            Panel(
                f"{_title(name)}, {unit}{ends_words}",
                f"seconds in the order of making{backwards}",
                "",
                [Line(name, [at for at, _ in points], values, note="")],
                [],
                top=min(top, 1.02) if likeness else top,
                bottom=bottom if likeness else max(bottom, 0.0),
                shades=[(0.0, ends), (seconds - ends, seconds)],
            )
        )
    return draw_panels(panels, PLOT_HEIGHT)
