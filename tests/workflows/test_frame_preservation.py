"""The graphs of frame preservation on the real server: both stages, a frame asked for, a video, Cancel and refusals;
and the one that needs no download.
"""

import copy
import re

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks import ship_clips
from benchmarks.long_world import random_long_scene, render
from frame_memory.model import memory_file, tensor_file
from scripts import demo
from scripts.client import PromptError, Run

from .tiny import (
    ENCODERS,
    REPO,
    SELFTEST_GRAPHS,
    cancelled,
    during,
    frames_of,
    one,
    progress_texts,
    shrink,
    training_videos,
    ui_graph,
)

GRAPH = REPO / "workflows" / "frame_preservation.json"
SELFTEST = REPO / "workflows" / "frame_preservation_selftest.json"
TRAIN, CLIPS, RETRIEVE = "FrameMemoryTrainPreservation", "FrameMemoryVideoClips", "FrameMemoryRetrieveFrame"
ENCODER, SAMPLER = "FrameMemoryFramePreservation", "FrameMemoryAntiDriftSampler"


@pytest.fixture(scope="module")
def prompt(server, api):
    """The graph on the self-test models: two steps a stage, at most two clips, two sections of video."""
    small = shrink(api(GRAPH))
    for node in small.values():
        if node["class_type"] == CLIPS:
            node["inputs"].update(size=80)  # the least that 4x4x2 takes of their shape
            training_videos(server.base / "input" / node["inputs"]["folder"])
        if node["class_type"] == TRAIN:
            node["inputs"].update(steps=2, clips=2, save_every=1, rank=2, learning_rate=1e-3)
    one(small, RETRIEVE)[1]["inputs"].update(steps=2)
    return small


def ids(prompt, class_type: str) -> tuple[str, ...]:
    """Ids of a class's nodes; those that train are in the order of their stages."""
    return tuple(sorted((i for i, n in prompt.items() if n["class_type"] == class_type), key=int))


def stage(prompt, node_id) -> str:
    return prompt[node_id]["inputs"]["stage"]


@pytest.fixture(scope="module")
def made(server, prompt):
    return server.client.queue(prompt, timeout=900, workflow=ui_graph(GRAPH))


def test_stage_two_has_the_memory_of_stage_one_and_a_new_lora(api):
    prompt = api(GRAPH)
    (first, second), (asked, used) = ids(prompt, TRAIN), ids(prompt, ENCODER)
    assert stage(prompt, first) == "1: frame query" and stage(prompt, second) == "2: next section"
    model = [one(prompt, "FrameMemoryLoadFramePack")[0], 0]
    assert prompt[first]["inputs"]["model"] == prompt[second]["inputs"]["model"] == model
    assert prompt[second]["inputs"]["memory"] == [first, 1] and not prompt[second]["inputs"]["freeze_encoder"]
    assert prompt[first]["inputs"]["name"] != prompt[second]["inputs"]["name"]
    for encoder, stage_id in ((asked, first), (used, second)):
        assert prompt[encoder]["inputs"]["model"] == [stage_id, 0]
        assert prompt[encoder]["inputs"]["memory"] == [stage_id, 1]
    seen, unseen = ids(prompt, CLIPS)
    retrieve, sampler = one(prompt, RETRIEVE)[1]["inputs"], one(prompt, SAMPLER)[1]["inputs"]
    assert prompt[first]["inputs"]["latents"] == [seen, 0] and retrieve["samples"] == [unseen, 0]
    assert prompt[seen]["inputs"]["folder"] != prompt[unseen]["inputs"]["folder"]
    assert retrieve["memory"] == [asked, 1] and sampler["memory"] == [used, 1]


def test_both_stages_leave_files_that_the_loaders_take(made, server, prompt):
    models, memories = server.base / "models", []
    for node_id in ids(prompt, TRAIN):
        name = prompt[node_id]["inputs"]["name"]
        report = made.outputs[node_id]["text"][0]
        assert report.startswith(f"Result: models/frame_memory/{name}.safetensors, for 'Load Memory Encoder'.\nLoRA")
        assert f"{stage(prompt, node_id)}: 2 of 2 steps on 2 videos, 4x4x2 and LoRA" in report and "s a step" in report
        with Image.open(server.base / "output" / "frame_memory_training" / name / "loss.png") as picture:
            assert np.asarray(picture.convert("L"), dtype=float).std() > 5
        file = memory_file.read(str(models / "frame_memory" / f"{name}.safetensors"))
        assert file.kind == memory_file.FRAME_PRESERVATION and file.recipe["stage"] == stage(prompt, node_id)
        assert tensor_file.read(str(models / "loras" / f"{name}.safetensors"))
        memories.append(file.frames)
    assert any(not (memories[0][n] == v).all() for n, v in memories[1].items()), "stage 2 trains the memory, too"
    shown = [text for _, i, text in progress_texts(during(made.messages, made.prompt_id)) if i in ids(prompt, TRAIN)]
    assert any("step 2 of 2" in text and "loss" in text for text in shown)
    name = prompt[ids(prompt, TRAIN)[1]]["inputs"]["name"]
    graph = {
        "model": one(prompt, "FrameMemoryLoadFramePack")[1],
        "memory": {
            "class_type": "FrameMemoryLoadEncoder",
            "inputs": {"model": ["model", 0], "encoder_name": f"{name}.safetensors"},
        },
        "lora": {
            "class_type": "FrameMemoryLoraLoader",
            "inputs": {"model": ["model", 0], "lora_name": f"{name}.safetensors", "strength": 1.0},
        },
        "encoder": {
            "class_type": ENCODER,
            "inputs": {"model": ["lora", 0], "memory": ["memory", 0], "tokens": 8192},
        },
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["encoder", 2]}},
        "fits": {"class_type": "PreviewAny", "inputs": {"source": ["lora", 1]}},
    }
    outputs = server.client.queue(graph, timeout=300).outputs
    assert "Trained on this base" in outputs["report"]["text"][0]
    matched, whole = re.search(r"(\d+) of (\d+) modules", outputs["fits"]["text"][0]).groups()
    assert matched == whole != "0"


def test_a_frame_of_each_unseen_video_is_asked_for_and_the_video_is_made(made, server, prompt, written):
    node_id, _ = one(prompt, RETRIEVE)
    assert len(made.outputs[node_id]["images"]) == 2, "one pair a video"
    (file,) = made.outputs[one(prompt, "FrameMemorySaveLongVideo")[0]]["images"]
    path = server.base / "output" / file["subfolder"] / file["filename"]
    written.check_video(path, frames_of(2.4), 30, (64, 64), within=1e-5)
    said = [
        text for _, i, text in progress_texts(during(made.messages, made.prompt_id)) if i == one(prompt, SAMPLER)[0]
    ]
    warnings = [line for line in said[-1].splitlines() if line.startswith("Warning")]
    assert not [line for line in warnings if "memory" in line], "both outputs of the encoder are connected"


def test_cancel_keeps_a_checkpoint_and_queueing_again_goes_on(made, server, prompt):
    client, second = server.client, ids(prompt, TRAIN)[1]
    small = copy.deepcopy(prompt)
    small = {i: n for i, n in small.items() if n["class_type"] not in ("FrameMemorySaveLongVideo", SAMPLER)}
    small[second]["inputs"].update(name="stopped frames", steps=5000)
    prompt_id, steps = cancelled(client, small, second)
    said = [text for _, i, text in progress_texts(during(client.messages, prompt_id)) if i == second]
    done = int(re.search(r"Stopped after step (\d+) of 5000", said[-1])[1])
    assert max(2, *steps) <= done < 1000, "the host may not show every step"
    folder = server.base / "output" / "frame_memory_training" / "stopped frames"
    before = tensor_file.read(str(folder / f"step-{done:08d}.safetensors"))["losses"].tolist()
    small[second]["inputs"].update(steps=done + 1)
    report = client.queue(small, timeout=600).outputs[second]["text"][0]
    assert f"{done + 1} of {done + 1} steps" in report and f"{done} of them before a stop" in report
    after = tensor_file.read(str(folder / f"step-{done + 1:08d}.safetensors"))["losses"].tolist()
    assert after[:-1] == before and (server.base / "models" / "loras" / "stopped frames.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "a/b"}, "'name' of 'Train Frame Preservation' cannot be the name of a folder"),
        ({"name": "FramePack_F1_frame_query"}, "another 'name' in 'Train Frame Preservation'"),
        ({"name": "x", "clips": 1}, "needs 2, one to remember and one to make"),
    ],
    ids=["a path", "of stage 1", "one clip"],
)
def test_what_cannot_be_trained_is_refused_in_words(made, server, prompt, change, said):
    small = copy.deepcopy(prompt)
    small[ids(small, TRAIN)[1]]["inputs"].update(change)
    with pytest.raises(PromptError) as error:
        server.client.queue(small, timeout=300)
    assert said in str(error.value) and TRAIN in str(error.value)


def test_videos_are_written_for_the_command_line(made, server, prompt):
    small, first = copy.deepcopy(prompt), ids(prompt, TRAIN)[0]
    kept = (first, ids(prompt, CLIPS)[0], prompt[first]["inputs"]["memory"][0])
    loaders = ("FrameMemoryLoadFramePack", "VAELoader", ENCODERS)
    small = {i: n for i, n in small.items() if i in kept or n["class_type"] in loaders}
    small[first]["inputs"].update(stage="write for the command line", name="frames of several GPUs")
    report = server.client.queue(small, timeout=300).outputs[first]["text"][0]
    folder = server.base / "output" / "frame_memory_training" / "frames of several GPUs" / "videos"
    assert "2 videos with their captions" in report and len(list(folder.glob("video-*.safetensors"))) == 2


def test_the_selftest_graph_trains_a_memory_and_asks_it_for_a_frame(server, api, definitions):
    """On two short videos in the place of each folder that ships, which take minutes to encode on one core."""
    small = api(SELFTEST)
    folders = [small[i]["inputs"]["folder"] for i in ids(small, CLIPS)]
    assert folders == list(ship_clips.FOLDERS)
    for folder in folders:
        training_videos(server.base / "input" / folder)
    node_id, asked = one(small, TRAIN)[0], one(small, RETRIEVE)
    small[node_id]["inputs"].update(steps=3, save_every=1, rank=2)
    asked[1]["inputs"].update(steps=2, seconds=1.0)
    run = server.client.queue(small, timeout=600, workflow=ui_graph(SELFTEST))
    assert "1: frame query: 3 of 3 steps on 2 videos" in run.outputs[node_id]["text"][0]
    assert len(run.outputs[asked[0]]["images"]) == 2
    told = run.outputs[one(small, "PreviewAny")[0]]["text"]
    assert [report.splitlines()[0] for report in told] == ["clip 0.mp4:", "clip 1.mp4:"]
    assert all("mean of 8 other frames of the video in its place: PSNR" in report for report in told)
    lines = demo.made(run, small, definitions, server.base)
    pictures = [line.removeprefix("Picture: ").split("  (")[0] for line in lines if line.startswith("Picture: ")]
    assert len(pictures) == 3 and all(Image.open(path).size for path in pictures), "the loss and two pairs"
    for text in ("Result: models/frame_memory", *told):
        assert sum(text in line for line in lines) == 1, text
    with pytest.raises(demo.DemoError, match="made nothing"):
        demo.made(Run("", {}), small, definitions, server.base)


@pytest.mark.parametrize("name", SELFTEST_GRAPHS)
def test_the_demo_gives_each_graph_what_it_names(api, tmp_path, name):
    prompt = api(REPO / "workflows" / f"{name}.json")
    demo.give_what_ships(tmp_path, prompt)
    inputs = {"LoadImage": "image", "LoadVideo": "file", CLIPS: "folder"}
    named = {node["inputs"][inputs[t]] for node in prompt.values() if (t := node["class_type"]) in inputs}
    assert {path.name for path in tmp_path.iterdir()} == named
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        assert {p.name for p in folder.iterdir()} == {p.name for p in (ship_clips.VIDEOS / folder.name).iterdir()}


@pytest.mark.parametrize("name", ship_clips.FOLDERS)
def test_the_videos_that_ship_are_the_worlds_own_with_their_captions(name):
    count, seed, sure = ship_clips.FOLDERS[name]
    folder, rng = ship_clips.VIDEOS / name, np.random.default_rng(seed)
    assert len(list(folder.iterdir())) == 2 * count
    for number in range(1, count + 1):
        scene = random_long_scene(rng, **sure)
        assert (folder / f"{number}.txt").read_text(encoding="utf-8").strip() == scene.caption
        with av.open(str(folder / f"{number}.mp4")) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) == len(ship_clips.LONG)
        truth = render(scene, np.array([0, 60, 288]))
        assert np.abs(np.stack([shown[0], shown[60], shown[288]]) / 255 - truth).mean() < 0.02
