"""The three nodes in the real server: canvas, layout, report; the trigger; frames dropped from images and video."""

from __future__ import annotations

import wave

import av
import numpy as np
import pytest

from scripts.client import PromptError

from .graphs import DROP, PROMPT, colour, composer, pictures_of, preview, text


def test_references_from_sockets_that_grow_are_composed(server):
    graph = {
        "red": colour(0xFF0000, 100, 50),
        "blue": colour(0x0000FF, 400, 400),
        "green": colour(0x00FF00, 64, 36),
        "canvas": composer(**{"references.reference_1": ["red", 0], "references.reference_2": ["blue", 0],
                              "background": ["green", 0]}),
        "seen": preview("canvas"), "report": text("canvas", 3), "count": text("canvas", 2),
    }  # fmt: skip
    run = server.client.queue(graph)
    (picture,) = pictures_of(server, run, "seen")
    assert picture.shape == (192, 320, 3)
    assert tuple(picture[48, 80]) == (255, 0, 0) and tuple(picture[144, 80]) == (0, 0, 255)
    assert tuple(picture[96, 240]) == (0, 255, 0) and tuple(picture[2, 318]) == (255, 255, 255)
    report = run.outputs["report"]["text"][0]
    assert "reference 1: 30, 23, 100 x 50" in report and "background: 160, 51, 160 x 90" in report
    assert run.outputs["count"]["text"][0] == "2"
    assert {f["name"] for f in run.outputs["canvas"]["frame_memory_pictures"]} == {"background", "1", "2"}


def test_free_boxes_and_masks_reach_the_canvas(server):
    graph = {
        "red": colour(0xFF0000, 100, 100),
        "mask": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 100, "height": 100}},
        "canvas": composer(**{"references.reference_1": ["red", 0], "masks.mask_1": ["mask", 0],
                              "layout": "free boxes", "boxes": "1: 10, 20, 60 x 60"}),
        "seen": preview("canvas"),
    }  # fmt: skip
    (picture,) = pictures_of(server, server.client.queue(graph), "seen")
    rows, columns = np.nonzero(picture[..., 1] == 0)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 79, 10, 69)


def test_boxes_that_cannot_be_read_are_refused_on_the_node(server):
    node = composer(**{"references.reference_1": ["red", 0], "layout": "free boxes", "boxes": "1: a"})
    with pytest.raises(PromptError, match="Line 1 of 'boxes' of 'First Frame Composer'"):
        server.client.queue({"red": colour(0xFF0000, 10, 10), "canvas": node, "seen": preview("canvas")})


def test_fault_28_nothing_connected_is_refused_by_name(server):
    with pytest.raises(PromptError, match="'First Frame Composer' has nothing to place"):
        server.client.queue({"canvas": composer(), "seen": preview("canvas")})


def test_fault_28_a_background_alone_is_made_and_noted(server):
    graph = {"place": colour(0x00FF00, 64, 36), "canvas": composer(background=["place", 0]), "seen": preview("canvas")}
    run = server.client.queue({**graph, "report": text("canvas", 3)})
    assert "Note: There are no references: connect" in run.outputs["report"]["text"][0]


def test_fault_31_ten_references_of_different_sizes_are_all_there(server):
    colours = [0x200000 + 0x140000 * i + 0x000010 * i for i in range(10)]
    sizes = [(1, 1), (9, 300), (300, 9), (64, 64), (7, 8), (100, 50), (31, 77), (500, 400), (16, 16), (3, 2)]
    graph = {str(i): colour(colours[i - 1], *sizes[i - 1]) for i in range(1, 11)}
    graph["canvas"] = composer(height=448, **{f"references.reference_{i}": [str(i), 0] for i in range(1, 11)})
    run = server.client.queue({**graph, "seen": preview("canvas"), "report": text("canvas", 3)})
    (picture,) = pictures_of(server, run, "seen")
    packed = picture.astype(int) @ (0x10000, 0x100, 1)
    assert set(colours) <= set(packed.ravel().tolist())
    report = run.outputs["report"]["text"][0]
    assert all(f"\nreference {i}: " in report for i in range(1, 11)) and "10 references: FFGo was validated" in report
    assert "Note: reference 1 is only 1x1 pixels" in report


def test_a_number_stays_with_its_socket_and_a_batch_makes_canvases(server):
    graph = {
        "red": colour(0xFF0000, 40, 40, 3), "blue": colour(0x0000FF, 40, 40),
        "mask": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}},
        "canvas": composer(**{"references.reference_2": ["red", 0], "references.reference_4": ["blue", 0],
                              "masks.mask_4": ["mask", 0], "layout": "free boxes", "boxes": "4: 8, 16, 64 x 64"}),
        "seen": preview("canvas"), "report": text("canvas", 3), "count": text("canvas", 2),
    }  # fmt: skip
    run = server.client.queue(graph)
    pictures = pictures_of(server, run, "seen")
    assert len(pictures) == 3 and all(np.array_equal(p, pictures[0]) for p in pictures)
    rows, columns = np.nonzero((pictures[0] == (0, 0, 255)).all(-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (8, 16, 71, 79)
    report = run.outputs["report"]["text"][0]
    assert "reference 2 has no box" in report and "3 canvases" in report and run.outputs["count"]["text"][0] == "2"
    assert [f["name"] for f in run.outputs["canvas"]["frame_memory_pictures"]] == ["2", "4"]


def test_the_trigger_is_put_in_front(server):
    graph = {
        "prompt": {"class_type": PROMPT, "inputs": {"caption": "A cat.", "names": "cat, dog", "references": 2}},
        "made": text("prompt", 0), "report": text("prompt", 2),
    }  # fmt: skip
    run = server.client.queue(graph)
    assert run.outputs["made"]["text"][0] == "ad23r2 the camera view suddenly changes. A cat."
    assert "'dog'" in run.outputs["report"]["text"][0]


@pytest.mark.parametrize(("drop", "left"), [("4 (official)", 77), ("5 (safe)", 76), ("find the cut", 75)])
def test_81_frames_become_77_or_76_and_a_cut_is_found(server, drop, left):
    graph = {
        "canvas": colour(0xFFFFFF, 32, 32, 6), "scene": colour(0x204060, 32, 32, 75),
        "clip": {"class_type": "ImageBatch", "inputs": {"image1": ["canvas", 0], "image2": ["scene", 0]}},
        "drop": {"class_type": DROP, "inputs": {"video": ["clip", 0], "drop": drop}},
        "seen": preview("drop"), "report": text("drop", 2),
    }  # fmt: skip
    run = server.client.queue(graph)
    assert len(run.outputs["seen"]["images"]) == left
    assert f"81 frames: {81 - left} dropped, {left} kept" in run.outputs["report"]["text"][0]


def test_video_keeps_its_rate_and_latents_are_refused(server):
    graph = {
        "clip": colour(0x204060, 32, 32, 9),
        "video": {"class_type": "CreateVideo", "inputs": {"images": ["clip", 0], "fps": 16.0}},
        "drop": {"class_type": DROP, "inputs": {"video": ["video", 0], "drop": "4 (official)"}},
        "parts": {"class_type": "GetVideoComponents", "inputs": {"video": ["drop", 1]}},
        "fps": text("parts", 2), "seen": preview("parts"),
    }  # fmt: skip
    run = server.client.queue(graph)
    assert float(run.outputs["fps"]["text"][0]) == 16.0 and len(run.outputs["seen"]["images"]) == 5
    inputs = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    made = {"class_type": "GetVideoComponents", "inputs": {"video": ["drop", 1]}}
    of_images = {
        **graph,
        "drop": {**graph["drop"], "inputs": {"video": ["clip", 0], "drop": "5 (safe)"}},
        "parts": made,
    }
    run = server.client.queue({**of_images, "kept": preview("drop")})
    assert len(run.outputs["kept"]["images"]) == 4 and "seen" not in run.outputs
    assert any("no frame rate" in error["exception_message"] for error in run.of("execution_error"))
    graph["latent"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": inputs}
    graph["drop"]["inputs"]["video"] = ["latent", 0]
    with pytest.raises(PromptError, match="inside latent frame 1"):
        server.client.queue(graph)


def test_fault_32_sound_of_a_video_stays_in_time(server):
    """9 frames at 16 a second with sound whose samples count up: what is left begins at sample 4/16 of a second."""
    rate, made = 16000, np.arange(9 * 1000, dtype="<i2")
    with wave.open(str(server.base / "input" / "counting.wav"), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(made.tobytes())
    graph = {
        "clip": colour(0x204060, 32, 32, 9),
        "sound": {"class_type": "LoadAudio", "inputs": {"audio": "counting.wav"}},
        "video": {"class_type": "CreateVideo", "inputs": {"images": ["clip", 0], "fps": 16.0, "audio": ["sound", 0]}},
        "drop": {"class_type": DROP, "inputs": {"video": ["video", 0], "drop": "4 (official)"}},
        "parts": {"class_type": "GetVideoComponents", "inputs": {"video": ["drop", 1]}},
        "saved": {"class_type": "SaveAudio", "inputs": {"audio": ["parts", 1], "filename_prefix": "left"}},
    }  # fmt: skip
    (file,) = server.client.queue(graph).outputs["saved"]["audio"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        left = np.concatenate([f.to_ndarray().ravel() for f in container.decode(audio=0)]).astype(int)
    left = left >> 16 if left.max() > 1 << 16 else left
    assert left.size == 5000 and abs(int(left[0]) - 4000) <= 1 and abs(int(left[-1]) - 8999) <= 1


def test_fault_28_a_video_of_one_frame_is_refused(server):
    graph = {
        "clip": colour(0, 32, 32),
        "drop": {"class_type": DROP, "inputs": {"video": ["clip", 0], "drop": "5 (safe)"}}, "seen": preview("drop"),
    }  # fmt: skip
    with pytest.raises(PromptError, match="drop 5 of 1 frames"):
        server.client.queue(graph)
