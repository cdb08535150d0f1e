"""Properties every plan has, the orders without a published loop, and the refusals of the Anti-Drift Sampler."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from frame_memory.plan import (
    BLANK,
    END,
    ORDERS,
    PRESETS,
    START,
    PlanError,
    natural_order,
    parse_schedule,
    plan_sections,
    section_count,
)

from .test_plan_schedule import schedules

SETTINGS = settings(deadline=None, max_examples=150, derandomize=True)
BOTH = PRESETS["Anti-drifting, both ends first"]


@st.composite
def plans(draw):
    free = schedules().map(lambda made: made[0])
    schedule = parse_schedule(draw(st.one_of(free, st.sampled_from([*PRESETS.values()]))))
    given_frames = draw(st.one_of(st.just(0), st.integers(1, 40)))
    try:
        return plan_sections(
            schedule,
            sections=draw(st.integers(1, 12)),
            order=draw(st.sampled_from([None, *ORDERS])),
            history_frames=given_frames,
            has_end=draw(st.booleans()),
        )
    except PlanError as error:
        assert "Nearest valid" in str(error)
        assert "Change it in the node" in str(error)
        assume(False)


@SETTINGS
@given(plans())
def test_every_frame_is_made_once_and_only_after_what_it_reads(plan):
    first = plan.given_frames or 1
    made_by = {}
    for index, section in enumerate(plan.sections):
        assert section.index == index
        assert section.stop - section.start == len(section.positions) == plan.schedule.window
        read = {frame for group in section.groups for frame in group.frames}
        read |= set(section.tail.frames) if section.tail else set()
        needs = set()
        for frame in read - {START, END, BLANK}:
            assert frame < first or frame in made_by
            assert not section.start <= frame < section.stop
            needs |= {made_by[frame]} if frame in made_by else set()
        assert section.depends_on == tuple(sorted(needs))
        for frame in range(section.start, section.stop):
            assert frame not in made_by
            made_by[frame] = index
    assert sorted(made_by) == list(range(first, plan.total_frames))


@SETTINGS
@given(plans())
def test_groups_have_the_lengths_and_order_of_the_schedule(plan):
    for section in plan.sections:
        assert sorted((len(g.frames), g.kernel) for g in section.groups) == sorted(
            (g.frames, g.kernel) for g in plan.schedule.groups
        )
        assert [(-g.kernel, g.positions[0]) for g in section.groups] == sorted(
            (-g.kernel, g.positions[0]) for g in section.groups
        )
        line = [*section.positions, *(p for group in section.groups for p in group.positions)]
        line += [section.tail.position] if section.tail else []
        assert len(set(line)) == len(line)
        assert min(line) >= 0
        # Read by position, groups come back in the schedule's time order.
        in_time = sorted(section.groups, key=lambda g: g.positions)
        assert [(len(g.frames), g.kernel) for g in in_time] == [(g.frames, g.kernel) for g in plan.schedule.groups]
        for group in section.groups:
            assert list(group.positions) == list(range(group.positions[0], group.positions[0] + len(group.frames)))
            real = [(p, f) for p, f in zip(group.positions, group.frames) if f >= 0]
            assert all(f - p == real[0][1] - real[0][0] for p, f in real)


@SETTINGS
@given(plans())
def test_history_next_to_the_window_is_the_neighbouring_frames(plan):
    sections = plan.sections[1:] if plan.order == "both ends first" else plan.sections
    before = sum(g.frames for g in plan.schedule.history_before)
    after = sum(g.frames for g in plan.schedule.history_after)
    for section in sections:
        at = dict(pair for group in section.groups for pair in zip(group.positions, group.frames))
        offset = section.start - section.positions[0]
        made = set(range(plan.given_frames or 1))
        made |= {f for s in plan.sections[: section.index] for f in range(s.start, s.stop)}
        for position in [
            *range(section.positions[0] - before, section.positions[0]),
            *range(section.positions[-1] + 1, section.positions[-1] + 1 + after),
        ]:
            frame = position + offset
            expected = frame if frame in made else BLANK
            assert at[position] == expected or (at[position] == END and section.index == 0)


@SETTINGS
@given(plans())
def test_a_kept_tail_holds_exactly_the_history_no_group_holds(plan):
    schedule = plan.schedule
    kept = [side for side in (schedule.tail_before, schedule.tail_after) if side in ("a", "c")]
    for section in plan.sections:
        if not kept:
            assert section.tail is None
            continue
        made = set(range(plan.given_frames or 1))
        made |= {f for s in plan.sections[: section.index] for f in range(s.start, s.stop)}
        shown = {frame for group in section.groups for frame in group.frames}
        shown |= {0} if START in shown else set()
        if schedule.tail_before in ("a", "c"):
            # Both ends first: the last window is made as if it followed the start.
            first_pass = plan.order == "both ends first" and section.index == 0
            edge = (plan.given_frames or 1) if first_pass else section.start
            expected = {f for f in made - shown if f < edge}
        else:
            expected = {f for f in made - shown if f >= section.stop}
        found = section.tail.frames if section.tail else ()
        assert list(found) == sorted(expected)
        if section.tail:
            assert section.tail.kind == kept[0]


@SETTINGS
@given(plans())
def test_describe_has_a_row_a_section_with_its_frames_and_seconds(plan):
    text = plan.describe()
    lines = text.splitlines()
    assert f"{plan.pixel_frames} frames = {plan.seconds:.2f} s at 30 fps" in lines[0]
    rows = lines[-len(plan.sections) :]
    for section, row in zip(plan.sections, rows):
        cells = row.split()
        first = max(4 * section.start - 3, 0)
        last = 4 * section.stop - 4
        assert cells[:2] == [str(section.index + 1), f"{first}-{last}"]
        assert cells[2] == f"{first / 30:.2f}-{(last + 1) / 30:.2f}"
    assert lines[-len(plan.sections) - 1].startswith("section")


def groups_of(section):
    return {(g.kernel, g.frames, g.positions) for g in section.groups}


def test_both_ends_first_makes_the_last_window_then_goes_forward():
    plan = plan_sections(BOTH, sections=5, has_end=True)
    assert [(s.start, s.stop) for s in plan.sections] == [(37, 46), (1, 10), (10, 19), (19, 28), (28, 37)]
    first = plan.sections[0]
    # The start frame is the nearest history, the end frame follows the window.
    assert groups_of(first) == {
        (4, (BLANK,) * 16, tuple(range(16))),
        (2, (BLANK,) * 2, (16, 17)),
        (1, (0,), (18,)),
        (1, (END,), (28,)),
    }
    assert first.positions == tuple(range(19, 28))
    # Window 1 ends at frame 10, the end anchor is frame 37: 27 frames lie between, three windows.
    anchors = [max(s.groups, key=lambda g: g.positions) for s in plan.sections[1:]]
    assert [a.frames for a in anchors] == [(37,)] * 4
    assert [a.positions[0] - 28 for a in anchors] == [27, 18, 9, 0]
    assert [s.depends_on for s in plan.sections] == [(), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]


def test_a_long_skip_is_capped_at_three_windows():
    plan = plan_sections(BOTH, sections=20)
    assert max(p for s in plan.sections for g in s.groups for p in g.positions) == 27 + 27 + 1
    assert BLANK in max(plan.sections[0].groups, key=lambda g: g.positions).frames


def test_a_given_video_counts_as_frames_in_front():
    plan = plan_sections(PRESETS["F1 forward"], sections=2, history_frames=12)
    assert (plan.given_frames, plan.total_frames, plan.pixel_frames) == (12, 30, 117)
    assert groups_of(plan.sections[0]) == {
        (4, (BLANK,) * 7 + tuple(range(9)), tuple(range(1, 17))),
        (2, (9, 10), (17, 18)),
        (1, (11,), (19,)),
        (1, (11,), (0,)),
    }
    inverted = plan_sections(PRESETS["F0 inverted"], sections=2, history_frames=12)
    assert [(s.start, s.stop, s.padding) for s in inverted.sections] == [(21, 30, 9), (12, 21, 0)]
    assert (1, (11,), (0,)) in groups_of(inverted.sections[0])


def test_several_start_anchors_are_the_last_given_frames_in_order():
    plan = plan_sections("f3k1_x_g9_f1k1f2k2f16k4_td", sections=3, history_frames=12)
    assert (1, (9, 10, 11), (0, 1, 2)) in groups_of(plan.sections[0])
    assert plan.sections[0].positions[0] == 3 + 18
    short = plan_sections("f3k1_x_g9_f1k1f2k2f16k4_td", sections=3, history_frames=2)
    assert (1, (BLANK, 0, 1), (0, 1, 2)) in groups_of(short.sections[0])


def test_start_anchors_without_a_given_video_are_the_start_and_what_follows_it():
    plan = plan_sections("f3k1_td_f1k1_g2", sections=3)
    anchors = [min(s.groups, key=lambda g: g.positions).frames for s in plan.sections]
    assert anchors == [(START, BLANK, BLANK), (START, 1, 2), (START, 1, 2)]


def test_an_inverted_skip_makes_room_for_history_before_the_window():
    # The window stays where F0 puts it, at 1 + P, until the history does not fit any more.
    plan = plan_sections("f1k1_x_f2k1_g9_f1k1f2k2f16k4_td", sections=3, order="inverted")
    assert [s.positions[0] for s in plan.sections] == [1 + 18, 1 + 9, 1 + 2]
    assert [s.padding for s in plan.sections] == [18, 9, 0]


def test_a_forward_skip_is_the_real_distance_to_the_anchor():
    # Between frame 0 and the two history frames before frame 10 lie frames 1..7.
    plan = plan_sections("f1k1_x_f2k1_g9", sections=6)
    assert [s.positions[0] - 3 for s in plan.sections] == [0, 7, 16, 25, 27, 27]
    given_video = plan_sections("f1k1_x_f2k1_g9", sections=3, history_frames=5)
    assert [s.positions[0] - 3 for s in given_video.sections] == [0, 7, 16]


def test_the_last_of_several_end_anchors_is_the_end_frame():
    # Frames 1..9 and 10..18; the anchors stand for frame 18 and the end frame 19.
    plan = plan_sections("f1k1_g9_x_f2k1", sections=2, order="forward", has_end=True)
    anchors = [max(s.groups, key=lambda g: g.positions) for s in plan.sections]
    assert [a.frames for a in anchors] == [(BLANK, END)] * 2
    assert [a.positions[0] - s.positions[-1] - 1 for a, s in zip(anchors, plan.sections)] == [8, 0]


def test_a_tail_takes_one_position_and_a_dropped_one_none():
    appended = plan_sections("f1k1_ta_f16k4f2k2f1k1_g9", sections=4)
    assert [s.tail for s in appended.sections[:2]] == [None, None]
    assert appended.sections[3].tail.frames == tuple(range(1, 9))
    assert appended.sections[3].tail.position == 1
    assert appended.sections[0].positions[0] == 21
    after = plan_sections("f1k1_x_g9_f1k1f2k2f16k4_tc", sections=4)
    assert after.sections[3].tail.frames == tuple(range(29, 37))
    assert after.sections[3].tail.position == after.sections[3].positions[-1] + 20


@pytest.mark.parametrize("n", [1, 2, 5])
def test_end_anchor_of_an_inverted_schedule_takes_the_end_frame_in_every_section(n):
    plan = plan_sections("f1k1_x_g9_f1k1f2k2f16k4_td_f1k1", sections=n, has_end=True)
    assert plan.order == "inverted"
    for section in plan.sections:
        assert (1, (END,), (section.positions[-1] + 20,)) in groups_of(section)


def test_forward_order_takes_an_end_frame_where_the_schedule_has_a_place():
    plan = plan_sections(BOTH, sections=3, order="forward", has_end=True)
    anchors = [max(s.groups, key=lambda g: g.positions) for s in plan.sections]
    assert [a.frames for a in anchors] == [(END,)] * 3
    assert [a.positions[0] - 28 for a in anchors] == [18, 9, 0]


def test_fault_24_length_is_shown_exactly_before_the_run():
    # 5 s asked: 4.17 sections round to 4, which are 145 frames.
    plan = plan_sections(PRESETS["F0 inverted"], sections=section_count(5.0))
    assert plan.describe().splitlines()[0] == (
        "4 sections of 9 latent frames make 145 frames = 4.83 s at 30 fps (37 latent frames)."
    )
    assert plan.seconds == pytest.approx(145 / 30)
    alone = plan_sections(PRESETS["F0 inverted"], sections=1)
    assert alone.describe().startswith("1 section of 9 latent frames makes 37 frames = 1.23 s")
    assert plan.describe().splitlines()[3:6] == [
        "section  makes frames  seconds    sees at 4x      sees at 2x  sees at 1x      needs",
        "1        109-144       3.63-4.83  empty           empty       start, empty    -",
        "2        73-108        2.43-3.63  121-144, empty  113-120     start, 109-112  1",
    ]


@pytest.mark.parametrize("seconds", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, "5", None])
def test_fault_24_a_length_that_is_none_is_refused_with_the_nearest(seconds):
    with pytest.raises(PlanError) as caught:
        section_count(seconds)
    message = str(caught.value)
    assert repr(seconds) in message
    assert "1.2 s (one section)" in message
    assert "Anti-Drift Sampler" in message


@SETTINGS
@given(st.floats(0.01, 3000), st.integers(1, 24), st.sampled_from([16, 24, 25, 30, 29.97]))
def test_fault_24_the_count_is_the_nearest_number_of_sections(seconds, window, fps):
    wanted = seconds * fps / (4 * window)
    if wanted > 3000:
        with pytest.raises(PlanError, match="at most 3000 sections"):
            section_count(seconds, window, fps)
        return
    count = section_count(seconds, window, fps)
    assert count >= 1
    assert abs(count - wanted) <= 0.5 + 1e-9 or count == 1


@pytest.mark.parametrize("name", ["F1 forward", "Vanilla"])
def test_fault_27_end_frame_with_a_forward_order_is_refused(name):
    with pytest.raises(PlanError) as caught:
        plan_sections(PRESETS[name], sections=3, has_end=True)
    message = str(caught.value)
    assert "end frame with order forward" in message
    assert message.startswith(
        "F1 cannot aim at an end picture, nor can Wan. Take the end picture out of 'FramePack Image' (or bypass its "
        "Load Image), 'bridge_to' out of 'Video History', or load an F0 model with the preset 'F0 inverted'."
    )
    assert PRESETS["F0 inverted"] in message
    # The schedule it names does have a place.
    plan_sections(f"{PRESETS[name]}_x_f1k1", sections=3, has_end=True)


def test_fault_27_end_frame_without_a_full_rate_slot_is_refused():
    with pytest.raises(PlanError, match="full-rate group"):
        plan_sections("f1k1_x_g9_f2k2f16k4_td", sections=3, has_end=True)


@pytest.mark.parametrize(
    ("name", "order"),
    [("F1 forward", "inverted"), ("F0 inverted", "forward"), ("F0 inverted", "both ends first"), ("Vanilla", "x")],
)
def test_an_order_the_schedule_cannot_serve_is_refused(name, order):
    with pytest.raises(PlanError) as caught:
        plan_sections(PRESETS[name], sections=3, order=order)
    assert natural_order(parse_schedule(PRESETS[name])) in str(caught.value)
    assert "Anti-Drift Sampler" in str(caught.value)


def test_a_schedule_that_never_shows_the_start_is_refused_with_one_that_does():
    with pytest.raises(PlanError) as caught:
        plan_sections("g9_f1k1", sections=2)
    assert "f1k1_x_g9_f1k1" in str(caught.value)
    plan_sections("f1k1_x_g9_f1k1", sections=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sections": 0},
        {"sections": -3},
        {"sections": True},
        {"sections": 2.0},
        {"sections": 4000},
        {"sections": 2, "fps": 0},
        {"sections": 2, "fps": math.nan},
        {"sections": 2, "history_frames": -1},
        {"sections": 2, "history_frames": 1.5},
    ],
)
def test_impossible_numbers_are_refused_by_the_sampler(wrong):
    with pytest.raises(PlanError, match="Anti-Drift Sampler"):
        plan_sections(PRESETS["F1 forward"], **wrong)


def test_an_hour_is_planned_quickly_and_every_section_is_bounded():
    plan = plan_sections(PRESETS["F1 forward"], sections=3000)
    assert plan.seconds > 3599
    assert max(len(s.depends_on) for s in plan.sections) <= 4
