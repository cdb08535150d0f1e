"""What the nodes that train share: inputs, the run with its files, and how it is shown on its node."""

from __future__ import annotations

import re
import time
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..frame_memory.forcing import training_run as training
from ..frame_memory.forcing.clips import VIDEO_CLIPS, ForcingError, stored_videos
from ..frame_memory.forcing.prepared import write_videos
from ..frame_memory.forcing.results import Result, write_result
from ..frame_memory.forcing.video_trainer import VideoSettings
from ..frame_memory.journal.files import JournalError, safe_name
from ..frame_memory.model import head, memory_file, wan_file
from ..frame_memory.model.families import is_wan, said
from ..frame_memory.model.framepack import latent_families
from ..frame_memory.model.memory import MEMORY_PACK
from ..frame_memory.sampling.identity import patches_of
from ..frame_memory.sampling.time_left import TimeLeft
from ..frame_memory.video import plots
from .shown import show
from .sockets import FrameMemorySocket

# In ComfyUI's output folder, beside the projects and not among them.
RUNS = "frame_memory_training"
PREPARE = "write for the command line"
SMOOTH = 20
WARNING = "Warning"
# The learning rate above which the report warns.
HIGH_RATE = 1e-3
# Seconds between two texts or pictures on the node.
SAY_EVERY = 2.0
# Tooltips of several nodes.
SHIFT_TIP = "Noise levels that are learned from: above 1 noisier. 0 = 5."
CHECKPOINTING_TIP = "Compute blocks twice instead of keeping their parts: a third slower, far less GPU memory."


def video_inputs(model: str) -> list[io.Input]:
    """MODEL, videos and captions. model: a tooltip's beginning."""
    return [
        io.Model.Input("model", tooltip=f"{model} It is not changed: what is trained lies beside it."),
        io.Latent.Input("latents", tooltip="The videos: 'latents' of Video Clips, one LATENT a video, in model order."),
        io.Conditioning.Input("positive", tooltip="The captions: 'positive' of the same Video Clips, one a video."),
    ]


def steps_input(tooltip: str) -> io.Int.Input:
    """Updates of the whole run."""
    return io.Int.Input("steps", default=500, min=1, max=1_000_000, tooltip=tooltip)


def clips_input(tooltip: str) -> io.Int.Input:
    """Most clips of a video in one update."""
    return io.Int.Input("clips", default=16, min=1, max=512, tooltip=tooltip)


def rate_input(default: float, tooltip: str) -> io.Float.Input:
    """AdamW's learning rate."""
    return io.Float.Input("learning_rate", default=default, min=1e-8, max=1.0, step=1e-6, round=False, tooltip=tooltip)


def seed_input() -> io.Int.Input:
    """Not called "seed", which the editor would change from one queueing to the next."""
    return io.Int.Input(
        "training_seed",
        default=0,
        min=0,
        max=2**53 - 1,
        tooltip="Decides videos, noise and noise levels. The same seed makes the same run on the same machine.",
    )


def advanced_inputs(shift: str, rank: str, checkpointing: str) -> list[io.Input]:
    """Noise levels, the LoRA, and what a run takes of memory and disk. Each text is a tooltip."""
    more = {"optional": True, "advanced": True}
    return [
        io.Float.Input("shift", default=0.0, min=0.0, max=20.0, step=0.1, tooltip=shift, **more),
        io.Int.Input("rank", default=16, min=1, max=256, tooltip=rank, **more),
        io.Boolean.Input("checkpointing", default=True, tooltip=checkpointing, **more),
        io.Int.Input(
            "save_every",
            default=50,
            min=1,
            max=100_000,
            tooltip="Steps between two checkpoints in output/frame_memory_training; the last 3 are kept.",
            **more,
        ),
    ]


def outputs(model: str, memory: str = "") -> list[io.Output]:
    """Of every node that trains. model, memory: tooltips; no memory without one."""
    return [
        io.Model.Output(display_name="model", tooltip=model),
        *([FrameMemorySocket.Output(display_name="memory", tooltip=memory)] if memory else []),
        io.String.Output(display_name="checkpoint", tooltip="The result's file in models/frame_memory."),
        io.Image.Output(display_name="loss_curve", tooltip="The loss of every step and its running mean."),
        io.String.Output(
            display_name="report", tooltip="Steps, loss, time, what was written where, and what went wrong."
        ),
    ]


def shared_settings(asked: dict) -> dict:
    """What the widgets say of any kind of run, as arguments of its Request."""
    steps = asked["steps"]
    settings = VideoSettings(rate=asked["learning_rate"], warmup=training.warmup_of(steps), seed=asked["training_seed"])
    plain = ("clips", "shift", "rank", "checkpointing", "save_every")
    return {"stage": asked["stage"], "steps": steps, "settings": settings, **{k: asked[k] for k in plain if k in asked}}


def train(
    node, kind: type[training.TrainingRun], request: training.Request, asked: dict, latents, positive, memory
) -> io.NodeOutput:
    """Train on a running node, write the result, and say what was done; all that its execute returns.

    kind: TrainingRun, or one built on it. asked: the widgets. Raises what a run raises.
    """
    model, name = asked["model"], run_name(asked["name"], kind.node)
    videos = stored_videos(latents, positive, kind.node, is_wan(model))
    folder = Path(folder_paths.get_output_directory()) / RUNS / name
    heard: list[str] = []

    def say(text: str) -> None:
        heard.append(text)
        show(node, text)

    if request.stage == PREPARE:
        return _prepared(node, kind, model, videos, folder)
    watch = Watch(node, model)
    faces = training.Faces(say, watch, comfy.model_management.throw_exception_if_processing_interrupted)
    run = kind(model, memory, videos, request, folder, faces, patches=patches_of(model))
    try:
        outcome = run.run()
    finally:
        _keep_curve(folder, watch.losses, request.steps, say)
    memories, loras = (Path(folder_paths.get_folder_paths(place)[0]) for place in (memory_file.FOLDER, "loras"))
    result = write_result(run, outcome, name, memories, loras, say)
    report = "\n".join(_report(run, outcome, result, heard))
    show(node, report)
    none = ExecutionBlocker(f"'{run.node}' trained without a memory. Take 'memory' off '{MEMORY_PACK}'.")
    return io.NodeOutput(
        _trained_model(model, run, outcome, result), *([result.memory or none] if kind.remembers else []),
        result.checkpoint.name, plots.as_image(curve(outcome.losses, request.steps)), report,
        ui=ui.PreviewText(report),
    )  # fmt: skip


def run_name(text: str, node: str) -> str:
    """A name that can be a folder and a file on every system. node: display name of the one it was given to.

    Raises ForcingError with the nearest valid one.
    """
    try:
        fit = safe_name(text)
    except JournalError:
        fit = ""
    if fit and fit == text:
        return fit
    reason = "cannot be the name of a folder" if text.strip() else "is empty; the run and its result need a name"
    nearest = fit or _kept_of(text) or "my_training"
    raise ForcingError(f"'name' of '{node}' {reason}: {text!r}. Nearest valid: {nearest!r}.")


def _kept_of(text: str) -> str:
    """The parts of a path that can stand in a name, as one name; empty where none can."""
    parts = [part for part in re.split(r"[\\/]", text) if part.strip(" .")]
    try:
        return safe_name("_".join(parts))
    except JournalError:
        return ""


class Watch:
    """Shows a run on its node: bar, words, and a picture of the newest estimate (first, middle, last frame)."""

    def __init__(self, node, model):
        self.node, self.format = node, model.model.latent_format
        self.previewer = latent_preview.get_previewer(model.load_device, self.format)
        self.bar: comfy.utils.ProgressBar | None = None
        self.left: TimeLeft | None = None
        self.said_at = 0.0
        self.losses: list[float] = []

    def __call__(self, moment: training.Moment) -> None:
        now, self.losses = time.monotonic(), moment.losses
        if self.bar is None or self.left is None:
            self.bar, self.left = comfy.utils.ProgressBar(moment.steps), TimeLeft(moment.steps)
        self.left.see(moment.step, now)
        picture = None
        if now - self.said_at > SAY_EVERY or moment.step == moment.steps:
            self.said_at, picture = now, self._picture(moment.estimate)
            show(self.node, self._words(moment))
        self.bar.update_absolute(moment.step, moment.steps, picture)

    def _words(self, moment: training.Moment) -> str:
        mean = smooth(moment.losses)[-1:]
        left = self.left.words() if self.left and moment.step < moment.steps else ""
        loss = f"loss {mean[0][1]:.4f} (mean of {min(SMOOTH, len(moment.losses))})" if mean else "no loss yet"
        return "\n".join([
            f"step {moment.step} of {moment.steps} · {moment.clips} clip{'s' * (moment.clips > 1)} of {moment.video}",
            " · ".join(filter(None, [loss, f"rate {moment.rate:.1e}", left])),
            "Cancel keeps a checkpoint; queue again with the same name to go on.",
        ])  # fmt: skip

    def _picture(self, estimate: torch.Tensor):
        if self.previewer is None:
            return None
        shown = estimate[:1, :, [0, estimate.shape[2] // 2, -1]]
        strip = torch.cat(list(shown.split(1, dim=2)), dim=-1)
        return self.previewer.decode_latent_to_preview_image("JPEG", strip)


def smooth(losses: list[float]) -> list[tuple[int, float]]:
    """(step, mean of the last `SMOOTH` losses) at every step whose loss is a number."""
    good = [(step, loss) for step, loss in enumerate(losses, 1) if loss == loss]
    made = []
    for place, (step, _) in enumerate(good):
        part = [loss for _, loss in good[max(0, place + 1 - SMOOTH) : place + 1]]
        made.append((step, sum(part) / len(part)))
    return made


def curve(losses: list[float], steps: int):
    """A picture of the loss over the steps."""
    good = [(step, loss) for step, loss in enumerate(losses, 1) if loss == loss] or [(0, 0.0)]
    mean = smooth(losses) or [(0, 0.0)]
    bottom, top = plots.fitted([loss for _, loss in good], 0.01)
    lines = [
        plots.Curve("loss", *zip(*good, strict=True), note=""),
        plots.Curve("mean", *zip(*mean, strict=True), note=f"mean of {min(SMOOTH, len(mean))}: {mean[-1][1]:.4f}"),
    ]
    title = f"Loss (mean squared error), step {len(losses)} of {max(steps, len(losses))}"
    return plots.draw_panels([plots.Panel(title, "step", "", lines, (), top, max(bottom, 0.0))])


def _keep_curve(folder: Path, losses: list[float], steps: int, say) -> None:
    """The picture beside the checkpoints; a run is not lost where it cannot be written."""
    if losses and folder.is_dir():
        try:
            curve(losses, steps).save(folder / "loss.png", optimize=True)
        except OSError as error:
            say(f"Warning: the loss curve could not be written: {error}.")


def _prepared(node, kind: type[training.TrainingRun], model, videos, folder: Path) -> io.NodeOutput:
    kind.check(model, videos)
    family = latent_families(model)[0] if is_wan(model) else said(model).get("base", "")
    paths = write_videos(folder / "videos", videos, family)
    report = (
        f"{len(paths)} videos with their captions are in {folder / 'videos'}. Train on them with\n"
        "python scripts/run.py -m frame_memory.forcing --help\n"
        "Nothing was trained, so what is connected behind this node is skipped."
    )
    show(node, report)
    nothing = [ExecutionBlocker(None)] * (3 if kind.remembers else 2)
    return io.NodeOutput(model, *nothing, report, ui=ui.PreviewText(report))


def _trained_model(model, run: training.TrainingRun, outcome: training.Outcome, result: Result):
    if outcome.trained.patchifiers(outcome.weights):
        model = wan_file.with_file(model, wan_file.read(str(result.checkpoint)))[0]
    if outcome.trained.pairs:
        return comfy.sd.load_lora_for_models(model, None, result.lora_tensors, 1.0, 0.0)[0]
    file = memory_file.read(str(result.checkpoint), run.node)
    return head.apply_head(training.without_head_patches(model), file, 1.0)[0] if file.head else model


def _report(run: training.TrainingRun, outcome: training.Outcome, result: Result, heard: list[str]) -> list[str]:
    """What the node says at the end: warnings and the result first, since a picture leaves room for few lines."""
    done, request = len(outcome.losses), run.request
    warnings = [text for text in heard if text.startswith(WARNING)]
    if outcome.stopped:
        warnings.append(f"{WARNING}: {outcome.stopped}")
    if request.settings.rate > HIGH_RATE:
        warnings.append(
            f"{WARNING}: learning_rate was {request.settings.rate:g}, and {run.usual}. So high a rate can spoil what "
            "it trains; compare the result with the base."
        )
    earlier = f"; {outcome.resumed} of them before a stop" if 0 < outcome.resumed < done else ""
    steps = f"{done} of {request.steps} steps" if done <= request.steps else f"{done} steps"
    lines = [
        *warnings,
        f"Result: models/frame_memory/{result.checkpoint.name}, for {' or '.join(map(repr, run.loaders))}.",
    ]
    if result.lora is not None:
        lines.append(f"LoRA: models/loras/{result.lora.name}.")
    lines.append(f"{request.stage}: {steps} on {len(run.videos)} videos, {run.how()}{earlier}.")
    return [*lines, *_numbers(outcome), *(text for text in heard if text not in warnings), *_longer(run)]


def _numbers(outcome: training.Outcome) -> list[str]:
    """Loss and time in words."""
    losses, made, lines = outcome.losses, len(outcome.losses) - outcome.resumed, []
    mean, skipped = smooth(losses), sum(loss != loss for loss in losses)
    if len(mean) >= 2 * SMOOTH:
        first, last = mean[SMOOTH - 1][1], mean[-1][1]
        lines.append(f"Loss (mean of {SMOOTH} steps): {first:.4f} at first, {last:.4f} at the end.")
    elif mean:
        last, count = mean[-1][1], min(SMOOTH, len(mean))
        lines.append(f"Loss: {last:.4f} (mean of the last {count}); too few steps to say whether it falls.")
    if made:
        lines.append(f"{outcome.seconds / made:.2f} s a step.")
    if skipped:
        lines.append(f"{skipped} steps were skipped, since their loss was not a number.")
    return lines


def _longer(run: training.TrainingRun) -> list[str]:
    longest = max(video.clips for video in run.videos)
    if longest >= run.request.clips:
        return []
    return [
        f"The longest video has {longest} clips, so no update had {run.request.clips}. Longer videos from "
        f"'{VIDEO_CLIPS}' teach longer memory."
    ]
