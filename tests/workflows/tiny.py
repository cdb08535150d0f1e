"""Puts the self-test models into a graph for real checkpoints, so that it runs on any machine in seconds.

What is swapped, all in the API format:

    Load FramePack Model          the self-test file of the same kind (F0 or F1)
    Load VAE                      the self-test autoencoder
    DualCLIPLoader                Self-Test Encoders, output "clip"
    Load CLIP Vision              Self-Test Encoders, output "clip_vision"
    Load Image                    the self-test's start picture
    Load Direct Forcing Checkpoint  a file with random changes, made for the self-test F1
    FramePack Image               size 64
    FramePack Sigmas              fewer steps
    Anti-Drift Sampler            fewer seconds
    Prompt Timeline               times within those seconds

Nothing else is touched: nodes, links and all other settings stay the graph's own.

Graphs for Wan 2.2 get stand-ins of its topology with random weights (tests/first_frame/wan_files.py), one step for each
of the two models, a small canvas and few frames.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.client import PromptError

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from first_frame import wan_files
from video.odd_videos import write_video

GRAPHS = sorted((REPO / "workflows").glob("*.json"))
SELFTEST_GRAPHS = (
    "drift_and_recall",
    "extend_and_bridge",
    "ffgo_selftest",
    "frame_preservation_selftest",
    "memory_selftest",
    "resume_and_reroll",
    "selftest",
    "wan_memory",
)  # those made for the models that ship with the pack
START_PICTURE = REPO / "selftest_models" / "start.png"
SELFTEST_VIDEOS = [REPO / "selftest_models" / f"frame_memory_{name}.mp4" for name in ("before", "after")]
# Graphs that begin with a picture; the others are run in test_extend.py, test_ffgo_graphs.py, test_drift_graph.py,
# test_memory_selftest.py, test_train_direct_forcing.py, test_frame_preservation.py and test_wan_memory.py.
OTHERS = (
    "drift_and_recall", "extend_and_bridge", "frame_preservation", "frame_preservation_selftest", "memory_selftest",
    "train_direct_forcing", "wan_memory",
)  # fmt: skip
PICTURE_GRAPHS = [p for p in GRAPHS if not p.stem.startswith("ffgo_") and p.stem not in OTHERS]
PICTURE_NAME = "frame_memory_start.png"
FILES = {"F0": "frame_memory_selftest_F0.safetensors", "F1": "frame_memory_selftest_F1.safetensors"}
DIRECT_FORCING = "tiny_direct_forcing.safetensors"
ENCODERS = "FrameMemorySelfTestEncoders"
OUTPUT_OF_ENCODERS = {"DualCLIPLoader": 0, "CLIPVisionLoader": 1}
TIMELINE = "0-1.2: a red circle moves right slowly over navy hills ground\n1.2-: a red circle moves left slowly"


def kind_of(prompt: dict) -> str:
    """F0 or F1, from the model file's name."""
    name = one(prompt, "FrameMemoryLoadFramePack")[1]["inputs"]["model_name"]
    return "F1" if "F1" in name else "F0"


def one(prompt: dict, class_type: str) -> tuple[str, dict]:
    """(id, node) of the only node of a class."""
    ((node_id, node),) = [(i, n) for i, n in prompt.items() if n["class_type"] == class_type]
    return node_id, node


def saver(prompt: dict) -> str:
    """Id of the node that writes the video: ours, or core's where the sampler makes the video itself."""
    savers = ("FrameMemorySaveLongVideo", "SaveVideo")
    (node_id,) = [i for i, node in prompt.items() if node["class_type"] in savers]
    return node_id


def shrink(prompt: dict, *, seconds: float = 2.4, steps: int = 2) -> dict:
    """A copy of a graph in API format that runs on the self-test models."""
    kind, small = kind_of(prompt), copy.deepcopy(prompt)
    classes = {node_id: node["class_type"] for node_id, node in small.items()}
    swapped = {i: OUTPUT_OF_ENCODERS[name] for i, name in classes.items() if name in OUTPUT_OF_ENCODERS}
    widgets = {
        "FrameMemoryLoadFramePack": {"model_name": FILES[kind]},
        "VAELoader": {"vae_name": "frame_memory_selftest_vae.safetensors"},
        "LoadImage": {"image": PICTURE_NAME},
        "FrameMemoryLoadDirectForcing": {"file": DIRECT_FORCING},
        "FrameMemoryFramePackImage": {"size": 64},
        "FrameMemorySigmas": {"steps": steps},
        "FrameMemoryAntiDriftSampler": {"seconds": seconds},
        "FrameMemoryPromptTimeline": {"text": TIMELINE},
    }
    for node_id, node in small.items():
        if node_id in swapped:
            node.update(class_type=ENCODERS, inputs={})
        node["inputs"].update(widgets.get(node["class_type"], {}))
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in swapped:
                node["inputs"][name] = [value[0], swapped[value[0]]]
    return small


def save_direct_forcing(folder: Path) -> None:
    """A checkpoint as Train Direct Forcing makes them, for the self-test F1: gate open, head a little off."""
    from benchmarks.claims_rows import fresh
    from frame_memory.model import memory_file
    from frame_memory.model.base_signature import Base
    from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise

    network = fresh("F1")
    weights = network.state_dict()
    spec = PackSpec.of(network)
    pack = initialise(SemanticPack(spec, dtype=torch.float32, operations=torch.nn), network)
    pack.gate.data.fill_(0.01)
    head = {name: 1.01 * weights[name] for name in memory_file.HEAD}
    base = Base.of_network(network, "selftest", "F1")
    recipe = {"forcing": "Direct Forcing", "steps": 1}
    path = folder / DIRECT_FORCING
    memory_file.write(str(path), base, pack=pack.state_dict(), spec=spec.to_dict(), head=head, recipe=recipe)


def training_videos(folder: Path, frames: int = 73) -> None:
    """Two videos with captions: a square that walks over one colour. 73 frames are the first and two clips of 1.2 s."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate((60, 120)):
        pictures = np.full((frames, 48, 64, 3), colour, np.uint8)
        for t in range(frames):
            x = 40 - abs(t % 80 - 40)  # there and back: what leaps is taken for a cut
            pictures[t, 10:30, x : x + 20] = (250, 240, 10)
        path = folder / f"clip {i}.mp4"
        write_video(path, [round(1000 * n / 30) for n in range(frames)], size=(64, 48), frames=list(pictures))
        path.with_suffix(".txt").write_text(f"A yellow square walks over grey {colour}.", encoding="utf-8")


def shrink_wan(prompt: dict, *, width: int = 96, height: int = 64, frames: int = 13) -> dict:
    """A copy of a graph for Wan 2.2 in API format that runs on stand-ins in the server's folders."""
    small = copy.deepcopy(prompt)
    loaders = [i for i, node in small.items() if node["class_type"] == "CLIPLoader"]
    for node_id, node in small.items():
        inputs, high = node["inputs"], "high" in json.dumps(node).lower()
        steps = {"steps": 2, "start_at_step": 0 if high else 1, "end_at_step": 1 if high else 10000}
        inputs |= {
            "UNETLoader": {"unet_name": wan_files.HIGH if high else wan_files.LOW},
            "FrameMemoryLoraLoader": {"lora_name": wan_files.LORA_HIGH if high else wan_files.LORA_LOW},
            "VAELoader": {"vae_name": wan_files.VAE},
            "LoadImage": {"image": PICTURE_NAME},
            "FrameMemoryFirstFrameComposer": {"width": width, "height": height},
            "WanImageToVideo": {"length": frames},
            "KSamplerAdvanced": steps,
        }.get(node["class_type"], {})
        if node_id in loaders:
            node.update(class_type=ENCODERS, inputs={})
    return small


def frames_of(seconds: float) -> int:
    """Frames of a video of about so many seconds: 36 a section of 1.2 s, and the start picture."""
    return 36 * max(round(seconds / 1.2), 1) + 1


def cancelled(client, prompt: dict, node_id: str, steps: int = 2) -> tuple[str, list[int]]:
    """Run a graph, and cancel it when a node has shown so many steps: (id of the run, the steps that were shown)."""
    prompt_id = client.submit(prompt)

    def shown() -> list[int]:
        return [d["value"] for n, d in client.about(prompt_id) if n == "progress" and d["node"] == node_id]

    end = time.monotonic() + 600
    while len(shown()) < steps and time.monotonic() < end:
        time.sleep(0.05)
    client.interrupt()
    with pytest.raises(PromptError, match=f"Cancelled in {prompt[node_id]['class_type']}"):
        client.wait(prompt_id, timeout=600)
    return prompt_id, shown()


def progress_texts(messages: list) -> list[tuple[int, str, str]]:
    """(place, node id, text) of what nodes showed while they ran, from the server's binary messages."""
    found = []
    for place, (name, data) in enumerate(messages):
        if name == "binary" and data["event"] == 3:
            length = int.from_bytes(data["data"][:4], "big")
            found.append((place, data["data"][4 : 4 + length].decode(), data["data"][4 + length :].decode()))
    return found


def during(messages: list, prompt_id: str) -> list:
    """The messages from the start of a run to its end; binary ones do not say whose they are."""
    mine = [i for i, (_, data) in enumerate(messages) if data.get("prompt_id") == prompt_id]
    return messages[mine[0] : mine[-1] + 1]


def ui_graph(path: Path) -> dict:
    """A graph file as it was saved."""
    return json.loads(path.read_text(encoding="utf-8"))
