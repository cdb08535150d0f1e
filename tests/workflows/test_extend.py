"""Extending and bridging existing videos, on the real server: the example graph, and files as people have them."""

import copy
import sys

import numpy as np
import pytest

from benchmarks.ship_clips import AFTER, BEFORE, pictures
from frame_memory.video.history import read_video
from frame_memory.video.source import probe_video
from scripts import workflow
from scripts.client import PromptError

from .tiny import FILES, REPO, SELFTEST_VIDEOS, during, one, progress_texts, shrink

sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from video.odd_videos import pitch_of, read_sound, write_video
from video.probe import check_video

HISTORY, SAMPLER, JOIN = "FrameMemoryVideoHistory", "FrameMemoryAntiDriftSampler", "FrameMemoryJoinVideos"
UNEVEN = [0, 40, 90, 120, 200, 260, 300, 380, 400, 470, 520, 600]


@pytest.fixture(scope="module")
def graph(api):
    """The example graph with one section of one step."""
    return shrink(api(REPO / "workflows" / "extend_and_bridge.json"), seconds=1.2, steps=1)


def said(run, prompt, class_type) -> str:
    """What a node showed last."""
    node = one(prompt, class_type)[0]
    return [text for _, n, text in progress_texts(during(run.messages, run.prompt_id)) if n == node][-1]


def joined(server, prompt):
    """(run, path of the joined file)."""
    run = server.client.queue(prompt, timeout=900)
    (file,) = run.outputs[one(prompt, JOIN)[0]]["images"]
    return run, server.base / "output" / file["subfolder"] / file["filename"]


def without(prompt, *links):
    """A copy without some inputs: (class, input)."""
    changed = copy.deepcopy(prompt)
    for class_type, name in links:
        del one(changed, class_type)[1]["inputs"][name]
    return changed


def test_the_shipped_videos_show_the_world_with_a_hole_of_two_sections():
    assert AFTER.start - BEFORE.stop == 72
    for path, frames in zip(SELFTEST_VIDEOS, (BEFORE, AFTER), strict=True):
        got = np.concatenate(list(read_video(probe_video(path), size=(64, 64))))
        assert len(got) == len(frames) and np.abs(got.astype(int) - pictures(frames)).mean() < 3
        assert path.stat().st_size < 20_000


def test_the_graph_bridges_two_videos(server, graph):
    run, path = joined(server, graph)
    seen = check_video(path, len(BEFORE) + 36 + len(AFTER), 30, (64, 64))
    assert seen.audio[0] == "aac" and seen.audio[3] == pytest.approx(seen.seconds, abs=0.05)
    frames = np.concatenate(list(read_video(probe_video(path), size=(64, 64)))).astype(int)
    assert np.abs(frames[:46] - pictures(BEFORE)[:46]).mean() < 4, "the first video's own pictures"
    assert np.abs(frames[-len(AFTER) :] - pictures(AFTER)).mean() < 4, "the second video's own pictures"
    assert frames[61:97].std() > 20
    report = said(run, graph, HISTORY)
    assert "61 frames = 16 latent frames" in report and "Sound: none in the file" in report
    assert "Bridge: the new part ends with the picture at 0.00 s of the second video (F0 only)." in report
    assert "2.03 to 3.23 s: new" in said(run, graph, JOIN)


def test_fault_26_and_32_a_turned_ten_bit_file_of_variable_rate_with_sound_is_extended(server, graph, tmp_path):
    """F1, without a bridge. 0.68 s of uneven pictures become 20 frames; their sound stays, to the hundredth second."""
    write_video(tmp_path / "odd.mp4", UNEVEN, size=(64, 96), pix_fmt="yuv420p10le", rotation=90, audio_seconds=0.68)
    prompt = without(graph, (HISTORY, "bridge_to"), (JOIN, "then"))
    loaders = [node for node in prompt.values() if node["class_type"] == "LoadVideo"]
    for node in loaders:
        node["inputs"]["file"] = server.client.upload_image(tmp_path / "odd.mp4", "odd.mp4")
    prompt = workflow.set_inputs(prompt, "FrameMemoryLoadFramePack", {"model_name": FILES["F1"]})
    prompt = workflow.set_inputs(prompt, "FrameMemoryContextPacker", {"preset": "F1 forward"})
    prompt = workflow.set_inputs(prompt, SAMPLER, {"project": "odd"})
    run, path = joined(server, prompt)
    frames = round(probe_video(tmp_path / "odd.mp4").seconds * 30)
    seen = check_video(path, frames + 36, 30, (80, 48))
    assert seen.audio[:3] == ("aac", 44100, 1) and seen.audio[3] == pytest.approx((frames + 36) / 30, abs=0.05)
    samples, rate, begin = read_sound(path)
    assert begin == pytest.approx(0, abs=0.03)
    assert pitch_of(samples[2000 : round(0.3 * rate)], rate) == pytest.approx(440, abs=8)
    assert pitch_of(samples[round(0.4 * rate) : round(0.6 * rate)], rate) == pytest.approx(1000, abs=8)
    assert np.abs(samples[round(0.9 * rate) : round(1.5 * rate)]).max() < 0.01
    report = said(run, prompt, HISTORY)
    for words in (
        "Variable frame rate",
        "Turned upright",
        "10 bits",
        "Put onto 30 fps by time",
        "Sound: aac, 44100 Hz",
    ):
        assert words in report


def test_f1_refuses_to_bridge_and_names_the_node_before_the_first_step(server, graph):
    prompt = workflow.set_inputs(graph, "FrameMemoryLoadFramePack", {"model_name": FILES["F1"]})
    prompt = workflow.set_inputs(prompt, "FrameMemoryContextPacker", {"preset": "F1 forward"})
    before = len(server.client.messages)
    with pytest.raises(PromptError, match="F1 cannot aim at an end picture.*'bridge_to' out of 'Video History'"):
        server.client.queue(prompt, timeout=600)
    sampler = one(prompt, SAMPLER)[0]
    assert not [d for n, d in server.client.messages[before:] if n == "progress" and d["node"] == sampler]
