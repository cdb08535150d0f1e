"""What a model whose sections are clips of their own (Helios) takes, and what it cannot go on from.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels (VAE space).
Source: diffusers 0.39, pipelines/helios/pipeline_helios.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..plan import PlanError
from ..plan.errors import IMAGE, SAMPLER
from ..plan.mark import read_mark

# Of a picture that is held still for 33 pictures, as one clip.
STILL_FRAMES = 9


def still_of(start_BCTHW: Tensor) -> Tensor | None:
    """The last latent frame `[B, C, 1, H, W]` of the still clip in 'start'; None for an empty latent, text to video.

    Raises PlanError for a latent that is neither.
    """
    if not start_BCTHW.any():
        return None
    held = start_BCTHW.shape[2]
    if held != STILL_FRAMES:
        raise PlanError(
            f"'start' of {SAMPLER} holds {held} latent frame{'s' * (held != 1)}, and this MODEL begins from "
            f"{STILL_FRAMES}: its start picture held still for 33 pictures, since its history begins with the last of "
            f"them. Switch 'still_clip' on in '{IMAGE}'. For text to video, without a picture, feed 'Empty "
            "HunyuanVideo 1.0 Latent' into 'start'."
        )
    return start_BCTHW[:, :, -1:]


def check_clips(history: Mapping | None, initial: Mapping | None, window: int) -> None:
    """Raise PlanError for what a run with such a model cannot take. history, initial: LATENT dicts.

    window: latent frames of a section.
    """
    if history is not None:
        raise PlanError(
            f"'history' of {SAMPLER} is connected, and this MODEL cannot go on from an existing video yet: it reads "
            "one as clips of 33 pictures, encoded one by one with a little noise, which no node here makes. Disconnect "
            f"'history'; feed 'image' of 'Video History', its last picture, into '{IMAGE}', and join the two videos "
            "with 'Join Videos' at overlap 0. A video that was made here grows with 'seconds' in the same 'project': "
            "finished sections stay."
        )
    mark = None if initial is None else read_mark(initial)
    if initial is not None and (mark is None or mark.clip != window):
        held = f"clips of {mark.clip} latent frames" if mark and mark.clip else "one running video"
        raise PlanError(
            f"'initial' of {SAMPLER} holds {held}, and each section of this MODEL is a clip of {window}: the same "
            f"shape, other pictures. Expected 'samples' of another {SAMPLER} with a MODEL and a preset of this kind; "
            "or take 'initial' out."
        )
