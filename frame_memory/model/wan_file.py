"""Files of models/frame_memory that hold Wan's patchifiers for frames of history, and a MODEL that takes them.

Safetensors only: `wan_frame_context.*` (names of `wan.Patchifiers`), and in the metadata the base that they were
trained on, so that another base, width or kind of file is refused. What was trained on the base's own blocks beside
them is a LoRA, in a file of its own.
Source: design.md section 7.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plan import BESIDE_MEMORY, WAN_PRESET, trained_on
from ..plan.errors import PACKER
from . import tensor_file, wan
from .base_signature import Base
from .families import PATCHIFIERS, SCHEDULE, TRAINED, check_running_wan, said
from .memory_file import (
    FORMAT,
    OURS,
    WAN_PREFIX,
    MemoryFileError,
    check_finite,
    check_format,
    damaged,
    plain_data,
    shown,
)
from .provenance import LORAS, MODEL_OPTION, loras_of
from .sources import LOAD_WAN, TRAIN_CONTEXT, WAN_CONTEXT

KIND = "wan_frame_context"
NEW = "new (untrained)"


@dataclass(frozen=True)
class PatchifierFile:
    """What a file holds, in RAM. tensors: by the names of `wan.Patchifiers`. recipe: how it was trained, plain data."""

    path: str
    base: Base
    tensors: Mapping[str, Tensor] = field(repr=False)
    recipe: Mapping = field(default_factory=dict)
    licence: str = ""

    @property
    def name(self) -> str:
        """The file's name, for people."""
        return os.path.basename(self.path)

    @property
    def schedule(self) -> str:
        """The schedule that it was trained on; empty where it does not say."""
        return str(self.recipe.get("schedule") or "")

    def check_base(self, base: Base) -> str:
        """Raise MemoryFileError, naming both fingerprints, unless the file belongs to `base`; else how it was told."""
        wrong = self.base.difference(base)
        if wrong:
            raise MemoryFileError(
                f"{self.name} was trained on another base than this MODEL: {wrong}. The file's base is {self.base}; "
                f"this MODEL is {base}. Load the base that the file was trained on in '{LOAD_WAN}', or choose a file "
                f"for this one in '{WAN_CONTEXT}'."
            )
        return self.base.certainty(base)


def write(path: str, base: Base, patchifiers: Mapping[str, Tensor], *, recipe: Mapping | None = None,
          licence: str = "", dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """Write patchifiers, by the names of their state dict; `path` appears, or is replaced, only when all of it is on
    the disk.

    dtype: of the numbers on disk. Raises MemoryFileError for numbers that are not finite, FileError (tensor_file) where
    the disk refuses.
    """
    if not path.lower().endswith(".safetensors"):
        raise MemoryFileError(f"Files of patchifiers are .safetensors files, not {os.path.basename(path)}.")
    tensors = {WAN_PREFIX + name: value.detach().to(dtype) for name, value in patchifiers.items()}
    check_finite(path, tensors)
    metadata = {
        "format": FORMAT, "kind": KIND, **base.to_metadata(), "recipe": json.dumps(dict(recipe or {})),
        "licence": licence,
    }  # fmt: skip
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    tensor_file.write(path, tensors, {**{OURS + k: v for k, v in metadata.items() if v}, "format": "pt"})


def read(path: str) -> PatchifierFile:
    """Read a file of patchifiers into RAM.

    Raises FileError for a file that is damaged or no safetensors file (nothing is unpickled), MemoryFileError for one
    that is whole but holds something else, a newer format, or numbers that are not finite.
    """
    entries, metadata = tensor_file.read_header(path, WAN_CONTEXT)
    said_by_file = {k.removeprefix(OURS): v for k, v in metadata.items() if k.startswith(OURS)}
    left = [name for name in entries if not name.startswith(WAN_PREFIX)]
    if left:
        raise MemoryFileError(
            f"{path} holds {shown(left)}. Expected patchifiers that were trained for a Wan model. Choose another file "
            f"in '{WAN_CONTEXT}'."
        )
    check_format(path, said_by_file, WAN_CONTEXT, (KIND,))
    base = Base.from_metadata(said_by_file)
    if base is None:
        raise damaged(path, "its metadata does not say which base it was trained on", WAN_CONTEXT)
    tensors = {name.removeprefix(WAN_PREFIX): entry.read() for name, entry in entries.items()}
    check_finite(path, tensors)
    recipe = plain_data(path, said_by_file, "recipe", WAN_CONTEXT) if "recipe" in said_by_file else {}
    return PatchifierFile(path, base, tensors, recipe, said_by_file.get("licence", ""))


def with_file(model_patcher, held: PatchifierFile) -> tuple[object, list[str]]:
    """(a clone of a MODEL that takes history through a file's patchifiers, lines for people); the MODEL stays as it is.

    Raises ValueError as `check_running_wan` does, MemoryFileError for a file of another base or other shapes.
    """
    network = check_running_wan(model_patcher)
    fits = held.check_base(Base.of(model_patcher))
    patchifiers = wan.Patchifiers(network.out_dim, network.dim)
    wanted = {name: tuple(value.shape) for name, value in patchifiers.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in held.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise damaged(held.path, f"{name} is {given.get(name, 'missing')}, expected {wanted.get(name)}", WAN_CONTEXT)
    patchifiers.load_state_dict(dict(held.tensors))
    lines = [f"{held.name}: patchifiers at 1x, 2x and 4x", fits]
    if held.schedule:
        lines.append(trained_on(held.schedule))
    return _noted(model_patcher, patchifiers, {
        PATCHIFIERS: held.name, TRAINED: True, SCHEDULE: held.schedule, LORAS: loras_of(held.recipe),
    }), [*lines, f"Licence: {held.licence or 'the file does not say'}"]  # fmt: skip


def with_new(model_patcher) -> tuple[object, list[str]]:
    """The same with fresh patchifiers, which embed history as the base embeds given frames. Raises ValueError as
    `check_running_wan` does."""
    check_running_wan(model_patcher)
    patchifiers = wan.patchifiers_of(model_patcher)
    lines = [
        "UNTRAINED: new patchifiers, which embed the mean of a cell as this MODEL's own embed a frame. It was never "
        f"taught to read history, and sections will not follow one another well. '{TRAIN_CONTEXT}' teaches it, on "
        f"preset '{WAN_PRESET}' in '{PACKER}'; for stage 2 of a memory of frame preservation choose '{BESIDE_MEMORY}'."
    ]
    return _noted(model_patcher, patchifiers, {PATCHIFIERS: NEW, TRAINED: False, SCHEDULE: "", LORAS: ()}), lines


def _noted(model_patcher, patchifiers: wan.Patchifiers, notes: Mapping):
    made = wan.attach(
        model_patcher, wan.patcher_of(patchifiers.eval().requires_grad_(False), model_patcher.load_device)
    )
    made.model_options = {**made.model_options, MODEL_OPTION: {**said(model_patcher), **notes}}
    return made
