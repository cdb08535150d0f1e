"""Where the image stands with memory on, and what memory costs, by the arithmetic of reference/memorypack.md."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.plan import PRESETS, START, parse_schedule, plan_sections, schedule_tokens
from frame_memory.plan.memory import given_clips, image_distance, memory_tokens, with_true_image

F1 = PRESETS["F1 forward"]


def places(section, ref):
    """(group, place in it, position) of every slot that shows a frame."""
    return [
        (g, i, group.positions[i])
        for g, group in enumerate(section.groups)
        for i, frame in enumerate(group.frames)
        if frame == ref
    ]


def test_tokens_of_a_clip_at_480p():
    assert memory_tokens(9, 60, 104) == 3 * 8 * 13 == 312
    assert [memory_tokens(t, 1, 1) for t in range(1, 10)] == [1, 1, 1, 1, 2, 2, 2, 2, 3]


@given(n=st.integers(0, 120))
def test_fault_21_the_image_stands_at_its_true_distance_between_two_guards(n):
    """id_img(n) = 20 - (1 + 9n), not nearer than 20 and not farther than 800; nothing else moves."""
    before = plan_sections(F1, sections=n + 1).sections[n]
    after = with_true_image(before)
    distance = 1 + 9 * n
    expected = 20 - (20 if distance < 20 else 800 if distance > 800 else distance)
    assert [position for _, _, position in places(after, START)] == [expected]
    assert after.positions == before.positions == tuple(range(20, 29))
    for old, new in zip(before.groups, after.groups, strict=True):
        assert (old.kernel, old.frames) == (new.kernel, new.frames)
        assert START in old.frames or old.positions == new.positions
    if n <= 2:
        assert after == before  # within FramePack-F1's own distance nothing changes at all


@given(frames=st.integers(1, 2000))
def test_fault_21_distances_stay_in_what_was_trained_and_one_period(frames):
    assert image_distance(frames) == sorted((20, frames, 800))[1]
    # The slowest of the 8 temporal frequencies: 256 ** (-14 / 16), whose period is about 805 latent frames.
    assert image_distance(frames) < 2 * 3.14159265 / 256 ** (-14 / 16)


def test_after_an_existing_video_its_last_frame_is_the_image():
    plan = plan_sections(F1, sections=5, history_frames=30)
    for section in plan.sections:
        moved = with_true_image(section, 29)
        distance = max(section.start - 29, 20)
        assert [p for _, _, p in places(moved, 29) if p < 1] == [20 - distance]
        newest = [p for _, _, p in places(section, 29) if p >= 1]
        assert [p for _, _, p in places(moved, 29) if p >= 1] == newest  # as history it stays where it is


@given(frames=st.integers(1, 100), window=st.integers(1, 12))
def test_the_clips_of_an_existing_video_cover_it_and_end_whole(frames, window):
    spans = given_clips(frames, window)
    assert [f for start, stop in spans for f in range(start, stop)] == list(range(1, frames))
    assert all(stop - start == window for start, stop in spans[1:])
    assert all(stop - start <= window for start, stop in spans[:1])


@pytest.mark.parametrize("size", [(60, 104), (76, 80)])
def test_a_sampling_step_with_memory_costs_at_most_3_percent_more(size):
    """Multiplications and additions of the published network, 3072 wide, 20 double and 40 single blocks.

    A token passes 12 D^2 weights in either kind of block (query, key, value, output, two of the MLP of 4 D); attention
    is 4 N^2 D. What renews psi runs once a section of 25 steps: two blocks over the clip, one that asks the old psi.
    """
    hidden, blocks, steps, text = 3072, 60, 25, 120
    count = schedule_tokens(parse_schedule(F1), *size, text_tokens=text)
    tokens, m = count.total, memory_tokens(9, *size)

    def layers(n: int) -> int:
        return blocks * (24 * n * hidden**2 + 4 * n * n * hidden)

    anchor = text + 729
    embedding = 2 * m * hidden * 16 * 4 * 8 * 8
    memorize = 2 * (24 * m * hidden**2 + 4 * m * m * hidden)
    squeeze = 2 * hidden**2 * (2 * m + 2 * anchor + 8 * m) + 4 * m * anchor * hidden
    more = layers(tokens + m) - layers(tokens) + (embedding + memorize + squeeze) / steps
    assert more / layers(tokens) <= 0.03
