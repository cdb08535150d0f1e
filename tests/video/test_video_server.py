"""Save Long Video inside the real server: stock latent and stock VAE loader in, a played file out."""

import av
import pytest
from safetensors.torch import save_file

from scripts.client import PromptError

from .reference import wan_state_dict


@pytest.fixture(scope="module")
def vae_file(server):
    folder = server.base / "models" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(wan_state_dict(4), folder / "tiny_for_video_tests.safetensors")
    return "tiny_for_video_tests.safetensors"


def graph(vae_file, **widgets):
    inputs = {"fps": 24.0, "filename_prefix": "video/long", "crf": 18.0, "decode": "windowed", **widgets}
    size = {"width": 64, "height": 48, "length": 109, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": vae_file}},
        "3": {"class_type": "FrameMemorySaveLongVideo", "inputs": {"samples": ["1", 0], "vae": ["2", 0], **inputs}},
    }


def test_a_stock_graph_saves_a_long_video(server, vae_file):
    run = server.client.queue(graph(vae_file))
    (file,) = run.outputs["3"]["images"]
    assert file["type"] == "output" and run.outputs["3"]["animated"] == [True]
    path = server.base / "output" / file["subfolder"] / file["filename"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert sum(1 for _ in container.decode(stream)) == 109
        assert stream.average_rate == 24 and (stream.width, stream.height) == (64, 48)
        assert "FrameMemorySaveLongVideo" in container.metadata["prompt"]
    totals = {data["max"] for data in run.of("progress") if data["node"] == "3"}
    assert totals == {3}, "windows of 28 latent frames"


def test_the_saved_video_goes_on_to_stock_nodes(server, vae_file):
    prompt = graph(vae_file, filename_prefix="video/on")
    save = {"video": ["3", 0], "filename_prefix": "video/copy", "format": "mp4", "codec": "auto"}
    prompt["4"] = {"class_type": "SaveVideo", "inputs": save}
    run = server.client.queue(prompt)
    (file,) = run.outputs["4"]["images"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 109
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)


def test_the_help_page_is_served(server):
    page = server.client.get("/extensions/frame-memory/docs/FrameMemorySaveLongVideo.md").decode("utf-8")
    assert page.startswith("# Save Long Video")


def test_fault_22_the_wrong_vae_is_named_on_the_node(server, vae_file):
    """An image VAE on a video latent: the artist reads which node to change."""
    prompt = graph("pixel_space")
    with pytest.raises(PromptError, match="'Load VAE'.*expected a video VAE"):
        server.client.queue(prompt)
