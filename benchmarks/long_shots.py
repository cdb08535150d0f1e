"""Long shots: sprites that go to and fro over one ground for as long as a video lasts, as latents with captions.

A shot repeats every 304 frames, so one turn of it is kept and a video of any length is read out of that.

Shape legend: N shots, B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frame_memory.model.selftest import text_features

from .clips import cached_columns, clip_jobs
from .codec import LinearCodec
from .long_clips import latents_of
from .shots import HEIGHT, PACE, RADIUS, WIDTH, Shot, random_cast, random_shot, render

MOST = 2
TURN = int(2 * (WIDTH - 2 * (RADIUS + 1)) / PACE)


def random_long_shot(rng: np.random.Generator) -> Shot:
    """A shot with one sprite or two."""
    return random_shot(rng, random_cast(rng, int(rng.integers(1, MOST + 1))))


def _make(job: tuple[int, LinearCodec]) -> tuple[np.ndarray, np.ndarray, str]:
    seed, codec = job
    torch.set_num_threads(1)
    shot = random_long_shot(np.random.default_rng(seed))
    video = torch.from_numpy(render(shot, np.arange(TURN + 1)))
    return codec.encode(video).numpy().astype(np.float16), video[0].numpy().astype(np.float16), shot.caption()


@dataclass
class LongShots:
    """turns `[N, C, 77, H, W]` and captions of long shots; the first latent frame is the autoencoder's."""

    turns: np.ndarray
    captions: list[str]

    @classmethod
    def make(cls, folder: Path, codec: LinearCodec, encode, count: int, *, seed: int) -> LongShots:
        """Render and encode `count` shots, or read them back where they were made before.

        encode: pictures `[N, H, W, 3]` to latents `[N, C, 1, H, W]`, as the model is given an artist's picture.
        """
        name = f"long-shots-{WIDTH}x{HEIGHT}-{MOST}-{count}-{seed}"
        paths = cached_columns(folder, name, ("turns", "first", "captions"), _make, clip_jobs(codec, count, seed), 1)
        turns = np.load(paths[0])
        for begin in range(0, count, 32):
            pictures = torch.from_numpy(np.load(paths[1])[begin : begin + 32].astype(np.float32))
            turns[begin : begin + 32, :, :1] = encode(pictures).numpy().astype(np.float16)
        return cls(turns, np.load(paths[2]).tolist())

    def batch(self, size: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Videos `[B, C, T, H, W]` of `frames` latent frames and text `[B, 20, 64]`."""
        index = torch.randint(len(self.captions), (size,), generator=generator).tolist()
        latents = latents_of(torch.from_numpy(self.turns[index].astype(np.float32)), frames)
        return latents, torch.cat([text_features(self.captions[i])[0] for i in index])
