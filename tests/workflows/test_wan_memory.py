"""Packed history on the tiny Wan that ships: both sprites are there to the end, and without what was trained they are
not.
"""

from __future__ import annotations

import copy
import re

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks import ffgo_measure, shots, wan_memory
from benchmarks.ship_selftest import PAIR
from scripts import demo, workflow
from scripts.client import PromptError

from .tiny import REPO, during, one, progress_texts, saver, training_videos, ui_graph

GRAPH = REPO / "workflows" / "wan_memory.json"
SAMPLER, LORA, CONTEXT = "FrameMemoryAntiDriftSampler", "FrameMemoryLoraLoader", "FrameMemoryWanFrameContext"
TRAIN = "FrameMemoryTrainWanContext"
SECTIONS, FPS = 3, 16
FRAMES = 36 * SECTIONS + 1


@pytest.fixture(scope="module")
def prompt(server, api):
    made = workflow.set_inputs(api(GRAPH), SAMPLER, {"seconds": SECTIONS * 36 / FPS})
    demo.give_what_ships(server.base / "input", made)
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


@pytest.fixture(scope="module")
def teaching(server, definitions):
    """The graph's muted part alone, with what it needs of the rest: two steps on two small videos."""
    graph = ui_graph(GRAPH)
    muted = {str(node["id"]) for node in graph["nodes"] if node["mode"] == workflow.MUTED}
    for node in graph["nodes"]:
        node["mode"] = 0
    whole = workflow.to_api(graph, definitions)
    wanted = set(muted)
    for _ in range(3):
        links = [v for i in wanted for v in whole[i]["inputs"].values() if isinstance(v, list)]
        wanted |= {source for source, _ in links}
    made = {i: node for i, node in whole.items() if i in wanted}
    assert {made[i]["class_type"] for i in muted} == {TRAIN, "FrameMemoryVideoClips"}
    training_videos(server.base / "input" / one(made, "FrameMemoryVideoClips")[1]["inputs"]["folder"])
    one(made, TRAIN)[1]["inputs"].update(name="taught", steps=2, rank=2, save_every=1)
    return made


def test_the_muted_part_teaches_it_and_goes_on_and_its_files_load(server, teaching):
    node_id, train = one(teaching, TRAIN)
    report = server.client.queue(teaching, timeout=600).outputs[node_id]["text"][0]
    assert report.startswith(
        "Result: models/frame_memory/taught.safetensors, for 'Wan Frame Context'.\nLoRA: models/loras"
    )
    assert "Wan: frame context: 2 of 2 steps on 2 videos, patchifiers and LoRA, on the schedule f1k1_td" in report
    more = copy.deepcopy(teaching)
    more[node_id]["inputs"]["steps"] = 3
    report = server.client.queue(more, timeout=600).outputs[node_id]["text"][0]
    assert "3 of 3 steps on 2 videos" in report and "2 of them before a stop" in report
    file, model = "taught.safetensors", {"class_type": "UNETLoader", "inputs": one(teaching, "UNETLoader")[1]["inputs"]}
    graph = {
        "model": model,
        "context": {"class_type": CONTEXT, "inputs": {"model": ["model", 0], "file": file}},
        "lora": {"class_type": LORA, "inputs": {"model": ["context", 0], "lora_name": file, "strength": 1.0}},
        "said": {"class_type": "PreviewAny", "inputs": {"source": ["context", 1]}},
        "fits": {"class_type": "PreviewAny", "inputs": {"source": ["lora", 1]}},
    }
    outputs = server.client.queue(graph, timeout=300).outputs
    said = outputs["said"]["text"][0]
    assert "Trained on this base" in said and train["inputs"]["frame_context"] and "'F1 forward' (f1k1" in said
    matched, whole = re.search(r"(\d+) of (\d+) modules", outputs["fits"]["text"][0]).groups()
    assert matched == whole != "0"


def test_clips_of_another_rate_are_refused_in_words(server, teaching):
    small = copy.deepcopy(teaching)
    one(small, "FrameMemoryVideoClips")[1]["inputs"]["fps"] = 30
    with pytest.raises(PromptError, match="'fps' of 30. Expected: 16 frames a second.*Video Clips"):
        server.client.queue(small, timeout=300)


def test_the_measure_of_a_minute_tells_the_truth_from_a_still_picture():
    truth = shots.render(PAIR, np.arange(120))
    still = np.repeat(truth[:1], 120, axis=0)
    swapped = truth[..., [2, 1, 0]]
    np.testing.assert_allclose(wan_memory.measure(truth, PAIR)[:, :3], 1, atol=0.05)
    np.testing.assert_allclose(wan_memory.measure(still, PAIR)[:, :3], [[1, 1, 0]] * 3)
    assert wan_memory.measure(truth, PAIR)[:, 3].min() > 60
    assert wan_memory.measure(swapped, PAIR)[:, 0].max() == 0 and wan_memory.measure(swapped, PAIR)[:, 3].max() < 30
