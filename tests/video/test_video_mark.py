"""The mark on a LATENT, and frame rates."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.plan.mark import LatentMark, MarkError, as_fps, read_mark, resolve_fps


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (30, Fraction(30)),
        (30.0, Fraction(30)),
        (24, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (Fraction(2997, 100), Fraction(2997, 100)),
    ],
)
def test_fps_is_exact(value, exact):
    assert as_fps(value) == exact


@given(st.integers(1, 240))
def test_whole_rates_stay_whole(rate):
    assert as_fps(rate) == as_fps(float(rate)) == rate


@pytest.mark.parametrize("bad", [0.5, -30, 1000])
def test_absurd_rates_are_refused(bad):
    with pytest.raises(MarkError, match="expected 1 to 240"):
        as_fps(bad)


def test_fault_25_another_rate_asks_for_interpolation():
    made = LatentMark(fps=Fraction(30))
    with pytest.raises(MarkError) as error:
        resolve_fps(made, 24.0)
    assert "made at 30 fps" in str(error.value) and "'Run Frame Interpolation Model'" in str(error.value)
    assert "0.80 times as fast" in str(error.value) and "'Save Long Video'" in str(error.value)
    assert resolve_fps(made, 30.0) == resolve_fps(made, 0) == 30
    assert resolve_fps(None, 24.0) == resolve_fps(LatentMark(), 24.0) == 24
    assert resolve_fps(None, 0) == 30


def test_marks_are_read_tolerantly():
    assert read_mark({"samples": None}) is None
    assert read_mark({"frame_memory": {}}) == LatentMark()
    written = {
        "latent_format": "HunyuanVideo",
        "base": "selftest",
        "order": "inverted",
        "window": 9,
        "fps": 30.0,
        "seconds": 5,
    }
    assert read_mark({"frame_memory": written}) == LatentMark("HunyuanVideo", "selftest", "inverted", 9, Fraction(30))
    with pytest.raises(MarkError, match="Anti-Drift Sampler"):
        read_mark({"frame_memory": "yes"})
    with pytest.raises(MarkError, match="window is 0"):
        read_mark({"frame_memory": {"window": 0}})
