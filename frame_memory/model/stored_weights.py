"""Numbers of weights that a host keeps in a form of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(module, value: Tensor) -> Tensor:
    """Weights unpacked: core's quantised ones say how, layers of GGUF loaders have a method for it."""
    value = value.detach()
    if hasattr(value, "_qdata"):
        value = value.dequantize()
    elif hasattr(module, "get_weight"):
        value = module.get_weight(value, torch.float32)
    return value.to("cpu", torch.float32)
