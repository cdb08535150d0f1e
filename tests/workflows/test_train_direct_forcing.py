"""The training graph on the real server: videos to a memory and a head, cancelled and gone on with, and then loaded."""

import copy
import re

import numpy as np
import pytest
from PIL import Image

from frame_memory.model import memory_file, tensor_file
from scripts.client import PromptError

from .tiny import ENCODERS, REPO, cancelled, during, one, progress_texts, shrink, training_videos, ui_graph

GRAPH = REPO / "workflows" / "train_direct_forcing.json"
TRAIN, CLIPS = "FrameMemoryTrainDirectForcing", "FrameMemoryVideoClips"


@pytest.fixture(scope="module")
def prompt(server, api):
    """The graph on the self-test models: two steps a stage, at most two clips, no warm-up to speak of."""
    training_videos(server.base / "input" / one(api(GRAPH), CLIPS)[1]["inputs"]["folder"])
    small = shrink(api(GRAPH))
    one(small, CLIPS)[1]["inputs"].update(size=64)
    for node in small.values():
        if node["class_type"] == TRAIN:
            node["inputs"].update(steps=2, clips=2, save_every=1, learning_rate=1e-3)
    return small


def stages(prompt) -> tuple[str, str]:
    """Ids of the two training nodes."""
    return tuple(sorted((i for i, n in prompt.items() if n["class_type"] == TRAIN), key=lambda i: stage(prompt, i)))


def stage(prompt, node_id) -> str:
    return prompt[node_id]["inputs"]["stage"]


@pytest.fixture(scope="module")
def trained(server, prompt):
    return server.client.queue(prompt, timeout=900, workflow=ui_graph(GRAPH))


def test_the_graph_has_the_papers_settings(api):
    prompt = api(GRAPH)
    first, second = stages(prompt)
    assert stage(prompt, first) == "1: memory" and stage(prompt, second) == "2: head (Direct Forcing)"
    for node_id in (first, second):
        inputs = prompt[node_id]["inputs"]
        assert inputs["learning_rate"] == 1e-5 and inputs["clips"] == 16 and inputs["steps"] == 500
        assert inputs["forcing"] == "as the stage" and inputs["checkpointing"]
        assert inputs["latents"] == [one(prompt, CLIPS)[0], 0] and inputs["positive"] == [one(prompt, CLIPS)[0], 1]
    assert prompt[second]["inputs"]["memory"] == [first, 1], "the memory of stage 1 goes into stage 2"
    assert prompt[second]["inputs"]["model"] == prompt[first]["inputs"]["model"]


def test_both_stages_leave_files_that_the_loaders_take(trained, server, prompt):
    first, second = stages(prompt)
    models = server.base / "models" / "frame_memory"
    files = [f"{prompt[i]['inputs']['name']}.safetensors" for i in (first, second)]
    memory, both = (memory_file.read(str(models / name)) for name in files)
    assert memory.kind == memory_file.SEMANTIC_PACK and not memory.head
    assert both.kind == memory_file.DIRECT_FORCING and set(both.head) == set(memory_file.HEAD)
    assert both.pack.keys() == memory.pack.keys() and all((both.pack[k] == v).all() for k, v in memory.pack.items())
    assert float(memory.pack["gate"]) != 0, "trained"
    for node_id in (first, second):
        report = trained.outputs[node_id]["text"][0]
        assert f"{stage(prompt, node_id)}: 2 of 2 steps on 2 videos" in report and "s a step" in report
        curve = server.base / "output" / "frame_memory_training" / prompt[node_id]["inputs"]["name"] / "loss.png"
        with Image.open(curve) as picture:
            assert np.asarray(picture.convert("L"), dtype=float).std() > 5
    shown = [(i, text) for _, i, text in progress_texts(during(server.client.messages, trained.prompt_id))]
    assert any(i == first and "step 2 of 2" in text and "loss" in text for i, text in shown)
    previews = [n for n, _ in trained.messages if n == "preview"] or [
        1 for n, d in during(server.client.messages, trained.prompt_id) if n == "binary" and d["event"] in (1, 4)
    ]
    assert previews, "a picture of an estimate was shown"
    graph = {
        "model": one(prompt, "FrameMemoryLoadFramePack")[1],
        "load": {
            "class_type": "FrameMemoryLoadDirectForcing",
            "inputs": {"model": ["model", 0], "file": files[1], "strength": 1.0},
        },
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["load", 2]}},
    }  # fmt: skip
    said = server.client.queue(graph, timeout=300).outputs["report"]["text"][0]
    assert "4 of 4 tensors at strength 1" in said and "Trained on this base" in said


def test_fault_t1_cancel_keeps_a_checkpoint_and_queueing_again_goes_on(trained, server, prompt):
    client, small = server.client, copy.deepcopy(prompt)
    first, second = stages(small)
    small[second]["inputs"].update(name="stopped", steps=5000)
    prompt_id, steps = cancelled(client, small, second)
    said = [text for _, i, text in progress_texts(during(client.messages, prompt_id)) if i == second]
    stopped = re.search(r"Stopped after step (\d+) of 5000", said[-1])
    assert stopped and "same name to go on" in said[-1]
    done = int(stopped[1])
    assert max(2, *steps) <= done < 1000, "the host may not show every step"
    folder = server.base / "output" / "frame_memory_training" / "stopped"
    kept = sorted(p.name for p in folder.glob("step-*"))
    assert kept[-1] == f"step-{done:08d}.safetensors" and len(kept) <= 3
    before = tensor_file.read(str(folder / kept[-1]))["losses"].tolist()
    small[second]["inputs"].update(steps=done + 1)
    report = client.queue(small, timeout=600).outputs[second]["text"][0]
    assert f"{done + 1} of {done + 1} steps" in report and f"{done} of them before a stop" in report
    after = tensor_file.read(str(folder / f"step-{done + 1:08d}.safetensors"))["losses"].tolist()
    assert after[:-1] == before and (server.base / "models" / "frame_memory" / "stopped.safetensors").is_file()


def test_a_loss_curve_that_cannot_be_written_costs_no_result(trained, server, prompt):
    small = copy.deepcopy(prompt)
    node_id = stages(small)[1]
    small[node_id]["inputs"].update(name="curve", steps=1)
    (server.base / "output" / "frame_memory_training" / "curve" / "loss.png").mkdir(parents=True)
    report = server.client.queue(small, timeout=600).outputs[node_id]["text"][0]
    assert "1 of 1 steps" in report and "Warning: the loss curve could not be written" in report
    assert (server.base / "models" / "frame_memory" / "curve.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "a/b"}, "Nearest valid: 'a_b'"),
        ({"name": "con"}, "Nearest valid: 'con_'"),
        ({"name": "../../evil: 50%"}, "'name' of 'Train Direct Forcing' cannot be the name of a folder"),
        ({"name": "../../evil: 50%"}, "Nearest valid: 'evil_ 50%'"),
        ({"name": " "}, "'name' of 'Train Direct Forcing' is empty"),
        (
            {"name": "FramePack_F1_memory"},
            "trains stage '1: memory', and stage '2: head (Direct Forcing)' is asked for",
        ),
        ({"stage": "1: memory", "name": "x", "clips": 1}, "a memory learns from 2 clips on"),
    ],
    ids=[
        "a name that is no file",
        "a device of Windows",
        "a path",
        "a path's nearest",
        "empty",
        "of stage 1",
        "one clip",
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(trained, server, prompt, change, said):
    small = copy.deepcopy(prompt)
    small[stages(small)[1]]["inputs"].update(change)
    with pytest.raises(PromptError) as error:
        server.client.queue(small, timeout=300)
    assert said in str(error.value) and TRAIN in str(error.value)


def test_the_head_alone_behind_a_new_memory_is_trained_without_one_and_the_report_begins_with_that(
    trained, server, prompt
):
    """As the editor connects it where the node of stage 1 is deleted."""
    small = {i: n for i, n in copy.deepcopy(prompt).items() if n["class_type"] != "PreviewImage"}
    first, second = stages(small)
    small[second]["inputs"].update(name="alone", steps=1, memory=small.pop(first)["inputs"]["memory"])
    report = server.client.queue(small, timeout=600).outputs[second]["text"][0].splitlines()
    assert report[0].startswith("Warning: the gate of the memory given (new) is closed")
    assert report[1].startswith("Result: models/frame_memory/alone.safetensors")
    assert "too few steps to say whether it falls" in "".join(report)
    assert not memory_file.read(str(server.base / "models" / "frame_memory" / "alone.safetensors")).pack


def test_videos_are_written_for_the_command_line(trained, server, prompt):
    small = {i: n for i, n in copy.deepcopy(prompt).items() if i in (stages(prompt)[1], one(prompt, CLIPS)[0])
             or n["class_type"] in ("FrameMemoryLoadFramePack", "VAELoader", ENCODERS)}  # fmt: skip
    node_id = stages(prompt)[1]
    small[node_id]["inputs"].update(stage="write for the command line", name="several GPUs")
    small[node_id]["inputs"].pop("memory")
    report = server.client.queue(small, timeout=300).outputs[node_id]["text"][0]
    folder = server.base / "output" / "frame_memory_training" / "several GPUs" / "videos"
    assert "2 videos with their captions" in report and "behind this node is skipped" in report
    assert len(list(folder.glob("video-*.safetensors"))) == 2
