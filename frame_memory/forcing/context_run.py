"""Context finetuning of a Wan MODEL: patchifiers for its history and a LoRA, on random sections of the user's videos.

The run itself (load, resume, train, checkpoints, stops) is TrainingRun's. Source: reference/framepack.md section 1, pfp
reference 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..model import wan
from ..model.families import check_running_wan
from ..model.sources import TRAIN_CONTEXT, WAN_CONTEXT
from ..plan import PRESETS, WAN_PRESET, parse_schedule, plan_sections
from ..plan.errors import PACKER
from .sections import Disturbance, Sample, random_section, section_loss
from .stages import LORA, PATCHIFIERS, Trained, merged
from .training_run import TRAINED_BYTES, Moment, Request, TrainingRun

STAGE_CONTEXT = "Wan: frame context"
SHIFT = 5.0


@dataclass(frozen=True)
class ContextRequest(Request):
    """A Request whose forcing plays no part. schedule: what the sampler's packer will be set to."""

    clips: int = 1
    schedule: str = PRESETS[WAN_PRESET]
    disturbance: Disturbance = Disturbance(noise=0.3, own=0.4)

    @property
    def parts(self) -> tuple[str, ...]:
        """What learns of the base: a LoRA. The patchifiers are beside it."""
        return (LORA,)


class ContextRun(TrainingRun):
    """One run in `folder`, from its newest checkpoint on where there is one.

    patcher: a Wan MODEL of any of core's loaders, not changed. Patchifiers that it has are gone on from, without them
    fresh ones begin. memory: None. patches: which LoRAs lie on the MODEL, in words that differ with them. Raises
    ForcingError for videos, ScheduleError for a schedule and ValueError for a MODEL that cannot be trained.
    """

    request: ContextRequest
    node: ClassVar[str] = TRAIN_CONTEXT
    loaders: ClassVar[tuple[str, ...]] = (WAN_CONTEXT,)
    usual: ClassVar[str] = "0.0001 is usual"
    longer: ClassVar[str] = f" Or choose a schedule with a smaller g in '{PACKER}'."
    remembers: ClassVar[bool] = False

    @classmethod
    def _check_model(cls, patcher) -> None:
        check_running_wan(patcher)

    def _given(self, memory) -> None:
        self.schedule = parse_schedule(self.request.schedule)

    def _window(self) -> int:
        return self.schedule.window

    def how(self) -> str:
        """How it learns, in the report's words."""
        return f"patchifiers and LoRA, on the schedule {self.schedule.text}"

    def identity(self) -> dict:
        """What a checkpoint must share with the run that goes on from it."""
        given = wan.accepts_context(self.original)
        patchifiers = wan.fingerprint(self.original) if given else None
        return {
            "stage": STAGE_CONTEXT,
            "schedule": self.schedule.text,
            "base": self.base.signature.short,
            "LoRA and patches": self.patches or None,
            "patchifiers": patchifiers,
            "rank": self.request.rank,
            "optimiser": self.request.settings.optimiser,
            "seed": self.request.settings.seed,
        }

    def _bytes_beside(self) -> int:
        return TRAINED_BYTES * sum(p.numel() for p in wan.copied_patchifiers(self.original).parameters())

    def _beside(self) -> dict[str, nn.Module]:
        return {PATCHIFIERS: wan.copied_patchifiers(self.patcher).to(self.patcher.load_device)}

    def _options(self, beside: Mapping[str, nn.Module]) -> Mapping:
        return merged(super()._options(beside), wan.options(beside[PATCHIFIERS]))

    def _cheaper(self) -> list[str]:
        return ["a lower 'rank'", f"a schedule with a smaller g in '{PACKER}'"]

    def _losses(
        self, trained: Trained, step: int, rate: float, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        request = self.request
        chosen = self.videos[int(torch.randint(len(self.videos), (), generator=generator))]
        video = self._open(chosen, trained)
        sections = plan_sections(self.schedule, sections=video.clips).sections
        sample = Sample(video.latents, video.cond, *random_section(sections, generator))
        self.faces.interrupt()
        shift = request.shift or SHIFT
        made = section_loss(trained, sample, request.disturbance, shift, generator, trained.forced.options)
        self.moment = Moment(step, request.steps, 1, chosen.name, [], rate, made[1])
        yield made[0], 1.0

    def _recipe(self) -> dict:
        disturbance = self.request.disturbance
        return {"schedule": self.schedule.text, "noise": disturbance.noise, "own": disturbance.own}
