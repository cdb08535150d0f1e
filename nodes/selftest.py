"""Developer node: the encoders' stand-ins for the self-test models."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.model.selftest import SelfTestText, SelfTestVision


class FrameMemorySelfTestEncoders(io.ComfyNode):
    """Takes the place of DualCLIPLoader and CLIPVisionLoader in graphs for the self-test models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemorySelfTestEncoders",
            display_name="Self-Test Encoders",
            category="_for_testing/frame_memory",
            description=(
                "Stand-ins for the text and vision encoders, without weights. They only fit the small self-test models "
                "that ship with Frame Memory, which know sprites such as 'a red circle moves right slowly over navy "
                "hills ground'."
            ),
            is_dev_only=True,
            inputs=[],
            outputs=[
                io.Clip.Output(
                    display_name="clip", tooltip="For CLIP Text Encode and Prompt Timeline; 20 words at most."
                ),
                io.ClipVision.Output(display_name="clip_vision", tooltip="For FramePack Image; 16 tokens."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(SelfTestText(), SelfTestVision())


NODES = [FrameMemorySelfTestEncoders]
