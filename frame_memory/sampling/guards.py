"""Checks at a section's end: nothing silently wrong goes on into the history."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ..plan import Section


class SectionError(RuntimeError):
    """A section came out unusable."""


def broken_share(latent: Tensor) -> float:
    """Share of values that are NaN or infinite."""
    return float((~torch.isfinite(latent)).float().mean())


class BrokenStep:
    """Which step of a section first gave a value that is not finite; `step` is None as long as all were."""

    def __init__(self):
        self.step: int | None = None

    def see(self, step: int, estimate: Tensor) -> None:
        """step: from 1. estimate: the step's x0."""
        if self.step is None and not bool(torch.isfinite(estimate).all()):
            self.step = step

    def describe(self, steps: int) -> str:
        """A phrase for messages."""
        return "after the last step" if self.step is None else f"at step {self.step} of {steps}"


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


def out_of_memory(patcher, shape: tuple[int, ...], section: Section, sections: int, kept: bool) -> str:
    """What an artist can do when a section does not fit: needed and free memory, what is kept, cheaper settings.

    shape: of the window, `[B, C, T, H, W]`.
    """
    device = patcher.load_device
    needed = patcher.model_size() + patcher.model.memory_required(list(shape))
    free = comfy.model_management.get_free_memory(device)
    done = f"{section.index} of {sections} sections are finished and kept: queue again to go on there." if kept else ""
    return (
        f"Out of memory while sampling section {section.index + 1} of {sections} on {device}: model and one step may "
        f"need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free now. {done} Cheaper: a smaller 'size' in "
        "'FramePack Image'; an fp8 checkpoint, or weight_dtype fp8_e4m3fn in 'Load FramePack Model'; a schedule with "
        "fewer frames at full rate in 'Frame Context Packer'."
    )
