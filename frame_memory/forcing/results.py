"""The files that a training run leaves: a memory file or Wan's patchifiers, and a LoRA where one was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..model import memory_file, tensor_file, wan_file
from ..model.families import said
from ..model.memory import FrameMemory, encoder_from_tensors
from ..model.preserved_memory import PreservedMemory, memory_from_tensors
from ..model.provenance import LORAS, NamedLora, present, with_loras
from .clips import ForcingError
from .stages import LORA
from .training_run import Outcome, TrainingRun

# Under this name a LoRA of ours says which run it is from.
RUN = "frame_memory.run"


@dataclass(frozen=True)
class Result:
    """checkpoint: of models/frame_memory. lora: of models/loras, where there is one. memory: trained, or None."""

    checkpoint: Path
    lora: Path | None
    lora_tensors: dict[str, Tensor]
    memory: FrameMemory | PreservedMemory | None


def write_result(
    run: TrainingRun, outcome: Outcome, name: str, memories: Path, loras: Path, say: Callable[[str], None]
) -> Result:
    """Write `<name>.safetensors`; a file of that name that is of another run is kept, and the new one gets a number.

    Raises FileError where the disk refuses; the run's checkpoint is kept, and another try goes on from there.
    """
    trained, recipe, named = outcome.trained, run.recipe_of(outcome), _inherited(run, outcome)
    head = {n: v.cpu() for n, v in trained.head(outcome.weights).items()}
    given, pack, parts, memory = outcome.memory, trained.memory(outcome.weights), {}, None
    if given is not None:
        own = given.encoder.model.state_dict()
        pack = {n: v.to("cpu", own[n].dtype) for n, v in pack.items()}
        kept = "frames" if given.kind == memory_file.FRAME_PRESERVATION else "pack"
        parts = {kept: pack, "spec": given.to_spec()}
    path = _free(memories, name, recipe["identity"], "frame_memory.recipe", say)
    tensors = {n: v.to("cpu", torch.bfloat16) for n, v in trained.lora(outcome.weights).items()}
    lora, recipe = None, with_loras(recipe, named)
    if LORA in trained.parts:
        lora = _free(loras, name, recipe["identity"], RUN, say)
        lora.parent.mkdir(parents=True, exist_ok=True)
        tensor_file.write(str(lora), tensors, {"format": "pt", RUN: json.dumps(recipe)})
        named = (*named, NamedLora.of(lora.name, tensors))
        recipe = with_loras(recipe, named)
    if patchifiers := trained.patchifiers(outcome.weights):
        wan_file.write(str(path), outcome.base, patchifiers, recipe=recipe)
    else:
        memory_file.write(str(path), outcome.base, **parts, head=head, recipe=recipe)
    if given is not None:
        made = {"label": path.name, "base": outcome.base, "dtype": given.encoder.model.dtype}
        made["load_device"] = given.encoder.load_device
        if isinstance(given, PreservedMemory):
            memory = memory_from_tensors(pack, given.specs, cross=given.cross, recipe=recipe, **made)
        else:
            memory = replace(encoder_from_tensors(pack, given.spec, **made), loras=named)
    return Result(path, lora, tensors, memory)


def _inherited(run: TrainingRun, outcome: Outcome) -> tuple[NamedLora, ...]:
    """The LoRAs of a memory or of patchifiers that were given and that lay on the MODEL while it was trained."""
    given = () if outcome.memory is None else outcome.memory.loras
    known = dict.fromkeys([*said(run.original).get(LORAS, ()), *given])
    return present(tuple(known), run.original)


def _free(folder: Path, name: str, identity: dict, key: str, say: Callable[[str], None]) -> Path:
    """Where a file of this run may be written: its own file of before, or a name that nothing has."""
    for number in range(1, 1000):
        path = folder / (f"{name}.safetensors" if number == 1 else f"{name}_{number}.safetensors")
        if not path.exists() or _made_by(path, key) == identity:
            if number > 1:
                say(f"{name}.safetensors in {folder} is of another run and is kept; this one is {path.name}.")
            return path
    raise ForcingError(f"{folder} has 999 files called {name}. Choose another name.")


def _made_by(path: Path, key: str) -> dict | None:
    try:
        return json.loads(tensor_file.read_header(str(path))[1][key])["identity"]
    except (tensor_file.FileError, KeyError, ValueError, TypeError, OSError):
        return None
