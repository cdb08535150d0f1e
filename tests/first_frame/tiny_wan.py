"""A Wan 2.2 I2V A14B of tiny size as a file: core's class, core's names, random weights."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from comfy import ops
from comfy.ldm.wan.model import WanModel

WIDTH, BLOCKS = 128, 2


def save_tiny_wan(path: Path, seed: int = 0) -> Path:
    """Written to `path`: one head of 128, two blocks, 36 input channels as the real experts have. Returns the path."""
    torch.manual_seed(seed)
    model = WanModel(
        model_type="t2v", in_dim=36, dim=WIDTH, ffn_dim=WIDTH, num_heads=1, num_layers=BLOCKS, out_dim=16,
        operations=ops.disable_weight_init, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    state = {name: torch.randn(p.shape) * 0.02 for name, p in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, str(path))
    return path
