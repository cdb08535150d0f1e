"""Nodes of the family "first frame" that feed core's Train LoRA: FFGo's clips, and one expert of Wan 2.2."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.utils
import folder_paths
import node_helpers
import torch
from comfy_api.latest import io, ui

from ..frame_memory.forcing import first_frame
from ..frame_memory.model.experts import loaded_expert
from ..frame_memory.plan import canvas
from ..frame_memory.video import canvas as drawing
from ..frame_memory.video import ffgo_clips
from .canvas_inputs import look, side
from .input_folders import chosen_folder, state_of_chosen
from .shown import show

CATEGORY = "model/training"


def _dataset_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "folder",
            options=folder_paths.get_input_subfolders(),
            tooltip=(
                "A folder in ComfyUI's input folder with 20 to 50 clips: NAME.mp4, NAME.txt (caption), and NAME.png "
                "(ready canvas) or a folder NAME with background.png and cut-outs; or one published .json list."
            ),
        ),
        io.Clip.Input("clip", tooltip="Wan's text encoder (umt5_xxl, type wan); it reads each caption once."),
        io.Vae.Input("vae", tooltip="The Wan 2.1 VAE, which Wan 2.2 I2V A14B uses too. Another one is refused."),
        side(
            "width",
            832,
            "Width of clips and canvases in pixels, a multiple of 16. Paper: 1344; 832 takes far less memory.",
        ),
        side("height", 480, "Height in pixels, a multiple of 16. Paper: 768. Clips fill it and are cut in the middle."),
        io.Int.Input(
            "length",
            default=81,
            min=9,
            max=1001,
            step=4,
            tooltip="Frames of each clip, 4n + 1; 81 as published. Shorter clips are skipped and named.",
        ),
    ]


def _dataset_advanced() -> list[io.Input]:
    return [
        io.Int.Input(
            "start_frame",
            default=0,
            min=0,
            max=1_000_000,
            optional=True,
            advanced=True,
            tooltip="Frames left out at the start of every clip. 0 as published. The canvas replaces the next 4.",
        ),
        io.Combo.Input(
            "layout",
            options=[canvas.STACK, canvas.TWO_COLUMNS],
            default=canvas.STACK,
            optional=True,
            advanced=True,
            tooltip="How cut-outs lie on composed canvases, as in First Frame Composer. Ready canvases are kept.",
        ),
        *look(),
    ]


class FrameMemoryFFGoDataset(io.ComfyNode):
    """A folder of clips as training triples: video that begins with its canvas, what Wan is shown, caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryFFGoDataset",
            display_name=ffgo_clips.NODE,
            category=CATEGORY,
            description=(
                "Makes FFGo's training data from a folder of clips with captions and pictures: each clip begins with "
                "its canvas, each caption with the trigger. Feed it to Train LoRA, once for each expert of Wan 2.2."
            ),
            search_aliases=["ffgo training", "few shot video lora", "train reference to video", "video dataset"],
            inputs=[*_dataset_inputs(), *_dataset_advanced()],
            outputs=[
                io.Latent.Output(
                    display_name="latents", is_output_list=True, tooltip="One LATENT a clip: the video with its canvas."
                ),
                io.Conditioning.Output(
                    display_name="positive",
                    is_output_list=True,
                    tooltip="One a clip: the caption, and the canvas as Wan Image To Video shows it to the model.",
                ),
                io.Image.Output(display_name="canvases", tooltip="The canvases as a batch, one a clip, to look at."),
                io.Int.Output(display_name="count", tooltip="Clips used; what cannot be used is named in the report."),
                io.String.Output(
                    display_name="report", tooltip="Clips used and skipped, and why; frame rates; memory."
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
        cls, folder, clip, vae, width, height, length, start_frame=0, layout=canvas.STACK, keep_background_aspect=False,
        enlarge_small=False, crop_to_content=False, canvas_colour="#ffffff",
    ) -> io.NodeOutput:  # fmt: skip
        root = chosen_folder(folder, ffgo_clips.NODE)
        ffgo_clips.check_request(vae, width, height, length)
        looks = drawing.CanvasLook(layout, keep_background_aspect, enlarge_small, crop_to_content, canvas_colour)
        reader = ffgo_clips.Reader(
            root, (width, height), length, start_frame, looks,
            comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip
        bar = comfy.utils.ProgressBar(2 * len(reader.clips))
        captions = {}
        for made in reader.clips:  # all captions first: the text encoder and the VAE take turns on the GPU only once
            reader.interrupt()
            captions[made.caption] = clip.encode_from_tokens_scheduled(clip.tokenize(made.caption))
            bar.update(1)
        latents, positive, canvases = [], [], []
        for made, frames_THWC in reader.frames():
            latent, image, mask = first_frame.triple(vae, frames_THWC, made.canvas_HWC)
            shown = {"concat_latent_image": image, "concat_mask": mask}
            latents.append(latent)
            positive.append(node_helpers.conditioning_set_values(captions[made.caption], shown))
            canvases.append(made.canvas_HWC)
            bar.update(1)
            show(cls, f"{len(latents)} of {len(reader.clips)}: {made.name}")
        bar.update(len(reader.clips) - len(latents))  # for the damaged ones
        held = [latent["samples"] for latent in latents] + canvases
        entries = [part for made in positive for text, more in made for part in (text, *more.values())]
        held += [part for part in entries if torch.is_tensor(part)]
        size = sum(part.nelement() * part.element_size() for part in held) / 2**20
        report = f"{reader.report()}\nLatents, captions and canvases take {size:.0f} MB of memory."
        show(cls, report)
        return io.NodeOutput(latents, positive, torch.stack(canvases), len(latents), report, ui=ui.PreviewText(report))


class FrameMemoryExpertRange(io.ComfyNode):
    """One of Wan 2.2's two experts, made ready for core's Train LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryExpertRange",
            display_name="Wan Expert for Training",
            category=CATEGORY,
            description=(
                "Lets Train LoRA teach one of Wan 2.2's two models at the noise levels that model works at, and no "
                "others; and keeps each clip's canvas to itself. Sampling with the model is not changed."
            ),
            search_aliases=["high noise", "low noise", "boundary", "moe training", "timestep range", "two experts"],
            inputs=[
                io.Model.Input("model", tooltip="One of the two Wan 2.2 I2V A14B models, from Load Diffusion Model."),
                io.Combo.Input(
                    "expert",
                    options=list(first_frame.EXPERTS),
                    default=first_frame.HIGH,
                    tooltip="Which of the two the model is: its file's name says it. Each gets a LoRA of its own.",
                ),
                io.Float.Input(
                    "boundary",
                    default=first_frame.BOUNDARY,
                    min=0.001,
                    max=0.999,
                    step=0.001,
                    tooltip="Noise level (sigma, 0 to 1) where the models change: 0.9 for Wan 2.2 I2V, 0.875 for T2V.",
                ),
                io.Float.Input(
                    "shift",
                    default=first_frame.SHIFT,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="How levels lie in training: 5 as published; higher means more noise. Not for sampling.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For Train LoRA. Made videos are the same as without."),
                io.String.Output(display_name="report", tooltip="The noise levels that training will draw."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, expert, boundary, shift=first_frame.SHIFT) -> io.NodeOutput:
        changed = first_frame.expert_range(model, expert, boundary, shift)
        levels = first_frame.expert_levels(expert, boundary, shift)
        report = (
            f"{expert} expert: {len(levels)} of {first_frame.LEVELS} noise levels, sigma {levels[0]:.3f} to "
            f"{levels[-1]:.3f} (boundary {boundary:g}, shift {shift:g})."
        )
        loaded = loaded_expert(model)
        if loaded is not None and not expert.startswith(loaded):
            swapped = (
                f"Warning: by its file's name this is the {loaded} noise model, and 'expert' is {expert}. The LoRA "
                "would learn noise levels that this model never works at. Change one of the two, unless you mean it."
            )
            logging.warning("%s", swapped)
            report = f"{swapped}\n{report}"
        show(cls, report)
        return io.NodeOutput(changed, report, ui=ui.PreviewText(report))


NODES = [FrameMemoryFFGoDataset, FrameMemoryExpertRange]
