"""FFGo's training data and noise: a clip that begins with its canvas, and the noise levels of one of Wan 2.2's experts.

Shape suffixes: T pixel frames, H height, W width, C channels (3, values 0..1).
Source: reference/ffgo.md sections 4 and 6; the published training script (`--boundary_type high` and `low`).

Fact: the script lists 1000 sigmas, shift * t / (1 + (shift - 1) * t) for t = 1, 0.999 ... 0.001 with shift 5, splits the
list where sigma is nearest the boundary 0.9, and draws an index of the expert's part with equal chances.
Choice: the list is split where inference changes the expert (sigma >= boundary is high), which differs from the script
by one of the 1000 levels, the one at the boundary.
"""

from __future__ import annotations

import torch
from comfy import model_management
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow, time_snr_shift
from comfy_extras.nodes_wan import WanImageToVideo

HIGH, LOW = "high noise", "low noise"
EXPERTS = (HIGH, LOW)
# Wan 2.2 I2V A14B changes its expert here; FFGo was trained with this shift, while core samples Wan with 8 unless told.
BOUNDARY, SHIFT = 0.9, 5.0
# Pixel frames that FFGo's training replaces by the canvas.
HELD = 4
LEVELS = 1000


class FirstFrameTrainingError(ValueError):
    """Frames, a canvas or a model that cannot be trained on. The message says what to change."""


def with_canvas(frames_THWC: torch.Tensor, canvas_HWC: torch.Tensor, held: int = HELD) -> torch.Tensor:
    """A new clip of the same length whose frames 0..held-1 are the canvas; the clip's own first frames are lost.

    Raises FirstFrameTrainingError where the sizes differ, where anything is not RGB, or where nothing of the clip would
    be left.
    """
    clip, canvas = tuple(frames_THWC.shape), tuple(canvas_HWC.shape)
    if len(clip) != 4 or len(canvas) != 3 or clip[-1] != 3 or canvas[-1] != 3:
        raise FirstFrameTrainingError(
            f"Got a clip of shape {clip} and a canvas of shape {canvas}; expected RGB: [frames, height, width, 3] and "
            "[height, width, 3]."
        )
    if clip[1:3] != canvas[:2]:
        raise FirstFrameTrainingError(
            f"The clip is {clip[2]}x{clip[1]} pixels and its canvas {canvas[1]}x{canvas[0]}; expected the same size. "
            "Compose the canvas at the size of the clip."
        )
    if not 1 <= held < clip[0]:
        raise FirstFrameTrainingError(
            f"{held} frames of a clip of {clip[0]} are to hold the canvas; expected 1 to {clip[0] - 1}."
        )
    made_THWC = frames_THWC.clone()
    made_THWC[:held] = canvas_HWC.to(made_THWC)
    return made_THWC


@torch.no_grad()
def triple(
    vae, frames_THWC: torch.Tensor, canvas_HWC: torch.Tensor, held: int = HELD
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(latent, concat_latent_image, concat_mask) of one training clip; the caption is the third thing of the triple.

    latent: {"samples": [1, C, t, h, w]} of the clip that begins with the canvas. The other two are what core's Wan Image
    To Video makes for inference from the canvas, and are made by it: only pixel frame 0 is shown, the rest is grey (0.5)
    and masked. Raises FirstFrameTrainingError for lengths other than 4n + 1, sides off the grid of 16, and as
    `with_canvas`.
    """
    made_THWC = with_canvas(frames_THWC, canvas_HWC, held)
    length, height, width = made_THWC.shape[:3]
    near = [max(round(side / 16) * 16, 16) for side in (width, height)]
    if length % 4 != 1 or [width, height] != near:
        raise FirstFrameTrainingError(
            f"The clip has {length} frames of {width}x{height}; expected 4n + 1 frames with sides that are multiples of "
            f"16. The nearest is {max(round((length - 1) / 4), 1) * 4 + 1} frames of {near[0]}x{near[1]}."
        )
    nothing = torch.zeros(1, 1, 1)
    positive = WanImageToVideo.execute(
        [[nothing, {}]], [], vae, width, height, length, 1, start_image=canvas_HWC.unsqueeze(0)
    )[0]
    shown = positive[0][1]
    return {"samples": vae.encode(made_THWC)}, shown["concat_latent_image"], shown["concat_mask"]


def expert_levels(expert: str, boundary: float = BOUNDARY, shift: float = SHIFT) -> tuple[float, ...]:
    """The sigmas one expert is trained at, each as likely as the others, from the noisiest on.

    high noise: sigma >= boundary; low noise: the rest, without 0. Raises FirstFrameTrainingError.
    """
    if expert not in EXPERTS:
        raise FirstFrameTrainingError(f"The expert is {expert!r}; expected one of: {', '.join(EXPERTS)}.")
    levels = [float(time_snr_shift(shift, 1 - i / LEVELS)) for i in range(LEVELS)]
    found = tuple(level for level in levels if (level >= boundary) == (expert == HIGH))
    if not found:
        raise FirstFrameTrainingError(
            f"With boundary {boundary:g} and shift {shift:g} the {expert} expert has none of the noise levels "
            f"{levels[0]:g} to {levels[-1]:g}. Wan 2.2's image-to-video experts change at {BOUNDARY}."
        )
    return found


class ExpertSampling(ModelSamplingDiscreteFlow, CONST):
    """Core's flow sampling, but training draws the noise levels of one expert.

    Core's Train LoRA asks `percent_to_sigma` with an evenly distributed number for each sample's noise, and says so by
    `in_training`. Everything else, and `percent_to_sigma` outside of training, is as it was.
    """

    training_levels: tuple[float, ...] = ()

    def training_sigma(self, percent: float) -> float:
        """The expert's noise level for a number of 0 to 1."""
        return self.training_levels[min(max(int(percent * len(self.training_levels)), 0), len(self.training_levels) - 1)]

    def percent_to_sigma(self, percent: float) -> float:
        """Noise at a share of the sampling; while a LoRA is trained, `training_sigma`."""
        return self.training_sigma(percent) if model_management.in_training else super().percent_to_sigma(percent)


def expert_range(model, expert: str, boundary: float = BOUNDARY, shift: float = SHIFT):
    """A clone of a MODEL on which core's Train LoRA draws only the noise levels of one expert.

    shift: of the levels drawn in training; the model's own shift is kept for sampling. The MODEL given is not changed.
    Raises FirstFrameTrainingError for a model that is not of the flow kind (Wan is), and as `expert_levels`.
    """
    levels = expert_levels(expert, boundary, shift)
    original = model.get_model_object("model_sampling")
    if not (isinstance(original, ModelSamplingDiscreteFlow) and isinstance(original, CONST)):
        raise FirstFrameTrainingError(
            f"The model samples by {type(original).__name__}; expected a flow model with 1000 steps, such as Wan 2.2 "
            "I2V A14B. Choose one of its two files in 'Load Diffusion Model'."
        )
    changed = model.clone()
    sampling = ExpertSampling(model.model.model_config)
    sampling.set_parameters(original.shift, len(original.sigmas), original.multiplier)
    sampling.set_noise_scale(getattr(original, "noise_scale", 1.0))
    sampling.training_levels = levels
    changed.add_object_patch("model_sampling", sampling)
    return changed
