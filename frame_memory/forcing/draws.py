"""What chance decides in one update: the clips, their noise, their noise levels, and where the memory is left out.

All is drawn from one generator on the CPU before the first forward pass, so every device and every cut of the work
trains on the same numbers. Sigma is 1 at noise and 0 at data. Source: reference/memorypack.md section 3.3, notes 3, 7
and 8.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .clips import ForcingError, TrainingVideo, clip_frames
from .flow import shift_times

TEACHER, STUDENT, DIRECT = "teacher forcing", "student forcing", "Direct Forcing"
FORCINGS = (TEACHER, STUDENT, DIRECT)
LOGIT_NORMAL, UNIFORM = "logit-normal", "uniform"
SAMPLINGS = (LOGIT_NORMAL, UNIFORM)
# The curriculum of the reference, note 7: equal numbers of updates at each.
CLIP_COUNTS = (1, 2, 4, 8, 16)
# Noise levels of the loss: near those of sampling in teacher forcing; moderate where the estimates become history,
# since an estimate from much noise is a blurred mean (reference, note 3).
SHIFTS = {TEACHER: 5.0, STUDENT: 5.0, DIRECT: 1.0}


@dataclass(frozen=True)
class Recipe:
    """How losses are made; plain numbers, so that it can be written beside the weights.

    shift: of the loss's noise levels; 0 = SHIFTS of the forcing. history_shift: Direct Forcing draws the noise level of
    the history's estimates apart, with this shift and one more forward pass a clip; 0 = the loss's own forward pass
    (the paper's). rollout_steps, rollout_shift: student forcing's sampler. drop_memory: share of clips trained without
    their memory. unroll: clips that gradients reach back to through psi. random_start: begin at any clip; the history
    before it is the video's own.
    """

    forcing: str = DIRECT
    sampling: str = LOGIT_NORMAL
    shift: float = 0.0
    history_shift: float = 0.0
    rollout_steps: int = 5
    rollout_shift: float = 7.0
    drop_memory: float = 0.1
    unroll: int = 2
    random_start: bool = False

    def __post_init__(self):
        for name, given, allowed in (
            ("forcing", self.forcing, FORCINGS),
            ("sampling of noise levels", self.sampling, SAMPLINGS),
        ):
            if given not in allowed:
                raise ForcingError(f"The {name} is {given!r}; expected one of: {', '.join(allowed)}.")

    @property
    def loss_shift(self) -> float:
        """The shift of the loss's noise levels."""
        return self.shift or SHIFTS[self.forcing]


@dataclass(frozen=True)
class VideoDraw:
    """One video's part of an update: clips `first` to `first + count - 1`.

    sigmas `[count, B]`; noises: one `[B, C, 9, H, W]` a clip. history_sigmas, history_noises: of the history's own
    estimates, where they are drawn apart. rollout_noises: student forcing's. dropped: clips without memory.
    """

    first: int
    count: int
    sigmas: Tensor
    noises: tuple[Tensor, ...] = field(repr=False)
    dropped: tuple[bool, ...]
    history_sigmas: Tensor | None = None
    history_noises: tuple[Tensor, ...] = field(repr=False, default=())
    rollout_noises: tuple[Tensor, ...] = field(repr=False, default=())


def sigmas(count: int, shift: float, sampling: str, generator: torch.Generator) -> Tensor:
    """Noise levels `[count]`, each on its own: logit-normal(0, 1) or uniform times, moved by `shift`."""
    if sampling == LOGIT_NORMAL:
        t = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        t = torch.rand(count, generator=generator)
    return shift_times(t, shift)


def draw_video(video: TrainingVideo, count: int, recipe: Recipe, generator: torch.Generator) -> VideoDraw:
    """Draw an update of at most `count` clips of a video, on the CPU."""
    count = min(count, video.clips)
    spare = video.clips - count
    first = int(torch.randint(spare + 1, (), generator=generator)) if recipe.random_start and spare else 0
    batch, channels, _, height, width = video.latents.shape
    shape = (batch, channels, clip_frames(), height, width)

    def levels(shift: float) -> Tensor:
        return sigmas(count * batch, shift, recipe.sampling, generator).reshape(count, batch)

    def noise() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, generator=generator) for _ in range(count))

    own = recipe.forcing == DIRECT and recipe.history_shift > 0
    return VideoDraw(
        first=first,
        count=count,
        sigmas=levels(recipe.loss_shift),
        noises=noise(),
        dropped=tuple((torch.rand(count, generator=generator) < recipe.drop_memory).tolist()),
        history_sigmas=levels(recipe.history_shift) if own else None,
        history_noises=noise() if own else (),
        rollout_noises=noise() if recipe.forcing == STUDENT else (),
    )


def clips_at(step: int, steps: int, most: int, least: int = 1) -> int:
    """The curriculum: clips of a video at an update of 0..steps-1; 1, 2, 4, 8, 16 with equal numbers of updates.

    most: the largest count wanted (also between two counts), least: the smallest one worth an update.
    """
    counts = [c for c in CLIP_COUNTS if least <= c < most] + [max(most, least)]
    return counts[min(step * len(counts) // max(steps, 1), len(counts) - 1)]
