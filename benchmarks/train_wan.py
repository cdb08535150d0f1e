"""Train the tiny Wan-class image-to-video model: `python scripts/run.py -m benchmarks.train_wan`.

Core's own Wan network with the inputs of Wan 2.2 I2V A14B (36 channels: noise, mask, given latents), taught on shots
and cuts of the synthetic world. A run resumes where it was stopped.

Shape legend: B batch, C latent channels, T latent frames, h w latent pixels. Latents are in model space.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.ops
import numpy as np
import safetensors.torch
import torch
from comfy.latent_formats import Wan21
from comfy.ldm.wan.model import WanModel
from torch import Tensor, nn

from frame_memory.forcing.flow import add_noise, shifted_sigmas
from frame_memory.forcing.loop import Trainer, TrainSettings, run

from .codec import LinearCodec
from .shot_clips import ShotClips, fit_codec, given_pixels, random_clip
from .train_autoencoder import shipped

# What core's detection reads from the weights, and the number of heads, which it reads from the file's metadata.
TOPOLOGY = {
    "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 36, "dim": 128, "ffn_dim": 512, "freq_dim": 256,
    "text_dim": 64, "out_dim": 16, "num_heads": 4, "num_layers": 6, "cross_attn_norm": True,
}  # fmt: skip
CLIPS = 8000
SHIFT = 5.0


def build() -> WanModel:
    """The network in fp32, initialised as diffusion transformers are."""
    model = WanModel(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **TOPOLOGY)
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith(".weight"):
            nn.init.ones_(p)
        elif name.endswith("modulation"):
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        elif p.ndim == 1 or name == "head.head.weight":
            nn.init.zeros_(p)
        else:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    for i in (0, 2):
        nn.init.normal_(model.text_embedding[i].weight, std=0.1)
        nn.init.normal_(model.time_embedding[i].weight, std=0.02)
    return model


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Core's rotary kernel has no gradient; its own Train LoRA sets the same switch."""
    comfy.model_management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        comfy.model_management.in_training = False


def with_given(x_BCThw: Tensor, given_BCThw: Tensor) -> Tensor:
    """Noisy latents, mask (1 at the first latent frame) and given latents as one input, as core's WAN21 joins them."""
    mask = torch.zeros_like(x_BCThw[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([x_BCThw, mask, given_BCThw], dim=1)


class ShotLoss:
    """Flow-matching loss of random clips; draws everything from the generator it is given."""

    def __init__(self, model: WanModel, clips: ShotClips, batch: int, device: str = "cpu"):
        self.model, self.clips, self.batch, self.device = model, clips, batch, device

    def __call__(self, generator: torch.Generator) -> Tensor:
        x, given, text = self.clips.batch(self.batch, generator)
        noise = torch.randn(x.shape, generator=generator)
        sigma = shifted_sigmas(self.batch, SHIFT, generator)
        x, given, text, noise, sigma = (t.to(self.device) for t in (x, given, text, noise, sigma))
        velocity = self.model(with_given(add_noise(x, noise, sigma), given), sigma * 1000, text)
        return (velocity - (noise - x)).square().mean()


@torch.no_grad()
def as_autoencoder(clips: ShotClips, codec: LinearCodec, path: Path, sample: int = 32) -> ShotClips:
    """Clips whose given latents are as the autoencoder makes them of a picture followed by grey.

    How it differs from the codec there hardly depends on the picture, so the mean over a sample stands for all.
    """
    autoencoder = shipped(path, "shots")
    rng = np.random.default_rng(11)
    off = []
    for _ in range(sample):
        pixels = given_pixels(torch.from_numpy(random_clip(rng)[0][0]))
        made = Wan21().process_in(autoencoder.encode((pixels * 2 - 1).permute(3, 0, 1, 2)[None]))[0]
        off.append(made - codec.encode(pixels))
    off_CThw = torch.stack(off).mean(0)
    off_CThw[:, 0] = 0
    return ShotClips(clips.latents, clips.given + off_CThw.half().numpy(), clips.captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder for clips and checkpoints")
    parser.add_argument("--name", default="wan")
    parser.add_argument("--start", type=Path, help="weights to begin from (a finished run's .weights.safetensors)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3, help="Muon's rate; AdamW's is half of it")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--autoencoder", type=Path, help="trained autoencoder whose coding of grey is to be known")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    codec = fit_codec()
    clips = ShotClips.make(args.work, codec, args.clips, seed=1)
    if args.autoencoder:
        clips = as_autoencoder(clips, codec, args.autoencoder)
    model = build()
    if args.start:
        model.load_state_dict(safetensors.torch.load_file(args.start))
    model = model.to(args.device)
    trainer = Trainer(model, TrainSettings(steps=args.steps, matrix_rate=args.rate, other_rate=args.rate / 2))
    loss = ShotLoss(model, clips, args.batch, args.device)
    with training_mode():
        for _ in run(trainer, loss, args.work / f"{args.name}.safetensors", say=lambda text: print(text, flush=True)):
            pass
    averaged = {k: v.cpu() for k, v in trainer.averaged().items()}
    safetensors.torch.save_file(averaged, args.work / f"{args.name}.weights.safetensors")


if __name__ == "__main__":
    main()
