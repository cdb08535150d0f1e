"""Checks at a section's end: nothing silently wrong goes on into the history."""

from __future__ import annotations

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor


class SectionError(RuntimeError):
    """A section came out unusable."""


def broken_share(latent: Tensor) -> float:
    """Share of values that are NaN or infinite."""
    return float((~torch.isfinite(latent)).float().mean())


def _plain_attention(func, *args, **kwargs):
    return attention_pytorch(*args, **kwargs)


def with_safe_attention(model_options: dict) -> dict:
    """A copy of `model_options` whose attention is plain PyTorch; every other option is kept."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = dict(options.get("transformer_options", {}))
    transformer["optimized_attention_override"] = _plain_attention
    options["transformer_options"] = transformer
    return options


def attention_name() -> str:
    """The attention backend the host has chosen, for messages."""
    from comfy.ldm.modules.attention import optimized_attention

    return getattr(optimized_attention, "__name__", "unknown").replace("attention_", "")
