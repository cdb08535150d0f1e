"""Node of the family "preservation training": frame preservation and its LoRA, trained in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.forcing.clips import TRAIN_FRAMES
from ..frame_memory.forcing.preserving import ALONE, DROP_TEXT
from ..frame_memory.forcing.preserving_run import STAGE_QUERY, STAGES, PreservingRequest, PreservingRun
from . import training_node as shared
from .sockets import FrameContextSocket, FrameMemorySocket


def _inputs() -> list[io.Input]:
    return [
        *shared.video_inputs(
            "FramePack-F1 from Load FramePack Model, or Wan from Load Diffusion Model; Wan's stage 2 needs Wan Frame "
            "Context behind it."
        ),
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
            "Most clips of a video that are remembered in one update; one is a section, 1.2 s on FramePack and 5 s on "
            "Wan (5B: 3.3 s). 20 s are 16, or 4 on Wan. More teach longer memory and take more time and GPU memory."
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
            shift=shared.SHIFT_TIP,
            rank="Rank of the LoRA: higher can learn more and takes more GPU memory. The paper: 128.",
            checkpointing=shared.CHECKPOINTING_TIP,
        ),
        io.Float.Input(
            "drop_text",
            default=DROP_TEXT,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip=(
                "Share of updates, 0 to 1, in which the caption is left out, so that cfg still works. Higher leans "
                "more on the memory than on the prompt; 0 never."
            ),
        ),
        FrameContextSocket.Input(
            "frame_context",
            optional=True,
            tooltip=(
                "Stage 2: which finished frames are seen beside the memory, from Frame Context Packer; sample with the "
                "same. Without it F1 forward; on Wan what trained patchifiers name, with new ones '3 clean frames'."
            ),
        ),
        io.Boolean.Input(
            "cross_attention",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Every block of the MODEL also learns to read what the encoder saw before it shrank it to tokens: more "
                "detail by the paper, for 6 % (FramePack) to 9 % (Wan 14B) more weights and slower steps. A memory "
                "that has it keeps it."
            ),
        ),
        io.Float.Input(
            "encoder_first",
            default=ALONE,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip=(
                "Share of the run, 0 to 1, in which the encoder learns and the LoRA waits. At 0 the MODEL may learn to "
                "look away from a memory that says nothing yet, and never look again."
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
                "Trains a memory of frame preservation, and a LoRA that lets FramePack-F1 or Wan read it: first by "
                "asking for frames, then on the next section. Cancel keeps a checkpoint; queue again to go on."
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
        context = asked.get("frame_context")
        request = PreservingRequest(
            frozen=asked.get("freeze_encoder", False), cross_attention=asked.get("cross_attention", False),
            schedule=context.schedule.text if context else "", drop_text=asked.get("drop_text", DROP_TEXT),
            alone=asked.get("encoder_first", ALONE), **shared.shared_settings(asked),
        )  # fmt: skip
        return shared.train(cls, PreservingRun, request, asked, latents, positive, asked["memory"])


NODES = [FrameMemoryTrainPreservation]
