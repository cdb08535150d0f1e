"""Noise for one section after the other out of a stock NOISE.

Source: reference/framepack.md section 3: one CPU generator, made once, draws each section's noise in turn. The first
section's noise equals what core would draw for the same seed.
"""

from __future__ import annotations

import copy

import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from torch import Tensor


class SectionNoise:
    """Draws each section's noise. Core's RandomNoise becomes one continued generator; any other NOISE is asked
    once a section, with its seed moved on by one each time."""

    def __init__(self, noise):
        self.noise = noise
        self.seed = noise.seed
        self.generator = torch.Generator().manual_seed(noise.seed) if type(noise) is Noise_RandomNoise else None

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
