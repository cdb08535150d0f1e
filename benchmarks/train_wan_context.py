"""Teach the tiny Wan-class model to see its history: `python scripts/run.py -m benchmarks.train_wan_context`.

What learns are patchifiers for finished frames and a LoRA on the frozen self-test model, on random sections of long
shots whose history is disturbed by noise and by the network's own one-step estimates. A run resumes where it was
stopped.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels. Latents are in model space.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.latent_formats
import comfy.sd
import comfy.utils
import safetensors.torch
import torch
from torch import Tensor

from frame_memory.forcing.flow import WanConditioning
from frame_memory.forcing.sections import Disturbance, Sample, random_section, section_loss
from frame_memory.forcing.stages import LORA, Trained
from frame_memory.forcing.training_state import TrainingFolder
from frame_memory.forcing.video_trainer import VideoSettings, VideoTrainer
from frame_memory.model import wan
from frame_memory.plan import PRESETS, plan_sections

from .ffgo import AUTOENCODER, BASE, MODELS
from .long_clips import codec_of
from .long_shots import LongShots
from .shot_clips import fit_codec

SCHEDULE = "F1 forward"
SCHEDULE_TEXT = PRESETS[SCHEDULE]
# A shot's turn lasts nine windows; what the sections after them see is the same again.
SECTIONS = 10
SHIFT, PATCHIFIERS = 5.0, "patchifiers"
SHOTS = 400


def load(rank: int) -> Trained:
    """The self-test model with a LoRA and patchifiers that learn, in fp32."""
    return trained_of(comfy.sd.load_diffusion_model(str(MODELS / BASE), model_options={"dtype": torch.float32}), rank)


def trained_of(model, rank: int) -> Trained:
    """A Wan MODEL's network with a LoRA and patchifiers that learn."""
    patchifiers = wan.patchifiers_of(model)
    network, options = model.model.diffusion_model, wan.options(patchifiers)
    return Trained(network, None, (LORA,), rank=rank, options=options, beside={PATCHIFIERS: patchifiers})


def picture_encoder():
    """Pictures `[B, H, W, 3]` to first latent frames `[B, C, 1, H, W]` by the shipped autoencoder."""
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / AUTOENCODER)))
    process_in = comfy.latent_formats.Wan21().process_in

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        return torch.cat([process_in(vae.encode(picture[None])) for picture in pictures])

    return encode


class ContextLosses:
    """Loss of one random section, as VideoTrainer asks for it; draws everything from the generator it is given."""

    def __init__(self, trained: Trained, shots: LongShots, batch: int, disturbance: Disturbance):
        self.trained, self.shots, self.batch, self.disturbance = trained, shots, batch, disturbance
        self.sections = plan_sections(SCHEDULE_TEXT, sections=SECTIONS).sections
        self.beside = trained.model.in_dim - trained.model.out_dim

    def __call__(self, generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
        latents, text = self.shots.batch(self.batch, self.sections[-1].stop, generator)
        cond = WanConditioning(text, beside=self.beside)
        sample = Sample(latents, cond, *random_section(self.sections, generator))
        options = self.trained.forced.options
        yield section_loss(self.trained, sample, self.disturbance, SHIFT, generator, options)[0], 1.0


def train(trainer: VideoTrainer, losses: ContextLosses, steps: int, folder: TrainingFolder, save_every: int) -> None:
    """Go on to `steps` updates, with a checkpoint now and then."""
    if (found := folder.resume(trainer)) is not None:
        print(f"resumed {found.name}", flush=True)
    began, first = time.monotonic(), trainer.done
    with losses.trained.ready():
        while trainer.done < steps:
            trainer.step(losses)
            if trainer.done % 25 == 0:
                recent = trainer.losses[-25:]
                pace = (time.monotonic() - began) / (trainer.done - first)
                print(
                    f"step {trainer.done}/{steps}  loss {sum(recent) / len(recent):.4f}  {pace:.2f} s/step  "
                    f"{(steps - trainer.done) * pace / 60:.1f} min left",
                    flush=True,
                )
            if trainer.done % save_every == 0 or trainer.done == steps:
                folder.save(trainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder for clips and checkpoints")
    parser.add_argument("--name", default="wan_context")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--disturb", type=float, default=0.3, help="largest noise level put on the history")
    parser.add_argument("--own", type=float, default=0.4, help="share of steps whose history holds an own estimate")
    parser.add_argument("--shots", type=int, default=SHOTS)
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    codec = codec_of(args.work, fit_codec, "shots-codec")
    shots = LongShots.make(args.work, codec, picture_encoder(), args.shots, seed=1)
    trained = load(args.rank)
    settings = VideoSettings(rate=args.rate, warmup=20, average=0.995, betas=(0.9, 0.99))
    trainer = VideoTrainer(trained.parameters, settings)
    losses = ContextLosses(trained, shots, args.batch, Disturbance(args.disturb, args.own))
    # Not the rate: a run may end at a lower one than it began with.
    identity = {"rank": args.rank, "batch": args.batch, "disturb": args.disturb, "own": args.own}
    folder = TrainingFolder(args.work / args.name, identity, print)
    train(trainer, losses, args.steps, folder, args.save_every)
    weights = {name: value.contiguous() for name, value in trainer.weights().items()}
    safetensors.torch.save_file(weights, args.work / f"{args.name}.weights.safetensors")


if __name__ == "__main__":
    main()
