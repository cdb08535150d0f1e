"""Folders of clips: what is found, what is skipped and why, and the nodes in the real server up to a trained LoRA."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from frame_memory.plan.first_frame_prompt import TRIGGER
from frame_memory.video import ffgo_clips
from frame_memory.video.canvas import CanvasLook
from scripts.client import PromptError

from . import clip_folders as folders

SIZE = (folders.WIDTH, folders.HEIGHT)


def reader(folder, length: int = 13, start: int = 0, size=SIZE, **look) -> ffgo_clips.Reader:
    return ffgo_clips.Reader(folder, size, length, start, CanvasLook(**look), lambda: None)


def test_clips_with_ready_and_composed_canvases_are_read_frame_by_frame(tmp_path):
    read = reader(folders.make(tmp_path), length=9, start=2)
    made = list(read.frames())
    assert [clip.name for clip, _ in made] == ["clip_0.mp4", "clip_1.mp4"]
    for clip, frames in made:
        assert clip.caption.startswith(f"{TRIGGER} Clip") and clip.caption.count(TRIGGER) == 1
        assert frames.shape == (9, 64, 96, 3) and frames.min() >= 0 and frames.max() <= 1
        assert [folders.numbered.number_of(f.mul(255).numpy()) for f in frames] == list(range(2, 11))
    ready, composed = (np.asarray(clip.canvas_HWC.mul(255).round()) for clip, _ in made)
    assert (ready == (200, 40, 40)).all()
    # main_entity, object_2, object_10 in thirds of the left half; the background in the middle of the right one.
    assert [tuple(composed[y, 24]) for y in (10, 31, 52)] == [(0, 0, 180), (0, 0, 120), (0, 0, 60)]
    assert tuple(composed[32, 72]) == (0, 120, 0) and tuple(composed[2, 72]) == (255, 255, 255)
    assert "2 of 2 clips used: 9 frames of 96x64" in read.report() and "Note: 2 clips; FFGo was" in read.report()


def test_what_cannot_be_used_is_skipped_with_its_reason_and_the_rest_is_kept(tmp_path):
    folders.make(tmp_path, 1)
    reasons = folders.spoil(tmp_path)
    read = reader(tmp_path)
    assert [clip.name for clip, _ in read.frames()] == ["clip_0.mp4"]
    assert set(read.why) == set(reasons)
    assert all(part in read.why[name] for name, part in reasons.items()), read.why
    assert all(f"Skipped {name}: " in read.report() for name in reasons)
    (tmp_path / "clip_0.txt").unlink()
    with pytest.raises(ffgo_clips.DatasetError, match=r"can use none of 8 clips:\n- (.|\n)*- short\.mp4: it has 5"):
        reader(tmp_path)


def test_the_published_list_is_read_and_never_leaves_its_folder(tmp_path):
    reasons = folders.published(tmp_path)
    read = reader(tmp_path)
    ((clip, frames),) = read.frames()
    assert clip.caption == f"{TRIGGER} A ball." and len(frames) == 13
    said = {name.split(" (")[0]: why for name, why in read.why.items()}
    assert set(said) == set(reasons) and all(part in said[name] for name, part in reasons.items()), said


def test_cancel_stops_between_clips(tmp_path):
    class Cancelled(Exception):
        pass

    read, seen = reader(folders.make(tmp_path)), []

    def cancel():
        if seen:
            raise Cancelled

    read.interrupt = cancel
    with pytest.raises(Cancelled):
        for clip, _ in read.frames():
            seen.append(clip.name)
    assert seen == ["clip_0.mp4"]


def test_files_that_begin_with_a_dot_are_no_clips_and_no_pictures(tmp_path):
    folders.make(tmp_path, 2)
    for name in ("._clip_0.mp4", "._list.json", "clip_1/._background.png", "clip_1/._main_entity.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    read = reader(tmp_path)
    assert len(list(read.frames())) == 2 and not read.why


def test_rates_shapes_and_empty_folders(tmp_path):
    folders.make(tmp_path, 1)
    folders.video(tmp_path / "clip_0.mp4", rate=24, width=128, height=64)
    folders.plain(tmp_path / "clip_0.png", (50, 60, 70), (64, 64))
    read = reader(tmp_path, canvas_colour="#0000ff")
    ((clip, frames),) = read.frames()
    assert "Wan plays 16 frames a second" in read.report() and "clip_0.mp4 (24)" in read.report()
    assert "canvas of 64x64 got borders" in read.report() and frames.shape == (13, 64, 96, 3)
    canvas = np.asarray(clip.canvas_HWC.mul(255).round())
    assert tuple(canvas[32, 2]) == (0, 0, 255) and tuple(canvas[32, 48]) == (50, 60, 70)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ffgo_clips.DatasetError, match=r"empty has no videos \(\.mp4"):
        reader(tmp_path / "empty")
    with pytest.raises(ffgo_clips.DatasetError, match="no folder 'none'"):
        reader(tmp_path / "none")


@pytest.fixture(scope="module")
def clips(server):
    folders.make(server.base / "input" / "few_shots")
    return "few_shots"


def dataset(clips: str, **inputs) -> dict:
    usual = {"folder": clips, "clip": ["text", 0], "vae": ["vae", 0], "width": 96, "height": 64, "length": 13}
    return {
        "text": {"class_type": "FrameMemorySelfTestEncoders", "inputs": {}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "frame_memory_selftest_wan_vae.safetensors"}},
        "data": {"class_type": "FrameMemoryFFGoDataset", "inputs": {**usual, **inputs}},
    }


def test_the_node_hands_on_lists_and_shows_its_canvases(server, clips):
    graph = {
        **dataset(clips),
        "seen": {"class_type": "PreviewImage", "inputs": {"images": ["data", 2]}},
        "count": {"class_type": "PreviewAny", "inputs": {"source": ["data", 3]}},
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["data", 0], "vae": ["vae", 0]}},
        "frames": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
    }
    run = server.client.queue(graph)
    assert run.outputs["count"]["text"][0] == "2" and len(run.outputs["seen"]["images"]) == 2
    assert "2 of 2 clips used" in run.outputs["data"]["text"][0]
    frames = run.outputs["frames"]["images"]
    assert len(frames) == 2 * 13, "VAE Decode ran once for each clip"
    first = np.asarray(Image.open(server.base / "temp" / frames[0]["filename"])).astype(float)
    assert np.abs(first.mean(axis=(0, 1)) - (200, 40, 40)).max() < 25, "begins with its red canvas"


def test_a_changed_folder_is_read_again_and_bad_requests_are_refused(server, clips):
    graph = {**dataset(clips), "count": {"class_type": "PreviewAny", "inputs": {"source": ["data", 3]}}}
    graph["data"]["inputs"]["length"] = 10
    with pytest.raises(PromptError, match="nearest is 9 frames of 96x64"):
        server.client.queue(graph)
    graph["data"]["inputs"]["length"] = 9
    assert server.client.queue(graph).outputs["count"]["text"][0] == "2"
    extra = server.base / "input" / clips
    folders.video(extra / "late.mp4")
    folders.caption(extra / "late.txt")
    folders.plain(extra / "late.png", (1, 2, 3))
    try:
        assert server.client.queue(graph).outputs["count"]["text"][0] == "3"
    finally:
        for path in extra.glob("late.*"):
            path.unlink()


@pytest.mark.parametrize("where", ["../secret", "{root}/secret", "few_shots/../../secret", "", "."])
def test_a_folder_that_a_link_brings_stays_inside_comfyuis_input_folder(server, clips, where):
    """A socket of any type passes core's check of the list, and with it any path."""
    secret = folders.make(server.base / "secret", 1)
    graph = {**dataset(clips), "count": {"class_type": "PreviewAny", "inputs": {"source": ["data", 3]}}}
    said = where.format(root=secret.parent.as_posix())
    graph["said"] = {"class_type": "PrimitiveString", "inputs": {"value": said}}
    graph["pick"] = {"class_type": "ComfySwitchNode", "inputs": {"switch": True}}
    graph["pick"]["inputs"] |= {"on_true": ["said", 0], "on_false": ["said", 0]}
    graph["data"]["inputs"]["folder"] = ["pick", 0]
    with pytest.raises(PromptError, match="expected one inside ComfyUI's input folder"):
        server.client.queue(graph)
