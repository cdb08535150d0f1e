"""Checkpoint files of the kinds artists have, written small, and the tools to look at what loading made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import parity_models as pm
from frame_memory.model import key_map

REPO = Path(__file__).resolve().parents[2]
TINY = {"heads": 1, "double": 1, "single": 2, "text_features": 64}
F8 = torch.float8_e4m3fn


def tiny_reference(seed: int = 0) -> dict[str, torch.Tensor]:
    """diffusers' state dict of the smallest network core's detection accepts."""
    return pm.make_reference(seed=seed, **TINY).state_dict()


def write_shards(folder, sd: dict[str, torch.Tensor], count: int = 3, index: bool = True) -> list[str]:
    """diffusers' sharded folder; q, k and v of one block end up in different shards."""
    os.makedirs(folder, exist_ok=True)
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    parts = [dict(list(sd.items())[i::count]) for i in range(count)]
    for name, part in zip(names, parts):
        save_file({k: v.contiguous() for k, v in part.items()}, os.path.join(folder, name))
    if index:
        where = {key: name for name, part in zip(names, parts) for key in part}
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
        with open(
            os.path.join(folder, "diffusion_pytorch_model.safetensors.index.json"), "w", encoding="utf-8"
        ) as file:
            file.write(text)
    return [os.path.join(folder, n) for n in names]


def write_file(path, sd: dict[str, torch.Tensor], metadata=None) -> str:
    save_file({k: v.contiguous() for k, v in sd.items()}, str(path), metadata=metadata)
    return str(path)


def plain_fp8(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of the blocks cast to fp8 without scales, everything else in bf16, as public single files are."""
    return {k: v.to(F8 if in_block(k) and v.ndim == 2 else torch.bfloat16) for k, v in sd.items()}


def in_block(key: str) -> bool:
    return key.startswith(("transformer_blocks.", "single_transformer_blocks.", "double_blocks.", "single_blocks."))


def quantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(F8)


def scaled_fp8(sd: dict[str, torch.Tensor], scale_of=None, scale_name: str = "weight_scale"):
    """Scaled fp8 of the blocks' matrices: (tensors, layer names). scale_of(key, weight) gives each scale."""
    scale_of = scale_of or (lambda key, w: (w.abs().max() / 448).float())
    out, layers = {}, []
    for key, value in sd.items():
        if in_block(key) and value.ndim == 2:
            layer = key.removesuffix(".weight")
            scale = scale_of(key, value.float())
            out[key], out[f"{layer}.{scale_name}"] = quantise(value.float(), scale), scale
            layers.append(layer)
        else:
            out[key] = value.to(torch.bfloat16)
    return out, layers


def as_metadata(layers) -> dict[str, str]:
    """Core's `_quantization_metadata` for plain per-tensor fp8."""
    conf = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    return {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers, conf)})}


def dequantised(sd: dict[str, torch.Tensor], scale_name: str = "weight_scale") -> dict[str, torch.Tensor]:
    """What a scaled file's numbers mean, in fp32."""
    out = {}
    for key, value in sd.items():
        scale = sd.get(f"{key.removesuffix('.weight')}.{scale_name}")
        if not key_map.is_quant_key(key):
            out[key] = value.float() if scale is None else value.float() * scale
    return out


def weight_of(patcher, key: str) -> torch.Tensor:
    """A loaded parameter's numbers in fp32, whatever it is stored as."""
    module, _, param = key.rpartition(".")
    value = getattr(patcher.model.diffusion_model.get_submodule(module), param)
    return (value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "_qdata") else value).detach().float()


def tiny_inputs() -> pm.Inputs:
    """One F1 section at 8x12 latent pixels with text of 64 features."""
    groups = ((4, tuple(range(1, 17))), (2, (17, 18)), (1, (0, 19)))
    return pm.make_inputs(8, 12, tuple(range(20, 29)), groups, text_lengths=(7,), image_tokens=9, text_features=64)
