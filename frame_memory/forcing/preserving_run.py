"""Training of frame preservation on a FramePack-F1 MODEL: encoders and a new LoRA, by frame queries or behind history.

The run itself (load, resume, train, checkpoints, stops) is TrainingRun's. Source: pfp reference 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..model.base_signature import MODEL_PREFIX, Base
from ..model.memory import check_model, of_kind
from ..model.memory_file import FRAME_PRESERVATION, LOAD_MEMORY
from ..model.preserved_history import PreservedHistory
from ..model.preserved_memory import PreservedMemory, check_preserved, new_memory, with_cross_attention
from ..plan.errors import PlanError
from ..plan.preservation import RATES, token_grid
from .clips import TRAIN, TRAIN_FRAMES, VIDEO_CLIPS, ForcingError, StoredVideo
from .preserving import FOLLOW, LOSSES, QUERY, SHIFT, draw_follow, draw_query
from .stages import LORA, MEMORY, Trained
from .training_run import GRAPH_SHARE, TRAINED_BYTES, Faces, Moment, Outcome, Request, TrainingRun
from .training_state import TrainingFolder
from .workers import ALONE, Workers

STAGE_QUERY, STAGE_FOLLOW = "1: frame query", "2: next section"
# Told before a run that the paper has only to compare: its stage 1 is what makes a memory worth reading.
WITHOUT_STAGE_ONE = (
    "Warning: the memory given ({label}) was never trained. The MODEL learns little from such a one, and looks away "
    f"from it. Connect the memory of stage '{STAGE_QUERY}', unless you mean to compare."
)
STAGES = {STAGE_QUERY: QUERY, STAGE_FOLLOW: FOLLOW}


@dataclass(frozen=True)
class PreservingRequest(Request):
    """A Request of one of STAGES; forcing and history_shift play no part.

    rates: of new encoders. frozen: the encoders of stage 2 stay as they are, as in the paper's ablation.
    cross_attention: the network also learns to read the encoders' features in every block.
    """

    rates: tuple[str, ...] = ("4x4x2",)
    frozen: bool = False
    cross_attention: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """What learns."""
        return (LORA,) if self.frozen and self.stage == STAGE_FOLLOW else (MEMORY, LORA)


class PreservingRun(TrainingRun):
    """One run in `folder`, from its newest checkpoint on where there is one.

    patcher: a FramePack-F1 MODEL, not changed. memory: frame preservation, or None: stage 1 then begins with a new one.
    patches: which LoRAs lie on the MODEL, in words that differ with them; stage 2 trains a new one beside them. Raises
    ForcingError or MemoryMismatch for what cannot be trained.
    """

    request: PreservingRequest
    memory: PreservedMemory  # pyright: ignore[reportIncompatibleVariableOverride]
    node: ClassVar[str] = TRAIN_FRAMES
    loaders: ClassVar[tuple[str, ...]] = (LOAD_MEMORY,)
    usual: ClassVar[str] = "0.0001 is usual"

    def __init__(
        self, patcher, memory: PreservedMemory | None, videos: list[StoredVideo], request: PreservingRequest, folder,
        faces: Faces | None = None, workers: Workers = ALONE, patches: str = "",
    ):  # fmt: skip
        check_model(patcher, TRAIN_FRAMES)
        if memory is None and request.stage == STAGE_FOLLOW:
            raise ForcingError(
                f"Stage '{STAGE_FOLLOW}' of '{TRAIN_FRAMES}' goes on with the memory of stage '{STAGE_QUERY}'. Connect "
                "that."
            )
        memory = new_memory(patcher, *request.rates) if memory is None else memory
        check_preserved(of_kind(memory, FRAME_PRESERVATION, TRAIN_FRAMES, TRAIN), patcher, TRAIN_FRAMES)
        memory = self._with_cross_attention(memory, patcher, request)
        self.faces, self.workers = faces or Faces(), workers
        self.original, self.patcher, self.memory, self.videos, self.request = patcher, patcher, memory, videos, request
        self.base, self.patches = Base.of(patcher), patches
        self.folder = TrainingFolder(folder, self.identity(), self.faces.say, node=self.node)
        self.moment, self.saved = None, 0
        self._check_videos()
        if request.stage == STAGE_FOLLOW and not memory.trained:
            self.faces.say(WITHOUT_STAGE_ONE.format(label=memory.label))

    @staticmethod
    def _with_cross_attention(memory: PreservedMemory, patcher, request: PreservingRequest) -> PreservedMemory:
        if not request.cross_attention or memory.cross is not None:
            return memory
        if MEMORY not in request.parts:
            raise ForcingError(
                f"'cross_attention' of '{TRAIN_FRAMES}' begins anew and 'freeze_encoder' is on, so it would learn "
                "nothing. Switch one of them off, or connect a memory that has cross-attention."
            )
        try:
            return with_cross_attention(memory, patcher)
        except ValueError as error:
            raise ForcingError(f"'cross_attention' of '{TRAIN_FRAMES}': {error}") from error

    def how(self) -> str:
        """How it learns, in the report's words."""
        rates = " + ".join(self.memory.rates) + (" with cross-attention" if self.memory.cross is not None else "")
        return f"{rates} and LoRA" if MEMORY in self.request.parts else f"LoRA alone, {rates} frozen"

    def identity(self) -> dict:
        """What a checkpoint must share with the run that goes on from it."""
        request = self.request
        return {
            "stage": request.stage,
            "base": self.base.signature.short,
            "LoRA and patches": self.patches or None,
            "memory": self.memory.fingerprint,
            "rates": list(self.memory.rates),
            "encoder": "frozen" if MEMORY not in request.parts else "trained",
            "rank": request.rank,
            "optimiser": request.settings.optimiser,
            "seed": request.settings.seed,
        }

    def _check_videos(self) -> None:
        super()._check_videos()
        for video in self.videos:
            self._check_size(video)
        longest = max(video.clips for video in self.videos)
        if self.request.stage == STAGE_FOLLOW and min(longest, self.request.clips) < 2:
            raise ForcingError(
                f"The longest video has {longest} clip(s) and 'clips' is {self.request.clips}; stage '{STAGE_FOLLOW}' "
                f"needs 2, one to remember and one to make. Give longer videos to '{VIDEO_CLIPS}', or raise 'clips'."
            )

    def _check_size(self, video: StoredVideo) -> None:
        height, width = video.samples.shape[3:]
        try:
            for name in self.memory.rates:
                token_grid(RATES[name], 0, 0, height, width)
        except PlanError as error:
            raise ForcingError(
                f"{video.name} has latents of {height}x{width}, too small for a memory at "
                f"{' + '.join(self.memory.rates)}. Raise 'size' in '{VIDEO_CLIPS}', or choose a finer rate in "
                f"'{LOAD_MEMORY}'. {error}"
            ) from error

    def _cheaper(self) -> list[str]:
        return ["fewer 'clips'", "a lower 'rank'", "encoders of a coarser rate, as 4x4x2"]

    def _load(self) -> None:
        """Have the host put the MODEL on its device, with room left for what training needs beside it."""
        largest = max((video.samples.shape for video in self.videos), key=lambda shape: shape[3] * shape[4])
        activations = self.patcher.memory_required([1, largest[1], 12, *largest[3:]])
        learning = sum(p.numel() for p in self.memory.history.parameters())
        needed = activations * GRAPH_SHARE[self.request.checkpointing] + TRAINED_BYTES * learning
        comfy.model_management.load_models_gpu([self.patcher], needed)

    def _trained(self) -> Trained:
        request, patcher = self.request, self.patcher
        originals = {k.removeprefix(MODEL_PREFIX): v.weight for k, v in patcher.backup.items()}
        history = own_history(self.memory, patcher.load_device, MEMORY in request.parts)
        return Trained(
            patcher.model.diffusion_model, history, request.parts, dtype=patcher.model.get_dtype_inference(),
            device=patcher.load_device, rank=request.rank, seed=request.settings.seed,
            checkpointing=request.checkpointing, options=patcher.model_options.get("transformer_options", {}),
            originals=originals,
        )  # fmt: skip

    def _losses(
        self, trained: Trained, step: int, rate: float, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        request, shift = self.request, self.request.shift or SHIFT
        least = 2 if request.stage == STAGE_FOLLOW else 1
        eligible = [video for video in self.videos if video.clips >= least]
        chosen = eligible[int(torch.randint(len(eligible), (), generator=generator))]
        video = chosen.open(self.patcher.model.process_latent_in, trained.device)
        if request.stage == STAGE_FOLLOW:
            draw = draw_follow(video, request.clips, generator, shift)
        else:
            # Histories of all lengths: a memory must be read while it is short, too.
            count = 1 + int(torch.randint(min(request.clips, video.clips), (), generator=generator))
            draw = draw_query(video, count, [RATES[name] for name in self.memory.rates], generator, shift)
        for made in LOSSES[STAGES[request.stage]](trained.forced, video, draw):
            self.faces.interrupt()
            self.moment = Moment(step, request.steps, 1, chosen.name, [], rate, made.estimate)
            yield made.loss, 1.0

    def recipe_of(self, outcome: Outcome) -> dict:
        """What is written beside the weights, as plain data."""
        request = self.request
        good = [loss for loss in outcome.losses if loss == loss]
        return {
            "identity": self.folder.identity,
            "stage": request.stage,
            "steps": len(outcome.losses),
            "clips": request.clips,
            "videos": len(self.videos),
            "shift": request.shift or SHIFT,
            "settings": asdict(request.settings),
            "last_loss": sum(good[-20:]) / len(good[-20:]) if good else None,
        }


def own_history(memory: PreservedMemory, device, learns: bool) -> PreservedHistory:
    """A copy of a memory's encoders on the device: fp32 where they learn, else in the numbers that sampling reads them
    in. The memory itself is not changed.
    """
    dtype = torch.float32 if learns else memory.history.dtype
    # Cross-attention works in the numbers of the MODEL, so its layers must cast.
    history = PreservedHistory(memory.specs, dtype, device, comfy.ops.manual_cast, memory.cross)
    with torch.no_grad():
        for name, parameter in history.named_parameters():
            parameter.copy_(memory.history.get_parameter(name))
    return history
