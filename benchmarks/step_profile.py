"""Where a step's time goes: `python scripts/run.py -m benchmarks.step_profile [--record]`.

The steps of `benchmarks.speed`, diffusers' and ours, under torch's profiler: shares of an op's own time by what it is.
The two take turns, and the first step of each does not count.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from . import record, speed

# By the names of torch's ops, the first that fits.
PARTS = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "matrix products": ("addmm", "aten::mm", "bmm", "aten::linear", "matmul", "convolution"),
    "GELU": ("gelu",),
    "joining tensors": ("aten::cat",),
}
REST = "all else"
SIDES = (speed.DIFFUSERS, speed.OURS)


def part_of(op: str) -> str:
    """What an op is."""
    return next((part for part, names in PARTS.items() if any(name in op for name in names)), REST)


def spent_in(events: Iterable[FunctionEventAvg], device: str) -> Counter[str]:
    """By part, the ops' own time on a device. torch gives a GPU's to the op and once more to the kernel's own event."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            spent[part_of(event.key)] += own
    return spent


def shares(steps: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """By side and part, of the time of all ops of that side."""
    spent: dict[str, Counter[str]] = {name: Counter() for name in steps}
    for number in range(1 + repeats):
        for name, step in steps.items():
            with torch.profiler.profile(acc_events=True) as seen:
                step()
            if number:
                spent[name] += spent_in(seen.key_averages(), device)
    return {name: {part: found[part] / found.total() for part in (*PARTS, REST)} for name, found in spent.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    args = parse(arguments)
    size, rows = speed.SIZES[args.size], []
    made = speed.sides(size, args.dtype, args.device)
    case = f"{args.size}, {speed.HEAD * size.heads} wide, {args.dtype}, {args.device}"
    found = shares({name: made[name] for name in SIDES}, args.device, args.repeats)
    print(f"Shares of a step, {case}, %\n\n| | {' | '.join(SIDES)} |\n|{'---|' * (1 + len(SIDES))}")
    for part in (*PARTS, REST):
        print(f"| {part} | {' | '.join(f'{100 * found[side][part]:.0f}' for side in SIDES)} |")
        rows += [(f"{case}, {side}", f"share of {part}", found[side][part]) for side in SIDES]
    if args.record:
        record.append(f"benchmarks.step_profile --repeats {args.repeats}", rows)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=speed.SIZES, default="full" if gpu else "mid")
    parser.add_argument("--dtype", choices=speed.DTYPES, default="bf16" if gpu else "fp32")
    record.add_options(parser, repeats=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
