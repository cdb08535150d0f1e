"""Train the self-test autoencoders: `python scripts/run.py -m benchmarks.train_autoencoder [--world shots]`.

One is for the FramePack models and the world of single sprites, one for the Wan-class model and the world of shots.

Core's Wan autoencoder class at tiny width, taught by the linear codec: the encoder learns to make the codec's latents,
the decoder to draw pixels from them (and from slightly wrong ones, as a video model makes them). Works on 32x32 crops:
the network is convolutional and the codec works block by block.

Shape legend: B batch, T frames, H W pixels, t h w latent sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from comfy.latent_formats import HunyuanVideo, LatentFormat, Wan21
from comfy.ldm.wan.vae import WanVAE
from torch import Tensor, nn

from frame_memory.forcing.loop import Trainer, TrainSettings, run

from . import shot_clips
from .clips import fit_codec, video_of
from .codec import LinearCodec
from .quality import AUTOENCODER, MODELS
from .world import random_scene

DIMS = {"sprites": 6, "shots": 8}
SHIPPED = MODELS / "vae" / AUTOENCODER
# Latents of the file to latents the video model works on.
FORMATS: dict[str, type[LatentFormat]] = {"sprites": HunyuanVideo, "shots": Wan21}
CROP = 32
FRAMES = 9


def build(dim: int = DIMS["sprites"]) -> WanVAE:
    """The network as core builds it from a file, initialised so that its residual branches start silent."""
    model = WanVAE(dim=dim, z_dim=16, temperal_downsample=[False, True, True])
    for name, p in model.named_parameters():
        if p.ndim == 1:
            nn.init.zeros_(p)
        elif "gamma" in name:
            nn.init.ones_(p)
        elif ".residual.6." in name or ".proj." in name:
            nn.init.zeros_(p)
        else:
            nn.init.kaiming_normal_(p, nonlinearity="linear")
    return model


def shipped(path: Path = SHIPPED, world: str = "sprites") -> WanVAE:
    """A trained autoencoder, the self-test's where none is named."""
    model = build(DIMS[world]).requires_grad_(False)
    model.load_state_dict(safetensors.torch.load_file(path))
    return model


def random_crops(videos: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """`[B, FRAMES, CROP, CROP, 3]`, cut on the codec's grid."""
    crops = []
    places = [len(videos), videos.shape[1] - FRAMES + 1, *((side - CROP) // 8 + 1 for side in videos.shape[2:4])]
    for _ in range(batch):
        i, f, y, x = (int(torch.randint(high, (), generator=generator)) for high in places)
        crops.append(videos[i, f : f + FRAMES, y * 8 : y * 8 + CROP, x * 8 : x * 8 + CROP])
    return torch.stack(crops).float()


class DistilLoss:
    """Encoder against the codec's latents, decoder against pixels; decoder_only leaves the encoder as it is.

    noise: largest level of noise on the latents that the decoder draws from. given: clips
    a step that are grey after their first frame, as an image-to-video model is given its picture; encoder only.
    """

    def __init__(
        self, model: WanVAE, codec: LinearCodec, videos: Tensor, batch: int, stills: int, latent_format: LatentFormat,
        decoder_only: bool = False, noise: float = 0.1, given: int = 0,
    ):  # fmt: skip
        self.model, self.codec, self.videos, self.batch, self.stills = model, codec, videos, batch, stills
        self.format, self.decoder_only, self.noise, self.given = latent_format, decoder_only, noise, given

    def __call__(self, generator: torch.Generator) -> Tensor:
        loss = self._clips(generator)
        if self.stills:
            loss = loss + self._stills(generator)
        return loss + self._given(generator) if self.given else loss

    def _given(self, generator: torch.Generator) -> Tensor:
        crops = random_crops(self.videos, self.given, generator)[:, :1]
        clips = torch.full((self.given, self.videos.shape[1], CROP, CROP, 3), 0.5)
        clips[:, :1] = crops
        latents = torch.stack([self.codec.encode(c) for c in clips])
        made = self.format.process_in(self.model.encode(clips.permute(0, 4, 1, 2, 3) * 2 - 1))
        return (made - latents).square().mean()

    def _stills(self, generator: torch.Generator) -> Tensor:
        """Single whole pictures through the encoder: what an artist's start frame is."""
        i = torch.randint(len(self.videos), (self.stills,), generator=generator)
        f = torch.randint(self.videos.shape[1], (self.stills,), generator=generator)
        pictures = self.videos[i, f].float().unsqueeze(1)
        latents = torch.stack([self.codec.encode(p) for p in pictures])
        made = self.format.process_in(self.model.encode(pictures.permute(0, 4, 1, 2, 3) * 2 - 1))
        return 2 * (made - latents).square().mean()

    def _clips(self, generator: torch.Generator) -> Tensor:
        crops = random_crops(self.videos, self.batch, generator)
        latents = torch.stack([self.codec.encode(c) for c in crops])
        pixels = crops.permute(0, 4, 1, 2, 3) * 2 - 1
        level = self.noise * torch.rand(self.batch, 1, 1, 1, 1, generator=generator)
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        drawn = self.model.decode(self.format.process_out(noisy))
        error = drawn - pixels
        drawing = error.abs().mean() + 4 * error.square().mean()
        if self.decoder_only:
            return drawing
        made = self.format.process_in(self.model.encode(pixels))
        return (made - latents).square().mean() + drawing


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio of images in 0..1, in dB."""
    return float(-10 * torch.log10((a - b).square().mean()))


@torch.no_grad()
def report(model: WanVAE, codec: LinearCodec, videos: list[Tensor], latent_format: LatentFormat) -> str:
    """PSNR on unseen whole frames: codec alone, decoder on the codec's latents, encoder and decoder together."""
    rows = []
    for video in videos:
        latent = codec.encode(video)[None]
        pixels = (video * 2 - 1).permute(3, 0, 1, 2)[None]

        def draw(z: Tensor) -> Tensor:
            return (model.decode(latent_format.process_out(z))[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)

        made = latent_format.process_in(model.encode(pixels))
        still = latent_format.process_in(model.encode(pixels[:, :, :1]))
        error = float((still - latent[:, :, :1]).square().mean().sqrt())
        rows.append((psnr(codec.decode(latent[0]), video), psnr(draw(latent), video), psnr(draw(made), video), error))
    columns = [sum(c) / len(c) for c in zip(*rows, strict=True)]
    return "PSNR codec {:.1f} dB, decoder {:.1f} dB, round trip {:.1f} dB; error of a still's latent {:.3f}".format(
        *columns
    )


def material(world: str) -> tuple[LinearCodec, Tensor, list[Tensor]]:
    """Codec, videos to learn from `[N, T, H, W, 3]` float16, and unseen ones."""
    rng, unseen = np.random.default_rng(7), np.random.default_rng(99)
    if world == "shots":
        videos = [torch.from_numpy(shot_clips.any_pixels(rng)).half() for _ in range(600)]
        return (
            shot_clips.fit_codec(),
            torch.stack(videos),
            [torch.from_numpy(shot_clips.any_pixels(unseen)) for _ in range(12)],
        )
    videos = [video_of(random_scene(rng, tidy=i % 2 == 0), 41).half() for i in range(400)]
    return fit_codec(), torch.stack(videos), [video_of(random_scene(unseen, tidy=True), 17) for _ in range(12)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=tuple(FORMATS), default="sprites")
    parser.add_argument("--work", type=Path, default=Path("training"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--stills", type=int, default=0, help="single pictures a step, for the encoder alone")
    parser.add_argument("--start", type=Path, help="weights to begin from")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--decoder-only", action="store_true", help="video models made for its encoder stay valid")
    parser.add_argument("--noise", type=float, default=0.1, help="largest noise level on latents to draw from")
    parser.add_argument("--given", type=int, default=0, help="clips a step that are grey after their first frame")
    parser.add_argument("--name", default="autoencoder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    codec, videos, unseen = material(args.world)
    latent_format = FORMATS[args.world]()
    model = build(DIMS[args.world])
    if args.start:
        model.load_state_dict(safetensors.torch.load_file(args.start))
    trainer = Trainer(model, TrainSettings(steps=args.steps, other_rate=args.rate, weight_decay=0.0, average=0.99))
    stills = 0 if args.decoder_only else args.stills
    loss = DistilLoss(
        model, codec, videos, args.batch, stills, latent_format, args.decoder_only, args.noise, args.given
    )
    for step, _ in run(trainer, loss, args.work / f"{args.name}.safetensors"):
        if step % 100 == 0:
            print(report(trainer.averaged_model(), codec, unseen, latent_format), flush=True)
    safetensors.torch.save_file(trainer.averaged(), args.work / f"{args.name}.weights.safetensors")


if __name__ == "__main__":
    main()
