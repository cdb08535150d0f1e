"""The world FFGo is measured on: shots, cuts, canvases, and a measure that sees what is there and what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import ffgo_measure, shots
from benchmarks.ffgo_measure import measure, wilson
from benchmarks.shot_clips import FRAMES, any_pixels, random_clip

TIMES = np.arange(FRAMES)


def some_shot(count: int, seed: int = 0) -> shots.Shot:
    rng = np.random.default_rng(seed)
    return shots.random_shot(rng, shots.random_cast(rng, count))


def composed(shot: shots.Shot) -> np.ndarray:
    """What a perfect model makes of a canvas."""
    video = shots.render(shot, TIMES)
    video[:4] = shots.canvas(shot)
    return video


@pytest.mark.parametrize("count", range(1, 6))
def test_a_cast_differs_in_colour_and_shape_and_stays_apart_and_inside(count):
    for seed in range(20):
        shot = some_shot(count, seed)
        assert len({s.colour for s in shot.cast}) == len({s.shape for s in shot.cast}) == count
        xs, lanes = shots.centres(shot, TIMES)[..., 0], shots.centres(shot, TIMES)[..., 1]
        assert count == 1 or np.diff(lanes, axis=0).min() >= 2 * shots.RADIUS
        assert xs.min() >= shots.RADIUS and xs.max() <= shots.WIDTH - shots.RADIUS


def test_a_cut_keeps_the_cast_and_its_order_and_changes_the_picture():
    rng = np.random.default_rng(4)
    first = some_shot(3)
    second = shots.next_shot(rng, first)
    assert second.cast == first.cast and second.direction == first.direction
    video = shots.render_with_cut(first, second, 9, FRAMES)
    steps = np.abs(np.diff(video, axis=0)).mean(axis=(1, 2, 3))
    assert steps.argmax() == 8 and steps[8] > 3 * np.delete(steps, 8).max()
    np.testing.assert_array_equal(video[9:], shots.render(second, np.arange(FRAMES - 9)))


def test_captions_never_tell_the_colour_of_a_sprite():
    rng = np.random.default_rng(5)
    for _ in range(50):
        caption = random_clip(rng)[1].split()
        assert not set(caption) & set(shots.COLOURS)
        assert "ad23r2" not in caption


def test_the_training_clips_hold_no_canvas_but_the_autoencoders_do():
    """The right half of a canvas is its ground in a strip, and white above it."""

    def canvas_like(picture: np.ndarray) -> bool:
        top, middle = (picture[row, shots.WIDTH // 2 + 2 :] for row in (2, shots.HEIGHT // 2))
        return bool((top > 0.98).all() and (middle < 0.6).all())

    rng = np.random.default_rng(6)
    assert not any(canvas_like(f) for _ in range(60) for f in random_clip(rng)[0][::6])
    assert any(canvas_like(any_pixels(rng)[0]) for _ in range(60))


@pytest.mark.parametrize("count", range(1, 6))
def test_a_perfect_video_measures_as_one(count):
    shot = some_shot(count, 10 + count)
    seen = measure(composed(shot), shot)
    assert seen.activated and seen.ground
    assert seen.found == seen.right == (1.0,) * count


def test_a_video_that_keeps_its_canvas_shows_no_reference():
    shot = some_shot(3)
    seen = measure(np.repeat(shots.canvas(shot)[None], FRAMES, 0), shot)
    assert not seen.cut and seen.found == (0.0, 0.0, 0.0) and not seen.activated


def test_a_missing_a_recoloured_and_a_misshapen_reference_are_seen():
    shot = some_shot(3)
    first, second, third = shot.cast
    unused = next(c for c in shots.COLOURS if c not in {s.colour for s in shot.cast})
    missing = replace(shot, cast=shot.cast[:2], starts=shot.starts[:2])
    assert measure(shots.render(missing, TIMES), shot).found == (1.0, 1.0, 0.0)
    recoloured = replace(shot, cast=(replace(first, colour=unused), second, third))
    assert measure(shots.render(recoloured, TIMES), shot).found == (0.0, 1.0, 1.0)
    unlike = next(s for s in shots.SHAPES if s not in {s.shape for s in shot.cast})
    misshapen = replace(shot, cast=(first, replace(second, shape=unlike), third))
    seen = measure(shots.render(misshapen, TIMES), shot)
    assert seen.right[1] == 0.0 and seen.right[0] == seen.right[2] == 1.0
    other = replace(shot, ground_colour=next(g for g in ("navy", "brown") if g != shot.ground_colour))
    assert not measure(shots.render(other, TIMES), shot).ground


def test_a_video_must_show_the_references_in_most_of_the_frames():
    shot = some_shot(2)
    video = composed(shot)
    video[15:] = shots.ground(shot, TIMES[15:])
    seen = measure(video, shot)
    assert seen.cut and seen.found == (0.5, 0.5) and not seen.activated


def test_the_interval_of_a_share_is_wilsons():
    """Against the interval's definition: its ends are the shares p with |hits / n - p| = z sqrt(p (1 - p) / n)."""
    for hits, tries in ((0, 8), (3, 8), (8, 8), (50, 64)):
        for end in wilson(hits, tries):
            if 0 < end < 1:
                assert abs(hits / tries - end) == pytest.approx(1.96 * (end * (1 - end) / tries) ** 0.5)
    assert wilson(0, 8)[0] == 0 and wilson(8, 8)[1] == pytest.approx(1)
    assert ffgo_measure.wilson(0, 0) == (0.0, 1.0)
