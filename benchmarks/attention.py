"""Attention's backends by shape and number format: `python scripts/run.py -m benchmarks.attention [--record]`.

Every backend of 'Attention Backend' that passes its self-test on this device, as that node calls it: in one process, in
turn, the median of repeated runs; seconds of the processor on a CPU, which other work hardly changes, and of the wall
on a GPU. Beside it, measured in the same turns, the rate of a matrix product: what a block multiplies its tokens with
to get queries, keys, values and the MLP's numbers. Errors are relative L2 norms to PyTorch's attention in fp32 on the
same random numbers.

Shapes are those of FramePack and Wan at full size on a GPU, and small ones on a CPU, down to where bf16 in an fp32
network stops to pay. A backend that is not taken there is measured all the same, and the reason is told.

Exits with 1 if what the automatic choice takes for granted does not hold: each backend is right, none takes MARGIN
times as long as one that is ranked behind it, and none that is left out is MARGIN times as fast as the one taken.
Where one backend alone is there, there is no order, and it says so.

Shape suffixes: B batch, H heads, L tokens, D numbers a head.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from frame_memory.kernels.attention import BF16, CANDIDATES, Candidate
from frame_memory.kernels.op import Call
from frame_memory.sampling.attention_backend import first_right
from frame_memory.sampling.attention_check import ALLOWED, Place

from . import record
from .memory_cost import in_turn
from .speed import product

MARGIN = 1.15
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PYTORCH = CANDIDATES[-1].label
COLUMNS = ("heads x tokens x numbers", "product, G", "backend", "s a call", "G", "% of the product's", "times PyTorch",
           "error", "not taken")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
LEAST, MOST = 2e9, 200  # operations that are timed together, of calls that are short; and calls


@dataclass(frozen=True)
class Shape:
    """A call of attention: heads, tokens, and numbers a head."""

    heads: int
    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.heads} x {self.tokens:,} x {self.width}"

    @property
    def operations(self) -> float:
        """Of both products."""
        return 4.0 * self.heads * self.tokens**2 * self.width


CPU_SHAPES = (*(Shape(2, tokens, 128) for tokens in (16, 128, 256, 512, 1000, 1800)), Shape(4, 5600, 128),
              Shape(2, 1000, 64))  # fmt: skip
# FramePack at 640x608; Wan 14B and 1.3B at 832x480, 81 frames.
GPU_SHAPES = (Shape(24, 18349, 128), Shape(40, 32760, 128), Shape(12, 32760, 128))


@dataclass(frozen=True)
class Side:
    """A backend. run: of queries, keys and values `[1, H, L, D]`. left_out: why it is not taken; "" where it may be."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    left_out: str


@dataclass(frozen=True)
class Took:
    """Of a side: seconds of a call, relative error, and why it is not taken."""

    seconds: float
    error: float
    left_out: str = ""


def sides(shape: Shape, place: Place, candidates: Sequence[Candidate]) -> dict[str, Side]:
    """Those that are right by the self-test, in the order of their rank."""
    call, made = Call(place.device, place.dtype, shape.width, shape.tokens), {}
    for candidate in candidates:
        backend, _ = first_right(place, candidate.label, candidates)
        if backend is not None:
            _, against = first_right(place, candidates=(candidate,))
            too_short = candidate.needs.missing(call)
            left_out = too_short or against.get(candidate.label, "")
            run = partial(backend, None, heads=shape.heads, skip_reshape=True)
            made[candidate.label] = Side(_narrowed if too_short and not candidate.host else run, left_out)
    return made


def refused(place: Place, candidates: Sequence[Candidate]) -> str:
    """Which cannot be used at all, and why."""
    against = (first_right(place, candidate.label, candidates) for candidate in candidates)
    return "; ".join(f"{name}: {why}" for found, told in against if found is None for name, why in told.items())


def _narrowed(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    """Where our own op would go back to PyTorch's."""
    return BF16.run(q_BHLD, k_BHLD, v_BHLD).transpose(1, 2).flatten(2)


@torch.inference_mode()
def measure(shape: Shape, place: Place, repeats: int, candidates: Sequence[Candidate]) -> tuple[dict[str, Took], float]:
    """(what each side took, operations a second of the matrix product)."""
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.tokens, shape.heads, shape.width)  # a model's layout: heads beside their numbers
    parts = [torch.randn(size, generator=generator).to(place.device, place.dtype).transpose(1, 2) for _ in range(3)]
    truth = scaled_dot_product_attention(*(part.float() for part in parts)).transpose(1, 2).flatten(2)
    made, device = sides(shape, place, candidates), place.device.type
    errors = {name: float((side.run(*parts).float() - truth).norm() / truth.norm()) for name, side in made.items()}
    del truth
    multiply, work = product(shape.tokens, shape.heads * shape.width, place.dtype, device)
    count, products = (max(1, min(MOST, math.ceil(LEAST / each))) for each in (shape.operations, work))
    actions = {name: repeated(partial(side.run, *parts), count) for name, side in made.items()}
    actions[""] = repeated(multiply, products)
    in_turn(actions, device, 1)
    clock = 0 if device == "cuda" else 1
    took = {name: both[clock] for name, both in in_turn(actions, device, repeats).items()}
    rate = work * products / took.pop("")
    return {n: Took(seconds / count, errors[n], made[n].left_out) for n, seconds in took.items()}, rate


def repeated(action: Callable[[], object], count: int) -> Callable[[], None]:
    """So many calls as one."""

    def run() -> None:
        for _ in range(count):
            action()

    return run


def misses(took: dict[str, Took]) -> Iterator[str]:
    """What a run fails by. took: by name, in the order of rank."""
    taken = {name: one.seconds for name, one in took.items() if not one.left_out}
    for name, one in took.items():
        if not one.error <= ALLOWED:
            yield f"{name} is off by {one.error:.0%}"
        if one.left_out and taken:
            first, seconds = next(iter(taken.items()))
            if one.seconds * MARGIN < seconds:
                yield f"{name} is left out and {seconds / one.seconds:.2f} times as fast as {first}"
    for place, (name, seconds) in enumerate(taken.items()):
        for behind, less in list(taken.items())[place + 1 :]:
            if seconds > MARGIN * less:
                yield f"{name} takes {seconds / less:.2f} times as long as {behind}, which is ranked behind it"


def figures_of(shape: Shape, one: Took, pytorch: float, rate: float) -> dict[str, float]:
    """What is recorded of a side. pytorch: its seconds; rate: of the matrix product."""
    own = shape.operations / one.seconds
    return {
        "seconds a call": one.seconds, "rate, 1e9 operations a second": own / 1e9, "share of the product's": own / rate,
        "times as fast as PyTorch": pytorch / one.seconds, "relative error": one.error,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    args = parse(arguments)
    device = torch.device(args.device)
    where = f"cpu, threads: {torch.get_num_threads()}" if args.device == "cpu" else args.device
    rows, missed, compared = [], [], False
    for kind in args.dtypes:
        for width in dict.fromkeys(shape.width for shape in args.shapes):
            place = Place(width, DTYPES[kind], device)
            print(f"\nNot used on {place}: {refused(place, CANDIDATES) or 'none is left out'}.")
        print(f"\n{kind}, {where}; G is 1e9 operations a second\n\n{HEAD}")
        for shape in args.shapes:
            took, rate = measure(shape, Place(shape.width, DTYPES[kind], device), args.repeats, CANDIDATES)
            case = f"{shape}, {kind}, {where}"
            rows.append((case, "matrix product, 1e9 operations a second", rate / 1e9))
            for name, one in took.items():
                figures = figures_of(shape, one, took[PYTORCH].seconds, rate)
                print(line_of(shape, name, figures, rate, one.left_out), flush=True)
                side = f"{case}, {name}, not taken" if one.left_out else f"{case}, {name}"
                rows += [(side, measured, value) for measured, value in figures.items()]
            missed += [f"{case}: {problem}" for problem in misses(took)]
            compared |= len(took) > 1
    for problem in missed:
        print(f"\nFAILED: {problem}")
    if not compared:
        print(f"\n{record.UNDECIDED}one backend only, nothing to compare")
    if args.record:
        record.append(f"benchmarks.attention --repeats {args.repeats}", rows)
    return int(bool(missed))


def line_of(shape: Shape, name: str, figures: dict[str, float], rate: float, left_out: str) -> str:
    """A row of the table."""
    seconds, own, share, faster, error = figures.values()
    return (
        f"| {shape} | {rate / 1e9:.4g} | {name} | {seconds:.3g} | {own:.4g} | {100 * share:.0f} | {faster:.2f} | "
        f"{error:.1e} | {left_out} |"
    )


def shape_of(words: str) -> Shape:
    """A shape as it is written on the command line."""
    return Shape(*map(int, words.split("x")))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=GPU_SHAPES if gpu else CPU_SHAPES,
                        metavar="HxLxD", help="heads, tokens and numbers a head, as 24x18349x128")  # fmt: skip
    dtypes = ["bf16", "fp16"] if gpu else ["fp32", "bf16"]
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes)
    record.add_options(parser, repeats=9)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
