"""Skipped steps on the self-test models: `python scripts/run.py -m benchmarks.step_cache [--record]`.

Videos of the synthetic world by the shipped F1 and F0, made with all steps, with fewer steps, with core's EasyCache and
with Section Step Cache at several settings: how many times fewer evaluations, seconds a section (of the processor;
on a GPU those of the wall), and PSNR of latents and of decoded pictures against the video with all steps, mean and
lowest over the seeds. The peak of a latent's PSNR is the range of its own numbers; of equal videos it is infinite, and
so is then the mean.

What a section loses goes into the history of the next: `--seconds` says how long the videos are. Exits with 1 unless
the default makes 2.2 times fewer evaluations with 25 steps at 26 dB or more of every video's pictures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode
from torch import Tensor

from frame_memory.sampling.step_cache import DRIFT, with_step_cache
from frame_memory.video.fidelity import psnr

from . import record
from .memory_cost import Row, clocked, table
from .quality import asked, decoded, load, sampled
from .world import random_scene

FEWER_EVALUATIONS, LOWEST = "times fewer evaluations", "PSNR of pictures, dB, lowest"
GOAL_STEPS, GOALS = 25, ((FEWER_EVALUATIONS, 2.2), (LOWEST, 26.0))
FEWER = (15, 11)
DRIFTS = (0.05, 0.1, DRIFT)
THRESHOLDS = (0.05, 0.2)  # of EasyCache; 0.2 is its default
SECTION_SECONDS = 1.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("side", "evaluations a section", "times fewer", "s a section", "latents, dB", "pictures, dB", "lowest")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


@dataclass(frozen=True)
class Made:
    """A video of one seed. evaluations: of the network. wall, busy: seconds, of the processor the second."""

    samples: Tensor
    pixels_THWC: Tensor
    evaluations: int
    wall: float
    busy: float


def make(model, vae, kind: str, given: tuple[dict, list], seconds: float, steps: int, seed: int) -> Made:
    """A video by the pack's own section loop. The time is the sampler's alone."""
    evaluations: list[int] = []

    def count(executor, *args, **kwargs):
        evaluations.append(1)
        return executor(*args, **kwargs)

    counted = model.clone()
    counted.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)  # inside of EasyCache's
    latent: dict = {}
    took = clocked(lambda: latent.update(sampled(counted, kind, *given, seconds, steps, seed)), DEVICE)
    return Made(latent["samples"], decoded(vae, latent).float(), len(evaluations), *took)


def seconds_of(found: Sequence[Made], device: str) -> tuple[str, float]:
    """(name, median) of the seconds that count: a GPU's by the wall, a CPU's by the processor, which others use too."""
    if device == "cuda":
        return "seconds a section", statistics.median(m.wall for m in found)
    return "processor seconds a section", statistics.median(m.busy for m in found)


def sides(steps: int) -> dict[str, tuple[Callable, int]]:
    """By name: the MODEL of a side, made of the plain one, and its steps."""
    made: dict[str, tuple[Callable, int]] = {"all steps": (lambda model: model, steps)}
    made |= {f"{fewer} steps": (lambda model: model, fewer) for fewer in FEWER if fewer < steps}
    for threshold in THRESHOLDS:
        made[f"EasyCache {threshold:g}"] = (lambda model, t=threshold: easycache(model, t), steps)
    for drift in DRIFTS:
        made[f"drift {drift:g}"] = (lambda model, d=drift: with_step_cache(model, d), steps)
    return made


def easycache(model, threshold: float):
    """Core's node at its defaults but for the threshold."""
    return EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0]


def near(made: Made, exact: Made) -> tuple[float, float]:
    """PSNR of latents and of pictures, dB."""
    peak = float(exact.samples.max() - exact.samples.min())
    return psnr(made.samples / peak, exact.samples / peak), psnr(made.pixels_THWC, exact.pixels_THWC)


@torch.inference_mode()  # one for all: quantised weights that were moved in another one cannot be moved again
def measure(kind: str, steps: int, seeds: int, seconds: float) -> Iterator[tuple[str, dict[str, float]]]:
    """(side, its figures), the plain one first; sides take turns at every seed."""
    model, vae = load(kind)
    rng, every = np.random.default_rng(2026), sides(steps)
    made = {name: [] for name in every}
    for seed in range(seeds):
        given = asked(vae, random_scene(rng, tidy=True))
        for name, (change, count) in every.items():
            made[name].append(make(change(model), vae, kind, given, seconds, count, seed))
    exact = made["all steps"]
    sections = round(seconds / SECTION_SECONDS)
    for name, found in made.items():
        clock, median = seconds_of(found, DEVICE)
        figures = {
            "evaluations a section": statistics.mean(m.evaluations for m in found) / sections,
            FEWER_EVALUATIONS: sum(m.evaluations for m in exact) / sum(m.evaluations for m in found),
            clock: median / sections,
        }
        if name != "all steps":
            latents, pixels = zip(*(near(*pair) for pair in zip(found, exact, strict=True)), strict=True)
            figures |= {
                "PSNR of latents, dB": statistics.mean(latents),
                "PSNR of pictures, dB": statistics.mean(pixels),
                LOWEST: min(pixels),
            }
        yield name, figures


def line_of(name: str, figures: dict[str, float]) -> str:
    """A row of the table."""
    return f"| {name} | " + " | ".join(f"{value:.3g}" for value in figures.values()) + " |"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    goals: list[Row] = []
    rows = []
    for kind in args.kinds:
        for steps in args.steps:
            case = f"self-test {kind}, {steps} steps, {args.seconds:g} s"
            print(f"\n{case}\n\n{HEAD}", flush=True)
            for name, figures in measure(kind, steps, args.seeds, args.seconds):
                print(line_of(name, figures), flush=True)
                rows += [(f"{case}, {name}", measured, value) for measured, value in figures.items()]
                if name == f"drift {DRIFT:g}" and steps == GOAL_STEPS:
                    goals += [(f"{case}, {name}", goal, figures[goal], (least, math.inf)) for goal, least in GOALS]
    lines, good = table(goals)
    print("\n" + "\n".join(lines) if goals else f"\nNo goal was looked at: it is that of {GOAL_STEPS} steps.")
    if args.record:
        record.append(f"benchmarks.step_cache --seeds {args.seeds} --seconds {args.seconds:g}", rows)
    return 0 if good else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["F1", "F0"], choices=["F1", "F0"])
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 12])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.4)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
