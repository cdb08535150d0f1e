"""One block of attention against PyTorch's own, before a run: a backend wrong for this GPU or head size fails here.

SageAttention, FlashAttention and xformers give black frames or garbage on some pairs of GPU and head size and say
nothing (faults.md 14). Two small calls find that out in milliseconds; minutes of sampling would not say why.

Shape suffixes: B batch, H heads, L tokens, D numbers a head.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.wan.model import WanModel
from torch import Tensor

from .experts import low_noise_of
from .guards import attention_name, with_safe_attention

# A length that is no multiple of a kernel's tile, so that its edge is looked at too.
TOKENS = 333
# SageAttention's 8-bit keys and values are off by 1 to 4 % here, bf16 by 0.4 %; what is broken is off by 30 % or more.
ALLOWED = 0.1
NO_ROOM = "there is no room in memory for the test just now"

# What was found, by backend, head size, number format and device: words only, never tensors.
_found: dict[tuple, str | None] = {}


def checked_attention(guider) -> tuple[Any, list[str]]:
    """The guider, and no warning, where its attention agrees with PyTorch's to 10 % (relative L2 norm of one call).

    Elsewhere a copy of it that uses PyTorch's, and a warning that names backend, device, head size and format. Of two
    experts each is looked at.
    """
    checked, warnings = _checked(guider)
    low = low_noise_of(guider)
    if low is not None:
        safe, more = _checked(low)
        if more:
            checked = copy.copy(checked)
            checked.low = safe
        warnings = list(dict.fromkeys([*warnings, *more]))
    return checked, warnings


@dataclass(frozen=True)
class Place:
    """Where attention is computed: numbers a head, number format and device of a MODEL."""

    head: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, patcher) -> Place:
        """Of a MODEL. Raises ValueError for a network that does not say the size of its heads, as a U-Net."""
        transformer = patcher.model.diffusion_model
        width = transformer.dim if isinstance(transformer, WanModel) else getattr(transformer, "hidden_size", None)
        if width is None or not hasattr(transformer, "num_heads"):
            raise ValueError(
                f"'model' is a {type(transformer).__name__}, whose attention cannot be tested; expected one like "
                "FramePack (HunyuanVideo) or Wan. Leave 'Attention Backend' out."
            )
        return cls(width // transformer.num_heads, patcher.model.get_dtype_inference(), patcher.load_device)

    def __str__(self) -> str:
        return f"{self.device} for heads of {self.head} in {self.dtype}"


def override_of(model_options: dict) -> Callable | None:
    """What takes the place of the host's attention, in `model_options`."""
    return model_options.get("transformer_options", {}).get("optimized_attention_override")


def known_problem(name: str, override: Callable | None, place: Place) -> str | None:
    """`attention_problem`, looked for once for a name, head size, number format and kind of device.

    Out of memory is no property of these: it is looked for again.
    """
    key = (name, place.head, place.dtype, comfy.model_management.get_torch_device_name(place.device))
    if key in _found:
        return _found[key]
    problem = attention_problem(override, place)
    if problem != NO_ROOM:
        _found[key] = problem
    return problem


def _checked(guider) -> tuple[Any, list[str]]:
    place, override = Place.of(guider.model_patcher), override_of(guider.model_options)
    name = attention_name(override)
    if override is not None:  # of another pack, and perhaps made anew for every run under one name: always looked at
        problem = attention_problem(override, place)
    else:
        problem = known_problem(name, None, place)
    if problem is None:
        return guider, []
    safe = copy.copy(guider)
    safe.model_options = with_safe_attention(guider.model_options)
    return safe, [
        f"The attention backend '{name}' is wrong on {place}: {problem}. Plain PyTorch attention is used instead, "
        "which is slower. Update the backend, or start ComfyUI with --use-pytorch-cross-attention."
    ]


def one_call(override: Callable | None, place: Place) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Query, key and value `[1, 2, TOKENS, D]`, and one call on them of the host's attention or of an override."""
    from comfy.ldm.modules.attention import optimized_attention

    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, TOKENS, place.head)
    parts = [torch.randn(shape, generator=generator).to(place.device, place.dtype) for _ in range(3)]
    options = {} if override is None else {"optimized_attention_override": override}
    return parts, lambda: optimized_attention(*parts, heads=2, skip_reshape=True, transformer_options=options)


def attention_problem(override: Callable | None, place: Place) -> str | None:
    """What is wrong with the host's attention, or with an `override` as ComfyUI calls it, in words; None if nothing."""
    parts, call = one_call(override, place)
    expected_BLD = attention_pytorch(*(part.float() for part in parts), heads=2, skip_reshape=True)
    try:
        made_BLD = call()
        finite = bool(torch.isfinite(made_BLD).all())
    except Exception as error:  # whatever a backend raises here, it would raise in the middle of a run
        logging.debug("attention check", exc_info=True)
        if comfy.model_management.is_oom(error):
            return NO_ROOM
        return f"it fails ({str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__})"
    if made_BLD.shape != expected_BLD.shape:
        return f"it gives the shape {list(made_BLD.shape)}, expected {list(expected_BLD.shape)}"
    if not finite:
        return "it gives NaN or infinite values"
    off = float((made_BLD.float() - expected_BLD).norm() / expected_BLD.norm())
    return None if off <= ALLOWED else f"it is off by {off:.0%} of PyTorch's result, at most {ALLOWED:.0%} is expected"
