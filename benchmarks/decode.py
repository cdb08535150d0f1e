"""Seconds of a section's decode: `python scripts/run.py -m benchmarks.decode [--record]`.

HunyuanVideo's autoencoder on random weights, as ComfyUI makes it of a file: the 18 latent frames at 832x480 that a
section's 36 pixel frames are blended from, from latents to pixels in RAM, in the number format that ComfyUI takes here.
Median of repeated runs. Its share of a section is that of the step's seconds times 25 (`benchmarks.speed`).

--tiny decodes 3 latent frames of 32x32 pixels with the self-test autoencoder. Exits with 1 where a pixel is no number.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

import comfy.sd
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from frame_memory.video.decode import decode_window

from . import parity_models as pm
from . import record
from .memory_cost import Row, clocked, operations, table
from .quality import AUTOENCODER as SELF_TEST
from .quality import MODELS
from .section_overhead import AUTOENCODER, WINDOW
from .stage_two import HEIGHT, WIDTH

CHANNELS = 16
TINY = (3, 4, 4)
SECONDS = "seconds of a decode"


def weights(device: str) -> dict[str, torch.Tensor]:
    """A file of the published topology with random numbers, in RAM."""
    with torch.device(device):
        made = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=CHANNELS)
    pm.randomise(made, 0)
    return {key: value.cpu() for key, value in made.state_dict().items()}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = TINY if args.tiny else (WINDOW, HEIGHT, WIDTH)
    small = str(MODELS / "vae" / SELF_TEST)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(small) if args.tiny else weights(device))
    latents = torch.randn(1, CHANNELS, *size, generator=torch.Generator().manual_seed(0))
    pixels = decode_window(vae.decode, latents)  # kernels are chosen and memory is fetched in the first call
    broken = float((~torch.isfinite(pixels)).sum())
    again = partial(decode_window, vae.decode, latents)
    took = statistics.median(clocked(again, device)[0] for _ in range(args.repeats))
    work = operations(again)
    name = "self-test" if args.tiny else "HunyuanVideo's"
    frames, height, width = size
    case = f"{name} autoencoder, {frames} latent frames of {8 * width}x{8 * height}, {vae.vae_dtype}, {device}"
    rows: list[Row] = [
        (case, SECONDS, took, None),
        (case, "operations, 1e12", work / 1e12, None),
        (case, "1e12 operations a second", work / took / 1e12, None),
        (case, "pixels that are no numbers", broken, (0.0, 0.0)),
    ]
    if device == "cuda":
        rows.insert(3, (case, "GPU memory at the peak, MB", torch.cuda.max_memory_allocated() / 2**20, None))
    lines, good = table(rows)
    print("\n".join(lines))
    if args.record:
        record.append(f"benchmarks.decode --repeats {args.repeats}", [row[:3] for row in rows])
    return 0 if good else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small one, to see that it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
