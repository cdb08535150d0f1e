"""Noise for one section after the other out of a stock NOISE.

Source: reference/framepack.md section 3: one CPU generator, made once, draws each section's noise in turn. The first
section's noise equals what core would draw for the same seed. Where a start picture gets noise too, its draws come
first, as in Helios's pipeline (diffusers 0.39, pipelines/helios).
"""

from __future__ import annotations

import copy

import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from torch import Tensor

# Noise levels of a start picture, between which one is drawn.
LEAST_LEVEL, MOST_LEVEL = 0.111, 0.135


class SectionNoise:
    """Draws each section's noise. Core's RandomNoise becomes one continued generator; any other NOISE is asked
    once a section, with its seed moved on by one each time."""

    def __init__(self, noise):
        self.noise = noise
        self.seed = noise.seed
        self.generator = torch.Generator().manual_seed(noise.seed) if type(noise) is Noise_RandomNoise else None
        self.of_start = self.generator or torch.Generator().manual_seed(noise.seed)

    def a_little_on(self, latent: Tensor) -> Tensor:
        """A latent in model space, fp32 on the CPU, with a little noise; must be called before the first `draw`."""
        level = LEAST_LEVEL + (MOST_LEVEL - LEAST_LEVEL) * torch.rand(1, generator=self.of_start)
        noise = torch.randn(latent.shape, generator=self.of_start)
        return level * noise + (1 - level) * latent

    def draw(self, section: int, shape: tuple[int, ...]) -> Tensor:
        """Noise `shape` in fp32 on the CPU; must be called in the order of making."""
        if self.generator is not None:
            return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        noise = copy.copy(self.noise)
        noise.seed = self.noise.seed + section
        return noise.generate_noise({"samples": torch.zeros(shape)})

    def state(self, shape: tuple[int, ...]) -> tuple | None:
        """What says the next noise of `shape` exactly without drawing it; None where only the noise itself does."""
        if self.generator is None:
            return None
        return type(self.noise).__name__, self.generator.get_state(), shape

    def with_seed(self, seed: int) -> SectionNoise:
        """The same kind of NOISE begun anew with another seed."""
        noise = copy.copy(self.noise)
        noise.seed = seed
        return SectionNoise(noise)
