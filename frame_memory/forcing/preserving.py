"""Frame preservation's two losses: frames asked of a memory that was shown little else, and the section that follows.

Stage 1 asks the memory for frames chosen at random: the encoder is shown these clean and all others behind noise
(noise as a mask), and the network denoises nothing but them, at their own times, behind nothing but the memory. What is
to be asked is never known before, so all of the history must be kept. Stage 2 is the ordinary loss of one section
behind its context and the memory of all that came before, complete and clean. Source: pfp reference 3 and 4.

All that chance decides is drawn on the CPU before the first forward pass, as in draws.py.

Shape legend: B batch, C latent channels, T latent frames of the history, Q frames that are asked for, H W latent
pixels. Latents are in model space; sigma is 1 at noise and 0 at data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..model.context import PackedContext, gather_context
from ..model.framepack import FRAME_FEATURES, FRAME_POSITIONS, FRAME_TOKENS
from ..model.packing import ContextLayout
from ..model.preservation import low_latents, mask_frames, pooled_mask
from ..model.preserved_history import PreservedHistory, Remembered
from ..plan import PRESETS
from ..plan.preservation import Rate, low_size, seen_from, segment_ends, waiting_frames
from .clips import SCHEDULE, ForcingError, TrainingVideo, clip_sections
from .draws import LOGIT_NORMAL, sigmas
from .flow import flow_loss
from .forcings import ClipLoss, Forced

QUERY, FOLLOW = "frame query", "next section"
# CHOICE of the reference, section 3: so many frames are asked for at most, and what is masked is noisier than this.
MOST_ASKED = 8
LEAST_MASK = 0.2
DROP_TEXT = 0.1
SHIFT = 5.0
# Share of a run in which the encoder learns and the LoRA waits. A network that learns from the first step on, behind an
# encoder that says nothing yet, looks away from it before it does (`benchmarks.claims frame-preservation`).
ALONE = 0.33


@dataclass(frozen=True)
class QueryDraw:
    """Stage 1 on clips `first` to `first + count - 1` and the frame before them.

    asked: frames, counted from that one, ascending. levels `[1, T]`: how noisy each frame is where it is masked, with
    the noise `[B, C, T, H, W]`, and low_noises, one an encoder, at its low-resolution copy's size. sigma `[B]`, noise
    `[B, C, Q, H, W]`: of the frames that are asked for. without_text: the text is left out.
    """

    first: int
    count: int
    asked: tuple[int, ...]
    levels: Tensor
    mask_noise: Tensor = field(repr=False)
    low_noises: tuple[Tensor, ...] = field(repr=False)
    sigma: Tensor
    noise: Tensor = field(repr=False)
    without_text: bool = False


@dataclass(frozen=True)
class FollowDraw:
    """Stage 2: the clip that is denoised, by number, its sigma `[B]` and its noise, of the clip's shape.

    without_text: the text is left out.
    """

    clip: int
    sigma: Tensor
    noise: Tensor = field(repr=False)
    without_text: bool = False


def asked_frames(frames: int, generator: torch.Generator) -> tuple[int, ...]:
    """1 to 8 of so many frames, ascending: half of the time all over them, else one behind the other."""
    count = 1 + int(torch.randint(min(MOST_ASKED, frames), (), generator=generator))
    if bool(torch.rand((), generator=generator) < 0.5):
        return tuple(sorted(torch.randperm(frames, generator=generator)[:count].tolist()))
    first = int(torch.randint(frames - count + 1, (), generator=generator))
    return tuple(range(first, first + count))


def draw_query(
    video: TrainingVideo, count: int, rates: Sequence[Rate], generator: torch.Generator, shift: float = SHIFT,
    drop_text: float = 0.0,
) -> QueryDraw:  # fmt: skip
    """Draw an update of stage 1 on at most `count` clips. drop_text: share of updates without the text.

    Raises ForcingError where no block of all rates is full.
    """
    count, window = min(count, video.clips), video.window
    first = int(torch.randint(video.clips - count + 1, (), generator=generator))
    batch, channels, _, height, width = video.latents.shape
    frames = 1 + window * count
    known = frames - waiting_frames(frames, *rates)
    if not known:
        raise ForcingError(
            f"{video.name} was cut to {frames} latent frames, and a memory at {' + '.join(r.text for r in rates)} "
            "remembers more at once. Give longer videos, or raise 'clips'."
        )
    asked = asked_frames(known, generator)

    def noise(*size: int) -> Tensor:
        return torch.randn(batch, channels, *size, generator=generator)

    return QueryDraw(
        first=first,
        count=count,
        asked=asked,
        levels=LEAST_MASK + (1 - LEAST_MASK) * sigmas(frames, shift, LOGIT_NORMAL, generator)[None],
        mask_noise=noise(frames, height, width),
        low_noises=tuple(noise(*low_size(rate, frames, height, width)) for rate in rates),
        sigma=sigmas(batch, shift, LOGIT_NORMAL, generator),
        noise=noise(len(asked), height, width),
        without_text=_without(drop_text, generator),
    )


def draw_follow(
    video: TrainingVideo, count: int, generator: torch.Generator, shift: float = SHIFT, drop_text: float = 0.0
) -> FollowDraw:
    """Draw an update of stage 2: one of the first `count` clips that has another before it.

    drop_text: share of updates without the text. Raises ForcingError for videos of one clip.
    """
    count = min(count, video.clips)
    if count < 2:
        raise ForcingError(f"{video.name} has {count} clip(s); a memory is of use from 2 on.")
    batch, channels, _, height, width = video.latents.shape
    clip = 1 + int(torch.randint(count - 1, (), generator=generator))
    sigma = sigmas(batch, shift, LOGIT_NORMAL, generator)
    noise = torch.randn(batch, channels, video.window, height, width, generator=generator)
    return FollowDraw(clip, sigma, noise, _without(drop_text, generator))


def _without(share: float, generator: torch.Generator) -> bool:
    # Last of an update's draws, so that the share changes no other number.
    return share > 0 and bool(torch.rand((), generator=generator) < share)


def frame_query(forced: Forced, video: TrainingVideo, draw: QueryDraw) -> Iterator[ClipLoss]:
    """Stage 1: one loss, over the frames that are asked for."""
    truth, context, seen = asked(forced, video, draw)
    yield _loss(forced, video, truth, draw, context, seen, seen.places, draw.first)


def asked(forced: Forced, video: TrainingVideo, draw: QueryDraw) -> tuple[Tensor, PackedContext, Remembered]:
    """The frames that are asked for `[B, C, Q, H, W]`, where they stand, and what the memory holds of the masked
    history."""
    window, device = video.window, video.latents.device
    begin, frames = window * draw.first, 1 + window * draw.count
    history = video.latents[:, :, begin : begin + frames]
    keep = torch.zeros(1, frames, dtype=torch.bool, device=device)
    keep[:, list(draw.asked)] = True
    levels = draw.levels.to(device)
    masked = mask_frames(history, keep, draw.mask_noise.to(device), levels)
    lows = []
    for rate, noise in zip(_encoders(forced).rates, draw.low_noises, strict=True):
        kept, level = pooled_mask(keep, levels, rate)
        lows.append(mask_frames(low_latents(history, rate), kept, noise.to(device), level))
    seen = _remembered(forced, masked, segment_ends(1, window, draw.count), lows)
    return history[:, :, list(draw.asked)], PackedContext([], ContextLayout(draw.asked, ())), seen


def next_section(
    forced: Forced, video: TrainingVideo, draw: FollowDraw, schedule: str = PRESETS[SCHEDULE]
) -> Iterator[ClipLoss]:
    """Stage 2: one loss, over a section behind its context and the memory of all whole blocks before it.

    schedule: with the video's window; its groups say which frames stay clean beside the memory.
    """
    section = clip_sections(draw.clip + 1, schedule)[draw.clip]
    context = gather_context(section, video.latents, video.latents[:, :, :1], None, 0.0)
    seen = _remembered(forced, video.latents[:, :, : section.start], segment_ends(1, video.window, draw.clip), None)
    truth = video.latents[:, :, section.start : section.stop]
    yield _loss(forced, video, truth, draw, context, seen, seen_from(seen.places, section), draw.clip)


LOSSES = {QUERY: frame_query, FOLLOW: next_section}


def behind(network: Callable[..., Tensor], seen: Remembered, places: Sequence[tuple[int, int, int]]):
    """The network with a memory's tokens before it, and its features. places: of the tokens, on the time axis of what
    it denoises."""
    at = torch.tensor(places, dtype=torch.long, device=seen.tokens.device).reshape(-1, 3)
    return partial(network, **{FRAME_TOKENS: seen.tokens, FRAME_POSITIONS: at, FRAME_FEATURES: seen.features})


def _encoders(forced: Forced) -> PreservedHistory:
    assert isinstance(forced.pack, PreservedHistory)
    return forced.pack


def _remembered(forced: Forced, history_BCTHW: Tensor, ends: Sequence[int], lows) -> Remembered:
    with torch.set_grad_enabled(torch.is_grad_enabled() and forced.pack_learns):
        return _encoders(forced)(history_BCTHW, ends, lows)


def _loss(
    forced: Forced, video: TrainingVideo, truth_BCTHW: Tensor, draw: QueryDraw | FollowDraw, context: PackedContext,
    seen: Remembered, places: Sequence[tuple[int, int, int]], clip: int,
) -> ClipLoss:  # fmt: skip
    device = truth_BCTHW.device
    noise, sigma = draw.noise.to(device), draw.sigma.to(device)
    network = behind(forced.network, seen, places)
    cond = video.cond.without_text() if draw.without_text else video.cond
    loss, estimate = flow_loss(network, truth_BCTHW, noise, sigma, cond, context, forced.options)
    return ClipLoss(clip, float(sigma.mean()), loss, estimate)
