"""Training clips of shots: latents, first frames and captions, for the tiny Wan-class model and its autoencoder.

Most clips are one shot; in some a hard cut leads to the same cast elsewhere, as in films. Neither FFGo's canvas nor its
trigger is among them: what a LoRA wakes up is what the network knows of cuts.

Shape legend: N clips, B batch, C latent channels, T latent frames, F pixel frames, H W pixels. Latents are in model
space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frame_memory.model.selftest import text_features

from .clips import cached_columns, clip_jobs
from .codec import LinearCodec, blocks
from .shots import HEIGHT, WIDTH, canvas, next_shot, random_cast, random_shot, render, render_with_cut

FRAMES = 25
CUT_SHARE, SUDDEN_WHITE = 0.5, 0.25
LAST_CUT = 20
WORDLESS_SHARE = 0.1


def random_clip(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Pixels `[25, 96, 96, 3]` and a caption of the opening shot."""
    cast = random_cast(rng, int(rng.integers(1, 6)))
    cuts = rng.random() < CUT_SHARE
    shot = random_shot(rng, cast, studio=cuts and rng.random() < SUDDEN_WHITE)
    if cuts:
        second = next_shot(rng, shot, studio=rng.random() < 0.05)
        video = render_with_cut(shot, second, int(rng.integers(1, LAST_CUT + 1)), FRAMES)
    else:
        video = render(shot, np.arange(FRAMES))
    return video, shot.caption(ground=rng.random() < 0.7, ground_colour=rng.random() < 0.5)


def any_pixels(rng: np.random.Generator) -> np.ndarray:
    """Pixels for codec and autoencoder, which must also draw what only an artist composes: canvases."""
    if rng.random() < 0.8:
        return random_clip(rng)[0]
    shot = random_shot(rng, random_cast(rng, int(rng.integers(1, 6))))
    video = render(shot, np.arange(FRAMES))
    video[: int(rng.integers(1, FRAMES))] = canvas(shot)
    return video


def fit_codec(seed: int = 0, clips: int = 600) -> LinearCodec:
    """The linear codec of this world."""
    rng = np.random.default_rng(seed)
    made = [blocks(torch.from_numpy(any_pixels(rng))).flatten(0, 2)[::4] for _ in range(clips)]
    return LinearCodec.fit(torch.cat(made))


def given_pixels(first_HWC: Tensor, frames: int = FRAMES) -> Tensor:
    """What an image-to-video model is given, `[F, H, W, 3]`: the first frame, then grey."""
    video = torch.full((frames, *first_HWC.shape), 0.5)
    video[0] = first_HWC
    return video


def _make(job: tuple[int, LinearCodec]) -> tuple[np.ndarray, np.ndarray, str]:
    seed, codec = job
    torch.set_num_threads(1)
    video, caption = random_clip(np.random.default_rng(seed))
    pixels = torch.from_numpy(video)
    given = codec.encode(given_pixels(pixels[0]))
    return codec.encode(pixels).numpy().astype(np.float16), given.numpy().astype(np.float16), caption


@dataclass
class ShotClips:
    """`latents` and `given`, `[N, C, T, H, W]` float16, and captions."""

    latents: np.ndarray
    given: np.ndarray
    captions: list[str]

    @classmethod
    def make(cls, folder: Path, codec: LinearCodec, count: int, *, seed: int, workers: int = 2) -> ShotClips:
        """Render and encode `count` clips, or read them back where they were made before."""
        # Named for the world, so that clips of another one are not taken for this one's.
        name = f"shots-{WIDTH}x{HEIGHT}-cuts{CUT_SHARE:g}-{count}-{seed}"
        parts = ("latents", "given", "captions")
        paths = cached_columns(folder, name, parts, _make, clip_jobs(codec, count, seed), workers)
        return cls(np.load(paths[0]), np.load(paths[1]), np.load(paths[2]).tolist())

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and given latents `[B, C, T, H, W]`, and text `[B, 20, 64]`; some of the texts are empty."""
        index = torch.randint(len(self.captions), (size,), generator=generator).numpy()
        wordless = torch.rand(size, generator=generator) < WORDLESS_SHARE
        texts = ["" if empty else self.captions[i] for i, empty in zip(index, wordless, strict=True)]
        latents, given = (torch.from_numpy(a[index].astype(np.float32)) for a in (self.latents, self.given))
        return latents, given, torch.cat([text_features(t)[0] for t in texts])
