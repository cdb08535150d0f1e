"""Section plans against the published loops, re-stated here with labels in place of latents.

Source: framepack reference 3.1 and 3.2. Each latent is a label; the history is concatenated and sliced as published,
and only at the end, when the whole video lies in order, do labels become frame numbers.
"""

import pytest

from frame_memory.plan import BLANK, END, PRESETS, START, plan_sections, section_count

COUNTS = range(1, 61)


def split(line, sizes):
    parts, at = [], 0
    for size in sizes:
        parts.append(line[at : at + size])
        at += size
    assert at == len(line)
    return parts


def f0_loop(n, *, end=False):
    """The published F0 loop: (window positions, {group name: (positions, labels)}, padding) per pass, and the video."""
    history = ["zero"] * 19
    generated, passes = 0, []
    paddings = list(reversed(range(n)))
    if n > 4:
        paddings = [3] + [2] * (n - 3) + [1, 0]
    for k, padding in enumerate(paddings):
        line = list(range(1 + padding * 9 + 9 + 1 + 2 + 16))
        start, _, window, one, two, four = split(line, [1, padding * 9, 9, 1, 2, 16])
        clean, clean2, clean4 = history[:1], history[1:3], history[3:19]
        if end and k == 0:
            clean = ["end"]
        groups = {"start": (start, ["start"]), 1: (one, clean), 2: (two, clean2), 4: (four, clean4)}
        passes.append((window, groups, padding * 9, k))
        made = [(k, j) for j in range(9)]
        if padding == 0:
            made = ["start", *made]
        history = made + history
        generated += len(made)
    return passes, history[:generated]


def f1_loop(n):
    """The published F1 loop, as f0_loop."""
    history = ["zero"] * 19 + ["start"]
    generated, passes = 1, []
    for k in range(n):
        start, four, two, one, window = split(list(range(1 + 16 + 2 + 1 + 9)), [1, 16, 2, 1, 9])
        clean4, clean2, clean = split(history[-19:], [16, 2, 1])
        groups = {"start": (start, ["start"]), 1: (one, clean), 2: (two, clean2), 4: (four, clean4)}
        passes.append((window, groups, 0, k))
        made = [(k, j) for j in range(9)]
        history += made
        generated += 9
    return passes, history[-generated:]


def compare(plan, passes, video):
    number = {label: frame for frame, label in enumerate(video)}
    number |= {"zero": BLANK, "end": END}
    assert plan.total_frames == len(video)
    assert plan.pixel_frames == 36 * len(passes) + 1
    assert len(plan.sections) == len(passes)
    for section, (window, groups, padding, k) in zip(plan.sections, passes):
        assert section.index == k
        assert section.padding == padding
        assert list(section.positions) == window
        assert [number[k, j] for j in range(9)] == list(range(section.start, section.stop))
        # The model's order: 4x, 2x, then 1x with the start first or last by its position (the reference puts it first).
        order = [4, 2, *sorted(("start", 1), key=lambda name: groups[name][0])]
        assert len(section.groups) == 4
        for got, name in zip(section.groups, order):
            positions, labels = groups[name]
            frames = [START] if name == "start" else [number[label] for label in labels]
            assert got.kernel == (1 if name == "start" else name)
            assert list(got.positions) == positions
            assert list(got.frames) == frames
        assert section.tail is None


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("n", COUNTS)
def test_f0_plan_is_the_published_loop(n, end):
    passes, video = f0_loop(n, end=end)
    compare(plan_sections(PRESETS["F0 inverted"], sections=n, has_end=end), passes, video)


@pytest.mark.parametrize("n", COUNTS)
def test_f1_plan_is_the_published_loop(n):
    passes, video = f1_loop(n)
    compare(plan_sections(PRESETS["F1 forward"], sections=n), passes, video)


@pytest.mark.parametrize("n", COUNTS)
def test_vanilla_is_f1_without_the_pinned_start(n):
    vanilla = plan_sections(PRESETS["Vanilla"], sections=n).sections
    for section, (window, groups, _, _) in zip(vanilla, f1_loop(n)[0]):
        assert [p - window[0] for p in window] == [p - section.positions[0] for p in section.positions]
        for group in section.groups:
            assert [p - section.positions[0] for p in group.positions] == [p - 20 for p in groups[group.kernel][0]]


def test_the_highest_f0_position_is_55():
    plan = plan_sections(PRESETS["F0 inverted"], sections=60)
    assert max(max(group.positions) for section in plan.sections for group in section.groups) == 55


@pytest.mark.parametrize(
    ("seconds", "count", "frames"), [(5, 4, 145), (60, 50, 1801), (0.1, 1, 37), (1.2, 1, 37), (1.8, 2, 73), (3, 2, 73)]
)
def test_section_counts_of_the_reference(seconds, count, frames):
    # 1.8 s = 1.5 sections and 3 s = 2.5 sections both round to the even 2.
    assert section_count(seconds) == count
    assert plan_sections(PRESETS["F1 forward"], sections=count).pixel_frames == frames
