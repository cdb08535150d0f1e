"""Linear layers that are not trained: the gradient passes through them, and nothing of them is kept for it.

Left to itself, autograd keeps every weight that a gradient passes through. Of a network that the host moves in pieces
these are temporary copies, all of which would stay on the GPU or be overwritten by the next piece; and the host loads
weights in its inference mode, which autograd refuses. Here the backward pass asks the layer for its weight once more.
A LoRA of ours joins in at the same place.

Shape legend: B batch, N tokens, I O features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Through(torch.autograd.Function):
    """The layer's output as it was made, and the gradient of its input."""

    @staticmethod
    def forward(ctx, x_BNI: Tensor, y_BNO: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        # Not by view_as: core's blocks go on in place where tokens differ in modulation, which views refuse.
        return y_BNO.detach()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad_BNO,) = grads
        weight, bias, stream = _weight(ctx.layer, grad_BNO)
        grad_BNI = grad_BNO @ weight
        if stream is not None:
            comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)
        return grad_BNI, None, None


def _weight(layer: Any, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """(weight, bias, stream) of a layer on the device and in the dtype of `like`, by the layer's own way of casting."""
    own = getattr(layer, "cast_bias_weight", None)  # loaders of other packs (GGUF) unpack their own weights
    if own is not None:
        weight, bias = own(like)[:2]
        return weight, bias, None
    if isinstance(layer, comfy.ops.CastWeightBiasOp):
        return comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    return layer.weight.to(like), layer.bias, None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of core's or of a loader with layers of its own (GGUF)."""
    return hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")


class LoraPair(nn.Module):
    """down `[rank, I]`, up `[O, rank]`: what a LoRA adds to one layer. Up begins at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator, device):
        super().__init__()
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))

    def forward(self, x_BNI: Tensor) -> Tensor:
        return F.linear(F.linear(x_BNI, self.down.to(x_BNI)), self.up.to(x_BNI))


class _Passage:
    """The hooks of one layer. Calls may nest no deeper than one: a linear layer calls none."""

    def __init__(self, layer: nn.Module, pair: LoraPair | None):
        self.pair = pair
        self.given: Tensor | None = None
        self.handles = [layer.register_forward_pre_hook(self.before), layer.register_forward_hook(self.after)]

    def before(self, layer: nn.Module, args: tuple):
        x = args[0]
        passes = torch.is_grad_enabled() and (x.requires_grad or self.pair is not None)
        self.given = x if passes and not layer.weight.requires_grad else None
        return None if self.given is None else (x.detach(), *args[1:])

    def after(self, layer: nn.Module, args: tuple, y: Tensor):
        x, self.given = self.given, None
        if x is None:
            return y if self.pair is None else y + self.pair(args[0])
        if x.requires_grad:
            y = _Through.apply(x, y, layer)
        return y if self.pair is None else y + self.pair(x)


@contextlib.contextmanager
def frozen_linears(model: nn.Module, pairs: Mapping[str, LoraPair] | None = None) -> Iterator[None]:
    """Within this block gradients pass through the linear layers of `model` as said above; on leaving, hooks are gone.

    pairs: LoRAs by the names of the layers they add to. Layers whose weight is trained are left as they are.
    """
    pairs = pairs or {}
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    passages = [_Passage(layer, pairs.get(name)) for name, layer in linears.items()]
    try:
        yield
    finally:
        for passage in passages:
            for handle in passage.handles:
                handle.remove()
