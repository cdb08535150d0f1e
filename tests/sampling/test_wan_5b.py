"""Wan 2.2 5B from picture to mp4 with its own VAE of 48 channels at 16x16x4, and what is said of CLIP vision."""

from __future__ import annotations

import av
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.ldm.wan import vae2_2
from comfy.taesd.taehv import TAEHV

from frame_memory.plan import decode_windows, section_tokens
from frame_memory.sampling.long_video import Live
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.video.decode import decode_stream
from frame_memory.video.save import WINDOWED, plan_save, save_video
from frame_memory.video.start_image import prepare
from frame_memory.video.vae import WAN, WAN_5B, identify_vae

from .wan_runs import attached, made, reference, sections

TI2V = "2.2 TI2V 5B"
HEIGHT, WIDTH = 4, 8


class Narrow(vae2_2.WanVAE):
    """Core's class at width 8: core's loader only knows the published width."""

    def __init__(self, dim, **more):
        super().__init__(8, dec_dim=8, **more)


@pytest.fixture(scope="module")
def vae():
    """Made by core's own loader, from random weights that keep colours alive."""
    with torch.device("meta"):
        empty = Narrow(160, z_dim=48, temperal_downsample=[False, True, True])
    weights = {}
    for index, (name, value) in enumerate(empty.state_dict().items()):
        shape = value.shape
        scale = 0.1 if len(shape) < 2 else shape[1:].numel() ** -0.5
        weights[name] = torch.ones(shape) if name.endswith("gamma") else scale * reference.drawn(*shape, seed=index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae2_2, "WanVAE", Narrow)
        made = comfy.sd.VAE(sd=weights)
    made.throw_exception_if_invalid()
    return made


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def coarse(video_THWC: np.ndarray) -> np.ndarray:
    """Means over 16x16 pixels: of a random VAE's, chroma at half size loses the rest."""
    frames, _, _, colours = video_THWC.shape
    return video_THWC.astype(np.float32).reshape(frames, HEIGHT, 16, WIDTH, 16, colours).mean((2, 4))


def start_of(vae) -> dict:
    picture = torch.rand(1, 70, 110, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        prepared = prepare(vae, None, picture, None, 96, "black")
    assert prepared.start["samples"].shape == (1, 48, 1, HEIGHT, WIDTH)
    assert prepared.start["frame_memory"] == {"base": WAN_5B}
    assert "CLIP" not in prepared.report  # none of these models looks through one
    return prepared.start


def test_a_picture_becomes_a_video_at_16_pixels_a_latent_and_24_fps(vae, tmp_path):
    model, start = attached(TI2V), start_of(vae)
    counts: list[int] = []
    model.set_model_attn1_patch(lambda args: counts.append(args["x"].shape[1]) or args["x"])
    done = made(model, TI2V, start=start, live=Live(vae), project=ProjectRequest(tmp_path, "p"))
    samples, mark = done.latent["samples"], done.latent["frame_memory"]
    assert samples.shape == (1, 48, 7, HEIGHT, WIDTH)
    assert (mark["base"], mark["fps"], mark["window"]) == (WAN_5B, 24, 2)
    assert "Warning" not in done.report
    # As the packer counts, whose tooltip has the sizes of 5B halved: it takes 8 pixels for one of the latent.
    assert max(counts) == section_tokens(sections(3)[-1], HEIGHT, WIDTH, image_tokens=0).total

    pictures = frames_of(done.video)
    with torch.inference_mode():
        windows = decode_windows("forward", 7, 2)
        expected = torch.cat(list(decode_stream(vae.decode, samples, windows))).clamp(0, 1).numpy() * 255
    assert pictures.shape == expected.shape == (25, 16 * HEIGHT, 16 * WIDTH, 3)
    error, other = (np.abs(coarse(pictures[: 25 - n]) - coarse(expected[n:])).mean() for n in (0, 4))
    assert error < 0.2 * other  # what H.264 loses, against another latent frame

    plan = plan_save(vae, done.latent)
    assert (plan.mode, plan.fps, plan.width, plan.height) == (WINDOWED, 24, 16 * WIDTH, 16 * HEIGHT)
    with torch.inference_mode():
        written = save_video(plan, vae, tmp_path / "again.mp4")
    assert written.frames == 25 and np.abs(coarse(frames_of(written.path)) - coarse(pictures)).mean() < 0.2 * other


@pytest.mark.parametrize(("channels", "family", "spatial"), [(48, WAN_5B, 16), (16, WAN, 8)])
def test_tiny_vaes_of_wan_belong_to_it_and_who_looks_through_clip_vision_is_said(channels, family, spatial):
    tiny = comfy.sd.VAE(sd=TAEHV(channels, latent_format=None).state_dict())
    found = identify_vae(tiny)
    assert (found.family, found.channels, found.spatial, found.temporal) == (family, channels, spatial, 4)
    with torch.inference_mode():
        report = prepare(tiny, None, torch.rand(1, 32, 32, 3), None, 32, "black").report
    assert ("of Wan only 2.1 image to video looks through one" in report) == (family == WAN)
    assert "through the start latent alone" not in report
