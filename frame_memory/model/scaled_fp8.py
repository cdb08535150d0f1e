"""fp8 weights with scales, carried over when separate q, k, v (and mlp) tensors become one fused tensor.

Core keeps one scale for a tensor. Where the parts have one and the same scale their bytes are kept. Where the
scales differ, the largest one is taken for the fused tensor: the part it belongs to keeps its bytes, and the
others are rounded a second time to 4 significant bits (e4m3; 3 for e5m2). The weights they stand for move by at
most 1/16 of themselves (1/8 for e5m2), about 3 % (6 %) rms, a little more than the first quantisation cost;
values below the smallest step of the new scale become coarser. A file in the native layout, quantised after
fusing, has no such loss. Scales by row or by block, which core does not know, become one scale the same way.

Source: core's comfy/utils.py (convert_old_quants) and comfy/ops.py (mixed precision); reference/framepack.md 2.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .key_map import QUANT_MARKER, Row, layer_of, swap_halves
from .tensor_file import StoredTensor, real

FP8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
SCALE_NAMES = ("weight_scale", "scale_weight")
INPUT_SCALE_NAMES = ("input_scale", "scale_input")
METADATA_KEY = "_quantization_metadata"
PLAIN_DTYPE = torch.bfloat16


class QuantError(ValueError):
    """A quantised layer that cannot be carried over to the native layout."""


def layer_settings(sd: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str) -> dict[str, dict]:
    """Core's settings of each quantised layer, from any of the three marks core knows.

    sd: tensors by name without `prefix`. Returns `{layer: {"format": ..., "full_precision_matrix_mult"?: True}}`.
    """
    settings = {}
    if METADATA_KEY in metadata:
        layers = json.loads(metadata[METADATA_KEY])["layers"]
        return {name.removeprefix(prefix): dict(conf) for name, conf in layers.items()}
    full = QUANT_MARKER in sd and sd[QUANT_MARKER].numel() == 2  # core's way to say "no fp8 matrix products"
    for key in sd:
        layer, param = layer_of(key)
        if param == "comfy_quant":
            settings[layer] = json.loads(bytes(real(sd[key]).tolist()))
        elif param in SCALE_NAMES and layer not in settings:
            kind = FP8_FORMATS.get(sd[f"{layer}.weight"].dtype) if f"{layer}.weight" in sd else None
            settings[layer] = {"format": kind, **({"full_precision_matrix_mult": True} if full else {})}
    return settings


def mark(settings: Mapping) -> Tensor:
    """The `comfy_quant` tensor core reads a layer's settings from."""
    return torch.tensor(list(json.dumps(dict(settings)).encode()), dtype=torch.uint8)


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight [out, in]` in fp32. scale: one number, one a row, or `[out, blocks, 1]`."""
    weight, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.ndim == 3:
        out, blocks = scale.shape[:2]
        return (weight.reshape(out, blocks, -1) * scale).reshape(weight.shape)
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def convert_row(row: Row, sd: Mapping[str, Tensor], settings: Mapping[str, dict]) -> dict[str, Tensor] | None:
    """The native weight of one row of the key map with its scale and mark, or None where no part is quantised.

    Weights are StoredTensors: nothing but the scales is read here. Convolutions and norms, and fused tensors of
    which only some parts are quantised, come out in bf16, without loss beyond bf16's own rounding.
    """
    quantised = [s for s in row.sources if s in settings]
    if not quantised:
        return None
    weights = [sd[f"{s}.weight"] for s in row.sources]
    scales = [_find(sd, s, SCALE_NAMES) for s in row.sources]
    for source, scale in zip(row.sources, scales, strict=True):
        if source in settings and (settings[source].get("format") not in FP8_FORMATS.values() or scale is None):
            raise QuantError(
                f"{source} is quantised as {settings[source].get('format')}, which can be loaded only from a file "
                "in the native layout. Load the bf16 file with 'Load FramePack Model' instead."
            )
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])

    def part(i: int) -> Tensor:
        value = real(weights[i])
        return value.float() if scales[i] is None else dequantise(value, scales[i])

    def finish(value: Tensor) -> Tensor:
        return swap_halves(value) if row.swap_halves else value

    key = f"{row.target}.weight"
    if len(quantised) < len(weights) or len(shape) != 2:
        plain = lambda: finish(_stack(part, shape, PLAIN_DTYPE, lambda w: w))  # noqa: E731
        return {key: StoredTensor(plain, shape, PLAIN_DTYPE)}

    dtype = weights[0].dtype if all(w.dtype == weights[0].dtype for w in weights) else torch.float8_e4m3fn
    if all(s.numel() == 1 and float(s) == float(scales[0]) for s in scales) and weights[0].dtype == dtype:
        scale = scales[0].float().reshape(())
        load = lambda: finish(_stack(lambda i: real(weights[i]), shape, dtype, lambda w: w))  # noqa: E731
    else:
        scale = _common_scale(part, scales, dtype)
        load = lambda: finish(_stack(part, shape, dtype, lambda w: _round(w, scale, dtype)))  # noqa: E731
    conf = {"format": FP8_FORMATS[dtype]}
    if any(settings[s].get("full_precision_matrix_mult") for s in row.sources):
        conf["full_precision_matrix_mult"] = True
    out = {key: StoredTensor(load, shape, dtype), f"{row.target}.weight_scale": scale}
    inputs = [v for v in (_find(sd, s, INPUT_SCALE_NAMES) for s in row.sources) if v is not None]
    if inputs and any(float(v) != 1.0 for v in inputs):
        out[f"{row.target}.input_scale"] = torch.stack([v.float().reshape(()) for v in inputs]).max()
    out[f"{row.target}.comfy_quant"] = mark(conf)
    return out


def _find(sd: Mapping[str, Tensor], layer: str, names: tuple[str, ...]) -> Tensor | None:
    return next((real(sd[f"{layer}.{n}"]) for n in names if f"{layer}.{n}" in sd), None)


def _stack(part, shape: tuple[int, ...], dtype: torch.dtype, finish) -> Tensor:
    """Fill one tensor from its parts along dim 0, one part in RAM at a time."""
    out, start, i = torch.empty(shape, dtype=dtype), 0, 0
    while start < shape[0]:
        value = finish(part(i))
        out.narrow(0, start, value.shape[0]).copy_(value)
        start, i = start + value.shape[0], i + 1
    return out


def _common_scale(part, scales: list[Tensor], dtype: torch.dtype) -> Tensor:
    if all(s.numel() == 1 for s in scales):
        return torch.stack([s.float().reshape(()) for s in scales]).max()
    largest = torch.stack([part(i).abs().max() for i in range(len(scales))]).max()
    return largest.clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max


def _round(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (weight / scale).clamp_(-limit, limit).to(dtype)
