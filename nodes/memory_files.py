"""Node of the family "memory files": weights that Direct Forcing trained, onto a MODEL and into a memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import folder_paths
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..frame_memory.model import head, memory, memory_file
from ..frame_memory.model.base_signature import Base
from ..frame_memory.model.families import name_of
from ..frame_memory.model.framepack import is_framepack
from ..frame_memory.model.sources import LOAD_MODEL
from .memory import file_names, state_of_file
from .shown import show
from .sockets import FrameMemorySocket

NODE = memory_file.LOAD_DIRECT_FORCING
NO_MEMORY = "'{file}' holds a head only and no memory. Take 'memory' off '{node}', or choose a file that holds both."


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            tooltip=(
                "The FramePack F1 that the file was trained on. It is not changed; a copy is returned. Another base, "
                "width or kind is refused."
            ),
        ),
        io.Combo.Input(
            "file",
            options=file_names(memory_file.DIRECT_FORCING, memory_file.SEMANTIC_PACK),
            tooltip=(
                "File in models/frame_memory (safetensors), made by Train Direct Forcing. A head alone in diffusers "
                "names (norm_out.linear, proj_out) is read too."
            ),
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=-2.0,
            max=2.0,
            step=0.05,
            tooltip=(
                "How far the output layer goes from the base's to the trained one: 0 is the base, 1 the trained one, "
                "0.5 half way. It does not touch the memory, which is on where its output is connected."
            ),
        ),
    ]


class FrameMemoryLoadDirectForcing(io.ComfyNode):
    """Put a Direct Forcing head on a MODEL and hand out the memory that was trained with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryLoadDirectForcing",
            display_name=NODE,
            category="model/loaders",
            description=(
                "Loads what Train Direct Forcing made: a new output layer for a FramePack F1 model, against drift in "
                "long videos, and the memory (SemanticPack) that belongs to it, for MemoryPack Encoder."
            ),
            search_aliases=["direct forcing", "memorypack", "semanticpack", "long video drift", "framepack head"],
            inputs=_inputs(),
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The MODEL with the trained output layer. LoRA nodes before or after it add up with it.",
                ),
                FrameMemorySocket.Output(
                    display_name="memory",
                    tooltip="The file's memory for MemoryPack Encoder. A file without one stops that node with a word.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What the file holds, how it was told that it fits this base, strength, recipe, licence.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        """A file that was trained on and saved again under its name is read again."""
        return state_of_file(file)

    @classmethod
    def execute(cls, model, file, strength=1.0) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(memory_file.FOLDER, file)
        if not is_framepack(model):
            raise ValueError(
                f"'{file}' belongs to a FramePack model, and the MODEL given is {name_of(model)}. Connect "
                f"'{LOAD_MODEL}' to the input 'model' of '{NODE}'."
            )
        held = memory_file.read(path, NODE)
        base = Base.of(model)
        fits = held.check_base(base, NODE)
        patched, patch = head.apply_head(model, held, strength)
        kept = memory.encoder_of(held, NODE, model) if held.pack else None
        report = "\n".join(_report(file, held, fits, strength, patch, kept))
        show(cls, report)
        missing = ExecutionBlocker(NO_MEMORY.format(file=file, node=memory.MEMORY_PACK))
        return io.NodeOutput(patched, kept or missing, report, ui=ui.PreviewText(report))


def _report(
    file: str,
    held: memory_file.MemoryFile,
    fits: str,
    strength: float,
    patch: head.HeadPatch,
    kept: memory.FrameMemory | None,
) -> list[str]:
    lines = [f"{file}: {_contents(held)} ({held.source})", fits]
    if held.head and strength:
        share = math.sqrt(sum(v**2 for v in patch.changed.values()) / len(patch.changed))
        lines.append(
            f"Output layer: 4 of 4 tensors at strength {strength:g}"
            + (f"; at 1 they change by {share:.1%} of their size." if math.isfinite(share) else ".")
        )
    elif held.head:
        lines.append("Output layer: off (strength 0), the base's own.")
    else:
        lines.append("Output layer: none in the file; the MODEL goes on unchanged.")
    for fingerprint, before in patch.before if held.head and strength else ():
        lines.append(
            f"Warning: another head ({fingerprint}, strength {before:g}) is on this MODEL already. They add up; two at "
            "0.5 are their mean."
        )
    lines.append(f"Memory: {kept.describe()}" if kept else "Memory: none in the file.")
    if held.recipe:
        lines.append(_recipe(held.recipe))
    lines.append(f"Licence: {held.licence or 'the file does not say'}")
    return lines


def _contents(held: memory_file.MemoryFile) -> str:
    form = "whole" if held.head_form == memory_file.REPLACEMENT else "as a difference"
    parts = [f"a Direct Forcing head ({form})"] * bool(held.head) + ["a SemanticPack memory"] * bool(held.pack)
    return " and ".join(parts)


def _recipe(recipe: Mapping) -> str:
    """How it was trained, for an artist; what a resume or a twin needs besides stays in the file."""
    said = {k: v for k, v in recipe.items() if not isinstance(v, (Mapping, list))}
    settings = recipe.get("settings")
    if isinstance(settings, Mapping) and "rate" in settings:
        said["rate"] = settings["rate"]
    words = (f"{k.replace('_', ' ')} {f'{v:g}' if isinstance(v, float) else v}" for k, v in said.items())
    return f"Recipe: {', '.join(words)}"


NODES = [FrameMemoryLoadDirectForcing]
