"""The tiny Wan-class model: trained on what core gives it at inference, read by core's stock loader as what it is."""

from __future__ import annotations

import comfy.sample
import comfy.sd
import numpy as np
import pytest
import safetensors.torch
import torch
from comfy_extras.nodes_wan import WanImageToVideo

from benchmarks import ffgo, shot_clips, shots
from benchmarks.ship_selftest import WAN_METADATA
from benchmarks.train_wan import ShotLoss, build, training_mode, with_given
from frame_memory.forcing.loop import Trainer, TrainSettings


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    model = build()
    for p in model.parameters():
        if not p.any() and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def loaded(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "wan.safetensors"
    safetensors.torch.save_file(dict(network.state_dict()), path, {**WAN_METADATA, "format": "pt"})
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


def test_the_file_is_wan_22_image_to_video_to_core(loaded):
    assert type(loaded.model).__name__ == "WAN21"
    assert loaded.model.diffusion_model.num_heads == 4
    assert loaded.model.diffusion_model.patch_embedding.weight.shape[1] == 36
    assert type(loaded.model.latent_format).__name__ == "Wan21"


def test_training_shows_the_model_what_core_shows_it_at_inference(network, loaded):
    """One step of core's sampling from Wan Image To Video's conditioning, against the training's own forward pass."""

    class Echo:
        """A VAE whose latents are known."""

        given = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))

        def encode(self, image):
            return self.given

    text = ffgo.conditioning("circle move right")
    positive = WanImageToVideo.execute(
        text, [], Echo(), 48, 32, 9, 1, start_image=torch.rand(1, 32, 48, 3)
    ).result[0]  # fmt: skip
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    patched = ffgo.with_lora(loaded, None)
    sigmas = torch.tensor([1.0, 0.7])
    sampler = comfy.samplers.sampler_object("euler")
    made = comfy.sample.sample_custom(
        patched, noise, 1.0, sampler, sigmas, positive, positive, torch.zeros_like(noise), disable_pbar=True
    )
    given = loaded.model.process_latent_in(Echo.given)
    velocity = network(with_given(noise, given), torch.tensor([1000.0]), text[0][0])
    # Core divides by 1 - sigma where a sampling ends early.
    expected = loaded.model.process_latent_out((noise - 0.3 * velocity) / (1 - 0.7))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_falls_and_the_switch_of_core_is_put_back():
    import comfy.model_management

    clips = shot_clips.ShotClips(
        np.random.default_rng(0).standard_normal((4, 16, 2, 4, 4)).astype(np.float16),
        np.zeros((4, 16, 2, 4, 4), dtype=np.float16),
        ["circle", "square", "cross", "diamond"],
    )
    torch.manual_seed(0)
    trainer = Trainer(build(), TrainSettings(steps=12, warmup=2))
    loss = ShotLoss(trainer.model, clips, 4)
    with training_mode():
        values = [trainer.step(loss) for _ in range(12)]
    assert np.mean(values[-3:]) < np.mean(values[:3])
    assert comfy.model_management.in_training is False


def test_clips_are_made_once_and_read_back_the_same(tmp_path):
    codec = shot_clips.fit_codec(clips=12)
    made = shot_clips.ShotClips.make(tmp_path, codec, 3, seed=5, workers=1)
    again = shot_clips.ShotClips.make(tmp_path, codec, 3, seed=5, workers=1)
    np.testing.assert_array_equal(made.latents, again.latents)
    assert made.captions == again.captions and made.latents.shape == (3, 16, 7, 12, 12)
    grey = codec.encode(shot_clips.given_pixels(torch.zeros(96, 96, 3)))[:, 1:]
    np.testing.assert_allclose(made.given[:, :, 1:], grey.half().expand(3, -1, -1, -1, -1), atol=1e-3)


def test_the_few_triples_and_the_compositions_asked_for_are_never_the_same():
    taught = ffgo.compositions(50, None, 10_000) + ffgo.compositions(50, None, 10_001)
    asked = [s for n in range(1, 6) for i in (0, 1) for s in ffgo.compositions(16, n, 20_000 + 100 * n + i)]
    assert {len(s.cast) for s in taught} == {1, 2, 3, 4, 5}
    assert not {(s.cast, s.starts, s.phase) for s in taught} & {(s.cast, s.starts, s.phase) for s in asked}
    assert all(shots.canvas(s).shape == (96, 96, 3) for s in asked[::16])
