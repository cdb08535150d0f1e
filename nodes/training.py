"""Node of the family "training": a memory, or a head by Direct Forcing, trained in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.forcing import training_run as training
from ..frame_memory.forcing.clips import TRAIN
from ..frame_memory.forcing.draws import FORCINGS
from . import training_node as shared
from .sockets import FrameMemorySocket

AS_STAGE = "as the stage"


def _inputs() -> list[io.Input]:
    return [
        *shared.video_inputs("FramePack-F1 from Load FramePack Model."),
        io.Combo.Input(
            "stage",
            options=[*training.STAGES, shared.PREPARE],
            default=training.STAGE_HEAD,
            tooltip=(
                "1 teaches the memory (and a LoRA) behind real history; 2 teaches the output layer to live with its "
                "own errors, in the memory that sampling needs. Train 1 first. 'write' only stores the videos for "
                "several GPUs."
            ),
        ),
        io.String.Input(
            "name",
            default="direct_forcing",
            tooltip=(
                "Name of the run and of its result in models/frame_memory. The same name goes on with a run that was "
                "stopped; another begins anew. Each stage needs its own; so does stage 2 where stage 1 was trained on."
            ),
        ),
        shared.steps_input(
            "Updates of the whole run, one a video, those before a stop included. More can be added later."
        ),
        shared.clips_input(
            "Most clips of 1.2 s of a video in one update; the run gets there by 1, 2, 4, 8 in equal shares. More "
            "teach longer videos and take longer, not more memory."
        ),
        shared.rate_input(1e-5, "AdamW's rate; 0.00001 as in the paper, reached after 500 steps of warm-up at most."),
        shared.seed_input(),
    ]


def _optional() -> list[io.Input]:
    return [
        FrameMemorySocket.Input(
            "memory",
            optional=True,
            tooltip=(
                "From Load Memory Encoder, or of stage 1. Without it stage 1 begins a new one; without it, or with an "
                "untrained one, stage 2 trains without memory."
            ),
        ),
        io.Combo.Input(
            "forcing",
            options=[AS_STAGE, *FORCINGS],
            default=AS_STAGE,
            optional=True,
            advanced=True,
            tooltip=(
                "What later clips are shown: the real video (teacher), sampled clips (student, 5 times slower), or "
                "one-step estimates (Direct Forcing). 'as the stage': teacher in 1, Direct Forcing in 2."
            ),
        ),
        *shared.advanced_inputs(
            shift="Noise levels of training: above 1 noisier. 0 = 5 behind real history, 1 in Direct Forcing.",
            rank="Rank of the LoRA in '1: memory and LoRA': higher can learn more and takes more memory.",
            checkpointing=(
                "Stage 1: compute blocks twice instead of keeping their parts: a third slower, far less memory."
            ),
        ),
    ]


class FrameMemoryTrainDirectForcing(io.ComfyNode):
    """The paper's two stages on the user's own videos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryTrainDirectForcing",
            display_name=TRAIN,
            category="model/training",
            description=(
                "Trains FramePack-F1 for long videos: first a memory (SemanticPack), then the output layer by Direct "
                "Forcing, on the model's own one-step estimates. Cancel keeps a checkpoint; queue again to go on."
            ),
            search_aliases=["direct forcing", "memorypack", "semanticpack", "train framepack", "drift", "pfvg"],
            is_input_list=True,
            is_output_node=True,
            inputs=[*_inputs(), *_optional()],
            outputs=shared.outputs(
                model="The MODEL with what was trained: head or LoRA put on.",
                memory="The memory, trained in stage 1, for MemoryPack Encoder.",
            ),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latents, positive, memory=(None,), **single) -> io.NodeOutput:
        asked = {name: value[0] for name, value in single.items()}
        return shared.train(cls, training.TrainingRun, request_of(asked), asked, latents, positive, memory[0])


def request_of(asked: dict) -> training.Request:
    """The widgets as a request."""
    forcing = asked.get("forcing", AS_STAGE)
    return training.Request(forcing=None if forcing == AS_STAGE else forcing, **shared.shared_settings(asked))


NODES = [FrameMemoryTrainDirectForcing]
