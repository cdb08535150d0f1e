"""drift_and_recall on the real server, and its nodes with what people wire into them."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.ship_clips import BEFORE, pictures
from scripts.client import PromptError

from .tiny import REPO, one

METER, RECALL = "FrameMemoryDriftMeter", "FrameMemoryRecall"
LUMA = np.array([0.2126, 0.7152, 0.0722])


@pytest.fixture(scope="module")
def graph(api):
    """The example graph, with its texts where the test can read them."""
    prompt = copy.deepcopy(api(REPO / "workflows" / "drift_and_recall.json"))
    for name, (class_type, slot) in {"json": (METER, 1), "words": (METER, 2), "recalled": (RECALL, 2)}.items():
        prompt[name] = {"class_type": "PreviewAny", "inputs": {"source": [one(prompt, class_type)[0], slot]}}
    return prompt


def test_the_graph_measures_the_video_and_keeps_both_pictures(server, graph):
    run = server.client.queue(graph)
    told = json.loads(run.outputs["json"]["text"][0])
    truth = pictures(BEFORE).astype(float) @ LUMA
    assert (told["frames"], told["fps"], told["order"], told["end_frames"]) == (61, 30, "forward", 9)
    assert told["measures"]["brightness"]["first"] == pytest.approx(truth[:9].mean(), abs=2), "of a lossy file"
    assert told["measures"]["brightness"]["last"] == pytest.approx(truth[-9:].mean(), abs=2)
    words = run.outputs["words"]["text"][0]
    assert "frame_memory_before.mp4, 64x64." in words and "Brightness: " in words and "frozen" not in words
    recalled = run.outputs["recalled"]["text"][0]
    assert "Similarity at the return: 0." in recalled and "no model connected" in recalled
    for node, node_id in [(n["class_type"], i) for i, n in graph.items() if n["class_type"] == "SaveImage"]:
        (file,) = run.outputs[node_id]["images"]
        picture = np.asarray(Image.open(server.base / "output" / file["subfolder"] / file["filename"]), dtype=float)
        assert picture.shape[1] > 300 and picture.std() > 10, node


def test_nothing_and_too_much_to_measure_is_refused(server, graph):
    for class_type, words in ((METER, "got nothing to measure"), (RECALL, "got nothing to measure")):
        bare = copy.deepcopy(graph)
        del one(bare, class_type)[1]["inputs"]["video"]
        with pytest.raises(PromptError, match=words):
            server.client.queue(bare)
    both = copy.deepcopy(graph)
    one(both, METER)[1]["inputs"]["project"] = "p"
    with pytest.raises(
        PromptError, match="got 'video' and 'project' to measure; expected one video.*Disconnect all but one"
    ):
        server.client.queue(both)
    project = copy.deepcopy(graph)
    del one(project, METER)[1]["inputs"]["video"]
    one(project, METER)[1]["inputs"]["project"] = "no such one"
    with pytest.raises(PromptError, match="'Drift Meter' needs the VAE"):
        server.client.queue(project)
