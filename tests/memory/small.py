"""A SemanticPack of 32 numbers a token with random weights everywhere, clips for it, and a VAE that shows latents."""

from __future__ import annotations

import comfy.latent_formats
import comfy.ops
import torch
from comfy.taesd.taehv import TAEHV

from frame_memory.model.semantic_pack import PackSpec, SemanticPack

SPEC = {"hidden": 32, "heads": 2, "axes_dim": (4, 6, 6), "theta": 256, "in_channels": 4, "text": 10, "vision": 12}


def random_pack(seed: int = 0, dtype=torch.float32, **options) -> SemanticPack:
    """All weights random, gate and norms too, so that nothing hides behind a zero."""
    pack = SemanticPack(PackSpec(**{**SPEC, **options}), dtype=dtype, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(pack.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return pack


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(batch: int = 1, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and vision tokens."""
    return drawn(batch, 3, SPEC["text"], seed=seed), drawn(batch, 5, SPEC["vision"], seed=seed + 1)


def clips(frames: list[int], batch: int = 1, height: int = 5, width: int = 11, seed: int = 7) -> list[torch.Tensor]:
    return [drawn(batch, SPEC["in_channels"], t, height, width, seed=seed + i) for i, t in enumerate(frames)]


class Pixels:
    """A VAE of core's small class whose pictures are the first three channels of the latent, each frame four times but
    the first. family: of HunyuanVideo or, without a latent format of its own, Wan."""

    latent_channels, latent_dim = 16, 3

    def __init__(self, family: str = "HunyuanVideo"):
        formats = {"HunyuanVideo": comfy.latent_formats.HunyuanVideo, "Wan21": None}
        self.first_stage_model = TAEHV(16, latent_format=formats[family])

    def decode(self, latent):
        frames = torch.sigmoid(latent[:, :3].movedim(1, -1))
        frames = frames.repeat_interleave(8, 2).repeat_interleave(8, 3)
        return torch.cat((frames[:, :1], frames[:, 1:].repeat_interleave(4, 1)), 1)

    def spacial_compression_decode(self):
        return 8

    def temporal_compression_decode(self):
        return 4
