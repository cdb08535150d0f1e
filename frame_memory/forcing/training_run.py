"""A whole training run on a MODEL of the host: load, resume, train, keep checkpoints, write the result.

The node and the command line are two faces of it. Source: reference/memorypack.md sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ..model.base_signature import MODEL_PREFIX, Base
from ..model.families import PATCHIFIERS, frames_a_second, is_wan, loader_of, pixels_a_latent, said
from ..model.framepack import MODEL_OPTION, latent_families
from ..model.head import HEADS
from ..model.memory import FrameMemory, check_fits, check_model, new_encoder, of_kind
from ..model.memory_file import HEAD, LOAD_DIRECT_FORCING, LOAD_MEMORY, SEMANTIC_PACK
from ..model.preserved_memory import PreservedMemory
from ..model.provenance import LORAS, NamedLora, without_their_lora
from ..model.semantic_pack import SemanticPack, open_gate
from ..plan import clip_window, pixel_frames
from ..plan.frames import section_frames
from ..plan.preservation import PRESERVATION
from .clips import TRAIN, VIDEO_CLIPS, ForcingError, StoredVideo, TrainingVideo, check_families, clip_frames
from .draws import DIRECT, TEACHER, Recipe, clips_at, draw_video
from .flow import WanConditioning
from .forcings import LOSSES
from .stages import HEAD_PART, LORA, MEMORY, Trained
from .training_state import TrainingFolder
from .video_trainer import TrainingStopped, VideoSettings, VideoTrainer
from .workers import ALONE, Workers

STAGE_MEMORY, STAGE_LORA, STAGE_HEAD = "1: memory", "1: memory and LoRA", "2: head (Direct Forcing)"
STAGES = {STAGE_MEMORY: (MEMORY,), STAGE_LORA: (MEMORY, LORA), STAGE_HEAD: (HEAD_PART,)}
# Bytes a trained number takes: itself, its gradient, AdamW's two and the average, fp32 each.
TRAINED_BYTES = 20
# Activations of stage 1 against those of inference, as a guess for the host: with blocks run again, and without.
GRAPH_SHARE = {True: 4, False: 40}

# Told where the memory given changes nothing, so that a head made without one is not taken for a head of a memory.
WITHOUT_MEMORY = (
    "Warning: the gate of the memory given ({label}) is closed, as an untrained one's is. So the head is trained "
    "without a memory, and the result holds none. To train with one, connect the memory of stage 1."
)


def warmup_of(steps: int) -> int:
    """Steps until the full rate, in a run of `steps`: a tenth of them, at most the reference's 500."""
    return min(500, max(steps // 10, 1))


@dataclass(frozen=True)
class Request:
    """What is wanted. stage: one of STAGES. steps: of the whole run, those before a stop included.

    clips: the most clips of a video in one step. forcing: None for the stage's own. rank: of the LoRA.
    """

    stage: str
    steps: int
    clips: int = 16
    forcing: str | None = None
    shift: float = 0.0
    history_shift: float = 0.0
    rank: int = 16
    checkpointing: bool = True
    save_every: int = 50
    settings: VideoSettings = field(default_factory=VideoSettings)

    @property
    def parts(self) -> tuple[str, ...]:
        """What learns."""
        return STAGES[self.stage]

    @property
    def recipe(self) -> Recipe:
        """How losses are made in this stage."""
        forcing = self.forcing or (DIRECT if HEAD_PART in self.parts else TEACHER)
        return Recipe(
            forcing=forcing,
            shift=self.shift,
            history_shift=self.history_shift,
            # Left out only where the base itself could forget how to work without a memory.
            drop_memory=0.1 if LORA in self.parts else 0.0,
            random_start=forcing == TEACHER,
        )


@dataclass(frozen=True)
class Moment:
    """What a watcher is told after each step.

    losses: of all steps so far. estimate: of the last clip, `[1, C, 9, H, W]` in model space.
    """

    step: int
    steps: int
    clips: int
    video: str
    losses: list[float] = field(repr=False)
    rate: float
    estimate: Tensor = field(repr=False)


@dataclass(frozen=True)
class Faces:
    """Who is told: `say` gets sentences, `watch` a Moment after each step; `interrupt` raises to stop."""

    say: Callable[[str], None] = print
    watch: Callable[[Moment], None] = lambda moment: None
    interrupt: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """A finished run. weights: by the names of Trained.parameters, averaged where averages are kept."""

    trained: Trained
    weights: dict[str, Tensor] = field(repr=False)
    memory: FrameMemory | PreservedMemory | None
    base: Base
    losses: list[float] = field(repr=False)
    resumed: int
    seconds: float
    stopped: str = ""


class TrainingRun:
    """One run in `folder`, from its newest checkpoint on where there is one.

    patcher: a FramePack-F1 MODEL, not changed. memory: FRAME_MEMORY, or None: stage 1 then begins with a new one, stage
    2 trains without, as it does where the memory's gate is closed. patches: which LoRAs lie on the MODEL, in words that
    differ with them. Raises ForcingError or MemoryMismatch for what cannot be trained.

    node: display name of the one that trains. loaders: of those that read its result. usual: its learning rate. longer:
    what else to do about videos under one clip. remembers: whether there may be a memory.
    """

    node: ClassVar[str] = TRAIN
    loaders: ClassVar[tuple[str, ...]] = (LOAD_DIRECT_FORCING, LOAD_MEMORY)
    usual: ClassVar[str] = "the paper's is 1e-05"
    longer: ClassVar[str] = ""
    remembers: ClassVar[bool] = True
    memory: FrameMemory | PreservedMemory | None

    def __init__(
        self, patcher, memory: FrameMemory | None, videos: list[StoredVideo], request: Request, folder: Path,
        faces: Faces | None = None, workers: Workers = ALONE, patches: str = "",
    ):  # fmt: skip
        self.faces, self.workers = faces or Faces(), workers
        self.original, self.request, self.patches = patcher, request, patches
        self.check(patcher, videos)
        self.memory = self._given(memory)
        self.patcher = without_head_patches(patcher) if HEAD_PART in request.parts else patcher
        self.base = Base.of(patcher)
        self.videos = [replace(video, window=self._window()) for video in videos]
        self.folder = TrainingFolder(folder, self.identity(), self.faces.say, node=self.node)
        self.moment: Moment | None = None
        self.saved = 0  # the step of the newest whole checkpoint
        self._check_videos()
        self._warn()

    @classmethod
    def check(cls, patcher, videos: Sequence[StoredVideo]) -> None:
        """Raise ForcingError, MemoryMismatch or ValueError for a MODEL that this run cannot train, or videos that are
        not for it, whatever the stage."""
        cls._check_model(patcher)
        for video in videos:
            _check_made_for(video, patcher, cls.node)
        check_families(videos, latent_families(patcher), cls.node)
        for video in videos:
            _check_rate(video, frames_a_second(patcher))

    @classmethod
    def _check_model(cls, patcher) -> None:
        check_model(patcher, cls.node)

    def _given(self, memory):
        """The memory to train with. Raises MemoryMismatch or ForcingError for one that cannot be."""
        if memory is None:
            return new_encoder(self.original) if MEMORY in self.request.parts else None
        check_fits(of_kind(memory, SEMANTIC_PACK, TRAIN, PRESERVATION), self.original, TRAIN)
        if MEMORY not in self.request.parts and not bool(memory.pack.gate):
            self.faces.say(WITHOUT_MEMORY.format(label=memory.label))
            return None
        return memory

    def _window(self) -> int:
        """Latent frames of a clip."""
        return clip_frames()

    def _warn(self) -> None:
        """Say what may be meant, and seldom is."""
        for label, loras in self._trained_together():
            for text in without_their_lora(label, loras, self.original):
                self.faces.say(f"Warning: {text}")
        if self.patcher.patches.keys() != self.original.patches.keys():
            self.faces.say(
                "The MODEL has a LoRA or a head on its output layer already. Training goes on from there, and its "
                f"result holds it: do not put it on once more beside '{LOAD_DIRECT_FORCING}' with that result."
            )

    def _trained_together(self) -> list[tuple[str, tuple[NamedLora, ...]]]:
        """Of all that is gone on from, its name and the LoRAs that belong to it."""
        noted = said(self.original)
        memory = [] if self.memory is None else [(self.memory.label, self.memory.loras)]
        return [(noted.get(PATCHIFIERS, ""), noted.get(LORAS, ())), *memory]

    def how(self) -> str:
        """How it learns, in the report's words."""
        return self.request.recipe.forcing

    def identity(self) -> dict:
        """What a checkpoint must share with the run that goes on from it."""
        request = self.request
        return {
            "stage": request.stage,
            "forcing": request.recipe.forcing,
            "base": self.base.signature.short,
            "LoRA and patches": self.patches or None,
            "memory": None if self.memory is None else self.memory.fingerprint,
            "rank": request.rank if LORA in request.parts else None,
            "optimiser": request.settings.optimiser,
            "seed": request.settings.seed,
        }

    def _check_videos(self) -> None:
        for video in self.videos:
            self._check_video(video)
        longest = max(video.clips for video in self.videos)
        if self.request.parts == (MEMORY,) and min(longest, self.request.clips) < 2:
            raise ForcingError(
                f"The longest video has {longest} clip(s) and 'clips' is {self.request.clips}; a memory learns from 2 "
                f"clips on, since the first has nothing to remember. Give longer videos to '{VIDEO_CLIPS}', or raise "
                "'clips'."
            )

    def _check_video(self, video: StoredVideo) -> None:
        if video.clips < 1:
            fps = frames_a_second(self.original)
            seconds, shortest = pixel_frames(1 + video.window) / fps, shortest_of(video, fps)
            raise ForcingError(
                f"{video.name} has {video.samples.shape[2]} latent frames; expected at least {1 + video.window}, a "
                f"start frame and one clip of {video.window}, which are {seconds:.2f} s. Set 'shortest' in "
                f"'{VIDEO_CLIPS}' to {shortest:g}: it then skips shorter videos, and names them.{self.longer}"
            )

    def run(self) -> Outcome:
        """Train to the end. An interruption or an error keeps a checkpoint of the last whole step, and is raised."""
        self._load()  # in the host's own mode: weights that it holds may be tensors of its inference mode
        with torch.inference_mode(False):
            trained = self._trained()
            trainer = VideoTrainer(trained.parameters, self.request.settings, self.workers)
            found = self.folder.resume(trainer)
            resumed, began = trainer.done, time.monotonic()
            self.saved = resumed
            if not self.workers.agree(resumed):
                raise ForcingError(
                    f"The processes do not begin at the same step (this one at {resumed}): each must see the same "
                    f"checkpoints in {self.folder.folder}. Put 'output' on a disk that all machines share."
                )
            if found is not None:
                self.faces.say(self._going_on(resumed, found.name))
            stopped = self._steps(trained, trainer)
            if stopped and all(loss != loss for loss in trainer.losses):
                raise ForcingError(f"Nothing was learned. {stopped}")
            return Outcome(
                trained, trainer.weights(), self.memory, self.base, trainer.losses, resumed,
                time.monotonic() - began, stopped,
            )  # fmt: skip

    def _going_on(self, resumed: int, name: str) -> str:
        if resumed < self.request.steps:
            return f"Going on from step {resumed} of {self.request.steps} ({name})."
        return (
            f"{resumed} steps are done already ({name}) and {self.request.steps} are asked for: nothing is trained, "
            f"and the result is that of {resumed}."
        )

    def _steps(self, trained: Trained, trainer: VideoTrainer) -> str:
        stopped = ""
        try:
            with trained.ready():
                while trainer.done < self.request.steps:
                    rate = self.request.settings.rate * trainer.rate_share
                    trainer.step(partial(self._losses, trained, trainer.done, rate))
                    if self.moment is not None:
                        self.faces.watch(replace(self.moment, step=trainer.done, losses=trainer.losses))
                    if trainer.done % self.request.save_every == 0:
                        self._save(trainer)
        except TrainingStopped as error:
            stopped = str(error)
        except BaseException as error:
            self._save(trainer)
            if isinstance(error, Exception) and comfy.model_management.is_oom(error):
                # A type that ComfyUI takes for what it is: it frees the models then.
                raise comfy.model_management.OOM_EXCEPTION(f"{self._too_large(trainer.done)} ({error})") from error
            if trainer.done and self.saved == trainer.done:
                self.faces.say(
                    f"Stopped after step {trainer.done} of {self.request.steps}. Run it again with the same name to go "
                    f"on from there; with steps at {trainer.done}, for a result of what it has learned so far. Its "
                    f"checkpoint is kept in {self.folder.folder}."
                )
            raise
        self._save(trainer)
        return stopped

    def _too_large(self, done: int) -> str:
        shape, pixels = self._largest(), pixels_a_latent(self.original)
        cheaper = [f"a smaller 'size' in '{VIDEO_CLIPS}'", f"fp8 in 'weight_dtype' of '{loader_of(self.original)}'"]
        cheaper += self._cheaper()
        if HEAD_PART not in self.request.parts and not self.request.checkpointing:
            cheaper.append("'checkpointing' on")
        kept = f" The checkpoint of step {self.saved} is kept." if self.saved else ""
        return (
            f"The memory of the GPU was full in step {done + 1} (videos of {shape[4] * pixels}x{shape[3] * pixels} "
            f"pixels).{kept} Cheaper are: {'; '.join(cheaper)}."
        )

    def _largest(self) -> torch.Size:
        return max((video.samples.shape for video in self.videos), key=lambda shape: shape[3] * shape[4])

    def _cheaper(self) -> list[str]:
        return [f"the stage '{STAGE_MEMORY}'"] if LORA in self.request.parts else []

    def _save(self, trainer: VideoTrainer) -> None:
        """Write a checkpoint of the last whole step, where there is none yet. The first process does it for all."""
        if trainer.done != self.saved and (not self.workers.first or self.folder.save(trainer)):
            self.saved = trainer.done

    def _losses(
        self, trained: Trained, step: int, rate: float, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        request, recipe = self.request, self.request.recipe
        least = 2 if request.parts == (MEMORY,) else 1
        count = clips_at(step, request.steps, request.clips, least)
        enough = min(count, max(video.clips for video in self.videos))
        eligible = [video for video in self.videos if video.clips >= enough]
        chosen = eligible[int(torch.randint(len(eligible), (), generator=generator))]
        video = self._open(chosen, trained)
        draw = draw_video(video, count, recipe, generator)
        for clip in LOSSES[recipe.forcing](trained.forced, video, draw, recipe):
            self.faces.interrupt()
            self.moment = Moment(step, request.steps, draw.count, chosen.name, [], rate, clip.estimate)
            yield clip.loss, 1 / draw.count

    def _load(self) -> None:
        """Have the host put the MODEL on its device, with room left for what training needs beside it."""
        largest, window = self._largest(), self._window()
        # The packed history adds about a third to the window's tokens.
        activations = self.patcher.memory_required([1, largest[1], window + -(-window // 3), *largest[3:]])
        if self.request.parts != (HEAD_PART,):
            activations *= GRAPH_SHARE[self.request.checkpointing]
        comfy.model_management.load_models_gpu([self.patcher], activations + self._bytes_beside())

    def _bytes_beside(self) -> int:
        """What learns beside the MODEL, with its gradients and the optimiser."""
        network = self.patcher.model.diffusion_model
        learning = sum(network.get_parameter(name).numel() for name in HEAD) if HEAD_PART in self.request.parts else 0
        beside = TRAINED_BYTES * learning
        if self.memory is not None:
            pack = self.memory.encoder.model.parameters()
            beside += sum(p.numel() * (TRAINED_BYTES if MEMORY in self.request.parts else p.itemsize) for p in pack)
        return beside

    def _trained(self) -> Trained:
        request, patcher, beside = self.request, self.patcher, self._beside()
        originals = {k.removeprefix(MODEL_PREFIX): v.weight for k, v in patcher.backup.items()}
        patched = self.original.patches if HEAD_PART in request.parts else {}
        for name in HEAD:
            key = MODEL_PREFIX + name
            if key in patched:
                originals[name] = patched_weight(patcher, key, patched[key])
        return Trained(
            patcher.model.diffusion_model, self._own_memory(), request.parts,
            dtype=patcher.model.get_dtype_inference(), device=patcher.load_device, rank=request.rank,
            seed=request.settings.seed, checkpointing=request.checkpointing, options=self._options(beside),
            originals=originals, beside=beside,
        )  # fmt: skip

    def _own_memory(self) -> nn.Module | None:
        """A copy of the memory's network, which may learn."""
        if self.memory is None:
            return None
        return own_pack(self.memory, self.patcher.load_device, MEMORY in self.request.parts)

    def _beside(self) -> dict[str, nn.Module]:
        """Other networks that learn, by word, as Trained takes them."""
        return {}

    def _options(self, beside: Mapping[str, nn.Module]) -> Mapping:
        """`transformer_options` of the training's forward passes. beside: what `_beside` has made."""
        return self.patcher.model_options.get("transformer_options", {})

    def _open(self, chosen: StoredVideo, trained: Trained) -> TrainingVideo:
        """A video's numbers, and for Wan how many channels the network reads beside the noise."""
        video = chosen.open(self.patcher.model.process_latent_in, trained.device)
        network: Any = trained.model
        if isinstance(video.cond, WanConditioning):
            return replace(video, cond=replace(video.cond, beside=network.in_dim - network.out_dim))
        return video

    def recipe_of(self, outcome: Outcome) -> dict:
        """What is written beside the weights, as plain data."""
        good = [loss for loss in outcome.losses if loss == loss]
        return {
            "identity": self.folder.identity,
            "stage": self.request.stage,
            "steps": len(outcome.losses),
            "videos": len(self.videos),
            **self._recipe(),
            "settings": asdict(self.request.settings),
            "last_loss": sum(good[-20:]) / len(good[-20:]) if good else None,
        }

    def _recipe(self) -> dict:
        """What is of this kind of run alone."""
        recipe = self.request.recipe
        return {"clips": self.request.clips, "losses": {**asdict(recipe), "shift": recipe.loss_shift}}


def _check_made_for(video: StoredVideo, patcher, node: str) -> None:
    channels = patcher.model.latent_format.latent_channels
    if isinstance(video.cond, WanConditioning) != is_wan(patcher):
        its = "Wan" if isinstance(video.cond, WanConditioning) else "FramePack"
        raise ForcingError(f"{video.name} was prepared for a {its} model. Write it anew for the MODEL of '{node}'.")
    if video.samples.shape[1] != channels:
        raise ForcingError(
            f"{video.name} has {video.samples.shape[1]} latent channels, and the MODEL works on {channels}. Use the "
            f"MODEL's own VAE in '{VIDEO_CLIPS}'."
        )


def _check_rate(video: StoredVideo, fps: float) -> None:
    if video.fps not in (0, fps):
        raise ForcingError(
            f"{video.name} has {video.fps:g} frames a second, and the MODEL makes {fps:g}: it would learn to move at a "
            f"wrong speed. Set 'fps' in '{VIDEO_CLIPS}' to {fps:g}."
        )


def shortest_of(video: StoredVideo, fps: float) -> float:
    """What 'shortest' of 'Video Clips' makes clips of at least one window: seconds, with the decimal that it takes.

    Its sections are those of the VAE's model, or FramePack's where the VAE does not say it.
    """
    section = clip_window(video.family)
    return math.ceil(10 * section_frames(section) * -(-video.window // section) / fps) / 10


def without_head_patches(patcher):
    """A clone of a MODEL whose head has no patches: what training begins with takes their place."""
    clone = patcher.clone()
    keys = {MODEL_PREFIX + name for name in HEAD} & set(clone.patches)
    if keys:
        clone.patches = {k: v for k, v in clone.patches.items() if k not in keys}
        clone.patches_uuid = uuid.uuid4()  # else the host takes it for the MODEL that is loaded
        known = clone.model_options.get(MODEL_OPTION, {})
        said = {MODEL_OPTION: {k: v for k, v in known.items() if k != HEADS}}
        clone.model_options = {**clone.model_options, **said}
    return clone


def patched_weight(patcher, key: str, patches: list) -> Tensor:
    """A weight of a MODEL as its patches make it, in fp32."""
    held = comfy.utils.get_attr(patcher.model, key).detach()
    held = held.dequantize() if hasattr(held, "_qdata") else held
    return comfy.lora.calculate_weight(patches, held.float().clone(), key)


def own_pack(memory: FrameMemory, device, learns: bool) -> SemanticPack:
    """A copy of a memory's network on the device: fp32 and with its gate open where it learns, else in the numbers that
    sampling reads it in.

    The memory itself is not changed.
    """
    dtype = torch.float32 if learns else memory.pack.dtype
    pack = SemanticPack(memory.spec, dtype, device, comfy.ops.disable_weight_init)
    with torch.no_grad():
        for name, parameter in pack.named_parameters():
            parameter.copy_(memory.pack.get_parameter(name))
    if learns:
        open_gate(pack)
    return pack
