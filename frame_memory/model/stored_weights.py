"""Numbers of weights that a host keeps in a form of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .base_signature import MODEL_PREFIX


def unpacked(module, value: Tensor) -> Tensor:
    """Weights unpacked: core's quantised ones say how, layers of GGUF loaders have a method for it."""
    value = value.detach()
    if hasattr(value, "_qdata"):
        value = value.dequantize()
    elif hasattr(module, "get_weight"):
        value = module.get_weight(value, torch.float32)
    return value.to("cpu", torch.float32)


def original(model_patcher, module: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer of a MODEL's network as its checkpoint has them: unpacked, and without LoRAs that core
    has merged."""
    layer = model_patcher.model.diffusion_model.get_submodule(module)

    def held(name: str) -> Tensor:
        saved = model_patcher.backup.get(f"{MODEL_PREFIX}{module}.{name}")
        return unpacked(layer, layer.get_parameter(name) if saved is None else saved.weight)

    return held("weight"), held("bias")
