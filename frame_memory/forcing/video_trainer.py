"""One optimiser step a video: gradients of all clips of a video are added up, then the weights move once.

A step either happens as a whole or not at all: a loss that is not finite, and an interruption in the middle of a video,
leave weights, optimiser and random numbers as they were before it. Source: reference/memorypack.md section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .loop import is_matrix
from .muon import Muon
from .workers import ALONE, Workers

ADAMW, MUON = "AdamW", "Muon"
# How soon the rate is the full one again after a loss that was not finite: it doubles in so many good steps.
RECOVERY = 20


@dataclass(frozen=True)
class VideoSettings:
    """One run. rate: AdamW's, per step; matrix_rate: Muon's, for the matrices of the blocks (optimiser MUON).

    videos: videos of one step, over all workers. warmup: steps; after it the rate stays, so that a run can be made
    longer. average: share of the averaged weights kept at each step, 0 = no averaged weights. bad_limit: steps in a
    row whose loss may be not finite.
    """

    rate: float = 1e-5
    warmup: int = 500
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    average: float = 0.999
    videos: int = 1
    bad_limit: int = 10
    seed: int = 0
    optimiser: str = ADAMW
    matrix_rate: float = 2e-3


class TrainingStopped(RuntimeError):
    """Too many losses in a row were not finite. The weights are those of the last good step."""


@dataclass(frozen=True)
class Step:
    """What one step did. loss: mean over the clips; NaN where the step was skipped. norm: of the gradient."""

    number: int
    loss: float
    norm: float
    skipped: bool


# Draws everything from the generator, and yields (loss, share of the video's loss) for each clip; loss i is
# back-propagated before loss i + 1 is asked for.
VideoLosses = Callable[[torch.Generator], Iterable[tuple[Tensor, float]]]


class VideoTrainer:
    """Parameters by name, their optimisers, averaged weights and random numbers; `step` does one update."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: VideoSettings, workers: Workers = ALONE):
        if not parameters:
            raise ValueError("There is nothing to train.")
        self.parameters, self.settings, self.workers = parameters, settings, workers
        self.done, self.bad, self.factor = 0, 0, 1.0
        self.losses: list[float] = []
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.average = {n: p.detach().clone() for n, p in parameters.items()} if settings.average else {}
        self.optimisers = self._make_optimisers()

    def _make_optimisers(self) -> list[tuple[torch.optim.Optimizer, float]]:
        s, made = self.settings, []
        matrices = {n: p for n, p in self.parameters.items() if s.optimiser == MUON and is_matrix(n, p)}
        others = [p for n, p in self.parameters.items() if n not in matrices]
        if matrices:
            muon = Muon(list(matrices.values()), lr=s.matrix_rate, weight_decay=s.weight_decay)
            made.append((muon, s.matrix_rate))
        if others:
            adamw = torch.optim.AdamW(others, lr=s.rate, betas=s.betas, weight_decay=s.weight_decay)
            made.append((adamw, s.rate))
        return made

    @property
    def rate_share(self) -> float:
        """The share of the full rate that the next step has: less in the warm-up and after a loss of no number."""
        return self.factor * min((self.done + 1) / max(self.settings.warmup, 1), 1.0)

    def step(self, losses: VideoLosses) -> Step:
        """One update on `settings.videos` videos. Raises TrainingStopped as `settings.bad_limit` says."""
        before = self.generator.get_state()
        seeds = torch.randint(2**62, (self.settings.videos,), generator=self.generator).tolist()
        try:
            total, count = self._accumulate(losses, seeds[self.workers.rank :: self.workers.count])
        except BaseException:
            self.generator.set_state(before)
            self._forget()
            raise
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]  # all of them
        loss, count = self.workers.summed([total, count])
        self.workers.add_up(grads)
        norm = float(torch.stack(torch._foreach_norm(grads)).norm())
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            self._move(norm)
        self._forget()
        self.done += 1
        value = loss / max(count, 1) if good else math.nan
        self.losses.append(value)
        return self._judged(Step(self.done, value, norm, skipped=not good))

    def _accumulate(self, losses: VideoLosses, seeds: list[int]) -> tuple[float, float]:
        total, count = 0.0, 0
        for parameter in self.parameters.values():
            # Zeros, and not nothing: all workers must add up the same tensors.
            parameter.grad = torch.zeros_like(parameter)
        for seed in seeds:
            count += 1
            for loss, share in losses(torch.Generator().manual_seed(seed)):
                value = float(loss.detach())
                total += value * share
                if not math.isfinite(value):
                    break
                if loss.requires_grad:
                    (loss * (share / self.settings.videos)).backward()
        return total, count

    def _move(self, norm: float) -> None:
        settings = self.settings
        for parameter in self.parameters.values():
            if not parameter.requires_grad:  # it waits: no decay, and no count of steps that it had no gradient in
                parameter.grad = None
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if norm > settings.clip:
            torch._foreach_mul_(grads, settings.clip / norm)
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * self.rate_share
            optimiser.step()
        if self.average:
            keep = min(settings.average, (self.done + 1) / (self.done + 11))
            with torch.no_grad():
                current = [p.detach() for p in self.parameters.values()]
                torch._foreach_lerp_(list(self.average.values()), current, 1 - keep)

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _judged(self, step: Step) -> Step:
        if not step.skipped:
            self.bad, self.factor = 0, min(1.0, self.factor * 2 ** (1 / RECOVERY))
            return step
        self.bad, self.factor = self.bad + 1, self.factor / 2
        if self.bad >= self.settings.bad_limit:
            count, self.bad = self.bad, 0
            raise TrainingStopped(
                f"The loss was not a finite number {count} steps in a row (up to step {step.number}), though the "
                f"learning rate was halved each time. Nothing was learned from them: the weights are those of step "
                f"{step.number - count}. Lower the learning rate, or look for a video with broken latents."
            )
        return step

    def weights(self) -> dict[str, Tensor]:
        """The result by name: averaged weights where they are kept, else the weights themselves."""
        return dict(self.average) if self.average else {n: p.detach() for n, p in self.parameters.items()}
