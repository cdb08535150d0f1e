"""Node of the family "preservation training": frame preservation and its LoRA, trained in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.forcing.clips import TRAIN_FRAMES
from ..frame_memory.forcing.preserving_run import STAGE_QUERY, STAGES, PreservingRequest, PreservingRun
from . import training_node as shared
from .sockets import FrameMemorySocket


def _inputs() -> list[io.Input]:
    return [
        *shared.video_inputs(),
        FrameMemorySocket.Input(
            "memory",
            tooltip="Frame preservation: of Load Memory Encoder, new or from a file, or of stage 1. It is not changed.",
        ),
        io.Combo.Input(
            "stage",
            options=[*STAGES, shared.PREPARE],
            default=STAGE_QUERY,
            tooltip=(
                "1 asks the memory for frames of a history that is masked otherwise, so that all of it must be kept; 2 "
                "makes the next section with it, as sampling does. Train 1 first. 'write' only stores the videos."
            ),
        ),
        io.String.Input(
            "name",
            default="frame_preservation",
            tooltip=(
                "Name of the run and of its results in models/frame_memory and models/loras. The same name goes on "
                "with a run that was stopped; another begins anew. Each stage needs its own."
            ),
        ),
        shared.steps_input("Updates of the whole run, one a video, those before a stop included. The paper: 100,000."),
        shared.clips_input(
            "Most clips of 1.2 s of a video that are remembered in one update; 16 are 19 s. More teach longer memory "
            "and take more time and memory."
        ),
        shared.rate_input(1e-4, "AdamW's rate for encoder and LoRA, reached after a tenth of the steps, 500 at most."),
        shared.seed_input(),
    ]


def _optional() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "freeze_encoder",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Stage 2: only the LoRA learns, and the memory stays that of stage 1. Off as in the paper.",
        ),
        *shared.advanced_inputs(
            shift="Noise levels of training: above 1 noisier. 0 = 5.",
            rank="Rank of the LoRA: higher can learn more and takes more memory. The paper: 128.",
            checkpointing="Compute blocks twice instead of keeping their parts: a third slower, far less memory.",
        ),
        io.Boolean.Input(
            "cross_attention",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Every block of the MODEL also learns to read what the encoder saw before it shrank it to tokens: more "
                "detail by the paper, for 6 % more weights and slower steps. A memory that has it keeps it."
            ),
        ),
    ]


class FrameMemoryTrainPreservation(io.ComfyNode):
    """The paper's two stages on the user's own videos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryTrainPreservation",
            display_name=TRAIN_FRAMES,
            category="model/training",
            description=(
                "Trains a memory of frame preservation, and a LoRA that lets FramePack-F1 read it: first by asking for "
                "frames, then on the next section. Cancel keeps a checkpoint; queue again to go on."
            ),
            search_aliases=["pfp", "tinyhistory", "history embedding", "frame query", "long term memory"],
            is_input_list=True,
            is_output_node=True,
            inputs=[*_inputs(), *_optional()],
            outputs=shared.outputs(
                model="The MODEL with the LoRA of this stage: of 1 for Retrieve Frame, of 2 for videos.",
                memory="The memory as it was trained, for stage 2 or Frame Preservation Encoder.",
            ),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latents, positive, **single) -> io.NodeOutput:
        asked = {name: value[0] for name, value in single.items()}
        own = {"frozen": asked.get("freeze_encoder", False), "cross_attention": asked.get("cross_attention", False)}
        request = PreservingRequest(**own, **shared.shared_settings(asked))
        return shared.train(cls, PreservingRun, request, asked, latents, positive, asked["memory"])


NODES = [FrameMemoryTrainPreservation]
