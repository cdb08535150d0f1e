"""Nodes of the family "journal": what to do anew in a video that is kept section by section."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.sampling.changes import SectionChange
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
                    tooltip="Which section, counted from 1 in the time of the video: 1.2 s (36 frames) each.",
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


NODES = [FrameMemoryPickSection]
