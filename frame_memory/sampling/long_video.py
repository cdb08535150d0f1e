"""Everything the Anti-Drift Sampler decides before and after the section loop: checks, plan, marks, report.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_management import intermediate_device
from torch import Tensor

from ..model import families, wan
from ..model.framepack import is_framepack, latent_families
from ..model.memory import FrameMemory, is_attached
from ..model.preserved_memory import PreservedMemory
from ..model.provenance import LORAS, without_their_lora
from ..model.sources import LOAD_MODEL, WAN_CONTEXT
from ..plan import (
    LongVideoPlan,
    PlanError,
    Schedule,
    another_schedule,
    check_kind,
    latent_bytes,
    natural_order,
    off_grid,
    pixel_frames,
    plan_sections,
    section_count,
    unused_entries,
    validate_timeline,
)
from ..plan.errors import SAMPLER
from ..plan.mark import DEFAULT_FPS, KEY, expected_files, read_mark
from ..video.vae import check_vae
from .attention_check import checked_attention
from .changes import SectionChange, by_index
from .clips import check_clips, still_of
from .experts import models_of
from .frames import AT_HAND
from .judged import NOTHING_FOUND
from .live import LiveVideo
from .memory import remembering, with_memory
from .preview import GrowingPreview
from .project_run import ProjectRequest, attach, on_disk, open_project
from .prompts import EncodedTimeline, too_long
from .section_loop import Inputs, Moment, SectionSampler
from .stored import keep_front

ORDER_AUTO = "from frame context"
# Among what a run holds: an existing video.
HISTORY = "history"


def latent_of(name: str, latent: Mapping | None, node: str = SAMPLER) -> Tensor | None:
    """A LATENT's samples as `[B, C, T, H, W]` fp32 on the CPU, copied only where they are not that already.

    node: display name of the node whose socket `name` is. Raises PlanError for one that is no video latent or is empty.
    """
    if latent is None:
        return None
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 5 or 0 in samples.shape:
        shape = "nested" if getattr(samples, "is_nested", False) else list(samples.shape)
        raise PlanError(
            f"'{name}' of {node} got a latent of shape {shape}; expected a video latent [batch, channels, "
            "frames, height/8, width/8] with at least one frame. Feed it from 'FramePack Image', from VAE Encode with "
            "a video VAE, or from another Anti-Drift Sampler."
        )
    # Other packs and --gpu-only, --fp16-intermediates give other devices and types; the loop works in fp32 on the CPU.
    return samples.to("cpu", torch.float32)


def check_model(guider, schedule: Schedule, memory=None) -> list[str]:
    """Refuse a model that cannot look at a frame context, or one of the other kind; return softer warnings.

    memory: that is shown beside the context.
    """
    for which, patcher in models_of(guider).items():
        wrong = families.why_no_history(patcher)
        if wrong:
            raise PlanError(f"{which.capitalize()}expert: {wrong}" if which else wrong)
    if not is_framepack(guider.model_patcher):
        return wan_warnings(guider, schedule, memory)
    kind = families.said(guider.model_patcher).get("kind")
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


def wan_warnings(guider, schedule: Schedule, memory=None) -> list[str]:
    """What an artist should know before Wan is run with history: warnings."""
    warnings = []
    for which, patcher in models_of(guider).items():
        if isinstance(memory, PreservedMemory) and memory.patchifiers and is_attached(patcher):
            if wan.fingerprint(patcher) == memory.patchifiers:
                continue  # the LoRA of the memory has learned to read these frames, on a schedule that the memory names
            warnings.append(
                f"The patchifiers of the {which}MODEL are others than those that {memory.label} was trained behind. "
                f"Choose those in '{WAN_CONTEXT}', or train the memory anew behind these."
            )
        said = families.said(patcher)
        if not said.get(families.TRAINED, True):
            warnings.append(
                f"The patchifiers of the {which}MODEL are untrained: it was never taught to read history, and sections "
                f"will not follow one another well. Choose a trained file in '{WAN_CONTEXT}'."
            )
        trained = said.get(families.SCHEDULE, "")
        if trained and trained != schedule.text:
            warnings.append(another_schedule(said[families.PATCHIFIERS], trained, schedule.text))
        warnings += without_their_lora(said.get(families.PATCHIFIERS, ""), said.get(LORAS, ()), patcher)
    entries = [entry for conds in guider.original_conds.values() for entry in conds]
    looks = any(patcher.model.diffusion_model.img_emb is not None for patcher in models_of(guider).values())
    if looks and not any(entry.get("clip_vision_output") is not None for entry in entries):
        warnings.append(
            "Wan 2.1 image to video was trained to see the start picture through CLIP vision too, and no prompt brings "
            "it. Connect clip_vision_h to 'clip_vision' of 'FramePack Image'."
        )
    if any(entry.get(key) is not None for entry in entries for key in families.GIVEN_FRAMES):
        warnings.append(
            "The prompt brings frames of its own ('Wan Image To Video'), which no window here begins with. They are "
            "left out: the start picture is 'start', and every section sees it in its context."
        )
    return warnings


def check_base(patcher, latents: Mapping[str, Mapping | None], node: str = SAMPLER) -> str:
    """The family of latents that the model and all inputs share; raises PlanError where one differs (fault 22).

    latents: by socket of the node. Where the model may read several families, it is whichever the first input says.
    """
    allowed = latent_families(patcher)
    for name, latent in latents.items():
        mark = None if latent is None else read_mark(latent)
        base = "" if mark is None else mark.base or mark.latent_format
        if base and base not in allowed:
            raise PlanError(
                f"'{name}' of {node} was made with {expected_files((base,))}, and the model and the other inputs work "
                f"with other latents: same shape, other meaning. Change the file in the 'Load VAE' behind '{name}' to "
                f"{expected_files(allowed)}."
            )
        allowed = (base,) if base else allowed
    return allowed[0]


def frame_rate(patcher, latents: Mapping[str, Mapping | None], node: str = SAMPLER) -> float:
    """Frames a second that a MODEL makes. Raises PlanError for an existing video of another rate.

    latents: by socket of the node.
    """
    fps = families.frames_a_second(patcher)
    for name, latent in latents.items():
        mark = None if latent is None else read_mark(latent)
        if mark is not None and mark.fps is not None and mark.fps != fps:
            raise PlanError(
                f"'{name}' of {node} holds {float(mark.fps):g} frames a second, and the MODEL makes {fps:g}: one of "
                "the two would play at a wrong speed. Expected a video of the same rate: from 'Video History' with the "
                f"VAE of this MODEL, or from another {SAMPLER} with a model of this kind."
            )
    return fps


def make_plan(
    schedule: Schedule, order: str, seconds: float, inputs: Inputs, fps: float = DEFAULT_FPS, clips: bool = False
) -> LongVideoPlan:
    """The plan of the whole video. Raises PlanError for lengths, orders and end frames that cannot be."""
    given = inputs.given.shape[2] if inputs.given is not None else 0
    plan = plan_sections(
        schedule,
        sections=section_count(seconds, schedule.window, fps, clips),
        order=None if order == ORDER_AUTO else order,
        fps=fps,
        history_frames=given,
        has_end=inputs.end is not None,
        clips=clips,
        has_start=not clips or inputs.still is not None,
    )
    if inputs.initial is not None and inputs.initial.shape[2] < plan.total_frames:
        raise PlanError(_too_short(inputs.initial.shape[2], plan))
    return plan


def _too_short(held: int, plan: LongVideoPlan) -> str:
    """Refusal of `held` latent frames of 'initial', with the longest video they are enough for."""
    window, first = plan.schedule.window, plan.given_frames or 1
    pictures = pixel_frames(held, plan.clip)
    text = (
        f"'initial' of Anti-Drift Sampler holds {held} latent frames ({pictures} pictures, "
        f"{pictures / plan.fps:.2f} s), the plan makes {plan.total_frames} ({plan.pixel_frames} pictures, "
        f"{plan.seconds:.2f} s). "
    )
    sections = (held - first) // window
    if sections >= 1:
        return text + (
            "Expected at least as many; feed a longer video into 'initial', or set 'seconds' in Anti-Drift Sampler to "
            f"{sections * plan.section_seconds:g}."
        )
    text += f"Expected at least {first + window} latent frames ({pixel_frames(first + window, plan.clip)} pictures)"
    if plan.given_frames:
        text += f", of which the first {plan.given_frames} stand for the frames of 'history'"
    return text + "; feed a longer video into 'initial'."


def check_timeline(timeline: EncodedTimeline | None, guider, plan: LongVideoPlan, seconds: float) -> list[str]:
    """Refuse prompts past the end, or without a place in the guider; warn of prompts that no section shows."""
    if timeline is None:
        return []
    if "positive" not in guider.original_conds:
        raise PlanError(
            f"'guider' of Anti-Drift Sampler is a {type(guider).__name__} without a prompt called positive, whose text "
            "'timeline' could replace. Use BasicGuider or CFGGuider, or take 'timeline' out and give the guider its "
            "prompts."
        )
    validate_timeline(timeline.timeline, plan.seconds, asked_seconds=seconds)
    starts = tuple(plan.span_seconds(s)[0] for s in plan.sections)
    return [
        f"The prompt at {e.start_s:g} s is never shown: it begins and ends inside one section "
        f"({plan.section_seconds:g} s each): "
        f"{e.text!r}"
        for e in unused_entries(timeline.timeline, starts)
    ]


def memory_needs(
    plan: LongVideoPlan, latent_shape: tuple[int, ...], weights: int, pixels_a_latent: int = 8, on_disk: bool = False
) -> dict[str, int]:
    """Bytes of system RAM a run will hold: weights, latents, an existing video, one decode window pair, the writer.

    latent_shape: `[B, C, T, H, W]` of the start latent. on_disk: a project keeps the latents, and a few sections of
    them are at hand, beside the whole of an existing video; else all are held, and once more as the one video that they
    become. The decode holds three windows of pixels at most, whatever the length; the writer holds frames of one of
    them as bytes.
    """
    batch, channels, _, height, width = latent_shape
    made = plan.total_frames - plan.given_frames
    held = min(AT_HAND * plan.schedule.window, made) if on_disk else 2 * plan.total_frames
    pixels = batch * pixel_frames(2 * plan.schedule.window) * height * width * pixels_a_latent**2 * 3
    given = batch * latent_bytes(plan.given_frames, height, width, channels)
    return {
        "weights": weights,
        "latents": batch * latent_bytes(held, height, width, channels),
        **({HISTORY: given} if on_disk and given else {}),
        "decode": 3 * 4 * pixels,
        "writer": pixels,
    }


def weights_to_come(patcher) -> int:
    """Bytes of a MODEL's weights that are not in memory yet.

    Core reads weights into memory when a MODEL is made, except those it pages in from disk as they are used.
    """
    if not patcher.is_dynamic():
        return 0
    return max(patcher.model_size() - patcher.loaded_size() - patcher.loaded_ram_size(), 0)


def describe_needs(
    needs: Mapping[str, int], free: int, to_come: int, loader: str = LOAD_MODEL
) -> tuple[str, str | None]:
    """A line with the bytes of each part, and a warning where they are more than is free (fault 46).

    to_come: of the weights, bytes that are not in memory yet; what is there is not free any more, as an existing video.
    loader: display name of the node that loads them.
    """
    notes = {HISTORY: " (there already)", **({"weights": " (in memory already)"} if to_come == 0 else {})}
    line = "RAM: " + ", ".join(f"{name} {size / 2**30:.2f} GiB{notes.get(name, '')}" for name, size in needs.items())
    line += f"; {free / 2**30:.2f} GiB free. Decode and file are streamed, whatever the length."
    missing = sum(needs.values()) - needs["weights"] - needs.get(HISTORY, 0) + to_come - free
    if missing <= 0:
        return line, None
    return line, (
        f"This run may need {missing / 2**30:.2f} GiB of RAM more than is free. Choose an fp8 checkpoint or "
        f"weight_dtype fp8_e4m3fn in '{loader}', a smaller picture in 'start' ('size' of 'FramePack Image'), or close "
        "programs."
    )


def _say_all(say: Callable[[str], None], described: str, warnings: list[str]) -> str:
    """Show a text with its warnings, since each text on the node replaces the one before.

    Warnings first: a video on the node leaves room for few lines.
    """
    text = "\n".join([*(f"Warning: {w}" for w in warnings), described])
    say(text)
    return text


def _read(
    start: Mapping, end: Mapping | None, history: Mapping | None, initial: Mapping | None, clips: bool
) -> Inputs:  # fmt: skip
    begin = latent_of("start", start)
    inputs = Inputs(
        start=begin[:, :, :1], end=latent_of("end", end), given=latent_of("history", history),
        initial=latent_of("initial", initial), still=still_of(begin) if clips else None,
    )  # fmt: skip
    inputs.check()
    if not clips and history is None and initial is None and not bool(inputs.start.any()):
        raise PlanError(
            f"'start' of '{SAMPLER}' is an empty latent: it holds zeros and no picture. Expected the start picture's "
            "latent from 'FramePack Image' (for a video from text, of an image made from the same prompt)."
        )
    return inputs


def _describe(guider, plan: LongVideoPlan, inputs: Inputs, on_disk: bool) -> tuple[str, list[str]]:
    """What is shown before the first step, and warnings about size and memory."""
    lines, warnings = [plan.describe()], []
    if plan.clips and inputs.still is None:
        lines.append("Text to video: 'start' is an empty latent and gives the size and the batch alone.")
    if inputs.given is not None:
        lines.append("The given video takes the place of the start picture; 'start' only gives the size and the batch.")
    height, width = inputs.start.shape[-2:]
    pixels = families.pixels_a_latent(guider.model_patcher)
    off = off_grid(width * pixels, height * pixels, multiple=2 * pixels)
    if off is not None:
        warnings.append(f"The edge of the picture is padded for the model and cut off again. {off}")
    models = models_of(guider).values()
    needs = memory_needs(plan, inputs.start.shape, sum(model.model_size() for model in models), pixels, on_disk)
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    loader = families.loader_of(guider.model_patcher)
    memory, shortage = describe_needs(needs, free, sum(map(weights_to_come, models)), loader)
    lines.append(memory)
    return "\n".join(lines), warnings + ([shortage] if shortage else [])


@dataclass(frozen=True)
class Finished:
    """What a run gives back.

    project: the name of the project that holds its sections, "" without one. video: the mp4 of it, sheet: one frame
    a section as PNG; both None without a VAE.
    """

    latent: dict
    report: str
    project: str = ""
    video: Path | None = None
    sheet: Path | None = None


@dataclass(frozen=True)
class Live:
    """How the video is written while it is made. show: gets the path of a playable mp4 of what is finished so far."""

    vae: object
    metadata: Mapping | None = None
    show: Callable[[Path], None] = lambda _: None


def _mark(guider, base: str, plan: LongVideoPlan) -> dict:
    mark = {
        "latent_format": type(guider.model_patcher.model.latent_format).__name__,
        "base": base,
        "order": plan.order,
        "window": plan.schedule.window,
        "fps": plan.fps,
        "given": max(plan.given_frames, 1),
    }
    return {**mark, "clips": True} if plan.clips else mark


def sample_long_video(
    *, noise, guider, sampler, sigmas: Tensor, schedule: Schedule, start: Mapping, seconds: float,
    order: str = ORDER_AUTO, end: Mapping | None = None, history: Mapping | None = None,
    initial: Mapping | None = None, timeline: EncodedTimeline | None = None,
    changes: Sequence[SectionChange] = (), project: ProjectRequest | None = None, live: Live | None = None,
    memory: FrameMemory | PreservedMemory | None = None, say: Callable[[str], None] = logging.info,
) -> Finished:  # fmt: skip
    """Plan, check, sample.

    project: where finished sections are kept and found again; without one they are in RAM only. live: needs one.
    memory: from its encoder node; for the forward order. say: shown on the node while it runs. Raises
    PlanError, MemoryMismatch, VAEError or JournalError before any sampling for what cannot work.
    """
    warnings = check_model(guider, schedule, memory)
    guider, wrong = checked_attention(guider)
    warnings += wrong
    base = check_base(guider.model_patcher, {"start": start, "end": end, "history": history, "initial": initial})
    clips = families.makes_clips(guider.model_patcher)
    if clips:
        check_clips(history, initial, schedule.window)
    inputs = _read(start, end, history, initial, clips)
    if sigmas.shape[0] < 2:
        raise PlanError(
            f"'sigmas' holds {sigmas.shape[0]} values; expected at least 2 (one step). See 'FramePack Sigmas'."
        )
    fps = frame_rate(guider.model_patcher, {"history": history, "initial": initial})
    plan = make_plan(schedule, order, seconds, inputs, fps, clips)
    patcher, without = remembering(memory, guider)
    remembered, plan, said, more = with_memory(memory, patcher, plan, inputs)
    if remembered is not None and memory is not None:
        more = [*more, *without_their_lora(memory.label, memory.loras, *models_of(guider).values())]
    warnings += [*more, *without, *check_timeline(timeline, guider, plan, seconds)]
    if timeline is None and is_framepack(guider.model_patcher):
        warnings += too_long(guider.original_conds.get("positive", []))
    described, more = _describe(guider, plan, inputs, project is not None)
    described, warnings = "\n".join([described, *said]), warnings + more
    for warning in warnings:
        logging.warning("Anti-Drift Sampler: %s", warning)
    mark = _mark(guider, base, plan)
    if live is not None:
        check_vae(live.vae, inputs.start, read_mark({KEY: mark}))
    runner = SectionSampler(
        guider, noise, sampler, sigmas, timeline, changes=by_index(changes, plan), memory=remembered,
        vae=None if live is None else live.vae,
    )  # fmt: skip
    preview = GrowingPreview(guider.model_patcher, plan, sigmas.shape[0] - 1, say, picture=live is None)
    if project is None:
        _say_all(say, described, warnings)
        video = runner.run(plan, inputs, preview).whole()
        described = "\n".join([described, *runner.cache.lines()])
        done = Finished({"samples": video, KEY: mark}, _say_all(say, described, [*warnings, *runner.notes]))
    else:
        with open_project(project, runner, plan, inputs, mark, base, changes, live is not None) as opened:
            done = _run_in(opened, runner, plan, inputs, preview, live, mark, (say, described, warnings))
    return replace(done, latent={**done.latent, "samples": done.latent["samples"].to(intermediate_device())})


def _run_in(project, runner, plan: LongVideoPlan, inputs: Inputs, preview, live: Live | None, mark, shown) -> Finished:
    """Run with sections kept in a project, and the video written as it grows where a VAE is there for it."""
    say, described, warnings = shown
    keeper = attach(runner, project)
    preview.project = project
    keep_front(project, inputs.first)
    _say_all(say, "\n".join([described, project.holdings(), *project.notes]), warnings)
    writer, announced = None, []

    def announce(text: str) -> None:
        logging.warning("Anti-Drift Sampler: %s", text)
        announced.append(text)
        say(text)

    def go_on() -> None:
        """While pictures are decoded: Cancel is heard, and the project stays ours."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        project.alive()

    if live is not None:
        writer = LiveVideo(
            project, plan, live.vae, metadata=live.metadata, show=live.show, announce=announce,
            interrupt=go_on, say=say,
        )  # fmt: skip

    def watch(moment: Moment) -> None:
        """After each step: what went wrong beside the sampling ends it at once."""
        if writer is not None:
            writer.check()
        preview(moment)

    try:
        frames = runner.run(plan, inputs, watch, writer.on_section if writer else None)
        path = writer.finish() if writer else None
    except BaseException:
        say(_stopped(project, writer))
        raise
    latent = {"samples": on_disk(project, frames), KEY: {**mark, "project": project.name}}
    lines = [f"Finished: {plan.pixel_frames} frames = {plan.seconds:.2f} s.", keeper.summary(plan), project.status()]
    lines += [f"Video: {path.name} · contact sheet: {writer.sheet.name}"] if writer and path else [NOT_JUDGED]
    if writer is not None:
        keeper.forget_segments_but(segment.name for segment in writer.segments.values())
    judged = keeper.findings()
    if writer and writer.judged and not judged:
        lines.append(NOTHING_FOUND.format(len(writer.judged)))
    lines += [*runner.cache.lines(), *project.notes]
    report = _say_all(say, "\n".join(lines), list(dict.fromkeys([*warnings, *runner.notes, *announced, *judged])))
    return Finished(latent, f"{described}\n{report}", project.name, path, writer.sheet if writer else None)


NOT_JUDGED = (
    "Frozen sections, jumps and drift are looked for when the video is decoded: in Save Long Video, or here with a vae."
)


def _stopped(project, writer: LiveVideo | None) -> str:
    """What is left after Cancel or an error; never raises, since the reason of the stop must reach the artist."""
    lines = ["Stopped. Queue again to go on.", project.status()]
    try:
        unfinished = writer.keep() if writer else None
    except Exception as error:
        logging.exception("The unfinished video could not be written.")
        lines.append(f"The video so far could not be written: {error}")
        unfinished = None
    if unfinished is not None:
        lines.insert(1, f"What is finished: {unfinished}")
    return "\n".join(lines)
