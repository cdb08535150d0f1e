"""FFGo's training data and noise: a clip that begins with its canvas, and the noise levels of one of Wan 2.2's experts.

Shape suffixes: B batch, T frames, H height, W width, C channels (of pixels: 3, values 0..1).
Source: reference/ffgo.md sections 4 and 6; the published training script (`--boundary_type high` and `low`).

Fact: the script lists 1000 sigmas, shift * t / (1 + (shift - 1) * t) for t = 1, 0.999 ... 0.001 with shift 5, splits
the list where sigma is nearest the boundary 0.9, and draws an index of the expert's part with equal chances.
Choice: the list is split where inference changes the expert (sigma >= boundary is high), which differs from the script
by one of the 1000 levels, the one at the boundary.

Core's Train LoRA (0.30.0) has two habits that image-to-video cannot stand, and both are put right on the clone that
`expert_range` makes, while it trains: it gives every clip's conditioning the size of the whole dataset, which is
clips x clips in memory; and a batch of several clips is run with all their conditionings, whose results are averaged.
"""

from __future__ import annotations

import torch
from comfy import model_management
from comfy.model_base import WAN21
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow, time_snr_shift
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_wan import WanImageToVideo

from ..plan.buckets import nearest_valid
from ..plan.frames import nearest_clip

HIGH, LOW = "high noise", "low noise"
EXPERTS = (HIGH, LOW)
# Wan 2.2 I2V A14B changes its expert here; FFGo was trained with this shift, while core samples Wan with 8 unless told.
BOUNDARY, SHIFT = 0.9, 5.0
# Pixel frames that FFGo's training replaces by the canvas.
HELD = 4
LEVELS = 1000
# Under this name the clone keeps what it does while Train LoRA runs.
KEY = "frame_memory_expert"


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

    latent: {"samples": [1, C, t, h, w]} of the clip that begins with the canvas. The other two are what core's Wan
    Image To Video makes for inference from the canvas, and are made by it: only pixel frame 0 is shown, the rest is
    grey (0.5) and masked. Raises FirstFrameTrainingError for lengths other than 4n + 1, sides off the grid of 16, and
    as `with_canvas`.
    """
    made_THWC = with_canvas(frames_THWC, canvas_HWC, held)
    length, height, width = made_THWC.shape[:3]
    near, frames = nearest_valid(width, height), nearest_clip(length)
    if length != frames or (width, height) != near:
        raise FirstFrameTrainingError(
            f"The clip has {length} frames of {width}x{height}; expected 4n + 1 frames with sides that are multiples "
            f"of 16. The nearest is {frames} frames of {near[0]}x{near[1]}."
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
        count = len(self.training_levels)
        return self.training_levels[min(max(int(percent * count), 0), count - 1)]

    def percent_to_sigma(self, percent: float) -> float:
        """Noise at a share of the sampling; while a LoRA is trained, `training_sigma`."""
        return self.training_sigma(percent) if model_management.in_training else super().percent_to_sigma(percent)


def _own_size(executor, noise, *args, **kwargs):
    """Around the whole training: each clip's canvas and mask as one entry for the model, made by the model's own code.

    `noise` is as large as the dataset, and the model repeats each canvas to that size.
    """
    guider = executor.class_obj
    if model_management.in_training and isinstance(guider.model_patcher.model, WAN21):
        for cond in (cond for conds in guider.conds.values() for cond in conds):
            made = guider.model_patcher.model.concat_cond(**{**cond, "noise": noise[:1], "device": noise.device})
            if made is not None:
                cond["noise_concat"] = made
                for name in ("concat_latent_image", "concat_mask"):
                    cond.pop(name, None)
    return executor(noise, *args, **kwargs)


def _own_conditioning(executor, model, conds, x_BCTHW, timestep_B, model_options):
    """Around one evaluation of the model in training: clip i of a batch with conditioning i and no other."""
    count = x_BCTHW.shape[0]
    if not model_management.in_training or count == 1 or any(c is not None and len(c) != count for c in conds):
        return executor(model, conds, x_BCTHW, timestep_B, model_options)
    made = [
        executor(model, [c and [c[i]] for c in conds], x_BCTHW[i : i + 1], timestep_B[i : i + 1], model_options)
        for i in range(count)
    ]
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def expert_range(model, expert: str, boundary: float = BOUNDARY, shift: float = SHIFT):
    """A clone of a MODEL for core's Train LoRA: one expert's noise levels, and each clip with its own canvas.

    shift: of the levels drawn in training; the model's own shift is kept for sampling, which is the same with the clone
    as with the MODEL given, and that is not changed. Raises FirstFrameTrainingError for a model that is not of the flow
    kind (Wan is), and as `expert_levels`.
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
    wrappers = changed.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    # In the options and not on the patcher: core asks for the outer one before it merges the patcher's own.
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _own_size), (WrappersMP.CALC_COND_BATCH, _own_conditioning)):
        wrappers.setdefault(kind, {})[KEY] = [wrapper]
    return changed
