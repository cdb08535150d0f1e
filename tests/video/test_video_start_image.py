"""Start and end picture together, with the self-test's own VAE and encoders."""

from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch

from frame_memory.model.selftest import SelfTestVision
from frame_memory.video.images import ImageError, to_bucket
from frame_memory.video.start_image import prepare
from frame_memory.video.vae import VAEError

from .reference import shipped_vae

FILE = Path(__file__).resolve().parents[2] / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(FILE)))


def pictures():
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(1, 64, 96, 3, generator=generator)
    end = torch.rand(1, 120, 80, 4, generator=generator)
    return start, end


def test_vision_is_the_mean_of_both_pictures_and_the_report_names_both(vae):
    start, end = pictures()
    with torch.inference_mode():
        made = prepare(vae, SelfTestVision(), start, end, 64, "black")
        alone = prepare(vae, SelfTestVision(), start, None, 64, "black")
        height, width = made.picture_BHWC.shape[1:3]
        fitted, _ = to_bucket(end, width, height, background="black")
        seen = [SelfTestVision().encode_image(p, crop=False).last_hidden_state for p in (made.picture_BHWC, fitted)]
    assert torch.allclose(made.vision.last_hidden_state, (seen[0] + seen[1]) / 2)
    assert torch.equal(alone.vision.last_hidden_state, seen[0]) and not torch.allclose(seen[0], seen[1])
    assert torch.equal(made.start["samples"], alone.start["samples"]) and alone.end is None
    assert made.end["samples"].shape == made.start["samples"].shape == (1, 16, 1, height // 8, width // 8)
    assert made.end["frame_memory"] == made.start["frame_memory"] == {"base": "selftest"}
    first, second = made.report.split("\nEnd: ")
    assert "'end' is for the socket 'end' of Anti-Drift Sampler" in second and "'end'" not in alone.report
    assert first.startswith("Start: Image of 96x64") and "Transparency" not in first
    assert second.startswith("Image of 80x120") and "Centre crop" in second
    assert "Transparency laid over black" in second
    assert alone.report.startswith("Image of 96x64")


def test_masks_act_on_their_own_pictures(vae):
    start, end = pictures()
    with torch.inference_mode():
        rgba = prepare(vae, None, start, end, 64, "white")
        masked = prepare(vae, None, start, end[..., :3], 64, "white", end_mask=1 - end[..., 3])
        gone = prepare(vae, None, start, None, 64, "white", mask=torch.ones(1, 64, 96))
    assert torch.equal(rgba.end["samples"], masked.end["samples"]) and rgba.report == masked.report
    assert torch.equal(masked.start["samples"], rgba.start["samples"])
    assert bool((gone.picture_BHWC == 1).all()) and "Transparency laid over white" in gone.report
    with pytest.raises(ImageError, match="'end_mask'.*'end_image'"):
        prepare(vae, None, start, None, 64, "white", end_mask=torch.ones(1, 8, 8))


def test_fault_22_a_vae_that_fits_no_such_model_is_refused_before_anything_is_encoded():
    pixels = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    with pytest.raises(VAEError, match="'Load VAE' gave an image VAE.*expected a video VAE.*HunyuanVideo VAE"):
        prepare(pixels, None, pictures()[0], None, 64, "white")


@torch.inference_mode()
def test_a_still_clip_is_each_picture_held_for_33_and_begins_with_the_picture_alone():
    vae = shipped_vae("frame_memory_selftest_wan_vae")
    start = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(4))
    still, alone = (prepare(vae, None, start, None, 64, "black", still_clip=on) for on in (True, False))
    made = still.start["samples"]
    assert made.shape == (2, 16, 9, *alone.start["samples"].shape[3:]) and still.start.keys() == alone.start.keys()
    assert torch.equal(made[:, :, :1], alone.start["samples"])
    for latent, picture in zip(made, still.picture_BHWC, strict=True):
        assert torch.equal(latent, vae.encode(picture.repeat(33, 1, 1, 1))[0])


def test_a_still_clip_of_another_model_s_vae_is_refused():
    sizes = {"decoder.1.weight": (256, 16, 3, 3), "decoder.22.bias": (3,)}
    tiny_hunyuan = comfy.sd.VAE(sd={key: torch.zeros(size, dtype=torch.float16) for key, size in sizes.items()})
    with pytest.raises(VAEError, match="'still_clip' of 'FramePack Image' is for Helios.* a tiny HunyuanVideo VAE"):
        prepare(tiny_hunyuan, None, pictures()[0], None, 64, "black", still_clip=True)
