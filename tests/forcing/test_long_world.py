"""Long videos whose visitor leaves and comes back, and the instrument that says whether the same one did."""

import dataclasses

import numpy as np
import pytest

from benchmarks.long_measure import DRIFT_SHARE, drift, measure_long
from benchmarks.long_world import CAMERA, LongScene, away, centres, random_long_scene, render, visit, wholly_there
from benchmarks.world import SPRITE_COLOURS
from frame_memory.plan import PRESETS, plan_sections

PERIOD = 240  # frames: 8 s at 30 frames a second


def scenes(count, seed=3, **options):
    rng = np.random.default_rng(seed)
    return [random_long_scene(rng, **options) for _ in range(count)]


def test_the_visitor_walks_a_pixel_a_frame_and_turns_40_inside_and_80_outside():
    for scene in (LongScene(), LongScene(side="right"), LongScene(side="bottom"), LongScene(shown=True)):
        place, step = (40 if scene.shown else -16), (-1 if scene.shown else 1)
        axis, mirrored = (0 if scene.side in ("left", "right") else 1), scene.side in ("right", "bottom")
        for frame, centre in enumerate(centres(scene, np.arange(700))):
            assert centre[axis] == (64 - place if mirrored else place) and centre[1 - axis] == scene.across, frame
            step = -1 if place == 40 else 1 if place == -80 else step
            place += step


@pytest.mark.parametrize("scene", scenes(6), ids=lambda s: s.caption)
def test_truth_says_what_the_picture_shows(scene):
    """Pixels of the visitor's colour, counted: none while it is away, all of them while it is wholly there."""
    frames = np.arange(0, 480, 3)
    video = render(scene, frames)
    colour = np.array(SPRITE_COLOURS[scene.colour], dtype=np.float32)
    count = (np.abs(video - colour).max(-1) < 0.02).sum(axis=(1, 2))
    assert (count[away(scene, frames)] == 0).all()
    whole = count[wholly_there(scene, frames)]
    assert len(whole) and whole.min() > 0.95 * whole.max() and whole.max() == count.max()


def test_framepack_sees_nothing_of_the_visitor_when_it_is_due_back():
    """In F1's own plan: every section in which it comes back has no frame of it in its context, the image apart."""
    sections = plan_sections(PRESETS["F1 forward"], sections=50).sections
    for scene in scenes(8, shown=False, named=False):
        gone = away(scene, np.arange(4 * sections[-1].stop))

        def latent_gone(i, gone=gone):
            return gone[0] if i == 0 else bool(gone[4 * i - 3 : 4 * i + 1].all())

        returns = 0
        for section in sections:
            made = [latent_gone(i) for i in range(section.start, section.stop)]
            back = [i for i in range(1, len(made)) if made[i - 1] and not made[i]]
            if not back or visit(scene, np.array([4 * (section.start + back[0])]))[0] == 0:
                continue
            returns += 1
            shown = [i for group in section.groups for i in group.frames if i > 0]
            assert shown and all(latent_gone(i) for i in shown)
        assert returns >= 5
        assert gone[0] and scene.colour not in scene.caption and scene.shape not in scene.caption


def test_a_scene_repeats_every_eight_seconds_and_the_camera_carries_the_ground_with_it_into_the_night():
    for scene in (LongScene(), LongScene(how=CAMERA, side="right", ground="stripes"), *scenes(4)):
        first = render(scene, np.arange(0, PERIOD, 7))
        assert np.array_equal(first, render(scene, np.arange(0, PERIOD, 7) + 5 * PERIOD))
    frames = np.arange(130, 150)  # all ground: the visitor is out of sight, and night is falling since frame 56
    light = 1 - 0.75 * (frames - 56) / 120
    video = render(LongScene(how=CAMERA), frames) / light[:, None, None, None]
    assert np.abs(video[1:, :, :-1] - video[:-1, :, 1:]).max() < 1e-5 and np.abs(video[1:] - video[:-1]).max() > 0.01
    still = render(LongScene(), frames) / light[:, None, None, None]
    assert np.abs(still[0] - still[-1]).max() < 1e-5
    with pytest.raises(ValueError, match="not to the top"):
        LongScene(how=CAMERA, side="top")


@pytest.fixture(scope="module", params=[False, True], ids=["walks", "camera"])
def scene(request):
    return LongScene(how=CAMERA, side="right") if request.param else LongScene(side="top", across=29.0)


def test_the_truth_measures_as_true(scene):
    row = measure_long(render(scene, np.arange(300)), scene).row(backwards=False)
    assert row["recall"] == row["identity"] == row["presence"] == 1
    assert row["distance"] < 1.5 and row["background"] > 60 and row["motion"] == pytest.approx(1)
    assert row["drift of identity"] == row["drift of presence"] == 0


def test_each_fault_shows_in_its_own_measure(scene):
    frames = np.arange(300)
    truth = render(scene, frames)

    def shown(video):
        return measure_long(video, scene)

    back = 150  # the visitor is out of sight from 112 to 241
    for change in ({"colour": "blue"}, {"shape": "square"}):
        other = np.concatenate([truth[:back], render(dataclasses.replace(scene, **change), frames[back:])])
        assert shown(other).colour_recall == (shown(other).recall if "colour" in change else 1)
        assert shown(other).recall < 0.4 < 0.95 < shown(other).presence[~np.isnan(shown(other).presence)].mean()
    empty = np.concatenate([truth[:back], np.repeat(truth[back:back + 1], 150, axis=0)])  # fmt: skip
    assert shown(empty).recall == 0 and np.nanmean(shown(empty).presence[back:]) < 0.9
    early = np.concatenate([truth[:150], truth[210:], truth[:60]])
    row = shown(early).row(backwards=False)
    assert row["presence"] < 0.9 and np.isnan(shown(truth[:100]).recall)
    frozen = np.repeat(truth[50:51], 300, axis=0)
    row = shown(frozen).row(backwards=False)
    assert row["motion"] == 0 and row["distance"] > 5 and row["presence"] < 0.6
    dark = truth.copy()
    dark[200:] *= np.linspace(1, 0.8, 100, dtype=np.float32)[:, None, None, None]
    row = shown(dark).row(backwards=False)
    assert row["background"] < 70 and row["drift of background"] > 10


def test_only_what_is_made_behind_given_frames_is_judged_and_the_given_visitor_is_the_right_one(scene):
    frames = np.arange(330)
    truth = render(scene, frames)
    right = measure_long(truth, scene, 109).row(False)
    assert right["recall"] == right["identity"] == 1 and right["drift of identity"] == 0
    other = np.concatenate([truth[:109], render(dataclasses.replace(scene, colour="blue"), frames[109:])])
    wrong = measure_long(other, scene, 109).row(False)
    assert wrong["recall"] == wrong["identity"] == 0 and wrong["presence"] == wrong["drift of identity"] == 1
    bad = truth.copy()
    bad[60:109] = 0
    assert measure_long(bad, scene, 109).row(False)["background"] == right["background"]


def test_drift_compares_the_ends_in_the_order_of_their_making():
    values = np.arange(100.0)
    assert DRIFT_SHARE == 0.15 and drift(values, False) == pytest.approx(92 - 7) == drift(values, True)
    values[:20] = np.nan
    assert np.isnan(drift(values, False))
