"""Operations of the GGUF kind: linear layers whose weights stay in packed 8-bit blocks and unpack in the forward pass.

Written for the tests from the description of the Q8_0 format: 32 numbers in a row share one fp16 scale and are stored
as 34 bytes (scale, then 32 signed bytes). A loader of this kind hands core a state dict of such tensors and its own
operations class; the model must not notice.
"""

from __future__ import annotations

import comfy.ops
import torch
from torch.utils._pytree import tree_map_only

BLOCK, BYTES = 32, 34


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]` to bytes `[out, in / 32 * 34]`."""
    cells = weight.float().reshape(weight.shape[0], -1, BLOCK)
    scale = (cells.abs().amax(-1, keepdim=True) / 127).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    numbers = (cells * inverse).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=-1).reshape(weight.shape[0], -1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The numbers of packed bytes, `[out, in]` fp32."""
    cells = packed.reshape(packed.shape[0], -1, BYTES)
    scale = cells[..., :2].contiguous().view(torch.float16).float()
    return (cells[..., 2:].contiguous().view(torch.int8).float() * scale).reshape(packed.shape[0], -1)


class PackedTensor(torch.Tensor):
    """Packed bytes that give the shape of the matrix they stand for, and unpack where arithmetic needs numbers."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor):
        shape = (packed.shape[0], packed.shape[1] // BYTES * BLOCK)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float16, device=packed.device)
        self.packed = packed
        return self

    def __init__(self, packed: torch.Tensor):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return PackedTensor(args[0].packed)
        args, kwargs = tree_map_only(PackedTensor, lambda t: unpack(t.packed), (args, kwargs or {}))
        return func(*args, **kwargs)


class PackedOperations(comfy.ops.manual_cast):
    """Core's operations with linear layers that keep what the file gives them."""

    unpacked_forwards = 0  # a count for the tests, no tensor

    class Linear(torch.nn.Module, comfy.ops.CastWeightBiasOp):
        comfy_cast_weights = True

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.weight, self.bias = None, None

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
            for name in ("weight", "bias"):
                value = state_dict.get(prefix + name)
                if value is None:
                    missing.append(prefix + name)
                else:
                    setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

        def forward(self, x):
            weight = self.weight
            if isinstance(weight.data, PackedTensor) or isinstance(weight, PackedTensor):
                PackedOperations.unpacked_forwards += 1
            weight, bias = weight.to(x.dtype), self.bias.to(x.dtype)
            for function in self.weight_function:
                weight = function(weight)
            for function in self.bias_function:
                bias = function(bias)
            return torch.nn.functional.linear(x, weight, bias)

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            if return_weight:
                return weight
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            return None
