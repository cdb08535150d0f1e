"""Nodes of the family "diagnostics": whether a video drifts, and whether what left it came back as it was."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..frame_memory.plan.sections import ORDERS
from ..frame_memory.sampling.measured import decoded
from ..frame_memory.sampling.stored import state_of
from ..frame_memory.video import drift, recall
from ..frame_memory.video.drift_report import as_json, plot, words_of
from ..frame_memory.video.footage import Footage, FootageError, of_images, of_video
from ..frame_memory.video.plots import as_image
from .shown import Announced, projects_folder, show

CATEGORY = "video"
FORWARD = "forward"


def _pictures() -> list[io.Input]:
    """The two sources that both nodes take."""
    return [
        io.Video.Input("video", optional=True, tooltip="A video of any rate and size, read a few frames at a time."),
        io.Image.Input("images", optional=True, tooltip="Or a batch of images, frames of a video at 'fps' below."),
    ]


def _fps(others: str) -> io.Input:
    return io.Float.Input(
        "fps",
        default=30.0,
        min=1.0,
        max=240.0,
        step=0.001,
        optional=True,
        advanced=True,
        tooltip=f"Frames per second of 'images'. {others} its own.",
    )


def _vision() -> io.Input:
    return io.ClipVision.Input(
        "clip_vision",
        optional=True,
        tooltip="Any CLIP, SigLIP or DINO model from Load CLIP Vision: it tells whether things still look the same.",
    )


def _footage(node: str, video, images, fps: float) -> Footage:
    interrupt = comfy.model_management.throw_exception_if_processing_interrupted
    if (video is None) == (images is None):
        given, change = "nothing", "Connect 'video' or 'images'."
        if video is not None:
            given, change = "both 'video' and 'images'", "Disconnect one of them."
        raise FootageError(f"'{node}' got {given} to measure; expected one video. {change}")
    if video is not None:
        return of_video(video, Path(folder_paths.get_temp_directory()), node, interrupt)
    return of_images(images, fps, node, interrupt)


class FrameMemoryDriftMeter(io.ComfyNode):
    """Curves of a video in the order of its making, and what drifts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryDriftMeter",
            display_name=drift.NODE,
            category=CATEGORY,
            description=(
                "Measures whether a video gets worse while it is made: brightness, saturation, sharpness, motion and "
                "likeness, second by second, the first 15 % against the last in the order of making."
            ),
            search_aliases=["exposure bias", "quality over time", "colour shift", "frozen video", "video metrics"],
            is_output_node=True,
            inputs=[
                *_pictures(),
                io.Latent.Input(
                    "samples", optional=True, tooltip="Or a video latent, such as Anti-Drift Sampler's; needs 'vae'."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The VAE of the model, for 'samples' and 'project'; not for others."
                ),
                _vision(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White where the subject is: one mask, or one a frame. With clip_vision, subject and "
                        "background are then judged apart."
                    ),
                ),
                io.String.Input(
                    "project",
                    default="",
                    optional=True,
                    tooltip="Or the name of a folder in output/frame_memory, also of an unfinished video; needs 'vae'.",
                ),
                io.Combo.Input(
                    "order",
                    options=[FORWARD, *(order for order in ORDERS if order != FORWARD)],
                    default=FORWARD,
                    optional=True,
                    tooltip=(
                        "In which order the video was made: F1 forward, F0 inverted (its end first). Only for a video "
                        "or images; a latent of Anti-Drift Sampler and a project say so themselves."
                    ),
                ),
                _fps("A video, a latent or a project says"),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The curves, in seconds of making; both ends shaded."),
                io.String.Output(display_name="json", tooltip="Curves, ends, slopes, sections and warnings as JSON."),
                io.String.Output(display_name="report", tooltip="What drifts and what stands still, in words."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, project="", **_):
        """ComfyUI caches by what is typed; a project of that name may hold another video by now."""
        return state_of(projects_folder(), project) if project else ""

    @classmethod
    def execute(
        cls, video=None, images=None, samples=None, vae=None, clip_vision=None, mask=None, project="", order=FORWARD,
        fps=30.0,
    ) -> io.NodeOutput:  # fmt: skip
        interrupt = comfy.model_management.throw_exception_if_processing_interrupted
        given = [n for n, v in (("video", video), ("images", images), ("samples", samples)) if v is not None]
        given += ["project"] * bool(project.strip())
        if len(given) != 1:
            change = "Connect 'video', 'images' or 'samples', or type the name of a 'project'."
            if given:
                change = "Disconnect all but one of them, and leave 'project' empty where it is not that one."
            names = " and ".join(f"'{name}'" for name in given) or "nothing"
            raise FootageError(f"'{drift.NODE}' got {names} to measure; expected one video. {change}")
        if given[0] in ("samples", "project"):
            footage, timing = decoded(
                projects_folder(), samples, project, vae, order, drift.NODE, interrupt, Announced(cls)
            )
        else:
            footage = _footage(drift.NODE, video, images, fps)
            timing = drift.Timing.guessed(footage.frames, footage.fps, order)
        meter = drift.DriftMeter(timing, clip_vision, mask, interrupt)
        bar = comfy.utils.ProgressBar(footage.frames)
        for first, frames_THWC in footage.chunks():
            meter.look(first, frames_THWC)
            bar.update_absolute(first + len(frames_THWC))
        found = meter.result()
        report, picture = words_of(found, footage.words), as_image(plot(found))
        show(cls, report)
        return io.NodeOutput(picture, as_json(found), report, ui=ui.PreviewImage(picture, cls=cls))


def _stretch(name: str, start: float, stop: float, what: str) -> list[io.Input]:
    seconds = {"min": 0.0, "max": 36_000.0, "step": 0.1}
    return [
        io.Float.Input(f"{name}_start", default=start, tooltip=f"Second of the video where {what} begins.", **seconds),
        io.Float.Input(f"{name}_stop", default=stop, tooltip=f"Second where {what} ends; later than start.", **seconds),
    ]


def _areas() -> list[io.Input]:
    found = []
    for name, what in (("first", "the first appearance"), ("return", "the return")):
        found.append(
            io.String.Input(
                f"{name}_box",
                default="",
                optional=True,
                tooltip=f"Where to look in {what}: x,y,width,height in pixels. Empty: the whole picture.",
            )
        )
    for name, what in (("first", "the first appearance"), ("return", "the return")):
        found.append(
            io.Mask.Input(
                f"{name}_mask",
                optional=True,
                tooltip=f"White on the subject in {what}: one mask, one a frame of it, or one a frame of the video.",
            )
        )
    return found


class FrameMemoryRecall(io.ComfyNode):
    """The return of a scene or subject against its first appearance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryRecall",
            display_name=recall.NODE,
            category=CATEGORY,
            description=(
                "Measures whether a subject or a place looks the same when it comes back: its pictures at the return "
                "against those of its first appearance, whole, in a box, or under a mask."
            ),
            search_aliases=["identity consistency", "subject similarity", "long-term memory", "scene consistency"],
            is_output_node=True,
            inputs=[
                *_pictures(),
                *_stretch("first", 0.0, 1.2, "the first appearance"),
                *_stretch("return", 8.4, 9.6, "the return"),
                _vision(),
                *_areas(),
                _fps("A video says"),
            ],
            outputs=[
                io.Float.Output(display_name="similarity", tooltip="0 to 1; what it stands on is in the report."),
                io.Image.Output(display_name="pair", tooltip="The two pictures that are most alike, with their times."),
                io.String.Output(display_name="report", tooltip="The similarity, and a scale to read it by."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, first_start, first_stop, return_start, return_stop, video=None, images=None, clip_vision=None,
        first_box="", return_box="", first_mask=None, return_mask=None, fps=30.0,
    ) -> io.NodeOutput:  # fmt: skip
        footage = _footage(recall.NODE, video, images, fps)
        boxes = [
            recall.parse_box(text, footage.width, footage.height, name)
            for text, name in ((first_box, "first_box"), (return_box, "return_box"))
        ]
        found = recall.compare(
            footage,
            recall.Appearance("first", first_start, first_stop, boxes[0], first_mask),
            recall.Appearance("return", return_start, return_stop, boxes[1], return_mask),
            clip_vision,
            comfy.model_management.throw_exception_if_processing_interrupted,
        )
        report = f"{found.describe()}\n{footage.words}"
        show(cls, report)
        shown = ui.PreviewImage(found.picture_BHWC, cls=cls)
        return io.NodeOutput(found.similarity, found.picture_BHWC, report, ui=shown)


NODES = [FrameMemoryDriftMeter, FrameMemoryRecall]
