"""The instrument that judges the self-test models, on videos whose truth is known."""

import dataclasses

import numpy as np
import pytest

from benchmarks.measure import measure
from benchmarks.world import SHAPES, SIZE, SPRITE_COLOURS, random_scene, render, tidied

FRAMES = np.arange(60)


def scenes(count: int = 8):
    rng = np.random.default_rng(3)
    return [random_scene(rng, tidy=True) for _ in range(count)]


@pytest.mark.parametrize("scene", scenes(), ids=lambda s: s.caption)
def test_the_truth_measures_as_true(scene):
    means = measure(render(scene, FRAMES), scene).means(slice(None))
    assert means["found"] == means["colour"] == means["shape"] == 1
    assert means["overlap"] > 0.93 and means["distance"] < 0.5 and means["across"] < 0.5
    assert 0.8 < means["pace"] <= 1.05  # below 1 around a turn
    assert means["background"] > 50 and means["colour_error"] < 0.01


def test_each_fault_shows_in_its_own_measure():
    scene = dataclasses.replace(scenes(1)[0], direction="right", speed="slowly", x=13.0, y=29.0)

    def shown(**changes):
        return measure(render(dataclasses.replace(scene, **changes), FRAMES), scene).means(slice(None))

    other_colour = next(c for c in SPRITE_COLOURS if c != scene.colour)
    assert shown(colour=other_colour)["colour"] == 0
    assert all(shown(shape=s)["shape"] == 0 for s in SHAPES if s != scene.shape)
    late = shown(x=21.0)
    assert late["distance"] == pytest.approx(8, abs=0.5) and late["across"] < 0.5
    assert shown(y=37.0)["across"] == pytest.approx(8, abs=0.5)
    assert shown(speed="quickly")["pace"] == pytest.approx(2, abs=0.3)
    ground = next(g for g in ("teal", "brown") if g != scene.ground_colour)
    assert shown(ground_colour=ground)["background"] < 30
    empty = np.full((10, SIZE, SIZE, 3), render(scene, FRAMES)[0, -1, -1])
    assert measure(empty, scene).means(slice(None))["found"] == 0


def test_a_tidied_scene_stays_in_the_picture_on_its_grid():
    for scene in scenes(40):
        assert tidied(scene) == scene
        video = render(scene, np.arange(0, 300, 20))
        assert measure(video, scene).found.all()
