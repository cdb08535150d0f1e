"""Wan 2.2 A14B's two experts as one GUIDER: one for high noise, one for low noise, switched inside a section.

The sigmas are cut in two at the boundary and each part is sampled by core's CFGGuider around its own expert, the second
from where the first ended: what two KSampler (Advanced) nodes do. So each expert is loaded, patched and offloaded by
core for its part, and only one has to be in VRAM at a time. Both see the same prompts and context; the tokens of a
memory only go to an expert whose MODEL brings the encoder, since they mean nothing to one that was trained apart.
Source: Wan 2.2's published inference (a step at noise level `boundary` or above is the high expert's).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..model.framepack import FRAME_FEATURES, FRAME_POSITIONS, FRAME_TOKENS
from ..model.memory import is_attached

GUIDER = "Wan Expert Guider"
# Noise levels, 0 to 1, as published for text-to-video and image-to-video.
BOUNDARY_T2V, BOUNDARY_I2V = 0.875, 0.9


class WanExpertGuider(comfy.samplers.CFGGuider):
    """CFG on a high noise MODEL down to `boundary`, from there on a low noise one.

    Its own model and cfg are the high noise expert's; `low` is a GUIDER for the other, whose prompts are not used.
    """

    def __init__(self, high, low, cfg_high: float, cfg_low: float, boundary: float):
        super().__init__(high)
        self.set_cfg(cfg_high)
        self.low = comfy.samplers.CFGGuider(low)
        self.low.set_cfg(cfg_low)
        self.boundary = boundary

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False,
               seed=None):  # fmt: skip
        """As CFGGuider's; `callback` counts the steps of both experts as one row."""
        steps = len(sigmas) - 1
        cut = steps_above(sigmas, self.boundary)
        common = {"denoise_mask": denoise_mask, "disable_pbar": disable_pbar, "seed": seed}
        if cut:
            high = copy.copy(self)
            high.original_conds = _shown_to(self.model_patcher, self.original_conds)
            latent_image = super(WanExpertGuider, high).sample(
                noise, latent_image, sampler, sigmas[: cut + 1], callback=_shifted(callback, 0, steps), **common
            )
            noise = torch.zeros_like(noise)  # it is in the latent now
        if cut == steps:
            return latent_image
        low = copy.copy(self.low)
        low.original_conds = _shown_to(low.model_patcher, self.original_conds)
        return low.sample(noise, latent_image, sampler, sigmas[cut:], callback=_shifted(callback, cut, steps), **common)


def guider_of(high, low, positive, negative, cfgs: tuple[float, float], boundary: float) -> WanExpertGuider:
    """The guider with its prompts. negative: None where both of `cfgs`, the high noise one's first, are 1.

    Raises ValueError where it is missing and would count.
    """
    if negative is None and any(cfg != 1 for cfg in cfgs):
        raise ValueError(
            f"'{GUIDER}' has no negative prompt, and with cfg_high {cfgs[0]:g} and cfg_low {cfgs[1]:g} it needs one. "
            "Connect 'negative' (a CLIP Text Encode, its text may be empty), or set both to 1."
        )
    guider = WanExpertGuider(high, low, *cfgs, boundary)
    # Samplers of the kind *_cfg_pp compute the negative even at cfg 1; the positive in its place is no guidance.
    guider.set_conds(positive, positive if negative is None else negative)
    return guider


def _shown_to(model_patcher, conds: Mapping) -> Mapping:
    """Prompts by name as an expert sees them: without the tokens of a memory whose encoder its MODEL does not bring."""
    if is_attached(model_patcher):
        return conds
    return {name: [_without_memory(entry) for entry in entries] for name, entries in conds.items()}


def _without_memory(entry: Mapping) -> Mapping:
    carried = entry.get("model_conds", {})
    if FRAME_TOKENS not in carried:
        return entry
    left = {name: cond for name, cond in carried.items() if name not in (FRAME_TOKENS, FRAME_POSITIONS, FRAME_FEATURES)}
    return {**entry, "model_conds": left}


def steps_above(sigmas: Tensor, boundary: float) -> int:
    """How many steps begin at noise level `boundary` or above. sigmas: from noise to none, one more than steps."""
    return int((sigmas[:-1] >= boundary).sum())


def _shifted(callback: Callable | None, first: int, steps: int) -> Callable | None:
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(first + step, x0, x, steps)


def low_noise_of(guider) -> comfy.samplers.CFGGuider | None:
    """The GUIDER of the low noise expert inside a GUIDER of two; None in any other."""
    return guider.low if isinstance(guider, WanExpertGuider) else None


def models_of(guider) -> dict[str, Any]:
    """The MODELs of a GUIDER by what comes before their name for people: "" for the only or high noise one."""
    low = low_noise_of(guider)
    return {"": guider.model_patcher, **({} if low is None else {"low noise ": low.model_patcher})}
