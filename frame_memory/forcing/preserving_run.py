"""Training of frame preservation on FramePack-F1 or Wan: encoders and a new LoRA, by frame queries or behind history.

The run itself (load, resume, train, checkpoints, stops) is TrainingRun's. Source: pfp reference 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import comfy.ops
import torch
from torch import Tensor, nn

from ..model import wan
from ..model.families import is_wan, schedule_of
from ..model.memory import of_kind
from ..model.memory_file import FRAME_PRESERVATION, LOAD_MEMORY
from ..model.preserved_history import PreservedHistory
from ..model.preserved_memory import (
    PreservedMemory,
    check_base_model,
    check_preserved,
    new_memory,
    with_cross_attention,
)
from ..model.sources import LOAD_WAN, WAN_CONTEXT
from ..plan import PRESETS, parse_schedule
from ..plan.errors import PACKER, PlanError
from ..plan.preservation import RATES, STAGE_FOLLOW, STAGE_QUERY, token_grid
from ..plan.sections import natural_order
from .clips import SCHEDULE, TRAIN, TRAIN_FRAMES, VIDEO_CLIPS, ForcingError, StoredVideo
from .preserving import ALONE, DROP_TEXT, SHIFT, draw_follow, draw_query, frame_query, next_section
from .stages import LORA, MEMORY, PACK_NAME, Trained, merged
from .training_run import Moment, Outcome, Request, TrainingRun

STAGES = (STAGE_QUERY, STAGE_FOLLOW)
# Told before a run that the paper has only to compare: its stage 1 is what makes a memory worth reading.
WITHOUT_STAGE_ONE = (
    "Warning: the memory given ({label}) was never trained. The MODEL learns little from such a one, and looks away "
    f"from it. Connect the memory of stage '{STAGE_QUERY}', unless you mean to compare."
)


@dataclass(frozen=True)
class PreservingRequest(Request):
    """A Request of one of STAGES; forcing and history_shift play no part.

    rates: of new encoders. frozen: the encoders of stage 2 stay as they are, as in the paper's ablation.
    cross_attention: the network also learns to read the encoders' features in every block. schedule: of stage 2, which
    clean frames are seen beside the memory; empty for the MODEL's own (`schedule_of`). drop_text: share of updates
    without the caption. alone: share of the run in which the encoders learn and the LoRA waits, where they learn.
    """

    rates: tuple[str, ...] = ("4x4x2",)
    frozen: bool = False
    cross_attention: bool = False
    schedule: str = ""
    drop_text: float = DROP_TEXT
    alone: float = ALONE

    @property
    def parts(self) -> tuple[str, ...]:
        """What learns."""
        return (LORA,) if self.frozen and self.stage == STAGE_FOLLOW else (MEMORY, LORA)


class PreservingRun(TrainingRun):
    """One run in `folder`, from its newest checkpoint on where there is one.

    patcher: a FramePack-F1 or Wan MODEL, not changed; for stage 2 Wan needs patchifiers, which stay as they are.
    memory: frame preservation, or None: stage 1 then begins with a new one. patches: which LoRAs lie on the MODEL, in
    words that differ with them; stage 2 trains a new one beside them. Raises ForcingError or MemoryMismatch for what
    cannot be trained, ScheduleError for a schedule.
    """

    request: PreservingRequest
    memory: PreservedMemory  # pyright: ignore[reportIncompatibleVariableOverride]
    node: ClassVar[str] = TRAIN_FRAMES
    loaders: ClassVar[tuple[str, ...]] = (LOAD_MEMORY,)
    usual: ClassVar[str] = "0.0001 is usual"

    @property
    def follows(self) -> bool:
        """Whether this is stage 2."""
        return self.request.stage == STAGE_FOLLOW

    @classmethod
    def _check_model(cls, patcher) -> None:
        check_base_model(patcher, TRAIN_FRAMES)

    def _given(self, memory):
        own = schedule_of(self.original, beside_memory=self.follows)
        self.schedule = parse_schedule(self.follows and self.request.schedule or own)
        self._check_history()
        if memory is None and self.follows:
            raise ForcingError(
                f"Stage '{STAGE_FOLLOW}' of '{TRAIN_FRAMES}' goes on with the memory of stage '{STAGE_QUERY}'. Connect "
                "that."
            )
        memory = new_memory(self.original, *self.request.rates) if memory is None else memory
        check_preserved(of_kind(memory, FRAME_PRESERVATION, TRAIN_FRAMES, TRAIN), self.original, TRAIN_FRAMES)
        return self._with_cross_attention(memory)

    def _check_history(self) -> None:
        """Raise ForcingError where stage 2 could not show this MODEL the schedule's frames."""
        order, own = natural_order(self.schedule), schedule_of(self.original, beside_memory=self.follows)
        if order != "forward":
            raise ForcingError(
                f"A memory holds what came before, and {self.schedule.text} makes later sections first. Expected a "
                f"forward schedule, as {own}. Change it in '{PACKER}'."
            )
        if self.follows and is_wan(self.original) and not wan.accepts_context(self.original):
            raise ForcingError(
                f"Stage '{STAGE_FOLLOW}' shows the MODEL finished frames beside the memory, and this Wan model has no "
                f"patchifiers for them. Put '{WAN_CONTEXT}' between '{LOAD_WAN}' and '{TRAIN_FRAMES}'."
            )

    def _window(self) -> int:
        return self.schedule.window

    def _warn(self) -> None:
        super()._warn()
        if self.follows and not self.memory.trained:
            self.faces.say(WITHOUT_STAGE_ONE.format(label=self.memory.label))

    def _trained_together(self):
        patchifiers, *memory = super()._trained_together()
        # Stage 2 trains a LoRA in the place of the memory's.
        return [patchifiers] if self.follows else [patchifiers, *memory]

    def run(self) -> Outcome:
        """As any run; says where the LoRA did nothing but wait."""
        outcome = super().run()
        if not any(bool(value.any()) for name, value in outcome.weights.items() if name.endswith(".up")):
            self.faces.say(
                f"Warning: the LoRA has not learned: it waits for the encoder in the first "
                f"{self.request.alone:.0%} of {self.request.steps} steps. Lower 'encoder_first' in '{self.node}', or "
                "raise 'steps'."
            )
        return outcome

    def _with_cross_attention(self, memory: PreservedMemory) -> PreservedMemory:
        if not self.request.cross_attention or memory.cross is not None:
            return memory
        if MEMORY not in self.request.parts:
            raise ForcingError(
                f"'cross_attention' of '{TRAIN_FRAMES}' begins anew and 'freeze_encoder' is on, so it would learn "
                "nothing. Switch one of them off, or connect a memory that has cross-attention."
            )
        try:
            return with_cross_attention(memory, self.original)
        except ValueError as error:
            raise ForcingError(f"'cross_attention' of '{TRAIN_FRAMES}': {error}") from error

    def how(self) -> str:
        """How it learns, in the report's words."""
        rates = " + ".join(self.memory.rates) + (" with cross-attention" if self.memory.cross is not None else "")
        return f"{rates} and LoRA" if MEMORY in self.request.parts else f"LoRA alone, {rates} frozen"

    def identity(self) -> dict:
        """What a checkpoint must share with the run that goes on from it."""
        request, schedule, shown = self.request, self.schedule.text, self.follows and is_wan(self.original)
        return {
            "stage": request.stage,
            "base": self.base.signature.short,
            "LoRA and patches": self.patches or None,
            "memory": self.memory.fingerprint,
            "rates": list(self.memory.rates),
            "encoder": "frozen" if MEMORY not in request.parts else "trained",
            "schedule": None if schedule == PRESETS[SCHEDULE] else schedule,
            "patchifiers": wan.fingerprint(self.original) if shown else None,
            "rank": request.rank,
            "optimiser": request.settings.optimiser,
            "seed": request.settings.seed,
        }

    def _check_videos(self) -> None:
        super()._check_videos()
        longest = max(video.clips for video in self.videos)
        if self.follows and min(longest, self.request.clips) < 2:
            raise ForcingError(
                f"The longest video has {longest} clip(s) and 'clips' is {self.request.clips}; stage '{STAGE_FOLLOW}' "
                f"needs 2, one to remember and one to make. Give longer videos to '{VIDEO_CLIPS}', or raise 'clips'."
            )

    def _check_video(self, video: StoredVideo) -> None:
        super()._check_video(video)
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

    def _own_memory(self) -> PreservedHistory:
        return own_history(self.memory, self.patcher.load_device, MEMORY in self.request.parts)

    def _options(self, beside: Mapping[str, nn.Module]) -> Mapping:
        options = super()._options(beside)
        if not is_wan(self.original):
            return options
        shown = wan.copied_patchifiers(self.original).requires_grad_(False) if self.follows else None
        return merged(options, wan.options(shown and shown.to(self.patcher.load_device)))

    def _losses(
        self, trained: Trained, step: int, rate: float, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        request, shift = self.request, self.request.shift or SHIFT
        encoders_learn = any(name.startswith(PACK_NAME) for name in trained.parameters)
        trained.hold_lora(encoders_learn and step < request.alone * request.steps)
        eligible = [video for video in self.videos if video.clips >= (2 if self.follows else 1)]
        chosen = eligible[int(torch.randint(len(eligible), (), generator=generator))]
        video = self._open(chosen, trained)
        if self.follows:
            draw = draw_follow(video, request.clips, generator, shift, request.drop_text)
            losses = next_section(trained.forced, video, draw, self.schedule.text)
        else:
            # Histories of all lengths: a memory must be read while it is short, too.
            count = 1 + int(torch.randint(min(request.clips, video.clips), (), generator=generator))
            rates = [RATES[name] for name in self.memory.rates]
            draw = draw_query(video, count, rates, generator, shift, request.drop_text)
            losses = frame_query(trained.forced, video, draw)
        for made in losses:
            self.faces.interrupt()
            self.moment = Moment(step, request.steps, 1, chosen.name, [], rate, made.estimate)
            yield made.loss, 1.0

    def _recipe(self) -> dict:
        request = self.request
        return {
            "clips": request.clips,
            **({"schedule": self.schedule.text} if self.follows else {}),
            "shift": request.shift or SHIFT,
            "drop_text": request.drop_text,
            "encoder_first": request.alone if MEMORY in request.parts else 0.0,
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
