"""Tokens, positions, chunks and budget of frame preservation, against the paper's figures and a walk over blocks."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frame_memory.plan import BUCKETS, PlanError
from frame_memory.plan.preservation import (
    RATES,
    THIN,
    Budget,
    chunks,
    full_tokens_a_second,
    kept,
    kept_spans,
    latent_frames,
    low_size,
    nominal_tokens_a_second,
    parse_rate,
    token_bytes,
    token_count,
    token_grid,
    tokens_a_second,
    waiting_frames,
)

RATE = st.sampled_from(list(RATES.values()))
SIDE = st.integers(8, 130)
ENDS = st.lists(st.integers(0, 40), max_size=8).map(lambda steps: [sum(steps[: i + 1]) for i in range(len(steps))])


def whole_blocks(rate, frames, height, width):
    """(first frame, first row, first column) of every block that fits, by stepping over the volume."""
    deep, tall, wide = rate.time, 2 * rate.height, 2 * rate.width
    found, t = [], 0
    while t + deep <= frames:
        y = 0
        while y + tall <= height:
            x = 0
            while x + wide <= width:
                found.append((t, y, x))
                x += wide
            y += tall
        t += deep
    return found


# pfp reference 2.1: HunyuanVideo, 480x832, 20 s at 24 fps.
def test_the_papers_twenty_seconds_on_hunyuanvideo():
    rate = parse_rate("4x4x2")
    frames = latent_frames(20, 24)
    assert frames == 120
    assert token_grid(rate, 0, frames, 60, 104).shape == (60, 7, 13)
    assert token_count(rate, frames, 60, 104) == 5460
    assert low_size(rate, frames, 60, 104) == (60, 15, 26)
    assert token_bytes(5460, 3072) == 33_546_240
    assert token_bytes(5460, 3072, features=512) == 39_137_280


# pfp reference 2.2: Wan 2.1, 480x832, 16 fps. The paper's figure for a second; ours with whole blocks; for 20 s.
WAN = [
    ("2x2x1", 1560, 1560, 31200),
    ("2x2x2", 780, 780, 15600),
    ("2x2x4", 390, 390, 7800),
    ("4x4x2", 195, 182, 3640),
    ("2x2x8", 195, 195, 3900),
]


@pytest.mark.parametrize(("name", "nominal", "counted", "twenty"), WAN)
def test_the_papers_table_for_wan(name, nominal, counted, twenty):
    rate = parse_rate(name)
    assert nominal_tokens_a_second(rate, 60, 104, 16) == nominal == Fraction(6240, rate.factor)
    assert tokens_a_second(rate, 60, 104, 16) == counted
    assert token_count(rate, latent_frames(20, 16), 60, 104) == twenty


def test_the_rest_of_the_papers_table():
    assert full_tokens_a_second(60, 104, 16) == 6240
    both = [RATES["4x4x2"], RATES["2x2x8"]]
    assert sum(nominal_tokens_a_second(rate, 60, 104, 16) for rate in both) == 390
    assert full_tokens_a_second(60, 104, 24) * 60 == 561_600


def test_a_part_of_a_latent_frame_does_not_count():
    assert latent_frames(Fraction(1, 10), 24) == 0
    assert latent_frames(1.2, 30) == 9 and latent_frames(1.19, 30) == 8
    assert latent_frames(20, 23.976) == latent_frames(20, Fraction(24000, 1001)) == 119


@given(RATE, st.integers(0, 20), SIDE, SIDE)
def test_tokens_are_the_blocks_that_fit_and_stand_at_their_middle(rate, frames, height, width):
    blocks = whole_blocks(rate, frames, height, width)
    grid = token_grid(rate, 0, frames, height, width)
    assert grid.tokens == len(blocks) == token_count(rate, frames, height, width)
    expected = []
    for t, y, x in blocks:
        middle = (t + rate.time / 2, (y + rate.height) / 2, (x + rate.width) / 2)
        expected.append(tuple(int(m) for m in middle))
    assert grid.positions() == expected


@given(RATE, st.integers(0, 60), SIDE, SIDE)
def test_positions_rise_and_stay_inside_the_video(rate, frames, height, width):
    grid = token_grid(rate, 0, frames, height, width)
    for line, size in zip((grid.times, grid.rows, grid.columns), (frames, height // 2, width // 2)):
        assert all(a < b for a, b in zip(line, line[1:]))
        assert all(0 <= place < size for place in line)
    assert grid.positions() == sorted(grid.positions())


@given(RATE, st.integers(0, 40), SIDE, SIDE)
def test_both_branches_have_the_same_grid(rate, frames, height, width):
    low = low_size(rate, frames, height, width)
    assert (low[0], low[1] // 2, low[2] // 2) == token_grid(rate, 0, frames, height, width).shape


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("name", RATES)
def test_of_every_bucket_less_than_a_block_is_left_over(name, bucket):
    _, tall, wide = RATES[name].block
    height, width = bucket[0] // 8, bucket[1] // 8
    _, rows, columns = token_grid(RATES[name], 0, 8, height, width).shape
    assert 0 <= height - rows * tall < tall and 0 <= width - columns * wide < wide


@given(RATE, ENDS, SIDE, SIDE)
def test_chunks_join_to_the_whole_history(rate, ends, height, width):
    spans = chunks(ends, rate)
    frames = ends[-1] if ends else 0
    assert all(stop == start for (_, stop), (start, _) in zip(spans, spans[1:]))
    covered = spans[-1][1] if spans else 0
    assert covered + waiting_frames(frames, rate) == frames
    assert all(start % rate.time == stop % rate.time == 0 and start < stop for start, stop in spans)
    pieces = [token_grid(rate, start, stop, height, width) for start, stop in spans]
    whole = token_grid(rate, 0, frames, height, width)
    assert sum((piece.times for piece in pieces), ()) == whole.times
    assert sum(piece.tokens for piece in pieces) == whole.tokens


@given(st.lists(RATE, min_size=1, max_size=2), ENDS)
def test_a_longer_video_only_adds_chunks(rates, ends):
    every = chunks(ends, *rates)
    for count in range(len(ends)):
        some = chunks(ends[:count], *rates)
        assert every[: len(some)] == some
    for start, stop in every:
        assert all(start % rate.time == stop % rate.time == 0 for rate in rates)


def test_sections_of_nine_frames_after_an_image():
    ends = [1, 10, 19, 28]
    assert chunks(ends, RATES["4x4x2"]) == ((0, 10), (10, 18), (18, 28))
    assert [waiting_frames(end, RATES["4x4x2"]) for end in ends] == [1, 0, 1, 0]
    assert chunks(ends, RATES["4x4x2"], RATES["2x2x8"]) == ((0, 8), (8, 16), (16, 24))
    assert waiting_frames(28, RATES["2x2x8"]) == 4
    assert chunks([], RATES["4x4x2"]) == ()


def test_all_is_kept_up_to_the_budget():
    lengths = [8] * 5
    enough = token_count(RATES["4x4x2"], 40, 60, 104)
    assert kept(lengths, Budget(enough), 60, 104) == ("4x4x2",) * 5
    assert kept(lengths, Budget(enough - 1), 60, 104) == (None, *("4x4x2",) * 4)


def test_thinning_comes_before_dropping_and_spares_the_recent():
    # At 60x104 a chunk of 8 frames is 1560 tokens at 2x2x2 and 390 at 2x2x8.
    lengths = [8] * 4
    thin = {
        tokens: kept(lengths, Budget(tokens, "2x2x2", "thin"), 60, 104) for tokens in (6240, 5070, 2730, 2340, 1560)
    }
    fine = "2x2x2"
    assert thin[6240] == (fine,) * 4
    assert thin[5070] == (THIN, fine, fine, fine)
    assert thin[2730] == (THIN, THIN, THIN, fine)
    assert thin[2340] == (None, THIN, THIN, fine)
    assert thin[1560] == (None, None, None, fine)
    assert kept_spans(lengths, Budget(2340, fine, "thin"), 60, 104) == ((8, 16, THIN), (16, 24, THIN), (24, 32, fine))


BUDGET = st.builds(
    lambda tokens, rate, past, recent: Budget(tokens, rate, past if RATES[rate].factor < 32 else "drop", recent),
    st.integers(300, 4000), st.sampled_from(list(RATES)), st.sampled_from(["drop", "thin"]), st.integers(1, 2),
)  # fmt: skip


def choices(count, budget, gone):
    """What may become of so many chunks, of which so many are dropped already, the best first, written out."""
    old, fine = max(count - budget.recent, 0), budget.rate
    if budget.past == "thin":
        yield from ([None] * gone + [THIN] * thin + [fine] * (count - gone - thin) for thin in range(old - gone + 1))
        yield from ([None] * drop + [THIN] * (old - drop) + [fine] * (count - old) for drop in range(gone + 1, old + 1))
    else:
        yield from ([None] * drop + [budget.rate] * (count - drop) for drop in range(old + 1))


@settings(max_examples=40)
@given(BUDGET, st.lists(st.integers(1, 3), max_size=8))
@example(Budget(300, "2x2x2", "thin"), [1, 3, 1, 1])
def test_of_all_choices_the_best_that_fits_and_a_chunk_never_gets_better(budget, blocks):
    lengths, better = [8 * n for n in blocks], [None, THIN, budget.rate]
    before: tuple = ()
    for count in range(len(lengths) + 1):
        written = choices(count, budget, before.count(None))
        worse = (c for c in written if all(better.index(a) >= better.index(b) for a, b in zip(before, c)))
        fitting = [c for c in worse if spent(lengths, c) <= budget.tokens]
        if not fitting:
            with pytest.raises(PlanError, match="newest frames.*Nearest valid") as refused:
                kept(lengths, budget, 17, 24)
            enough = int(str(refused.value).split("Nearest valid: ")[1].split(".")[0])
            assert kept(lengths, replace(budget, tokens=enough), 17, 24)
            with pytest.raises(PlanError, match=f"Nearest valid: {enough}"):
                kept(lengths, replace(budget, tokens=enough - 1), 17, 24)
            return
        before = kept(lengths[:count], budget, 17, 24)
        assert list(before) == fitting[0]


def test_a_chunk_that_a_long_one_pushed_out_does_not_return():
    budget, fine = Budget(300, "2x2x2", "thin"), "2x2x2"
    assert kept([8, 24], budget, 17, 24) == (None, fine)
    assert kept([8, 24, 8], budget, 17, 24) == (None, THIN, fine)


def spent(lengths, names):
    return sum(len(whole_blocks(RATES[name], n, 17, 24)) for n, name in zip(lengths, names) if name)


WRONG = [
    (lambda: parse_rate("4x4x3"), "Nearest valid: 4x4x2"),
    (lambda: parse_rate("2x2x16"), "Nearest valid: 2x2x8"),
    (lambda: parse_rate("0x0x0"), "Nearest valid: 4x4x2"),
    (lambda: parse_rate("coarse"), "one of 2x2x1, 2x2x2"),
    (lambda: parse_rate(None), "rate None"),
    (lambda: token_grid(RATES["4x4x2"], 0, 8, 7, 104), "at least 8x8 .64x64 pixels.. Nearest valid: 8x104"),
    (lambda: token_grid(RATES["4x4x2"], 3, 8, 60, 104), "Nearest valid: 2 or 4"),
    (lambda: token_grid(RATES["4x4x2"], 4, 2, 60, 104), "frames 4 to 2"),
    (lambda: token_grid(RATES["4x4x2"], -2, 2, 60, 104), "frames -2 to 2"),
    (lambda: chunks([9, 4], RATES["4x4x2"]), "ends at frame 4 after one at 9"),
    (lambda: Budget(0), "tokens 0"),
    (lambda: Budget(100, recent=0), "recent 0"),
    (lambda: Budget(True), "tokens True"),
    (lambda: Budget(100, "3x3x3"), "rate '3x3x3'"),
    (lambda: Budget(100, past="forget"), "one of drop, thin"),
    (lambda: Budget(100, "4x4x2", "thin"), "Nearest valid: drop"),
    (lambda: kept([7], Budget(9999), 60, 104), "a chunk of 7 latent frames.*multiple of 2"),
    (lambda: kept([12], Budget(9999, "2x2x4", "thin"), 60, 104), "multiple of 8"),
    (lambda: kept([8, 8], Budget(363), 60, 104), "Nearest valid: 364"),
]


@pytest.mark.parametrize(("made", "said"), WRONG)
def test_what_cannot_be_planned_is_refused(made, said):
    with pytest.raises(PlanError, match=said) as caught:
        made()
    assert str(caught.value).endswith('Change it in the node "Frame Preservation Encoder".')
