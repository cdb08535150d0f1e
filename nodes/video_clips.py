"""Node of the family "training data": a folder of videos as latents in order, for the nodes that train."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import node_helpers
from comfy_api.latest import io, ui

from ..frame_memory.video.vae import check_video_vae
from ..frame_memory.video.video_clips import LONGEST_SECONDS, NODE, ClipMaker, Request
from .input_folders import chosen_folder, state_of_chosen
from .shown import show

# In ComfyUI's output folder, beside the projects and not among them: encoding hours of video must survive a restart.
CACHE = "frame_memory_clips"
SECTION_SECONDS = 1.2


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "folder",
            options=folder_paths.get_input_subfolders(),
            tooltip=(
                "A folder in ComfyUI's input folder with videos NAME.mp4 (.mov, .mkv, .webm, .avi) and a caption "
                "NAME.txt for each. Any rate, size and length; long ones teach memory."
            ),
        ),
        io.Clip.Input("clip", tooltip="The text encoders of the model; they read each caption once."),
        io.Vae.Input(
            "vae",
            tooltip="The VAE of the model: the HunyuanVideo VAE for FramePack, Wan's own for Wan (5B: wan2.2_vae).",
        ),
        io.Int.Input(
            "size",
            default=640,
            min=64,
            max=2048,
            step=16,
            tooltip=(
                "Side in pixels of a square with the clips' area; width and height follow each video's shape on "
                "FramePack's list of sizes (multiples of 16). Smaller takes less memory in training."
            ),
        ),
        io.Float.Input(
            "longest",
            default=LONGEST_SECONDS,
            min=SECTION_SECONDS,
            max=3600.0,
            step=0.1,  # the editor shows and keeps as many decimals as the step has
            tooltip=(
                "Longest clip in seconds, to the nearest whole section (1.2 s on FramePack, 5 s on Wan, 3.3 s on its "
                "5B). Longer stretches become several. Paper: 60."
            ),
        ),
    ]


def _more_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "shortest",
            default=SECTION_SECONDS,
            min=SECTION_SECONDS,
            max=3600.0,
            step=0.1,
            advanced=True,
            tooltip=(
                "Shortest clip in seconds, to the nearest whole section, at least one. What is shorter between two "
                "cuts is left out."
            ),
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip=(
                "Sees the first picture of every clip, as FramePack Image does: SigLIP for FramePack, clip_vision_h "
                "for Wan 2.1 image to video."
            ),
        ),
        io.Float.Input(
            "fps",
            default=0.0,
            min=0.0,
            max=240.0,
            step=1.0,
            optional=True,
            advanced=True,
            tooltip=(
                "Frames a second that the clips are put onto, whatever the videos have. 0 = as the VAE's model makes "
                "them: 30 FramePack, 16 Wan, 24 Wan 2.2 5B. Another number is only for a VAE that is none of these."
            ),
        ),
    ]


class FrameMemoryVideoClips(io.ComfyNode):
    """A folder of videos with captions as training clips, cached on disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryVideoClips",
            display_name=NODE,
            category="model/training",
            description=(
                "Makes training clips from a folder of videos with captions: cut at shot cuts, without still parts, at "
                "the model's frame rate, encoded in order and kept in output/frame_memory_clips."
            ),
            search_aliases=[
                "video dataset",
                "direct forcing data",
                "training videos",
                "shot detection",
                "latent cache",
            ],
            inputs=[*_inputs(), *_more_inputs()],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    is_output_list=True,
                    tooltip="One LATENT a clip: its first picture and k sections, 1 + 9k latent frames (Wan 1 + 20k).",
                ),
                io.Conditioning.Output(
                    display_name="positive",
                    is_output_list=True,
                    tooltip="One a clip: its caption, and what clip_vision sees of its first picture.",
                ),
                io.Int.Output(display_name="count", tooltip="Clips; what was left out is in the report."),
                io.String.Output(
                    display_name="report", tooltip="Clips, seconds, sizes, cuts; what was skipped, and why; the cache."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_):
        """A folder that has changed is read again."""
        return state_of_chosen(folder)

    @classmethod
    def execute(
        cls, folder, clip, vae, size, longest=LONGEST_SECONDS, shortest=SECTION_SECONDS, clip_vision=None, fps=0.0
    ) -> io.NodeOutput:
        request = Request.of(size, shortest, longest, check_video_vae(vae).family, fps)
        maker = ClipMaker(
            chosen_folder(folder, NODE), Path(folder_paths.get_output_directory()) / CACHE, vae, request,
            comfy.model_management.throw_exception_if_processing_interrupted, lambda text: show(cls, text),
        )  # fmt: skip
        bar = comfy.utils.ProgressBar(len(maker.captions) + len(maker.videos))
        captions = {}
        for caption in maker.captions:  # one model after the other, so that each is loaded once
            maker.interrupt()
            captions[caption] = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
            bar.update(1)
        made, done = [], len(captions)
        for part in maker.clips():
            made.append(part)
            bar.update_absolute(done + 1 + maker.videos.index(part.video))
        positive = []
        for part in made:
            maker.interrupt()
            seen = {}
            if clip_vision is not None:
                seen["clip_vision_output"] = clip_vision.encode_image(part.first_picture(), crop=False)
            positive.append(node_helpers.conditioning_set_values(captions[part.video.caption], seen))
        report = maker.report()
        show(cls, report)
        latents = [part.latent for part in made]
        return io.NodeOutput(latents, positive, len(made), report, ui=ui.PreviewText(report))


NODES = [FrameMemoryVideoClips]
