"""What the tiny Wan-class model is taught its history with: shots of any length, and a LoRA of a smaller rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.codec import LinearCodec
from benchmarks.long_clips import latents_of
from benchmarks.long_shots import MOST, TURN, LongShots, random_long_shot
from benchmarks.ship_selftest import of_rank
from benchmarks.shots import render


@pytest.fixture(scope="module")
def codec() -> LinearCodec:
    """Of random blocks: it codes blocks one by one, whatever they show."""
    generator = torch.Generator().manual_seed(0)
    return LinearCodec.fit(torch.rand(1000, 768, generator=generator))


def first_frames(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.mean((1, 2, 3)).reshape(-1, 1, 1, 1, 1).expand(-1, 16, 1, 12, 12)


def test_one_turn_of_a_shot_is_all_of_a_video_of_any_length(codec, tmp_path):
    shots = LongShots.make(tmp_path, codec, first_frames, 2, seed=3)
    again = LongShots.make(tmp_path, codec, first_frames, 2, seed=3)
    assert np.array_equal(shots.turns, again.turns) and shots.captions == again.captions
    frames = 1 + TURN // 4 + 20
    for index in range(2):
        shot = random_long_shot(np.random.default_rng(3 * 1_000_003 + index))
        assert shot.caption() == shots.captions[index] and 1 <= len(shot.cast) <= MOST
        picture = torch.from_numpy(render(shot, np.arange(4 * frames - 3)))
        whole, read = codec.encode(picture), latents_of(torch.from_numpy(shots.turns[index]), frames)
        assert torch.allclose(read[:, 1:].float(), whole[:, 1:], atol=5e-3)
        mean = float(picture[0].half().float().mean())
        assert float(read[0, 0, 0, 0]) == pytest.approx(mean, abs=1e-3), "the autoencoder makes the first frame"


def test_a_batch_draws_from_its_generator(codec, tmp_path):
    shots = LongShots.make(tmp_path, codec, first_frames, 2, seed=3)
    latents, text = shots.batch(3, 30, torch.Generator().manual_seed(1))
    assert latents.shape == (3, 16, 30, 12, 12) and text.shape == (3, 20, 64)
    assert torch.equal(latents, shots.batch(3, 30, torch.Generator().manual_seed(1))[0])


def test_a_lora_of_a_smaller_rank_keeps_what_changes_most():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(12, 4, generator=generator))[0], torch.linalg.qr(torch.randn(8, 4))[0]
    strengths = torch.tensor([4.0, 3.0, 2.0, 1.0])
    pair = {"lora.a.down": v.T.clone(), "lora.a.up": u * strengths, "patchifiers.proj.bias": torch.ones(2)}
    made = of_rank(pair, 2)
    expected = (u[:, :2] * strengths[:2]) @ v.T[:2]
    assert torch.allclose(made["lora.a.up"] @ made["lora.a.down"], expected, atol=1e-5)
    assert made["lora.a.down"].shape == (2, 8) and made["lora.a.up"].shape == (12, 2)
    assert made["patchifiers.proj.bias"] is pair["patchifiers.proj.bias"]
