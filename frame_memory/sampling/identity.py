"""What decides a section: fingerprints of the model, its patches, the sampler, and all that one section saw.

Weights are fingerprinted by name, shape, dtype and a few dozen of their numbers, spread evenly: another checkpoint or
LoRA differs in nearly every tensor, and reading 13 GB anew would cost more than the section that is resumed.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from ..journal.fingerprint import fingerprint
from ..model.context import layout_of
from ..model.provenance import LORAS, MODEL_OPTION
from ..plan import Section

SAMPLES = 64
SHOWN = 8
DEPTH = 6
# In transformer_options: the drift that a step cache allows, that it is measured, and another attention.
STEP_CACHE, MEASURE, ATTENTION = "frame_memory_step_cache", "frame_memory_measure_cache", "optimized_attention_override"
# By the mapping that they stand in, what is drawn anew at every queue, is left there by a run, or only watches one: not
# what is sampled. Anywhere else the same words may be a setting.
_IGNORED = {
    "transformer_options": {
        "callbacks", "cond_or_uncond", "sample_sigmas", "sigmas", "uuids", "wrappers_cache", MEASURE
    },
    "model_options": {"callbacks"},
    MODEL_OPTION: {LORAS},
    "prompt": {"uuid"},
}  # fmt: skip
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype)


def short(value) -> str:
    """The first hex digits of a fingerprint, for people."""
    return fingerprint(value)[:SHOWN]


def spread(tensor: Tensor) -> tuple:
    """Shape, dtype and evenly spread numbers of a tensor of any kind, quantised ones by their stored values."""
    stored = getattr(tensor, "_qdata", tensor)
    flat = stored.detach().reshape(-1)
    step = max(flat.numel() // SAMPLES, 1)
    numbers = flat[::step][:SAMPLES].contiguous().cpu()
    return tuple(tensor.shape), str(stored.dtype), numbers.view(torch.uint8) if numbers.dtype.itemsize == 1 else numbers


def _kept(value: Mapping, where: str) -> dict:
    """A mapping without what is ignored in one that stands under the name `where`."""
    return {str(k): v for k, v in value.items() if str(k) not in _IGNORED.get(where, ())}


def outline(value, depth: int = DEPTH, where: str = ""):
    """A value as plain data: tensors by `spread`, functions by name, objects by class and plain attributes.

    Objects of other packs hang together with all of ComfyUI; what lies deeper than `depth` is left out. where: the name
    that the value stands under.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return spread(value)
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return {k: outline(v, depth - 1, k) for k, v in _kept(value, where).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [outline(v, depth - 1) for v in value]
        return sorted(items, key=fingerprint) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type)):
        return _outline_of_function(value, depth)
    name = f"{_module_of(type(value))}.{type(value).__qualname__}"
    if isinstance(value, nn.Module):
        return [name, {k: spread(v) for k, v in value.state_dict().items()}]
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    deep = is_dataclass(value) or not type(value).__module__.startswith(("comfy.model_patcher", "comfy.sd"))
    return [name, outline(attributes, depth - 1) if deep else None]


def _module_of(thing) -> str:
    """A class's or function's module, without the folder that ComfyUI puts before the names of a pack's modules.

    So a ComfyUI that was moved, or has this pack under another folder name, finds its sections again.
    """
    module = thing.__module__ or ""
    root = __name__.removesuffix("sampling.identity")
    return f"frame_memory.{module[len(root) :]}" if module.startswith(root) else re.split(r"[\\/]", module)[-1]


def _outline_of_function(function, depth: int):
    name = f"{_module_of(function)}.{getattr(function, '__qualname__', function)}"
    closure = getattr(function, "__closure__", None) or ()
    held = [outline(c.cell_contents, depth - 1) for c in closure if c.cell_contents is not function]
    owner = getattr(function, "__self__", None)
    own = None if owner is None or isinstance(owner, type(torch)) else outline(owner, depth - 1)
    return [name, held, own]


def model_fields(patcher) -> dict[str, str]:
    """Readable identity of a MODEL: its weights, what is patched onto them, and its options."""
    network = patcher.model.diffusion_model
    # Where a LoRA is merged into the weights in memory, core keeps the originals aside; of quantised ones with scales.
    backup = {}
    for key, kept in patcher.backup.items():
        name = key.removeprefix("diffusion_model.")
        backup |= kept.weight.state_dict(name) if hasattr(kept.weight, "_qdata") else {name: kept.weight}
    weights = {k: spread(backup.get(k, v)) for k, v in network.state_dict().items()}
    words = ", ".join(f"{name} {value}" for name, value in named_options(patcher).items())
    options = options_digest(patcher, patcher.model_options)
    dtype = str(patcher.model_dtype()).removeprefix("torch.")
    return {
        "model": f"{type(patcher.model).__name__} {dtype} ({short(weights)})",
        "LoRA and patches": patches_of(patcher) or "none",
        "model options": f"{words} ({options})" if words else options,
    }


def named_options(patcher) -> dict[str, str]:
    """What this pack's nodes have set among a MODEL's options, for people."""
    options = patcher.model_options.get("transformer_options", {})
    named = {"step cache": f"{options[STEP_CACHE]:g}"} if STEP_CACHE in options else {}
    label = getattr(options.get(ATTENTION), "label", None)
    return {**named, "attention": label} if label else named


def options_digest(patcher, options: Mapping) -> str:
    """Fingerprint of `options`, a MODEL's or some of them, and of the parts of it that are replaced."""
    left = _kept(options.get("transformer_options", {}), "transformer_options")
    kept = {k: v for k, v in {**options, "transformer_options": left}.items() if v}
    return short([outline(kept, where="model_options"), outline(patcher.object_patches)])


def patches_of(patcher) -> str:
    """Readable identity of the LoRAs and other patches on a MODEL's weights; empty where there are none."""
    patches = {k: outline(v) for k, v in patcher.patches.items()}
    hooks = {k: v for k, v in getattr(patcher, "hook_patches", {}).items() if v}
    if not patches and not hooks:
        return ""
    return f"{len(patches)} patched tensors ({short([patches, outline(list(hooks.values()))])})"


def encoder_outline(memory) -> list:
    """Everything of a memory's encoder that decides what it remembers, as plain data. memory: FRAME_MEMORY."""
    network = memory.encoder.model
    weights = {name: spread(value) for name, value in network.state_dict().items()}
    patches = {name: outline(value) for name, value in memory.encoder.patches.items()}
    return [weights, patches, memory.to_spec(), str(network.dtype)]


def guider_fields(guider, sampler, sigmas: Tensor) -> dict[str, str]:
    """Readable identity of a GUIDER without its model and prompts, of the SAMPLER and of the SIGMAS."""
    skipped = {"model_patcher", "original_conds", "conds", "model_options", "inner_model", "loaded_models", "low"}
    settings = {k: v for k, v in vars(guider).items() if k not in skipped}
    cfg = getattr(guider, "cfg", None)
    named = getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)
    return {
        "guidance": f"{type(guider).__name__} cfg {cfg:g} ({short(outline(settings))})"
        if isinstance(cfg, (int, float))
        else f"{type(guider).__name__} ({short(outline(settings))})",
        "sampler": f"{named.removeprefix('sample_')} ({short(outline(sampler))})",
        "sigmas": f"{sigmas.shape[0] - 1} steps ({short(sigmas)})",
    }


def prompt_field(conds: Mapping) -> str:
    """Short identity of a guider's prompts; exact numbers, not samples of them."""
    return short(_exact(conds))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _exact(value, depth: int = DEPTH, tensor: Callable[[Tensor], object] = _whole):
    """Plain data as `outline` makes it, but with tensors whole, or as `tensor` gives them."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, Mapping):
        return {k: _exact(v, depth, tensor) for k, v in _kept(value, "prompt").items()}
    if isinstance(value, (list, tuple)):
        return [_exact(v, depth, tensor) for v in value]
    if depth and type(value).__name__ == "Output" and hasattr(value, "__dict__"):
        return _exact(vars(value), depth - 1, tensor)
    return outline(value)


class Digests:
    """Fingerprints of tensors that come up again and again in one run; each is read once as long as it lives.

    Nothing is held on to. A tensor counts as the same while it is the same object, lies in the same place, and a few
    dozen of its numbers are as they were.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, str, str]] = {}

    def __call__(self, tensor: Tensor) -> str:
        look = fingerprint((tensor.data_ptr(), spread(tensor)))
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == look:
            return known[2]
        digest = fingerprint(_whole(tensor))
        self._known[id(tensor)] = (weakref.ref(tensor), look, digest)
        return digest


@dataclass(frozen=True)
class RunIdentity:
    """Everything that all sections of a run share, in words: one field a cause of change. One object a run."""

    fields: Mapping[str, str]
    digest: Digests = field(default_factory=Digests, compare=False)

    def section_key(self, section: Section, conds: Mapping, seen, noise, begin: Tensor | None, seed: int) -> str:
        """Fingerprint of all that decides one section: the run, the prompts, history and noise it saw.

        conds: the guider's entries without the context. seen: what says the context's frames, group by group, exactly.
        noise: what says the noise. begin: `[B, C, T, H, W]`, None for zeros.
        The place in the video is no part of it: the same window of two plans is the same work.
        """
        layout = layout_of(section)
        return fingerprint(
            {
                "run": dict(self.fields),
                "layout": (layout.positions, layout.groups),
                "conds": _exact(conds, tensor=self.digest),
                "context": seen,
                "noise": noise,
                "begin": begin,
                "seed": seed,
            }
        )

    def section_fields(self, conds: Mapping, seed: int) -> dict[str, str]:
        """What decides one section, for people: the run's fields, its prompts and its seed."""
        return {**self.fields, "prompts": short(_exact(conds, tensor=self.digest)), "seed": str(seed)}
