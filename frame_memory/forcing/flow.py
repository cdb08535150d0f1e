"""Flow matching on a packed context: what one training step needs.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
Sigma is 1 at noise and 0 at data; the network predicts the velocity `noise - data`
(reference/memorypack.md section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..model import wan
from ..model.context import PackedContext

GUIDANCE = 10.0


@dataclass(frozen=True)
class Conditioning:
    """Text `[B, L, .]`, pooled text `[B, .]` and vision tokens `[B, ., 1152]` of a batch, for FramePack's network."""

    text: Tensor
    pooled: Tensor
    vision: Tensor | None = None

    def without_text(self) -> Conditioning:
        """The same with zeros for the text, as core's 'ConditioningZeroOut' makes them."""
        return replace(self, text=torch.zeros_like(self.text), pooled=torch.zeros_like(self.pooled))

    def call(self, model, x_BCTHW: Tensor, sigma_B: Tensor, context: PackedContext, options: dict, memory_tokens):
        """The network's velocity at `sigma`."""
        return model(
            x_BCTHW,
            sigma_B * 1000,
            context=self.text,
            y=self.pooled,
            clip_fea=self.vision,
            guidance=torch.full_like(sigma_B, GUIDANCE),
            context_latents=context.latents,
            context_layout=context.layout,
            transformer_options=options,
            memory_tokens=memory_tokens,
        )


@dataclass(frozen=True)
class WanConditioning:
    """Text `[B, L, .]` and vision tokens `[B, ., 1280]` of a batch, for core's Wan with `model.wan.options`.

    beside: channels that the network reads beside the noise. They stay zero, as core leaves them for a window that no
    picture was given for: the first picture is among the context.
    """

    text: Tensor
    vision: Tensor | None = None
    beside: int = 0

    def without_text(self) -> WanConditioning:
        """The same with zeros for the text, as core's 'ConditioningZeroOut' makes them."""
        return replace(self, text=torch.zeros_like(self.text))

    def call(self, model, x_BCTHW: Tensor, sigma_B: Tensor, context: PackedContext, options: dict, memory_tokens):
        """The network's velocity at `sigma`. Raises ValueError for tokens of a memory that Wan has not."""
        if memory_tokens is not None:
            raise ValueError("Wan was given tokens of a MemoryPack; expected none.")
        nothing = x_BCTHW.new_zeros((x_BCTHW.shape[0], self.beside, *x_BCTHW.shape[2:]))
        return model(
            torch.cat((x_BCTHW, nothing), dim=1),
            sigma_B * 1000,
            context=self.text,
            clip_fea=self.vision,
            transformer_options=options,
            **{wan.CONTEXT: context.latents, wan.LAYOUT: context.layout},
        )


def predict_velocity(
    model: nn.Module, x_BCTHW: Tensor, sigma_B: Tensor, cond: Conditioning | WanConditioning, context: PackedContext,
    options: dict, memory_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One call of the network at `sigma`. memory_tokens: `[B, M, D]` of a SemanticPack, None without memory."""
    return cond.call(model, x_BCTHW, sigma_B, context, options, memory_tokens)


def add_noise(x_BCTHW: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """`(1 - sigma) x + sigma noise`."""
    sigma = sigma_B.reshape(-1, 1, 1, 1, 1)
    return (1 - sigma) * x_BCTHW + sigma * noise


def flow_loss(
    model, x_BCTHW: Tensor, noise: Tensor, sigma_B: Tensor, cond, context, options: dict,
    memory_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mean squared error of the predicted velocity, with its graph; one-step estimate of the window, without).

    The estimate is the network's guess of the clean window from one noise level (reference/memorypack.md 3.1).
    """
    noisy = add_noise(x_BCTHW, noise, sigma_B)
    velocity = predict_velocity(model, noisy, sigma_B, cond, context, options, memory_tokens)
    loss = (velocity - (noise - x_BCTHW)).square().mean()
    return loss, (noisy - sigma_B.reshape(-1, 1, 1, 1, 1) * velocity).detach()


def shifted_sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Uniform times warped as the sampler warps its steps: `shift t / (1 + (shift - 1) t)`, `[count]`."""
    # Stratified: one draw in each of `count` equal parts keeps the loss of a small batch steady.
    t = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift_times(t[torch.randperm(count, generator=generator)], shift)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Times 0..1 moved toward noise by `shift` (above 1), as the sampler moves its steps."""
    return shift * t / (1 + (shift - 1) * t)
