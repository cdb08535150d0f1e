"""Direct Forcing's head on a MODEL: the last modulation and output layer, as patches that core adds to the weights.

A head is put on as a difference, whichever form its file has. So a strength of s moves the base s of the way to the
trained head, LoRAs on the same layers add to it in either order, and taking the model off the device restores the base
bit for bit. Source: reference/memorypack.md section 3.2, stage 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.utils
import torch
from torch import Tensor

from .base_signature import MODEL_PREFIX
from .memory_file import DIFFERENCE, LOAD_DIRECT_FORCING, LOAD_MEMORY, MemoryFile, MemoryFileError
from .provenance import MODEL_OPTION
from .sources import LOAD_MODEL

# In model_options[MODEL_OPTION]: the heads that are on a MODEL, (fingerprint, strength) each.
HEADS = "heads"
SHOWN = 8


@dataclass(frozen=True)
class HeadPatch:
    """What was put on. changed: by how much each tensor differs at strength 1, as a share of the base's norm.

    before: the heads that were on the MODEL already, (fingerprint, strength).
    """

    changed: Mapping[str, float]
    before: tuple[tuple[str, float], ...]


def apply_head(patcher, file: MemoryFile, strength: float) -> tuple[object, HeadPatch]:
    """(a clone of the MODEL with the head of `file` at `strength`, what that changes). `patcher` is not changed.

    Raises MemoryFileError where the shapes differ, or where a whole new head is to replace weights that are kept in a
    packed format whose numbers cannot be read, and for files of frame preservation.
    """
    if file.frames:
        raise MemoryFileError(
            f"{file.name} holds a memory of frame preservation and no head. Load it with '{LOAD_MEMORY}', or choose "
            f"another file in '{LOAD_DIRECT_FORCING}'."
        )
    clone = patcher.clone()
    patches, changed = {}, {}
    for name, given in file.head.items():
        key = f"{MODEL_PREFIX}{name}"
        base = _numbers(patcher, key)
        if base is not None and base.shape != given.shape:
            raise MemoryFileError(
                f"{file.name}: {name} is {list(given.shape)}, and this MODEL's is {list(base.shape)}. The file is for "
                f"a base of another width; load that base in '{LOAD_MODEL}'."
            )
        if file.head_form == DIFFERENCE:
            difference = given.float()
        elif base is None:
            raise MemoryFileError(
                f"This MODEL keeps {name} in a packed format, so the head of {file.name} cannot take its place. Load a "
                f"file that keeps the output layer in full in '{LOAD_MODEL}' (bf16 or fp8)."
            )
        else:
            difference = given.float() - base
        patches[key] = ("diff", (difference,))
        changed[name] = float(difference.norm() / base.norm().clamp_min(1e-12)) if base is not None else float("nan")
    known = dict(patcher.model_options.get(MODEL_OPTION, {}))
    before = tuple(known.get(HEADS, ()))
    if strength:
        taken = set(clone.add_patches(patches, strength))
        lost = [key for key in patches if key not in taken]
        if lost:
            raise MemoryFileError(f"ComfyUI did not take the head of {file.name}: this MODEL has no {lost[0]}.")
        said = {**known, HEADS: (*before, (fingerprint(file), strength))}
        clone.model_options = {**clone.model_options, MODEL_OPTION: said}
    return clone, HeadPatch(changed, before)


def fingerprint(file: MemoryFile) -> str:
    """A few hex digits of a file's head, the same under any file name."""
    digest = hashlib.sha256(file.head_form.encode())
    for name in sorted(file.head):
        digest.update(file.head[name].detach().float().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:SHOWN]


def _numbers(patcher, key: str) -> Tensor | None:
    """The base's own tensor in fp32 on the CPU without its patches; None where its format hides its numbers."""
    held = patcher.backup[key].weight if key in patcher.backup else comfy.utils.get_attr(patcher.model, key)
    shape = held.shape
    held = held.dequantize() if hasattr(held, "_qdata") else held.detach()
    value = held.to("cpu", torch.float32)
    # Loaders of packed files hand out bytes under the shape of what they stand for.
    whole = value.shape == shape and value.reshape(-1).shape[0] == shape.numel() and held.dtype.is_floating_point
    return value if whole else None
