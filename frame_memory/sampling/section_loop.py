"""The section loop: a stock GUIDER, SAMPLER, SIGMAS and NOISE driven over a plan, one window after the other.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. All latents here are in VAE space, as in
a LATENT; the model scales them on its side.
Source: reference/framepack.md section 3.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..model.context import gather_context
from ..model.framepack import FRAME_CONTEXT_KEY, unscaled_blank
from ..plan import LongVideoPlan, PlanError, Section
from .guards import BrokenStep, SectionError, attention_name, broken_share, with_safe_attention
from .noise import SectionNoise
from .prompts import EncodedTimeline, section_text, with_text


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, in VAE space.

    start: `[B, C, 1, H, W]`. end: the same, or None. given: an existing video `[B, C, T, H, W]` to go on from, or
    None. initial: a whole video `[B, C, total, H, W]` to begin each window from (video to video), or None.
    """

    start: Tensor
    end: Tensor | None = None
    given: Tensor | None = None
    initial: Tensor | None = None

    def check(self) -> None:
        """Raise PlanError where sizes or batches do not belong together, naming both."""
        for name, latent in (("end", self.end), ("history", self.given), ("initial latents", self.initial)):
            if latent is None:
                continue
            if latent.ndim != 5 or latent.shape[-2:] != self.start.shape[-2:] or latent.shape[1] != self.start.shape[1]:
                raise PlanError(
                    f"'{name}' has latent shape {list(latent.shape)}, 'start' has {list(self.start.shape)}: channels, "
                    "height and width must agree. Make both with 'FramePack Image' nodes (or VAE Encode) at one size."
                )
            if latent.shape[0] not in (1, self.start.shape[0]):
                raise PlanError(
                    f"'{name}' holds a batch of {latent.shape[0]}, 'start' one of {self.start.shape[0]}. "
                    f"Expected 1 or {self.start.shape[0]}; change it in the node that feeds '{name}'."
                )


@dataclass(frozen=True)
class Moment:
    """Where the run is, given to the watcher after every step."""

    section: int
    sections: int
    step: int
    steps: int
    estimate: Tensor
    finished: list[Tensor]


class SectionSampler:
    """Runs a plan. Nothing it is given is changed: guider and conditioning are copied for each section."""

    def __init__(self, guider, noise, sampler, sigmas: Tensor, timeline: EncodedTimeline | None = None):
        self.guider, self.sampler, self.sigmas, self.timeline = guider, sampler, sigmas, timeline
        self.noise = SectionNoise(noise)
        self.notes: list[str] = []

    def run(self, plan: LongVideoPlan, inputs: Inputs, watch: Callable[[Moment], None] | None = None) -> Tensor:
        """Sample every section; returns the whole video `[B, C, total_frames, H, W]` fp32 on the intermediate device.

        Raises PlanError for inputs that do not fit together, SectionError for a section that stays broken.
        """
        inputs.check()
        batch, channels, _, height, width = inputs.start.shape
        video = torch.zeros((batch, channels, plan.total_frames, height, width))
        first = inputs.given if inputs.given is not None else inputs.start
        video[:, :, : first.shape[2]] = first
        finished: list[Tensor] = []
        for section in plan.sections:
            comfy.model_management.throw_exception_if_processing_interrupted()
            window = self._sample_section(plan, section, video, inputs, watch, finished)
            video[:, :, section.start : section.stop] = window
            finished.append(window[:1, :, window.shape[2] // 2 : window.shape[2] // 2 + 1])
        return video.to(comfy.model_management.intermediate_device())

    def _sample_section(self, plan, section: Section, video, inputs: Inputs, watch, finished) -> Tensor:
        guider = self._guider_for(plan, section, video, inputs)
        shape = (*video.shape[:2], section.stop - section.start, *video.shape[3:])
        noise = self.noise.draw(section.index, shape)
        begin = torch.zeros(shape)
        if inputs.initial is not None:
            begin = begin + inputs.initial[:, :, section.start : section.stop]

        broken = BrokenStep()

        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            broken.see(step + 1, x0)
            if watch is not None:
                watch(Moment(section.index, len(plan.sections), step + 1, total, x0, finished))

        seed = self.noise.seed + section.index
        made = guider.sample(noise, begin, self.sampler, self.sigmas, callback=callback, disable_pbar=True, seed=seed)
        if broken_share(made):
            where = f"{broken.describe(len(self.sigmas) - 1)} with attention {attention_name()}"
            made = self._retry(guider, section, noise, begin, callback, seed, broken_share(made), where)
        return made.float().cpu()

    def _retry(self, guider, section: Section, noise, begin, callback, seed: int, share: float, where: str) -> Tensor:
        """Once more with plain attention; a backend that overflows is the usual cause (faults.md 13)."""
        note = (
            f"Section {section.index + 1} came out with {share:.1%} NaN or infinite values "
            f"(first {where}); it was made again with plain PyTorch attention."
        )
        logging.warning(note)
        self.notes.append(note)
        guider.model_options = with_safe_attention(guider.model_options)
        made = guider.sample(noise, begin, self.sampler, self.sigmas, callback=callback, disable_pbar=True, seed=seed)
        if broken_share(made):
            dtype = guider.model_patcher.model_dtype()
            raise SectionError(
                f"Section {section.index + 1} holds NaN or infinite values, first {where}, and again with plain "
                f"PyTorch attention (weights: {dtype}). Nothing of this video is kept: the sections before it were "
                "whole, but they are only in memory until the node is done. Try weight_dtype 'default' in "
                "'Load FramePack Model', or take out the last LoRA."
            )
        return made

    def _guider_for(self, plan: LongVideoPlan, section: Section, video: Tensor, inputs: Inputs):
        blank = unscaled_blank(self.guider.model_patcher.model, (1, video.shape[1], 1, 1, 1))
        end = inputs.end
        if end is not None:
            end = comfy.utils.repeat_to_batch_size(end, video.shape[0])
        context = gather_context(section, video, inputs.start, end, blank)
        carried = {FRAME_CONTEXT_KEY: {"latents": context.latents, "layout": context.layout}}
        guider = copy.copy(self.guider)
        conds = {k: [{**c, **carried} for c in v] for k, v in self.guider.original_conds.items()}
        if self.timeline is not None and "positive" in conds:
            start_s, _ = plan.span_seconds(section)
            section_s = 4 * plan.schedule.window / plan.fps
            conds["positive"] = with_text(conds["positive"], *section_text(self.timeline, start_s, section_s))
        guider.original_conds = conds
        return guider
