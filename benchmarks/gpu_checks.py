"""Does a device compute the right numbers? `python scripts/run.py -m benchmarks.gpu_checks [--record]`.

Before anything is timed on a GPU:

parity     ours against diffusers' class in fp32 and bf16: both orders of sections, sizes with odd paddings, two prompts
attention  every backend that 'Attention Backend' knows through its self-test, and what is against the others; those
           that are right once more at the length of a real step, against PyTorch in fp32
formats    how many of the blocks' matrices the host multiplies in fp8 and int8, of how many, and how far the result is
           from diffusers' in the network's own format
compiled   torch.compile in one piece, against the same without
finite     numbers of all these results that are NaN or infinite

In fp32 the bound of a GPU is ten times that of a CPU: its kernels add in other orders, and TF32, which is to be
off, is off by 3e-4. --tiny is for a machine without a GPU: a few tokens, and code for torch.compile is not generated.
Exits with 1 where a bound fails.

Shape suffixes: B batch, H heads, L tokens, D numbers a head.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

from comfy.cli_args import args as host_args

host_args.use_pytorch_cross_attention = True  # the host's choice on a GPU; its choice on a CPU looks at free memory

import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from frame_memory.kernels.attention import CANDIDATES
from frame_memory.model.once import Once
from frame_memory.sampling.attention_backend import AttentionBackend, first_right
from frame_memory.sampling.attention_check import ALLOWED, Place

from . import parity_models as pm
from . import record, speed
from .memory_cost import Row, table
from .parity import BF16_BOUND, FP32_BOUND, Case, Networks, compare

CASES = (Case("F0", 10, 18, 2, True), Case("F1", 14, 22, 1, True), Case("F1", 26, 14, 2, True))
GPU_FP32 = 10 * FP32_BOUND
COMPILED = {torch.float32: 1e-5, torch.bfloat16: BF16_BOUND}
TOKENS, HEADS = 18349, 24  # of a step at 640x608, reference/performance.md 2
SMALL = speed.Size(2, 1, 2, 12, 10)
TINY = speed.Size(1, 1, 1, 4, 6)
PARTS = ("parity", "attention", "formats", "compiled", "finite")
# What the profiler calls the host's product; on a GPU that of fp8 is told from its fallback by what is logged.
PRODUCTS = {"fp8": "comfy_kitchen::quantize_fp8", "int8": "comfy_kitchen::int8_linear"}
KITCHEN = "comfy_kitchen"


class Seen:
    """Counts numbers that are NaN or infinite."""

    def __init__(self) -> None:
        self.broken = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.broken += int((~torch.isfinite(x)).sum())
        return x


def parity(device: str, tiny: bool) -> Iterator[Row]:
    """Ours against diffusers."""
    networks = Networks(pm.make_reference(device=device, heads=1 if tiny else 2))
    fp32 = FP32_BOUND if device == "cpu" else GPU_FP32
    for case in CASES[1:2] if tiny else CASES:
        row = compare(networks, case, image_tokens=9 if tiny else 729)
        where = f"{case.kind}, {case.height}x{case.width}, batch {case.batch}"
        yield where, "fp32 to diffusers, relative rms", row.fp32, (0.0, fp32)
        assert row.bf16 is not None
        yield where, "bf16 to diffusers, relative rms", row.bf16, (0.0, BF16_BOUND)


def attention(device: str, tiny: bool, seen: Seen) -> Iterator[Row]:
    """Every backend, in every number format that a network may have; prints what is against the others."""
    heads, tokens = (2, 33) if tiny else (HEADS, TOKENS)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        place = Place(speed.HEAD, dtype, torch.device(device))
        chosen, _ = first_right(place)
        for candidate in CANDIDATES:
            backend, against = first_right(place, candidate.label)
            if backend is None:
                print(f"Attention in {dtype}: not {candidate.label}: {against[candidate.label]}.")
                continue
            taken = ", the automatic choice" if chosen == backend else ""
            error = at_length(backend, heads, tokens, dtype, device, seen)
            case = f"attention, {candidate.label}{taken}, {dtype}, {tokens} tokens"
            yield case, "to PyTorch in fp32, relative norm", error, (0.0, ALLOWED)


def at_length(backend: AttentionBackend, heads: int, tokens: int, dtype, device: str, seen: Seen) -> float:
    """How far a backend is from PyTorch in fp32, as ComfyUI calls it."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, heads, tokens, speed.HEAD)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    options = {"optimized_attention_override": backend}
    made = seen(optimized_attention(q, k, v, heads=heads, skip_reshape=True, transformer_options=options))
    expected = attention_pytorch(q.float(), k.float(), v.float(), heads=heads, skip_reshape=True)
    return float((made.float() - expected).norm() / expected.norm())


def formats(device: str, tiny: bool, seen: Seen) -> Iterator[Row]:
    """Products in fp8 and int8."""
    size = TINY if tiny else SMALL
    inputs = speed.inputs_of(size, device)
    reference = pm.make_reference(
        heads=size.heads, double=size.double, single=size.single, device=device, dtype=torch.bfloat16
    )
    truth = speed.on(device, lambda: pm.run_reference(reference, inputs, torch.bfloat16))()
    for kind in speed.ROUND_TO:
        network = speed.our_network(reference.state_dict(), kind, device, device)
        out, calls, fallbacks = products_of(network, inputs, kind, device)
        case = f"{kind}, {size.double} + {size.single} blocks"
        matrices = [m for m in network.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
        wanted = sum(not getattr(layer, "_full_precision_mm_config", False) for layer in matrices)
        if speed.multiplies(kind, device):
            yield case, f"of {wanted} matrices multiplied in it", calls - fallbacks, (wanted, wanted)
        else:
            print(f"{case}: {device} has no fast products in it for its {wanted} matrices.")
        yield case, speed.ERROR, pm.relative_rms(seen(out), truth), (0.0, speed.BOUNDS[kind])


def products_of(network, inputs: pm.Inputs, kind: str, device: str) -> tuple[Tensor, int, int]:
    """(a step, how many products in the format the host began, how many it fell back from)."""
    told: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger(KITCHEN)
    handler.emit = told.append
    logger.addHandler(handler)
    step = speed.on(device, partial(pm.run_ours, network, inputs, torch.bfloat16))
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            out = step()
    finally:
        logger.removeHandler(handler)
    calls = sum(event.count for event in profile.key_averages() if event.key == PRODUCTS[kind])
    return out, calls, sum(line.levelno >= logging.WARNING for line in told)


def compiled(device: str, tiny: bool, seen: Seen) -> Iterator[Row]:
    """A section's first step and a later one, which reads what the first one kept."""
    size = TINY if tiny else SMALL
    inputs = speed.inputs_of(size, device)
    reference = pm.make_reference(heads=size.heads, double=size.double, single=size.single, device=device)
    for dtype, bound in list(COMPILED.items())[: 1 if tiny else None]:
        plain = pm.make_ours(reference.state_dict(), dtype, device)
        made = torch.compile(plain, fullgraph=True, backend="eager" if tiny else "inductor")
        kept, again = Once(), Once()
        for number in (1, 2):
            with torch.inference_mode():
                expected = pm.run_ours(plain, inputs, dtype, kept)
                out = seen(pm.run_ours(made, inputs, dtype, again))
            off = pm.relative_rms(out, expected)
            yield f"torch.compile, {dtype}, step {number}", "to the same without, relative rms", off, (0.0, bound)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, seen = args.device, Seen()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "parity": lambda: parity(device, args.tiny),
        "attention": lambda: attention(device, args.tiny, seen),
        "formats": lambda: formats(device, args.tiny, seen),
        "compiled": lambda: compiled(device, args.tiny, seen),
        "finite": lambda: iter([("all of these", "NaN or infinite numbers", float(seen.broken), (0.0, 0.0))]),
    }
    good = True
    for name in args.parts or parts:
        rows = list(as_far_as_it_goes(name, parts[name]()))
        lines, held = table(rows)
        good &= held
        print("\n".join(lines) + "\n", flush=True)
        if args.record:
            record.append("benchmarks.gpu_checks", [(f"{row[0]}, {device}", *row[1:3]) for row in rows])
    return 0 if good else 1


def as_far_as_it_goes(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of a part; one that fails where the part breaks off, so that the others are still made."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield name, f"breaks off: {type(error).__name__}", math.nan, (0.0, 0.0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="not all of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
