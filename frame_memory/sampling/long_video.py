"""Everything the Anti-Drift Sampler decides before and after the section loop: checks, plan, marks, report.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import comfy.model_management
import torch
from torch import Tensor

from ..model.framepack import is_framepack
from ..plan import (
    LongVideoPlan,
    PlanError,
    Schedule,
    check_kind,
    latent_bytes,
    natural_order,
    pixel_frames,
    plan_sections,
    section_count,
    unused_entries,
    validate_timeline,
)
from ..plan.mark import DEFAULT_FPS, KEY, read_mark
from .preview import GrowingPreview
from .prompts import EncodedTimeline
from .section_loop import Inputs, SectionSampler

ORDER_AUTO = "from frame context"
MODEL_OPTION = "frame_memory"


def latent_of(name: str, latent: Mapping | None) -> Tensor | None:
    """A LATENT's samples as `[B, C, T, H, W]`; raises PlanError for one that is no video latent or is empty."""
    if latent is None:
        return None
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 5 or 0 in samples.shape:
        shape = "nested" if getattr(samples, "is_nested", False) else list(samples.shape)
        raise PlanError(
            f"'{name}' of Anti-Drift Sampler got a latent of shape {shape}; expected a video latent [batch, channels, "
            "frames, height/8, width/8] with at least one frame. Feed it from 'FramePack Image', from VAE Encode with "
            "a video VAE, or from another Anti-Drift Sampler."
        )
    return samples


def check_model(guider, schedule: Schedule) -> list[str]:
    """Refuse a model that cannot look at a frame context, or one of the other kind; return softer warnings."""
    if not is_framepack(guider.model_patcher):
        raise PlanError(
            f"The model behind the guider is a {type(guider.model_patcher.model).__name__}: this checkpoint has no "
            "packed-context weights. Expected a FramePack model from 'Load FramePack Model'."
        )
    kind = guider.model_patcher.model_options.get(MODEL_OPTION, {}).get("kind")
    if kind is None:
        return [
            "The model was loaded by another loader, so nobody knows whether it is F0 or F1; the schedule must fit."
        ]
    note = check_kind(kind, schedule)
    if note is None:
        return []
    if (kind == "F0") != (natural_order(schedule) == "inverted"):
        raise PlanError(note)
    return [note]


def check_base(guider, start: Mapping) -> str:
    """The family of latents that model and start picture share; raises PlanError where they differ (fault 22)."""
    said = guider.model_patcher.model_options.get(MODEL_OPTION, {}).get("base", "")
    mark = read_mark(start)
    base = mark.base if mark is not None else ""
    if said and base and said != base:
        raise PlanError(
            f"The start latent was made with a {base} VAE, the model works on {said} latents: same shape, other "
            "meaning. Change the file in 'Load VAE' to the VAE that belongs to the model."
        )
    return said or base or type(guider.model_patcher.model.latent_format).__name__


def make_plan(schedule: Schedule, order: str, seconds: float, inputs: Inputs) -> LongVideoPlan:
    """The plan of the whole video. Raises PlanError for lengths, orders and end frames that cannot be."""
    given = inputs.given.shape[2] if inputs.given is not None else 0
    plan = plan_sections(
        schedule,
        sections=section_count(seconds, schedule.window, DEFAULT_FPS),
        order=None if order == ORDER_AUTO else order,
        fps=DEFAULT_FPS,
        history_frames=given,
        has_end=inputs.end is not None,
    )
    if inputs.initial is not None and inputs.initial.shape[2] < plan.total_frames:
        held = 4 * inputs.initial.shape[2] - 3
        raise PlanError(
            f"'initial' holds {held} frames ({held / DEFAULT_FPS:.2f} s), the plan makes {plan.pixel_frames} "
            f"({plan.seconds:.2f} s). Expected at least as many; set 'seconds' in Anti-Drift Sampler to "
            f"{max((inputs.initial.shape[2] - 1) // schedule.window, 1) * 4 * schedule.window / DEFAULT_FPS:g}."
        )
    return plan


def check_timeline(timeline: EncodedTimeline | None, plan: LongVideoPlan, seconds: float) -> list[str]:
    """Refuse prompts past the end; warn of prompts so short that no section shows them."""
    if timeline is None:
        return []
    validate_timeline(timeline.timeline, plan.seconds, asked_seconds=seconds)
    starts = tuple(plan.span_seconds(s)[0] for s in plan.sections)
    return [
        f"The prompt at {e.start_s:g} s is never shown: it begins and ends inside one section (1.2 s each): {e.text!r}"
        for e in unused_entries(timeline.timeline, starts)
    ]


def memory_needs(plan: LongVideoPlan, latent_shape: tuple[int, ...], weights: int) -> dict[str, int]:
    """Bytes of system RAM a run will hold: weights, latents of the whole video, one decode window pair, the writer.

    latent_shape: `[B, C, T, H, W]` of the start latent. The decode holds two windows of pixels at most, whatever the
    length; the writer holds frames of one of them as bytes.
    """
    batch, channels, _, height, width = latent_shape
    pixels = batch * pixel_frames(2 * plan.schedule.window) * height * 8 * width * 8 * 3
    return {
        "weights": weights,
        "latents": batch * latent_bytes(plan.total_frames, height, width, channels),
        "decode": 2 * 4 * pixels,
        "writer": pixels,
    }


def describe_needs(needs: Mapping[str, int], free: int) -> tuple[str, str | None]:
    """A line with the bytes of each part, and a warning where they are more than is free (fault 46)."""
    line = "RAM: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in needs.items())
    line += f"; {free / 2**30:.2f} GiB free. Decode and file are streamed, whatever the length."
    missing = sum(needs.values()) - free
    if missing <= 0:
        return line, None
    return line, (
        f"This run may need {missing / 2**30:.2f} GiB of RAM more than is free. Choose an fp8 checkpoint or "
        "weight_dtype fp8_e4m3fn in 'Load FramePack Model', a smaller 'size' in 'FramePack Image', or close programs."
    )


def sample_long_video(
    *, noise, guider, sampler, sigmas: Tensor, schedule: Schedule, start: Mapping, seconds: float,
    order: str = ORDER_AUTO, end: Mapping | None = None, history: Mapping | None = None,
    initial: Mapping | None = None, timeline: EncodedTimeline | None = None, say: Callable[[str], None] = logging.info,
) -> tuple[dict, str]:  # fmt: skip
    """Plan, check, sample; returns `(LATENT, report)`.

    say: shown on the node while it runs. Raises PlanError before any sampling for input that cannot work.
    """
    warnings = check_model(guider, schedule)
    base = check_base(guider, start)
    given = latent_of("history", history)
    inputs = Inputs(
        start=latent_of("start", start)[:, :, :1], end=latent_of("end", end), given=given,
        initial=latent_of("initial", initial),
    )  # fmt: skip
    inputs.check()
    if sigmas.shape[0] < 2:
        raise PlanError(
            f"'sigmas' holds {sigmas.shape[0]} values; expected at least 2 (one step). See 'FramePack Sigmas'."
        )
    plan = make_plan(schedule, order, seconds, inputs)
    warnings += check_timeline(timeline, plan, seconds)
    weights = 0 if guider.model_patcher.loaded_size() else guider.model_patcher.model_size()
    needs = memory_needs(plan, inputs.start.shape, weights)
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    memory, shortage = describe_needs(needs, free)
    warnings += [shortage] if shortage else []
    described = f"{plan.describe()}\n{memory}"
    say(described)
    runner = SectionSampler(guider, noise, sampler, sigmas, timeline)
    preview = GrowingPreview(guider.model_patcher, len(plan.sections), sigmas.shape[0] - 1, say)
    video = runner.run(plan, inputs, preview)
    mark = {
        "latent_format": type(guider.model_patcher.model.latent_format).__name__,
        "base": base,
        "order": plan.order,
        "window": schedule.window,
        "fps": plan.fps,
    }
    report = "\n".join([described, *(f"Warning: {w}" for w in [*warnings, *runner.notes])])
    say(report)
    return {"samples": video, KEY: mark}, report
