"""Gradients through core's transformer blocks, without touching core.

Core's blocks add their residuals in place, which spoils what the norms saved for the backward pass, and its rotary
kernel has no autograd formula (reference/comfyui-host.md section 6). Both have a seam: a norm may work on a copy of
its input, and an attention patch may apply the rotation itself.

Shape legend: B batch, A heads, N tokens, F rotary frequencies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..model.packing import rotate


def rotate_patch(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, **kwargs) -> dict:
    """Core's `attn1_patch`: do the rotation here and leave none for core."""
    return {"q": rotate(q, pe), "k": rotate(k, pe), "v": v, "pe": None}


def training_options() -> dict:
    """`transformer_options` for a forward pass that will be differentiated."""
    return {"patches": {"attn1_patch": [rotate_patch]}}


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within this block a backward pass through `model` is exact; hooks are removed on leaving."""
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    handles = [n.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])) for n in norms]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
