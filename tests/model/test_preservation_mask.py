"""Noise as a mask: what is asked for stays as it is, to the bit; what the low-resolution copy may show of the rest."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.model.preservation import low_latents, mask_frames, pooled_mask
from frame_memory.plan.preservation import RATES

from .preserved import drawn, random_encoder

KEEP = st.lists(st.booleans(), min_size=1, max_size=20)


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@given(KEEP, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_kept_frames_are_bit_identical_and_all_others_are_noise_masked(keep, dtype, seed):
    frames = len(keep)
    history = drawn(2, 3, frames, 2, 3, seed=seed).to(dtype)
    history[:, :, :, 0, 0] = torch.tensor([-0.0, 1e-40, float("inf")], dtype=dtype)[None, :, None]
    before = history.clone()
    noise, level = drawn(2, 3, frames, 2, 3, seed=seed + 1).to(dtype), 0.2 + 0.8 * torch.rand(2, frames)
    got = mask_frames(history, torch.tensor([keep, keep[::-1]]), noise, level)
    assert got.dtype == dtype and torch.equal(bits(history), bits(before))
    for i, kept in enumerate((keep, keep[::-1])):
        for t in range(frames):
            if kept[t]:
                assert torch.equal(bits(got[i, :, t]), bits(before[i, :, t]))
            else:
                x, e, a = (v.double() for v in (before[i, :, t], noise[i, :, t], level[i, t]))
                expected = (1 - a) * x + a * e
                finite = expected.isfinite()
                tolerance = 1e-6 if dtype == torch.float32 else 0.03
                assert torch.allclose(got[i, :, t].double()[finite], expected[finite], atol=tolerance, rtol=tolerance)


def test_one_mask_serves_a_batch():
    history, noise = drawn(3, 2, 4, 2, 2), drawn(3, 2, 4, 2, 2, seed=2)
    keep, level = torch.tensor([[True, False, False, True]]), torch.tensor([[0.5, 1.0, 0.5, 1.0]])
    got = mask_frames(history, keep, noise, level)
    assert torch.equal(got[:, :, [0, 3]], history[:, :, [0, 3]])
    assert torch.equal(got[:, :, 1], noise[:, :, 1]) and torch.allclose(got[:, :, 2], (history + noise)[:, :, 2] / 2)


@given(st.sampled_from(list(RATES)), KEEP)
def test_a_frame_of_the_copy_is_clean_only_if_all_its_sources_are(name, keep):
    rate = RATES[name]
    level = [0.2 + 0.03 * i for i in range(len(keep))]
    kept, noisy = pooled_mask(torch.tensor([keep]), torch.tensor([level]), rate)
    expected = []
    for start in range(0, len(keep) - rate.time + 1, rate.time):
        hidden = [level[t] for t in range(start, start + rate.time) if not keep[t]]
        expected.append((not hidden, max(hidden, default=0.0)))
    assert kept.shape == noisy.shape == (1, len(expected))
    assert kept[0].tolist() == [clean for clean, _ in expected]
    assert torch.allclose(noisy[0], torch.tensor([a for _, a in expected]))


def test_a_copy_of_the_masked_history_would_show_what_is_masked():
    """Why the copy is masked for itself: half of the picture hidden in noise, seven eighths of that averaged away."""
    rate = RATES["4x4x2"]
    picture = drawn(1, 3, 8, 8, 8).repeat_interleave(4, 3).repeat_interleave(4, 4)[:, :, :, :32, :32]
    picture = picture[:, :, :1].expand(-1, -1, 8, -1, -1)
    keep, level = torch.zeros(1, 8, dtype=torch.bool), torch.full((1, 8), 0.7)
    leaky = low_latents(mask_frames(picture, keep, drawn(*picture.shape, seed=2), level), rate)
    clean = low_latents(picture, rate)
    masked = mask_frames(clean, *_with(pooled_mask(keep, level, rate), drawn(*clean.shape, seed=3)))

    def likeness(x):
        return float(torch.corrcoef(torch.stack((x.flatten(), clean.flatten())))[0, 1])

    assert abs(likeness(masked) - 0.3 / (0.3**2 + 0.7**2) ** 0.5) < 0.08
    assert abs(likeness(leaky) - 0.3 / (0.3**2 + 0.7**2 / 8) ** 0.5) < 0.08


def _with(pooled, noise):
    keep, level = pooled
    return keep, noise, level


def test_the_encoder_sees_no_hidden_frame_at_full_noise():
    """Query frames 2 and 3, one block: two histories that agree there and nowhere else have the same memory."""
    encoder, rate = random_encoder(), RATES["4x4x2"]
    mine, other = drawn(1, 3, 8, 16, 16), drawn(1, 3, 8, 16, 16, seed=5)
    other[:, :, 2:4] = mine[:, :, 2:4]
    keep, level = torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8)
    keep[:, 2:4] = True
    noise, small = drawn(*mine.shape, seed=6), drawn(1, 3, 4, 4, 4, seed=7)
    pooled = pooled_mask(keep, level, rate)

    def memory(history):
        low = mask_frames(low_latents(history, rate), *_with(pooled, small))
        return encoder(mask_frames(history, keep, noise, level), low=low).tokens

    with torch.no_grad():
        assert torch.equal(memory(mine), memory(other))
