"""Nodes of the family "journal": going on from what is there, a section of a kept video or a whole existing one."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from ..frame_memory.sampling.changes import SectionChange
from ..frame_memory.video.extend import prepare
from .shown import show
from .sockets import SectionChangesSocket

CATEGORY = "model/sampling/framepack"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class FrameMemoryPickSection(io.ComfyNode):
    """A section that is to be made anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryPickSection",
            display_name="Pick Section",
            category=CATEGORY,
            description=(
                "Makes one section of a kept video anew, with another seed or another prompt. The sections that do "
                "not see it are reused; those that do follow it. Nothing finished is deleted."
            ),
            search_aliases=["re-roll section", "branch video", "redo part", "framepack seed per section"],
            inputs=[
                io.Int.Input(
                    "section",
                    default=1,
                    min=1,
                    max=3000,
                    tooltip=(
                        "Which section, counted from 1 in the time of the video: 1.2 s each with FramePack, mostly 5 s "
                        "with Wan (5B: 3.3 s), 1.375 s with Helios. The plan on the sampler lists them."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of this section's noise. The same seed gives the same take again.",
                ),
                io.Boolean.Input(
                    "new_noise",
                    default=True,
                    advanced=True,
                    tooltip="Off keeps the section's own noise: only the prompt below then makes it another one.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Prompt for this section alone, from CLIP Text Encode; else it keeps the one it had.",
                ),
                SectionChangesSocket.Input(
                    "changes", optional=True, tooltip="Another Pick Section in front of this one, to change several."
                ),
            ],
            outputs=[
                SectionChangesSocket.Output(
                    display_name="changes", tooltip="For Anti-Drift Sampler, or for another Pick Section."
                )
            ],
        )

    @classmethod
    def execute(cls, section, seed, new_noise=True, positive=None, changes=()) -> io.NodeOutput:
        picked = SectionChange(section, seed if new_noise else None, positive)
        return io.NodeOutput((*changes, picked))


def _history_inputs() -> list[io.Input]:
    return [
        io.Video.Input(
            "video",
            tooltip=(
                "The video to go on from: Load Video, or Trim Video behind it. Any frame rate, also a variable one, "
                "any size, turned pictures, 10 bit."
            ),
        ),
        io.Vae.Input(
            "vae", tooltip="The VAE of the model: HunyuanVideo's for FramePack, Wan's for Wan. The rate goes by it."
        ),
        io.Float.Input(
            "seconds",
            default=2.4,
            min=0.0,
            max=3600.0,
            step=0.1,
            tooltip=(
                "How much of its end goes in front of the new part, in seconds, in steps of 4 frames (at 30 fps; of "
                "Wan at 16 or 24). 2.4 is all that a FramePack model looks back at (19 latent frames), 4.8 for Wan at "
                "16 fps; more only takes time. 0 takes all of it."
            ),
        ),
        io.Int.Input(
            "size",
            default=640,
            min=0,
            max=2048,
            step=16,
            tooltip=(
                "Side in pixels of a square with the new video's area; width and height follow the video's shape on "
                "FramePack's list of sizes (multiples of 16). 0 keeps the video's own size, to the nearest multiples."
            ),
        ),
        io.Video.Input(
            "bridge_to",
            optional=True,
            tooltip="A second video: the new part ends where this one begins. Only F0 can aim at an end; F1 refuses.",
        ),
    ]


def _history_outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="history", tooltip="The end of the video as latents, for Anti-Drift Sampler."),
        io.Latent.Output(
            display_name="start",
            tooltip="Its last picture, 1 latent frame: the size, for Anti-Drift Sampler and FramePack Sigmas.",
        ),
        io.Latent.Output(
            display_name="end", tooltip="First picture of bridge_to, for Anti-Drift Sampler; nothing without one."
        ),
        io.Image.Output(display_name="image", tooltip="The last picture in pixels, for FramePack Image: CLIP vision."),
        io.Image.Output(display_name="end_image", tooltip="First picture of bridge_to in pixels; nothing without one."),
        io.Int.Output(
            display_name="overlap", tooltip="Frames that the history puts in front of the result, for Join Videos."
        ),
        io.Audio.Output(
            display_name="audio",
            tooltip="The sound under the history, exactly as long as its frames; nothing where there is none.",
        ),
        io.String.Output(
            display_name="report",
            tooltip="What the file is, how its frames map to the model's rate, what is cut or dropped.",
        ),
    ]


class FrameMemoryVideoHistory(io.ComfyNode):
    """An existing video as the history of a new one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryVideoHistory",
            display_name="Video History",
            category="model/conditioning/framepack",
            description=(
                "Goes on from an existing video: its end becomes the history of the new part, which may lead to the "
                "beginning of a second video. Join Videos puts all of them into one file."
            ),
            search_aliases=["extend video", "continue video", "video to latent", "bridge videos", "framepack extend"],
            inputs=_history_inputs(),
            outputs=_history_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, video, vae, seconds, size, bridge_to=None) -> io.NodeOutput:
        made = prepare(
            vae, video, seconds, size, Path(folder_paths.get_temp_directory()), bridge_to=bridge_to,
            interrupt=comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip
        show(cls, made.report)
        return io.NodeOutput(
            made.history, made.start, made.end, made.picture_BHWC, made.end_picture_BHWC, made.overlap, made.audio,
            made.report, ui=ui.PreviewText(made.report),
        )  # fmt: skip


NODES = [FrameMemoryPickSection, FrameMemoryVideoHistory]
