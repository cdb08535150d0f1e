"""The papers' claims at small scale: `python scripts/run.py -m benchmarks.claims memorypack [--minutes 60] ...`, and
`frame-preservation`.

Trains, or loads, every variant of a paper's tables on long videos whose truth is known (benchmarks/long_world.py),
measures what it remembers, and prints the tables with mean and 95 % interval over the seeds: claims_rows.py and
claims_frames.py say what is compared. Every row (a variant and a seed) is kept in the folder of --work: a call that is
stopped, or that runs out of its minutes, is gone on with by the same command.
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
from typing import Any

import numpy as np
import torch
from scipy import stats

from . import record
from .claims_frames import FramePreservationClaim
from .claims_rows import MemoryPackClaim
from .claims_training import Claim, OutOfTime, Workshop, slug
from .long_clips import LongClips, codec_of
from .long_world import random_long_scene

CLAIMS = {"memorypack": MemoryPackClaim(), "frame-preservation": FramePreservationClaim()}
SCENE_SEED = 2026
CONFIDENCE = 0.95
MISSING = "missing"


def row_path(work: Path, variant: Any, seed: int) -> Path:
    """Where a row's figures lie."""
    return work / f"{slug(variant.name)}-s{seed}.json"


def read_row(path: Path, identity: Mapping) -> dict[str, dict[str, float]]:
    """A row's figures by case; empty where it is not there yet. Raises SystemExit for other settings."""
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


def identity_of(claim: Claim, variant: Any, budget: Any, args) -> dict:
    """The settings that a row depends on."""
    return claim.identity(variant, budget, args.scenes, args.sample_steps)


def fill_row(claim: Claim, shop: Workshop, variant: Any, seed: int, args) -> None:
    """Train what the row needs, measure it, keep the figures. Raises OutOfTime."""
    path, identity = row_path(args.work, variant, seed), identity_of(claim, variant, shop.budget, args)
    figures = read_row(path, identity)
    wanted = {case: words for case, words in claim.cases(variant, args.seconds).items() if case not in figures}
    if not wanted:
        return
    print(f"{variant.name}, seed {seed}: {', '.join(wanted.values())}", flush=True)
    write_row(path, identity, {**figures, **shop.figures(variant, seed, list(wanted))})


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


def tables(claim: Claim, args, budget: Any) -> tuple[list[str], list[tuple[str, str, float]]]:
    """(lines to print, figures to record) of all rows that are there."""
    lines, figures = [], {}
    for title, names in claim.tables.items():
        measures = claim.measures(claim.variants[names[0]])
        for case, words in claim.cases(claim.variants[names[0]], args.seconds).items():
            lines += ["", f"**{title}, {words}**", ""]
            lines += ["| variant | seeds | " + " | ".join(head for head, _ in measures.values()) + " |"]
            lines += ["|" + "---|" * (len(measures) + 2)]
            for name in names:
                rows = _rows(claim, claim.variants[name], case, args, budget)
                cells = _cells(list(rows.values()), measures)
                lines.append(
                    f"| {name} | {len(rows)} of {len(args.seeds)} | " + " | ".join(text for _, text, _ in cells) + " |"
                )
                for seed, row in rows.items():
                    its = {(f"{name}, {words}, seed {seed}", measure): row[measure] for measure in measures}
                    figures |= {place: value for place, value in its.items() if not math.isnan(value)}
                if rows:
                    figures[f"{name}, {words}", "seeds"] = len(rows)
                for measure, _, (mean, half) in cells:
                    if not math.isnan(mean):
                        figures[f"{name}, {words}", measure] = mean
                    if not math.isnan(half):
                        figures[f"{name}, {words}", f"{measure}, half interval"] = half
    return lines, [(case, measure, value) for (case, measure), value in figures.items()]


def _rows(claim: Claim, variant: Any, case: str, args, budget: Any) -> dict[int, dict[str, float]]:
    """A case's figures by seed, of the rows that are there."""
    identity = identity_of(claim, variant, budget, args)
    rows = {seed: read_row(row_path(args.work, variant, seed), identity).get(case) for seed in args.seeds}
    return {seed: row for seed, row in rows.items() if row is not None}


def _cells(rows: Sequence[Mapping[str, float]], measures: Mapping[str, tuple[str, str]]):
    """(measure, text of the cell, (mean, half of the interval)) of each measure."""
    cells = []
    for measure, (_, form) in measures.items():
        mean, half = interval([row[measure] for row in rows])
        if not rows:
            text = MISSING
        elif math.isnan(mean):
            text = "–"
        else:
            text = form.format(mean) + ("" if math.isnan(half) else f" ± {form.format(half)}")
        cells.append((measure, text, (mean, half)))
    return cells


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    claims = parser.add_subparsers(dest="claim", required=True)
    for name, claim in CLAIMS.items():
        _add_options(claims.add_parser(name, description=type(claim).__doc__), claim)
    args = parser.parse_args(argv)
    if args.toy and args.record:
        parser.error("figures of --toy say nothing and are not recorded")
    if args.toy:
        args.seeds, args.scenes, args.sample_steps = args.seeds[:1], 1, 1
    return args


def _add_options(parser: argparse.ArgumentParser, claim: Claim) -> None:
    parser.add_argument("--work", type=Path, default=claim.folder, help="folder of rows and weights")
    parser.add_argument("--only", nargs="+", choices=claim.variants, help="fill only the rows of these variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", nargs="+", type=float, default=claim.seconds, help="lengths of the videos")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before this, go on in the next call")
    budget = claim.budget()
    for field, what in claim.settings.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(budget, field), help=f"of {what}")
    parser.add_argument("--batch", type=int, default=budget.batch)
    parser.add_argument("--clips", type=int, default=budget.clips, help="scenes to train on")
    parser.add_argument("--scenes", type=int, default=16, help="scenes to measure on")
    parser.add_argument("--sample-steps", type=int, default=12)
    parser.add_argument("--toy", action="store_true", help="one step and one scene: only to see that all of it runs")
    parser.add_argument("--print", action="store_true", help="print the tables from the rows that are there, and stop")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def budget_of(args: argparse.Namespace) -> Any:
    """How much is trained by this command."""
    claim = CLAIMS[args.claim]
    budget = claim.budget(**{name: getattr(args, name) for name in (*claim.settings, "batch", "clips")})
    return claim.toy(budget) if args.toy else budget


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    claim, deadline, budget = CLAIMS[args.claim], time.monotonic() + 60 * args.minutes, budget_of(args)
    if not args.print:
        rng = np.random.default_rng(SCENE_SEED)
        scenes = [random_long_scene(rng, shown=False, named=False) for _ in range(args.scenes)]
        clips = LongClips.make(args.work, codec_of(args.work), budget.clips, seed=1)
        shop = claim.workshop(
            args.work, clips, budget, args.device, deadline, lambda text: print(text, flush=True), scenes,
            args.sample_steps,
        )  # fmt: skip
        try:
            for seed in args.seeds:
                for name in args.only or claim.variants:
                    fill_row(claim, shop, claim.variants[name], seed, args)
        except OutOfTime:
            print(f"The {args.minutes:g} minutes are over. The same command goes on from here.")
    lines, figures = tables(claim, args, budget)
    print("\n".join(lines))
    if args.record:
        record.append(f"benchmarks.claims {' '.join(sys.argv[1:] if argv is None else argv)}", figures)


if __name__ == "__main__":
    main()
