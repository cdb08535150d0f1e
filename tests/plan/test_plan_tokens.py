"""Tokens, bytes, shift and sigmas against the numbers of the reference."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan import (
    BUCKETS,
    PRESETS,
    PlanError,
    flow_shift,
    group_tokens,
    latent_bytes,
    mu,
    parse_schedule,
    plan_sections,
    schedule_tokens,
    section_tokens,
    sigma_schedule,
)

# framepack reference 1.1: height, width, noisy, 1x, 2x, 4x, total.
TABLE = [
    (416, 960, 14040, 3120, 390, 420, 17970),
    (448, 864, 13608, 3024, 378, 392, 17402),
    (480, 832, 14040, 3120, 390, 416, 17966),
    (512, 768, 13824, 3072, 384, 384, 17664),
    (544, 704, 13464, 2992, 374, 396, 17226),
    (576, 672, 13608, 3024, 378, 396, 17406),
    (608, 640, 13680, 3040, 380, 400, 17500),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("preset", ["F0 inverted", "F1 forward"])
def test_tokens_of_every_bucket(preset, row, transposed):
    height, width, noisy, one, two, four, total = row
    sides = (width // 8, height // 8) if transposed else (height // 8, width // 8)
    assert (8 * sides[0], 8 * sides[1]) in BUCKETS
    schedule = parse_schedule(PRESETS[preset])
    count = schedule_tokens(schedule, *sides)
    by_kernel = {k: sum(n for g, n in zip(schedule.groups, count.groups) if g.kernel == k) for k in (1, 2, 4)}
    assert (count.window, by_kernel[1], by_kernel[2], by_kernel[4], count.video) == (noisy, one, two, four, total)
    assert count.total == total + 729
    for section in plan_sections(schedule, sections=3).sections:
        assert section_tokens(section, *sides).video == total


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8]), st.integers(1, 130), st.integers(1, 130))
def test_tokens_are_the_strides_of_a_padded_volume(frames, kernel, height, width):
    steps = [len(range(0, frames, kernel)), len(range(0, height, 2 * kernel)), len(range(0, width, 2 * kernel))]
    assert group_tokens(frames, kernel, height, width) == math.prod(steps)


def test_the_performance_reference():
    # performance reference 2: 640x608 with 120 text tokens.
    count = schedule_tokens(parse_schedule(PRESETS["F0 inverted"]), 76, 80, text_tokens=120)
    assert (count.context, count.total) == (3820, 18349)
    assert latent_bytes(9, 76, 80) == pytest.approx(3.5e6, rel=0.01)
    assert latent_bytes(451, 76, 80) == pytest.approx(175e6, rel=0.01)
    assert latent_bytes(19, 76, 80) == pytest.approx(7.4e6, rel=0.01)


def test_a_kept_tail_is_counted():
    appended = plan_sections("f1k1_ta_f16k4f2k2f1k1_g9", sections=4).sections
    compressed = plan_sections("f1k1_tc_f16k4f2k2f1k1_g9", sections=4).sections
    assert [section_tokens(s, 76, 80).tail for s in appended] == [0, 0, 0, 8]
    assert [section_tokens(s, 76, 80).tail for s in compressed] == [0, 0, 0, 1]
    schedule = parse_schedule("f1k1_ta_f16k4f2k2f1k1_g9")
    assert schedule_tokens(schedule, 76, 80, tail_frames=8).video == 17500 + 8


def test_an_empty_latent_is_refused():
    with pytest.raises(PlanError, match="Frame Context Packer"):
        schedule_tokens(parse_schedule("f1k1_g9"), 0, 80)


@pytest.mark.parametrize("row", TABLE)
def test_every_bucket_has_shift_seven(row):
    assert flow_shift(row[2]) == 7.0


def test_shift_of_small_windows():
    # framepack reference 4 and 3.3: k = 1.69271e-4, b = 0.456667; one frame of 1520 tokens has mu 0.714, shift 2.04.
    assert mu(1520) == pytest.approx(0.714, abs=5e-4)
    assert flow_shift(1520) == pytest.approx(2.04, abs=5e-3)
    assert mu(1000) == pytest.approx(1.69271e-4 * 1000 + 0.456667, abs=1e-6)
    assert mu(256) == pytest.approx(0.5)
    assert mu(4096) == pytest.approx(1.15)
    assert flow_shift(8797) < 7.0 == flow_shift(8798) == flow_shift(10**6)
    assert mu(10**6) == math.log(7)


def test_sigmas_of_the_reference():
    listed = (
        "1, .9941, .9877, .9809, .9735, .9655, .9568, .9474, .9370, .9256, .9130, .8991, .8835, .8660, .8462, .8235, "
        ".7975, .7671, .7313, .6885, .6364, .5714, .4884, .3784, .2258, 0."
    )
    expected = [float(number) for number in listed.rstrip(".").split(",")]
    got = sigma_schedule(25, 7.0)
    assert len(got) == 26
    assert got == pytest.approx(expected, abs=5.1e-5)
    assert (got[0], got[-1]) == (1.0, 0.0)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 200), st.floats(0.1, 20))
def test_sigmas_fall_from_one_to_zero_by_the_other_form_of_the_formula(steps, shift):
    got = sigma_schedule(steps, shift)
    assert got[0] == pytest.approx(1.0)
    assert got[-1] == 0.0
    assert all(a > b for a, b in zip(got, got[1:]))
    for i, sigma in enumerate(got[:-1]):
        t = 1 - i / steps
        assert sigma == pytest.approx(shift / (shift + 1 / t - 1), rel=1e-9)


@pytest.mark.parametrize("wrong", [(0, 7.0), (-1, 7.0), (2.5, 7.0), (25, 0.0), (25, -7.0), (25, math.nan)])
def test_impossible_sigmas_are_refused(wrong):
    with pytest.raises(PlanError, match="FramePack Sigmas"):
        sigma_schedule(*wrong)
