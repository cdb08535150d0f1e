"""Context finetuning of a Wan MODEL: patchifiers for its history and a LoRA, on random sections of the user's videos.

The run itself (load, resume, train, checkpoints, stops) is TrainingRun's. Source: reference/framepack.md section 1, pfp
reference 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import comfy.model_management
import torch
from torch import Tensor

from ..model import wan
from ..model.base_signature import MODEL_PREFIX, Base
from ..model.memory import fingerprint_of
from ..plan import PRESETS, parse_schedule, plan_sections
from .clips import ForcingError, StoredVideo, check_families
from .flow import WanConditioning
from .sections import Disturbance, Sample, random_section, section_loss
from .stages import LORA, Trained, merged
from .training_run import GRAPH_SHARE, TRAINED_BYTES, Faces, Moment, Outcome, Request, TrainingRun
from .training_state import TrainingFolder
from .workers import ALONE, Workers

STAGE_CONTEXT = "Wan: frame context"
PATCHIFIERS = "patchifiers"
SHIFT = 5.0


@dataclass(frozen=True)
class ContextRequest(Request):
    """A Request whose clips and forcing play no part. schedule: what the sampler's packer will be set to."""

    schedule: str = PRESETS["F1 forward"]
    disturbance: Disturbance = Disturbance(noise=0.3, own=0.4)

    @property
    def parts(self) -> tuple[str, ...]:
        """What learns of the base: a LoRA. The patchifiers are beside it."""
        return (LORA,)


class ContextRun(TrainingRun):
    """One run in `folder`, from its newest checkpoint on where there is one.

    patcher: a Wan MODEL of any of core's loaders, not changed. patchifiers: trained ones to go on from, or None for
    fresh ones. patches: which LoRAs lie on the MODEL, in words that differ with them. Raises ForcingError for videos,
    ScheduleError for a schedule and ValueError for a MODEL that cannot be trained.
    """

    request: ContextRequest

    def __init__(
        self, patcher, videos: list[StoredVideo], request: ContextRequest, folder, faces: Faces | None = None,
        workers: Workers = ALONE, patches: str = "", patchifiers: wan.Patchifiers | None = None,
    ):  # fmt: skip
        network = wan.check(patcher)
        self.faces, self.workers = faces or Faces(), workers
        self.original, self.patcher, self.memory, self.videos, self.request = patcher, patcher, None, videos, request
        self.schedule, self.given = parse_schedule(request.schedule), patchifiers
        self.beside = network.in_dim - network.out_dim
        self.base, self.patches = Base.of(patcher), patches
        self.folder = TrainingFolder(folder, self.identity(), self.faces.say)
        self.moment, self.saved = None, 0
        self._check_videos()

    def identity(self) -> dict:
        """What a checkpoint must share with the run that goes on from it."""
        return {
            "stage": STAGE_CONTEXT,
            "schedule": self.schedule.text,
            "base": self.base.signature.short,
            "LoRA and patches": self.patches or None,
            "patchifiers": None if self.given is None else fingerprint_of(self.given.state_dict()),
            "rank": self.request.rank,
            "optimiser": self.request.settings.optimiser,
            "seed": self.request.settings.seed,
        }

    def _check_videos(self) -> None:
        channels, shortest = self.patcher.model.latent_format.latent_channels, 1 + self.schedule.window
        for video in self.videos:
            if not isinstance(video.cond, WanConditioning):
                raise ForcingError(f"{video.name} was prepared for a FramePack model. Write it anew for the Wan MODEL.")
            if video.samples.shape[1] != channels:
                raise ForcingError(
                    f"{video.name} has {video.samples.shape[1]} latent channels, and the MODEL works on {channels}. "
                    "Encode it with the MODEL's own VAE."
                )
            if video.samples.shape[2] < shortest:
                raise ForcingError(
                    f"{video.name} has {video.samples.shape[2]} latent frames; expected at least {shortest}, a start "
                    f"frame and one window of {self.schedule.text}. Give longer videos, or a schedule with a smaller g."
                )
        check_families(self.videos, (self.base.family,))

    def _load(self) -> None:
        """Have the host put the MODEL on its device, with room left for what training needs beside it."""
        largest = max((video.samples.shape for video in self.videos), key=lambda shape: shape[3] * shape[4])
        frames = self.schedule.window + -(-self.schedule.window // 3)
        activations = self.patcher.memory_required([1, largest[1], frames, *largest[3:]])
        beside = TRAINED_BYTES * sum(p.numel() for p in wan.patchifiers_of(self.patcher).parameters())
        activations *= GRAPH_SHARE[self.request.checkpointing]
        comfy.model_management.load_models_gpu([self.patcher], activations + beside)

    def _trained(self) -> Trained:
        request, patcher = self.request, self.patcher
        patchifiers = wan.patchifiers_of(patcher)
        if self.given is not None:
            patchifiers.load_state_dict(self.given.state_dict())
        patchifiers = patchifiers.to(patcher.load_device)
        options = merged(patcher.model_options.get("transformer_options", {}), wan.options(patchifiers))
        originals = {k.removeprefix(MODEL_PREFIX): v.weight for k, v in patcher.backup.items()}
        return Trained(
            patcher.model.diffusion_model, None, request.parts, dtype=patcher.model.get_dtype_inference(),
            device=patcher.load_device, rank=request.rank, seed=request.settings.seed,
            checkpointing=request.checkpointing, options=options, originals=originals,
            beside={PATCHIFIERS: patchifiers},
        )  # fmt: skip

    def _losses(
        self, trained: Trained, step: int, rate: float, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        request = self.request
        chosen = self.videos[int(torch.randint(len(self.videos), (), generator=generator))]
        video = chosen.open(self.patcher.model.process_latent_in, trained.device, self.schedule.window)
        count = (video.latents.shape[2] - 1) // self.schedule.window
        sections = plan_sections(self.schedule, sections=count).sections
        assert isinstance(video.cond, WanConditioning)
        cond = replace(video.cond, beside=self.beside)
        sample = Sample(video.latents, cond, *random_section(sections, generator))
        self.faces.interrupt()
        shift = request.shift or SHIFT
        made = section_loss(trained, sample, request.disturbance, shift, generator, trained.forced.options)
        self.moment = Moment(step, request.steps, 1, chosen.name, [], rate, made[1])
        yield made[0], 1.0

    def recipe_of(self, outcome: Outcome) -> dict:
        """What is written beside the weights, as plain data."""
        good = [loss for loss in outcome.losses if loss == loss]
        return {
            "identity": self.folder.identity,
            "stage": STAGE_CONTEXT,
            "steps": len(outcome.losses),
            "videos": len(self.videos),
            "schedule": self.schedule.text,
            "noise": self.request.disturbance.noise,
            "own": self.request.disturbance.own,
            "last_loss": sum(good[-20:]) / len(good[-20:]) if good else None,
        }

    def _too_large(self, done: int) -> str:
        kept = f" The checkpoint of step {self.saved} is kept." if self.saved else ""
        cheaper = ["smaller videos", "a schedule with a smaller g", "a MODEL in fp8"]
        if not self.request.checkpointing:
            cheaper.append("'checkpointing' on")
        return f"The memory of the GPU was full in step {done + 1}.{kept} Cheaper are: {'; '.join(cheaper)}."
