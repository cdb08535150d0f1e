"""Cross-attention from the features of frame preservation into each block of a DiT.

    window = window + out(attention(norm(window), key(f), value(f)))        f = norm(features)

It is part of the block: it comes behind what core's block made, inside whatever other packs put around that. Only the
window's tokens ask. `out` begins at zero, so a fresh one changes nothing, bit for bit. The weights belong to the
memory, whose ModelPatcher is loaded beside the DiT's; nothing of the DiT is changed or copied.

There is no matrix for the queries: the keys' one can do what it would. Neither are there positions: the memory's tokens
in the sequence have them, and here what is alike finds each other. Source: pfp reference 6; the wiring is our choice.

Shape legend: B batch, N tokens of the window, M tokens of the memory, D width of the DiT, E width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ..plan.cross_attention import CrossAttentionSpec
from ..plan.preservation import PRESERVATION

# In `transformer_options`: the CrossAttention that reads the features which a prompt carries.
CROSS = "frame_memory_cross_attention"


class BlockCrossAttention(nn.Module):
    """What one block of the DiT reads of the memory, in the numbers of its tokens."""

    def __init__(self, spec: CrossAttentionSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.heads = spec.heads
        self.norm = operations.LayerNorm(spec.hidden, eps=1e-6, **made)
        self.key = operations.Linear(spec.features, spec.hidden, **made)
        self.value = operations.Linear(spec.features, spec.hidden, **made)
        self.out = operations.Linear(spec.hidden, spec.hidden, **made)

    def forward(self, window_BND: Tensor, features_BME: Tensor, transformer_options: dict) -> Tensor:
        query, key, value = self.norm(window_BND), self.key(features_BME), self.value(features_BME)
        return self.out(optimized_attention(query, key, value, self.heads, transformer_options=transformer_options))


class CrossAttention(nn.Module):
    """Those of all blocks, in the order of `spec.blocks`. Fresh weights are undefined: call `initialise`."""

    def __init__(self, spec: CrossAttentionSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.spec = spec
        self.norm = operations.LayerNorm(spec.features, eps=1e-6, **made)
        blocks = (BlockCrossAttention(spec, operations=operations, **made) for _ in spec.blocks)
        self.blocks = nn.ModuleList(blocks)

    def around(self, options: Mapping, features_BME: Tensor, window: slice) -> dict:
        """`transformer_options` whose blocks read the features; what others had put around a block stays there.

        window: which of the tokens that a block gives back are the window's.
        """
        features_BME = self.norm(features_BME)
        known = options.get("patches_replace", {})
        dit = dict(known.get("dit", {}))
        for name, block in zip(self.spec.blocks, self.blocks, strict=True):
            dit[name] = _replaced(block, features_BME, window, dit.get(name))
        return {**options, "patches_replace": {**known, "dit": dit}}


def spec_of(network: nn.Module, features: int) -> CrossAttentionSpec:
    """Cross-attention to the measure of core's HunyuanVideo, or Wan. features: E."""
    net: Any = network
    if not hasattr(net, "double_blocks"):
        return CrossAttentionSpec(net.dim, features, net.num_heads, len(net.blocks))
    return CrossAttentionSpec(net.hidden_size, features, net.num_heads, len(net.double_blocks), len(net.single_blocks))


def reader_of(model_patcher) -> CrossAttention | None:
    """What a MODEL reads the features of a memory by, None where it does not."""
    return model_patcher.model_options.get("transformer_options", {}).get(CROSS)


@torch.no_grad()
def initialise(cross: CrossAttention, seed: int = 0) -> CrossAttention:
    """Give a fresh one its weights, in place: random keys and values, and an output of zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(cross.named_parameters()):
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        elif name.endswith(("bias", "out.weight")):
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return cross


def with_features(options: Mapping, features_BME: Tensor | None, like: Tensor, window: slice) -> Mapping:
    """`transformer_options` for a forward pass behind a memory's features; as they are where there are none.

    features: of batch B, or of one for all. like: anything of batch B in the numbers of the window. window: its tokens.
    Raises ValueError where nothing reads the features.
    """
    if features_BME is None or not features_BME.shape[1]:
        return options
    cross = options.get(CROSS)
    if cross is None:
        raise ValueError(
            "The prompt carries a memory with cross-attention, and the MODEL has no layers that read it. Connect "
            f"'model' of '{PRESERVATION}' to the guider, and 'memory' of the same node."
        )
    return cross.around(options, features_BME.to(like).expand(like.shape[0], -1, -1), window)


def _replaced(block: nn.Module, features_BME: Tensor, window: slice, theirs: Callable | None) -> Callable:
    def replaced(args: dict, extra: dict) -> dict:
        original = extra["original_block"]

        def with_memory(args: dict) -> dict:
            out = original(args)
            img = out["img"]
            read = block(img[:, window], features_BME, args["transformer_options"])
            if read.requires_grad:  # the backward pass needs what was asked with
                img = img.clone()
            own = img[:, window]
            own += read  # without a gradient the block's own tensor, as core adds a ControlNet's
            return {**out, "img": img}

        return with_memory(args) if theirs is None else theirs(args, {**extra, "original_block": with_memory})

    return replaced
