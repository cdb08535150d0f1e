"""Decode windows: the whole video, in bounded pieces, exactly as the published soft_append puts it together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan import ORDERS, PlanError, decode_windows, pixel_frames, pixel_span


def decoded(window):
    """Pixel frame numbers a window decodes to: 4n-3 of them, its own first latent frame making only one."""
    count = 4 * (window.stop - window.start) - 3
    # A latent frame f makes pixel frames 4f-3..4f; decoded first, only its last one: 4f.
    return list(range(4 * window.start, 4 * window.start + count))


def soft_append(one, two, overlap):
    """The published join with frame numbers for frames: both must hold the same frames where they are blended."""
    assert one[-overlap:] == two[:overlap]
    return one[:-overlap] + one[-overlap:] + two[overlap:]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", range(1, 61))
def test_windows_cover_the_video_once_and_overlap_by_33(order, n):
    total = 9 * n + 1
    video, *others = [decoded(window) for window in decode_windows(order, total)]
    for other in others:
        video = soft_append(video, other, 33)
    assert video == list(range(36 * n + 1))


@pytest.mark.parametrize("n", range(1, 61))
def test_f0_windows_are_the_slices_the_published_loop_decodes(n):
    slices = []
    total = 9 * n + 1
    for k in range(n):
        last = k == n - 1
        start = 0 if last else total - 9 * (k + 1)
        history = list(range(start, total))
        piece = history if k == 0 else history[: 19 if last else 18]
        slices.append((piece[0], piece[-1] + 1))
    assert [(w.start, w.stop) for w in decode_windows("inverted", total)] == slices[::-1]


@pytest.mark.parametrize("n", range(1, 61))
def test_f1_windows_are_the_slices_the_published_loop_decodes(n):
    slices = []
    for k in range(n):
        history = list(range(1 + 9 * (k + 1)))
        piece = history if k == 0 else history[-18:]
        slices.append((piece[0], piece[-1] + 1))
    assert [(w.start, w.stop) for w in decode_windows("forward", 9 * n + 1)] == slices


@settings(deadline=None, max_examples=400, derandomize=True)
@given(st.sampled_from(ORDERS), st.integers(1, 400), st.integers(1, 16))
def test_any_length_and_window_is_covered_in_bounded_pieces(order, total, window):
    windows = decode_windows(order, total, window)
    assert all(w.stop - w.start <= 2 * window + 1 for w in windows)
    assert all((w.pixel_start, w.pixel_stop) == (decoded(w)[0], decoded(w)[-1] + 1) for w in windows)
    video, *others = map(decoded, windows)
    for other in others:
        video = soft_append(video, other, pixel_frames(window))
    assert video == list(range(4 * total - 3))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("total", range(1, 19))
def test_up_to_two_windows_of_an_odd_length_are_decoded_at_once(order, total):
    assert [(w.start, w.stop) for w in decode_windows(order, total)] == [(0, total)]


def test_pixel_frames():
    assert [pixel_frames(n) for n in (0, 1, 2, 9, 10, 18, 19)] == [0, 1, 5, 33, 37, 69, 73]
    assert pixel_span(0, 10) == (0, 36)
    assert pixel_span(10, 19) == (37, 72)


@pytest.mark.parametrize("wrong", [("sideways", 10, 9), ("forward", 0, 9), ("forward", 10, 0)])
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(PlanError):
        decode_windows(*wrong)


@pytest.mark.parametrize("window", [1, 2, 9, 20])
def test_clips_are_numbered_by_what_each_decodes_to(window):
    """Counted one pixel frame at a time: 1 for the first latent frame of a clip, 4 for the others, 0 in front."""
    makes = [0, *([1, *[4] * (window - 1)] * 5)]
    for total in range(len(makes) + 1):
        assert pixel_frames(total, window) == sum(makes[:total])
    begin, end = sum(makes[: 1 + window]), sum(makes[: 1 + 2 * window])
    assert pixel_span(1 + window, 1 + 2 * window, window) == (begin, end - 1)
    windows = decode_windows("forward", len(makes), window, clips=True)
    assert [(w.start, w.pixel_start) for w in windows] == [(s, sum(makes[:s])) for s in range(1, len(makes), window)]


@pytest.mark.parametrize("total", [1, 9, 18, 20])
def test_clips_that_were_cut_are_refused_with_the_nearest_length(total):
    with pytest.raises(PlanError, match="the frame in front, and whole clips.*(10|19), uncut"):
        decode_windows("forward", total, clips=True)
