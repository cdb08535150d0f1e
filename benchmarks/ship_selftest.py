"""Pack trained self-test weights as the files that ship: `python scripts/run.py -m benchmarks.ship_selftest`.

FramePack models become files in core's layout and scaled fp8, as most files that artists have, the Wan-class model one
in bf16; the autoencoder becomes one that the stock VAE loader reads. All say what they are in their metadata. Together
they must stay under 24 MB. Draws the pictures that the self-test graphs start from.

From nothing: `benchmarks.train_selftest`, `benchmarks.ship_selftest --F0 ... --F1 ...`, `benchmarks.claims memorypack`,
`benchmarks.ship_selftest --claims ...`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import comfy.sd
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from frame_memory.model import checkpoint, memory_file, scaled_fp8, tensor_file, wan, wan_file
from frame_memory.model.base_signature import Base
from frame_memory.model.provenance import NamedLora, with_loras
from frame_memory.model.semantic_pack import PackSpec
from frame_memory.plan.mark import SELFTEST, SELFTEST_WAN

from . import ffgo, shots, train_wan_context
from .claims_rows import MODEL, PACK, STAGE_2, TRAINING, VARIANTS, slug
from .long_world import LongScene
from .long_world import render as render_long
from .quality import AUTOENCODER, FILES, MODELS
from .train_wan import TOPOLOGY
from .world import Scene, render, tidied

METADATA = {
    "frame_memory.base": SELFTEST,
    "frame_memory.recipe": "python scripts/run.py -m benchmarks.train_selftest",
    "modelspec.license": "GPL-3.0-or-later",
    "modelspec.description": "Frame Memory self-test model: 64x64 sprites of a procedural world, no real-world data",
}
WAN_METADATA = {
    **METADATA,
    "frame_memory.base": SELFTEST_WAN,
    "frame_memory.recipe": "python scripts/run.py -m benchmarks.train_wan",
    "modelspec.description": (
        f"Frame Memory self-test model: {shots.WIDTH}x{shots.HEIGHT} shots of a procedural world, no real-world data"
    ),
    # Core takes Wan's own widths of a head and of text unless the file says otherwise.
    "config": json.dumps({"transformer": {name: TOPOLOGY[name] for name in ("num_heads", "text_dim")}}),
}

# What the demo and workflows/selftest.json start from, and ask for.
START = tidied(
    Scene(colour="red", shape="circle", direction="right", ground="hills", ground_colour="navy", x=18, y=30, phase=64)
)
# Who comes and leaves in workflows/memory_selftest.json, which starts from the ground alone.
VISITOR = LongScene(colour="red", shape="circle", side="left", ground="stripes", ground_colour="navy")
# What workflows/wan_memory.json starts from.
PAIR = shots.Shot(
    cast=(shots.Sprite("red", "circle"), shots.Sprite("yellow", "square")), starts=(28.0, 64.0), direction="right",
    ground="stripes", ground_colour="navy", phase=64.0,
)  # fmt: skip
# What workflows/ffgo_selftest.json composes, as an artist would bring it: cut-outs and a place.
COMPOSITION = shots.Shot(
    cast=(shots.Sprite("green", "circle"), shots.Sprite("pink", "diamond"), shots.Sprite("blue", "square")),
    starts=(36.0, 20.0, 44.0), direction="right", ground="stripes", ground_colour="navy", phase=32.0,
)  # fmt: skip


# Less than it is trained with, for the limit on all files together.
CONTEXT_RANK = 9
CONTEXT = f"{memory_file.FOLDER}/frame_memory_selftest_wan_context.safetensors"
CONTEXT_LORA = "loras/frame_memory_selftest_wan_context.safetensors"
CONTEXT_METADATA = {
    "frame_memory.recipe": "python scripts/run.py -m benchmarks.train_wan_context",
    "modelspec.license": METADATA["modelspec.license"],
}
FP8, BLOCKS = torch.float8_e4m3fn, ("double_blocks.", "single_blocks.")
CLAIMS_RECIPE = "python scripts/run.py -m benchmarks.claims memorypack"
# What of the claims' rows ships: files by the variant that they are of.
SHIPPED = {
    "frame_memory_selftest_memory.safetensors": "MemoryPack",
    "frame_memory_selftest_direct_forcing.safetensors": "Direct Forcing (all)",
    "frame_memory_selftest_student_forcing.safetensors": "student forcing",
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a finished run, or of a checkpoint on the way."""
    tensors = safetensors.torch.load_file(path)
    averaged = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
    return averaged or tensors


def in_fp8(native: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network with the matrices of its blocks in core's scaled fp8, one scale each, multiplied in full precision."""
    out = dict(native)
    for name, value in native.items():
        if value.ndim == 2 and name.startswith(BLOCKS):
            layer = name.removesuffix(".weight")
            scale = value.float().abs().max() / torch.finfo(FP8).max
            out[name], out[f"{layer}.weight_scale"] = (value.float() / scale).to(FP8), scale
            conf = {"format": scaled_fp8.FP8_FORMATS[FP8], "full_precision_matrix_mult": True}
            out[f"{layer}.comfy_quant"] = scaled_fp8.mark(conf)
    return out


def ship_claims(folder: Path) -> None:
    """The claims' base of kind F1 as the self-test's, its memory, and the heads that were trained behind that memory.

    folder: `--work` of benchmarks.claims. All are of its first seed. Where it holds no base, its rows began from the F1
    that ships already, which is left as it is.
    """

    def parts(source: Path, prefix: str, names=None) -> dict[str, torch.Tensor]:
        held = tensor_file.read(str(source))
        found = {k.removeprefix(prefix): v.to(torch.bfloat16) for k, v in held.items() if k.startswith(prefix)}
        return {k: v for k, v in found.items() if names is None or k in names}

    model = MODELS / "diffusion_models" / FILES["F1"]
    base = folder / "base-F1.safetensors"
    if base.exists():
        metadata = METADATA | {"frame_memory.recipe": CLAIMS_RECIPE, TRAINING: _settings(base)}
        checkpoint.save_native(in_fp8(parts(base, MODEL)), str(model), metadata, "F1", source=base.name)
    network = checkpoint.load_framepack(str(model)).model.diffusion_model
    its, files = Base.of_network(network, SELFTEST, "F1"), MODELS / memory_file.FOLDER
    for file, variant in SHIPPED.items():
        row = folder / f"{slug(variant)}-s0.safetensors"
        recipe = {"command": CLAIMS_RECIPE, "seed": 0, **json.loads(_settings(row))}
        said = {"recipe": recipe, "licence": METADATA["modelspec.license"]}
        if VARIANTS[variant].leg == STAGE_2:
            memory_file.write(str(files / file), its, head=parts(row, MODEL, memory_file.HEAD), **said)
        else:
            spec = PackSpec.of(network).to_dict()
            memory_file.write(str(files / file), its, pack=parts(row, PACK), spec=spec, **said)


def of_rank(weights: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """LoRA pairs (`<layer>.down`, `.up`) as the nearest ones of a smaller rank."""
    out = dict(weights)
    for name in (name for name in weights if name.endswith(".down")):
        up = name.removesuffix("down") + "up"
        u, values, v = torch.linalg.svd(weights[up] @ weights[name], full_matrices=False)
        root = values[:rank].sqrt()
        out[name], out[up] = root[:, None] * v[:rank], u[:, :rank] * root
    return out


def ship_context(weights_file: Path) -> None:
    """What benchmarks.train_wan_context learned: patchifiers and a LoRA beside the Wan-class model, both in bf16."""
    held = weights(weights_file)
    rank = next(value for name, value in held.items() if name.endswith(".down")).shape[0]
    model = comfy.sd.load_diffusion_model(str(MODELS / ffgo.BASE))
    trained = train_wan_context.trained_of(model, rank)
    smaller = trained.lora(of_rank(held, CONTEXT_RANK))
    lora = {name: value.to(torch.bfloat16).contiguous() for name, value in smaller.items()}
    safetensors.torch.save_file(lora, MODELS / CONTEXT_LORA, {"format": "pt", **CONTEXT_METADATA})
    prefix = f"{train_wan_context.PATCHIFIERS}."
    patchifiers = wan.patchifiers_of(model)
    patchifiers.load_state_dict({n.removeprefix(prefix): v for n, v in held.items() if n.startswith(prefix)})
    recipe = {"command": CONTEXT_METADATA["frame_memory.recipe"], "schedule": train_wan_context.SCHEDULE_TEXT}
    recipe = with_loras(recipe, [NamedLora.of(Path(CONTEXT_LORA).name, lora)])
    said = {"recipe": recipe, "licence": METADATA["modelspec.license"]}
    wan_file.write(str(MODELS / CONTEXT), Base.of(model), patchifiers.state_dict(), **said, dtype=torch.bfloat16)


def _settings(path: Path) -> str:
    """How weights of the claims were trained, as JSON."""
    return tensor_file.read_header(str(path))[1]["identity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--F0", type=Path, help="trained F0 weights")
    parser.add_argument("--F1", type=Path, help="trained F1 weights")
    parser.add_argument("--claims", type=Path, help="folder of benchmarks.claims: F1, its memory and heads")
    parser.add_argument("--autoencoder", type=Path, help="trained autoencoder weights")
    parser.add_argument("--wan", type=Path, help="trained weights of the Wan-class model")
    parser.add_argument("--wan-context", type=Path, help="trained weights of benchmarks.train_wan_context")
    parser.add_argument("--wan-autoencoder", type=Path, help="trained weights of its autoencoder")
    args = parser.parse_args()
    for kind in ("F0", "F1"):
        source = getattr(args, kind)
        if source is not None:
            target = MODELS / "diffusion_models" / FILES[kind]
            target.parent.mkdir(parents=True, exist_ok=True)
            native = {k: v.to(torch.bfloat16) for k, v in weights(source).items()}
            checkpoint.save_native(in_fp8(native), str(target), METADATA, kind, source=source.name)
    if args.claims is not None:
        ship_claims(args.claims)
    if args.wan_context is not None:
        ship_context(args.wan_context)
    plain = {"format": "pt"}
    for source, file, metadata in (
        (args.autoencoder, f"vae/{AUTOENCODER}", METADATA | plain),
        (args.wan, ffgo.BASE, WAN_METADATA | plain),
        (args.wan_autoencoder, ffgo.AUTOENCODER, {k: v for k, v in WAN_METADATA.items() if k != "config"} | plain),
    ):
        if source is not None:
            (MODELS / file).parent.mkdir(parents=True, exist_ok=True)
            native = {k: v.to(torch.bfloat16).contiguous() for k, v in weights(source).items()}
            safetensors.torch.save_file(native, MODELS / file, metadata)
    for file, picture, caption in (
        ("start.png", render(START, np.arange(1))[0], START.caption),
        ("night.png", render_long(VISITOR, np.arange(1))[0], VISITOR.caption),
        ("pair.png", shots.render(PAIR, np.arange(1))[0], PAIR.caption()),
    ):
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(MODELS / file)
        print(f"{file} is the beginning of: {caption}")
    for i, sprite in enumerate(COMPOSITION.cast, 1):
        shots.cut_out(sprite).save(MODELS / f"ffgo_reference_{i}.png")
    place = (shots.ground(COMPOSITION, np.arange(1))[0] * 255).round().astype(np.uint8)
    Image.fromarray(place).save(MODELS / "ffgo_background.png")
    print(f"the FFGo pictures show: {COMPOSITION.caption()}")
    for file in sorted(MODELS.rglob("*.safetensors")):
        print(f"{file.relative_to(MODELS)}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
