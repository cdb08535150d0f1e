"""Training clips of the synthetic world: latents, captions and sections, cached on disk.

Shape legend: N clips, B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frame_memory.forcing.flow import Conditioning
from frame_memory.model.selftest import text_features, vision_features
from frame_memory.plan import PRESETS, Section, parse_schedule, plan_sections

from .codec import LinearCodec
from .world import TIDY_RADIUS, Scene, random_scene, render

SECTIONS = 8
WINDOW = 9
LATENT_FRAMES = SECTIONS * WINDOW + 1
PIXEL_FRAMES = 4 * LATENT_FRAMES - 3
FIRST_SHARE = 0.35
ORDERS = {"F0": "F0 inverted", "F1": "F1 forward"}


def video_of(scene: Scene, frames: int = PIXEL_FRAMES) -> Tensor:
    """The first frames of a scene, `[frames, 64, 64, 3]`."""
    return torch.from_numpy(render(scene, np.arange(frames)))


def fit_codec(seed: int = 0, scenes: int = 400) -> LinearCodec:
    """Fit the linear codec on random scenes."""
    from .codec import blocks

    rng = np.random.default_rng(seed)
    videos = [video_of(random_scene(rng), 33) for _ in range(scenes)]
    return LinearCodec.fit(torch.cat([blocks(v).flatten(0, 2)[::3] for v in videos]))


def cached_columns(
    folder: Path, name: str, parts: tuple[str, ...], make: Callable[..., tuple], jobs: list, workers: int
) -> list[Path]:
    """Files `<name>.<part>.npy` with what `make` gives for each job, made here unless they were made before."""
    paths = [folder / f"{name}.{part}.npy" for part in parts]
    if not all(p.exists() for p in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with Pool(workers) as pool:
            made = list(pool.imap(make, jobs, chunksize=32))
        for path, column in zip(paths, zip(*made, strict=True), strict=True):
            np.save(path, np.array(column))
    return paths


def clip_jobs(codec: LinearCodec, count: int, seed: int) -> list[tuple[int, LinearCodec]]:
    """A seed for each clip of a set."""
    return [(seed * 1_000_003 + i, codec) for i in range(count)]


def _make(job: tuple[int, LinearCodec]) -> tuple[np.ndarray, np.ndarray, str]:
    seed, codec = job
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, tidy=True)
    video = video_of(scene)
    return codec.encode(video).numpy().astype(np.float16), video[0].numpy().astype(np.float16), scene.caption


@dataclass
class ClipSet:
    """`latents [N, C, T, H, W]`, first frames `[N, 64, 64, 3]` and captions of whole videos."""

    latents: np.ndarray
    first_frames: np.ndarray
    captions: list[str]

    @classmethod
    def make(cls, folder: Path, codec: LinearCodec, count: int, *, seed: int, workers: int = 2) -> ClipSet:
        """Render and encode `count` videos, or read them back where they were made before."""
        name = f"tidy{TIDY_RADIUS:g}-{count}-{seed}"
        parts = ("latents", "first", "captions")
        paths = cached_columns(folder, name, parts, _make, clip_jobs(codec, count, seed), workers)
        latents = np.load(paths[0], mmap_mode="r")
        return cls(latents, np.load(paths[1]), np.load(paths[2]).tolist())

    def batch(self, index: np.ndarray, encode=None) -> tuple[Tensor, Conditioning]:
        """Latents `[B, C, T, H, W]` and conditioning of the clips at `index`.

        encode: pictures `[B, 64, 64, 3]` to latents `[B, C, 1, H, W]`; where given, it makes the first latent frame, as
        the autoencoder will make it from an artist's picture.
        """
        text, pooled = zip(*(text_features(self.captions[i]) for i in index), strict=True)
        pictures = torch.from_numpy(self.first_frames[index].astype(np.float32))
        vision = vision_features(pictures)
        latents = torch.from_numpy(self.latents[index].astype(np.float32))
        if encode is not None:
            latents = torch.cat([encode(pictures), latents[:, :, 1:]], dim=2)
        return latents, Conditioning(torch.cat(text), torch.cat(pooled), vision)


def random_section(kind: str, generator: torch.Generator) -> tuple[Section, Section | None]:
    """A section of a random plan of 1 to 8 sections, and the one made just before it."""
    schedule = parse_schedule(PRESETS[ORDERS[kind]])
    # F1's plans agree on all sections but their number, so the longest covers every case evenly.
    longest = kind == "F1" or torch.rand((), generator=generator) < 0.4
    sections = SECTIONS if longest else int(torch.randint(1, SECTIONS + 1, (), generator=generator))
    plan = plan_sections(schedule, sections=sections)
    # The first section has the least to go by, and all others build on it.
    first = float(torch.rand((), generator=generator)) < FIRST_SHARE
    i = 0 if first else int(torch.randint(sections, (), generator=generator))
    return plan.sections[i], plan.sections[i - 1] if i else None
