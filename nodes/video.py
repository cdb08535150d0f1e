"""Nodes of the family "video": latents to a file, written as it is decoded."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import InputImpl, io, ui

from ..frame_memory.video.save import MODES, WINDOWED, describe, plan_save, save_video
from ..frame_memory.video.writer import DEFAULT_CRF
from .shown import container_metadata, show


def _inputs() -> list[io.Input]:
    return [
        io.Latent.Input(
            "samples",
            tooltip=(
                "Video latent from Anti-Drift Sampler; 1 + 9 latent frames a section, 4 pixel frames each. Any "
                "other video latent works too and is decoded as one video from front to back. "
                "A batch is saved as one file each."
            ),
        ),
        io.Vae.Input(
            "vae",
            tooltip=(
                "The VAE that belongs to the model: the HunyuanVideo VAE for FramePack. Another one with the "
                "same shape is refused. If a window does not fit into memory, ComfyUI decodes it in tiles."
            ),
        ),
        io.Float.Input(
            "fps",
            default=30.0,
            min=0.0,
            max=240.0,
            step=0.001,  # the editor keeps as many decimals as the step has; 23.976 needs three
            tooltip=(
                "Frames per second of the file, 1 to 240. Must be the rate the video was made at (FramePack: "
                "30); another rate would only change its speed and is refused. 0 takes the rate the latent "
                "carries. 29.97 and 23.976 are stored exactly."
            ),
        ),
        io.String.Input(
            "filename_prefix",
            default="video/FrameMemory",
            tooltip=(
                "Folder and start of the file name inside ComfyUI's output folder. A number is added, so that "
                "nothing is overwritten. %date:yyyy-MM-dd% and the like work as in Save Video."
            ),
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "crf",
            default=float(DEFAULT_CRF),
            min=0.0,
            max=51.0,
            step=1.0,
            advanced=True,
            tooltip=(
                "Quality of the H.264 file, 0 to 51: 0 is lossless, 18 looks lossless, 23 is ComfyUI's usual. "
                "6 more makes the file about half as large."
            ),
        ),
        io.Combo.Input(
            "decode",
            options=list(MODES),
            default=WINDOWED,
            advanced=True,
            tooltip=(
                "windowed: 18 latent frames at a time, neighbours crossfaded over 33 pixel frames, as in "
                "FramePack; memory does not grow with the length. whole: all in one pass, slightly other "
                "pixels at the joins, and memory grows with the length."
            ),
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Video.Output(
            display_name="video",
            is_output_list=True,
            tooltip=(
                "The written file (mp4, H.264, at the fps above), one for each video of a batch. Save Video "
                "copies it without encoding again."
            ),
        ),
        io.String.Output(
            display_name="report",
            is_output_list=True,
            tooltip="Path, frames, seconds and size of each file, how it was decoded, and warnings.",
        ),
    ]


class FrameMemorySaveLongVideo(io.ComfyNode):
    """Decode a video latent in overlapping windows and encode it as it comes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemorySaveLongVideo",
            display_name="Save Long Video",
            category="video",
            description=(
                "Decodes a video latent window by window and writes the mp4 as it goes, so that a video of any length "
                "never lies in memory as pixels. Windows are crossfaded over 33 frames as FramePack does."
            ),
            search_aliases=["framepack decode", "vae decode long video", "save mp4", "streaming decode"],
            is_output_node=True,
            inputs=[*_inputs(), *_advanced_inputs()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, fps, filename_prefix, crf=float(DEFAULT_CRF), decode=WINDOWED) -> io.NodeOutput:
        plan = plan_save(vae, samples, fps, decode)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), plan.width, plan.height
        )
        progress = comfy.utils.ProgressBar(len(plan.windows) * plan.videos)
        metadata = container_metadata(cls.hidden)
        files, reports = [], []
        for item in range(plan.videos):
            file = f"{name}_{counter + item:05}_.mp4"
            written = save_video(
                plan,
                vae,
                os.path.join(folder, file),
                item=item,
                crf=crf,
                metadata=metadata,
                interrupt=comfy.model_management.throw_exception_if_processing_interrupted,
                on_window=lambda done, count: progress.update(1),
            )
            files.append(ui.SavedResult(file, subfolder, io.FolderType.output))
            reports.append(describe(plan, written))
        show(cls, "\n".join(reports))
        videos = [InputImpl.VideoFromFile(os.path.join(folder, file.filename)) for file in files]
        return io.NodeOutput(videos, reports, ui=ui.PreviewVideo(files))


NODES = [FrameMemorySaveLongVideo]
