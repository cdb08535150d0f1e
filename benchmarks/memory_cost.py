"""What a memory of the whole video costs: `python scripts/run.py -m benchmarks.memory_cost [--record]`.

By the clock: psi over 10 s and over 60 s of history, in turn and several times, with the prompt and the picture that it
begins with; the median of each. Clips are of real size, 480x832. SemanticPack is of its full width on a GPU and a third
as wide on a CPU (1024): enough that matrices take all but a few per cent of the time, and small enough for a minute or
two in all. Each length is run once more in a process of its own, for its peak memory. History is read clip by clip, as
a run has it: what is finished lies on the disk.

By counting, at full size: operations of a sampling step with memory over those of one without. On a GPU that holds the
model, the same two steps by the clock, with random weights.

Exits with 1 if a bound fails: 60 s within 5.5 to 6.5 times 10 s, peak memory within 2 %, a step within 3 %.
Source: reference/memorypack.md sections 2.2, 2.3 and 4.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, M memory tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from comfy.cli_args import args as host_args

host_args.use_pytorch_cross_attention = True  # the host's choice on a GPU; its choice on a CPU looks at free memory

import comfy.ops
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from frame_memory.forcing.flow import Conditioning, predict_velocity
from frame_memory.model.context import gather_context
from frame_memory.model.semantic_pack import PackSpec, SemanticPack
from frame_memory.plan import PRESETS, plan_sections
from frame_memory.plan.memory import given_clips, memory_tokens

from . import record
from .memory import MEGABYTE, Peak, in_child, resident
from .stage_two import FRAMES, FULL, HEIGHT, POOLED, TEXT, VISION, VISION_FEATURES, WIDTH, gpu_peak, needs, network

SHORT, LONG = 10, 60  # seconds of history
FPS, FRAMES_A_LATENT = 30, 4
TIME_BOUND, PEAK_BOUND, STEP_BOUND = (5.5, 6.5), (0.98, 1.02), (0.0, 1.03)
CPU_HIDDEN, GPU_HIDDEN, HEAD = 1024, 3072, 128
STEPS = 25  # of a section: what shares the cost of one update
CHANNELS = 16
WARM = 2
Row = tuple[str, str, float, tuple[float, float] | None]


def _attention_flops(query_shape, key_shape, value_shape, *_, **__) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# What torch's counter knows of every device's attention but this one's.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def pack_of(hidden: int, device: str) -> SemanticPack:
    """A SemanticPack with random weights, its gate open; on "meta" one without numbers."""
    spec = PackSpec(
        hidden=hidden, heads=hidden // HEAD, axes_dim=tuple(FULL["axes_dim"]), theta=FULL["theta"],
        in_channels=CHANNELS, text=FULL["context_in_dim"], vision=VISION_FEATURES,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pack = SemanticPack(spec, dtype=dtype, device=device, operations=comfy.ops.disable_weight_init)
    for p in pack.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return pack.requires_grad_(False)


def drawn(device: str, *shape: int) -> Tensor:
    """Random numbers; those of a text, a picture or latents cost the same."""
    return torch.randn(shape, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def read_history(pack: SemanticPack, seconds: float, device: str, size: tuple[int, int]) -> Tensor:
    """psi `[1, M, D]` of so many seconds, clip by clip as a run reads an existing video. size: latent pixels."""
    spans = given_clips(1 + round(seconds * FPS / FRAMES_A_LATENT), FRAMES)
    clip = drawn(device, 1, CHANNELS, FRAMES, *size)
    with torch.inference_mode():
        psi = pack.anchor(drawn(device, 1, TEXT, pack.spec.text), drawn(device, 1, VISION, pack.spec.vision))
        for number, (start, stop) in enumerate(spans):
            psi = pack.update(psi, clip[:, :, : stop - start], first=number == 0)
    return psi


def clocked(action: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the wall, and of this process on its processors."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, busy = time.perf_counter(), time.process_time()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - busy


def in_turn(actions: dict, device: str, repeats: int) -> dict:
    """Medians `(wall, processor)` of each action, which take turns, so that a busy machine slows them alike."""
    took: dict = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            took[name].append(clocked(action, device))
    return {name: tuple(statistics.median(part) for part in zip(*pairs, strict=True)) for name, pairs in took.items()}


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it and not yet given back; `peak` is the most there were.

    A file that the system maps into memory counts nothing: what was read of it can be taken back at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._take(storage, 0 if func is torch.ops.aten.from_file.default else storage.nbytes())
        return made

    def _take(self, storage, size: int) -> None:
        key = id(storage)
        if key not in self._known:
            self._known[key] = size
            weakref.finalize(storage, self._drop, key).atexit = False
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key)


def operations(action: Callable[[], object]) -> int:
    """Floating-point operations of matrices, convolutions and attention in one call."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counted:
        action()
    return counted.get_total_flops()


def peak_of(seconds: int, hidden: int, device: str, size: tuple[int, int]) -> dict[str, float]:
    """Peak memory of one length, MB: of the process, and of tensors beside the weights; on a GPU of its allocator."""
    pack = pack_of(hidden, device)
    if device == "cuda":
        return {"GPU memory": gpu_peak(lambda: read_history(pack, seconds, device, size)) / MEGABYTE}
    with Peak(resident) as process, Held() as held:
        read_history(pack, seconds, device, size)
    return {"memory of the process": process.take(), "tensors beside the weights": held.peak / MEGABYTE}


def history_rows(hidden: int, device: str, size: tuple[int, int], repeats: int) -> list[Row]:
    """Time and peak memory of both lengths and their ratios."""
    asked = ["--hidden", str(hidden), "--device", device, "--size", *map(str, size)]
    peaks = {s: in_child(str(s), None, *asked, module="benchmarks.memory_cost") for s in (SHORT, LONG)}
    pack = pack_of(hidden, device)
    read_history(pack, SHORT / 5, device, size)  # kernels are chosen and memory is fetched in the first calls
    both = {s: lambda s=s: read_history(pack, s, device, size) for s in (SHORT, LONG)}
    took = in_turn(both, device, repeats)
    empty = pack_of(hidden, "meta")
    counted = {s: operations(lambda s=s: read_history(empty, s, "meta", size)) for s in (SHORT, LONG)}
    case = f"psi, {hidden} wide, {size[1] * 8}x{size[0] * 8}, {device}"
    rows: list[Row] = []
    for place, clock in enumerate(("seconds", "processor seconds")):
        rows += [(case, f"{clock} for {s} s", took[s][place], None) for s in (SHORT, LONG)]
        bound = TIME_BOUND if place == 0 else None
        rows += [(case, f"{clock}, {LONG} s over {SHORT} s", took[LONG][place] / took[SHORT][place], bound)]
    rows += [(case, f"operations, {LONG} s over {SHORT} s", counted[LONG] / counted[SHORT], TIME_BOUND)]
    for what in peaks[SHORT]:
        rows += [(case, f"{what} for {s} s, MB", peaks[s][what], None) for s in (SHORT, LONG)]
        rows += [(case, f"{what}, {LONG} s over {SHORT} s", peaks[LONG][what] / peaks[SHORT][what], PEAK_BOUND)]
    return rows


def steps_of(model, device: str, size: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """One call of the network of F1's second section, without and with memory tokens."""
    section = plan_sections(PRESETS["F1 forward"], sections=2).sections[1]
    latents = drawn(device, 1, CHANNELS, section.stop, *size)
    features = model.params.context_in_dim
    cond = Conditioning(
        drawn(device, 1, TEXT, features), drawn(device, 1, POOLED), drawn(device, 1, VISION, VISION_FEATURES)
    )
    context = gather_context(section, latents, latents[:, :, :1], None, 0.0)
    window = latents[:, :, section.start : section.stop]
    tokens = drawn(device, 1, memory_tokens(FRAMES, *size), model.hidden_size)

    def step(memory: Tensor | None) -> Tensor:
        with torch.no_grad():
            return predict_velocity(model, window, window.new_ones(1), cond, context, {}, memory)

    return {"without": lambda: step(None), "with": lambda: step(tokens)}


def counted_step_rows(size: tuple[int, int] = (HEIGHT, WIDTH), **topology) -> list[Row]:
    """Operations of a step at full size. topology: a smaller one."""
    model = network(**topology)
    counted = {name: operations(step) for name, step in steps_of(model, "meta", size).items()}
    pack = pack_of(model.hidden_size, "meta")
    one, two = (operations(lambda s=s: read_history(pack, s * FRAMES * FRAMES_A_LATENT / FPS, "meta", size))
                for s in (1, 2))  # fmt: skip
    case = f"sampling step, {model.hidden_size} wide, {size[1] * 8}x{size[0] * 8}"
    extra = counted["with"] - counted["without"]
    shared = (counted["without"] + extra + (two - one) / STEPS) / counted["without"]
    return [
        (case, "operations without memory, 1e12", counted["without"] / 1e12, None),
        (case, "operations, with memory over without", counted["with"] / counted["without"], STEP_BOUND),
        (case, f"the same with a share of its update ({STEPS} steps)", shared, STEP_BOUND),
    ]


def clocked_step_rows(repeats: int, device: str = "cuda", size=(HEIGHT, WIDTH), **topology) -> list[Row]:
    """Seconds of a step with random weights, where the weights fit. topology: a smaller one."""
    model = network(device, torch.float32 if device == "cpu" else torch.bfloat16, **topology).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    steps = steps_of(model, device, size)
    in_turn(steps, device, WARM)
    took = {name: wall for name, (wall, _) in in_turn(steps, device, repeats).items()}
    case = f"sampling step, {model.hidden_size} wide, {size[1] * 8}x{size[0] * 8}, {device}"
    return [
        *((case, f"seconds {name} memory", seconds, None) for name, seconds in took.items()),
        (case, "seconds, with memory over without", took["with"] / took["without"], STEP_BOUND),
    ]


def table(rows: list[Row]) -> tuple[list[str], bool]:
    """(lines to print, whether all bounds hold)."""
    lines, good = ["| case | measure | value | bound | verdict |", "|---|---|---|---|---|"], True
    for case, measure, value, bound in rows:
        words = verdict = ""
        if bound is not None:
            held = bound[0] <= value <= bound[1]
            low, high = bound
            words = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}" if low else f"{high:g}"
            good = good and held
            verdict = "passed" if held else "FAILED"
        lines.append(f"| {case} | {measure} | {value:.4g} | {words} | {verdict} |")
    return lines, good


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual, help=f"default here: {usual}")
    parser.add_argument("--hidden", type=int, help=f"width of psi, a multiple of {HEAD}; see above for the default")
    parser.add_argument("--size", type=int, nargs=2, default=(HEIGHT, WIDTH), metavar=("H", "W"), help="latent pixels")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each, of which the median counts")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.hidden = args.hidden or (CPU_HIDDEN if args.device == "cpu" else GPU_HIDDEN)
    if args.hidden % HEAD:
        parser.error(f"--hidden is {args.hidden}, expected a multiple of {HEAD}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    args, rows = parse(arguments), []
    size = tuple(args.size)
    if args.child:
        found = peak_of(int(args.child), args.hidden, args.device, size)
        Path(args.result).write_text(json.dumps(found), encoding="utf-8")
        return 0
    rows += history_rows(args.hidden, args.device, size, args.repeats)
    rows += counted_step_rows()
    if args.device == "cpu":
        print("A step at full size is counted only: its time is measured on a GPU.")
    elif torch.cuda.get_device_properties(0).total_memory < 1.2 * needs().inference:
        print("The GPU here holds less than the network: a step is counted only.")
    else:
        rows += clocked_step_rows(max(args.repeats, 5))
    lines, good = table(rows)
    print("\n".join(lines))
    if args.record:
        record.append("benchmarks.memory_cost", [row[:3] for row in rows])
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
