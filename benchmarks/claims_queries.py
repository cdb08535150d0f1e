"""How near the frames are that a memory is asked for: PSNR, SSIM and a perceptual distance, for the claims.

A history of 8 clips is asked for frames by chance, in two cases: masked as in stage 1, or whole and clean, as a run
holds it and 'Retrieve Frame' asks it. Pictures are compared with what the codec makes of the true latents.

The distance is that of LPIPS without its learned weights (Zhang et al. 2018, arXiv 1801.03924: features of networks
that were trained for another task do nearly as well): features of the shipped self-test autoencoder's encoder at each
of its resolutions, made as long as 1 at each place; squared differences summed over channels, the mean over places and
resolutions. 0 is equal. It needs no download, and its numbers are not LPIPS's.

Shape legend: B batch, C latent channels, T latent frames, Q frames that are asked for, N pictures, H W pixels,
P places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.wan.vae import Resample
from torch import Tensor

from frame_memory.forcing.clips import TrainingVideo, clip_frames
from frame_memory.forcing.flow import predict_velocity
from frame_memory.forcing.forcings import Forced
from frame_memory.forcing.preserving import asked, asked_frames, behind, draw_query
from frame_memory.plan.preservation import segment_ends
from frame_memory.video.fidelity import psnr, ssim

from .claims_training import Measures
from .claims_videos import Sampling, sampled
from .codec import LinearCodec
from .long_clips import asked_for, latents_of, one_turn
from .long_world import LongScene
from .train_autoencoder import shipped

MASKED, WHOLE = "masked", "whole"
CASES = {MASKED: "the rest masked, as in training", WHOLE: "of the whole history"}
MEASURES: Measures = {"psnr": ("PSNR, dB", "{:.2f}"), "ssim": ("SSIM", "{:.3f}"), "distance": ("distance", "{:.4f}")}
# Clips of the history: a turn of the world and a part of the next. Frames that blocks of every rate hold.
CLIPS, HELD = 8, 72
DRAWS, DRAW_SEED = 4, 7

Distance = Callable[[Tensor, Tensor], Tensor]


def perceptual_distance() -> Distance:
    """Pictures `[N, H, W, 3]`, 0..1, twice, to their distance `[N]`."""
    encoder = shipped().encoder

    def features(pictures_NHWC: Tensor) -> list[Tensor]:
        made, x = [], encoder.conv1(pictures_NHWC.movedim(-1, 1).unsqueeze(2) * 2 - 1)
        for layer in encoder.downsamples:
            if isinstance(layer, Resample):
                made.append(x)
            x = layer(x)
        return [F.normalize(f.flatten(2), dim=1) for f in (*made, x)]  # `[N, channels, P]`

    @torch.no_grad()
    def distance(a_NHWC: Tensor, b_NHWC: Tensor) -> Tensor:
        pairs = zip(features(a_NHWC), features(b_NHWC), strict=True)
        return torch.stack([(a - b).square().sum(1).mean(1) for a, b in pairs]).mean(0)

    return distance


def histories(scenes: Sequence[LongScene], codec: LinearCodec) -> TrainingVideo:
    """The scenes as histories to ask for."""
    frames = 1 + clip_frames() * CLIPS
    latents = torch.stack([latents_of(one_turn(scene, codec), frames) for scene in scenes])
    return TrainingVideo(latents, asked_for(scenes), "asked")


@torch.no_grad()
def queried(
    forced: Forced, video: TrainingVideo, codec: LinearCodec, cases: Sequence[str], sampling: Sampling, seed: int,
    alive: Callable[[], None],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean measures over frames that are asked for, by case. seed: of noise; the frames are the same for all."""
    distance, choice = perceptual_distance(), torch.Generator().manual_seed(DRAW_SEED)
    rows: dict[str, list[Mapping[str, float]]] = {case: [] for case in cases}
    for number in range(DRAWS):
        frames = asked_frames(HELD, choice)
        for case in cases:
            alive()
            generator = torch.Generator().manual_seed(seed * DRAWS + number)
            made, truth = _asked(forced, video, frames, case, sampling, generator)
            rows[case] += compared(pictures(made, codec), pictures(truth, codec), distance)
    return {
        case: {name: float(np.mean([row[name] for row in made])) for name in MEASURES} for case, made in rows.items()
    }


def compared(made_NHWC: Tensor, truth_NHWC: Tensor, distance: Distance) -> list[dict[str, float]]:
    """The measures of each picture."""
    far = distance(made_NHWC, truth_NHWC).tolist()
    pairs = zip(made_NHWC, truth_NHWC, far, strict=True)
    return [{"psnr": psnr(a, b), "ssim": ssim(a, b), "distance": d} for a, b, d in pairs]


def pictures(latents_BCQHW: Tensor, codec: LinearCodec) -> Tensor:
    """The last picture of each latent frame, `[N, H, W, 3]`."""
    still = torch.zeros_like(latents_BCQHW[:, :, :1])
    videos = torch.cat((still, latents_BCQHW), dim=2).cpu()
    return torch.cat([codec.decode(video)[4::4] for video in videos])


def _asked(
    forced: Forced, video: TrainingVideo, frames: tuple[int, ...], case: str, sampling: Sampling, generator
) -> tuple[Tensor, Tensor]:
    """(what comes, the truth), `[B, C, Q, H, W]`."""
    draw = replace(draw_query(video, CLIPS, forced.pack.rates, generator), asked=frames)
    truth, context, seen = asked(forced, video, draw)
    if case == WHOLE:
        seen = forced.pack(video.latents, segment_ends(1, clip_frames(), CLIPS))
    network = behind(forced.network, seen, seen.places)
    noise = torch.randn(truth.shape, generator=generator).to(truth)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return predict_velocity(network, x, sigma, video.cond, context, forced.options)

    return sampled(velocity, noise, sampling), truth
