"""Train the self-test video models: `python scripts/run.py -m benchmarks.train_selftest [both|F0|F1] ...`.

One network first learns both kinds together on random sections of the world's videos (`both`), then each kind is
tuned on its own with its history disturbed: by noise, and by the network's own one-step estimates of the window made
before, so that it learns to mend its own errors. Every run resumes where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import comfy.ops
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from frame_memory.forcing.flow import Conditioning
from frame_memory.forcing.gradients import differentiable, training_options
from frame_memory.forcing.loop import Trainer, TrainSettings, run
from frame_memory.forcing.sections import Disturbance, Sample, section_loss
from frame_memory.model.transformer import FramePackTransformer

from .clips import ClipSet, fit_codec, random_section
from .codec import LATENT_SCALE

TOPOLOGY = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 64,
    "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
CLIPS = 2000
SHIFT = 6.0


def build() -> FramePackTransformer:
    """The self-test network in fp32, initialised as diffusion transformers are."""
    model = FramePackTransformer(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **TOPOLOGY)
    for name, p in model.named_parameters():
        if name.endswith("_norm.weight") or ".norm1.weight" in name or ".norm2.weight" in name:
            nn.init.ones_(p)
        elif p.ndim == 1:
            nn.init.zeros_(p)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p)
        else:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    for module in model.modules():
        if type(module).__name__ == "Modulation":
            nn.init.zeros_(module.lin.weight)
    for block in model.txt_in.individual_token_refiner.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
    for linear in (model.final_layer.linear, model.final_layer.adaLN_modulation[1]):
        nn.init.zeros_(linear.weight)
    _spread_patchifier(model)
    return model


def _spread_patchifier(model: FramePackTransformer) -> None:
    """Start the context patchifiers from the window's, spread over their larger cells (framepack.md 1)."""
    weight = model.img_in.proj.weight.data
    clean = model.clean_x_embedder
    clean.proj.weight.data.copy_(weight)
    clean.proj_2x.weight.data.copy_(weight.repeat(1, 1, 2, 2, 2) / 8)
    clean.proj_4x.weight.data.copy_(weight.repeat(1, 1, 4, 4, 4) / 64)


def picture_encoder(path: Path):
    """Pictures `[B, 64, 64, 3]` to first latent frames `[B, 16, 1, 8, 8]` by a trained autoencoder."""
    from .train_autoencoder import shipped

    autoencoder = shipped(path)

    def encode(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return autoencoder.encode(pictures.permute(0, 3, 1, 2).unsqueeze(2) * 2 - 1) * LATENT_SCALE

    return encode


class SectionLoss:
    """Loss of one random section; draws everything from the generator it is given."""

    def __init__(
        self, model, kinds: dict[str, ClipSet], batch: int, *, disturb: float, own: float, encode=None, device="cpu"
    ):
        self.model, self.kinds, self.batch, self.encode = model, kinds, batch, encode
        self.disturbance, self.device = Disturbance(disturb, own), device
        self.options = training_options()

    def __call__(self, generator: torch.Generator) -> Tensor:
        names = list(self.kinds)
        kind = names[int(torch.randint(len(names), (), generator=generator))]
        clips = self.kinds[kind]
        index = torch.randint(len(clips.captions), (self.batch,), generator=generator).numpy()
        latents, cond = clips.batch(np.sort(index), self.encode)
        latents = latents.to(self.device)
        cond = Conditioning(*(t.to(self.device) for t in (cond.text, cond.pooled, cond.vision)))
        section, previous = random_section(kind, generator)
        sample = Sample(latents, cond, section, previous)
        return section_loss(self.model, sample, self.disturbance, SHIFT, generator, self.options)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("both", "F0", "F1"))
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder for clips and checkpoints")
    parser.add_argument("--start", type=Path, help="weights to begin from (a finished run's .weights.safetensors)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="Muon's rate; AdamW's is half of it")
    parser.add_argument("--disturb", type=float, default=0.0, help="largest noise level put on the history")
    parser.add_argument("--own", type=float, default=0.0, help="share of steps whose history holds an own estimate")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--autoencoder", type=Path, help="trained autoencoder weights that make the start frame")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    codec = fit_codec()
    clips = ClipSet.make(args.work, codec, args.clips, seed=1)
    kinds = dict.fromkeys(("F0", "F1") if args.stage == "both" else (args.stage,), clips)
    model = build()
    if args.start:
        model.load_state_dict(safetensors.torch.load_file(args.start))
    encode = picture_encoder(args.autoencoder) if args.autoencoder else None
    model = model.to(args.device)
    settings = TrainSettings(steps=args.steps, matrix_rate=args.rate, other_rate=args.rate / 2)
    trainer = Trainer(model, settings)
    more = {"disturb": args.disturb, "own": args.own, "encode": encode, "device": args.device}
    loss = SectionLoss(model, kinds, args.batch, **more)
    with differentiable(model):
        for _ in run(trainer, loss, args.work / f"{args.stage}.safetensors", say=lambda text: print(text, flush=True)):
            pass
    averaged = {k: v.cpu() for k, v in trainer.averaged().items()}
    safetensors.torch.save_file(averaged, args.work / f"{args.stage}.weights.safetensors")


if __name__ == "__main__":
    main()
