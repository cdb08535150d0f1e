"""Parity of our FramePack network and section loop with independent implementations, as tables.

    python scripts/run.py -m benchmarks.parity [--published PATH] [--quick]

Forward passes: diffusers' HunyuanVideoFramepackTransformer3DModel and ours with the same random weights, the true
topology at two heads, latent sizes with odd paddings, batches of prompts of different length, F0 and F1 positions.
Rollouts: three sections by our loop against plain fp64 loops written from the reference (`parity_oracle.py`).
`--published PATH` makes the same tables against a checkout of the published code (not part of this repository).
Exit code 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, replace

from comfy.cli_args import args as host_args

if __name__ == "__main__":  # its bounds and networks are used on other devices too
    host_args.cpu = True
host_args.use_pytorch_cross_attention = True

import torch

from benchmarks import parity_models as pm
from frame_memory.plan import PRESETS, parse_schedule, plan_sections

FP32_BOUND, BF16_BOUND, ROLLOUT_BOUND = 1e-6, 1e-2, 1e-5
SIZES = ((10, 18), (12, 20), (14, 22), (16, 16), (18, 26), (26, 14))
LARGE_SIZE = (52, 68)
KINDS = {"F0": "F0 inverted", "F1": "F1 forward"}
TEXT_LENGTHS = (37, 11)
IMAGE_TOKENS = 729


@dataclass(frozen=True)
class Case:
    """One line of the forward table. height, width: latent pixels."""

    kind: str
    height: int
    width: int
    batch: int
    bf16: bool


@dataclass(frozen=True)
class Row:
    """What a case gave: relative RMS errors, None where it was not run."""

    case: Case
    fp32: float
    bf16: float | None = None
    ours_bf16: float | None = None
    theirs_bf16: float | None = None

    @property
    def passed(self) -> bool:
        return self.fp32 <= FP32_BOUND and (self.bf16 is None or self.bf16 <= BF16_BOUND)


class Networks:
    """One random network in four forms: theirs and ours, in fp32 and bf16, on the device of the reference."""

    def __init__(self, reference: torch.nn.Module, run_theirs=pm.run_reference):
        self.run_theirs, self.device = run_theirs, next(reference.parameters()).device
        self.theirs = {torch.float32: reference, torch.bfloat16: copy.deepcopy(reference).to(torch.bfloat16)}
        self.ours = {dtype: pm.make_ours(reference.state_dict(), dtype, self.device) for dtype in self.theirs}


def section_layout(kind: str):
    """Positions of the window and of the context groups, from the plan: the first of three sections."""
    section = plan_sections(parse_schedule(PRESETS[KINDS[kind]]), sections=3).sections[0]
    return section.positions, tuple((g.kernel, g.positions) for g in section.groups)


def compare(networks: Networks, case: Case, image_tokens: int = IMAGE_TOKENS) -> Row:
    """Run one section's forward pass in both networks."""
    positions, groups = section_layout(case.kind)
    inputs = pm.make_inputs(
        case.height,
        case.width,
        positions,
        groups,
        batch=case.batch,
        seed=case.height * 1000 + case.width + case.batch,
        text_lengths=TEXT_LENGTHS,
        image_tokens=image_tokens,
    )

    inputs = pm.moved(inputs, networks.device)
    with networks.device:
        return _compared(networks, case, inputs)


def _compared(networks: Networks, case: Case, inputs: pm.Inputs) -> Row:
    def both(dtype, given):
        theirs = networks.run_theirs(networks.theirs[dtype], given, dtype)
        return theirs, pm.run_ours(networks.ours[dtype], given, dtype)

    theirs, ours = both(torch.float32, inputs)
    row = Row(case, pm.relative_rms(ours, theirs))
    if not case.bf16:
        return row
    # The truth for bf16 is fp32 on what a bf16 network is given: time and guidance rounded to bf16.
    truth = networks.run_theirs(networks.theirs[torch.float32], pm.as_bf16_sees(inputs), torch.float32)
    theirs, ours = both(torch.bfloat16, inputs)
    return replace(
        row,
        bf16=pm.relative_rms(ours, theirs),
        ours_bf16=pm.relative_rms(ours, truth),
        theirs_bf16=pm.relative_rms(theirs, truth),
    )


def cases(quick: bool) -> tuple[Case, ...]:
    """The lines of the table. The large size would cost minutes a line, so it has two of the four."""
    out = [Case(k, h, w, b, True) for h, w in (SIZES[:2] if quick else SIZES) for k in KINDS for b in (1, 2)]
    if not quick:
        out += [Case("F0", *LARGE_SIZE, 1, True), Case("F1", *LARGE_SIZE, 2, False)]
    return tuple(out)


def forward_table(networks: Networks, name: str, quick: bool) -> bool:
    """Print the table of forward passes; returns whether every bound held."""
    print(f"\nForward pass: ours against {name}, relative RMS (bounds: fp32 {FP32_BOUND:g}, bf16 {BF16_BOUND:g})")
    print("kind latent  batch   fp32      bf16      | ours bf16 to fp32, theirs bf16 to fp32 |   s")
    passed = True
    for case in cases(quick):
        began = time.perf_counter()
        row = compare(networks, case)
        errors = (row.fp32, row.bf16, row.ours_bf16, row.theirs_bf16)
        fp32, bf16, ours, theirs = (f"{e:9.2e}" if e is not None else f"{'-':>9}" for e in errors)
        where = f"{case.kind:<4} {case.height:>3}x{case.width:<3} {case.batch:>4}"
        verdict = "" if row.passed else "   MISSED"
        took = time.perf_counter() - began
        print(f"{where}  {fp32} {bf16}    {ours}  {theirs}{verdict}   {took:5.1f}", flush=True)
        passed &= row.passed
    return passed


def rollout_table(quick: bool, published=None) -> bool:
    """Print the error of each section of a rollout; returns whether the bound held.

    The published sampler is run in fp64, and once more in fp32 as it was published, which no bound is set to: its own
    rounding shows there (see `Published.sample`).
    """
    theirs = "the published network in fp32, its sampler in fp64" if published else "plain fp64 loops"
    print(
        f"\nRollout of 3 sections: ours against {theirs}, relative RMS in the order of making (bound {ROLLOUT_BOUND:g})"
    )
    passed = True
    for kind, schedule in KINDS.items():
        for steps in (8,) if quick else (8, 25):
            passed &= _rollout_line(kind, schedule, steps, published, torch.float64)
            if published:
                _rollout_line(kind, schedule, steps, published, torch.float32)
    return passed


def _rollout_line(kind: str, schedule: str, steps: int, published, arithmetic: torch.dtype) -> bool:
    from benchmarks import parity_rollout

    began = time.perf_counter()
    errors = parity_rollout.compare(kind, schedule, steps=steps, published=published, arithmetic=arithmetic)
    as_published = arithmetic == torch.float32
    passed = max(errors) <= ROLLOUT_BOUND
    verdict = "   sampler in fp32, no bound" if as_published else "" if passed else "   MISSED"
    cells, took = " ".join(f"{e:9.2e}" for e in errors), time.perf_counter() - began
    print(f"{kind:<4} {steps:>3} steps  {cells}{verdict}   {took:5.1f} s", flush=True)
    return passed


def main(argv: list[str] | None = None) -> int:
    """Run the tables; 0 where every bound held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", metavar="PATH", help="a checkout of the published FramePack code")
    parser.add_argument("--quick", action="store_true", help="two sizes and short rollouts")
    options = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    passed = forward_table(Networks(pm.make_reference()), "diffusers", options.quick)
    passed &= rollout_table(options.quick)
    if options.published:
        from benchmarks import parity_published

        published = parity_published.load(options.published)
        networks = Networks(published.make(pm.make_reference()), published.run)
        passed &= forward_table(networks, "the published code", options.quick)
        passed &= rollout_table(options.quick, published)
    print("\nEvery bound held." if passed else "\nA bound was missed.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
