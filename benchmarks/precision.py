"""What fewer bits lose in a forward pass: `python scripts/run.py -m benchmarks.precision [--record]`.

The blocks' matrices in the formats of 'weight_dtype' of 'Load FramePack Model', and as fp8 files in diffusers' layout
have them, where q, k and v with scales of their own become one matrix with one scale. Relative RMS to the same network
in fp32, computed in fp32 elsewhere; but for the first two rows, ours and diffusers' class in bf16 all through, to fp32
at the time and guidance that bf16 sees. Three networks: random numbers, the same with q, k and v of unlike size, and
the self-test model F1, which ships in fp8: fp8 with a scale takes nothing from it. Medians over several random inputs:
F1 loses several times as much on some as on others.

On a CPU core multiplies what fp8 stands for, and int8 by its plain twin: a GPU's numbers but for the order of sums.
Exits with 1 if a row loses more than its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from comfy.cli_args import args as host_args

host_args.cpu = True
host_args.use_pytorch_cross_attention = True  # its choice on a CPU looks at free memory

import torch
from torch import Tensor

from frame_memory.model import checkpoint, key_map, quantised, tensor_file
from frame_memory.model.quantised import FP8, INT8
from frame_memory.model.tensor_file import real

from . import parity_models as pm
from . import record
from .memory_cost import Row, table
from .quality import FILES, MODELS
from .speed import HEAD

F32, BF16, F8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
TEXT = 64  # features, as F1 has them
UNLIKE = {"q": 4.0, "k": 1.0, "v": 0.25}  # times their size
JOINED, BESIDE_PARTS = "fp8, q, k and v joined", "fp8, q, k and v joined, to those left apart"
# By network, somewhat above what was measured.
BOUNDS = {
    "bf16, all of the network": (0.03, 0.03, 0.08),
    "bf16, diffusers' class": (0.03, 0.03, 0.08),
    "fp8 by a plain cast (fp8_e4m3fn)": (0.05, 0.05, 0.05),
    "fp8, a scale a matrix": (0.05, 0.05, 1e-5),
    "the same, multiplied in it (fp8_e4m3fn_fast)": (0.06, 0.06, 0.06),
    "int8, a scale a row, multiplied in it (int8)": (0.025, 0.025, 0.025),
    "fp8, q, k and v apart": (0.05, 0.05, 0.05),
    JOINED: (0.06, 0.06, 0.06),
    BESIDE_PARTS: (0.03, 0.03, 0.03),
}
Numbers = dict[str, Tensor]
Outs = list[Tensor]  # `[B, C, T, H, W]` each


@dataclass(frozen=True)
class Case:
    """A network in core's layout, in fp32, and what goes into it, several times."""

    native: Numbers
    given: tuple[pm.Inputs, ...]

    def plain(self, dtype: torch.dtype = F32, change: Callable[[Tensor], Tensor] = lambda matrix: matrix) -> Outs:
        """Forward passes in one number format. change: of the blocks' matrices."""
        sd = {k: change(v) if quantised.is_block_matrix(k, v) else v for k, v in self.native.items()}
        return self.outs(pm.make_ours(key_map.convert_native(sd), dtype), dtype)

    def in_bf16(self) -> tuple[float, float]:
        """What all of the network in bf16 loses, and diffusers' class."""
        truth = replace(self, given=tuple(map(pm.as_bf16_sees, self.given))).plain()
        sd = key_map.convert_native(self.native)
        double, single = key_map.block_counts(sd)
        heads = len(self.native["img_in.proj.bias"]) // HEAD
        network = pm.make_reference(heads=heads, double=double, single=single, text_features=TEXT)
        network.load_state_dict(sd)
        theirs = [pm.run_reference(network.to(BF16), given, BF16) for given in self.given]
        return loss(self.plain(BF16), truth), loss(theirs, truth)

    def rounded(self, name: str, *disabled: str) -> Outs:
        """Rounded as 'Load FramePack Model' does it. disabled: formats that are not multiplied in."""
        return self.outs(pm.make_quantised(quantised.rounded(self.native, name), disabled=disabled))

    def outs(self, network, dtype: torch.dtype = F32) -> Outs:
        """What a network makes of the inputs."""
        return [pm.run_ours(network, given, dtype) for given in self.given]


def loss(made: Outs, truth: Outs) -> float:
    """Median of the relative RMS errors."""
    return statistics.median(map(pm.relative_rms, made, truth))


def random_case(seeds: int, heads: int = 4, sizes: dict[str, float] | None = None) -> Case:
    """Of heads of 128 numbers, at 5x7 tokens a frame. sizes: what q, k and v are multiplied by."""
    theirs = pm.make_reference(heads=heads, double=2, single=4, text_features=TEXT).state_dict()
    for part, factor in (sizes or {}).items():
        for key in theirs:
            if key.endswith((f"to_{part}.weight", f"add_{part}_proj.weight")):
                theirs[key] = factor * theirs[key]
    return Case(key_map.convert_diffusers(theirs), inputs(seeds, 10, 14, batch=2, text_lengths=(7, 11)))


def shipped_case(seeds: int) -> Case:
    """F1 as it ships."""
    stored, _ = checkpoint.open_state_dict(str(MODELS / "diffusion_models" / FILES["F1"]))
    return Case(in_full(stored), inputs(seeds, 8, 12, text_lengths=(7,)))


CASES = {"random": random_case, "random, unlike": partial(random_case, sizes=UNLIKE), "F1": shipped_case}


def inputs(seeds: int, height: int, width: int, **more) -> tuple[pm.Inputs, ...]:
    """Sections of F1. height, width: latent pixels."""
    groups = ((4, tuple(range(1, 17))), (2, (17, 18)), (1, (0, 19)))
    more |= {"image_tokens": 9, "text_features": TEXT}
    return tuple(pm.make_inputs(height, width, range(20, 29), groups, seed=seed, **more) for seed in range(seeds))


def in_full(sd: Numbers) -> Numbers:
    """What tensors with scales stand for, in fp32, in either layout."""
    out = {}
    for key, value in sd.items():
        if not key_map.is_quant_key(key):
            layer, param = key_map.layer_of(key)
            scale = sd.get(f"{layer}.weight_scale") if param == "weight" else None
            out[key] = real(value).float() if scale is None else quantised.dequantise(real(value), real(scale))
    return out


def in_parts(native: Numbers) -> Numbers:
    """In diffusers' layout, every matrix of a block in fp8 with a scale of its own."""
    out, limit = key_map.convert_native(native), torch.finfo(F8).max
    for key, value in list(out.items()):
        if value.ndim == 2 and key.startswith(("transformer_blocks.", "single_transformer_blocks.")):
            scale = value.abs().max() / limit
            out[key] = (value / scale).clamp(-limit, limit).to(F8)
            out[f"{key}_scale"] = scale
    return out


def joined(parts: Numbers) -> Numbers:
    """What loading makes of a file of such parts: q, k and v of each block are one matrix."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / FILES["F1"])
        tensor_file.write(path, parts, {})
        stored, _ = checkpoint.open_state_dict(path)
        return {key: real(value) for key, value in stored.items()}


def losses(case: Case) -> dict[str, float]:
    """By name, those of BOUNDS."""
    truth, parts = case.plain(), in_parts(case.native)
    apart = case.outs(pm.make_ours(in_full(parts)))
    one = case.outs(pm.make_quantised(joined(parts), disabled=(FP8,)))
    made = (case.plain(change=lambda matrix: matrix.to(F8).float()), case.rounded(FP8, FP8), case.rounded(FP8),
            case.rounded(INT8), apart, one)  # fmt: skip
    return dict(zip(BOUNDS, (*case.in_bf16(), *(loss(outs, truth) for outs in made), loss(one, apart)), strict=True))


def measured(names: list[str], seeds: int) -> list[Row]:
    """Rows with their bounds. names: of CASES."""
    rows: list[Row] = []
    for name in names:
        place = list(CASES).index(name)
        rows += [(name, way, lost, (0.0, BOUNDS[way][place])) for way, lost in losses(CASES[name](seeds)).items()]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    args = parse(arguments)
    rows = measured(args.cases, args.seeds)
    lines, good = table(rows)
    print("\n".join(lines))
    if args.record:
        told = [(case, f"relative rms, {way}", lost) for case, way, lost, _ in rows]
        record.append(f"benchmarks.precision --seeds {args.seeds}", told)
    return int(not good)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the networks")
    parser.add_argument("--seeds", type=int, default=5, help="inputs, of which the median counts")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
