"""Gradients through core's transformer blocks, without touching core.

HunyuanVideo's blocks add their residuals in place, which spoils what the norms saved for the backward pass, and core's
rotary kernel has no autograd formula (reference/comfyui-host.md section 6). Both have a seam: a norm may work on a copy
of its input, and an attention patch may apply the rotation itself. Wan's attention lets nobody in before it rotates, so
there the rotation stays core's, and a hook gives it its gradient.

Shape legend: B batch, A heads, N tokens, D width, F rotary frequencies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.wan.model import WanSelfAttention
from torch import Tensor, nn

from ..model.packing import rotate


def rotate_patch(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, **kwargs) -> dict:
    """HunyuanVideo's `attn1_patch`: do the rotation here and leave none for core."""
    return {"q": rotate(q, pe), "k": rotate(k, pe), "v": v, "pe": None}


def training_options() -> dict:
    """`transformer_options` for a forward pass of HunyuanVideo's network that will be differentiated."""
    return {"patches": {"attn1_patch": [rotate_patch]}}


class _Turned(torch.autograd.Function):
    """Queries or keys as core rotated them, and the gradient of what they were before."""

    @staticmethod
    def forward(ctx, before_BND: Tensor, turned_BND: Tensor, pe: Tensor) -> Tensor:
        ctx.save_for_backward(pe)
        return turned_BND.view_as(turned_BND)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad_BND,), (pe,) = grads, ctx.saved_tensors
        by_head = grad_BND.unflatten(-1, (-1, 2 * pe.shape[-3]))
        return rotate(by_head, pe.transpose(-1, -2)).flatten(2), None, None


class _Rotation:
    """The hooks of one of Wan's self-attentions, which take queries and keys past core's rotation."""

    def __init__(self, attention: Any):
        self.before: dict[str, Tensor] = {}
        self.handles = [
            attention.register_forward_pre_hook(self.enter, with_kwargs=True),
            attention.norm_q.register_forward_hook(partial(self.keep, "q")),
            attention.norm_k.register_forward_hook(partial(self.keep, "k")),
            attention.register_forward_hook(self.leave),
        ]

    def enter(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.before.clear()
        options = {**kwargs["transformer_options"], "optimized_attention_override": partial(self.attend, args[1])}
        return args, {**kwargs, "transformer_options": options}

    def keep(self, name: str, norm: nn.Module, args: tuple, made_BND: Tensor) -> Tensor:
        self.before[name] = made_BND
        return made_BND.detach()

    def attend(self, pe: Tensor, func: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        q, k = (_Turned.apply(self.before.pop(name), made, pe) for name, made in (("q", q), ("k", k)))
        return plain_attention(func, q, k, v, *args, **kwargs)

    def leave(self, attention: nn.Module, args: tuple, made: Tensor) -> None:
        if self.before:
            raise RuntimeError(
                "Wan's attention of this ComfyUI does not ask 'optimized_attention_override', so nothing would be "
                "learned through it. Train with ComfyUI 0.30, and report this."
            )


def plain_attention(func: Callable, *args, **kwargs) -> Tensor:
    """torch's own attention: some that a host can be started with (Sage) have no gradient and do not say so."""
    return attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within this block a backward pass through `model` is exact; hooks are removed on leaving."""
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    handles = [n.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])) for n in norms]
    # The text's attention has the same class for its parent, and no rotation.
    turning = [m for m in model.modules() if isinstance(m, WanSelfAttention) and _rotates(m)]
    handles += [handle for attention in turning for handle in _Rotation(attention).handles]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _rotates(attention: WanSelfAttention) -> bool:
    return type(attention).forward is WanSelfAttention.forward
