"""FFGo's graphs on the real server: Wan 2.2 as stand-ins of its topology, FramePack as the self-test model."""

import av
import numpy as np
import pytest
from PIL import Image

from scripts.workflow import set_inputs

from .tiny import REPO, SELFTEST_VIDEOS, START_PICTURE, during, one, progress_texts, saver, shrink, shrink_wan, ui_graph

COMPOSER, DROP = "FrameMemoryFirstFrameComposer", "FrameMemoryDropTransitionFrames"


def path_of(server, run, node: str):
    (file,) = run.outputs[node]["images"]
    return server.base / "output" / file["subfolder"] / file["filename"]


def frames_in(path) -> tuple[np.ndarray, float]:
    """(frames [T, H, W, 3], frames a second)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


def shown(run, node: str) -> str:
    """The text on a node after the run."""
    return "\n".join(run.outputs[node]["text"])


def said(run, node: str) -> str:
    """What a node showed last."""
    return [text for _, n, text in progress_texts(during(run.messages, run.prompt_id)) if n == node][-1]


# A width and a strength of its own for each: what another run has left would be reused, and its nodes say nothing.
GRAPHS = {"ffgo_wan22": (96, 0.9), "ffgo_wan22_fast": (112, 0.8)}


@pytest.fixture(scope="module", params=GRAPHS)
def made(request, server, api, wan_stand_ins):
    """(API graph, run, path of the mp4)."""
    path, (width, strength) = REPO / "workflows" / f"{request.param}.json", GRAPHS[request.param]
    prompt = set_inputs(shrink_wan(api(path), width=width), "FrameMemoryLoraLoader", {"strength": strength})
    run = server.client.queue(prompt, timeout=900, workflow=ui_graph(path))
    return prompt, run, path_of(server, run, saver(prompt))


def test_the_clip_is_made_at_the_size_of_the_canvas_without_its_frames(made):
    prompt, run, path = made
    frames, rate = frames_in(path)
    size = one(prompt, COMPOSER)[1]["inputs"]
    assert frames.shape == (13 - 4, size["height"], size["width"], 3) and rate == 16
    assert frames.std() > 4
    assert "13 frames: 4 dropped, 9 kept" in shown(run, one(prompt, DROP)[0])


def test_every_lora_fits_and_the_canvas_holds_three_pictures_and_the_place(made):
    prompt, run, _ = made
    for node in [i for i, n in prompt.items() if n["class_type"] == "FrameMemoryLoraLoader"]:
        report = shown(run, node)
        assert "401 of 401 modules matched (100%)" in report and "Warning" not in report
    composer, text = one(prompt, COMPOSER)[0], one(prompt, "FrameMemoryFFGoPrompt")[0]
    placed = [picture["name"] for picture in run.outputs[composer]["frame_memory_pictures"]]
    assert sorted(placed) == ["1", "2", "3", "background"]
    assert prompt[text]["inputs"]["references"] == [composer, 2]
    assert shown(run, text).startswith("Nothing to warn of"), "a node shows few lines: what matters comes first"
    assert "\n\nad23r2 the camera view suddenly changes. Film quality" in shown(run, text)


def test_wan_goes_on_from_the_last_five_frames(server, api, wan_stand_ins):
    """A clip without a canvas stays whole; the new part begins where it ends."""
    prompt = shrink_wan(api(REPO / "workflows" / "ffgo_continue_wan.json"))
    prompt[one(prompt, "LoadVideo")[0]]["inputs"]["file"] = SELFTEST_VIDEOS[0].name
    run = server.client.queue(prompt, timeout=900)
    frames, rate = frames_in(path_of(server, run, saver(prompt)))
    before, _ = frames_in(SELFTEST_VIDEOS[0])
    assert "0 dropped" in shown(run, one(prompt, DROP)[0])
    assert len(frames) == len(before) + 13 - 5 and rate == 16
    assert np.abs(frames[: len(before)].astype(int) - before).mean() < 4, "the clip's own pictures"


def test_framepack_goes_on_from_a_clip_at_16_frames_a_second(server, api, tmp_path):
    start = np.asarray(Image.open(START_PICTURE).convert("RGB"))
    clip = [np.roll(start, i, axis=1) for i in range(32)]
    with av.open(str(tmp_path / "ffgo.mp4"), "w") as container:
        stream = container.add_stream("h264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    prompt = shrink(api(REPO / "workflows" / "ffgo_continue.json"), seconds=1.2, steps=1)
    prompt[one(prompt, "LoadVideo")[0]]["inputs"]["file"] = server.client.upload_image(
        tmp_path / "ffgo.mp4", "ffgo.mp4"
    )
    prompt[one(prompt, "FrameMemoryVideoHistory")[0]]["inputs"]["size"] = 64
    run = server.client.queue(prompt, timeout=900)
    frames, rate = frames_in(path_of(server, run, one(prompt, "FrameMemoryJoinVideos")[0]))
    assert rate == 30 and len(frames) == 60 - 2 + 36, "2 s at 30 frames a second without the first picture, a section"
    report = said(run, one(prompt, "FrameMemoryVideoHistory")[0])
    assert "30 fps" in report and "Used from 0.07 to 2.00 s" in report
    first = [np.abs(frames[0].astype(int) - clip[i]).mean() for i in range(4)]
    assert first.index(min(first)) == 1, "the frame that may hold a ghost of the canvas is left out"
