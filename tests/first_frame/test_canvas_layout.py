"""Where pictures lie on the canvas: the published geometry by an oracle of its own, and any mixture of sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frame_memory.plan.canvas import (
    BACKGROUND,
    FREE,
    STACK,
    TWO_COLUMNS,
    Box,
    CanvasError,
    describe,
    fit,
    lay_out,
    parse_boxes,
)

SIDE = st.integers(1, 1200)
SIZES = st.tuples(SIDE, SIDE)
CANVAS = st.tuples(st.integers(4, 100), st.integers(4, 100)).map(lambda pair: (16 * pair[0], 16 * pair[1]))


@given(SIZES, st.tuples(st.integers(1, 900), st.integers(1, 900)))
@settings(max_examples=120, deadline=None)
def test_shrinking_rounds_as_pillow_does(size, room):
    width, height = size
    picture = Image.new("1", (width, height))
    picture.thumbnail(room, Image.Resampling.NEAREST, reducing_gap=None)
    assert fit(size, room, enlarge=False) == picture.size


@given(SIZES, SIZES)
def test_enlarging_fills_one_side_and_keeps_inside(size, room):
    width, height = fit(size, room, enlarge=True)
    assert 1 <= width <= room[0] and 1 <= height <= room[1]
    assert width == room[0] or height == room[1]


@given(CANVAS, st.lists(SIZES, max_size=8), st.none() | SIZES, st.sampled_from([STACK, TWO_COLUMNS]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_mixture_of_sizes_has_its_place_and_overlaps_nothing(canvas, references, background, layout, enlarge):
    if not references and background is None:
        return
    made = lay_out(*canvas, references, background, layout=layout, enlarge=enlarge)
    names = [region.name for region in made.regions]
    assert names == [BACKGROUND] * (background is not None) + [str(i + 1) for i in range(len(references))]
    seen: list[Box] = []
    for region in made.regions:
        box, cell = region.box, region.cell
        assert cell.x <= box.x and box.x + box.width <= cell.x + max(cell.width, 1) <= canvas[0] + 1
        assert cell.y <= box.y and box.y + box.height <= cell.y + max(cell.height, 1) <= canvas[1] + 1
        for other in seen:
            beside = box.x >= other.x + other.width or other.x >= box.x + box.width
            assert beside or box.y >= other.y + other.height or other.y >= box.y + box.height
        seen.append(box)
    assert not [note for note in made.notes if " covers " in note]
    assert all(region.label in describe(made) for region in made.regions)


def test_the_published_geometry_in_numbers():
    made = lay_out(1280, 720, [(100, 50), (2000, 1000), (300, 3000)], (999, 333))
    boxes = {region.name: region.box for region in made.regions}
    assert boxes[BACKGROUND] == Box(640, 180, 640, 360)  # reference ffgo.md section 2
    assert boxes["1"] == Box(270, 95, 100, 50)
    assert boxes["2"] == Box(80, 240, 480, 240)
    assert boxes["3"] == Box(308, 480, 24, 240)


def test_at_another_size_the_same_rules_hold():
    made = lay_out(832, 480, [(1000, 1000)], (1280, 720))
    boxes = {region.name: region.box for region in made.regions}
    assert boxes[BACKGROUND] == Box(416, 123, 416, 234)
    assert boxes["1"] == Box(0, 32, 416, 416)


def test_the_aspect_of_the_background_can_be_kept():
    made = lay_out(1280, 720, [], (1500, 1000), keep_background_aspect=True)
    assert made.regions[0].box == Box(640, 146, 640, 427)  # as the published 3:2 canvases have it


def test_two_columns_of_five_are_two_two_one():
    made = lay_out(1280, 720, [(500, 500)] * 5, (1280, 720), layout=TWO_COLUMNS)
    cells = [region.cell for region in made.regions[1:]]
    assert cells == [Box(0, 0, 320, 240), Box(320, 0, 320, 240), Box(0, 240, 320, 240), Box(320, 240, 320, 240),
                     Box(0, 480, 640, 240)]  # fmt: skip


def test_without_a_background_the_references_have_the_whole_canvas():
    made = lay_out(1280, 720, [(4000, 1000)])
    assert made.regions[0].box == Box(0, 200, 1280, 320)


def test_fault_31_ten_references_are_all_there_and_warned_of():
    made = lay_out(1280, 720, [(100 * i + 50, 400) for i in range(10)], (640, 360))
    assert len(made.regions) == 11
    assert any("10 references" in note and "up to 4" in note for note in made.notes)
    assert any("reference 3 is only" in note for note in made.notes)


BOXES = st.dictionaries(
    st.sampled_from([BACKGROUND, *map(str, range(1, 9))]),
    st.builds(Box, st.integers(-500, 1279), st.integers(-500, 719), st.integers(501, 2000), st.integers(501, 2000)),
    max_size=9,
)


@given(BOXES)
@settings(max_examples=100, deadline=None)
def test_boxes_are_read_as_they_were_written(boxes):
    text = "\n".join(f"{name}: {box}" for name, box in boxes.items())
    assert list(parse_boxes(text).items()) == list(boxes.items())


@given(BOXES.filter(bool))
@settings(max_examples=60, deadline=None)
def test_free_boxes_of_the_aspect_stay_to_the_pixel_and_lie_in_the_written_order(boxes):
    count = max((int(name) for name in boxes if name != BACKGROUND), default=0)
    usual = Box(0, 0, 700, 700)
    chosen = [boxes.get(str(i), usual) for i in range(1, count + 1)]
    sizes = [(box.width, box.height) for box in chosen]
    background = (640, 360) if BACKGROUND in boxes else None
    text = "\n".join(f"{name}: {box}" for name, box in boxes.items())
    made = lay_out(1280, 720, sizes, background, layout=FREE, boxes=text)
    chosen = {region.name: region.box for region in made.regions if region.name in boxes}
    assert list(chosen.items()) == list(boxes.items())
    again = lay_out(
        1280, 720, sizes, background, layout=FREE, boxes="\n".join(f"{r.name}: {r.box}" for r in made.regions)
    )
    assert {r.name: r.box for r in again.regions} == {r.name: r.box for r in made.regions}


def test_what_has_no_box_keeps_its_place_and_is_named():
    usual = lay_out(1280, 720, [(400, 400)] * 3, (640, 360))
    made = lay_out(1280, 720, [(400, 400)] * 3, (640, 360), layout=FREE, boxes="2: 0, 0, 300 x 300\n7: 1,1,10x10")
    assert {r.name: r.box for r in made.regions}["1"] == usual.regions[1].box
    assert made.regions[-1].name == "2"
    assert any("reference 1 has no box" in note for note in made.notes)
    assert any("boxes for 7" in note for note in made.notes)


@pytest.mark.parametrize("layout", ["background: 0,0,832x480", "background: 0,0,832x480\n2: 9,9,99x99"])
def test_a_background_whose_box_comes_first_covers_nobody(layout):
    made = lay_out(832, 480, [(400, 400)] * 2, (1280, 720), layout=FREE, boxes=layout)
    assert [region.name for region in made.regions] == [BACKGROUND, "1", "2"]
    assert not any("background covers" in note for note in made.notes)


def test_a_background_after_another_box_covers_it_and_is_told():
    made = lay_out(832, 480, [(9, 9)], (16, 9), layout=FREE, boxes="1: 0,0,400x400\nbackground: 0,0,832x480")
    assert [region.name for region in made.regions] == ["1", BACKGROUND]
    assert "background covers 100% of reference 1." in made.notes


def test_boxes_that_are_not_used_are_told():
    made = lay_out(832, 480, [(400, 400)], boxes="1: 0,0,300x300")
    assert any("'boxes' is not used, because layout is 'official stack'" in note for note in made.notes)
    assert not any("boxes" in note for note in lay_out(832, 480, [(400, 400)], boxes="# 1: 0,0,300x300\n").notes)


def test_boxes_drawn_for_a_smaller_canvas_are_told():
    boxes = "background: 416,123,416x234\n1: 0,32,416x416"
    large, small = (
        lay_out(*size, [(400, 400)], (16, 9), layout=FREE, boxes=boxes).notes for size in ((1280, 720), (832, 480))
    )
    assert "All boxes lie within 832x448 of the canvas of 1280x720" in large[0] and not small


def test_a_squeezed_background_is_told():
    squeezed = lay_out(832, 480, [(400, 400)], (600, 1400)).notes
    assert any("600x1400 is squeezed to 416x234" in note and "keep_background_aspect" in note for note in squeezed)
    assert not lay_out(832, 480, [(400, 400)], (1500, 1000)).notes
    kept = lay_out(832, 480, [(400, 400)], (600, 1400), keep_background_aspect=True)
    assert not any("squeezed" in note for note in kept.notes)


@pytest.mark.parametrize(
    ("sizes", "more", "words"),
    [
        ([(24, 18)], {}, "enlarge_small"),
        ([(4000, 300)], {}, "a wider box"),
        ([(900, 900)] * 7, {}, "'two columns'"),
        ([(900, 900)] * 14, {"layout": TWO_COLUMNS}, "fewer references"),
        ([(300, 300)], {"layout": FREE, "boxes": "1: 0,0,400x100"}, "Make its box larger"),
        ([(900, 90)], {"layout": FREE, "boxes": "1: 0,0,400x400"}, "Make its box wider"),
        ([(300, 300)], {"layout": FREE, "boxes": "1: -250,0,300x300"}, "onto the canvas"),
    ],
)
def test_what_is_too_small_has_a_remedy_that_helps_and_is_told_once(sizes, more, words):
    small = [note for note in lay_out(1280, 720, sizes, (1280, 720), **more).notes if "is only" in note]
    assert len(small) == 1 and words in small[0]
    assert small[0].count("is only") == len(sizes) and small[0].count("details will be lost") == 1


def test_notes_come_before_the_places():
    made = describe(lay_out(832, 480, [(20, 20)]))
    assert made.index("Note: reference 1 is only") < made.index("Canvas 832x480") < made.index("reference 1: ")


def test_what_is_covered_or_cut_off_is_said():
    made = lay_out(1280, 720, [(300, 300)] * 2, layout=FREE, boxes="1: 0,0,300x300\n2: 150,0,300x300\n")
    assert "reference 2 covers 50% of reference 1." in made.notes
    made = lay_out(1280, 720, [(300, 300)], layout=FREE, boxes="1: -100,0,300x300")
    assert any("cut off by the edge" in note for note in made.notes)


@pytest.mark.parametrize(
    ("boxes", "words", "line"),
    [
        ("1: 0,0,10", "'1: 0,0,10'", 1),
        ("\n# a note\nfoo: 1,2,3x4", "'foo: 1,2,3x4'", 3),
        ("1: 0,0,9x9\nreference 1: 0,0,9x9", "has a box already", 2),
        ("reference_1: 0,0,9x9\n1: 0,0,9x9", "has a box already", 2),
        ("0: 0,0,9x9", "count from 1", 1),
        ("1: 0,0,0x9", "sides of 1", 1),
        ("1: 2000,0,300x300", "outside the canvas of 1280x720. Nearest inside: 980, 0, 300 x 300", 0),
    ],
)
def test_boxes_that_cannot_be_are_refused_with_their_line(boxes, words, line):
    with pytest.raises(CanvasError) as error:
        lay_out(1280, 720, [(300, 300)], layout=FREE, boxes=boxes)
    assert words in str(error.value) and "First Frame Composer" in str(error.value)
    assert error.value.line == line


@pytest.mark.parametrize(
    ("size", "nearest"), [((1281, 720), "1280x720"), ((0, 20), "64x64"), ((9000, 720), "8192x720")]
)
def test_fault_23_a_canvas_off_the_grid_names_the_nearest(size, nearest):
    with pytest.raises(CanvasError, match=nearest):
        lay_out(*size, [(10, 10)])


def test_fault_28_nothing_to_place_and_an_unknown_layout():
    with pytest.raises(CanvasError, match="at least one reference or a background"):
        lay_out(1280, 720, [])
    with pytest.raises(CanvasError, match="official stack, two columns, free boxes"):
        lay_out(1280, 720, [(1, 1)], layout="spiral")
