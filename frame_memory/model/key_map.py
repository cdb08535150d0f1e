"""The one table between diffusers' FramePack names and core's HunyuanVideo names.

Checkpoints (`checkpoint.py`) and LoRAs (`lora.py`) both read it. Source: reference/framepack.md section 2.2.
A name here is a module's name without `.weight` or `.bias` unless it is called a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "module.", "model.")
CONTEXT_SIGNATURE = "clean_x_embedder.proj_4x.weight"
REFINER_BLOCKS = 2
BOTH = ("weight", "bias")
WEIGHT = ("weight",)
NAMED_IN_ERRORS = 6


class KeyMapError(ValueError):
    """Tensors are missing, left over or of the wrong shape. `missing` and `unexpected` name all of them."""

    def __init__(self, message: str, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = ()):
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected


@dataclass(frozen=True)
class Row:
    """One module of the native layout and the file modules whose rows it stacks on dim 0.

    swap_halves: the file holds [scale; shift] where core holds [shift; scale].
    """

    target: str
    sources: tuple[str, ...]
    params: tuple[str, ...] = BOTH
    swap_halves: bool = False


GLOBAL_ROWS = (
    Row("img_in.proj", ("x_embedder.proj",)),
    Row("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Row("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    Row("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Row("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    Row("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Row("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Row("txt_in.input_embedder", ("context_embedder.proj_in",)),
    Row("txt_in.t_embedder.in_layer", ("context_embedder.time_text_embed.timestep_embedder.linear_1",)),
    Row("txt_in.t_embedder.out_layer", ("context_embedder.time_text_embed.timestep_embedder.linear_2",)),
    Row("txt_in.c_embedder.in_layer", ("context_embedder.time_text_embed.text_embedder.linear_1",)),
    Row("txt_in.c_embedder.out_layer", ("context_embedder.time_text_embed.text_embedder.linear_2",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    Row("final_layer.linear", ("proj_out",)),
    Row("clean_x_embedder.proj", ("clean_x_embedder.proj",)),
    Row("clean_x_embedder.proj_2x", ("clean_x_embedder.proj_2x",)),
    Row("clean_x_embedder.proj_4x", ("clean_x_embedder.proj_4x",)),
    Row("image_projection.up", ("image_projection.up",)),
    Row("image_projection.down", ("image_projection.down",)),
)

_REFINER = (
    ("norm1", ("norm1",), BOTH),
    ("norm2", ("norm2",), BOTH),
    ("self_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), BOTH),
    ("self_attn.proj", ("attn.to_out.0",), BOTH),
    ("mlp.0", ("ff.net.0.proj",), BOTH),
    ("mlp.2", ("ff.net.2",), BOTH),
    ("adaLN_modulation.1", ("norm_out.linear",), BOTH),  # two gates, in the same order on both sides: no swap
)
_DOUBLE = (
    ("img_mod.lin", ("norm1.linear",), BOTH),
    ("txt_mod.lin", ("norm1_context.linear",), BOTH),
    ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), BOTH),
    ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), BOTH),
    ("img_attn.norm.query_norm", ("attn.norm_q",), WEIGHT),
    ("img_attn.norm.key_norm", ("attn.norm_k",), WEIGHT),
    ("txt_attn.norm.query_norm", ("attn.norm_added_q",), WEIGHT),
    ("txt_attn.norm.key_norm", ("attn.norm_added_k",), WEIGHT),
    ("img_attn.proj", ("attn.to_out.0",), BOTH),
    ("txt_attn.proj", ("attn.to_add_out",), BOTH),
    ("img_mlp.0", ("ff.net.0.proj",), BOTH),
    ("img_mlp.2", ("ff.net.2",), BOTH),
    ("txt_mlp.0", ("ff_context.net.0.proj",), BOTH),
    ("txt_mlp.2", ("ff_context.net.2",), BOTH),
)
_SINGLE = (
    ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), BOTH),
    ("linear2", ("proj_out",), BOTH),
    ("modulation.lin", ("norm.linear",), BOTH),
    ("norm.query_norm", ("attn.norm_q",), WEIGHT),
    ("norm.key_norm", ("attn.norm_k",), WEIGHT),
)
_BLOCKS = (
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _REFINER),
    ("double_blocks", "transformer_blocks", _DOUBLE),
    ("single_blocks", "single_transformer_blocks", _SINGLE),
)
# Tensors that quantised files put beside a weight; they follow the weight and are not part of the layout.
QUANT_SUFFIXES = (
    "scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant",
)  # fmt: skip
QUANT_MARKER = "scaled_fp8"


def rows(double: int, single: int) -> tuple[Row, ...]:
    """The table of a network with `double` and `single` blocks."""
    out = list(GLOBAL_ROWS)
    for (target, source, table), count in zip(_BLOCKS, (REFINER_BLOCKS, double, single), strict=True):
        for i in range(count):
            for dst, srcs, params in table:
                out.append(Row(f"{target}.{i}.{dst}", tuple(f"{source}.{i}.{s}" for s in srcs), params))
    return tuple(out)


def find_prefix(keys: Iterable[str]) -> str:
    """The prefix that trainers and other programs put before every network key, or an empty string."""
    marker = re.compile(r"(?:.*\.)?" + re.escape(CONTEXT_SIGNATURE) + r"$")
    for key in keys:
        if marker.match(key):
            return key[: -len(CONTEXT_SIGNATURE)]
    found = [p for p in PREFIXES if any(k.startswith(p) for k in keys)]
    return found[0] if found else ""


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether keys without prefix are diffusers' FramePack names (each block name also begins a native check)."""
    return any(k.startswith(("transformer_blocks.", "single_transformer_blocks.")) for k in keys)


def is_native(keys: Iterable[str]) -> bool:
    """Whether keys without prefix are core's HunyuanVideo names."""
    return any(k.startswith(("double_blocks.", "single_blocks.")) for k in keys)


def block_counts(keys: Iterable[str]) -> tuple[int, int]:
    """Double and single blocks that the keys speak of: one more than the highest index, in either layout."""
    counts = [0, 0]
    pattern = re.compile(r"^(?:(double_blocks|transformer_blocks)|(single_blocks|single_transformer_blocks))\.(\d+)\.")
    for key in keys:
        found = pattern.match(key)
        if found:
            kind = 0 if found[1] else 1
            counts[kind] = max(counts[kind], int(found[3]) + 1)
    return counts[0], counts[1]


def layer_of(key: str) -> tuple[str, str]:
    """Split a key into its module's name and its last part."""
    module, _, param = key.rpartition(".")
    return module, param


def is_quant_key(key: str) -> bool:
    """Whether a tensor describes how another one is quantised."""
    return key == QUANT_MARKER or layer_of(key)[1] in QUANT_SUFFIXES


def check_keys(keys: Iterable[str], diffusers: bool) -> tuple[Row, ...]:
    """The table that fits `keys` (without prefix, in either layout).

    Raises KeyMapError where a tensor of the layout is missing or one is left over, naming them; a network
    is never completed with random numbers.
    """
    have = {k for k in keys if not is_quant_key(k)}
    table = rows(*block_counts(have))
    names = ((name, row.params) for row in table for name in (row.sources if diffusers else (row.target,)))
    compare({f"{name}.{param}" for name, params in names for param in params}, have, "FramePack")
    return table


def compare(need: set[str], have: set[str], family: str) -> None:
    """Raise KeyMapError unless a file has just the tensors that its family needs."""
    missing, unexpected = tuple(sorted(need - have)), tuple(sorted(have - need))
    if missing or unexpected:
        parts = [_named("is missing", missing), _named(f"has tensors that {family} does not know:", unexpected)]
        raise KeyMapError("The checkpoint " + " and ".join(p for p in parts if p) + ".", missing, unexpected)


def _named(what: str, keys: tuple[str, ...]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - NAMED_IN_ERRORS} more" if len(keys) > NAMED_IN_ERRORS else ""
    return f"{what} {', '.join(keys[:NAMED_IN_ERRORS])}{more}"


def swap_halves(rows_: Tensor) -> Tensor:
    """[scale; shift] to [shift; scale] on dim 0, and back."""
    first, second = rows_.chunk(2, dim=0)
    return torch.cat((second, first), dim=0)


def convert_diffusers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Core's layout of a whole diffusers state dict in memory; prefixes are accepted, `sd` is not changed.

    Copied tensors are shared with `sd`, fused ones are new. Files are converted by `checkpoint.py`, tensor by
    tensor. Raises KeyMapError on missing or left-over tensors. Quantised files are not for this function.
    """
    prefix = find_prefix(sd)
    bare = {k.removeprefix(prefix): v for k, v in sd.items()}
    out = {}
    for row in check_keys(bare, diffusers=True):
        for param in row.params:
            parts = [bare[f"{s}.{param}"] for s in row.sources]
            value = parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)
            out[f"{row.target}.{param}"] = swap_halves(value) if row.swap_halves else value
    return out


def convert_native(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: diffusers names from core's layout. `sd` is not changed; results are views where they can be."""
    prefix = find_prefix(sd)
    bare = {k.removeprefix(prefix): v for k, v in sd.items()}
    hidden = bare["img_in.proj.bias"].shape[0]
    out = {}
    for row in check_keys(bare, diffusers=False):
        for param in row.params:
            value = bare[f"{row.target}.{param}"]
            value = swap_halves(value) if row.swap_halves else value
            for source, (start, length) in zip(row.sources, slices(row, hidden, value.shape[0]), strict=True):
                out[f"{source}.{param}"] = value.narrow(0, start, length)
    return out


def slices(row: Row, hidden: int, length: int) -> tuple[tuple[int, int], ...]:
    """(start, length) on dim 0 of each source inside the fused tensor of `length` rows.

    q, k and v have `hidden` rows each; what is left belongs to a single block's MLP.
    """
    if len(row.sources) == 1:
        return ((0, length),)
    starts = [i * hidden for i in range(len(row.sources))]
    ends = [*starts[1:], length]
    return tuple((a, b - a) for a, b in zip(starts, ends, strict=True))
