"""Frame preservation in the plan: tokens, positions, chunks and token budget of a learned history.

A rate `HxWxT` counts on top of the DiT's own patches (2x2 latent pixels): a token of 4x4x2 stands for a block of 8
rows, 8 columns and 2 latent frames.

One rounding rule on both branches of the encoder: blocks are counted from the first frame of the video and from the top
left corner of the picture, and what does not fill a block makes no token (floor).

- Rows and columns left over lie at the bottom and at the right, at most a block less one (4 of 60 rows at 4x4x2). The
  high-resolution branch's convolutions still look at them, the low-resolution branch does not.
- Frames left over are the newest, and they wait: the next segment completes their block (`waiting_frames`). Meanwhile
  only the sliding window of clean frames shows them; it should be as long, or some frames are shown nowhere.
- A history shorter than a block has no tokens yet. A picture smaller than a block is refused.

Source: pfp reference 2.1 to 2.4 and 6. The paper's tokens a second (195 for 4x4x2 on Wan) are the full count divided
by the rate; where blocks do not fill the picture, fewer are made (182 at 480x832, since 60 rows hold 7 blocks and not
7.5). Both are here: `nominal_tokens_a_second` and `tokens_a_second`.

Sizes are latent frames, rows and columns (pixels / 8) unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, product

from .errors import PlanError, refusal
from .memory import FARTHEST_DISTANCE, given_clips
from .sections import Section

PRESERVATION = "Frame Preservation Encoder"
# The stages of its training.
STAGE_QUERY, STAGE_FOLLOW = "1: frame query", "2: next section"
# Rows and columns of a patch of the DiT; of time a patch holds one latent frame.
PATCH = 2
# What the budget may do with the oldest chunks, and the rate that it thins them to.
PAST = ("drop", "thin")
THIN = "2x2x8"


@dataclass(frozen=True)
class Rate:
    """How many patches of the DiT a token of the memory stands for, in each direction."""

    height: int
    width: int
    time: int

    @property
    def text(self) -> str:
        """As the paper writes it: `4x4x2`."""
        return f"{self.height}x{self.width}x{self.time}"

    @property
    def factor(self) -> int:
        """Tokens of the DiT for one of the memory, by the paper's count: 32 for 4x4x2."""
        return self.height * self.width * self.time

    @property
    def block(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that a token stands for: (2, 8, 8) for 4x4x2."""
        return self.time, PATCH * self.height, PATCH * self.width


RATES: dict[str, Rate] = {
    rate.text: rate for rate in (Rate(2, 2, 1), Rate(2, 2, 2), Rate(2, 2, 4), Rate(2, 2, 8), Rate(4, 4, 2))
}


def parse_rate(text: str) -> Rate:
    """The rate of a text such as `4x4x2`. Raises PlanError, with the nearest one, for a rate that has no encoder."""
    if text in RATES:
        return RATES[text]
    parts = text.lower().split("x") if isinstance(text, str) else []
    nearest = "4x4x2"
    if len(parts) == 3 and all(part.isdecimal() and int(part) for part in parts):

        def far(name: str) -> float:
            return sum(abs(math.log(int(a) / int(b))) for a, b in zip(parts, name.split("x"), strict=True))

        nearest = min(RATES, key=far)
    raise PlanError(refusal(f"rate {text!r}", f"one of {', '.join(RATES)}", nearest, PRESERVATION))


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of some frames stand; the tokens are ordered by time, then row, then column.

    times, rows, columns: floor of the midpoint of each block, in latent frames of the video and in the DiT's patches.
    """

    times: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        return len(self.times), len(self.rows), len(self.columns)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def positions(self) -> list[tuple[int, int, int]]:
        """(t, h, w) of each token, in their order."""
        return list(product(self.times, self.rows, self.columns))


def token_grid(rate: Rate, start: int, stop: int, height: int, width: int) -> TokenGrid:
    """The tokens of the latent frames `[start, stop)` of a video of `height` x `width` latent pixels.

    Raises PlanError where `start` is not on a block, for negative spans, and for pictures smaller than a block.
    """
    time, tall, wide = rate.block
    if start < 0 or stop < start:
        raise PlanError(refusal(f"frames {start} to {stop}", "0 or more, in ascending order", "0 to 0", PRESERVATION))
    if start % time:
        near = f"{start // time * time} or {start // time * time + time}"
        raise PlanError(refusal(f"a start at frame {start}", f"a multiple of {time} ({rate.text})", near, PRESERVATION))
    if height < tall or width < wide:
        near = f"{max(height, tall)}x{max(width, wide)}"
        given, least = (
            f"latents of {height}x{width} at {rate.text}",
            f"at least {tall}x{wide} ({8 * tall}x{8 * wide} pixels)",
        )
        raise PlanError(refusal(given, least, near, PRESERVATION))
    return TokenGrid(
        tuple(start + t for t in _midpoints(stop - start, time)),
        _midpoints(height // PATCH, rate.height),
        _midpoints(width // PATCH, rate.width),
    )


def token_count(rate: Rate, frames: int, height: int, width: int) -> int:
    """Tokens of a history of so many latent frames: 5,460 for 120 frames of 60x104 at 4x4x2."""
    return token_grid(rate, 0, frames, height, width).tokens


def low_size(rate: Rate, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of the low-resolution copy: (60, 15, 26) for 120 of 60x104 at 4x4x2.

    Its own patches, rounded down, are the grid of the high-resolution branch, since floors can be taken one by one.
    """
    return frames // rate.time, height // rate.height, width // rate.width


def latent_frames(seconds: float | Fraction, fps: float | Fraction, time_factor: int = 4) -> int:
    """Latent frames of whole groups of `time_factor` pixel frames, as the paper counts: 120 for 20 s at 24 fps."""
    return math.floor(_exact(seconds) * _exact(fps) / time_factor)


def tokens_a_second(rate: Rate, height: int, width: int, fps: float | Fraction, time_factor: int = 4) -> Fraction:
    """Tokens that a second of a long history really has: whole blocks only. time_factor: pixel frames a latent one."""
    grid = token_grid(rate, 0, rate.time, height, width)
    return _exact(fps) / time_factor / rate.time * grid.tokens


def nominal_tokens_a_second(
    rate: Rate, height: int, width: int, fps: float | Fraction, time_factor: int = 4
) -> Fraction:
    """The paper's tokens a second: those of the DiT over the rate, parts of blocks counted: 195 for 4x4x2 on Wan."""
    return full_tokens_a_second(height, width, fps, time_factor) / rate.factor


def full_tokens_a_second(height: int, width: int, fps: float | Fraction, time_factor: int = 4) -> Fraction:
    """Tokens a second of the DiT itself: 6240 for 60x104 at 16 fps."""
    return _exact(fps) / time_factor * (height // PATCH) * (width // PATCH)


def token_bytes(tokens: int, hidden: int, features: int = 0, itemsize: int = 2) -> int:
    """Bytes of embedded tokens. hidden: width of the DiT; features: width handed out for cross-attention, or 0."""
    return tokens * (hidden + features) * itemsize


def chunks(ends: Sequence[int], *rates: Rate) -> tuple[tuple[int, int], ...]:
    """The spans `[start, stop)` that are encoded alone, from the ends of the segments that were generated.

    ends: latent frames finished after each segment, ascending. Every boundary is a segment's end, rounded down to a
    block of all `rates`; a segment that completes no block has no chunk. So a boundary never moves when the video grows
    and what was encoded stays. Raises PlanError for ends that do not ascend.
    """
    step = _step(rates)
    stops = [end // step * step for end in _ascending(ends)]
    return tuple((start, stop) for start, stop in zip([0, *stops], stops, strict=False) if stop > start)


def waiting_frames(frames: int, *rates: Rate) -> int:
    """The newest of so many latent frames that fill no block yet, and are in no chunk."""
    return frames % _step(rates)


@dataclass(frozen=True)
class Budget:
    """What is kept of a history that grows without end.

    tokens: all is kept up to so many. past: what happens beyond, to the oldest chunks first. "drop" leaves them out;
    "thin" keeps them at 2x2x8 and drops the oldest only when that is not enough. recent: so many of the newest chunks
    always stay as they are. beside: rates of further encoders, whose tokens stand beside those of `rate`.

    2x2x8 holds as many tokens a second as 4x4x2 does (both stand for 32), so for 4x4x2 alone there is nothing to thin.
    """

    tokens: int
    rate: str = "4x4x2"
    past: str = "drop"
    recent: int = 1
    beside: tuple[str, ...] = ()

    def __post_init__(self):
        for name in (self.rate, *self.beside):
            parse_rate(name)
        if self.past not in PAST:
            raise PlanError(refusal(f"past {self.past!r}", f"one of {', '.join(PAST)}", PAST[0], PRESERVATION))
        if self.past == "thin" and not self.beside and RATES[self.rate].factor >= RATES[THIN].factor:
            given = f"thin to {THIN} what is kept at {self.rate}"
            raise PlanError(refusal(given, f"a rate with more tokens than {THIN}", "drop", PRESERVATION))
        for name, value in (("tokens", self.tokens), ("recent", self.recent)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(refusal(f"{name} {value!r}", "a whole number from 1", "1", PRESERVATION))

    @property
    def rates(self) -> tuple[Rate, ...]:
        """The rates that chunks must suit: those to give `chunks`."""
        names = (self.rate, *self.beside, *((THIN,) if self.past == "thin" else ()))
        return tuple(RATES[name] for name in dict.fromkeys(names))


def kept(lengths: Sequence[int], budget: Budget, height: int, width: int) -> tuple[str | None, ...]:
    """The rate at which each chunk is kept, oldest first, None for one that is dropped; `beside` counts with `rate`.

    lengths: latent frames of each chunk, as `chunks(ends, *budget.rates)` cuts them. A chunk never gets better when
    more are added: dropped stays dropped, thin stays thin. Raises PlanError where even the recent chunks are too many.
    """
    step = _step(budget.rates)
    for length in lengths:
        if length < step or length % step:
            near = str(max(round(length / step), 1) * step)
            expected = f"a positive multiple of {step}"
            raise PlanError(refusal(f"a chunk of {length} latent frames", expected, near, PRESERVATION))
    each = (
        {n: sum(token_count(RATES[r], n, height, width) for r in rates) for n in set(lengths)}
        for rates in ((budget.rate, *budget.beside), (THIN,))
    )
    fine, thin = ([counts[n] for n in lengths] for counts in each)
    need = max((sum(fine[max(count - budget.recent, 0) : count]) for count in range(1, len(fine) + 1)), default=0)
    if need > budget.tokens:
        given, expected = f"a budget of {budget.tokens} tokens", f"room for the newest frames at {budget.rate}"
        raise PlanError(refusal(given, expected, str(need), PRESERVATION))
    # Chunks are added one by one, as in a run: what a long recent one has pushed out would else return behind it.
    total, thinned, dropped = 0, 0, 0
    for count, tokens in enumerate(fine, 1):
        total, old = total + tokens, max(count - budget.recent, 0)
        while budget.past == "thin" and total > budget.tokens and thinned < old:
            total += thin[thinned] - fine[thinned]
            thinned += 1
        while total > budget.tokens and dropped < old:
            total -= thin[dropped] if dropped < thinned else fine[dropped]
            dropped += 1
    thin_left = max(thinned - dropped, 0)
    return (None,) * dropped + (THIN,) * thin_left + (budget.rate,) * (len(lengths) - dropped - thin_left)


def kept_spans(lengths: Sequence[int], budget: Budget, height: int, width: int) -> tuple[tuple[int, int, str], ...]:
    """`kept` as (start, stop, rate) of what stays, in latent frames of the video, oldest first."""
    stops = list(accumulate(lengths))
    named = zip([0, *stops], stops, kept(lengths, budget, height, width), strict=False)
    return tuple((start, stop, rate) for start, stop, rate in named if rate is not None)


def segment_ends(given: int, window: int, sections: int = 0) -> tuple[int, ...]:
    """Latent frames finished after each segment: of an existing video of `given` frames, then of each section.

    An existing video is cut as its clips are; of a start picture (given 1) it is one frame.
    """
    front = (1, *(stop for _, stop in given_clips(given, window)))
    return (*front, *(given + window * number for number in range(1, sections + 1)))


def seen_from(places: Sequence[tuple[int, int, int]], section: Section) -> list[tuple[int, int, int]]:
    """Positions of the video's tokens on a section's time axis: as far before its window as they are in the video,
    but within reach."""
    ahead = section.positions[0] - section.start
    return [(ahead + t, row, column) for t, row, column in within_reach(places, section.start)]


def within_reach(places: Sequence[tuple[int, int, int]], frame: int) -> list[tuple[int, int, int]]:
    """Positions of the video's tokens; what is farther from a latent frame than rotary positions reach, before it or
    after, stays at the farthest place."""
    first, last = frame - FARTHEST_DISTANCE, frame + FARTHEST_DISTANCE
    return [(min(max(t, first), last), row, column) for t, row, column in places]


def _exact(number: float | Fraction) -> Fraction:
    """As people mean it: 1.2 is 6/5, where a float is a little less and 1.2 s at 30 fps would lack a frame."""
    return Fraction(number).limit_denominator(10**6)


def _midpoints(size: int, step: int) -> tuple[int, ...]:
    return tuple(start + step // 2 for start in range(0, size - step + 1, step))


def _step(rates: Sequence[Rate]) -> int:
    return math.lcm(*(rate.time for rate in rates))


def _ascending(ends: Sequence[int]) -> Sequence[int]:
    for before, end in zip([0, *ends], ends, strict=False):
        if end < before:
            given = f"a segment that ends at frame {end} after one at {before}"
            raise PlanError(refusal(given, "ends in ascending order", str(before), PRESERVATION))
    return ends
