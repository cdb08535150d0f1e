"""The section loop: a stock GUIDER, SAMPLER, SIGMAS and NOISE driven over a plan, one window after the other.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. All latents here are in VAE space, as in
a LATENT; the model scales them on its side.
Source: reference/framepack.md section 3.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..journal.fingerprint import fingerprint
from ..model.context import gather_context
from ..model.families import carried_context, loader_of
from ..model.framepack import unscaled_blank
from ..plan import BLANK, END, START, LongVideoPlan, PlanError, Section
from .changes import SectionChange
from .device import named_if_lost
from .frames import LatentFrames
from .guards import (
    BrokenStep,
    SectionError,
    attention_name,
    broken_share,
    made_safe,
    out_of_memory,
)
from .identity import RunIdentity
from .memory import MemoryRun
from .noise import SectionNoise
from .preservation import PreservationRun
from .prompts import EncodedTimeline, section_text, with_text
from .step_cache import CacheReport, with_own_input

STRIP_FRAMES = 5


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, in VAE space.

    start: `[B, C, 1, H, W]`. end: the same, or None. given: an existing video `[B, C, T, H, W]` to go on from, or
    None. initial: a whole video `[B, C, total, H, W]` to begin each window from (video to video), or None. still: of a
    video of clips, the start picture as it is at the end of a still clip, `[B, C, 1, H, W]`; None without a picture.
    """

    start: Tensor
    end: Tensor | None = None
    given: Tensor | None = None
    initial: Tensor | None = None
    still: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """The frames in front of the first section, `[B, C, T, H, W]` fp32: an existing video, or the start frame."""
        start = self.start if self.still is None else self.still
        first = (self.given if self.given is not None else start).float().cpu()
        return first.expand(self.start.shape[0], -1, -1, -1, -1)

    def check(self) -> None:
        """Raise PlanError where sizes or batches do not belong together, naming both."""
        for name, latent in (("end", self.end), ("history", self.given), ("initial latents", self.initial)):
            if latent is None:
                continue
            if latent.ndim != 5 or latent.shape[-2:] != self.start.shape[-2:] or latent.shape[1] != self.start.shape[1]:
                raise PlanError(
                    f"'{name}' has latent shape {list(latent.shape)}, 'start' has {list(self.start.shape)}: channels, "
                    "height and width must agree. Make both with 'FramePack Image' nodes (or VAE Encode) at one size."
                )
            if latent.shape[0] not in (1, self.start.shape[0]):
                raise PlanError(
                    f"'{name}' holds a batch of {latent.shape[0]}, 'start' one of {self.start.shape[0]}. "
                    f"Expected 1 or {self.start.shape[0]}; change it in the node that feeds '{name}'."
                )


@dataclass(frozen=True)
class Moment:
    """Where the run is, given to the watcher after every step. finished: one frame of each of the last sections."""

    section: int
    sections: int
    step: int
    steps: int
    estimate: Tensor
    finished: tuple[Tensor, ...]


@dataclass(frozen=True)
class Made:
    """A section that is finished. seconds: wall time its sampling took, 0 where it was found.

    notes: what is to be known of how it was made, without its number. fields: what decided it, in readable words.
    beside: what is kept with it, by name.
    """

    section: Section
    window: Tensor
    key: str
    seconds: float
    notes: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)


def number_in_time(plan: LongVideoPlan, section: Section) -> int:
    """A section's place in the video, from 1: the number an artist knows it by."""
    return sorted(s.start for s in plan.sections).index(section.start) + 1


class Keeper(Protocol):
    """Where finished sections are kept."""

    def find(self, section: Section, key: str) -> Tensor | None:
        """A finished section with this key, or None."""

    def keep(self, made: Made) -> None:
        """Keep a section that was just sampled; it counts as finished when this returns."""

    def load(self, index: int) -> Tensor:
        """A section found or kept before."""
        ...

    def alive(self) -> None:
        """Called after every step."""

    def content(self, index: int) -> str:
        """What says the numbers of a section found or kept before exactly."""
        ...

    def beside(self, index: int, name: str) -> Tensor | None:
        """What is kept with a section found or kept before under a name, or None."""


class SectionSampler:
    """Runs a plan. Nothing it is given is changed: guider and conditioning are copied for each section.

    keeper: finished sections go there, and those it has are not sampled again. identity: needed with it.
    changes: sections, by their place in the order of making, that get another seed or other words. memory: of one run,
    which goes on from section to section. vae: for a step cache that is measured in pictures.
    """

    def __init__(
        self, guider, noise, sampler, sigmas: Tensor, timeline: EncodedTimeline | None = None, *,
        keeper: Keeper | None = None, identity: RunIdentity | None = None,
        changes: Mapping[int, SectionChange] = MappingProxyType({}),
        memory: MemoryRun | PreservationRun | None = None, vae=None,
    ):  # fmt: skip
        self.guider, self.sampler, self.sigmas, self.timeline = guider, sampler, sigmas, timeline
        self.noise = SectionNoise(noise)
        self.keeper, self.identity, self.changes, self.memory = keeper, identity, changes, memory
        self.notes: list[str] = []
        self.cache = CacheReport(guider, vae)
        # Frames that sections see in another form than they are kept in.
        self.shown: dict[int, Tensor] = {}

    def run(
        self,
        plan: LongVideoPlan,
        inputs: Inputs,
        watch: Callable[[Moment], None] | None = None,
        on_section: Callable[[Made, LatentFrames], None] | None = None,
    ) -> LatentFrames:
        """Sample every section that is not kept already; returns the frames of the whole video, fp32.

        watch: after every step. on_section: after every section, found or made.
        Raises PlanError for inputs that do not fit together, SectionError for a section that stays broken, DeviceLost
        where the GPU gave up.
        """
        inputs.check()
        frames = LatentFrames(inputs.first, plan.total_frames)
        frames.load = None if self.keeper is None else self.keeper.load
        self._show_start(inputs)
        strip: deque[Tensor] = deque(maxlen=STRIP_FRAMES)
        for section in plan.sections:
            comfy.model_management.throw_exception_if_processing_interrupted()
            number, count = number_in_time(plan, section), len(plan.sections)
            with named_if_lost(number, section.index, count, self.keeper is not None):
                made = self._section(plan, section, frames, inputs, watch, strip)
                frames.put(section.index, section.start, made.window)
                middle = made.window.shape[2] // 2
                strip.append(made.window[:1, :, middle : middle + 1].clone())
                if on_section is not None:
                    on_section(made, frames)
        return frames

    def _show_start(self, inputs: Inputs) -> None:
        """Sections that are clips of their own see the start picture and its still clip with a little noise."""
        if inputs.still is None:
            return
        base = self.guider.model_patcher.model
        for ref, latent in ((START, inputs.start), (0, inputs.still)):
            noised = self.noise.a_little_on(base.process_latent_in(latent.float().cpu()))
            self.shown[ref] = base.process_latent_out(noised)

    def _section(self, plan, section: Section, frames: LatentFrames, inputs: Inputs, watch, strip) -> Made:
        shape = (*frames.first.shape[:2], section.stop - section.start, *frames.first.shape[3:])
        noise, seed, state = self._noise_of(section, shape)
        begin = None if inputs.initial is None else inputs.initial[:, :, section.start : section.stop]
        conds, key, fields = self._conds_of(plan, section), "", {}
        if self.keeper is not None:
            seen = self._seen(section, frames, inputs)
            key = self.identity.section_key(section, conds, seen, noise if state is None else state, begin, seed)
            found = self.keeper.find(section, key)
            if found is not None:
                if self.memory is not None:
                    self.memory.take(found, partial(self.keeper.beside, section.index))
                return Made(section, found, key, 0.0)
            fields = self.identity.section_fields(conds, seed)

        begin = torch.zeros(shape) if begin is None else begin + torch.zeros(shape)
        guider = self._guider_for(conds, section, frames, inputs)
        broken = BrokenStep()

        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            broken.see(step + 1, x0)
            self._alive()
            if watch is not None:
                watch(Moment(section.index, len(plan.sections), step + 1, total, x0, tuple(strip)))

        began, number = time.monotonic(), number_in_time(plan, section)
        try:
            window, note, guider = self._sample(guider, number, noise, begin, callback, seed, broken)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            # A type that ComfyUI takes for what it is: it frees the models then.
            done, count, kept = section.index, len(plan.sections), self.keeper is not None
            words = out_of_memory(guider.model_patcher, shape, number, done, count, kept)
            raise comfy.model_management.OOM_EXCEPTION(f"{words} ({error})") from error
        made = self._keep(Made(section, window, key, time.monotonic() - began, (note,) if note else (), fields))
        self._measure(number, window, guider, noise, begin, seed)
        return made

    def _keep(self, made: Made) -> Made:
        """Take a section into the memory and keep it with that; a memory that fails does not cost the section."""
        try:
            if self.memory is not None:
                made = replace(made, beside=self.memory.take(made.window))
        finally:
            if self.keeper is not None:
                self.keeper.keep(made)
        return made

    def _sample(self, guider, number: int, noise, begin, callback, seed: int, broken: BrokenStep):
        """A section's window, fp32 on the CPU, what is to be known of it, and the GUIDER that made it."""
        made = self._sampled(guider, noise, begin, callback, seed)
        note = ""
        if broken_share(made):
            where = f"{broken.describe(len(self.sigmas) - 1)} with attention {attention_name()}"
            made, note, guider = self._retry(guider, number, noise, begin, callback, seed, broken_share(made), where)
        return made.float().cpu(), note, guider

    def _sampled(self, guider, noise, begin, callback, seed: int) -> Tensor:
        # Core's uni_pc writes 0.001 over the last of the sigmas that it is given.
        sigmas = self.sigmas.clone()
        return guider.sample(noise, begin, self.sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)

    def _measure(self, number: int, window: Tensor, guider, noise, begin, seed: int) -> None:
        """How far a step cache has led a section astray, where the artist asked for that."""

        def exact(without_cache) -> Tensor:
            return self._sampled(without_cache, noise, begin, self._alive, seed).float().cpu()

        self.notes += self.cache.measure(number, window, guider, exact)

    def _alive(self, *_) -> None:
        if self.keeper is not None:
            self.keeper.alive()

    def _retry(self, guider, number: int, noise, begin, callback, seed: int, share: float, where: str):
        """Once more with plain attention in numbers that reach further: what overflows is one of the two (fault 13)."""
        guider, numbers = made_safe(guider)
        safe = "plain PyTorch attention" + (f", {numbers}" if numbers else "")
        note = f"came out with {share:.1%} NaN or infinite values (first {where}); it was made again with {safe}."
        logging.warning("Section %d %s", number, note)
        self.notes.append(f"Section {number} {note}")
        made = self._sampled(guider, noise, begin, callback, seed)
        if broken_share(made):
            dtype = guider.model_patcher.model_dtype()
            kept = "is kept, and the project goes on from there" if self.keeper is not None else "was only in memory"
            raise SectionError(
                f"Section {number} holds NaN or infinite values, first {where}, and again with {safe} "
                f"(weights: {dtype}). What was finished before it {kept}. Try weight_dtype "
                f"'default' in '{loader_of(guider.model_patcher)}', or take out the last LoRA."
            )
        return made, note, guider

    def _noise_of(self, section: Section, shape: tuple[int, ...]) -> tuple[Tensor, int, tuple | None]:
        """Noise and seed of a section, and what says the noise where that is shorter.

        One generator runs through all sections, so it draws for those too that are found or have their own seed.
        """
        state = self.noise.state(shape)
        noise, seed = self.noise.draw(section.index, shape), self.noise.seed + section.index
        change = self.changes.get(section.index)
        if change is not None and change.seed is not None:
            own = self.noise.with_seed(change.seed)
            state = own.state(shape)
            noise, seed = own.draw(0, shape), change.seed
        return noise, seed, state

    def _seen(self, section: Section, frames: LatentFrames, inputs: Inputs) -> list:
        """What says the frames of a section's context exactly: a finished section's file is named by its hash."""

        def say(ref: int):
            if ref == BLANK:
                return "blank"
            if ref in self.shown:
                return self.identity.digest(self.shown[ref])
            if ref in (START, END):
                return self.identity.digest(inputs.start if ref == START else inputs.end)
            made = frames.made_by(ref)
            if made is not None:
                return self.keeper.content(made[0]), made[1]
            return fingerprint(frames.frame(ref))

        groups = [group.frames for group in section.groups]
        groups += [] if section.tail is None else [section.tail.frames]
        memory = None if self.memory is None else self.memory.seen
        return [*([say(ref) for ref in group] for group in groups), *([] if memory is None else ["memory", memory])]

    def _conds_of(self, plan: LongVideoPlan, section: Section) -> dict:
        """The guider's prompts as this section has them, without its context."""
        conds = dict(self.guider.original_conds)
        if self.timeline is not None and "positive" in conds:
            start_s, _ = plan.span_seconds(section)
            words = section_text(self.timeline, start_s, plan.section_seconds)
            conds["positive"] = with_text(conds["positive"], *words)
        change = self.changes.get(section.index)
        if change is not None and change.positive is not None:
            text, extra = change.positive[0]
            conds["positive"] = with_text(conds["positive"], text, extra.get("pooled_output"))
        return conds

    def _guider_for(self, conds: Mapping, section: Section, frames: LatentFrames, inputs: Inputs):
        """A copy of the guider that sees this section's prompts and context."""
        first = frames.first
        base_model = self.guider.model_patcher.model
        blank = unscaled_blank(base_model, (1, first.shape[1], 1, 1, 1))
        end = inputs.end
        if end is not None:
            end = comfy.utils.repeat_to_batch_size(end, first.shape[0])
        start = self.shown.get(START, inputs.start)

        def frame(ref: int) -> Tensor:
            return self.shown[ref] if ref in self.shown else frames.frame(ref)

        context = gather_context(section, frame, start, end, blank)
        carried = carried_context(base_model, context)
        if self.memory is not None:
            carried = with_carried(carried, self.memory.carried(section))
        guider = copy.copy(self.guider)
        guider.original_conds = {k: [with_carried(c, carried) for c in v] for k, v in conds.items()}
        return self.cache.counting(with_own_input(guider))


def with_carried(entry: Mapping, carried: Mapping) -> dict:
    """A prompt's entry with what a section carries; `model_conds` of both stand beside each other."""
    both = {**entry.get("model_conds", {}), **carried.get("model_conds", {})}
    return {**entry, **carried, "model_conds": both}
