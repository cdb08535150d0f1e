"""Node of the family "wan training": patchifiers for frames of history and their LoRA, trained in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.forcing.context_run import STAGE_CONTEXT, ContextRequest, ContextRun
from ..frame_memory.model.sources import TRAIN_CONTEXT
from . import training_node as shared
from .sockets import FrameContextSocket


def _inputs() -> list[io.Input]:
    return [
        *shared.video_inputs(
            "Wan 2.1 or 2.2 from Load Diffusion Model: fresh patchifiers begin. Behind Wan Frame Context with a file "
            "those are trained on."
        ),
        FrameContextSocket.Input(
            "frame_context",
            tooltip="From Frame Context Packer: which finished frames are seen, at which rate. Sample with the same.",
        ),
        io.Combo.Input(
            "stage",
            options=[STAGE_CONTEXT, shared.PREPARE],
            default=STAGE_CONTEXT,
            tooltip="'write' only stores videos and captions, for several GPUs.",
        ),
        io.String.Input(
            "name",
            default="wan_frame_context",
            tooltip=(
                "Name of the run and of its results in models/frame_memory and models/loras. The same name goes on "
                "with a run that was stopped; another begins anew. Each expert of A14B needs its own."
            ),
        ),
        shared.steps_input("Updates of the whole run, one section of one video each, those before a stop included."),
        shared.rate_input(
            1e-4, "AdamW's rate for patchifiers and LoRA, reached after a tenth of the steps, 500 at most."
        ),
        shared.seed_input(),
    ]


class FrameMemoryTrainWanContext(io.ComfyNode):
    """FramePack's way of looking back, taught to a Wan model on the user's own videos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryTrainWanContext",
            display_name=TRAIN_CONTEXT,
            category="model/training",
            description=(
                "Teaches a Wan model to look back at finished frames, as FramePack does: patchifiers for Wan Frame "
                "Context, and a LoRA. Cancel keeps a checkpoint; queue again to go on."
            ),
            search_aliases=["wan long video", "framepack wan", "patchifier", "train wan", "frame context"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                *_inputs(),
                *shared.advanced_inputs(
                    shift=shared.SHIFT_TIP,
                    rank="Rank of the LoRA: higher can learn more and takes more GPU memory.",
                    checkpointing=shared.CHECKPOINTING_TIP,
                ),
            ],
            outputs=shared.outputs(model="The MODEL with patchifiers and LoRA on it, for the guider."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latents, positive, **single) -> io.NodeOutput:
        asked = {name: value[0] for name, value in single.items()}
        request = ContextRequest(schedule=asked["frame_context"].schedule.text, **shared.shared_settings(asked))
        return shared.train(cls, ContextRun, request, asked, latents, positive, None)


NODES = [FrameMemoryTrainWanContext]
