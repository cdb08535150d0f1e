"""The three nodes in the real server: canvas, layout, report; the trigger; frames dropped from images and video."""

from __future__ import annotations

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
    assert run.outputs["canvas"]["boxes"][0].splitlines()[1] == "1: 30, 23, 100 x 50"
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
    graph = {"red": colour(0xFF0000, 10, 10), "seen": preview("canvas"),
             "canvas": composer(**{"references.reference_1": ["red", 0], "layout": "free boxes", "boxes": "1: a"})}  # fmt: skip
    with pytest.raises(PromptError, match="Line 1 of 'boxes' of 'First Frame Composer'"):
        server.client.queue(graph)


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
    graph["latent"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": inputs}
    graph["drop"]["inputs"]["video"] = ["latent", 0]
    with pytest.raises(PromptError, match="inside latent frame 1"):
        server.client.queue(graph)
