"""What both kinds of memory do alike in a run: their encoder put where it works, and what is refused in one voice."""

from __future__ import annotations

import comfy.model_management
import torch
from torch import Tensor

from ..model.families import schedule_of
from ..model.framepack import is_framepack
from ..model.memory import ATTACHED, FrameMemory
from ..model.preserved_memory import PreservedMemory
from ..plan import LongVideoPlan, PlanError, in_words
from ..plan.errors import PACKER, SAMPLER
from .guards import SectionError


def load(memory: FrameMemory | PreservedMemory, patcher, needed: int) -> torch.device:
    """Have ComfyUI put a memory's network where it works; returns that device.

    patcher: the MODEL, which may bring the encoder. needed: bytes of work memory.
    """
    attached = patcher.get_additional_models_with_key(ATTACHED)
    encoder = next((other for other in attached if other.model is memory.encoder.model), memory.encoder)
    comfy.model_management.load_models_gpu([encoder], memory_required=needed)
    return encoder.load_device


def check_finite(memory: FrameMemory | PreservedMemory, *made: Tensor) -> None:
    """Raise SectionError for NaN or infinite values among what a memory made."""
    if not all(bool(torch.isfinite(values).all()) for values in made):
        raise SectionError(
            f"The memory {memory.label} gave NaN or infinite values, so the next section cannot be made with it. What "
            f"was finished is kept. Use an earlier checkpoint of the memory, or take 'memory' out of '{SAMPLER}'."
        )


def check_forward(patcher, plan: LongVideoPlan, taught: str = "") -> None:
    """Raise PlanError for a plan that makes later sections first, with the preset for the MODEL.

    taught: the schedule that the memory was trained beside, where it says.
    """
    if plan.order == "forward":
        return
    wanted = f"{in_words(taught or schedule_of(patcher, beside_memory=True))} in '{PACKER}'"
    if is_framepack(patcher):
        wanted = f"preset 'F1 forward' in '{PACKER}', with a FramePack F1 model"
    raise PlanError(
        f"'memory' of '{SAMPLER}' holds what came before, and order {plan.order} with {plan.schedule.text} makes later "
        f"sections first. Expected order forward: {wanted}. Or take 'memory' out of '{SAMPLER}'."
    )
