"""Flow matching on a packed context: what one training step needs.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
Sigma is 1 at noise and 0 at data; the network predicts the velocity `noise - data`
(reference/memorypack.md section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.context import PackedContext

GUIDANCE = 10.0


@dataclass(frozen=True)
class Conditioning:
    """Text `[B, L, .]`, pooled text `[B, .]` and vision tokens `[B, ., 1152]` of a batch."""

    text: Tensor
    pooled: Tensor
    vision: Tensor | None = None


def predict_velocity(
    model: nn.Module, x_BCTHW: Tensor, sigma_B: Tensor, cond: Conditioning, context: PackedContext, options: dict,
    memory_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One call of the network at `sigma`. memory_tokens: `[B, M, D]` of a SemanticPack, None without memory."""
    guidance = torch.full_like(sigma_B, GUIDANCE)
    return model(
        x_BCTHW,
        sigma_B * 1000,
        context=cond.text,
        y=cond.pooled,
        clip_fea=cond.vision,
        guidance=guidance,
        context_latents=context.latents,
        context_layout=context.layout,
        transformer_options=options,
        memory_tokens=memory_tokens,
    )


def add_noise(x_BCTHW: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """`(1 - sigma) x + sigma noise`."""
    sigma = sigma_B.reshape(-1, 1, 1, 1, 1)
    return (1 - sigma) * x_BCTHW + sigma * noise


def flow_loss(model, x_BCTHW: Tensor, noise: Tensor, sigma_B: Tensor, cond, context, options: dict) -> Tensor:
    """Mean squared error of the predicted velocity."""
    velocity = predict_velocity(model, add_noise(x_BCTHW, noise, sigma_B), sigma_B, cond, context, options)
    return (velocity - (noise - x_BCTHW)).square().mean()


def one_step_estimate(model, x_BCTHW: Tensor, noise: Tensor, sigma_B: Tensor, cond, context, options: dict) -> Tensor:
    """The network's guess of the clean window from one noise level (reference/memorypack.md 3.1), without a graph."""
    with torch.no_grad():
        noisy = add_noise(x_BCTHW, noise, sigma_B)
        velocity = predict_velocity(model, noisy, sigma_B, cond, context, options)
        return noisy - sigma_B.reshape(-1, 1, 1, 1, 1) * velocity


def shifted_sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Uniform times warped as the sampler warps its steps: `shift t / (1 + (shift - 1) t)`, `[count]`."""
    # Stratified: one draw in each of `count` equal parts keeps the loss of a small batch steady.
    t = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift_times(t[torch.randperm(count, generator=generator)], shift)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Times 0..1 moved toward noise by `shift` (above 1), as the sampler moves its steps."""
    return shift * t / (1 + (shift - 1) * t)
