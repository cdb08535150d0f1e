"""Memory Recall on clips in which what returns is the same, changed, or something else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frame_memory.model.selftest import SelfTestVision
from frame_memory.video import recall
from frame_memory.video.footage import Footage, of_images
from frame_memory.video.likeness import (
    GREY,
    LikenessError,
    background_of,
    colour_likeness,
    mask_for,
    structure_likeness,
    subject_of,
)
from frame_memory.video.recall import Appearance, RecallError, compare, evenly, frames_of, parse_box

from .made import picture

FPS = 10.0
HEIGHT, WIDTH = 32, 48


def sprite(kind: int) -> np.ndarray:
    """Three things of 12x12 pixels: 0 and 1 differ in colour, 0 and 2 in shape."""
    y, x = np.mgrid[:12, :12]
    disc = ((y - 5.5) ** 2 + (x - 5.5) ** 2 < 30)[..., None]
    stripes = (x // 3 % 2 == 0)[..., None] * np.ones((12, 12, 1), bool)
    colour = np.array([(0.9, 0.2, 0.1), (0.1, 0.2, 0.9), (0.9, 0.2, 0.1)][kind])
    return np.where(stripes if kind == 2 else disc, colour, 0.95)


def clip(returns: int, place: int = 20) -> tuple[np.ndarray, torch.Tensor]:
    """6 s: a thing is there for 2 s, away for 2 s, and something returns elsewhere; (frames, masks of it)."""
    video = np.repeat(picture(4)[None], 60, axis=0)
    masks = torch.zeros(60, HEIGHT, WIDTH)
    for t in (*range(20), *range(40, 60)):
        x = t % 5 + (0 if t < 20 else place)
        video[t, 10:22, x : x + 12] = sprite(0 if t < 20 else returns)
        masks[t, 10:22, x : x + 12] = 1
    return video.astype(np.float32), masks


def found(returns: int, vision=None, mask: bool = True, **more):
    video, masks = clip(returns)
    footage = of_images(torch.from_numpy(video), FPS, "Memory Recall", lambda: None)
    areas = [{"mask_BHW": masks if mask else None}] * 2
    first, back = Appearance("first", 0, 2, **areas[0]), Appearance("return", 4, 6, **areas[1])
    return compare(footage, first, back, vision, **more)


@pytest.mark.parametrize("vision", [None, SelfTestVision()], ids=["plain", "model"])
def test_the_same_thing_is_recalled_best(vision):
    same, colour, shape = (found(kind, vision) for kind in range(3))
    assert same.similarity > 0.98 and same.similarity > max(colour.similarity, shape.similarity) + 0.02
    assert same.among == pytest.approx(1, abs=0.02)
    assert ("no model" in same.by) == (vision is None)
    assert colour.colour < 0.7 < 0.95 < same.colour and shape.structure < 0.7 < 0.95 < same.structure


@pytest.mark.parametrize("vision", [None, SelfTestVision()], ids=["plain", "model"])
def test_a_whole_scene_stands_on_a_scale_between_the_pictures_between_and_itself(vision):
    """A camera pans away to another place and back."""
    here, there = picture(1), picture(9)
    for returned, share in ((here, 1.0), (there, 0.0)):
        video = np.stack([here] * 20 + [there] * 20 + [returned] * 20).astype(np.float32)
        footage = of_images(torch.from_numpy(video), FPS, "Memory Recall", lambda: None)
        got = compare(footage, Appearance("first", 0, 2), Appearance("return", 4, 6), vision)
        assert got.share == pytest.approx(share, abs=0.02) and got.between < got.among
        assert got.describe().splitlines()[1].startswith("From 0 (forgotten) to 1 (as it was): ")


def test_boxes_look_at_their_part_only():
    video, _ = clip(0)
    video[40:, :, :18] = 0  # elsewhere everything has changed
    footage = of_images(torch.from_numpy(video), FPS, "Memory Recall", lambda: None)
    first = Appearance("first", 0, 0.1, parse_box("0,10,12,12", WIDTH, HEIGHT, "first_box"))
    back = Appearance("return", 4, 4.1, parse_box("20, 10, 12, 12", WIDTH, HEIGHT, "return_box"))
    assert compare(footage, first, back).similarity == pytest.approx(1, abs=1e-6)
    assert compare(footage, Appearance("first", 0, 0.1), Appearance("return", 4, 4.1)).similarity < 0.8


def test_the_pair_is_drawn_with_its_times():
    got = found(0)
    assert got.times[0] < 2 <= 4 <= got.times[1]
    assert got.picture_BHWC.shape[0] == 1 and got.picture_BHWC.shape[-1] == 3 and got.picture_BHWC.std() > 0.1
    assert f"{got.times[0]:.2f} s and {got.times[1]:.2f} s" in got.describe()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("40,0,20,10", "goes beyond the picture of 48x32. Its part inside is '40,0,8,10'"),
        ("-5,-5,10,10", "goes beyond the picture of 48x32. Its part inside is '0,0,5,5'"),
        ("90,90,5,6", "lies outside of the picture of 48x32. The nearest box of that size is '43,26,5,6'"),
        ("-60,0,50,10", "lies outside of the picture of 48x32. The nearest box of that size is '0,0,48,10'"),
        ("1.5,2,0,10", "a box without width; expected x,y,width,height in pixels, such as '0,0,48,32'"),
        ("1,2,4,-3", "a box without height"),
    ],
)
def test_boxes_that_are_not_in_the_picture_are_refused_with_what_fits(text, said):
    with pytest.raises(RecallError) as refused:
        parse_box(text, WIDTH, HEIGHT, "first_box")
    assert f"'first_box' of 'Memory Recall' is '{text}', " in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "1 2 3 4", "nan,0,1,1"])
def test_what_is_no_box_is_refused(text):
    with pytest.raises(RecallError, match="expected four numbers x,y,width,height in pixels"):
        parse_box(text, WIDTH, HEIGHT, "first_box")
    assert parse_box("  ", WIDTH, HEIGHT, "first_box") is None


def test_stretches_outside_the_video_and_returns_before_the_first_are_refused():
    footage = of_images(torch.zeros(60, 8, 8, 3), FPS, "Memory Recall", lambda: None)
    assert frames_of(Appearance("first", 1.0, 2.0), footage) == range(10, 20)
    assert frames_of(Appearance("first", 5.9, 99.0), footage) == range(59, 60)
    for start, stop, nearest in (
        (7.0, 8.0, "5.90 to 6.00"), (2.0, 2.0, "2.00 to 2.10"), (-1.0, 2.0, "0.00 to 2.00"), (2.0, 1.5, "1.50 to 2.00"),
    ):  # fmt: skip
        with pytest.raises(RecallError, match=f"'first_start' and 'first_stop'.*0 to 6.00 s. The nearest is {nearest}"):
            frames_of(Appearance("first", start, stop), footage)
    with pytest.raises(RecallError, match="Change 'return_start' of 'Memory Recall' to 3.00 or later"):
        compare(footage, Appearance("first", 0, 3), Appearance("return", 2, 5))


def test_one_picture_has_no_return_and_reversed_times_are_told_as_such():
    footage = of_images(torch.zeros(60, 8, 8, 3), FPS, "Memory Recall", lambda: None)
    with pytest.raises(RecallError, match="'return_start'.* are 2 and 1.5 s, so the stretch ends before it has begun"):
        compare(footage, Appearance("first", 0, 1), Appearance("return", 2, 1.5))
    one = of_images(torch.zeros(1, 8, 8, 3), FPS, "Memory Recall", lambda: None)
    with pytest.raises(RecallError, match="got one picture; .*there is no return"):
        compare(one, Appearance("first", 0, 1), Appearance("return", 2, 3))


def test_a_return_less_alike_than_the_pictures_between_is_told_in_words():
    """A thing that only moves on: it was never away, so the pictures between are the nearer ones."""
    here, near, far = picture(1), np.clip(picture(1) * 0.9, 0, 1), picture(9)
    video = torch.from_numpy(np.stack([here] * 20 + [near] * 20 + [far] * 20).astype(np.float32))
    footage = of_images(video, FPS, "Memory Recall", lambda: None)
    got = compare(footage, Appearance("first", 0, 2), Appearance("return", 4, 60))
    assert got.share < 0 and "(as it was): below 0, less alike than the pictures between." in got.describe()
    assert (
        "Warning: 'return_stop' is 60 s, and the video ends at 6.00 s; only 4 to 6.00 s is looked at" in got.describe()
    )
    assert "Warning" not in compare(footage, Appearance("first", 0, 2), Appearance("return", 4, 6)).describe()


def test_masks_one_a_stretch_one_a_frame_and_none():
    video, masks = clip(0)
    footage = of_images(torch.from_numpy(video), FPS, "Memory Recall", lambda: None)
    by_video = compare(footage, Appearance("first", 0, 2, None, masks), Appearance("return", 4, 6, None, masks))
    by_stretch = compare(
        footage, Appearance("first", 0, 2, None, masks[:20]), Appearance("return", 4, 6, None, masks[40:])
    )
    assert by_video.similarity == by_stretch.similarity
    with pytest.raises(RecallError, match="'return_mask' of 'Memory Recall' shows nothing from 4.00 to 6.00 s"):
        compare(footage, Appearance("first", 0, 2, None, masks), Appearance("return", 4, 6, None, masks * 0))
    with pytest.raises(LikenessError, match="'first_mask'.*expected 1 mask or 20 of them"):
        compare(footage, Appearance("first", 0, 2, None, masks[:7]), Appearance("return", 4, 6))
    with pytest.raises(LikenessError, match="expected 1 mask or 5"):
        mask_for(torch.ones(2, 4, 4), 0, 5, (8, 8), "mask", "Drift Meter")


def test_a_mask_on_one_side_only_is_warned_of():
    video, masks = clip(0)
    footage = of_images(torch.from_numpy(video), FPS, "Memory Recall", lambda: None)
    one = compare(footage, Appearance("first", 0, 2, None, masks), Appearance("return", 4, 6))
    assert "Warning: 'first_mask' is connected and 'return_mask' is not" in one.describe()
    assert "Warning" not in found(0).describe()


def test_of_a_long_absence_only_what_is_looked_at_is_read():
    """Half an hour between the two must not be decoded for eight pictures of it."""
    read = []
    video = torch.from_numpy(picture(1)).float()

    def between(start, stop):
        read.append(stop - start)
        yield video[None].expand(stop - start, -1, -1, -1)

    footage = Footage(18_000, FPS, WIDTH, HEIGHT, "long", between)
    got = compare(footage, Appearance("first", 0, 2), Appearance("return", 1790, 1792))
    assert got.between == pytest.approx(1) and sum(read) == 20 + 20 + 8


def test_each_picture_is_measured_once_and_cancel_is_heard_between(monkeypatch):
    seen, asked = [], []
    measure = recall.colours_of
    monkeypatch.setattr(recall, "colours_of", lambda picture: seen.append(1) or measure(picture))
    found(0, mask=False, interrupt=lambda: asked.append(len(seen)))
    assert len(seen) == 3 * 8, "eight of each stretch and of what lies between, not of every pair"
    assert set(range(24)) <= set(asked)


def test_likeness_measures_against_plain_counts():
    """Two colours that share a quarter of the area share a quarter of the histogram."""
    a, b = torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 3)
    a[:, :, :2] = 1.0
    b[:, :, :2] = 1.0
    b[:, :, 2:] = torch.tensor([1.0, 0, 0])
    assert colour_likeness(a, b) == pytest.approx(0.25) and colour_likeness(a, a) == pytest.approx(1)
    assert structure_likeness(a, a) == pytest.approx(1) and structure_likeness(a, 1 - a) == 0
    assert structure_likeness(a, a * 0.5 + 0.2) == pytest.approx(1), "light does not count"
    assert structure_likeness(a * 0, a * 0) == 1 and structure_likeness(a, a * 0) == 0
    mask = torch.zeros(8, 8)
    mask[2:6, 1:3] = 1
    subject = subject_of(b, mask)
    assert subject.shape == (1, 4, 2, 3) and torch.equal(subject, b[:, 2:6, 1:3])
    behind = background_of(b, mask)
    assert (behind[:, 2:6, 1:3] == GREY).all() and torch.equal(behind[:, 6:], b[:, 6:])
    assert subject_of(b, mask * 0.4) is None


def test_looks_are_spread_evenly():
    assert evenly(range(10, 11)) == [10] and evenly(range(5)) == [0, 1, 2, 3, 4]
    assert evenly(range(100, 200)) == [100, 114, 128, 142, 157, 171, 185, 199]


def test_cancel_is_heard():
    class Cancelled(Exception):
        pass

    def cancel():
        raise Cancelled

    with pytest.raises(Cancelled):
        found(0, interrupt=cancel)
