"""Pack trained self-test weights as the files that ship: `python scripts/run.py -m benchmarks.ship_selftest`.

Video models become bf16 files in core's layout, the autoencoder one that the stock VAE loader reads; all say what they
are in their metadata. Together they must stay under 24 MB with all that the pack ships. Draws the pictures that the
self-test graphs start from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from frame_memory.model import checkpoint

from . import ffgo, shots
from .quality import AUTOENCODER, FILES, MODELS
from .train_wan import TOPOLOGY
from .world import Scene, render, tidied

METADATA = {
    "frame_memory.base": "selftest",
    "frame_memory.recipe": "python scripts/run.py -m benchmarks.train_selftest",
    "modelspec.license": "GPL-3.0-or-later",
    "modelspec.description": "Frame Memory self-test model: 64x64 sprites of a procedural world, no real-world data",
}
WAN_METADATA = {
    **METADATA,
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
# What workflows/ffgo_selftest.json composes, as an artist would bring it: cut-outs and a place.
COMPOSITION = shots.Shot(
    cast=(shots.Sprite("green", "circle"), shots.Sprite("pink", "diamond"), shots.Sprite("blue", "square")),
    starts=(36.0, 20.0, 44.0), direction="right", ground="stripes", ground_colour="navy", phase=32.0,
)  # fmt: skip


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a finished run, or of a checkpoint on the way."""
    tensors = safetensors.torch.load_file(path)
    averaged = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
    return averaged or tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--F0", type=Path, help="trained F0 weights")
    parser.add_argument("--F1", type=Path, help="trained F1 weights")
    parser.add_argument("--autoencoder", type=Path, help="trained autoencoder weights")
    parser.add_argument("--wan", type=Path, help="trained weights of the Wan-class model")
    parser.add_argument("--wan-autoencoder", type=Path, help="trained weights of its autoencoder")
    args = parser.parse_args()
    for kind in ("F0", "F1"):
        source = getattr(args, kind)
        if source is not None:
            target = MODELS / "diffusion_models" / FILES[kind]
            target.parent.mkdir(parents=True, exist_ok=True)
            native = {k: v.to(torch.bfloat16) for k, v in weights(source).items()}
            checkpoint.save_native(native, str(target), METADATA, kind, source=source.name)
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
    picture = render(START, np.arange(1))[0]
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(MODELS / "start.png")
    print(f"start.png shows: {START.caption}")
    for i, sprite in enumerate(COMPOSITION.cast, 1):
        shots.cut_out(sprite).save(MODELS / f"ffgo_reference_{i}.png")
    place = (shots.ground(COMPOSITION, np.arange(1))[0] * 255).round().astype(np.uint8)
    Image.fromarray(place).save(MODELS / "ffgo_background.png")
    print(f"the FFGo pictures show: {COMPOSITION.caption()}")
    for file in sorted(MODELS.rglob("*.safetensors")):
        print(f"{file.relative_to(MODELS)}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
