"""The paper's claims at small scale: `python scripts/run.py -m benchmarks.claims memorypack [--minutes 60] ...`.

Trains, or loads, every variant of the paper's three tables on long videos whose truth is known
(benchmarks/long_world.py), makes videos of 10, 30 and 60 seconds that begin with a true first visit, and prints the
tables with mean and 95 % interval over the seeds. Every row (a variant and a seed) is kept in the folder of --work: a
call that is stopped, or that runs out of its minutes, is gone on with by the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from . import record
from .claims_rows import TABLES, VARIANTS, Budget, OutOfTime, Variant, Workshop, slug, toy
from .claims_videos import GIVEN, Sampling, measured
from .long_clips import LongClips, codec_of
from .long_world import random_long_scene

MEASURES = {
    "recall": ("recall", "{:.0%}"), "colour recall": ("of colour", "{:.0%}"),
    "identity": ("right visitor", "{:.0%}"), "presence": ("there or away as due", "{:.0%}"),
    "distance": ("off by, px", "{:.1f}"), "background": ("ground, dB", "{:.1f}"), "motion": ("dynamic", "{:.2f}"),
    "drift of identity": ("Δ visitor", "{:.0%}"), "drift of presence": ("Δ there", "{:.0%}"),
    "drift of distance": ("Δ px", "{:.1f}"), "drift of background": ("Δ dB", "{:.1f}"),
    "drift of motion": ("Δ dynamic", "{:.2f}"),
}  # fmt: skip
SCENE_SEED = 2026
CONFIDENCE = 0.95
MISSING = "missing"


def row_path(work: Path, variant: Variant, seed: int) -> Path:
    """Where a row's figures lie."""
    return work / f"{slug(variant.name)}-s{seed}.json"


def read_row(path: Path, identity: Mapping) -> dict[str, dict[str, float]]:
    """A row's figures by length; empty where it is not there yet. Raises SystemExit for other settings."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    if held["identity"] != dict(identity):
        other = {k for k in held["identity"].keys() | identity.keys() if held["identity"].get(k) != identity.get(k)}
        raise SystemExit(
            f"{path} was made with other settings ({', '.join(sorted(other))}). Give the same ones, or another --work."
        )
    return {k: {n: math.nan if v is None else v for n, v in m.items()} for k, m in held["figures"].items()}


def write_row(path: Path, identity: Mapping, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Keep a row; the file appears only when it is whole. A figure that is not there is null."""
    plain = {k: {n: None if math.isnan(v) else v for n, v in m.items()} for k, m in figures.items()}
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"identity": dict(identity), "figures": plain}, indent=1), encoding="utf-8")
    os.replace(part, path)


def identity_of(variant: Variant, budget: Budget, args) -> dict:
    """The settings that a row depends on."""
    sampled = {"scenes": args.scenes, "given": GIVEN, "sample_steps": args.sample_steps}
    return {**budget.until(variant.leg), **sampled}


def fill_row(shop: Workshop, variant: Variant, seed: int, args, codec) -> None:
    """Train what the row needs, make its videos, measure them, keep the figures. Raises OutOfTime."""
    path, identity = row_path(args.work, variant, seed), identity_of(variant, shop.budget, args)
    figures = read_row(path, identity)
    wanted = [s for s in args.seconds if f"{s:g}" not in figures]
    if not wanted:
        return
    network, pack = shop.network(variant, seed)
    scenes = args.made_scenes
    print(f"{variant.name}, seed {seed}: videos of {', '.join(f'{s:g}' for s in wanted)} s", flush=True)
    sampling = Sampling(args.sample_steps)
    made = measured(network, pack, scenes, codec, variant.kind, wanted, sampling, 1000 + seed, args.device, shop.alive)
    write_row(path, identity, {**figures, **made})


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval by Student's t); no interval of fewer than two values."""
    kept = [v for v in values if not math.isnan(v)]
    if not kept:
        return math.nan, math.nan
    mean = float(np.mean(kept))
    if len(kept) < 2:
        return mean, math.nan
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(kept) - 1))
    return mean, quantile * float(np.std(kept, ddof=1)) / math.sqrt(len(kept))


def tables(args, budget: Budget) -> tuple[list[str], list[tuple[str, str, float]]]:
    """(lines to print, figures to record) of all rows that are there."""
    lines, figures = [], {}
    for title, names in TABLES.items():
        for seconds in args.seconds:
            lines += ["", f"**{title}, {seconds:g} s**", ""]
            lines += ["| variant | seeds | " + " | ".join(head for head, _ in MEASURES.values()) + " |"]
            lines += ["|" + "---|" * (len(MEASURES) + 2)]
            for name in names:
                cells, found = _cells(VARIANTS[name], seconds, args, budget)
                lines.append(
                    f"| {name} | {found} of {len(args.seeds)} | " + " | ".join(text for _, text, _ in cells) + " |"
                )
                if found:
                    figures[f"{name}, {seconds:g} s", "seeds"] = found
                for measure, _, (mean, half) in cells:
                    if not math.isnan(mean):
                        figures[f"{name}, {seconds:g} s", measure] = mean
                    if not math.isnan(half):
                        figures[f"{name}, {seconds:g} s", f"{measure}, half interval"] = half
    return lines, [(case, measure, value) for (case, measure), value in figures.items()]


def _cells(variant: Variant, seconds: float, args, budget: Budget):
    identity = identity_of(variant, budget, args)
    rows = [read_row(row_path(args.work, variant, seed), identity).get(f"{seconds:g}") for seed in args.seeds]
    rows = [row for row in rows if row is not None]
    cells = []
    for measure, (_, form) in MEASURES.items():
        mean, half = interval([row[measure] for row in rows])
        if not rows:
            text = MISSING
        elif math.isnan(mean):
            text = "–"
        else:
            text = form.format(mean) + ("" if math.isnan(half) else f" ± {form.format(half)}")
        cells.append((measure, text, (mean, half)))
    return cells, len(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=("memorypack",))
    parser.add_argument("--work", type=Path, default=Path("training/claims"), help="folder of rows and weights")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="fill only the rows of these variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", nargs="+", type=float, default=[10.0, 30.0, 60.0], help="lengths of the videos")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before this, go on in the next call")
    for name, what in (
        ("base", "each base"), ("", "stage 1: of a memory, or of the network"), ("head", "stage 2"),
    ):  # fmt: skip
        field = f"{name}_steps".strip("_")
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(Budget, field), help=f"of {what}")
    parser.add_argument("--batch", type=int, default=Budget.batch)
    parser.add_argument("--clips", type=int, default=Budget.clips, help="scenes to train on")
    parser.add_argument("--scenes", type=int, default=16, help="scenes to measure on")
    parser.add_argument("--sample-steps", type=int, default=12)
    parser.add_argument("--toy", action="store_true", help="one small video a step: only to see that all of it runs")
    parser.add_argument("--print", action="store_true", help="print the tables from the rows that are there, and stop")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.toy and args.record:
        parser.error("figures of --toy say nothing and are not recorded")
    return args


def budget_of(args: argparse.Namespace) -> Budget:
    """How much is trained by this command."""
    given = {name: getattr(args, name) for name in ("base_steps", "steps", "head_steps", "batch", "clips")}
    return toy(Budget(**given)) if args.toy else Budget(**given)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    began = time.monotonic()
    budget = budget_of(args)
    rng = np.random.default_rng(SCENE_SEED)
    args.made_scenes = [random_long_scene(rng, shown=False, named=False) for _ in range(args.scenes)]
    if not args.print:
        codec = codec_of(args.work)
        clips = LongClips.make(args.work, codec, budget.clips, seed=1)
        deadline = began + 60 * args.minutes
        shop = Workshop(args.work, clips, budget, args.device, deadline, lambda text: print(text, flush=True))
        try:
            for seed in args.seeds:
                for name in args.only or VARIANTS:
                    fill_row(shop, VARIANTS[name], seed, args, codec)
        except OutOfTime:
            print(f"The {args.minutes:g} minutes are over. The same command goes on from here.")
    lines, figures = tables(args, budget)
    print("\n".join(lines))
    if args.record:
        record.append(f"benchmarks.claims {' '.join(sys.argv[1:] if argv is None else argv)}", figures)


if __name__ == "__main__":
    main()
