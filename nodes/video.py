"""Nodes of the family "video": latents to a file, written as it is decoded."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.utils
from comfy_api.latest import InputImpl, io, ui

from ..frame_memory.sampling.save_source import choose
from ..frame_memory.sampling.stored import state_of
from ..frame_memory.video.save import CARRIED, MODES, describe, plan_save, save_video
from ..frame_memory.video.writer import DEFAULT_CRF
from .output_place import output_place
from .shown import Announced, container_metadata, projects_folder, show, warnings_first

PREFIX = "video/FrameMemory"


def _inputs() -> list[io.Input]:
    return [
        io.Latent.Input(
            "samples",
            optional=True,
            tooltip=(
                "Video latent from Anti-Drift Sampler; 1 + 9 latent frames a section, 4 pixel frames each. Any "
                "other video latent works too and is decoded as one video from front to back. "
                "A batch is saved as one file each. Not needed with 'project'."
            ),
        ),
        io.Vae.Input(
            "vae",
            tooltip=(
                "The VAE that belongs to the model: HunyuanVideo's for FramePack, Wan's own for Wan. Another one "
                "of the same shape is refused. What does not fit into memory is decoded in tiles, then smaller, then "
                "on the CPU, and the report says so."
            ),
        ),
        io.Float.Input(
            "fps",
            default=0.0,
            min=0.0,
            max=240.0,
            step=0.001,  # the editor keeps as many decimals as the step has; 23.976 needs three
            tooltip=(
                "Frames per second of the file, 1 to 240. 0 takes the rate the latent carries (FramePack 30, Wan 16, "
                "Wan 2.2 5B 24); another rate would only change its speed and is refused. 29.97 and 23.976 are "
                "stored exactly."
            ),
        ),
        io.String.Input(
            "filename_prefix",
            default=PREFIX,
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
            default=CARRIED,
            advanced=True,
            tooltip=(
                "carried: each latent frame once, with the VAE's state carried on; the pixels of whole in memory that "
                "does not grow. Wan 2.1's and the self-test's VAE can; others (HunyuanVideo, Wan 2.2 5B) are decoded "
                "windowed. windowed: 18 latent frames at a time (Wan 40), neighbours crossfaded over half of them, as "
                "in FramePack; twice the work. whole: all in one pass; memory grows with the length."
            ),
        ),
    ]


def _project_input() -> io.Input:
    return io.String.Input(
        "project",
        default="",
        optional=True,
        tooltip=(
            "Instead of 'samples': the name of a folder in output/frame_memory, typed, or connected from Anti-Drift "
            "Sampler. Its finished sections are read from the disk as they are decoded; of an unfinished one, the part "
            "that is there. No model but the VAE is needed."
        ),
    )


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
    """Decode a video latent, or a project, piece by piece and encode it as it comes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemorySaveLongVideo",
            display_name="Save Long Video",
            category="video",
            description=(
                "Decodes a video latent, or a project on the disk, piece by piece and writes the mp4 as it goes, so "
                "that a video of any length never lies in memory as pixels."
            ),
            search_aliases=["framepack decode", "vae decode long video", "save mp4", "streaming decode"],
            is_output_node=True,
            inputs=[*_inputs(), *_advanced_inputs(), _project_input()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, project="", **_):
        """ComfyUI caches by what is typed; a project of that name may hold another video by now."""
        return state_of(projects_folder(), project) if project else ""

    @classmethod
    def execute(
        cls, samples=None, vae=None, fps=0.0, filename_prefix=PREFIX, crf=float(DEFAULT_CRF),
        decode=CARRIED, project="",
    ) -> io.NodeOutput:  # fmt: skip
        source = choose(projects_folder(), samples, project)
        plan = plan_save(vae, source.samples, fps, decode, source.windows)
        folder, name, counter, subfolder = output_place(filename_prefix, PREFIX, plan.width, plan.height)
        progress = comfy.utils.ProgressBar(plan.steps * plan.videos)
        metadata = container_metadata(cls.hidden)
        files, reports = [], []
        for item in range(plan.videos):
            file = f"{name}_{counter + item:05}_.mp4"
            announced = Announced(cls)
            written = save_video(
                plan,
                vae,
                os.path.join(folder, file),
                item=item,
                crf=crf,
                metadata=metadata,
                interrupt=comfy.model_management.throw_exception_if_processing_interrupted,
                on_window=lambda done, count: progress.update(1),
                look=source.begin(plan.fps),
                announce=announced,
            )
            files.append(ui.SavedResult(file, subfolder, io.FolderType.output))
            lines = [*describe(plan, written, announced.texts).split("\n"), *source.end(first=item == 0)]
            reports.append(warnings_first(lines))
        show(cls, "\n".join(reports))
        videos = [InputImpl.VideoFromFile(os.path.join(folder, file.filename)) for file in files]
        return io.NodeOutput(videos, reports, ui=ui.PreviewVideo(files))


NODES = [FrameMemorySaveLongVideo]
