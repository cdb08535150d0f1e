"""Nodes of the family "memory_models": public weights that pack their history on Wan."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from ..frame_memory.model import checkpoint, helios
from ..frame_memory.model.sources import LOAD_MEMORY_MODEL
from .model_inputs import DIFFUSION_MODELS, DTYPES, model_file, number_format
from .shown import show


class FrameMemoryLoadMemoryModel(io.ComfyNode):
    """Read a published Helios as a core MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryLoadMemoryModel",
            display_name=LOAD_MEMORY_MODEL,
            category="model/loaders",
            description=(
                "Loads Helios, a Wan model with a memory of its own, from its diffusers files as a normal MODEL of "
                "Wan's kind: LoRA, ModelSampling, torch.compile, caching and offloading nodes work on it."
            ),
            search_aliases=["helios", "wan long video", "wan memory", "load diffusion model", "apache video model"],
            inputs=[model_file("several shards"), number_format("28 GB to 14 GB")],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Helios as ComfyUI's MODEL, which takes finished frames beside the noise. Set Frame "
                    "Context Packer to 'Helios'.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Layout, number formats, tensors and bytes of the checkpoint, and its rules.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(DIFFUSION_MODELS, model_name)
        model = helios.load_helios(path, DTYPES[weight_dtype])
        info = helios.inspect(path)
        kept = checkpoint.in_memory(model, info, weight_dtype)
        report = "\n".join([f"{model_name}: Helios", *info.report(), *kept, helios.RULES])
        show(cls, report)
        return io.NodeOutput(model, report, ui=ui.PreviewText(report))


NODES = [FrameMemoryLoadMemoryModel]
