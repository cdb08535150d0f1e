"""Videos of many scenes at once by a network and its memory, for the claims.

The pack's section loop makes one video at a time through ComfyUI's guider; here a batch of scenes goes through the same
plan, context, sampler and memory without it. A test holds the two together.

A video begins with its true first visit, like a project that is gone on with and whose first sections are there. So
nothing need be invented, and who comes back later is right or wrong.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from frame_memory.forcing.flow import Conditioning, predict_velocity
from frame_memory.forcing.recurrence import Recurrence
from frame_memory.model.context import gather_context
from frame_memory.model.semantic_pack import SemanticPack
from frame_memory.plan import PRESETS, Section, plan_sections, section_count, sigma_schedule
from frame_memory.plan.memory import with_true_image
from frame_memory.sampling.unipc import sample_framepack_unipc

from .clips import ORDERS
from .codec import LinearCodec
from .long_clips import FRAMES_A_LATENT, asked_for, latents_of, one_turn
from .long_measure import measure_long
from .long_world import LongScene

# Latent frames behind the start that are true: three sections, in which the visitor comes and leaves but for its edge.
GIVEN = 27


@dataclass(frozen=True)
class Sampling:
    """steps: of UniPC a section. shift: of its noise levels (benchmarks.quality says why not the formula's)."""

    steps: int = 12
    shift: float = 4.0


@torch.no_grad()
def generate(
    network: nn.Module, pack: SemanticPack | None, given_BCTHW: Tensor, cond: Conditioning, kind: str, sections: int,
    sampling: Sampling, seed: int, alive: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Videos `[B, C, T, H, W]` of `sections` sections by kind "F0" or "F1".

    given: the start frame, and what the first sections hold where these need not be made; F0 makes the end first, and
    sees nothing of them. alive: called before every section.
    """
    plan = plan_sections(PRESETS[ORDERS[kind]], sections=sections)
    batch, channels, given, height, width = given_BCTHW.shape
    video = given_BCTHW.new_zeros(batch, channels, plan.total_frames, height, width)
    video[:, :, :1] = given_BCTHW[:, :, :1]
    sigmas = torch.tensor(sigma_schedule(sampling.steps, sampling.shift))
    generator = torch.Generator().manual_seed(seed)
    memory = Recurrence(pack, cond, 0) if pack is not None and bool(pack.gate) else None
    for section in plan.sections:
        alive()
        window = slice(section.start, section.stop)
        # A section's noise is the same whether or not those before it are given.
        noise = torch.randn(video[:, :, window].shape, generator=generator).to(video)
        if section.stop <= given:
            made = given_BCTHW[:, :, window]
        else:
            made = sample_framepack_unipc(_estimates(network, memory, section, video, cond), noise, sigmas)
        video[:, :, window] = made
        if memory is not None:
            memory.fold(made)
    return video


def _estimates(
    network: nn.Module, memory: Recurrence | None, section: Section, video_BCTHW: Tensor, cond: Conditioning
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network's estimate of a section's clean latents, behind what of the video is there."""
    tokens = memory.tokens() if memory is not None and memory.folded else None
    placed = with_true_image(section) if memory is not None and memory.pack.spec.true_image else section
    context = gather_context(placed, video_BCTHW, video_BCTHW[:, :, :1], None, 0.0)

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        velocity = predict_velocity(network, x, sigma, cond, context, {}, memory_tokens=tokens)
        return x - sigma.reshape(-1, 1, 1, 1, 1) * velocity

    return x0


def measured(
    network: nn.Module, pack: SemanticPack | None, scenes: Sequence[LongScene], codec: LinearCodec, kind: str,
    seconds: Sequence[float], sampling: Sampling, seed: int, device="cpu", alive: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean measures of videos of the scenes behind their first visit, by their length in seconds.

    A short F1 video is the beginning of a long one, so only the longest is made; F0 makes each length by itself.
    """
    cond = asked_for(scenes)
    cond = Conditioning(cond.text.to(device), cond.pooled.to(device), cond.vision.to(device))
    given = torch.stack([latents_of(one_turn(scene, codec), 1 + GIVEN) for scene in scenes]).to(device)
    counts = {s: section_count(s) for s in sorted(seconds)}
    videos: dict[int, Tensor] = {}
    for count in [max(counts.values())] if kind == "F1" else sorted(set(counts.values())):
        videos[count] = generate(network, pack, given, cond, kind, count, sampling, seed, alive).cpu()
    out = {}
    for length, count in counts.items():
        made = videos.get(count, videos[max(videos)])[:, :, : 1 + 9 * count]
        rows = [
            measure_long(codec.decode(latent).numpy(), scene, 1 + FRAMES_A_LATENT * GIVEN).row(kind == "F0")
            for latent, scene in zip(made, scenes, strict=True)
        ]
        out[f"{length:g}"] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    return out


def _mean(values: list[float]) -> float:
    kept = [v for v in values if not np.isnan(v)]
    return float(np.mean(kept)) if kept else float("nan")
