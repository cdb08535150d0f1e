"""Weights of the blocks in fp8 and int8 with scales, in the form that core multiplies quantised.

Files carry them (`convert_row`), and others are rounded as they are loaded (`rounded`). Where separate q, k, v (and
mlp) tensors become one fused tensor:

- int8 has one scale a row in core's layout, so the rows of the parts are put below one another: exact.
- fp8 has one scale a tensor. Where the parts have one and the same scale their bytes are kept. Where the scales
  differ, the largest one is taken for the fused tensor: the part it belongs to keeps its bytes, and the others are
  rounded a second time to 4 significant bits (e4m3; 3 for e5m2). The weights they stand for move by at most 1/16 of
  themselves (1/8 for e5m2), about 3 % (6 %) rms, a little more than the first quantisation cost; values below the
  smallest step of the new scale become coarser. A file in the native layout, quantised after fusing, has no such
  loss. Scales by row or by block, which core does not know of fp8, become one scale the same way.

Outside the blocks nothing is ever rounded (reference/framepack.md 9, trap 15): embedders of window, history, text and
picture, time and guidance, and the output layer; nor are norms and biases. The blocks' modulation, a quarter of
HunyuanVideo's numbers, is stored in fp8 but not multiplied in it: it reads one row a prompt, so that costs nothing.
Core cannot do the same of int8, whose products lose less.

Source: core's comfy/utils.py (convert_old_quants), comfy/ops.py (mixed precision) and QUANTIZATION.md;
reference/framepack.md 2.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import comfy.quant_ops
import torch
from torch import Tensor

from .key_map import QUANT_MARKER, Row, layer_of, swap_halves
from .tensor_file import StoredTensor, real

# In model_options: the format that matrices of the blocks are rounded to, of a file that has none with scales.
ROUND_TO = "frame_memory_round_to"
FP8, INT8 = "float8_e4m3fn", "int8_tensorwise"
BLOCKS = ("double_blocks.", "single_blocks.", "blocks.")  # in core's names of HunyuanVideo and Wan
MODULATION = (".img_mod.lin", ".txt_mod.lin", ".modulation.lin")
FP8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
# As the loaders' weight_dtype calls them.
CALLED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2"}
SCALE_NAMES = ("weight_scale", "scale_weight")
INPUT_SCALE_NAMES = ("input_scale", "scale_input")
METADATA_KEY = "_quantization_metadata"
PLAIN_DTYPE = torch.bfloat16
_FULL = "full_precision_matrix_mult"
# Of a matrix's largest number: one over the scale must be finite.
_SMALLEST = 1e-30


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
            settings[layer] = {"format": kind, **({_FULL: True} if full else {})}
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


def rounded(stored: Mapping[str, Tensor], name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors in core's layout, in RAM, with the matrices of the blocks rounded to a format that has scales.

    stored: as `checkpoint.open_state_dict` gives them, none of them with scales. name: FP8 (one scale a tensor; plain
    fp8 keeps its bytes) or INT8 (one scale a row). device: where it is computed; the results are on the CPU.
    """
    out = {}
    for key, value in stored.items():
        if not is_block_matrix(key, value):
            out[key] = real(value)
            continue
        layer, _ = layer_of(key)
        conf = {"format": name, **({_FULL: True} if name == FP8 and layer.endswith(MODULATION) else {})}
        if FP8_FORMATS.get(value.dtype) == name:
            out.update({key: real(value), f"{layer}.weight_scale": torch.ones(())})
        else:
            made = _quantise(real(value).to(device).float(), name)
            out.update({part: held.cpu() for part, held in made.state_dict(key).items()})
        out[f"{layer}.comfy_quant"] = mark(conf)
    return out


def _quantise(weight: Tensor, name: str):
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    # Core's own choice of fp8's scale makes NaN of a matrix of zeros.
    how = {"per_channel": True} if name == INT8 else {"scale": _scale_of(weight.abs().max(), torch.float8_e4m3fn)}
    return comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **how)


def is_block_matrix(key: str, value: Tensor) -> bool:
    """Whether a tensor of the native layout is one that may be rounded."""
    return value.ndim == 2 and key.startswith(BLOCKS)


def convert_row(row: Row, sd: Mapping[str, Tensor], settings: Mapping[str, dict]) -> dict[str, Tensor] | None:
    """The native weight of one row of the key map with its scale and mark, or None where no part is quantised.

    Weights are StoredTensors: nothing but the scales is read here. Convolutions and norms, and fused tensors of
    which only some parts are quantised, come out in bf16, without loss beyond bf16's own rounding. Raises QuantError
    for formats that cannot be joined.
    """
    if not any(source in settings for source in row.sources):
        return None
    scales = [_find(sd, s, SCALE_NAMES) for s in row.sources]
    _check_formats(row, scales, settings)
    weights = [sd[f"{s}.weight"] for s in row.sources]
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])

    def part(i: int) -> Tensor:
        value, scale = real(weights[i]), scales[i]
        return value.float() if scale is None else dequantise(value, scale)

    def finish(value: Tensor) -> Tensor:
        return swap_halves(value) if row.swap_halves else value

    key = f"{row.target}.weight"
    if any(s not in settings for s in row.sources) or len(shape) != 2:
        plain = lambda: finish(_stack(part, shape, PLAIN_DTYPE, lambda w: w))  # noqa: E731
        return {key: StoredTensor(plain, shape, PLAIN_DTYPE)}

    conf = dict(settings[row.sources[0]])
    kept = lambda: finish(_stack(lambda i: real(weights[i]), shape, dtype, lambda w: w))  # noqa: E731
    dtype = weights[0].dtype if all(w.dtype == weights[0].dtype for w in weights) else torch.float8_e4m3fn
    if conf["format"] == INT8:
        scale, load = finish(_row_scales(weights, scales)), kept
    elif all(s.numel() == 1 and float(s) == float(scales[0]) for s in scales) and weights[0].dtype == dtype:
        scale, load = scales[0].float().reshape(()), kept
    else:
        scale = _common_scale(part, scales, dtype)
        load = lambda: finish(_stack(part, shape, dtype, lambda w: _round(w, scale, dtype)))  # noqa: E731
    if dtype in FP8_FORMATS:
        conf = {"format": FP8_FORMATS[dtype]}
    if any(settings[s].get(_FULL) for s in row.sources):
        conf[_FULL] = True
    out = {key: StoredTensor(load, shape, dtype), f"{row.target}.weight_scale": scale}
    inputs = [v for v in (_find(sd, s, INPUT_SCALE_NAMES) for s in row.sources) if v is not None]
    if inputs and any(float(v) != 1.0 for v in inputs):
        out[f"{row.target}.input_scale"] = torch.stack([v.float().reshape(()) for v in inputs]).max()
    out[f"{row.target}.comfy_quant"] = mark(conf)
    return out


def _check_formats(row: Row, scales: list[Tensor | None], settings: Mapping[str, dict]) -> None:
    """Raise QuantError for a format without scales that are known here, and for int8 beside anything else."""
    known = (INT8, *FP8_FORMATS.values())
    for source, scale in zip(row.sources, scales, strict=True):
        if source in settings and (scale is None or settings[source].get("format") not in known):
            raise _refused(source, f"is quantised as {settings[source].get('format')}")
    ways = [{**settings.get(source, {}), _FULL: None} for source in row.sources]
    if any(way.get("format") == INT8 for way in ways) and any(way != ways[0] for way in ways):
        raise _refused(" and ".join(row.sources), "are quantised in different ways")


def _refused(what: str, why: str) -> QuantError:
    return QuantError(
        f"{what} {why}, which can be loaded only from a file in the native layout. Load the bf16 file with 'Load "
        "FramePack Model' instead."
    )


def _row_scales(weights: list[Tensor], scales: list[Tensor]) -> Tensor:
    """`[out, 1]` of the stacked parts."""
    return torch.cat([s.float().reshape(-1, 1).expand(len(w), 1) for w, s in zip(weights, scales, strict=True)])


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
    return _scale_of(torch.stack([part(i).abs().max() for i in range(len(scales))]).max(), dtype)


def _scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return largest.float().clamp(min=_SMALLEST) / torch.finfo(dtype).max


def _round(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (weight / scale).clamp_(-limit, limit).to(dtype)
