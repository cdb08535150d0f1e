"""Video Clips in the real server: lists for a trainer, files in the output folder, and folders it never leaves."""

import copy
import sys

import numpy as np
import pytest

from scripts.client import PromptError

from .tiny import REPO

sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from video.odd_videos import write_video

FOLDER, CACHE = "my videos ü", "frame_memory_clips"


def film(path, frames: int, colour: int) -> None:
    """A square that walks over one colour, with a caption."""
    pictures = np.full((frames, 48, 64, 3), colour, np.uint8)
    for t in range(frames):
        x = 40 - abs(t % 80 - 40)  # there and back: what leaps is taken for a cut
        pictures[t, 10:30, x : x + 20] = (250, 240, 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [round(1000 * i / 30) for i in range(frames)], size=(64, 48), frames=list(pictures))
    path.with_suffix(".txt").write_text(f"A yellow square walks over grey {colour}.", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(server):
    made = server.base / "input" / FOLDER
    film(made / "clip 2.mp4", 40, 60)
    film(made / "clip 10.mp4", 76, 90)
    film(made / "blink.mp4", 12, 90)
    return made


def graph(name: str = FOLDER) -> dict:
    return {
        "encoders": {"class_type": "FrameMemorySelfTestEncoders", "inputs": {}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "frame_memory_selftest_vae.safetensors"}},
        "clips": {
            "class_type": "FrameMemoryVideoClips",
            "inputs": {
                "folder": name, "clip": ["encoders", 0], "vae": ["vae", 0], "size": 64, "longest": 60.0,
                "shortest": 1.2, "clip_vision": ["encoders", 1],
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["clips", 0], "vae": ["vae", 0]}},
        "frames": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
        "count": {"class_type": "PreviewAny", "inputs": {"source": ["clips", 2]}},
    }  # fmt: skip


def test_a_folder_becomes_lists_and_its_latents_stay(server, folder):
    cache = server.base / "output" / CACHE
    before = set(cache.iterdir()) if cache.is_dir() else set()  # other graphs have kept clips there
    run = server.client.queue(graph(), timeout=300)
    report = run.outputs["clips"]["text"][0]
    assert (
        run.outputs["count"]["text"][0] == "2"
        and "2 clips from 2 of the 3 videos in the folder, 3.7 s in all, 64x48 at 30 fps" in report
    )
    assert "2 encoded now, 0 found in" in report and "Skipped blink.mp4: it has 0.40 s" in report
    assert len(run.outputs["frames"]["images"]) == 37 + 73, "VAE Decode ran once for each clip"
    kept = sorted(path.name for path in set(cache.iterdir()) - before)
    assert len(kept) == 4 and sum(name.endswith(".safetensors") for name in kept) == 2
    (folder / "clip 2.txt").write_text("Other words.", encoding="utf-8")
    again = server.client.queue(graph(), timeout=300).outputs["clips"]["text"][0]
    assert "0 encoded now, 2 found in" in again, "a changed caption is read, nothing is encoded"


@pytest.mark.parametrize("where", ["../output", "{root}/output", f"{FOLDER}/../..", "", "."])
def test_a_folder_that_a_link_brings_stays_inside_comfyuis_input_folder(server, folder, where):
    prompt = copy.deepcopy(graph())
    said = where.format(root=server.base.as_posix())
    prompt["said"] = {"class_type": "PrimitiveString", "inputs": {"value": said}}
    prompt["pick"] = {"class_type": "ComfySwitchNode", "inputs": {"switch": True}}
    prompt["pick"]["inputs"] |= {"on_true": ["said", 0], "on_false": ["said", 0]}
    prompt["clips"]["inputs"]["folder"] = ["pick", 0]
    with pytest.raises(
        PromptError, match="'Video Clips' was given the folder .*expected one inside ComfyUI's input folder"
    ):
        server.client.queue(prompt)
