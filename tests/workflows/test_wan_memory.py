"""Packed history on the tiny Wan that ships: both sprites are there to the end, and without what was trained they are
not.
"""

from __future__ import annotations

import copy

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks import ffgo_measure, shots, wan_memory
from benchmarks.ship_selftest import PAIR
from scripts import demo, workflow

from .tiny import REPO, during, one, progress_texts, saver

GRAPH = REPO / "workflows" / "wan_memory.json"
SAMPLER, LORA, CONTEXT = "FrameMemoryAntiDriftSampler", "FrameMemoryLoraLoader", "FrameMemoryWanFrameContext"
SECTIONS, FPS = 3, 16
FRAMES = 36 * SECTIONS + 1


@pytest.fixture(scope="module")
def prompt(server, api):
    made = workflow.set_inputs(api(GRAPH), SAMPLER, {"seconds": SECTIONS * 36 / FPS})
    demo.upload_pictures(server, made)
    return made


def frames_of(server, prompt: dict) -> tuple[np.ndarray, list[str]]:
    """The file's frames, 0..1, and what the sampler said."""
    run = server.client.queue(prompt, timeout=900)
    (file,) = run.outputs[saver(prompt)]["images"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        assert container.streams.video[0].average_rate == FPS
        made = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    messages = during(run.messages, run.prompt_id)
    said = [text for _, node, text in progress_texts(messages) if node == one(prompt, SAMPLER)[0]]
    return made.astype(np.float32) / 255, said


def sprites_in(video: np.ndarray) -> np.ndarray:
    """Of each sprite the share of every fourth frame of the last section that shows its colour at its size."""
    nearest = ffgo_measure.nearest_colours(video[-36::4])
    spots = [nearest == ffgo_measure.NAMES.index(f"sprite {sprite.colour}") for sprite in PAIR.cast]
    ideal = np.pi * shots.RADIUS**2
    return np.array([((0.4 * ideal < s.sum((1, 2))) & (s.sum((1, 2)) < 1.6 * ideal)).mean() for s in spots])


def test_both_sprites_are_there_to_the_end_and_without_what_was_trained_they_are_not(server, prompt):
    made, said = frames_of(server, prompt)
    assert made.shape == (FRAMES, shots.HEIGHT, shots.WIDTH, 3)
    assert f"{FRAMES} frames = {FRAMES / FPS:.2f} s at {FPS} fps" in said[0]
    start = np.asarray(Image.open(REPO / "selftest_models" / "pair.png").convert("RGB"), dtype=np.float32) / 255
    assert np.abs(made[0] - start).mean() < 0.05
    kept = sprites_in(made)
    assert kept.min() > 0.6, kept

    untrained = copy.deepcopy(prompt)
    one(untrained, LORA)[1]["inputs"]["strength"] = 0.0
    one(untrained, CONTEXT)[1]["inputs"]["file"] = "new (untrained)"
    lost, said = frames_of(server, untrained)
    assert "The patchifiers of the MODEL are untrained" in said[0]
    assert sprites_in(lost).min() < kept.min() - 0.3, (kept, sprites_in(lost))


def test_the_measure_of_a_minute_tells_the_truth_from_a_still_picture():
    truth = shots.render(PAIR, np.arange(120))
    still = np.repeat(truth[:1], 120, axis=0)
    swapped = truth[..., [2, 1, 0]]
    np.testing.assert_allclose(wan_memory.measure(truth, PAIR)[:, :3], 1, atol=0.05)
    np.testing.assert_allclose(wan_memory.measure(still, PAIR)[:, :3], [[1, 1, 0]] * 3)
    assert wan_memory.measure(truth, PAIR)[:, 3].min() > 60
    assert wan_memory.measure(swapped, PAIR)[:, 0].max() == 0 and wan_memory.measure(swapped, PAIR)[:, 3].max() < 30
