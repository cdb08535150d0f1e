"""Memory on while a video is made: psi from one section to the next, kept in the project, and what an artist is told.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels (VAE space), M memory tokens, D hidden
size. Source: reference/memorypack.md sections 2.4 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..journal.fingerprint import fingerprint
from ..model.framepack import MEMORY_KEY
from ..model.memory import ATTACHED, LOAD_MEMORY, MEMORY_PACK, FrameMemory, check_fits, gate_of, is_attached
from ..model.preserved_memory import PreservedMemory, check_preserved
from ..plan import START, LongVideoPlan, PlanError, Section, pixel_frames
from ..plan.errors import SAMPLER
from ..plan.memory import FARTHEST_DISTANCE, given_clips, memory_tokens, with_true_image
from ..plan.preservation import PRESERVATION
from .encoder import check_finite, check_forward, load
from .experts import models_of
from .identity import encoder_outline, short
from .preservation import PreservationRun, with_preserved

# Bytes of work memory for each number of a clip's tokens: the widest layer of the encoder, in and out, and attention.
_WORK = 64
NAME = "psi.{}"
LOST = (
    f"The MODEL brings a memory encoder with it, and 'memory' of '{SAMPLER}' is not connected, so it is not used. "
    f"Connect 'memory' of '{MEMORY_PACK}' or '{PRESERVATION}', or take the MODEL from before that node."
)


class MemoryRun:
    """psi of one run: begins with prompt, picture and existing video, takes in each finished section.

    given: frames of an existing video `[B or 1, C, T, H, W]`, or None. window: latent frames of a section. batch: how
    many videos are made at once, B; features of more are left out and of fewer repeated, as core does.
    """

    def __init__(self, memory: FrameMemory, patcher, given: Tensor | None, window: int, batch: int):
        self.memory, self.patcher, self.given, self.window, self.batch = memory, patcher, given, window, batch
        self.spans = () if given is None else given_clips(given.shape[2], window)
        self.clips = len(self.spans)
        self._psi: Tensor | None = None
        self._seen = self._beginning()

    @property
    def psi(self) -> Tensor:
        """`[B or 1, M, D]` after all clips so far, on the CPU; computed where nobody has kept it."""
        if self._psi is None:
            with torch.no_grad():
                pack, device = self._loaded()
                text, vision = self.memory.text, self.memory.vision
                psi = pack.anchor(text.to(device), None if vision is None else vision.to(device)).cpu()
                self._psi = psi if psi.shape[0] == 1 else comfy.utils.repeat_to_batch_size(psi, self.batch)
                for number, (start, stop) in enumerate(self.spans):
                    self._psi = self._updated(self._psi, self.given[:, :, start:stop], number == 0)
        return self._psi

    @property
    def seen(self) -> str | None:
        """What says the memory of the next section exactly; None where that section is shown none."""
        return self._seen if self.clips else None

    def tokens(self) -> Tensor | None:
        """What the next section is shown, `[B, M, D]`; None before the first clip."""
        return self.memory.pack.tokens(self.psi) if self.clips else None

    def carried(self, section: Section) -> dict:
        """What a section's prompts carry of the memory."""
        tokens = self.tokens()
        return {} if tokens is None else {MEMORY_KEY: tokens}

    def take(self, window_BCTHW: Tensor, kept: Callable[[str], Tensor | None] | None = None) -> dict[str, Tensor]:
        """Take in a finished section; returns what is to be kept beside it, by name.

        kept: what was kept beside it, by name. Raises SectionError where psi is not finite.
        """
        seen = fingerprint([self._seen, window_BCTHW])
        name = NAME.format(seen[:16])
        found = kept(name) if kept is not None else None
        with torch.no_grad():
            psi = found if found is not None else self._updated(self.psi, window_BCTHW, self.clips == 0)
        self._psi, self._seen, self.clips = psi, seen, self.clips + 1
        return {name: psi}

    def bytes_a_section(self, shape: tuple[int, ...]) -> int:
        """Bytes of psi beside a section's samples. shape: of the start latent, `[B, C, T, H, W]`."""
        spec, text = self.memory.spec, self.memory.text.shape[1]
        anchor = text + (0 if self.memory.vision is None else self.memory.vision.shape[1])
        clip = memory_tokens(self.window, *shape[-2:])
        tokens = {"A": clip, "B": anchor, "C": anchor + clip}[spec.squeeze]
        return shape[0] * tokens * spec.hidden * self.memory.pack.dtype.itemsize

    def words(self) -> str:
        """The identity of the memory for a list of what a run was made with."""
        memory = self.memory
        known = short([encoder_outline(memory), memory.text, memory.vision])
        return f"{memory.label}, gate {gate_of(memory.pack):.4g} ({known})"

    def _beginning(self) -> str:
        memory = self.memory
        family = type(self.patcher.model.latent_format).__name__
        return fingerprint([encoder_outline(memory), memory.text, memory.vision, self.given, self.window, family])

    def _updated(self, psi: Tensor, clip_BCTHW: Tensor, first: bool) -> Tensor:
        pack, device = self._loaded(clip_BCTHW.shape)
        clip_BCTHW = comfy.utils.repeat_to_batch_size(clip_BCTHW, max(clip_BCTHW.shape[0], psi.shape[0]))
        clip = self.patcher.model.process_latent_in(clip_BCTHW.to(device, torch.float32))
        psi = pack.update(psi.to(device), clip, first=first).cpu()
        check_finite(self.memory, psi)
        return psi

    def _loaded(self, shape: tuple[int, ...] = (1, 1, 1, 8, 8)):
        memory = self.memory
        features = [memory.text.shape[1], 0 if memory.vision is None else memory.vision.shape[1]]
        tokens = memory_tokens(*shape[-3:]) + sum(features)
        needed = shape[0] * tokens * memory.spec.hidden * _WORK
        return memory.pack, load(memory, self.patcher, needed)


def remembering(memory: FrameMemory | PreservedMemory | None, guider) -> tuple[Any, list[str]]:
    """(the MODEL of a GUIDER that a memory belongs to, warnings of an expert that goes without).

    Of two experts those are shown a memory whose MODELs bring its encoder. Raises PlanError where none does or one
    brings another encoder, MemoryMismatch where it is of another base.
    """
    models = models_of(guider)
    bring = {which or "high noise ": patcher for which, patcher in models.items() if is_attached(patcher)}
    first = next(iter(bring.values()), guider.model_patcher)
    if len(models) == 1 or not isinstance(memory, PreservedMemory):
        return first, []
    if not bring:
        raise PlanError(
            f"'memory' of '{SAMPLER}' is connected, and no expert of the guider brings its encoder. Put "
            f"'{PRESERVATION}' between the expert that the memory was trained for and 'Wan Expert Guider'."
        )
    for which, patcher in bring.items():
        if patcher.get_additional_models_with_key(ATTACHED)[0].model is not memory.history:
            raise PlanError(
                f"The {which}expert brings another encoder than 'memory' of '{SAMPLER}', and a run has one. Feed both "
                f"'{PRESERVATION}' from the same '{LOAD_MEMORY}', or take the one of this expert out."
            )
        check_preserved(memory, patcher, SAMPLER)
    if len(bring) == len(models):
        return first, []
    without = "low" if first is guider.model_patcher else "high"
    return first, [
        f"The {without} noise expert is not shown the memory, since its MODEL brings no encoder: it sees the packed "
        f"context alone. Put it through '{PRESERVATION}' too if it was trained with this memory."
    ]


def with_memory(
    memory: FrameMemory | PreservedMemory | None, patcher, plan: LongVideoPlan, inputs
) -> tuple[MemoryRun | PreservationRun | None, LongVideoPlan, list[str], list[str]]:
    """(what carries the memory through the run, the plan as it was trained on, lines for people, warnings).

    patcher: the MODEL. inputs: the section loop's. A closed gate changes nothing: no run, and the plan as it was.
    Raises PlanError for a memory without features or an order that is not forward, MemoryMismatch for one of another
    base.
    """
    if memory is None:
        return None, plan, [], [LOST] if is_attached(patcher) else []
    if isinstance(memory, PreservedMemory):
        run, lines, warnings = with_preserved(memory, patcher, plan, inputs)
        return run, plan, lines, warnings
    _check(memory, patcher, plan)
    fits = check_fits(memory, patcher, SAMPLER)
    if not bool(memory.pack.gate):
        words = "untrained: its gate is closed" if not memory.trained else "its gate is closed (0)"
        line = f"Memory: {memory.label} is {words}, so it changes nothing and takes no time."
        return None, plan, [line], []
    run = MemoryRun(memory, patcher, inputs.given, plan.schedule.window, inputs.start.shape[0])
    clip = memory_tokens(plan.schedule.window, *inputs.start.shape[-2:])
    lines = [
        f"Memory: {memory.describe()}. {clip} tokens a clip; each section sees all that was finished before it. {fits}"
    ]
    if not memory.spec.true_image or not plan.schedule.anchor_before:
        return run, plan, lines, []
    image = START if not plan.given_frames else plan.given_frames - 1
    moved = replace(plan, sections=tuple(with_true_image(section, image) for section in plan.sections))
    return run, moved, lines, _too_far(plan, image)


def _check(memory: FrameMemory, patcher, plan: LongVideoPlan) -> None:
    if memory.text is None:
        raise PlanError(
            f"'memory' of '{SAMPLER}' was told neither prompt nor picture: it comes straight from the node that loads "
            f"or trains it. Expected a memory from '{MEMORY_PACK}': put that node between the two."
        )
    check_forward(patcher, plan)


def _too_far(plan: LongVideoPlan, image: int) -> list[str]:
    """One warning for a video longer than the rotary position of its image reaches (faults.md 21)."""
    far = [s for s in plan.sections if s.start - max(image, 0) > FARTHEST_DISTANCE]
    if not far:
        return []
    seconds = pixel_frames(FARTHEST_DISTANCE + max(image, 0)) / plan.fps
    return [
        f"Beyond {seconds:.0f} s ({len(far)} of {len(plan.sections)} sections) the start picture stays "
        f"{FARTHEST_DISTANCE} latent frames away: the model's positions repeat from there on."
    ]
