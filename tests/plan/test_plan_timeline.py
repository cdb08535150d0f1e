"""The timeline grammar, what fills the gaps, blending, and its refusals (fault 29)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan import (
    PlanError,
    TimelineError,
    parse_timeline,
    timeline_table,
    unused_entries,
    validate_timeline,
    weights_for,
)

SETTINGS = settings(deadline=None, max_examples=200, derandomize=True)


def spans(text, **options):
    return [(e.start_s, e.end_s, e.text, e.origin) for e in parse_timeline(text, **options).entries]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(0, None, "", "base")]),
        ("a cat", [(0, None, "a cat", "base")]),
        ("a cat\n  in a hat \n", [(0, None, "a cat in a hat", "base")]),
        (
            "0-3.6: a cat walks\n3.6s- : it sits",
            [(0, 3.6, "a cat walks", "written"), (3.6, None, "it sits", "written")],
        ),
        ("0s-2s: a\n2: b", [(0, 2, "a", "written"), (2, None, "b", "written")]),
        ("2: b\n0: a", [(0, 2, "a", "written"), (2, None, "b", "written")]),
        ("[0s-2s: a] [2s: b]", [(0, 2, "a", "written"), (2, None, "b", "written")]),
        ("[0-2:a][2-:b [soft] light]", [(0, 2, "a", "written"), (2, None, "b [soft] light", "written")]),
        ("1-2: x", [(0, 1, "x", "filled"), (1, 2, "x", "written"), (2, None, "x", "filled")]),
        (
            "0-1: a\n2-3: b",
            [(0, 1, "a", "written"), (1, 2, "a", "filled"), (2, 3, "b", "written"), (3, None, "b", "filled")],
        ),
        (
            "base\n1-2: x",
            [(0, 1, "base", "base"), (1, 2, "x", "written"), (2, None, "base", "base")],
        ),
        ("16:9 film still", [(0, None, "16:9 film still", "base")]),
        ("3 cats walk", [(0, None, "3 cats walk", "base")]),
        ("3D render: a cat", [(0, None, "3D render: a cat", "base")]),
        ("[a cat] walks", [(0, None, "[a cat] walks", "base")]),
        ("scene 2: a cat", [(0, None, "scene 2: a cat", "base")]),
        ("0-2:", [(0, 2, "", "written"), (2, None, "", "filled")]),
        ("0 \u2013 1.5 s : \u732b\r\n1.5-: \u72ac", [(0, 1.5, "\u732b", "written"), (1.5, None, "\u72ac", "written")]),
    ],
)
def test_what_is_understood(text, expected):
    assert spans(text) == expected


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("a cat\n 0-3 it sits", 2, 2, "needs a colon"),
        ("3.6s it sits", 1, 1, "needs a colon"),
        ("3,6: it sits", 1, 1, "with a point"),
        ("-1: it sits", 1, 1, "below 0"),
        ("3-2: x", 1, 3, "not after the start"),
        ("2-2: x", 1, 3, "not after the start"),
        ("[0s-2s: x", 1, 1, "not closed"),
        ("[0-1: a] b [2: c]", 1, 1, "not closed"),
        ("[0-1: a] [3-2: c]", 1, 13, "not after the start"),
        ("[0-1 a: x]", 1, 2, "needs a time and a colon"),
        ("9" * 400 + ": x", 1, 1, "without an end"),
    ],
)
def test_refusals_have_a_line_and_a_column(text, line, column, words):
    with pytest.raises(TimelineError) as caught:
        parse_timeline(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert words in caught.value.reason
    assert "Prompt Timeline" in str(caught.value)


def test_fault_29_overlapping_prompts_are_refused_with_a_table():
    with pytest.raises(TimelineError) as caught:
        parse_timeline("0-3.6: a cat walks\n3-5: it sits")
    error = caught.value
    assert (error.line, error.column) == (2, 1)
    assert "nearest valid start: 3.6" in error.reason
    assert "a cat walks" in error.table
    assert error.table in str(error)
    with pytest.raises(TimelineError, match="like line 1"):
        parse_timeline("1: a\n1: b")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [("0-3: a\n3-9: b", 2, "ends at 9 s"), ("a\n6-7: b", 2, "starts at 6 s"), ("0: a\n5: b", 2, "starts at 5 s")],
)
def test_fault_29_times_past_the_end_are_refused_with_a_table(text, line, words):
    timeline = parse_timeline(text)
    with pytest.raises(TimelineError) as caught:
        validate_timeline(timeline, 145 / 30, asked_seconds=5)
    assert caught.value.line == line
    assert words in caught.value.reason
    assert "4.83" in caught.value.reason
    assert "from" in caught.value.table
    assert "b" in caught.value.table


def test_fault_29_the_length_that_was_typed_may_be_used():
    # 5 s become 4.83 s by rounding to sections; "0-5" still means the whole video.
    timeline = parse_timeline("0-5: a")
    validate_timeline(timeline, 145 / 30, asked_seconds=5)
    with pytest.raises(TimelineError):
        validate_timeline(timeline, 145 / 30)
    validate_timeline(parse_timeline("0-4.85: a"), 145 / 30)


def test_fault_29_gaps_are_said_in_the_table():
    timeline = parse_timeline("0-1: a\n2-3: b")
    assert timeline_table(timeline).splitlines() == [
        "from  to   prompt  because",
        "0 s   1 s  a       line 1",
        "1 s   2 s  a       gap: a neighbour goes on",
        "2 s   3 s  b       line 2",
        "3 s   end  b       gap: a neighbour goes on",
    ]
    assert timeline_table(timeline, seconds=3.0).splitlines()[-1].endswith("line 2")
    assert "the base prompt" in timeline_table(parse_timeline("a\n1-2: b"))
    assert "(empty)" in timeline_table(parse_timeline(""))


def test_fault_29_prompts_no_section_would_show_are_found():
    starts = tuple(1 / 30 + 1.2 * i for i in range(4))
    timeline = parse_timeline("0: a\n1.3-1.5: b\n2: c")
    assert [e.text for e in unused_entries(timeline, starts)] == ["b"]
    assert unused_entries(parse_timeline("0: a\n1.2: b"), starts) == ()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused(seconds):
    with pytest.raises(PlanError, match=r"1\.2 s"):
        validate_timeline(parse_timeline("a"), seconds)


@pytest.mark.parametrize("blend", [-1, 1.5, True])
def test_an_impossible_blend_is_refused(blend):
    with pytest.raises(PlanError, match="Prompt Timeline"):
        parse_timeline("a", blend)


@st.composite
def written(draw):
    """Non-overlapping (start, end or None, text) in time order, and a base or None; times on a grid of 0.1 s."""
    marks = draw(st.lists(st.integers(0, 300), min_size=1, max_size=9, unique=True).map(sorted))
    items = []
    for i, mark in enumerate(marks):
        room = (marks[i + 1] if i + 1 < len(marks) else 400) - mark
        length = draw(st.one_of(st.none(), st.integers(1, room)))
        items.append((mark / 10, None if length is None else (mark + length) / 10, draw(st.sampled_from("abcd"))))
    return items, draw(st.one_of(st.none(), st.just("base")))


def as_text(items, base):
    lines = [f"{s}-{'' if e is None else e}: {text}" for s, e, text in items]
    return "\n".join([base, *lines] if base else lines)


def prompt_at(items, base, time):
    """Which prompt shows at a time, looked up item by item."""
    inside = None
    for i, (start, end, text) in enumerate(items):
        stop = end if end is not None else items[i + 1][0] if i + 1 < len(items) else float("inf")
        if start <= time < stop:
            inside = text
    if inside is not None:
        return inside
    if base is not None:
        return base
    return [text for start, _, text in items if start <= time][-1] if items[0][0] <= time else items[0][2]


@SETTINGS
@given(written(), st.integers(0, 4200))
def test_every_moment_shows_the_prompt_looked_up_by_hand(made, tick):
    items, base = made
    time = tick / 100 + 0.005
    timeline = parse_timeline(as_text(items, base))
    ((index, weight),) = weights_for(timeline, time, 1.2)
    assert weight == 1.0
    assert timeline.entries[index].text == prompt_at(items, base, time)


@SETTINGS
@given(written(), st.integers(0, 4))
def test_entries_follow_each_other_from_zero_to_the_end(made, blend):
    timeline = parse_timeline(as_text(*made), blend)
    entries = timeline.entries
    assert entries[0].start_s == 0
    assert entries[-1].end_s is None
    assert all(a.end_s == b.start_s for a, b in zip(entries, entries[1:]))
    assert timeline.blend_sections == blend
    assert [e.text for e in entries if e.origin == "written"] == [text for _, _, text in made[0]]


@SETTINGS
@given(written(), st.integers(0, 4), st.integers(0, 60))
def test_weights_add_up_and_name_the_prompt_of_the_moment(made, blend, section):
    timeline = parse_timeline(as_text(*made), blend)
    time = 1 / 30 + 1.2 * section
    weights = weights_for(timeline, time, 1.2)
    assert sum(w for _, w in weights) == pytest.approx(1)
    assert all(0 < w <= 1 for _, w in weights)
    assert len(weights) <= 2
    ((now, _),) = weights_for(parse_timeline(as_text(*made)), time, 1.2)
    assert weights[-1][0] == now
    if len(weights) == 2:
        assert timeline.entries[weights[0][0]].text != timeline.entries[now].text


@pytest.mark.parametrize("blend", range(5))
@pytest.mark.parametrize("change", [0.5, 1.2, 3.6, 3.64, 4.7])
def test_a_change_is_blended_linearly_over_n_sections(blend, change):
    timeline = parse_timeline(f"0: a\n{change}: b", blend)
    new = []
    for section in range(20):
        weights = dict(weights_for(timeline, 1 / 30 + 1.2 * section, 1.2))
        new.append(weights.get(1, 0.0))
    after = [w for w in new if w > 0]
    assert after[: blend + 1] == pytest.approx([(k + 1) / (blend + 1) for k in range(blend + 1)])
    assert set(after[blend:]) == {1.0}


def test_a_gap_filled_with_the_same_prompt_is_no_change():
    timeline = parse_timeline("0-1: a\n2-3: a\n3-: b", 1)
    assert weights_for(timeline, 2.5, 1.2) == ((2, 1.0),)
    assert weights_for(timeline, 3.0, 1.2) == ((2, 0.5), (3, 0.5))


@SETTINGS
@given(st.text(alphabet="[]0123.5s:-, ab\n\u2013", max_size=40))
def test_any_text_is_understood_or_refused_with_a_place(text):
    try:
        timeline = parse_timeline(text)
    except TimelineError as error:
        lines = text.split("\n")
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1
    else:
        assert timeline_table(timeline)


def test_a_line_without_a_time_that_no_gap_uses_is_warned_of_in_the_table():
    covered = parse_timeline("a girl on a hill\n0-3.6: she stands\n3.6-: she dances")
    assert covered.unused_base == "a girl on a hill"
    last = timeline_table(covered).splitlines()[-1]
    assert last.startswith("Warning: ") and "never used" in last and "a girl on a hill" in last
    for text in ("a\n0-1: b\n2-: c", "a\n1-: b", "a\n0-1: b", "a", "0: a", ""):
        assert "Warning" not in timeline_table(parse_timeline(text)), text
