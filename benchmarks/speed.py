"""How fast a step is: `python scripts/run.py -m benchmarks.speed [--published PATH] [--record]`.

The same random weights and inputs in diffusers' FramePack transformer, in ours and, where a checkout is named, in the
published code: one process, in turn, the median of repeated runs, by the wall and by the processor (which other work
on the machine hardly changes). A step is one forward pass of F1's second section, as a sampler asks for it.

Where the device has an attention that is faster than PyTorch's in fewer bits ('Attention Backend'), ours is run with it
once more, as a side of its own: the goal is that of the same numbers.

Beside the seconds: the share of the roof, which is the rate of the network's own largest matrix product measured alone
between the runs; bytes of tensors at the peak, without weights; and seconds of a video's frame at 25 steps a section.
Operations are those of matrices, convolutions and attention, counted in a pass of ours.

Sizes "tiny" and "mid" are for a CPU; "full" is the published topology, 13 B, for a GPU that holds one network a side.
"fp8" and "int8" are our blocks rounded as 'weight_dtype' of 'Load FramePack Model' rounds them, beside the others in
bf16; a row says "numbers only" where the device has no fast products in the format, as a CPU has none: its seconds
mean nothing then. "ours with weights in RAM" has all of them there, loaded by the host as on a GPU that is full (by its
older loader, which needs no ComfyUI running).
Exits with 1 if a side computes something else than diffusers, or a goal is missed.
Source: reference/performance.md sections 2 and 4.

Shape legend: N tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

from comfy.cli_args import args as host_args

host_args.use_pytorch_cross_attention = True  # the host's choice on a GPU; its choice on a CPU looks at free memory

import comfy.model_patcher
import torch
from comfy.quant_ops import QUANT_ALGOS, get_layout_class
from torch import Tensor, nn

from frame_memory.model import quantised
from frame_memory.model.key_map import convert_diffusers
from frame_memory.model.once import Once
from frame_memory.model.transformer import FramePackTransformer
from frame_memory.sampling.attention_backend import first_right
from frame_memory.sampling.attention_check import ALLOWED, Place

from . import parity_models as pm
from . import record
from .memory import MEGABYTE
from .memory_cost import Held, clocked, operations
from .parity import BF16_BOUND, FP32_BOUND, section_layout
from .stage_two import gpu_peak

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16}
ROUND_TO = {"fp8": quantised.FP8, "int8": quantised.INT8}  # our blocks' matrices
BOUNDS = {"fp32": FP32_BOUND, "bf16": BF16_BOUND, "fp8": 0.1, "int8": 0.05}
DIFFUSERS, OURS, FASTER, PUBLISHED = "diffusers", "ours", "ours with automatic attention", "published"
OFFLOADED = "ours with weights in RAM"
STEPS, FRAMES = 25, 36  # of a section
TEXT, IMAGE = 120, 729
HEAD = 128
GOAL = 1.25  # of a CPU, times as fast as diffusers
FP8_GOAL, OFFLOAD_GOAL = 1.6, 1.05  # of a GPU: as fast as diffusers in bf16, and as slow as with all weights there
WARM = 1


@dataclass(frozen=True)
class Size:
    """A network and a window. heads: of HEAD numbers; height, width: latent pixels."""

    heads: int
    double: int
    single: int
    height: int
    width: int
    goal: float | None = GOAL


SIZES = {
    "tiny": Size(2, 2, 4, 20, 20),
    "mid": Size(4, 2, 4, 40, 40),
    "full": Size(24, 20, 40, 80, 76, goal=None),
}


@dataclass(frozen=True)
class Took:
    """Medians of a side. error: relative RMS to diffusers."""

    wall: float
    busy: float
    peak: float
    error: float


def inputs_of(size: Size, device: str) -> pm.Inputs:
    """F1's section behind a prompt without padding and a picture."""
    positions, groups = section_layout("F1")
    made = pm.make_inputs(size.height, size.width, positions, groups, text_lengths=(TEXT,), image_tokens=IMAGE)
    made = replace(made, text_BLD=made.text_BLD[:, :TEXT])
    moved = {f.name: _moved(getattr(made, f.name), device) for f in fields(made)}
    return replace(made, **moved)


def _moved(value, device: str):
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(v, device) for v in value) if isinstance(value, tuple) else value


def sides(
    size: Size, kind: str, device: str, published=None, offloaded: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """One step of each side, with the same numbers. kind: of DTYPES."""
    inputs, dtype = inputs_of(size, device), DTYPES[kind]
    reference = pm.make_reference(
        heads=size.heads, double=size.double, single=size.single, device=device, dtype=dtype
    )  # fmt: skip
    ours = our_network(reference.state_dict(), kind, device, device)
    made = {
        DIFFUSERS: lambda: pm.run_reference(reference, inputs, dtype),
        OURS: partial(pm.run_ours, ours, inputs, dtype, Once()),  # as a section has it from its second step on
    }
    if offloaded:
        streamed = our_network(reference.state_dict(), kind, "cpu", device)
        offload(streamed, device)
        made[OFFLOADED] = partial(pm.run_ours, streamed, inputs, dtype, Once())
    faster, _ = first_right(Place(HEAD, dtype, torch.device(device)))
    if faster.host != "pytorch":
        options = {"optimized_attention_override": faster}
        made[FASTER] = partial(pm.run_ours, ours, inputs, dtype, Once(), transformer_options=options)
    if published is not None:
        network = published.make(reference).to(dtype)
        made[PUBLISHED] = lambda: published.run(network, inputs, dtype)
    return {name: _on(device, step) for name, step in made.items()}


def our_network(sd: dict[str, Tensor], kind: str, place: str, device: str) -> FramePackTransformer:
    """Our network at `place`, with diffusers' numbers, as core makes it for a device."""
    if kind not in ROUND_TO:
        return pm.make_ours(sd, DTYPES[kind], place)
    rounded = quantised.rounded(convert_diffusers(sd), ROUND_TO[kind], device)
    disabled = () if multiplies(kind, device) else (ROUND_TO[kind],)
    return pm.make_quantised(rounded, DTYPES[kind], place, disabled)


def multiplies(kind: str, device: str) -> bool:
    """Whether a device has fast products in a format of ROUND_TO."""
    layout = get_layout_class(QUANT_ALGOS[ROUND_TO[kind]]["comfy_tensor_layout"])
    return device == "cuda" and layout.supports_fast_matmul()


def offload(network: nn.Module, device: str) -> None:
    """Have the host leave all weights in RAM, pinned where it does that, and bring each when it is used."""
    patcher = comfy.model_patcher.ModelPatcher(network, torch.device(device), torch.device("cpu"))
    patcher.load(torch.device(device), lowvram_model_memory=1)


def _on(device: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.device(device), torch.inference_mode():
            return step()

    return run


def product(tokens: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """The largest matrix product of a block, alone, and its operations. hidden: numbers a token."""
    a = torch.randn(tokens, hidden, device=device, dtype=dtype)
    b = nn.Linear(hidden, 7 * hidden, device=device, dtype=dtype).requires_grad_(False)
    return lambda: b(a), 2.0 * tokens * hidden * 7 * hidden


def measure(
    size: Size, kind: str, device: str, repeats: int, published=None, offloaded: bool = False
) -> tuple[dict[str, Took], float, float]:
    """(each side's medians, operations of a step, the roof in operations a second of the clock that counts)."""
    made = sides(size, kind, device, published, offloaded)
    truth = made[DIFFUSERS]()
    errors = {name: pm.relative_rms(step().cpu(), truth.cpu()) for name, step in made.items()}
    multiply, work = product(9 * size.height * size.width // 4, size.heads * HEAD, DTYPES[kind], device)
    actions = {**made, "": multiply}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for number in range(WARM + repeats):
        for name, action in actions.items():
            times = clocked(action, device)
            if number >= WARM:
                took[name].append(times)
    medians = {n: tuple(statistics.median(p) for p in zip(*pairs, strict=True)) for n, pairs in took.items()}
    found = {n: Took(*medians[n], peak_of(step, device), errors[n]) for n, step in made.items()}
    return found, operations(made[OURS]), work / clock(Took(*medians[""], 0, 0), device)


def peak_of(step: Callable[[], object], device: str) -> float:
    """MB of tensors that a step holds at most, without the weights."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        return (gpu_peak(step) - before) / MEGABYTE
    with Held() as held:
        step()
    return held.peak / MEGABYTE


def lines_of(took: dict[str, Took], work: float, roof: float, device: str) -> Iterator[str]:
    """The table of one size."""
    yield "| side | s a step | of the processor | times diffusers | % of the roof | peak, MB | s a frame | error |"
    yield "|" + "---|" * 8
    for name, one in took.items():
        yield (
            f"| {name} | {one.wall:.4g} | {one.busy:.4g} | {faster(took, name, device):.3f} | "
            f"{100 * share(one, work, roof, device):.0f} | {one.peak:.0f} | {one.wall * STEPS / FRAMES:.3g} | "
            f"{one.error:.1e} |"
        )


def clock(one: Took, device: str) -> float:
    """The seconds that count: a GPU's by the wall, a CPU's by the processor, since others may work on it."""
    return one.wall if device == "cuda" else one.busy


def faster(took: dict[str, Took], name: str, device: str) -> float:
    """How many times as fast as diffusers a side is."""
    return clock(took[DIFFUSERS], device) / clock(took[name], device)


def share(one: Took, work: float, roof: float, device: str) -> float:
    """Of the roof."""
    return work / clock(one, device) / roof


def figures_of(took: dict[str, Took], work: float, roof: float, device: str) -> Iterator[tuple[str, str, float]]:
    """What is recorded of one size: (side, measure, value)."""
    yield "", "operations of a step, 1e9", work / 1e9
    yield "", "roof, 1e9 operations a second", roof / 1e9
    for name, one in took.items():
        yield name, "seconds a step", one.wall
        yield name, "processor seconds a step", one.busy
        yield name, "times as fast as diffusers", faster(took, name, device)
        yield name, "share of the roof", share(one, work, roof, device)
        yield name, "peak of tensors, MB", one.peak
        yield name, "relative rms to diffusers", one.error


def misses(took: dict[str, Took], kind: str, size: Size, device: str) -> Iterator[str]:
    """What a run fails by."""
    for side, one in took.items():
        bound = BOUNDS["bf16" if side in (DIFFUSERS, PUBLISHED) and kind in ROUND_TO else kind]
        if one.error > (ALLOWED if side == FASTER else bound):
            yield f"{side} computes something else"
    goal = size.goal if kind not in ROUND_TO else FP8_GOAL if device == "cuda" and kind == "fp8" else None
    if goal is not None and faster(took, OURS, device) < goal:
        yield f"ours is less than {goal} times as fast as diffusers"
    slower = clock(took[OFFLOADED], device) / clock(took[OURS], device) if OFFLOADED in took else 0
    if device == "cuda" and slower > OFFLOAD_GOAL:
        yield f"offloaded takes more than {OFFLOAD_GOAL} times as long"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    published = None
    if args.published:
        from . import parity_published

        published = parity_published.load(args.published)
    good, rows = True, []
    for name in args.sizes:
        for kind in args.dtypes:
            size, device = SIZES[name], args.device
            took, work, roof = measure(size, kind, device, args.repeats, published, args.offloaded)
            numbers = f"{kind} (numbers only)" if kind in ROUND_TO and not multiplies(kind, device) else kind
            case = f"{name}, {HEAD * size.heads} wide, {size.double} + {size.single} blocks, {numbers}, {device}"
            print(f"\n{case}: {work / 1e12:.3g} T operations a step, roof {roof / 1e9:.4g} G a second\n")
            print("\n".join(lines_of(took, work, roof, device)), flush=True)
            rows += [(f"{case}, {side}" if side else case, *rest)
                     for side, *rest in figures_of(took, work, roof, device)]  # fmt: skip
            missed = list(misses(took, kind, size, device))
            if missed:
                good = False
                print("\nFAILED: " + "; ".join(missed))
    if args.record:
        record.append(f"benchmarks.speed --repeats {args.repeats}", rows)
    return 0 if good else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", metavar="PATH", help="a checkout of the published FramePack code")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["full"] if gpu else ["tiny", "mid"])
    dtypes = ["bf16", "fp8", "int8"] if gpu else ["fp32", "bf16"]
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes)
    parser.add_argument("--offloaded", action=argparse.BooleanOptionalAction, default=gpu,
                        help="also ours with its weights in RAM; on a CPU they are there anyway")  # fmt: skip
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
