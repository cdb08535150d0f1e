"""RAM that a 13 B checkpoint takes: `python scripts/run.py -m benchmarks.load_memory [--share 1] [--record]`.

A file of the published topology, in diffusers' layout and full of zeros (which take no place on most disks), is loaded
as 'Load FramePack Model' does, in a process of its own, and one forward pass over a few tokens is made. What counts is
memory that the system cannot take back. Three ways: a plain fp8 file as it is, an fp8 file with a scale for each of q,
k and v, and a bf16 file rounded to int8 on the way.

share: of the blocks, for a machine without room for all. Told beside it, by calculation: all blocks' weights as a GPU's
host keeps them (a byte a number of the blocks' matrices, two of the rest; a CPU's host widens that rest to fp32), and
what was seen beyond the weights. Exits with 1 where that is more than 1.25 GiB.
Source: reference/performance.md section 2, "Memory floor".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from comfy.cli_args import args as host_args

host_args.cpu = True

import torch
from torch import Tensor

from frame_memory.model import checkpoint, key_map, quantised, tensor_file
from frame_memory.model.transformer import IMAGE_FEATURES, FramePackTransformer

from . import parity_models as pm
from . import record
from .memory import MEGABYTE, Peak, in_child, unbacked
from .stage_two import FULL, network

# On a CPU core would widen a plain fp8 file to fp32; as asked for here it is kept, as on a GPU.
WAYS = {
    "fp8": {"dtype": torch.float8_e4m3fn}, "fp8, scaled": {}, "bf16 to int8": {quantised.ROUND_TO: quantised.INT8},
}  # fmt: skip
SHARE, BOUND = 0.5, 1.25  # GiB beyond the weights, of which a CPU takes 0.8 to widen what is not fp8


def tensors_of(way: str, share: float) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the file, without numbers."""
    depth, single = (round(share * FULL[name]) for name in ("depth", "depth_single_blocks"))
    sd = key_map.convert_native(network(depth=depth, depth_single_blocks=single).state_dict())
    if not way.startswith("fp8"):
        return sd
    blocks = [k for k, v in sd.items() if v.ndim == 2 and k.startswith(("transformer_blocks.", "single_transformer"))]
    sd.update({key: sd[key].to(torch.float8_e4m3fn) for key in blocks})
    if way == "fp8, scaled":
        sd.update({f"{key}_scale": torch.empty((), device="meta") for key in blocks})
    return sd


def write_zeros(path: Path, sd: dict[str, Tensor]) -> int:
    """A safetensors file whose numbers are holes; returns its bytes."""
    header, offset = {}, 0
    for name, value in sd.items():
        stop = offset + value.numel() * value.dtype.itemsize
        dtype, shape = tensor_file.NAMES[value.dtype], list(value.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        return file.seek(0, 2)


def forward(patcher) -> Tensor:
    """One pass over two latent frames of a token each, with as little around them."""
    given = pm.make_inputs(2, 2, (20, 21), ((1, (0, 19)),), text_lengths=(1,), image_tokens=1)
    net: FramePackTransformer = patcher.model.diffusion_model
    assert net.image_projection.up.in_features == IMAGE_FEATURES
    return pm.run_ours(net, given, torch.float32)


def child(way: str, share: float, result: str) -> None:
    """Write the file, load it, run it; MB to `result`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "FramePack_F1.safetensors"
        size = write_zeros(path, tensors_of(way, share)) / MEGABYTE
        before = unbacked()
        with Peak(unbacked) as peak:
            patcher = checkpoint.load_framepack(str(path), WAYS[way])
            loading = peak.take()
            kept = unbacked()
            forward(patcher)
            told = {"file": size, "before": before, "loading": loading, "loaded": kept, "running": peak.take(),
                    "weights": patcher.model_size() / MEGABYTE}  # fmt: skip
    Path(result).write_text(json.dumps(told), encoding="utf-8")


def whole() -> float:
    """MB of all weights, the blocks' matrices at a byte a number."""
    sizes = {k: (v.numel(), v.ndim == 2 and "transformer_blocks." in k) for k, v in tensors_of("", 1.0).items()}
    return sum(count * (1 if matrix else 2) for count, matrix in sizes.values()) / MEGABYTE


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.child:
        child(args.child, args.share, args.result)
        return 0
    rows, good = [], True
    print("| way | file, GiB | weights, GiB | most while loading | all blocks, by calculation | with a step |")
    print("|" + "---|" * 6)
    for way in args.ways:
        told = in_child(way, None, "--share", str(args.share), module="benchmarks.load_memory")
        grown = {name: told[name] - told["before"] for name in ("loading", "loaded", "running")}
        beyond = grown["loading"] - told["weights"]
        figures = (told["file"], told["weights"], grown["loading"], whole() + beyond, grown["running"])
        gib = [megabytes / 1024 for megabytes in figures]
        print(f"| {way} | " + " | ".join(f"{v:.2f}" for v in gib) + " |", flush=True)
        case = f"13 B topology, {args.share:g} of the blocks, {way}"
        names = ("file, GiB", "weights, GiB", "most RAM while loading, GiB",
                 "the same for all blocks on a GPU, by calculation, GiB", "most RAM with a step, GiB")  # fmt: skip
        rows += [(case, name, value) for name, value in zip(names, gib, strict=True)]
        good = good and beyond <= 1024 * BOUND
    if args.record:
        record.append(f"benchmarks.load_memory --share {args.share:g}", rows)
    return 0 if good else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=SHARE, help="of the blocks; 1 needs 16 GB of free RAM")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
