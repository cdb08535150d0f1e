"""Teacher forcing, student forcing and Direct Forcing: the clips of one video in order, one loss a clip.

They differ in one thing only, what later clips are shown of a clip that is behind: the truth, a sampled rollout, or the
network's one-step estimate from the very forward pass that the loss came from. What the network shall predict is
always the truth. Source: reference/memorypack.md sections 3.1 and 3.3.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space; sigma is 1 at
noise and 0 at data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.context import gather_context
from ..plan import Section
from ..plan.memory import with_true_image
from .clips import TrainingVideo, clip_sections
from .draws import DIRECT, STUDENT, TEACHER, Recipe, VideoDraw
from .flow import flow_loss, predict_velocity, shift_times
from .recurrence import Recurrence


@dataclass(frozen=True)
class Forced:
    """What is trained. network: called as the transformer is. options: its `transformer_options`.

    pack: the memory, or None: a SemanticPack, or PreservedHistory in preserving.py. pack_learns: whether gradients go
    into it.
    """

    network: Callable[..., Tensor]
    pack: Any = None
    pack_learns: bool = False
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ClipLoss:
    """One clip's loss, with its graph, and the one-step estimate of the clip `[B, C, 9, H, W]`, without one."""

    clip: int
    sigma: float
    loss: Tensor
    estimate: Tensor = field(repr=False)


class _Clip:
    """One clip with the history and the memory it is trained with."""

    def __init__(self, forced: Forced, video: TrainingVideo, section: Section, seen: Tensor, memory: Recurrence | None):
        # Without its memory a clip is F1's own, the image's place included.
        placed = with_true_image(section) if memory is not None and memory.pack.spec.true_image else section
        self.forced, self.cond = forced, video.cond
        self.tokens = memory.tokens() if memory is not None and memory.folded else None
        self.truth = video.latents[:, :, section.start : section.stop]
        self.context = gather_context(placed, seen, video.latents[:, :, :1], None, 0.0)

    def estimate(self, noise: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        """(loss with its graph, one-step estimate without)."""
        return flow_loss(
            self.forced.network, self.truth, noise, sigma_B, self.cond, self.context, self.forced.options, self.tokens
        )

    @torch.no_grad()
    def rollout(self, noise: Tensor, steps: int, shift: float) -> Tensor:
        """The clip sampled from pure noise by Euler steps."""
        levels = shift_times(torch.linspace(1, 0, steps + 1), shift).tolist()
        x = noise
        for level, following in zip(levels, levels[1:], strict=False):
            sigma_B, forced = x.new_full((x.shape[0],), level), self.forced
            velocity = predict_velocity(
                forced.network, x, sigma_B, self.cond, self.context, forced.options, self.tokens
            )  # fmt: skip
            x = x + (following - level) * velocity.float()
        return x


Remember = Callable[[_Clip, int, Tensor], Tensor]


def teacher_forcing(forced: Forced, video: TrainingVideo, draw: VideoDraw, recipe: Recipe) -> Iterator[ClipLoss]:
    """Every clip behind the truth."""
    return _clips(forced, video, draw, recipe, lambda clip, place, estimate: clip.truth)


def direct_forcing(forced: Forced, video: TrainingVideo, draw: VideoDraw, recipe: Recipe) -> Iterator[ClipLoss]:
    """Every clip behind the network's own one-step estimates of all clips before it."""

    def remember(clip: _Clip, place: int, estimate: Tensor) -> Tensor:
        if draw.history_sigmas is None:
            return estimate
        with torch.no_grad():
            device = estimate.device
            return clip.estimate(draw.history_noises[place].to(device), draw.history_sigmas[place].to(device))[1]

    return _clips(forced, video, draw, recipe, remember)


def student_forcing(forced: Forced, video: TrainingVideo, draw: VideoDraw, recipe: Recipe) -> Iterator[ClipLoss]:
    """Every clip behind clips that the network sampled from noise."""

    def remember(clip: _Clip, place: int, estimate: Tensor) -> Tensor:
        noise = draw.rollout_noises[place].to(estimate.device)
        return clip.rollout(noise, recipe.rollout_steps, recipe.rollout_shift)

    return _clips(forced, video, draw, recipe, remember)


LOSSES = {TEACHER: teacher_forcing, STUDENT: student_forcing, DIRECT: direct_forcing}


def _clips(
    forced: Forced, video: TrainingVideo, draw: VideoDraw, recipe: Recipe, remember: Remember
) -> Iterator[ClipLoss]:
    """The loop that all forcings share. The caller back-propagates each loss before it asks for the next.

    The video's tensors are not changed. A clip in front of the first one drawn is shown as it is.
    """
    sections, device = clip_sections(draw.first + draw.count), video.latents.device
    seen = video.latents.clone()
    memory = None
    # Sampling is F1's own, the image's place included, behind a gate that is closed.
    if forced.pack is not None and (forced.pack_learns or bool(forced.pack.gate)):
        memory = Recurrence(forced.pack, video.cond, recipe.unroll if forced.pack_learns else 0)
        for section in sections[: draw.first]:
            memory.fold(video.latents[:, :, section.start : section.stop])
    for place, section in enumerate(sections[draw.first :]):
        clip = _Clip(forced, video, section, seen, None if draw.dropped[place] else memory)
        sigma = draw.sigmas[place].to(device)
        loss, estimate = clip.estimate(draw.noises[place].to(device), sigma)
        yield ClipLoss(draw.first + place, float(sigma.mean()), loss, estimate)
        if place + 1 < draw.count:
            kept = remember(clip, place, estimate)
            seen[:, :, section.start : section.stop] = kept
            if memory is not None:
                memory.fold(kept)
