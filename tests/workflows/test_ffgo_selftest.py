"""FFGo on the models that ship: the graph makes the composed video, and without the LoRAs it does not."""

from __future__ import annotations

import copy

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks import shots
from benchmarks.ffgo_measure import measure
from benchmarks.ship_selftest import COMPOSITION

from .tiny import REPO, saver, ui_graph

GRAPH = REPO / "workflows" / "ffgo_selftest.json"
PICTURES = ("reference_1", "reference_2", "reference_3", "background")
LORA = "FrameMemoryLoraLoader"


# Bytes that all models of the pack may have together (design.md section 5).
MOST_BYTES = 24_000_000


@pytest.fixture(scope="module")
def prompt(server, api):
    for name in PICTURES:
        server.client.upload_image(REPO / "selftest_models" / f"ffgo_{name}.png", f"frame_memory_ffgo_{name}.png")
    return api(GRAPH)


def frames_of(server, prompt: dict) -> np.ndarray:
    run = server.client.queue(prompt, timeout=900)
    (file,) = run.outputs[saver(prompt)]["images"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        made = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    return made.astype(np.float32) / 255


def test_the_models_that_ship_stay_small():
    files = [path for path in (REPO / "selftest_models").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 12
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


def test_the_shipped_pictures_are_the_compositions():
    for name, sprite in zip(PICTURES, COMPOSITION.cast, strict=False):
        shipped = Image.open(REPO / "selftest_models" / f"ffgo_{name}.png")
        np.testing.assert_array_equal(np.asarray(shipped), np.asarray(shots.cut_out(sprite)))
    caption = COMPOSITION.caption(ground_colour=False)
    (text,) = [n for n in ui_graph(GRAPH)["nodes"] if n["type"] == "FrameMemoryFFGoPrompt"]
    assert text["widgets_values"][0] == caption


def test_the_graph_makes_the_composed_video_and_without_its_loras_it_does_not(server, prompt):
    made = frames_of(server, prompt)
    assert made.shape == (21, shots.HEIGHT, shots.WIDTH, 3)
    canvas = np.repeat(shots.canvas(COMPOSITION)[None], 4, axis=0)
    seen = measure(np.concatenate([canvas, made]), COMPOSITION)
    assert seen.activated and seen.ground, seen

    bare = copy.deepcopy(prompt)
    for loader in [i for i, node in bare.items() if node["class_type"] == LORA]:
        bare[loader]["inputs"]["strength"] = 0.0
    without = measure(np.concatenate([canvas, frames_of(server, bare)]), COMPOSITION)
    assert not without.activated, without
