"""Nodes of the family "preservation": frames of the whole video kept in few tokens, and what is kept of one of them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..frame_memory.model.memory import MEMORY_PACK, of_kind
from ..frame_memory.model.memory_file import FRAME_PRESERVATION
from ..frame_memory.model.preserved_memory import attach_preserved, check_preserved, with_tokens
from ..frame_memory.plan import trained_on
from ..frame_memory.plan.preservation import PRESERVATION
from ..frame_memory.sampling.preservation import words_of_budget
from ..frame_memory.sampling.retrieve import RETRIEVE, retrieve_frame
from .shown import show
from .sockets import FrameMemorySocket


class FrameMemoryFramePreservation(io.ComfyNode):
    """Let a MODEL take the tokens of frame preservation, and say how many of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryFramePreservation",
            display_name=PRESERVATION,
            category="model/conditioning/framepack",
            description=(
                "Attaches a memory of frame preservation to the MODEL: each finished section is kept in a few hundred "
                "tokens at its place in time, and every later section sees them. Connect both outputs: MODEL to the "
                "guider, memory to Anti-Drift Sampler."
            ),
            search_aliases=["pfp", "tinyhistory", "history embedding", "long term memory", "frame query"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "FramePack-F1 or Wan, LoRAs and all; of Wan 2.2 A14B the expert that the memory was trained "
                        "for. It is not changed; a copy is returned."
                    ),
                ),
                FrameMemorySocket.Input(
                    "memory", tooltip="Frame preservation from Load Memory Encoder. Another kind or base is refused."
                ),
                io.Int.Input(
                    "tokens",
                    default=8192,
                    min=1,
                    max=1_000_000,
                    tooltip=(
                        "Most tokens of history a section sees; past that the oldest go. More reach farther back and "
                        "make each step slower: 8192 are about 24 s of 832x480 at 30 fps with 4x4x2."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the encoder attached, for the guider."),
                FrameMemorySocket.Output(
                    display_name="memory", tooltip="The memory with its limit, for Anti-Drift Sampler's 'memory'."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip=(
                        "Rate and base of the memory, how far back its tokens reach, what cross-attention costs, and "
                        "after stage 2 the schedule for Frame Context Packer."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, memory, tokens) -> io.NodeOutput:
        memory = of_kind(memory, FRAME_PRESERVATION, PRESERVATION, MEMORY_PACK)
        fits = check_preserved(memory, model, PRESERVATION)
        limited = with_tokens(memory, tokens)
        lines = [limited.describe(), fits, words_of_budget(limited, model)]
        report = "\n".join([*lines, *([trained_on(limited.schedule)] if limited.schedule else [])])
        show(cls, report)
        return io.NodeOutput(attach_preserved(model, limited), limited, report, ui=ui.PreviewText(report))


class FrameMemoryRetrieveFrame(io.ComfyNode):
    """One frame of a video as a memory holds it, beside the frame itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryRetrieveFrame",
            display_name=RETRIEVE,
            category="video",
            description=(
                "Asks a memory of frame preservation for one frame of a video and shows it beside the frame itself: "
                "what is remembered. For a MODEL with the LoRA of training stage 1 (frame query)."
            ),
            search_aliases=["pfp", "tinyhistory", "frame query", "what is remembered", "psnr", "ssim"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="'model' of Frame Preservation Encoder, with the LoRA of stage 1 on."),
                FrameMemorySocket.Input("memory", tooltip="'memory' of the same Frame Preservation Encoder."),
                io.Conditioning.Input("positive", tooltip="The video's prompt, as it was trained: with its pictures."),
                io.Latent.Input("samples", tooltip="The video that is remembered, as a latent of the model's VAE."),
                io.Vae.Input("vae", tooltip="The VAE of the model, to show both frames as pictures."),
                io.Float.Input(
                    "seconds",
                    default=1.0,
                    min=0.0,
                    max=36_000.0,
                    step=0.05,
                    tooltip="Time of the frame in the video, in seconds, rounded to the nearest picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=200,
                    tooltip="Steps of denoising one latent frame; 20 are enough, and each is short.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Of the noise. What changes with it is guessed, and what stays is remembered.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="pair", tooltip="Left the frame itself, right what the memory holds."),
                io.Float.Output(
                    display_name="psnr",
                    tooltip="Likeness of the two in dB; the report says what that is worth.",
                ),
                io.Float.Output(display_name="ssim", tooltip="Likeness of their structure; 1 is the same picture."),
                io.String.Output(
                    display_name="report",
                    tooltip=(
                        "The video's name, both numbers, those of the mean of other frames in its place, the tokens. "
                        "Of several videos Preview as Text shows all."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, memory, positive, samples, vae, seconds, steps, seed) -> io.NodeOutput:
        memory = of_kind(memory, FRAME_PRESERVATION, RETRIEVE, MEMORY_PACK)
        found = retrieve_frame(
            model=model, memory=memory, positive=positive, latent=samples, vae=vae, seconds=seconds, steps=steps,
            seed=seed,
        )  # fmt: skip
        show(cls, found.report)
        shown = ui.PreviewImage(found.picture, cls=cls)
        return io.NodeOutput(found.picture, found.psnr, found.ssim, found.report, ui=shown)


NODES = [FrameMemoryFramePreservation, FrameMemoryRetrieveFrame]
