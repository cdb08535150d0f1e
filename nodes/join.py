"""Nodes of the family "join": an existing video and what was made to follow it, as one file."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import InputImpl, io, ui

from ..frame_memory.plan.mark import as_fps
from ..frame_memory.video.clips import open_clip
from ..frame_memory.video.join import JOIN_NODE, join_videos, plan_join
from ..frame_memory.video.writer import DEFAULT_CRF
from .output_place import output_place
from .shown import container_metadata, show

PREFIX = "video/FrameMemory_joined"


def _join_inputs() -> list[io.Input]:
    return [
        io.Video.Input("video", tooltip="The video that comes first, the one Video History was given."),
        io.Video.Input(
            "made",
            tooltip=(
                "What was made to follow it, from Anti-Drift Sampler or Save Long Video. The file gets its size and "
                "frame rate."
            ),
        ),
        io.String.Input(
            "filename_prefix",
            default=PREFIX,
            tooltip=(
                "Folder and start of the file name inside ComfyUI's output folder. A number is added, so that nothing "
                "is overwritten."
            ),
        ),
        io.Float.Input(
            "crf",
            default=float(DEFAULT_CRF),
            min=0.0,
            max=51.0,
            step=1.0,
            advanced=True,
            tooltip="Quality of the H.264 file, 0 to 51: 0 is lossless, 18 looks lossless; 6 more halves the file.",
        ),
        io.Int.Input(
            "overlap",
            default=0,
            min=0,
            max=1_000_000,
            optional=True,
            force_input=True,
            tooltip=(
                "Frames at the beginning of 'made' that repeat the end of 'video': connect 'overlap' of Video History. "
                "They are left out, the last 15 crossfaded. Without it the videos are put end to end."
            ),
        ),
        io.Video.Input(
            "then", optional=True, tooltip="A video to follow, the one given to Video History as bridge_to."
        ),
    ]


class FrameMemoryJoinVideos(io.ComfyNode):
    """An existing video, the new part, and where it leads, as one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryJoinVideos",
            display_name="Join Videos",
            category="video",
            description=(
                "Puts an existing video, what was made to follow it, and the video it leads to into one mp4, by time, "
                "with the sound of each. Streamed: memory does not grow with the length."
            ),
            search_aliases=["concat videos", "extend video", "merge video", "append video", "bridge videos"],
            is_output_node=True,
            inputs=_join_inputs(),
            outputs=[
                io.Video.Output(display_name="video", tooltip="The written file: mp4, H.264, AAC sound where any is."),
                io.String.Output(
                    display_name="report",
                    tooltip="Path, frames, seconds; what comes from which video; sound; brightness at the joins.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, video, made, filename_prefix, crf=float(DEFAULT_CRF), overlap=0, then=None) -> io.NodeOutput:
        rate, spool = as_fps(float(made.get_frame_rate())), Path(folder_paths.get_temp_directory())
        clips = [None if v is None else open_clip(v, rate, spool, JOIN_NODE) for v in (video, made, then)]
        plan = plan_join(clips[0], clips[1], overlap, clips[2])
        folder, name, counter, subfolder = output_place(filename_prefix, PREFIX, plan.width, plan.height)
        progress = comfy.utils.ProgressBar(plan.frames)
        file = f"{name}_{counter:05}_.mp4"
        joined = join_videos(
            plan,
            Path(folder) / file,
            crf=crf,
            metadata=container_metadata(cls.hidden),
            interrupt=comfy.model_management.throw_exception_if_processing_interrupted,
            on_frames=progress.update_absolute,
        )
        show(cls, joined.report)
        shown = ui.PreviewVideo([ui.SavedResult(joined.written.path.name, subfolder, io.FolderType.output)])
        return io.NodeOutput(InputImpl.VideoFromFile(str(joined.written.path)), joined.report, ui=shown)


NODES = [FrameMemoryJoinVideos]
