"""Nodes of the family "context": how history is packed, prompts over time."""

from __future__ import annotations

from itertools import chain

from comfy_api.latest import io, ui

from ..frame_memory.plan import (
    PRESETS,
    TEXT_BESIDE,
    check_size,
    parse_schedule,
    parse_timeline,
    schedule_tokens,
    timeline_table,
)
from ..frame_memory.plan.errors import PACKER
from ..frame_memory.plan.layout import packing_picture
from ..frame_memory.sampling.prompts import EncodedTimeline, tokenise
from ..frame_memory.video.pictures import draw
from .shown import show
from .sockets import FrameContext, FrameContextSocket, TimelineSocket

FREE = "free schedule"


def _packer_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, FREE],
            default="F1 forward",
            tooltip=(
                "The packing the checkpoint was trained with: 'F0 inverted' for FramePackI2V_HY, 'F1 forward' "
                "for FramePack_F1, 'Helios' for Helios. Wan: the one that the report of Frame Preservation Encoder "
                "names, without it that of Wan Frame Context; to train, 'Wan, 81 frames', and '3 clean frames' beside "
                "such a memory. The others are the paper's, for experiments and own training."
            ),
        ),
        io.String.Input(
            "schedule",
            default=PRESETS["F0 inverted"],
            advanced=True,
            tooltip=(
                "Used with 'free schedule'. The paper's notation, time from left to right: fAkB = A latent "
                "frames at kernel B (1, 2, 4, 8), gN = N frames made at once, x = skip, td/ta/tc = drop, "
                "append or compress the tail. Example: f1k1_x_g9_f1k1f2k2f16k4_td"
            ),
        ),
        io.Int.Input(
            "width",
            default=640,
            min=16,
            max=4096,
            step=16,
            advanced=True,
            tooltip=(
                "Video width in pixels, a multiple of 16; only for the token count shown here, which takes 8 pixels "
                "for one of the latent: with Wan 2.2 5B, which has 16, set half the width."
            ),
        ),
        io.Int.Input(
            "height",
            default=608,
            min=16,
            max=4096,
            step=16,
            advanced=True,
            tooltip=(
                "Video height in pixels, a multiple of 16; only for the token count shown here, which takes 8 pixels "
                "for one of the latent: with Wan 2.2 5B, which has 16, set half the height."
            ),
        ),
    ]


class FrameMemoryContextPacker(io.ComfyNode):
    """Choose what the model sees of the history, at which rate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryContextPacker",
            display_name="Frame Context Packer",
            category="model/conditioning/framepack",
            description=(
                "How the finished part of the video is packed into a context of constant length: near frames in full, "
                "far frames ever coarser. The picture shows what is kept at which rate."
            ),
            search_aliases=["framepack schedule", "packing", "context length", "anti-drifting"],
            inputs=_packer_inputs(),
            outputs=[
                FrameContextSocket.Output(
                    display_name="frame_context",
                    tooltip="The packing, for Anti-Drift Sampler.",
                ),
                io.Image.Output(
                    display_name="picture",
                    tooltip="What is kept of the history, at which rate, and where the window is; 960 pixels wide.",
                ),
                io.Int.Output(
                    display_name="tokens",
                    tooltip="Tokens of one section: window and context, of FramePack also image (729) and about 120 of "
                    "text. Constant in the length of the video.",
                ),
            ],
        )

    @classmethod
    def execute(cls, preset, schedule="", width=640, height=608) -> io.NodeOutput:
        parsed = parse_schedule(schedule if preset == FREE else PRESETS[preset])
        check_size(width, height, PACKER)
        beside = {"image_tokens": 0} if preset in TEXT_BESIDE else {"text_tokens": 120}
        count = schedule_tokens(parsed, height // 8, width // 8, **beside)
        picture = draw(packing_picture(parsed, latent_height=height // 8, latent_width=width // 8))
        return io.NodeOutput(FrameContext(parsed), picture, count.total, ui=ui.PreviewImage(picture, cls=cls))


class FrameMemoryPromptTimeline(io.ComfyNode):
    """Times to prompts, encoded with a stock CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryPromptTimeline",
            display_name="Prompt Timeline",
            category="model/conditioning/framepack",
            description=(
                "One prompt a line with the time it holds for. Lines without a time are the prompt for the rest. The "
                "table on the node shows what was understood."
            ),
            search_aliases=["prompt schedule", "prompt travel", "section prompts", "timestamped prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoders of the model: DualCLIPLoader, type hunyuan_video."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="0-3.6: a woman walks along the beach\n3.6-: she turns and waves at the camera",
                    tooltip=(
                        "One prompt a line: '0-3.6: text' (seconds), '3.6-: text' (to the end), '3.6: text' (from "
                        "then on), or '[0s-2s: text]'. Overlaps and times past the end of the video are refused. A "
                        "prompt takes effect with the next section: multiples of 1.2 are exact with FramePack, mostly "
                        "of 5 with Wan (5B: 3.3), of 1.375 with Helios. FramePack reads 256 tokens of each (about 180 "
                        "words of English); the node says what is cut."
                    ),
                ),
                io.Int.Input(
                    "blend_sections",
                    default=1,
                    min=0,
                    max=10,
                    tooltip=(
                        "Over how many sections (FramePack 1.2 s, Wan mostly 5 s, 5B 3.3 s, Helios 1.375 s) a new "
                        "prompt is blended in, linearly; 0 cuts."
                    ),
                ),
            ],
            outputs=[
                TimelineSocket.Output(display_name="timeline", tooltip="Prompts over time, for Anti-Drift Sampler."),
                io.String.Output(
                    display_name="table", tooltip="What was understood: from, to, prompt and why; and warnings."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text, blend_sections) -> io.NodeOutput:
        timeline = parse_timeline(text, blend_sections)
        tokens, warnings = zip(*(tokenise(clip, entry.text) for entry in timeline.entries))
        encoded = tuple(clip.encode_from_tokens_scheduled(t) for t in tokens)
        said = dict.fromkeys(chain.from_iterable(warnings))
        shown = "\n".join([timeline_table(timeline), *(f"Warning: {warning}" for warning in said)])
        show(cls, shown)
        return io.NodeOutput(EncodedTimeline(timeline, encoded), shown, ui=ui.PreviewText(shown))


NODES = [FrameMemoryContextPacker, FrameMemoryPromptTimeline]
