"""How fast a step is: `python scripts/run.py -m benchmarks.speed [--published PATH] [--record]`.

The same random weights and inputs in diffusers' FramePack transformer, in ours and, where a checkout is named, in the
published code: one process, in turn, the median of repeated runs, by the wall and by the processor (which other work
on the machine hardly changes). A step is one forward pass of F1's second section, as a sampler asks for it.

Where 'Attention Backend' has an attention that is taken to be faster than the host's on the device, ours is run with
it once more, as a side of its own. One that computes in as many bits counts for the goals of issue F, which are those
of the same numbers. Of one in fewer bits it is told beside whether it meets them; of fp8, which has other numbers
anyway, the fastest counts.

Goals on a CPU, at "tiny" and "mid": 1.25 times as fast as diffusers. On a GPU, at "full": bf16 at 80 % of the roof and
1.15 times as fast as the best peer (diffusers, and the published code where it is named), fp8 1.6 times as fast as the
best peer in bf16, weights in RAM at most 1.05 times as slow. Of the targets of performance.md section 4 those that this
can see are told: they ask for step caching or a whole video as well.

Beside the seconds: the share of the roof, which is the rate of the network's own largest matrix product measured alone
between the runs; bytes of tensors at the peak, without weights; and seconds of a video's frame at 25 steps a section.
Operations are those of matrices, convolutions and attention, counted in a pass.

Sizes "tiny" and "mid" are for a CPU; "full" is the published topology, 13 B, for a GPU that holds one network a side.
"fp8" and "int8" are our blocks rounded as 'weight_dtype' of 'Load FramePack Model' rounds them, beside the others in
bf16; a row says "numbers only" where the device has no fast products in the format, as a CPU has none: its seconds
mean nothing then. "ours with weights in RAM" has all of them there, loaded by the host as on a GPU that is full (by its
older loader, which needs no ComfyUI running).
Exits with 1 if a side computes something else than diffusers or no number at all, or a goal is missed.
Source: reference/performance.md sections 2 and 4.

Shape legend: N tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from comfy.cli_args import args as host_args

host_args.use_pytorch_cross_attention = True  # the host's choice on a GPU; its choice on a CPU looks at free memory

import comfy.model_patcher
import torch
from comfy.quant_ops import QUANT_ALGOS, get_layout_class
from torch import Tensor, nn

from frame_memory.kernels.attention import CANDIDATES, Candidate
from frame_memory.model import quantised
from frame_memory.model.key_map import convert_diffusers
from frame_memory.model.once import Once
from frame_memory.model.transformer import FramePackTransformer
from frame_memory.sampling.attention_backend import AttentionBackend, first_right
from frame_memory.sampling.attention_check import ALLOWED, Place

from . import parity_models as pm
from . import record
from .memory import MEGABYTE
from .memory_cost import Held, Row, clocked, operations, table
from .parity import BF16_BOUND, FP32_BOUND, section_layout
from .parity_published import default_dtype
from .stage_two import gpu_peak

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16}
ROUND_TO = {"fp8": quantised.FP8, "int8": quantised.INT8}  # our blocks' matrices
# With 6 blocks, but for DEEP: two networks in bf16 are 1.4e-2 apart behind 60 blocks of 256 numbers.
BOUNDS = {"fp32": FP32_BOUND, "bf16": BF16_BOUND, "fp8": 0.1, "int8": 0.05}
DEEP, DEEP_BF16 = 30, 3e-2  # blocks, and the bound from there on
DIFFUSERS, OURS, FASTER, PUBLISHED = "diffusers", "ours", "ours with automatic attention", "published"
OFFLOADED = "ours with weights in RAM"
SAME = "ours with attention in as many bits"
ERROR = "relative rms to diffusers"
STEPS, FRAMES = 25, 36  # of a section
TEXT, IMAGE = 120, 729
HEAD = 128
CPU_GOAL = 1.25  # times as fast as diffusers
PEER_GOAL, FP8_GOAL = 1.15, 1.6  # of a GPU: times as fast as the best peer, which runs in bf16
ROOF_GOAL, OFFLOAD_GOAL = 0.8, 1.05  # of a GPU in bf16; and over the seconds with all weights there
# Performance.md section 4: seconds of a frame with step caching, by a part of the card's name; MB where weights stream.
FRAME_TARGETS = {"H200": 0.15, "4090": 0.45}
CACHED, OFFLOADED_ROOF, MEMORY_TARGET = 2.25, 0.78, 6 * 1024
WARM = 1


@dataclass(frozen=True)
class Size:
    """A network and a window. heads: of HEAD numbers; height, width: latent pixels; goals: the device that has some."""

    heads: int
    double: int
    single: int
    height: int
    width: int
    goals: str = "cpu"


SIZES = {
    "tiny": Size(2, 2, 4, 20, 20),
    "mid": Size(4, 2, 4, 40, 40),
    "full": Size(24, 20, 40, 80, 76, goals="cuda"),
}


@dataclass(frozen=True)
class Took:
    """Medians of a side. error: relative RMS to diffusers."""

    wall: float
    busy: float
    peak: float
    error: float


@dataclass(frozen=True)
class Measured:
    """One size in one number format. work: operations of a step; roof: operations a second of the clock that counts."""

    took: dict[str, Took]
    work: float
    roof: float
    device: str

    def seconds(self, side: str) -> float:
        """The seconds that count: a GPU's by the wall, a CPU's by the processor, since others may work on it."""
        return clock(self.took[side], self.device)

    def faster(self, side: str, than: str = DIFFUSERS) -> float:
        """How many times as fast as another side."""
        return self.seconds(than) / self.seconds(side)

    def share(self, side: str) -> float:
        """Of the roof."""
        return self.work / self.seconds(side) / self.roof

    def best(self, *sides: str) -> str:
        """The fastest of those that were run."""
        return min((side for side in sides if side in self.took), key=self.seconds)


def inputs_of(size: Size, device: str) -> pm.Inputs:
    """F1's section behind a prompt without padding and a picture."""
    positions, groups = section_layout("F1")
    made = pm.make_inputs(size.height, size.width, positions, groups, text_lengths=(TEXT,), image_tokens=IMAGE)
    return pm.moved(replace(made, text_BLD=made.text_BLD[:, :TEXT]), device)


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
    for name, backend in attentions(Place(HEAD, dtype, torch.device(device))).items():
        options = {"optimized_attention_override": backend}
        made[name] = partial(pm.run_ours, ours, inputs, dtype, Once(), transformer_options=options)
    if published is not None:
        network = published_network(published, reference, device, dtype)
        made[PUBLISHED] = lambda: published.run(network, inputs, dtype)
    return {name: on(device, step) for name, step in made.items()}


def attentions(place: Place, candidates: Sequence[Candidate] = CANDIDATES) -> dict[str, AttentionBackend]:
    """The fastest backend, and the fastest that computes in no fewer bits, by side, where these are not the host's."""
    ways = {FASTER: candidates, SAME: [c for c in candidates if not c.fewer_bits]}
    found = {side: first_right(place, candidates=some)[0] for side, some in ways.items()}
    if found[FASTER] == found[SAME]:
        del found[FASTER]
    return {side: backend for side, backend in found.items() if backend and backend.host != "pytorch"}


def published_network(published, reference: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """The published network, made where it is used: 13 B would be 52 GB in fp32 elsewhere first."""
    with torch.device(device), default_dtype(dtype):
        return published.make(reference).to(dtype)


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


def on(device: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.device(device), torch.inference_mode():
            return step()

    return run


def product(tokens: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """The largest matrix product of a block, alone, and its operations. hidden: numbers a token."""
    a = torch.randn(tokens, hidden, device=device, dtype=dtype)
    b = nn.Linear(hidden, 7 * hidden, device=device, dtype=dtype).requires_grad_(False)
    return lambda: b(a), 2.0 * tokens * hidden * 7 * hidden


def measure(size: Size, kind: str, device: str, repeats: int, published=None, offloaded: bool = False) -> Measured:
    """Medians of each side, which take turns."""
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
    return Measured(found, counted(made, kind, device), work / clock(Took(*medians[""], 0, 0), device), device)


def counted(made: dict[str, Callable[[], Tensor]], kind: str, device: str) -> int:
    """Operations of a step: of ours, but of diffusers' where ours multiplies by kernels that torch's counter does not
    know."""
    return operations(made[DIFFUSERS if kind in ROUND_TO and device == "cuda" else OURS])


def peak_of(step: Callable[[], object], device: str) -> float:
    """MB of tensors that a step holds at most, without the weights."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        return (gpu_peak(step) - before) / MEGABYTE
    with Held() as held:
        step()
    return held.peak / MEGABYTE


def clock(one: Took, device: str) -> float:
    """The seconds that count, see `Measured.seconds`."""
    return one.wall if device == "cuda" else one.busy


def lines_of(found: Measured) -> Iterator[str]:
    """The table of one size."""
    yield "| side | s a step | of the processor | times diffusers | % of the roof | peak, MB | s a frame | error |"
    yield "|" + "---|" * 8
    for side, one in found.took.items():
        yield (
            f"| {side} | {one.wall:.4g} | {one.busy:.4g} | {found.faster(side):.3f} | {100 * found.share(side):.0f} | "
            f"{one.peak:.0f} | {a_frame(one):.3g} | {one.error:.1e} |"
        )


def a_frame(one: Took) -> float:
    """Seconds of a video's frame, its decode apart."""
    return one.wall * STEPS / FRAMES


def figures_of(found: Measured) -> Iterator[tuple[str, str, float]]:
    """What is recorded of one size: (side, measure, value)."""
    yield "", "operations of a step, 1e9", found.work / 1e9
    yield "", "roof, 1e9 operations a second", found.roof / 1e9
    for side, one in found.took.items():
        yield side, "seconds a step", one.wall
        yield side, "processor seconds a step", one.busy
        yield side, "seconds a frame", a_frame(one)
        yield side, "times as fast as diffusers", found.faster(side)
        yield side, "share of the roof", found.share(side)
        yield side, "peak of tensors, MB", one.peak
        yield side, ERROR, one.error


def errors_of(found: Measured, kind: str, size: Size) -> list[Row]:
    """How far each side is from diffusers; what is not a number is within no bound."""
    rows: list[Row] = []
    bounds = BOUNDS | ({"bf16": DEEP_BF16} if size.double + size.single >= DEEP else {})
    for side, one in found.took.items():
        bound = bounds["bf16" if side in (DIFFUSERS, PUBLISHED) and kind in ROUND_TO else kind]
        rows.append((side, ERROR, one.error, (0.0, ALLOWED if side == FASTER else bound)))
    return rows


def goals_of(found: Measured, kind: str, size: Size) -> list[Row]:
    """What issue F asks for of one size in one number format, with what was measured, by side.

    In fp8 and int8 the peers run in bf16, and the roof is that of bf16.
    """
    rows: list[Row] = []
    if found.device != size.goals:
        return rows
    peer, side = found.best(DIFFUSERS, PUBLISHED), found.best(OURS, SAME)
    if found.device != "cuda":
        asked = (side, f"times as fast as {DIFFUSERS}", found.faster(side), (CPU_GOAL, math.inf))
        return [asked] if kind not in ROUND_TO else rows
    if kind == "bf16":
        rows.append((side, "share of the roof", found.share(side), (ROOF_GOAL, math.inf)))
        rows.append((side, f"times as fast as {peer}", found.faster(side, peer), (PEER_GOAL, math.inf)))
    if kind == "fp8":
        side = found.best(OURS, SAME, FASTER)
        rows.append((side, f"times as fast as {peer} in bf16", found.faster(side, peer), (FP8_GOAL, math.inf)))
    if OFFLOADED in found.took:
        rows.append((OFFLOADED, "times the seconds with all there", found.faster(OURS, OFFLOADED), (0.0, OFFLOAD_GOAL)))
    return rows


def misses(found: Measured, kind: str, size: Size) -> Iterator[str]:
    """What a run fails by, each by its name."""
    for side, measure, value, bound in (*errors_of(found, kind, size), *goals_of(found, kind, size)):
        least, most = bound or (-math.inf, math.inf)
        if not least <= value <= most:
            asked = f"at least {least:g}" if most == math.inf else f"at most {most:g}"
            said = f"{side} computes something else" if measure == ERROR else f"{side} misses a goal"
            yield f"{said}: {measure} {value:.3g}, {asked} is asked for"


def beside_goals(found: Measured, kind: str, size: Size, card: str) -> Iterator[str]:
    """What is told of goals and targets that this run alone does not decide. card: the GPU's name."""
    goal = CPU_GOAL if found.device == "cpu" else PEER_GOAL
    if FASTER in found.took and kind not in ROUND_TO and found.device == size.goals:
        than = found.best(DIFFUSERS, PUBLISHED)
        got = found.faster(FASTER, than)
        verdict = "meets" if got >= goal else "does not meet"
        yield f"{FASTER}, whose numbers are others: {got:.3g} times as fast as {than}, {verdict} {goal:g}."
    if found.device != "cuda" or size.goals != "cuda":
        return
    side = found.best(OURS, SAME, FASTER)
    frame, target = a_frame(found.took[side]), next((t for name, t in FRAME_TARGETS.items() if name in card), None)
    if target:
        cached = f"{frame / CACHED:.3g} if step caching makes it the published {CACHED:g} times as fast"
        yield f"{side}: {frame:.3g} s a frame, {cached}; the target with it is {target:g}."
    if OFFLOADED in found.took:
        roof, peak = found.share(OFFLOADED), found.took[OFFLOADED].peak
        yield f"{OFFLOADED}: {roof:.0%} of the roof; the target in bf16 is {OFFLOADED_ROOF:.0%}."
        yield f"{OFFLOADED}: {peak:.0f} MB of tensors in the GPU; the target of a whole video is {MEMORY_TARGET} MB."


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
            found = measure(size, kind, device, args.repeats, published, args.offloaded)
            numbers = f"{kind} (numbers only)" if kind in ROUND_TO and not multiplies(kind, device) else kind
            case = f"{name}, {HEAD * size.heads} wide, {size.double} + {size.single} blocks, {numbers}, {device}"
            print(f"\n{case}: {found.work / 1e12:.3g} T operations a step, roof {found.roof / 1e9:.4g} G a second\n")
            print("\n".join(lines_of(found)), flush=True)
            rows += [(f"{case}, {side}" if side else case, *rest) for side, *rest in figures_of(found)]
            good &= report(found, kind, size, case)
    if args.record:
        record.append(f"benchmarks.speed --repeats {args.repeats}", rows)
    return 0 if good else 1


def report(found: Measured, kind: str, size: Size, case: str) -> bool:
    """Print goals, what was missed and what is told beside them; whether nothing was missed."""
    rows = (*errors_of(found, kind, size), *goals_of(found, kind, size))
    print("\n" + "\n".join(table([(f"{case}, {side}", *rest) for side, *rest in rows])[0]))
    card = torch.cuda.get_device_name() if found.device == "cuda" else ""
    for line in beside_goals(found, kind, size, card):
        print(line)
    missed = list(misses(found, kind, size))
    if missed:
        print("\nFAILED: " + "; ".join(missed), flush=True)
    return not missed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", metavar="PATH", help="a checkout of the published FramePack code")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["full"] if gpu else ["tiny", "mid"])
    dtypes = ["bf16", "fp8", "int8"] if gpu else ["fp32", "bf16"]
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes)
    parser.add_argument("--offloaded", action=argparse.BooleanOptionalAction, default=gpu,
                        help="also ours with its weights in RAM; on a CPU they are there anyway")  # fmt: skip
    record.add_options(parser, repeats=9)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
