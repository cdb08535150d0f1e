"""Nodes of the family "first frame": references on a canvas, the prompt that goes with it, the cut after it (FFGo)."""

from __future__ import annotations

import uuid
from fractions import Fraction
from pathlib import Path

import folder_paths
from comfy_api.latest import InputImpl, Types, io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..frame_memory.plan import canvas, first_frame_prompt
from ..frame_memory.video import canvas as drawing
from ..frame_memory.video import transition
from .canvas_inputs import look, side
from .shown import show

CATEGORY = "image/first frame"
MOST_REFERENCES = 10
# Sockets that are there from the start, the four of the paper: a mask can be given to any of these alone.
SHOWN = canvas.MOST_SUBJECTS
# Longest side in pixels of the pictures the editor draws.
THUMBNAIL = 512
REFERENCES = [f"reference_{i}" for i in range(1, MOST_REFERENCES + 1)]
MASKS = [f"mask_{i}" for i in range(1, MOST_REFERENCES + 1)]
FIXED, SAFE, DETECT = "4 (official)", "5 (safe)", "find the cut"


def _pictures() -> list[io.Input]:
    return [
        io.Autogrow.Input(
            "references",
            template=io.Autogrow.TemplateNames(
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "A person, animal or thing to appear in the video: best cut out, with the mask of the same "
                        "number (Load Image drops a PNG's transparency, its mask keeps it), else on white. A batch "
                        "makes one canvas for each picture."
                    ),
                ),
                names=REFERENCES,
                min=SHOWN,
            ),
            tooltip="Up to 4 pictures work well, 10 are possible: when the last socket is connected, another appears.",
        ),
        io.Autogrow.Input(
            "masks",
            template=io.Autogrow.TemplateNames(
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Mask for the reference of the same number: 1 where the thing is, as SAM 3 and BiRefNet give "
                        "it. A transparent PNG from Load Image turns black without it; its mask is the other way "
                        "round: put 'Invert Mask' between."
                    ),
                ),
                names=MASKS,
                min=SHOWN,
            ),
            tooltip="Masks by number: of a cut-out blueprint connect reference and mask. Whole pictures need none.",
        ),
        io.Image.Input(
            "background",
            optional=True,
            tooltip="The place where the video happens, without the references. It goes to the right half.",
        ),
    ]


def _composer_inputs() -> list[io.Input]:
    return [
        *_pictures(),
        side(
            "width",
            canvas.OFFICIAL_SIZE[0],
            "Width of the canvas in pixels, a multiple of 16: the width the video is made at. Official: 1280.",
        ),
        side(
            "height",
            canvas.OFFICIAL_SIZE[1],
            "Height of the canvas in pixels, a multiple of 16: the height the video is made at. Official: 720.",
        ),
        io.Combo.Input(
            "layout",
            options=list(canvas.LAYOUTS),
            default=canvas.STACK,
            tooltip=(
                "official stack: references under one another on the left half. two columns: a grid there, for 4 and "
                "more. free boxes: where 'boxes' says; drag them on the picture in this node."
            ),
        ),
        io.String.Input(
            "boxes",
            multiline=True,
            default="",
            tooltip=(
                "For 'free boxes': one a line, 'number: x, y, width x height' in pixels of the canvas, or 'background: "
                "...'. Later lines lie on top; a background in the first line lies under everything. What has no line "
                "keeps its usual place."
            ),
        ),
    ]


class FrameMemoryFirstFrameComposer(io.ComfyNode):
    """References and a background on one canvas, which becomes the first frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryFirstFrameComposer",
            display_name=canvas.NODE,
            category=CATEGORY,
            description=(
                "Puts people, animals and things (four work well) and a place on one picture, the first frame of an "
                "FFGo video: the place on the right. Feed it to Wan Image To Video as the start image."
            ),
            search_aliases=["ffgo", "collage", "reference to video", "subjects", "customization", "stitch images"],
            inputs=[*_composer_inputs(), *look("References with a mask are always cut to their content.")],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The canvas at width x height; one for each of a batch: give the video one of them.",
                ),
                io.Image.Output(
                    display_name="layout",
                    tooltip="The canvas with every region framed and named; the first of a batch.",
                ),
                io.Int.Output(display_name="count", tooltip="Number of references, the background not counted."),
                io.String.Output(display_name="report", tooltip="Warnings, and each region in pixels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, width, height, layout, boxes, references=None, masks=None, background=None, keep_background_aspect=False,
        enlarge_small=False, crop_to_content=False, canvas_colour="#ffffff",
    ) -> io.NodeOutput:  # fmt: skip
        references, masks = _numbered(references), _numbered(masks)
        pictures = drawing.named_pictures(references, masks, background, crop=crop_to_content)
        looks = drawing.CanvasLook(layout, keep_background_aspect, enlarge_small, crop_to_content, canvas_colour, boxes)
        images, layouts = drawing.compose_batch(pictures, (width, height), looks)
        shown = drawing.labelled(images[0], layouts[0])
        report = canvas.describe_all(layouts, drawing.mask_notes(references, masks))
        show(cls, report)
        preview = ui.PreviewImage(shown, cls=cls).as_dict()
        # For the editor in the node: where everything is, and the pictures to drag.
        preview["frame_memory_canvas"] = [{"width": width, "height": height}]
        preview["frame_memory_pictures"] = _thumbnails(pictures)
        return io.NodeOutput(images, shown, len(references), report, ui=preview)


def _thumbnails(pictures: dict) -> list[dict]:
    """The first picture of each region as a small PNG in ComfyUI's temporary folder, for the editor in the node."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, made in pictures.items():
        small = made[0].copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        file = f"frame_memory_{name}_{uuid.uuid4().hex[:12]}.png"
        small.save(folder / file)
        width, height = made[0].size
        files.append({"name": name, "width": width, "height": height, "filename": file, "type": "temp"})
    return files


def _numbered(inputs: dict | None) -> dict[int, object]:
    """Connected inputs of an Autogrow by their number."""
    found = {int(name.rsplit("_", 1)[1]): value for name, value in (inputs or {}).items() if value is not None}
    return dict(sorted(found.items()))


class FrameMemoryFFGoPrompt(io.ComfyNode):
    """The trigger in front of the caption, and what is wrong with the caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryFFGoPrompt",
            display_name=first_frame_prompt.NODE,
            category=CATEGORY,
            description=(
                "Puts FFGo's trigger in front of a caption, once, and says what would make the caption work badly. Its "
                "instruction lets 'Generate Text' write the long caption from the canvas."
            ),
            search_aliases=["ffgo trigger", "ad23r2", "first frame prompt"],
            inputs=[
                io.String.Input(
                    "caption",
                    multiline=True,
                    default="",
                    tooltip=(
                        "The video as if it were already shot, 80 to 200 words: every reference with its look, its "
                        "place and what it does. Never mention the canvas. The trigger is added."
                    ),
                ),
                io.String.Input(
                    "names",
                    default="",
                    tooltip=(
                        "What the references are called in the caption, with commas between: 'red car, tall man'. Each "
                        "one is looked for. Empty: they are counted by guess."
                    ),
                ),
                io.Int.Input(
                    "references",
                    default=0,
                    min=0,
                    max=MOST_REFERENCES,
                    tooltip="How many references there are, from First Frame Composer's 'count'. 0: not checked.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="For CLIP Text Encode (positive prompt)."),
                io.String.Output(
                    display_name="instruction",
                    tooltip="For 'Generate Text' with the canvas as its image; its text goes into another FFGo Prompt.",
                ),
                io.String.Output(display_name="report", tooltip="Warnings about the caption, or 'Nothing to warn of.'"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, caption, names, references) -> io.NodeOutput:
        named = first_frame_prompt.parse_names(names)
        warnings = first_frame_prompt.caption_warnings(caption, references, named)
        report = "\n".join(f"Warning: {w}" for w in warnings) or "Nothing to warn of."
        show(cls, report)
        prompt = first_frame_prompt.with_trigger(caption)
        return io.NodeOutput(
            prompt, first_frame_prompt.instruction(caption, named), report, ui=ui.PreviewText(f"{report}\n\n{prompt}")
        )


class FrameMemoryDropTransitionFrames(io.ComfyNode):
    """The video without the frames that show the canvas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryDropTransitionFrames",
            display_name=transition.NODE,
            category="video",
            description=(
                "Drops the frames at the start of an FFGo video that still show the canvas. Sound is cut by the same "
                "time. Images and video, never latents: the cut lies inside a latent frame."
            ),
            search_aliases=["ffgo trim", "drop first frames", "cut collage"],
            inputs=[
                io.MultiType.Input(
                    "video",
                    types=[io.Image, io.Video, io.Latent],
                    tooltip="The whole decoded clip: IMAGE from VAE Decode, or VIDEO. A latent is refused.",
                ),
                io.Combo.Input(
                    "drop",
                    options=[FIXED, SAFE, DETECT],
                    default=FIXED,
                    tooltip=(
                        "4: 81 frames become 77, as published. 5: also the frame that may carry a ghost of the canvas. "
                        "find the cut: by the change from frame to frame; drops nothing where there is no cut."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames that are left."),
                io.Video.Output(display_name="video", tooltip="The same with its sound, where a VIDEO came in."),
                io.String.Output(display_name="report", tooltip="What was dropped, and how the cut was found."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, video, drop) -> io.NodeOutput:
        if isinstance(video, dict):
            raise transition.refuse_latent()
        parts = video.get_components() if hasattr(video, "get_components") else None
        frames = video if parts is None else parts.images
        count, found = {FIXED: (transition.OFFICIAL, ""), SAFE: (transition.SAFE, "")}.get(drop, (None, ""))
        if count is None:
            cut = transition.find_cut(frames)
            count, found = cut.first_clean or 0, cut.describe()
        transition.check_drop(count, frames.shape[0])
        kept = frames[count:].clone()
        report = f"{frames.shape[0]} frames: {count} dropped, {kept.shape[0]} kept. {found}".strip()
        # Images carry no rate: what is connected to the other output is told so, and the images go on.
        made = ExecutionBlocker(transition.NO_VIDEO)
        if parts is not None:
            rate = Fraction(parts.frame_rate)
            audio = transition.later_sound(parts.audio, count / rate, kept.shape[0] / rate)
            alpha = None if parts.alpha is None else parts.alpha[count:].clone()
            tags = None if parts.metadata is None else dict(parts.metadata)
            made = InputImpl.VideoFromComponents(
                Types.VideoComponents(images=kept, frame_rate=rate, audio=audio, metadata=tags, alpha=alpha)
            )
            report += f" {transition.NO_SOUND}" if audio is None and parts.audio is not None else ""
        show(cls, report)
        return io.NodeOutput(kept, made, report, ui=ui.PreviewText(report))


NODES = [FrameMemoryFirstFrameComposer, FrameMemoryFFGoPrompt, FrameMemoryDropTransitionFrames]
