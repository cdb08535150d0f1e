"""Pictures: everything inside the canvas, one bar a frame, and the numbers of the token count."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan import PRESETS, packing_picture, parse_schedule

from .test_plan_schedule import schedules

SETTINGS = settings(deadline=None, max_examples=80, derandomize=True)


def inside(picture):
    for rect in picture.rects:
        assert rect.width >= 1
        assert rect.height >= 1
        assert rect.x >= 0
        assert rect.y >= 0
        assert rect.x + rect.width <= picture.width
        assert rect.y + rect.height <= picture.height
        assert 0 <= rect.colour <= 0xFFFFFF
    for label in picture.labels:
        assert 0 <= label.x < picture.width
        assert label.y + label.size <= picture.height
        assert label.text


def bars(picture):
    return sorted((r for r in picture.rects if r.kind in ("context", "window", "tail")), key=lambda r: r.x)


@SETTINGS
@given(schedules(), st.integers(400, 1600))
def test_packing_picture_is_inside_and_in_time_order(made, width):
    schedule = parse_schedule(made[0])
    picture = packing_picture(schedule, width=width)
    inside(picture)
    drawn = bars(picture)
    assert all(a.x + a.width <= b.x for a, b in zip(drawn, drawn[1:]))


@pytest.mark.parametrize("text", PRESETS.values())
def test_one_bar_a_frame_as_high_as_its_rate(text):
    schedule = parse_schedule(text)
    expected = []
    for group in [*schedule.anchor_before, *schedule.history_before]:
        expected += [96 // group.kernel] * group.frames
    expected += [96] * schedule.window
    for group in [*schedule.history_after, *schedule.anchor_after]:
        expected += [96 // group.kernel] * group.frames
    assert [bar.height for bar in bars(packing_picture(schedule))] == expected


def test_the_key_gives_the_tokens_of_the_reference():
    texts = [label.text for label in packing_picture(parse_schedule(PRESETS["F0 inverted"])).labels]
    assert "window: 9 latent frames made together, 13,680 tokens" in texts
    assert "1x: 2 latent frames, 3,040 tokens" in texts
    assert "2x: 2 latent frames, 380 tokens" in texts
    assert "4x: 16 latent frames, 400 tokens" in texts
    assert "17,500 tokens at 640x608, of them 3,820 context" in texts


def test_a_huge_group_is_one_bar():
    picture = packing_picture(parse_schedule("f1024k8_g9"))
    inside(picture)
    assert len(bars(picture)) < 20
