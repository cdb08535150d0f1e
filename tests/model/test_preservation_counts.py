"""Tokens, numbers and operations of encoders of full size, counted from a forward pass on the meta device."""

from __future__ import annotations

import math

import comfy.ops
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from frame_memory.model.preservation import PreservationEncoder, PreservationSpec
from frame_memory.plan import BUCKETS
from frame_memory.plan.preservation import RATES, chunks, latent_frames, token_bytes, token_count

from .preserved import TABLE

HUNYUAN, WAN_1B, WAN_5B, WAN_14B = 3072, 1536, 3072, 5120
# Of the encoder at 4x4x2 for HunyuanVideo: all its numbers, those of them that are the base's, and the operations of
# 20 s in chunks of 8 latent frames and in one.
NUMBERS = (15_630_784, 199_680)
FLOPS_OF_CHUNKS, FLOPS_AT_ONCE = 665_928_007_680, 779_895_767_040
EIGHTS = tuple(range(8, 121, 8))


def counted(spec: PreservationSpec, frames: int, height: int, width: int, ends=None):
    """What comes out of a forward pass in bf16, and its operations."""
    encoder = PreservationEncoder(
        spec, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init
    ).requires_grad_(False)
    history = torch.empty(1, spec.in_channels, frames, height, width, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        return encoder(history, ends), flops.get_total_flops(), encoder


def by_hand(spec: PreservationSpec, lengths: list[int], height: int, width: int) -> int:
    """Multiplications and additions of convolutions, matrices and attention, a chunk at a time."""
    total = 0
    for frames in lengths:
        t, y, x, inner = frames, height, width, spec.in_channels
        for (time, space), outer in zip(TABLE[spec.rate], (*spec.channels, spec.channels[-1])):
            t, y, x = t // time, y // space, x // space
            total += 2 * 27 * inner * outer * t * y * x
            inner = outer
        tokens = t * y * x
        total += spec.blocks * (4 * 2 * inner**2 * tokens + 4 * inner * tokens**2)
        total += 2 * inner * spec.hidden * tokens
        total += 2 * 4 * spec.in_channels * spec.hidden * tokens  # the low branch's 1x2x2 patches
    return total


def test_the_papers_twenty_seconds_by_a_forward_pass():
    """pfp reference 2.1: 480x832, 24 fps, 20 s are 5460 tokens of 3072 numbers. The figures of the module's text."""
    spec = PreservationSpec(hidden=HUNYUAN, cross_attention=True)
    frames = latent_frames(20, 24)
    got, flops, encoder = counted(spec, frames, 60, 104, EIGHTS)
    assert tuple(got.tokens.shape) == (1, 5460, 3072) and tuple(got.features.shape) == (1, 5460, 512)
    assert got.tokens.nbytes == token_bytes(5460, 3072) == 33_546_240
    assert got.features.nbytes == token_bytes(5460, 0, 512) == 5_591_040
    assert flops == by_hand(spec, [8] * 15, 60, 104)
    numbers = {name: p.numel() for name, p in encoder.named_parameters()}
    assert (sum(numbers.values()), sum(n for k, n in numbers.items() if k.startswith("embed"))) == NUMBERS
    assert flops == FLOPS_OF_CHUNKS
    assert counted(spec, frames, 60, 104)[1] == FLOPS_AT_ONCE == by_hand(spec, [120], 60, 104)


BASES = [
    *((name, HUNYUAN, 16, 24, 60, 104) for name in RATES),
    ("4x4x2", WAN_1B, 16, 16, 60, 104),
    ("2x2x2", WAN_14B, 16, 16, 60, 104),
    ("2x2x4", WAN_5B, 48, 24, 44, 80),
]


@pytest.mark.parametrize(("name", "hidden", "channels", "fps", "height", "width"), BASES)
def test_tokens_of_a_forward_pass_are_the_plans(name, hidden, channels, fps, height, width):
    """Twenty seconds of HunyuanVideo, Wan 2.1 1.3B and 14B, and Wan 2.2 5B (704x1280, its own autoencoder)."""
    spec = PreservationSpec(hidden=hidden, in_channels=channels, rate=name)
    frames = latent_frames(20, fps)
    ends = tuple(range(9, frames + 1, 9))
    got, flops, _ = counted(spec, frames, height, width, ends)
    spans = chunks(ends, RATES[name])
    assert got.tokens.shape[1] == token_count(RATES[name], spans[-1][1], height, width)
    assert flops == by_hand(spec, [stop - start for start, stop in spans], height, width)


@pytest.mark.parametrize(("name", "bucket"), zip(RATES, BUCKETS[::3]))
def test_a_second_costs_the_same_later_on(name, bucket):
    """Linear in length: twice the chunks, twice the tokens and the operations."""
    spec, (height, width) = PreservationSpec(hidden=HUNYUAN, rate=name), (bucket[0] // 8, bucket[1] // 8)
    short, long = (counted(spec, n, height, width, tuple(range(8, n + 1, 8))) for n in (16, 32))
    assert 2 * short[0].tokens.shape[1] == long[0].tokens.shape[1] == token_count(RATES[name], 32, height, width)
    assert 2 * short[1] == long[1]


@pytest.mark.parametrize("branches", ["low", "patchifier"])
def test_what_the_ablations_cost(branches):
    spec = PreservationSpec(hidden=HUNYUAN, branches=branches)
    got, flops, encoder = counted(spec, 120, 60, 104)
    assert tuple(got.tokens.shape) == (1, 5460, 3072) and got.features is None
    kernel = 4 if branches == "low" else math.prod(RATES["4x4x2"].block)
    assert flops == 2 * kernel * 16 * HUNYUAN * 5460
    assert sum(p.numel() for p in encoder.parameters()) == kernel * 16 * HUNYUAN + HUNYUAN
