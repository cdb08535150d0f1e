"""A memory on the models that ship: with it the visitor that left comes back, without it another one does."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from benchmarks.long_measure import measure_long
from benchmarks.quality import FILES, MODELS
from benchmarks.ship_selftest import VISITOR
from benchmarks.world import SPRITE_COLOURS
from frame_memory.model import checkpoint, framepack, memory_file
from frame_memory.model.base_signature import Base

from .tiny import REPO, ui_graph

GRAPH = REPO / "workflows" / "memory_selftest.json"
PICTURE = "frame_memory_night.png"
SAVER, TIMELINE = "FrameMemorySaveLongVideo", "FrameMemoryPromptTimeline"
# Pixel frames that are made while the prompt names the visitor: it comes and leaves.
NAMED = 145


@pytest.fixture(scope="module")
def measured(server, api):
    """Measures of the video with the memory, and of the one without."""
    server.client.upload_image(REPO / "selftest_models" / "night.png", PICTURE)
    prompt = api(GRAPH)
    run = server.client.queue(prompt, timeout=900)
    found = {}
    for node, each in prompt.items():
        if each["class_type"] == SAVER:
            (file,) = run.outputs[node]["images"]
            with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
                made = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            found[each["inputs"]["filename_prefix"]] = measure_long(made.astype(np.float32) / 255, VISITOR, NAMED)
    return found["video/FrameMemory_with_memory"], found["video/FrameMemory_without_memory"]


def test_the_graph_asks_for_the_visitor_by_name_only_while_it_is_there_first():
    (lines,) = [n["widgets_values"][0] for n in ui_graph(GRAPH)["nodes"] if n["type"] == TIMELINE]
    named, unnamed = lines.split("\n")
    assert named == f"0-4.8: {replace(VISITOR, named=True).caption}" and unnamed == f"4.8-: {VISITOR.caption}"


def test_both_videos_begin_with_the_visitor_and_only_the_memory_brings_it_back(measured):
    kept, lost = measured
    colour = list(SPRITE_COLOURS).index(VISITOR.colour)
    assert kept.first == lost.first and kept.first[0] == colour
    assert kept.colour_recall > 0.7 and lost.colour_recall < 0.3
    came = lost.colour[NAMED:]
    assert (came >= 0).sum() > 30 and (came[came >= 0] != colour).mean() > 0.7


@pytest.mark.parametrize("name", ["direct_forcing", "student_forcing"])
def test_the_heads_that_ship_belong_to_the_selftest_F1_alone(name):
    framepack.register()
    models = {kind: checkpoint.load_framepack(str(MODELS / "diffusion_models" / FILES[kind])) for kind in FILES}
    held = memory_file.read(str(MODELS / memory_file.FOLDER / f"frame_memory_selftest_{name}.safetensors"), "test")
    assert (held.base.family, held.base.kind) == ("selftest", "F1")
    assert not held.base.difference(Base.of(models["F1"])) and held.base.difference(Base.of(models["F0"]))
    own = models["F1"].model.diffusion_model.get_parameter("final_layer.linear.weight")
    assert own.shape == held.head["final_layer.linear.weight"].shape
    assert not torch.equal(own.float(), held.head["final_layer.linear.weight"].float())
