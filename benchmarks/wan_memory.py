"""A minute by the tiny Wan-class model with packed history, measured against the world of shots:
`python scripts/run.py -m benchmarks.wan_memory`.

Loads what ships as workflows/wan_memory.json does, samples videos of shots that no training saw through the pack's own
section loop, and prints measures of each third. A still picture of the start would keep its sprites too, so the speed
stands beside them.

Shape legend: T frames, H W pixels (96 x 96), 3 colour channels; images are float, 0..1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import comfy.samplers
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

from frame_memory.model import lora, tensor_file, wan_file
from frame_memory.model.selftest import SelfTestText
from frame_memory.plan import parse_schedule
from frame_memory.sampling.long_video import sample_long_video
from frame_memory.video.start_image import prepare

from . import ffgo_measure, record, shots
from .ffgo import AUTOENCODER, BASE, MODELS
from .long_shots import random_long_shot
from .ship_selftest import CONTEXT, CONTEXT_LORA
from .train_wan_context import SCHEDULE_TEXT, SHIFT

STEPS, STEP = 8, 8  # of the sampler; frames between two that are looked at
MEASURES = ("found", "shape", "speed", "ground, dB")
UNSEEN = 50_000  # seeds of the shots; training counts from 1


def load():
    """MODEL that looks back, and VAE, of what ships."""
    model = comfy.sd.load_diffusion_model(str(MODELS / BASE))
    model = lora.apply_lora(model, tensor_file.read(str(MODELS / CONTEXT_LORA)))[0]
    model = ModelSamplingSD3().patch(model, SHIFT)[0]
    model = wan_file.with_file(model, wan_file.read(str(MODELS / CONTEXT)))[0]
    return model, comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / AUTOENCODER)))


@torch.inference_mode()
def make_video(model, vae, shot: shots.Shot, seconds: float, seed: int) -> np.ndarray:
    """A video of a shot from its first frame and its caption, `[T, 96, 96, 3]`."""
    start = prepare(vae, None, torch.from_numpy(shots.render(shot, np.arange(1))), None, shots.WIDTH, "white").start
    text = SelfTestText()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*[text.encode_from_tokens_scheduled(text.tokenize(shot.caption()))] * 2)
    latent = sample_long_video(
        noise=Noise_RandomNoise(seed),
        guider=guider,
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS),
        schedule=parse_schedule(SCHEDULE_TEXT),
        start=start,
        seconds=seconds,
        say=lambda _: None,
    ).latent
    return vae.decode(latent["samples"]).reshape(-1, shots.HEIGHT, shots.WIDTH, 3).float().cpu().numpy()


def measure(video_THWC: np.ndarray, shot: shots.Shot) -> np.ndarray:
    """MEASURES of each third of a video, `[3, 4]`, by every eighth frame.

    found, shape: share of the sprites with a spot of their colour and size, and of their shape as well. speed: their
    way from frame to frame as a share of the true way. ground: PSNR in dB of all that is no sprite.
    """
    frames = np.arange(STEP, len(video_THWC), STEP)
    nearest = ffgo_measure.nearest_colours(video_THWC[frames])
    plain = ~np.isin(nearest, [i for i, name in enumerate(ffgo_measure.NAMES) if name.startswith("sprite")])
    for axis, by in ((1, 1), (1, -1), (2, 1), (2, -1)):
        plain &= np.roll(plain, by, axis)
    error = np.square(video_THWC[frames] - shots.ground(shot, frames)).mean(-1)
    psnr = -10 * np.log10(np.maximum((error * plain).sum((1, 2)) / plain.sum((1, 2)).clip(1), 1e-8))
    seen, ways = [], []
    for sprite, place_T2 in zip(shot.cast, shots.centres(shot, frames), strict=True):
        spots = nearest == ffgo_measure.NAMES.index(f"sprite {sprite.colour}")
        seen.append([ffgo_measure.look(spot, sprite) for spot in spots])
        middles = np.array([np.median(np.nonzero(spot)[1]) if spot.any() else np.nan for spot in spots])
        made, true = (np.abs(np.diff(x, append=np.nan)) for x in (middles, place_T2[:, 0]))
        ways.append((made, np.where(np.isnan(made), np.nan, true)))
    parts = np.array_split(np.arange(len(frames)), 3)
    travelled = [np.nansum(np.array(ways)[..., part], axis=(0, 2)) for part in parts]
    speed = [made / true if true else np.nan for made, true in travelled]
    shown = [np.mean(np.array(seen)[:, part], axis=(0, 1)) for part in parts]
    return np.array([[*s, v, psnr[part].mean()] for s, v, part in zip(shown, speed, parts, strict=True)])


def run(count: int, seconds: float, say: Callable[[str], None]) -> list[tuple[str, str, float]]:
    """Rows `(part, measure, mean over the shots)`."""
    model, vae = load()
    found = []
    for seed in range(count):
        shot, began = random_long_shot(np.random.default_rng(UNSEEN + seed)), time.monotonic()
        video = make_video(model, vae, shot, seconds, seed)
        found.append(measure(video, shot))
        say(f"{shot.caption()}: {np.round(found[-1], 2).tolist()}, {time.monotonic() - began:.0f} s")
    means = np.nanmean(found, axis=0)
    return [(f"third {i + 1}", name, means[i, k]) for i in range(3) for k, name in enumerate(MEASURES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    args = parser.parse_args()
    rows = run(args.shots, args.seconds, lambda line: print(line, flush=True))
    for part, name, value in rows:
        print(f"{part}, {name}: {value:.2f}")
    if args.record:
        record.append(f"benchmarks.wan_memory --shots {args.shots} --seconds {args.seconds}", rows)


if __name__ == "__main__":
    main()
