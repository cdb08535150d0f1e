"""Frame preservation while a video is made: each finished section encoded once, alone, and kept in the project.

A section's new frames, with those that waited for their block, are one chunk; its tokens lie beside the section in the
project and are never computed again. The tokens of the oldest chunks go where the budget is spent. Of a memory with
cross-attention each token's features lie behind its numbers, and go with it.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels (VAE space), N tokens, D width of the DiT,
E width of the features, 0 without cross-attention.
Source: pfp reference 2.4 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..journal.fingerprint import fingerprint
from ..model.cross_attention import reader_of
from ..model.families import frames_a_second, makes_clips, pixels_a_latent, window_of
from ..model.framepack import is_framepack, token_conditions
from ..model.preserved_history import Remembered
from ..model.preserved_memory import PreservedMemory, check_preserved
from ..model.wan import is_attached
from ..plan import LongVideoPlan, PlanError, Section, another_schedule
from ..plan.errors import SAMPLER
from ..plan.preservation import (
    PATCH,
    PRESERVATION,
    RATES,
    chunks,
    kept,
    seen_from,
    segment_ends,
    token_bytes,
    token_count,
    token_grid,
    tokens_a_second,
    waiting_frames,
)
from .encoder import check_finite, check_forward, load
from .identity import encoder_outline, short

NAME = "preserved.{}.{}"
# Bytes of work memory for each number of a chunk at full resolution: the widest convolution there, in and out.
_WORK = 8


@dataclass
class Chunk:
    """Latent frames [start, stop) of the video and, by rate, their tokens and features `[B, N, D + E]`; none once they
    are not kept."""

    start: int
    stop: int
    tokens: dict[str, Tensor] = field(default_factory=dict)


class PreservationRun:
    """What one run remembers: begins with the start picture or an existing video, takes in each finished section.

    first: the frames in front of the first section `[B, C, T, H, W]`, read chunk by chunk: they may lie in a file.
    window: latent frames of a section. Only tokens that the budget keeps and frames that wait for their block stay in
    memory, however long the video. An hour of 832x480 at 16 fps is 655,200 tokens at 4x4x2, which are 2.0 GB in bf16
    at Wan 1.3B's width, 6.7 GB at 14B's; a budget of 8192 keeps 25 MB or 84 MB of them.
    """

    def __init__(self, memory: PreservedMemory, patcher, first: Tensor, window: int):
        self.memory, self.patcher, self.first, self.window = memory, patcher, first, window
        self.rates = tuple(RATES[name] for name in memory.rates)
        given = first.shape[2]
        self.chunks = [Chunk(*span) for span in chunks(segment_ends(given, window), *self.rates)]
        self._waiting = first[:, :, given - waiting_frames(given, *self.rates) :]

    @cached_property
    def _seen(self) -> str:
        """What says the beginning exactly, and later all that was taken in: read once where anybody asks, since an
        existing video may be an hour long."""
        family = type(self.patcher.model.latent_format).__name__
        return fingerprint([encoder_outline(self.memory), self.first, self.window, family])

    @property
    def seen(self) -> str | None:
        """What says the memory of the next section exactly; None where that section is shown none."""
        return fingerprint([self._seen, self._kept()]) if self.chunks else None

    def take(self, window_BCTHW: Tensor, held: Callable[[str], Tensor | None] | None = None) -> dict[str, Tensor]:
        """Take in a finished section; returns what is to be kept beside it, by name.

        held: what was kept beside it, by name. Raises SectionError where tokens are not finite, PlanError where a
        section alone is more than the budget.
        """
        self._seen = fingerprint([self._seen, window_BCTHW])
        frames = torch.cat((self._waiting, window_BCTHW), dim=2)
        start = self.chunks[-1].stop if self.chunks else 0
        whole = frames.shape[2] - waiting_frames(frames.shape[2], *self.rates)
        self._waiting = frames[:, :, whole:].clone()
        if not whole:
            return {}
        names = {rate: NAME.format(rate, self._seen[:16]) for rate in self.memory.rates}
        found = {rate: None if held is None else held(name) for rate, name in names.items()}
        known = {rate: tokens for rate, tokens in found.items() if tokens is not None}
        made = known if len(known) == len(names) else self._encoded(frames[:, :, :whole])
        self.chunks.append(Chunk(start, start + whole, made))
        self._forget()
        return {names[rate]: tokens for rate, tokens in made.items()}

    def carried(self, section: Section) -> dict:
        """What a section's prompts carry of the memory."""
        seen = self.shown()
        if seen is None:
            return {}
        places = seen_from(seen.places, section)
        return {"model_conds": token_conditions(seen.tokens, places, seen.features)}

    def bytes_a_section(self, shape: tuple[int, ...]) -> int:
        """Bytes of tokens and features beside a section's samples. shape: of the start latent, `[B, C, T, H, W]`."""
        longest = self.window + max(rate.time for rate in self.rates)
        tokens = sum(token_count(rate, longest, *shape[-2:]) for rate in self.rates)
        cross, itemsize = self.memory.cross, self.memory.history.dtype.itemsize
        return shape[0] * token_bytes(tokens, self._hidden, 0 if cross is None else cross.features, itemsize)

    def words(self) -> str:
        """The identity of the memory for a list of what a run was made with."""
        known = short(encoder_outline(self.memory))
        return f"{self.memory.label}, {' + '.join(self.memory.rates)}, at most {self.memory.tokens} tokens ({known})"

    def shown(self) -> Remembered | None:
        """What is kept, encoder by encoder, and its places in the video; None where that is nothing."""
        self._forget()
        wanted = self._kept()
        for chunk, names in zip(self.chunks, wanted, strict=True):
            if names and not chunk.tokens:  # of the existing video, which nobody has kept
                made = self._encoded(self.first[:, :, chunk.start : chunk.stop])
                chunk.tokens = {name: made[name] for name in names}
        parts, places = [], []
        for name, rate in zip(self.memory.rates, self.rates, strict=True):
            for chunk in self.chunks:
                if name in chunk.tokens:
                    parts.append(chunk.tokens[name])
                    places += token_grid(rate, chunk.start, chunk.stop, *self.first.shape[-2:]).positions()
        if not parts:
            return None
        kept = torch.cat(parts, dim=1)
        features = None if self.memory.cross is None else kept[..., self._hidden :]
        return Remembered(kept[..., : self._hidden], places, features)

    @property
    def _hidden(self) -> int:
        return self.memory.specs[0].hidden

    def _kept(self) -> list[tuple[str, ...]]:
        """By chunk, the rates whose tokens are kept."""
        lengths = [chunk.stop - chunk.start for chunk in self.chunks]
        return kept_rates(lengths, self.memory, *self.first.shape[-2:])

    def _forget(self) -> None:
        for chunk, names in zip(self.chunks, self._kept(), strict=True):
            chunk.tokens = {name: tokens for name, tokens in chunk.tokens.items() if name in names}

    def _encoded(self, chunk_BCTHW: Tensor) -> dict[str, Tensor]:
        """Tokens and features of a chunk by rate, on the CPU."""
        memory = self.memory
        widest = max(spec.channels[0] for spec in memory.specs)
        needed = math.prod(chunk_BCTHW.shape) // chunk_BCTHW.shape[1] * widest * _WORK
        device = load(memory, self.patcher, needed)
        with torch.no_grad():
            x = self.patcher.model.process_latent_in(chunk_BCTHW.to(device, torch.float32))
            encoded = zip(memory.rates, memory.history.encode(x), strict=True)
            made = {name: torch.cat([part for part in one if part is not None], -1).cpu() for name, one in encoded}
        check_finite(memory, *made.values())
        return made


def kept_rates(lengths: Sequence[int], memory: PreservedMemory, height: int, width: int) -> list[tuple[str, ...]]:
    """Of chunks of so many latent frames, oldest first, the rates at which each is kept; raises as `kept` does."""
    budget = memory.budget
    return [
        () if name is None else memory.rates if name == budget.rate else (name,)
        for name in kept(lengths, budget, height, width)
    ]


def with_preserved(
    memory: PreservedMemory, patcher, plan: LongVideoPlan, inputs
) -> tuple[PreservationRun, list[str], list[str]]:
    """(what carries the memory through the run, lines for people, warnings).

    patcher: the MODEL. inputs: the section loop's. Raises PlanError for a memory that comes from no encoder node, an
    order that is not forward, or a budget that is too small for one section; MemoryMismatch for one of another base.
    """
    check_tokens_taken(memory, patcher, SAMPLER)
    check_forward(patcher, plan, memory.schedule)
    fits = check_preserved(memory, patcher, SAMPLER)
    run = PreservationRun(memory, patcher, inputs.first, plan.schedule.window)
    height, width = inputs.start.shape[-2:]
    spans = chunks(segment_ends(run.first.shape[2], run.window, len(plan.sections)), *run.rates)
    names = kept_rates([stop - start for start, stop in spans], memory, height, width)
    left = sum(token_count(RATES[n], b - a, height, width) for (a, b), ns in zip(spans, names, strict=True) for n in ns)
    line = f"Memory: {memory.describe()}. {left} tokens at the end, at most {memory.tokens}"
    forgotten = next((a for (a, _), ns in zip(spans, names, strict=True) if ns), 0)
    if forgotten:
        seconds = (plan.total_frames - forgotten) * 4 / plan.fps
        line += f"; the oldest go, and the end is shown the last {seconds:.0f} s"
    warnings = []
    if not memory.trained:
        warnings.append(f"The memory {memory.label} is untrained: the model does not know how to read its tokens.")
    if memory.schedule and memory.schedule != plan.schedule.text:
        warnings.append(another_schedule(memory.label, memory.schedule, plan.schedule.text))
    return run, [f"{line}. {fits}"], warnings


def words_of_budget(memory: PreservedMemory, patcher) -> str:
    """How far back a memory's tokens reach, at 832x480 and the rate of frames that a MODEL is made for, and what its
    cross-attention costs there."""
    fps, pixels = frames_a_second(patcher), pixels_a_latent(patcher)
    rate = sum(tokens_a_second(RATES[name], 480 // pixels, 832 // pixels, fps) for name in memory.rates)
    first = "; before that its tokens finer than 2x2x8" if memory.budget.past == "thin" else ""
    words = (
        f"At most {memory.tokens} tokens, which are about {float((memory.tokens or 0) / rate):.0f} s of 832x480 at "
        f"{fps:g} fps. Past that the oldest go{first}."
    )
    if memory.cross is None:
        return words
    window = window_of(patcher) * math.prod(side // pixels // PATCH for side in (480, 832))
    trillions = memory.cross.operations(window, memory.tokens or 0) / 1e12
    size = memory.cross.bytes(memory.history.dtype.itemsize) / 1e6
    return (
        f"{words} Cross-attention in {len(memory.cross.blocks)} blocks: {size:.1f} MB beside the MODEL, and "
        f"{trillions:.3g} T operations more in each step with so many tokens."
    )


def check_tokens_taken(memory: PreservedMemory, patcher, node: str) -> None:
    """Raise PlanError unless memory and MODEL come from the node that lets the MODEL take the memory's tokens, and read
    its features where it has any.

    Nor can a MODEL take them whose sections are clips of their own.
    """
    if makes_clips(patcher):
        raise PlanError(
            f"'memory' of '{node}' is trained on running videos, and each section of this MODEL is a clip of its own. "
            f"Take 'memory' and '{PRESERVATION}' out; the MODEL packs its history itself."
        )
    reads = memory.cross is None or reader_of(patcher) is memory.history.cross_attention
    if memory.tokens is None or not reads or not (is_framepack(patcher) or is_attached(patcher)):
        raise PlanError(
            f"'memory' of '{node}' comes straight from the node that loads or trains it, or the MODEL does. Expected "
            f"both outputs of '{PRESERVATION}'."
        )
