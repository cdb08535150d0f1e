"""What a device does at best: `python scripts/run.py -m benchmarks.roof [--size full] [--record]`.

The largest matrix product of a block, alone, on random numbers, in each number format that the device has fast products
in, by the host's own quantised product where the format has scales. Memory copied on the device, bytes read and written
counted. And weights brought from RAM, pinned as the host pins them and not: what a step must be longer than if weights
in RAM are to cost nothing. Medians of repeated runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import comfy.quant_ops
import torch
from torch.nn.functional import linear

from . import record
from .memory_cost import clocked
from .speed import DTYPES, HEAD, ROUND_TO, SIZES, Size, multiplies, product
from .stage_two import needs

WARM = 3
COPIED = 2**30  # bytes: more than any cache


def products(size: Size, device: str) -> Iterator[tuple[str, Callable[[], object], float]]:
    """(number format, the largest product, its operations)."""
    tokens, hidden = 9 * size.height * size.width // 4, size.heads * HEAD
    for kind in ("fp32", "bf16"):
        yield kind, *product(tokens, hidden, DTYPES[kind], device)
    for kind in ROUND_TO:
        if multiplies(kind, device):
            yield kind, *quantised_product(tokens, hidden, kind, device)


def quantised_product(tokens: int, hidden: int, kind: str, device: str) -> tuple[Callable[[], object], float]:
    """The same by the host's product of numbers with scales. In int8 it rounds one side itself, as in a layer."""
    layout = comfy.quant_ops.QUANT_ALGOS[ROUND_TO[kind]]["comfy_tensor_layout"]
    how = {"per_channel": True} if kind == "int8" else {"scale": "recalculate"}
    a, b = (torch.randn(n, hidden, device=device, dtype=DTYPES[kind]) for n in (tokens, 7 * hidden))
    weight = comfy.quant_ops.QuantizedTensor.from_float(b, layout, **how)
    if kind == "fp8":
        a = comfy.quant_ops.QuantizedTensor.from_float(a, layout, **how)
    return lambda: linear(a, weight), 2.0 * tokens * hidden * 7 * hidden


def copies(count: int, device: str) -> Iterator[tuple[str, Callable[[], object], float]]:
    """(what is copied, the copy, its bytes)."""
    there, again = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    yield "on the device, read and written", lambda: again.copy_(there), 2.0 * count
    if device == "cuda":
        for name, pinned in (("from pinned RAM", True), ("from RAM that is not pinned", False)):
            here = torch.ones(count, dtype=torch.uint8, pin_memory=pinned)
            yield name, lambda here=here: there.copy_(here), float(count)


def median(action: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds of one call."""
    took = [clocked(action, device)[0] for _ in range(WARM + repeats)]
    return statistics.median(took[WARM:])


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    case, rows, link = f"{args.size}, {args.device}", [], 0.0
    for kind, action, work in products(SIZES[args.size], args.device):
        rate = work / median(action, args.device, args.repeats) / 1e9
        rows.append((f"{case}, {kind}", "matrix product, 1e9 operations a second", rate))
    for name, action, count in copies(args.bytes, args.device):
        rate = count / median(action, args.device, args.repeats) / 1e9
        rows.append((f"{case}, {name}", "copy, 1e9 bytes a second", rate))
        link = rate if name == "from pinned RAM" else link
    for where, what, value in rows:
        print(f"| {where} | {what} | {value:.4g} |", flush=True)
    if link:
        for name, size in (("bf16", 2.0), ("fp8", 1.0)):
            seconds = needs(size).weights / link / 1e9
            print(f"All weights of the 13 B model in {name} take {seconds:.3g} s from pinned RAM.")
    if args.record:
        record.append(f"benchmarks.roof --repeats {args.repeats}", rows)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full" if gpu else "tiny")
    parser.add_argument("--bytes", type=int, default=COPIED, help="that are copied")
    record.add_options(parser, repeats=9)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
