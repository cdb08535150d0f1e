"""Rounding that torch.compile keeps: the code it generates computes in fp32 and leaves out casts down and up again."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in fp32, rounded to what a number format can hold; no gradient. One op for torch.compile."""
    # By its name: a second copy of the pack registers it anew, and torch then destroys what this module had registered.
    return torch.ops.frame_memory.rounded_to(x, dtype)


@torch.library.custom_op("frame_memory::rounded_to", mutates_args=(), schema="(Tensor x, ScalarType dtype) -> Tensor")
def _rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(torch.float32, copy=True)


@_rounded_to.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)
