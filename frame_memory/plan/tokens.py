"""Tokens and bytes of a section, and the flow shift that follows from the tokens.

Sources: framepack reference 1.1 (tokens) and 4 (shift and sigmas).
Latent sizes are height and width of the latent, pixels / 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import PACKER, PlanError, refusal
from .schedule import Group, Schedule
from .sections import Section

# Tokens of the SigLIP so400m image embedding at 384 pixels, patch 14.
IMAGE_TOKENS = 729
_MU_SLOPE = (1.15 - 0.5) / (4096 - 256)
_MU_OFFSET = 0.5 - 256 * _MU_SLOPE
MAX_SHIFT = 7.0


def group_tokens(frames: int, kernel: int, latent_height: int, latent_width: int) -> int:
    """Tokens of `frames` latent frames embedded with kernel (k, 2k, 2k), each side padded at its end."""
    side = 2 * kernel
    return _ceil(frames, kernel) * _ceil(latent_height, side) * _ceil(latent_width, side)


@dataclass(frozen=True)
class TokenCount:
    """Tokens of one section. groups: one count for each group, in the order given."""

    window: int
    groups: tuple[int, ...]
    tail: int
    image: int
    text: int

    @property
    def context(self) -> int:
        """Tokens of what the model sees of the rest of the video."""
        return sum(self.groups) + self.tail

    @property
    def video(self) -> int:
        """Context and window: the length of the latent side of the sequence."""
        return self.context + self.window

    @property
    def total(self) -> int:
        """The whole sequence with image and text tokens."""
        return self.video + self.image + self.text


def schedule_tokens(
    schedule: Schedule,
    latent_height: int,
    latent_width: int,
    *,
    image_tokens: int = IMAGE_TOKENS,
    text_tokens: int = 0,
    tail_frames: int = 0,
) -> TokenCount:
    """Tokens of a section of this schedule; groups in time order. tail_frames: frames a kept tail holds."""
    kinds = [kind for kind in (schedule.tail_before, schedule.tail_after) if kind in ("a", "c")]
    tail = tail_tokens(kinds[0], tail_frames) if kinds else 0
    return _count(schedule.window, schedule.groups, tail, latent_height, latent_width, image_tokens, text_tokens)


def section_tokens(
    section: Section,
    latent_height: int,
    latent_width: int,
    *,
    image_tokens: int = IMAGE_TOKENS,
    text_tokens: int = 0,
) -> TokenCount:
    """Tokens of one planned section; groups in the section's own order."""
    groups = tuple(Group(len(group.frames), group.kernel) for group in section.groups)
    tail = tail_tokens(section.tail.kind, len(section.tail.frames)) if section.tail else 0
    return _count(section.stop - section.start, groups, tail, latent_height, latent_width, image_tokens, text_tokens)


def tail_tokens(kind: str, frames: int) -> int:
    """CHOICE after the paper: an appended tail is one token a frame, a compressed one a single token."""
    return frames if kind == "a" else min(frames, 1) if kind == "c" else 0


def latent_bytes(frames: int, latent_height: int, latent_width: int, channels: int = 16, itemsize: int = 4) -> int:
    """Bytes of some latent frames, fp32 unless itemsize says otherwise."""
    return frames * latent_height * latent_width * channels * itemsize


def mu(tokens: int) -> float:
    """Logarithm of the flow shift for a noisy window of this many tokens, at most ln 7."""
    return min(_MU_SLOPE * tokens + _MU_OFFSET, math.log(MAX_SHIFT))


def flow_shift(tokens: int) -> float:
    """Flow shift e^mu for the tokens of the noisy window alone; exactly 7 from 8798 tokens on."""
    raw = _MU_SLOPE * tokens + _MU_OFFSET
    return MAX_SHIFT if raw >= math.log(MAX_SHIFT) else math.exp(raw)


def sigma_schedule(steps: int, shift: float) -> tuple[float, ...]:
    """FramePack's steps+1 sigmas from 1 down to 0: shift*t / (1 + (shift-1)*t) over equally spaced t.

    Raises PlanError for fewer than one step or a shift that is not above zero.
    """
    node = "FramePack Sigmas"
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PlanError(refusal(f"{steps!r} steps", "a whole number from 1", "25", node))
    if not math.isfinite(shift) or shift <= 0:
        raise PlanError(refusal(f"shift {shift!r}", "a number above 0", "7", node))
    times = [(steps - i) / steps for i in range(steps + 1)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


def _count(
    window: int, groups: tuple[Group, ...], tail: int, height: int, width: int, image_tokens: int, text_tokens: int
) -> TokenCount:
    if height < 1 or width < 1:
        raise PlanError(refusal(f"latents of {height}x{width}", "at least 1x1", "2x2 (16x16 pixels)", PACKER))
    return TokenCount(
        window=group_tokens(window, 1, height, width),
        groups=tuple(group_tokens(group.frames, group.kernel, height, width) for group in groups),
        tail=tail,
        image=image_tokens,
        text=text_tokens,
    )


def _ceil(number: int, step: int) -> int:
    return -(-number // step)
