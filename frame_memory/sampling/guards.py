"""Checks at a section's end: nothing silently wrong goes on into the history."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ..model.families import loader_of
from .experts import low_noise_of

# Key of our wrapper in a MODEL's options.
TOLD = "frame_memory attention"


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


def with_attention(model_options: dict, override: Callable) -> dict:
    """A copy of `model_options` with another attention, as ComfyUI calls it; every other option is kept."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    transformer["optimized_attention_override"] = override
    if not comfy.patcher_extension.get_wrappers_with_key(WrappersMP.APPLY_MODEL, TOLD, transformer):
        comfy.patcher_extension.add_wrapper_with_key(WrappersMP.APPLY_MODEL, TOLD, _tell_the_graph, transformer)
    return options


def without_attention(model_options: dict) -> dict:
    """A copy of `model_options` without what `with_attention` has put there."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options["transformer_options"]
    del transformer["optimized_attention_override"]
    wrappers = transformer.get("wrappers", {})
    wrappers.get(WrappersMP.APPLY_MODEL, {}).pop(TOLD, None)
    if not wrappers.get(WrappersMP.APPLY_MODEL, True):  # an empty one would be another MODEL to a project
        del wrappers[WrappersMP.APPLY_MODEL]
    if not transformer.get("wrappers", True):
        del transformer["wrappers"]
    return options


def _tell_the_graph(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
):  # fmt: skip
    """Call a compiled network with a keyword that names its attention.

    Core's TorchCompileModel drops every guard on `transformer_options`, so that a graph would serve all attentions
    that come after the one it was captured with. A keyword of another name is a graph of its own.
    """
    options = transformer_options or {}
    network = executor.class_obj.diffusion_model
    takes = inspect.signature(getattr(network, "_orig_mod", network).forward).parameters.values()
    compiled = COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if compiled and any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        kwargs[f"attention: {attention_name(options.get('optimized_attention_override'))}"] = True
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def with_safe_attention(model_options: dict) -> dict:
    """A copy of `model_options` whose attention is plain PyTorch."""
    return with_attention(model_options, _plain_attention)


def made_safe(guider) -> tuple[Any, str]:
    """A copy of a GUIDER with plain attention and numbers that reach further, and what is other in these, in words.

    It is not compiled: a graph holds the attention that it was captured with. Of two experts both are made so.
    """
    safe = copy.copy(guider)
    patcher, words = with_safe_numbers(guider.model_patcher)
    if patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
        patcher = patcher.clone()
        patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        words = " and ".join(filter(None, [words, "without torch.compile"]))
    safe.model_patcher = patcher
    safe.model_options = with_safe_attention(guider.model_options)
    low = low_noise_of(guider)
    if low is not None:
        safe.low, other = made_safe(low)
        words = words or other
    return safe, words


def with_safe_numbers(patcher) -> tuple[Any, str]:
    """A clone of a MODEL that overflows less easily, and what is other in it, in words; the MODEL itself and "" where
    nothing can be safer.

    float16 becomes bfloat16 where core says the device does it, else float32; quantised matrix products, whose inputs
    are rounded too, become products in that format. The MODEL that is given stays as it is.
    """
    quantised = [name for name, module in patcher.model.named_modules() if _multiplies_quantised(module)]
    words, clone = [], patcher
    if quantised:
        clone = patcher.clone()
        for name in quantised:  # a layer with a function on its weight is computed in full by core
            clone.add_weight_wrapper(f"{name}.weight", _as_it_is)
        words.append("without quantised matrix products")
    cast = patcher.get_model_object("manual_cast_dtype")
    if (patcher.model_dtype() if cast is None else cast) == torch.float16:
        bf16 = comfy.model_management.should_use_bf16(patcher.load_device)
        dtype = torch.bfloat16 if bf16 else torch.float32
        clone = patcher.clone() if clone is patcher else clone
        clone.set_model_compute_dtype(dtype)
        words.append(f"computed in {str(dtype).removeprefix('torch.')} in the place of float16")
    return clone, " and ".join(words)


def _multiplies_quantised(module) -> bool:
    """Whether core multiplies a layer's inputs in fp8 or another quantised format."""
    if isinstance(module, comfy.ops.fp8_ops.Linear):
        return module.weight.dtype == torch.float8_e4m3fn
    return getattr(module, "layout_type", None) is not None and not getattr(module, "_full_precision_mm", True)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def attention_name(override: Callable | None = None) -> str:
    """The attention backend the host has chosen, or the one in its place, for messages."""
    if override is not None:
        return getattr(override, "label", None) or getattr(override, "__qualname__", type(override).__name__)
    from comfy.ldm.modules.attention import optimized_attention

    return getattr(optimized_attention, "__name__", "unknown").replace("attention_", "")


def out_of_memory(patcher, shape: tuple[int, ...], number: int, done: int, sections: int, kept: bool) -> str:
    """What an artist can do when a section does not fit: needed and free memory, what is kept, cheaper settings.

    shape: of the window, `[B, C, T, H, W]`. number: the section's place in the video; done: how many are finished.
    """
    device = patcher.load_device
    needed = patcher.model_size() + patcher.model.memory_required(list(shape))
    free = comfy.model_management.get_free_memory(device)
    there = f"{done} of {sections} sections are finished and kept: queue again to go on there." if kept else ""
    return (
        f"Out of memory while sampling section {number} of {sections} on {device}: model and one step may "
        f"need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free now. {there} Cheaper: a smaller picture in "
        f"'start' ('size' of 'FramePack Image'); an fp8 checkpoint, or weight_dtype fp8_e4m3fn in "
        f"'{loader_of(patcher)}'; a schedule with fewer frames at full rate in 'Frame Context Packer'."
    )
