"""The loss of one section of a planned video, whose history is disturbed as a sampler's own differs from the truth.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space; sigma is 1 at
noise and 0 at data. All is drawn from the generator given, on the CPU, so that every device trains on the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.context import PackedContext, gather_context
from ..plan import BLANK, START, Section
from .flow import Conditioning, WanConditioning, add_noise, flow_loss, shifted_sigmas

# The first section has the least to go by, and all others build on it: it is trained so often beside its own share.
FIRST_SHARE = 0.15


@dataclass(frozen=True)
class Disturbance:
    """noise: largest noise level put on finished frames. own: share of losses whose history holds the network's own
    one-step estimate of the section made before."""

    noise: float = 0.0
    own: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Videos `[B, C, T, H, W]` of a batch, the section that is trained and the one made just before it, if any."""

    latents: Tensor
    cond: Conditioning | WanConditioning
    section: Section
    previous: Section | None


def random_section(sections: Sequence[Section], generator: torch.Generator) -> tuple[Section, Section | None]:
    """One of a plan's sections, and the one made just before it."""
    first = float(torch.rand((), generator=generator)) < FIRST_SHARE
    i = 0 if first else int(torch.randint(len(sections), (), generator=generator))
    return sections[i], sections[i - 1] if i else None


def section_loss(
    network, sample: Sample, disturbance: Disturbance, shift: float, generator: torch.Generator, options: dict
) -> tuple[Tensor, Tensor]:
    """(loss with its graph, one-step estimate of the window without): flow matching behind the plan's context.

    shift: of the noise levels. The truth is what the network shall predict, whatever its history is. The sample's
    tensors are not changed.
    """
    latents, section, previous = sample.latents, sample.section, sample.previous
    start, history = latents[:, :, :1], latents

    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape, generator=generator)
        return noise.to(x.device), shifted_sigmas(len(x), shift, generator).to(x.device)

    if previous is not None and float(torch.rand((), generator=generator)) < disturbance.own:
        x = latents[:, :, previous.start : previous.stop]
        context = gather_context(previous, latents, start, None, 0.0)
        with torch.no_grad():
            estimate = flow_loss(network, x, *draw(x), sample.cond, context, options)[1]
        history = torch.cat([latents[:, :, : previous.start], estimate, latents[:, :, previous.stop :]], dim=2)
    context = gather_context(section, history, start, None, 0.0)
    if disturbance.noise:
        context = with_noise(context, section, disturbance.noise, generator)
    x = latents[:, :, section.start : section.stop]
    return flow_loss(network, x, *draw(x), sample.cond, context, options)


def with_noise(context: PackedContext, section: Section, most: float, generator: torch.Generator) -> PackedContext:
    """A section's context with noise of a random level, 0 to `most`, on every finished frame.

    The start frame stays as it is where it is an anchor, and frames that do not exist stay blank.
    """
    tail = () if section.tail is None else (section.tail.frames,)
    device = context.latents[0].device
    level = (torch.rand(len(context.latents[0]), generator=generator) * most).to(device)
    disturbed = []
    for latent, frames in zip(context.latents, (*tail, *(group.frames for group in section.groups)), strict=True):
        noisy = add_noise(latent, torch.randn(latent.shape, generator=generator).to(device), level)
        kept = torch.tensor([frame in (START, BLANK) for frame in frames], device=device).reshape(1, 1, -1, 1, 1)
        disturbed.append(torch.where(kept, latent, noisy))
    return PackedContext(disturbed, context.layout)
