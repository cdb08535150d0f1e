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
from frame_memory.forcing.forcings import Forced
from frame_memory.forcing.preserving import behind
from frame_memory.forcing.recurrence import Recurrence
from frame_memory.model.context import gather_context
from frame_memory.model.semantic_pack import SemanticPack
from frame_memory.plan import Section, plan_sections, section_count, sigma_schedule
from frame_memory.plan.memory import with_true_image
from frame_memory.plan.preservation import seen_from, segment_ends
from frame_memory.sampling.unipc import sample_framepack_unipc

from .codec import LinearCodec
from .long_clips import FRAMES_A_LATENT, asked_for, latents_of, one_turn
from .long_measure import measure_long
from .long_world import LongScene

# Latent frames behind the start that are true: three sections, in which the visitor comes and leaves but for its edge.
GIVEN = 27
LONG_MEASURES = {
    "recall": ("recall", "{:.0%}"), "colour recall": ("of colour", "{:.0%}"),
    "identity": ("right visitor", "{:.0%}"), "presence": ("there or away as due", "{:.0%}"),
    "distance": ("off by, px", "{:.1f}"), "background": ("ground, dB", "{:.1f}"), "motion": ("dynamic", "{:.2f}"),
    "drift of identity": ("Δ visitor", "{:.0%}"), "drift of presence": ("Δ there", "{:.0%}"),
    "drift of distance": ("Δ px", "{:.1f}"), "drift of background": ("Δ dB", "{:.1f}"),
    "drift of motion": ("Δ dynamic", "{:.2f}"),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """steps: of UniPC a section. shift: of its noise levels (benchmarks.quality says why not the formula's)."""

    steps: int = 12
    shift: float = 4.0


class Shown:
    """What a network is shown of a video while that is made. Good for one video, or a batch of them."""

    def fold(self, made_BCTHW: Tensor) -> None:
        """Take in a section that is made, or given."""

    def velocity(self, section: Section, video_BCTHW: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The network on a section's noisy latents and their sigma, behind what of the video is there."""
        raise NotImplementedError


class Packed(Shown):
    """FramePack's context, and a MemoryPack where there is one."""

    def __init__(self, network: nn.Module, pack: SemanticPack | None, cond: Conditioning):
        self.network, self.cond = network, cond
        self.memory = Recurrence(pack, cond, 0) if pack is not None and bool(pack.gate) else None

    def fold(self, made_BCTHW: Tensor) -> None:
        if self.memory is not None:
            self.memory.fold(made_BCTHW)

    def velocity(self, section: Section, video_BCTHW: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        memory = self.memory
        tokens = memory.tokens() if memory is not None and memory.folded else None
        placed = with_true_image(section) if memory is not None and memory.pack.spec.true_image else section
        context = gather_context(placed, video_BCTHW, video_BCTHW[:, :, :1], None, 0.0)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return predict_velocity(self.network, x, sigma, self.cond, context, {}, memory_tokens=tokens)

        return velocity


class Preserved(Shown):
    """Frame preservation's memory of the whole video, and the clean frames of the schedule."""

    def __init__(self, forced: Forced, cond: Conditioning):
        self.forced, self.cond = forced, cond

    def velocity(self, section: Section, video_BCTHW: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        context = gather_context(section, video_BCTHW, video_BCTHW[:, :, :1], None, 0.0)
        ends = segment_ends(1, len(section.positions), section.index)
        seen = self.forced.pack(video_BCTHW[:, :, : section.start], ends)
        network = behind(self.forced.network, seen, seen_from(seen.places, section))

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return predict_velocity(network, x, sigma, self.cond, context, self.forced.options)

        return velocity


def sampled(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sampling: Sampling) -> Tensor:
    """Clean latents from noise by a network's velocity."""
    sigmas = torch.tensor(sigma_schedule(sampling.steps, sampling.shift))

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma.reshape(-1, 1, 1, 1, 1) * velocity(x, sigma)

    return sample_framepack_unipc(x0, noise, sigmas)


@torch.no_grad()
def generate(
    shown: Shown, given_BCTHW: Tensor, schedule: str, sections: int, sampling: Sampling, seed: int,
    alive: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Videos `[B, C, T, H, W]` of `sections` sections.

    given: the start frame, and what the first sections hold where these need not be made; F0 makes the end first, and
    sees nothing of them. alive: called before every section.
    """
    plan = plan_sections(schedule, sections=sections)
    batch, channels, given, height, width = given_BCTHW.shape
    video = given_BCTHW.new_zeros(batch, channels, plan.total_frames, height, width)
    video[:, :, :1] = given_BCTHW[:, :, :1]
    generator = torch.Generator().manual_seed(seed)
    for section in plan.sections:
        alive()
        window = slice(section.start, section.stop)
        # A section's noise is the same whether or not those before it are given.
        noise = torch.randn(video[:, :, window].shape, generator=generator).to(video)
        if section.stop <= given:
            made = given_BCTHW[:, :, window]
        else:
            made = sampled(shown.velocity(section, video), noise, sampling)
        video[:, :, window] = made
        shown.fold(made)
    return video


def of_seconds(seconds: Sequence[float]) -> dict[str, str]:
    """Videos of so many seconds as cases of a claim."""
    return {f"{s:g}": f"{s:g} s" for s in seconds}


def measured(
    shown: Callable[[Conditioning], Shown], scenes: Sequence[LongScene], codec: LinearCodec, schedule: str,
    cases: Sequence[str], sampling: Sampling, seed: int, device="cpu", alive: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean measures of videos of the scenes behind their first visit, by their length. shown: anew for each video.

    A short forward video is the beginning of a long one, so only the longest is made; F0 makes each length by itself.
    """
    cond = asked_for(scenes)
    cond = Conditioning(cond.text.to(device), cond.pooled.to(device), cond.vision.to(device))
    given = torch.stack([latents_of(one_turn(scene, codec), 1 + GIVEN) for scene in scenes]).to(device)
    counts = {case: section_count(float(case)) for case in sorted(cases, key=float)}
    forward = plan_sections(schedule, sections=1).order == "forward"
    videos: dict[int, Tensor] = {}
    for count in [max(counts.values())] if forward else sorted(set(counts.values())):
        videos[count] = generate(shown(cond), given, schedule, count, sampling, seed, alive).cpu()
    out = {}
    for case, count in counts.items():
        made = videos.get(count, videos[max(videos)])[:, :, : 1 + 9 * count]
        rows = [
            measure_long(codec.decode(latent).numpy(), scene, 1 + FRAMES_A_LATENT * GIVEN).row(not forward)
            for latent, scene in zip(made, scenes, strict=True)
        ]
        out[case] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    return out


def _mean(values: list[float]) -> float:
    kept = [v for v in values if not np.isnan(v)]
    return float(np.mean(kept)) if kept else float("nan")
