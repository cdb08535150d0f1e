"""What weights are told by, and which LoRAs a file was trained with: so that a run says which of them is missing.

A file of ours names in its recipe the LoRA that was trained beside it, and those that lay on the MODEL already and that
a file given to the training named. A LoRA is found on a MODEL by its numbers, whatever node has put it there.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .sources import LOAD_LORA

# In a recipe, and in what a loader notes on a MODEL.
LORAS = "loras"
# In model_options: what its loader knows of a MODEL, of FramePack {"kind": "F0" or "F1", "base": family of latents}.
MODEL_OPTION = "frame_memory"
# In a MODEL's injections, by core's bypass loader.
BYPASS = "bypass_lora"
SHOWN = 8
_NUMBERS = 64
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """A few hex digits that change with weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        flat = value.detach().reshape(-1)
        numbers = flat[:: max(flat.numel() // _NUMBERS, 1)].float().cpu().contiguous().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + numbers.tobytes())
    return digest.hexdigest()[:SHOWN]


@dataclass(frozen=True)
class NamedLora:
    """A LoRA of ours. name: of its file. fingerprint: of its first pair of matrices."""

    name: str
    fingerprint: str

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor]) -> NamedLora:
        """From a file's tensors, by the names of `Trained.lora`."""
        layer = min(key for key in tensors if key.endswith(_DOWN)).removesuffix(_DOWN)
        return cls(name, _pair(tensors[layer + _UP], tensors[layer + _DOWN]))


def with_loras(recipe: Mapping, loras: Sequence[NamedLora]) -> dict:
    """A recipe that names the LoRAs that a file was trained with."""
    return {**recipe, LORAS: [asdict(lora) for lora in loras]} if loras else dict(recipe)


def loras_of(recipe: Mapping) -> tuple[NamedLora, ...]:
    """The LoRAs that a recipe names; none where it says nothing of them, or in words that cannot be read."""
    try:
        return tuple(NamedLora(str(said["name"]), str(said["fingerprint"])) for said in recipe.get(LORAS, ()))
    except (TypeError, KeyError):
        return ()


def present(loras: Sequence[NamedLora], *models) -> tuple[NamedLora, ...]:
    """Of LoRAs those that lie on at least one of several MODELs (ModelPatchers), at any strength but 0."""
    if not loras:
        return ()
    entries = [entry for model in models for patches in model.patches.values() for entry in patches]
    entries += [entry for model in models for entry in _bypassing(model)]
    adapters = [patch for strength, patch, *_ in entries if strength and getattr(patch, "name", "") == "lora"]
    there = {_pair(*adapter.weights[:2]) for adapter in adapters}
    return tuple(lora for lora in loras if lora.fingerprint in there)


def _bypassing(model) -> list[tuple[float, Any]]:
    """(strength, adapter) of the LoRAs that core's 'Load LoRA (Bypass)' lets act beside the weights.

    Only the functions that it hands to the MODEL know them.
    """
    known = [inspect.getclosurevars(given.inject).nonlocals for given in model.injections.get(BYPASS, ())]
    hooks = [hook for names in known for hook in getattr(names.get("self"), "hooks", ())]
    return [(hook.multiplier, hook.adapter) for hook in hooks]


def without_their_lora(label: str, loras: Sequence[NamedLora], *models) -> list[str]:
    """A warning where a file's LoRAs are not all on one of the MODELs that it is used with. label: the file's name."""
    found = present(loras, *models)
    missing = [lora.name for lora in loras if lora not in found]
    if not missing:
        return []
    named = ["of the same name in models/loras" if name == label else name for name in missing]
    it, put, is_ = ("it", "that file", "it is") if len(missing) == 1 else ("them", "each of them", "they are")
    return [
        f"{label} was trained together with {' and '.join(f'the LoRA {name}' for name in named)}, and the MODEL does "
        f"not carry {it}, or at strength 0, which is off: one without the other seldom works. Put '{LOAD_LORA}' with "
        f"{put} behind the MODEL's loader and set its strength to 1, unless {is_} merged into the MODEL's own file."
    ]


def _pair(up: Tensor, down: Tensor) -> str:
    return fingerprint_of({"up": up, "down": down})
