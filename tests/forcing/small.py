"""A FramePack network, a memory and videos small enough to train in a blink: hidden size 32, latents of 4x6."""

from __future__ import annotations

import comfy.ops
import torch

from frame_memory.forcing.clips import TrainingVideo
from frame_memory.forcing.flow import Conditioning
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise
from frame_memory.model.transformer import FramePackTransformer

TOPOLOGY = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 64,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip


def network(seed: int = 0, operations=comfy.ops.disable_weight_init, depth: int = 1) -> FramePackTransformer:
    """Random weights, none of them zero. depth: blocks of each kind."""
    generator = torch.Generator().manual_seed(seed)
    topology = TOPOLOGY | {"depth": depth, "depth_single_blocks": depth}
    model = FramePackTransformer(dtype=torch.float32, operations=operations, **topology)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            spread = 0.02 if p.ndim == 1 else 0.7 * (p.numel() / p.shape[0]) ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
            if "norm" in name and name.endswith("weight") and p.ndim == 1:
                p.add_(1)
    return model.requires_grad_(False)


def memory(model, seed: int = 1, gate: float = 0.3, **options) -> SemanticPack:
    """A memory with an open gate, no branch of it zero."""
    pack = SemanticPack(PackSpec.of(model, **options), torch.float32, None, comfy.ops.disable_weight_init)
    initialise(pack, model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pack.gate.fill_(gate)
        for p in pack.parameters():
            if p.ndim == 2 and not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return pack.requires_grad_(False)


def video(clips: int = 3, seed: int = 0, batch: int = 1, window: int = 9) -> TrainingVideo:
    """Latents of noise that changes slowly."""
    g = torch.Generator().manual_seed(100 + seed)
    latents = torch.randn(batch, 16, 1 + window * clips, 4, 6, generator=g).cumsum(2) * 0.3
    cond = Conditioning(
        torch.randn(batch, 5, 64, generator=g),
        torch.randn(batch, 768, generator=g),
        torch.randn(batch, 4, 1152, generator=g),
    )
    return TrainingVideo(latents, cond, f"video {seed}")
