"""What the self-test models generate, measured against the world: `python scripts/run.py -m benchmarks.quality`.

Loads the shipped files as an artist's graph does, samples videos through the pack's own section loop, decodes them
with the shipped autoencoder, and prints measures for the first and last part beside those of an untrained network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import comfy.samplers
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

from frame_memory.model import checkpoint, framepack
from frame_memory.model.selftest import SelfTestText, SelfTestVision
from frame_memory.plan import PRESETS, decode_windows, parse_schedule, sigma_schedule
from frame_memory.sampling.long_video import sample_long_video
from frame_memory.sampling.unipc import framepack_unipc
from frame_memory.video.decode import decode_stream
from frame_memory.video.start_image import prepare

from . import record
from .clips import ORDERS
from .measure import measure
from .world import Scene, random_scene, render

MODELS = Path(__file__).resolve().parent.parent / "selftest_models"
FILES = {"F0": "frame_memory_selftest_F0.safetensors", "F1": "frame_memory_selftest_F1.safetensors"}
AUTOENCODER = "frame_memory_selftest_vae.safetensors"
PART_SECONDS = 2.5
# The formula for real sizes gives 1.6 at 64x64, and the few steps of a demo would then hardly see high noise levels,
# where the motion is decided. workflows/selftest.json has the same shift.
SHIFT = 4.0


def load(kind: str, *, trained: bool = True):
    """MODEL and VAE of the shipped self-test files; untrained: the same network with the trainer's fresh weights."""
    framepack.register()
    model = checkpoint.load_framepack(str(MODELS / "diffusion_models" / FILES[kind]))
    model.model_options = {**model.model_options, framepack.MODEL_OPTION: {"kind": kind}}
    if not trained:
        from .train_selftest import build

        torch.manual_seed(0)
        model.model.diffusion_model.load_state_dict(build().state_dict())
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae" / AUTOENCODER)))
    return model, vae


@torch.inference_mode()
def asked(vae, scene: Scene) -> tuple[dict, list]:
    """Start latent and prompt of a scene: its first frame and its caption."""
    image = prepare(vae, SelfTestVision(), torch.from_numpy(render(scene, np.arange(1))), None, 64, "white")
    text = SelfTestText()
    positive = text.encode_from_tokens_scheduled(text.tokenize(scene.caption))
    return image.start, [[c, {**d, "clip_vision_output": image.vision}] for c, d in positive]


@torch.inference_mode()
def sampled(model, kind: str, start: dict, positive: list, seconds: float, steps: int, seed: int) -> dict:
    """The LATENT of a video, by the pack's own section loop."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    return sample_long_video(
        noise=Noise_RandomNoise(seed),
        guider=guider,
        sampler=framepack_unipc(),
        sigmas=torch.tensor(sigma_schedule(steps, SHIFT)),
        schedule=parse_schedule(PRESETS[ORDERS[kind]]),
        start=start,
        seconds=seconds,
        say=lambda _: None,
    ).latent


@torch.inference_mode()
def decoded(vae, latent: dict) -> torch.Tensor:
    """The pictures of a LATENT, `[T, 64, 64, 3]`."""
    samples = latent["samples"]
    windows = decode_windows(latent["frame_memory"]["order"], samples.shape[2])
    return torch.cat(list(decode_stream(vae.decode, samples, windows)), dim=-4).squeeze(0).cpu()


def make_video(model, vae, kind: str, scene: Scene, seconds: float, steps: int, seed: int) -> np.ndarray:
    """A video of a scene from its first frame and its caption, `[T, 64, 64, 3]`."""
    return decoded(vae, sampled(model, kind, *asked(vae, scene), seconds, steps, seed)).numpy()


def rows(
    kind: str, trained: bool, scenes: list[Scene], seconds: float, steps: int
) -> list[tuple[str, dict[str, float]]]:
    """Mean measures of the parts of the videos: `(part, measures)`."""
    model, vae = load(kind, trained=trained)
    parts: dict[str, list[dict[str, float]]] = {}
    for seed, scene in enumerate(scenes):
        video = make_video(model, vae, kind, scene, seconds, steps, seed)
        measured = measure(video, scene)
        length = int(PART_SECONDS * 30)
        for start in range(0, len(video) - length // 2, length):
            name = f"{start / 30:.1f}-{min(start + length, len(video)) / 30:.1f} s"
            parts.setdefault(name, []).append(measured.means(slice(start, start + length)))
    names = list(next(iter(parts.values()))[0])
    return [(p, {n: float(np.nanmean([m[n] for m in ms])) for n in names}) for p, ms in parts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    parser.add_argument("--kinds", nargs="+", default=["F0", "F1"], choices=["F0", "F1"])
    args = parser.parse_args()
    rng = np.random.default_rng(2026)
    scenes = [random_scene(rng, tidy=True) for _ in range(args.scenes)]
    print(
        "| model | part | found | colour kept | colour error | shape kept | overlap | off by, px | off track, px | "
        "speed | ground, dB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    figures: list[tuple[str, str, float]] = []
    for kind in args.kinds:
        for trained in (True, False):
            label = kind if trained else f"{kind} untrained"
            for part, m in rows(kind, trained, scenes, args.seconds, args.steps):
                figures += [(f"{label}, {part}", name, value) for name, value in m.items()]
                print(
                    f"| {label} | {part} | {m['found']:.0%} | {m['colour']:.0%} | {m['colour_error']:.3f} | "
                    f"{m['shape']:.0%} | {m['overlap']:.2f} | {m['distance']:.1f} | "
                    f"{m['across']:.1f} | {m['pace']:.0%} | {m['background']:.1f} |",
                    flush=True,
                )
    if args.record:
        command = f"benchmarks.quality --scenes {args.scenes} --seconds {args.seconds} --steps {args.steps}"
        record.append(command, figures)


if __name__ == "__main__":
    main()
