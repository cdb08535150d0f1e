"""The schedule grammar: what it means, that it round-trips, and that every refusal has a place and a reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan import PRESETS, Group, ScheduleError, natural_order, parse_schedule

SETTINGS = settings(deadline=None, max_examples=200, derandomize=True)

groups = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 4, 8])), max_size=4)


@st.composite
def sides(draw):
    """One side of g from the inside out: (history, tail, skip, anchors), with the grammar's own conditions."""
    history = draw(groups)
    tail = draw(st.sampled_from([None, "d", "a", "c"])) if history else None
    skip = draw(st.booleans())
    anchors = draw(groups) if skip or tail else []
    return history, tail, skip and bool(anchors), anchors


@st.composite
def schedules(draw):
    """(text, fields) of a valid schedule, the text written here independently of the parser."""
    before, window, after = draw(sides()), draw(st.integers(1, 20)), draw(sides())
    if before[1] in ("a", "c") and after[1] in ("a", "c"):
        after = (after[0], "d", after[2], after[3])

    def write(items):
        return "".join(f"f{frames}k{kernel}" for frames, kernel in items)

    def parts(side):
        history, tail, skip, anchors = side
        return [write(history), f"t{tail}" if tail else "", "x" if skip else "", write(anchors)]

    text = "_".join(part for part in [*parts(before)[::-1], f"g{window}", *parts(after)] if part)
    return text, before, window, after


def as_groups(pairs):
    return tuple(Group(*pair) for pair in pairs)


@SETTINGS
@given(schedules(), st.booleans(), st.sampled_from(["", " ", "\n\t"]))
def test_every_valid_schedule_parses_to_its_parts_and_round_trips(made, upper, space):
    text, before, window, after = made
    parsed = parse_schedule(space + (text.upper() if upper else text) + space)
    assert parsed.text == text
    assert (parsed.history_before, parsed.tail_before, parsed.skip_before, parsed.anchor_before) == (
        as_groups(before[0]), before[1], before[2], as_groups(before[3])
    )  # fmt: skip
    assert (parsed.history_after, parsed.tail_after, parsed.skip_after, parsed.anchor_after) == (
        as_groups(after[0]), after[1], after[2], as_groups(after[3])
    )  # fmt: skip
    assert parsed.window == window
    assert parse_schedule(parsed.text) == parsed


@st.composite
def mutated(draw):
    text = draw(schedules())[0]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        new = draw(st.sampled_from([*"fgkxtdac_+D 0139-", "", "é", "K", "²", "\n"]))
        text = text[:at] + new + text[at + draw(st.integers(0, 2)) :]
    return text


@SETTINGS
@given(st.one_of(mutated(), st.text(max_size=30)))
def test_any_other_text_parses_or_is_refused_with_a_place_and_a_reason(text):
    try:
        parsed = parse_schedule(text)
    except ScheduleError as error:
        assert 0 <= error.position <= len(text)
        assert error.reason
        assert error.text == text
        assert "Frame Context Packer" in str(error)
        assert "Nearest valid" in str(error)
        nearest = str(error).split("Nearest valid: ")[1].split(". ")[0]
        parse_schedule(nearest)
    else:
        assert parse_schedule(parsed.text) == parsed


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "empty"),
        ("   ", 0, "empty"),
        ("f1k1", 4, "no window"),
        ("f1k1_g9_g9", 8, "second window"),
        ("f1k3_g9", 3, "nearest is k2"),
        ("f1k16_g9", 3, "nearest is k8"),
        ("f0k1_g9", 1, "zero"),
        ("f1_g9", 2, "kernel after the frames"),
        ("f1k_g9", 3, "1, 2, 4 or 8"),
        ("fk1_g9", 1, "number of frames"),
        ("g", 1, "number of latent frames"),
        ("g99999", 1, "more than"),
        ("f1k1_g" + "9" * 5000, 6, "more than"),
        ("g9_", 2, "nothing follows"),
        ("_g9", 0, "expected"),
        ("g9__x_f1k1", 3, "expected"),
        ("x_g9", 0, "skips to nothing"),
        ("f1k1_x_x_g9", 5, "once on a side"),
        ("td_g9", 0, "far end of the history"),
        ("td_x_f1k1_g9", 0, "far end of the history"),
        ("td_td_f1k1_g9", 0, "far end of the history"),
        ("t_g9", 0, "td (dropped)"),
        ("ta_f1k1_g9_f1k1_tc", 16, "only one side"),
        ("f1k1g9", 4, "joined by _"),
        ("f1k1_g9_q", 8, "not 'q'"),
        ("f1k1_g9+D", 7, "discretised"),
        ("f1k1 _g9", 4, "joined by _"),
    ],
)
def test_refusals_point_at_the_fault(text, position, words):
    with pytest.raises(ScheduleError) as caught:
        parse_schedule(text)
    assert caught.value.position == position
    assert words in caught.value.reason


def test_the_message_shows_a_caret_under_the_fault():
    with pytest.raises(ScheduleError) as caught:
        parse_schedule("f1k3_x_g9")
    lines = str(caught.value).splitlines()
    assert lines[1][lines[2].index("^")] == "3"


def test_a_schedule_that_is_no_text_is_refused():
    with pytest.raises(ScheduleError):
        parse_schedule(None)


def test_presets_are_canonical_and_in_their_own_order():
    orders = {name: natural_order(parse_schedule(text)) for name, text in PRESETS.items()}
    assert orders == {
        "F0 inverted": "inverted",
        "F1 forward": "forward",
        "Vanilla": "forward",
        "Anti-drifting, both ends first": "both ends first",
        "Helios": "forward",
        "Wan, 81 frames": "forward",
        "Wan, 3 clean frames": "forward",
    }
    for text in PRESETS.values():
        assert parse_schedule(text).text == text


def test_the_inverted_preset_reads_as_the_paper_says():
    parsed = parse_schedule(PRESETS["F0 inverted"])
    assert parsed.anchor_before == (Group(1, 1),)
    assert parsed.skip_before
    assert parsed.history_before == ()
    assert parsed.window == 9
    assert parsed.history_after == (Group(1, 1), Group(2, 2), Group(16, 4))
    assert parsed.tail_after == "d"
    assert parsed.anchor_after == ()
    assert parsed.context_frames == 20
    assert parsed.kernels == (4, 2, 1)


def test_groups_may_be_joined_by_underscores():
    assert parse_schedule("td_f16k4_f2k2_f1k1_g9").text == PRESETS["Vanilla"]


@pytest.mark.parametrize("text", ["", "  ", "?"])
def test_the_nearest_to_nothing_is_a_published_schedule(text):
    with pytest.raises(ScheduleError, match=f"Nearest valid: {PRESETS['F1 forward']}\\."):
        parse_schedule(text)
