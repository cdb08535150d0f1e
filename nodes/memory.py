"""Nodes of the family "memory": encoders from files or new ones, and what they remember of prompt and picture."""

from __future__ import annotations

import os
from functools import lru_cache

import folder_paths
from comfy_api.latest import io, ui

from ..frame_memory.model import memory_file
from ..frame_memory.model.memory import (
    LOAD_MEMORY,
    MEMORY_PACK,
    MemoryMismatch,
    attach,
    check_fits,
    new_encoder,
    of_kind,
    with_features_of,
)
from ..frame_memory.model.preserved_memory import check_memory, memory_of, new_memory
from ..frame_memory.model.sources import LOAD_MODEL, LOAD_WAN
from ..frame_memory.plan.preservation import PRESERVATION, RATES
from .shown import show
from .sockets import FrameMemorySocket

NEW = "new (untrained)"
# New encoders of frame preservation, and their rates.
NEW_FRAMES = {
    f"new frame preservation {' + '.join(rates)} (untrained)": rates
    for rates in (("4x4x2",), *((rate,) for rate in RATES if rate != "4x4x2"), ("4x4x2", "2x2x8"))
}


def file_names(*kinds: str) -> list[str]:
    """Files of models/frame_memory but those that say that they are of no such kind: what cannot be read is listed, and
    refused in words. None where the pack's folder is not registered (yet)."""
    known = memory_file.FOLDER in folder_paths.folder_names_and_paths
    names = folder_paths.get_filename_list(memory_file.FOLDER) if known else []
    paths = {name: str(folder_paths.get_full_path(memory_file.FOLDER, name)) for name in names}
    return [name for name, path in paths.items() if _kind_of(path, state_of_file(name)) in ("", *kinds)]


@lru_cache(maxsize=1024)  # the editor asks for the list again and again
def _kind_of(path: str, state: str) -> str:
    return memory_file.kind_said(path)


def state_of_file(name: str) -> str:
    """What changes when a file of models/frame_memory is saved again; empty where there is none of that name."""
    path = folder_paths.get_full_path(memory_file.FOLDER, name)
    return "" if path is None else f"{os.path.getmtime(path)} {os.path.getsize(path)}"


class FrameMemoryLoadEncoder(io.ComfyNode):
    """A memory encoder from a file, or a fresh one that is to be trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryLoadEncoder",
            display_name=LOAD_MEMORY,
            category="model/loaders",
            description=(
                "Loads a memory encoder: SemanticPack, which sums up the video so far in a few hundred tokens, or "
                "frame preservation, which keeps its frames in few tokens each. A new one knows nothing until you "
                "train it, and the node says so."
            ),
            search_aliases=["memorypack", "semanticpack", "long term memory", "psi", "pfp", "tinyhistory"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=[NEW, *NEW_FRAMES, *file_names(*memory_file.KINDS)],
                    default=NEW,
                    tooltip=(
                        "File in models/frame_memory (safetensors only), or a new, untrained encoder, which needs "
                        "'model': SemanticPack, or frame preservation at height x width x time patches a token."
                    ),
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "FramePack-F1, or Wan for frame preservation. Needed for a new encoder, which begins with this "
                        "MODEL's own embedders. With a file: checks now that the two belong together."
                    ),
                ),
            ],
            outputs=[
                FrameMemorySocket.Output(
                    display_name="memory",
                    tooltip="The encoder, for MemoryPack Encoder, Frame Preservation Encoder or a node that trains it.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Kind, size and variant of the encoder, its base, trained or not."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name, **_):
        """A file that was trained on and saved again under its name is read again."""
        return state_of_file(encoder_name)

    @classmethod
    def execute(cls, encoder_name, model=None) -> io.NodeOutput:
        lines = []
        if encoder_name in (NEW, *NEW_FRAMES):
            if model is None:
                other = f" or, of Wan, '{LOAD_WAN}'" if encoder_name in NEW_FRAMES else ""
                raise MemoryMismatch(
                    f"'{LOAD_MEMORY}' makes a new encoder to the measure of a MODEL, and 'model' is not connected. "
                    f"Connect '{LOAD_MODEL}'{other}, or choose a file in 'encoder_name'."
                )
            rates = NEW_FRAMES.get(encoder_name)
            memory = new_encoder(model) if rates is None else new_memory(model, *rates)
        else:
            path = folder_paths.get_full_path_or_raise(memory_file.FOLDER, encoder_name)
            memory = memory_of(memory_file.read(path, LOAD_MEMORY), LOAD_MEMORY, model)
            if model is not None:
                lines.append(check_memory(memory, model, LOAD_MEMORY))
        report = "\n".join([memory.describe(), *lines])
        show(cls, report)
        return io.NodeOutput(memory, report, ui=ui.PreviewText(report))


class FrameMemoryMemoryPack(io.ComfyNode):
    """Tell a memory what the video is about, and let the MODEL bring it along."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryMemoryPack",
            display_name=MEMORY_PACK,
            category="model/conditioning/framepack",
            description=(
                "Anchors a memory to the prompt and the start picture, and attaches its encoder to the MODEL, so that "
                "ComfyUI loads and unloads the two together. Connect both outputs: MODEL to the guider, memory to "
                "Anti-Drift Sampler."
            ),
            search_aliases=["memorypack", "semanticpack", "long term memory", "psi", "pack and force your memory"],
            inputs=[
                io.Model.Input("model", tooltip="FramePack-F1, LoRAs and all. It is not changed; a copy is returned."),
                FrameMemorySocket.Input(
                    "memory",
                    tooltip="From Load Memory Encoder or Load Direct Forcing Checkpoint. Another base is refused.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=(
                        "The prompt the memory starts with: 'positive' of FramePack Image, which carries what CLIP "
                        "vision saw of the start picture."
                    ),
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip=(
                        "What CLIP vision saw of the start picture, from CLIP Vision Encode. Only needed where "
                        "'conditioning' does not carry it."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the encoder attached, for the guider."),
                FrameMemorySocket.Output(
                    display_name="memory", tooltip="The anchored memory, for Anti-Drift Sampler's 'memory'."
                ),
                io.String.Output(
                    display_name="report", tooltip="Which base and variant, the gate, and what the memory begins with."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, memory, conditioning, clip_vision_output=None) -> io.NodeOutput:
        memory = of_kind(memory, memory_file.SEMANTIC_PACK, MEMORY_PACK, PRESERVATION)
        fits = check_fits(memory, model, MEMORY_PACK)
        anchored, words = with_features_of(memory, conditioning, clip_vision_output)
        report = "\n".join([anchored.describe(), fits, words])
        show(cls, report)
        return io.NodeOutput(attach(model, anchored), anchored, report, ui=ui.PreviewText(report))


NODES = [FrameMemoryLoadEncoder, FrameMemoryMemoryPack]
