"""Long videos of the world as latents with conditioning, for training and as what a video is asked for with.

A scene repeats every 60 latent frames, so one turn of it is kept and a video of any length is read out of that.

Shape legend: N scenes, B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from frame_memory.forcing.clips import TrainingVideo
from frame_memory.forcing.flow import Conditioning
from frame_memory.model.selftest import text_features, vision_features

from .clips import cached_columns, clip_jobs, fit_codec
from .codec import LinearCodec
from .long_world import PERIOD, LongScene, random_long_scene, render

WORLD = "long4"  # changes with what `random_long_scene` and `render` give, so that another world's are never read
FRAMES_A_LATENT = 4
TURN = PERIOD // FRAMES_A_LATENT


def codec_of(folder: Path, fit: Callable[[], LinearCodec] = fit_codec, name: str = "codec") -> LinearCodec:
    """The codec that the self-test models were trained with, fitted once and kept in `folder` under its name."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        codec = fit()
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"mean": codec.mean, "encoder": codec.encoder, "decoder": codec.decoder}
        safetensors.torch.save_file({name: part.contiguous() for name, part in parts.items()}, path)
    return LinearCodec(**safetensors.torch.load_file(path))


def one_turn(scene: LongScene, codec: LinearCodec) -> Tensor:
    """Latents of the first picture and of one turn of a scene, `[C, 1 + 60, H, W]`."""
    video = torch.from_numpy(render(scene, np.arange(PERIOD + 1)))
    return codec.encode(video)


def latents_of(turn: Tensor, frames: int) -> Tensor:
    """Videos of any number of latent frames `[..., C, T, H, W]` out of one turn each."""
    index = torch.arange(frames)
    return turn[..., torch.where(index == 0, index, 1 + (index - 1) % (turn.shape[-3] - 1)), :, :]


def conditioning(captions: Iterable[str], pictures_BHWC: Tensor) -> Conditioning:
    """Prompts and what the vision encoder sees of the first pictures, of a batch of scenes."""
    text, pooled = zip(*map(text_features, captions), strict=True)
    return Conditioning(torch.cat(text), torch.cat(pooled), vision_features(pictures_BHWC))


def asked_for(scenes: Sequence[LongScene]) -> Conditioning:
    """The conditioning that videos of scenes are made with."""
    pictures = torch.from_numpy(np.concatenate([render(scene, np.arange(1)) for scene in scenes]))
    return conditioning((scene.caption for scene in scenes), pictures)


def _make(job: tuple[int, LinearCodec]) -> tuple[np.ndarray, np.ndarray, str]:
    seed, codec = job
    torch.set_num_threads(1)
    scene = random_long_scene(np.random.default_rng(seed))
    first = render(scene, np.arange(1))[0]
    return one_turn(scene, codec).numpy().astype(np.float16), first.astype(np.float16), scene.caption


@dataclass
class LongClips:
    """turns `[N, C, 61, H, W]`, first pictures `[N, 64, 64, 3]` and captions of long videos."""

    turns: np.ndarray
    pictures: np.ndarray
    captions: list[str]

    @classmethod
    def make(cls, folder: Path, codec: LinearCodec, count: int, *, seed: int, workers: int = 1) -> LongClips:
        """Render and encode `count` scenes, or read them back where they were made before."""
        parts = ("turns", "first", "captions")
        jobs = clip_jobs(codec, count, seed)
        paths = cached_columns(folder, f"{WORLD}-{count}-{seed}", parts, _make, jobs, workers)
        return cls(np.load(paths[0], mmap_mode="r"), np.load(paths[1]), np.load(paths[2]).tolist())

    def video(self, index: np.ndarray, frames: int) -> TrainingVideo:
        """A batch of videos of `frames` latent frames."""
        turns = torch.from_numpy(self.turns[index].astype(np.float32))
        latents = latents_of(turns, frames)
        pictures = torch.from_numpy(self.pictures[index].astype(np.float32))
        return TrainingVideo(latents, conditioning((self.captions[i] for i in index), pictures), "long world")
