"""What the section loop asks of a MODEL's family: does it take history, its frame rate, its pixels, what prompts carry.

FramePack reads a section's context in its own `extra_conds`; on Wan it goes past core's classes to the wrapper of
`wan.attach`. Source: reference/comfyui-host.md section 2 (extra conds), pfp reference 2.4.
"""

from __future__ import annotations

from ..plan import BESIDE_MEMORY, PRESETS, WAN_PRESET, parse_schedule
from ..plan.mark import fps_of
from . import wan
from .context import PackedContext
from .framepack import FRAME_CONTEXT_KEY, MODEL_OPTION, has_context_weights, is_framepack
from .sources import LOAD_MODEL, LOAD_WAN, WAN_CONTEXT

# What 'Wan Image To Video' and the like put into a prompt: frames that are given inside the window.
GIVEN_FRAMES = ("concat_latent_image", "concat_mask")
# In MODEL_OPTION beside FramePack's: frames a second where a loader knows better than the latent format, what the
# patchifiers are called, whether they are trained, and the schedule that they are trained on. Under provenance.LORAS
# the LoRAs that they are trained with.
FPS_SAID, PATCHIFIERS, TRAINED, SCHEDULE = "fps", "patchifiers", "trained", "schedule"
# There, the display name of a loader of Wan that is not core's; and that each section is a clip of its own: decoded
# alone, begun from a still clip of the start picture.
LOADER, CLIPS = "loader", "clips"


def said(model_patcher) -> dict:
    """What a loader of ours has noted on a MODEL."""
    return model_patcher.model_options.get(MODEL_OPTION, {})


def loader_of(model_patcher) -> str:
    """Display name of the node that loads such a MODEL, for messages."""
    return said(model_patcher).get(LOADER) or (LOAD_MODEL if is_framepack(model_patcher) else LOAD_WAN)


def is_wan(model_patcher) -> bool:
    """Whether a MODEL is one of core's Wan models that could take history."""
    try:
        wan.check(model_patcher)
    except ValueError:
        return False
    return True


def name_of(model_patcher) -> str:
    """What people call a MODEL: FramePack, Wan or Helios; of others as `wan.kind_of` says."""
    if is_framepack(model_patcher):
        return "FramePack"
    if not is_wan(model_patcher):
        return wan.kind_of(model_patcher.model)
    return "Helios" if makes_clips(model_patcher) else "Wan"


def check_running_wan(model_patcher):
    """The network of a Wan MODEL that frame preservation and patchifiers of ours are for. Raises ValueError as
    `wan.check` does, and for a MODEL whose sections are clips of their own."""
    network = wan.check(model_patcher)
    if makes_clips(model_patcher):
        raise ValueError(
            "Each section of this MODEL's videos (Helios) is a clip of its own, and it has learned to pack its history "
            f"itself. Expected Wan 2.1 or 2.2 from '{LOAD_WAN}', whose sections are one running video."
        )
    return network


def why_no_history(model_patcher) -> str | None:
    """Why a MODEL cannot look at a frame context, and what to do; None where it can."""
    if is_framepack(model_patcher) or wan.accepts_context(model_patcher):
        return None
    name = name_of(model_patcher)
    if is_wan(model_patcher):
        return (
            f"The MODEL behind the guider is {name} and has no patchifiers for frames of history. Put "
            f"'{WAN_CONTEXT}' between '{LOAD_WAN}' (or the last LoRA) and the guider."
        )
    return (
        f"The model behind the guider is {name}: this checkpoint has no packed-context weights. Expected a FramePack "
        f"model from '{LOAD_MODEL}', or Wan 2.1 or 2.2 with '{WAN_CONTEXT}' behind its loader."
    )


def pixels_a_latent(model_patcher) -> int:
    """Pixels of width or height for one latent pixel: 8, of Wan 2.2 5B 16."""
    return model_patcher.model.latent_format.spacial_downscale_ratio


def frames_a_second(model_patcher) -> float:
    """Pictures a second of the videos that a MODEL makes."""
    known = said(model_patcher).get(FPS_SAID)
    return float(known or fps_of(type(model_patcher.model.latent_format).__name__))


def makes_clips(model_patcher) -> bool:
    """Whether each section of a MODEL's videos is a clip of its own, to be decoded alone."""
    return bool(said(model_patcher).get(CLIPS))


def schedule_of(model_patcher, beside_memory: bool = False) -> str:
    """The schedule that a MODEL was trained on: as its loader noted, or its family's preset.

    beside_memory: the finished frames stand beside a memory of frame preservation. A Wan that was trained on none then
    sees those that its own embedding reads.
    """
    wan_preset = BESIDE_MEMORY if beside_memory else WAN_PRESET
    return said(model_patcher).get(SCHEDULE) or PRESETS[wan_preset if is_wan(model_patcher) else "F1 forward"]


def window_of(model_patcher) -> int:
    """Latent frames of a section that a MODEL was trained on."""
    return parse_schedule(schedule_of(model_patcher)).window


def carried_context(base_model, context: PackedContext) -> dict:
    """What every prompt of a section carries of its context.

    A Wan window holds no given frame: core then makes image and mask of an image-to-video model zeros, and the start
    picture is seen in its context.
    """
    packed = {"latents": context.latents, "layout": context.layout}
    if has_context_weights(base_model):
        return {FRAME_CONTEXT_KEY: packed}
    return {**dict.fromkeys(GIVEN_FRAMES), "model_conds": wan.conditions(base_model, packed)}
