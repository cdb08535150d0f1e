"""Nodes of the family "wan": Wan models that take history, and the two experts of Wan 2.2 in one guider."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from ..frame_memory.model import memory_file, wan_file
from ..frame_memory.model.experts import check_pair
from ..frame_memory.model.sources import WAN_CONTEXT
from ..frame_memory.sampling.experts import BOUNDARY_I2V, BOUNDARY_T2V, GUIDER, guider_of
from .memory import file_names, state_of_file
from .shown import show


class FrameMemoryWanFrameContext(io.ComfyNode):
    """Let a Wan MODEL look at packed frames of history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryWanFrameContext",
            display_name=WAN_CONTEXT,
            category="model/conditioning/framepack",
            description=(
                "Gives a Wan model patchifiers for finished frames, so that Anti-Drift Sampler can show it the packed "
                "history of a long video. The model itself stays as it is; without history it samples as before."
            ),
            search_aliases=["wan long video", "framepack wan", "patchifier", "wan history", "frame context"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "Wan 2.1 or 2.2 (text or image to video, A14B, 5B) from Load Diffusion Model, LoRAs and all. "
                        "It is not changed; a copy is returned. Of A14B each expert needs this node."
                    ),
                ),
                io.Combo.Input(
                    "file",
                    options=[wan_file.NEW, *file_names(wan_file.KIND)],
                    default=wan_file.NEW,
                    tooltip=(
                        "Trained patchifiers in models/frame_memory (safetensors), for this very base: another one is "
                        "refused, and memories are not listed. New ones are what Train Wan Frame Context teaches; the "
                        "model cannot read them yet."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The MODEL that takes history, for the guider. LoRA nodes may stand before or after.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Trained or not, how it was told that the file fits the base, its schedule and licence.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        """A file that was trained on and saved again under its name is read again."""
        return state_of_file(file)

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        if file == wan_file.NEW:
            made, lines = wan_file.with_new(model)
        else:
            held = wan_file.read(folder_paths.get_full_path_or_raise(memory_file.FOLDER, file))
            made, lines = wan_file.with_file(model, held)
        report = "\n".join(lines)
        show(cls, report)
        return io.NodeOutput(made, report, ui=ui.PreviewText(report))


def _guider_inputs() -> list[io.Input]:
    return [
        io.Model.Input("high", tooltip="The high noise expert, behind Wan Frame Context where history is shown."),
        io.Model.Input("low", tooltip="The low noise expert, in the same way."),
        io.Conditioning.Input("positive", tooltip="Prompt of both experts, from CLIP Text Encode (umt5_xxl)."),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="Negative prompt of both; not computed where its cfg is 1. Not needed where both are 1.",
        ),
        io.Float.Input(
            "cfg_high",
            default=3.5,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="CFG of the high noise expert. 3.5 as published for image to video, 4 for text to video; 1 with "
            "a lightning LoRA.",
        ),
        io.Float.Input(
            "cfg_low",
            default=3.5,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="CFG of the low noise expert. 3.5 as published for image to video, 3 for text to video.",
        ),
        io.Float.Input(
            "boundary",
            default=BOUNDARY_I2V,
            min=0.0,
            max=1.0,
            step=0.005,
            tooltip=(
                "Noise level, 0 to 1, down to which the high noise expert works: steps that begin at it or above are "
                f"its own. As published {BOUNDARY_I2V} for image to video, {BOUNDARY_T2V} for text to video."
            ),
        ),
    ]


class FrameMemoryWanExpertGuider(io.ComfyNode):
    """Both experts of Wan 2.2 A14B in every section."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryWanExpertGuider",
            display_name=GUIDER,
            category="model/sampling/guiders",
            description=(
                "A guider of two models: Wan 2.2's high noise expert makes the first steps of each section, the low "
                "noise expert the rest. Only one of them has to be in VRAM at a time."
            ),
            search_aliases=["wan 2.2 guider", "high noise low noise", "two experts", "moe guider", "a14b"],
            inputs=_guider_inputs(),
            outputs=[io.Guider.Output(display_name="guider", tooltip="GUIDER for Anti-Drift Sampler, or stock ones.")],
        )

    @classmethod
    def execute(cls, high, low, positive, cfg_high, cfg_low, boundary, negative=None) -> io.NodeOutput:
        check_pair(high, low)
        return io.NodeOutput(guider_of(high, low, positive, negative, (cfg_high, cfg_low), boundary))


NODES = [FrameMemoryWanFrameContext, FrameMemoryWanExpertGuider]
