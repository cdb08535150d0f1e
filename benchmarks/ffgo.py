"""FFGo on the synthetic world: `python scripts/run.py -m benchmarks.ffgo`.

Trains one LoRA for each expert on a few (canvas, video, caption) triples with core's own Train LoRA node, as the graph
workflows/ffgo_train.json does, and asks the tiny Wan-class model, without and with them, for videos of compositions
it has never seen. What the videos show is measured against the world's truth: is the canvas gone, is every reference
there (its colour stands in no caption, only in the picture), of the right shape, over the right ground.

The tiny model has one network where Wan 2.2 has two experts; it plays both, each with its own LoRA.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_train import TrainLoraNode
from comfy_extras.nodes_wan import WanImageToVideo
from PIL import Image

from frame_memory.forcing.first_frame import BOUNDARY, EXPERTS, HIGH, LOW, SHIFT, expert_range, triple
from frame_memory.model.selftest import text_features
from frame_memory.plan.first_frame_prompt import with_trigger

from . import record
from .ffgo_measure import Shown, measure, wilson
from .shot_clips import FRAMES
from .shots import HEIGHT, MOST, WIDTH, Shot, canvas, random_cast, random_shot, render

MODELS = Path(__file__).resolve().parent.parent / "selftest_models"
BASE = "diffusion_models/frame_memory_selftest_wan_i2v.safetensors"
AUTOENCODER = "vae/frame_memory_selftest_wan_vae.safetensors"
LORAS = {
    HIGH: "loras/frame_memory_selftest_ffgo_high_noise.safetensors",
    LOW: "loras/frame_memory_selftest_ffgo_low_noise.safetensors",
}
STEPS = 20


@dataclass(frozen=True)
class Recipe:
    """How the LoRAs are trained. steps: updates of each expert; batch: clips an update."""

    triples: int = 40
    steps: int = 400
    batch: int = 4
    rate: float = 1e-3
    rank: int = 16
    seed: int = 0


def check_files() -> None:
    """Exit, saying how they are made, where the models are not there."""
    missing = [file for file in (BASE, AUTOENCODER) if not (MODELS / file).exists()]
    if missing:
        raise SystemExit(
            f"{MODELS.name} has no {' and no '.join(missing)}. Train them with benchmarks.train_autoencoder --world "
            "shots and benchmarks.train_wan, pack them with benchmarks.ship_selftest --wan ... --wan-autoencoder ..."
        )


def load():
    """MODEL and VAE of the shipped files."""
    model = comfy.sd.load_diffusion_model(str(MODELS / BASE))
    return model, comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / AUTOENCODER)))


def conditioning(text: str) -> list:
    """CONDITIONING of a text, as the self-test encoder and CLIP Text Encode make it."""
    context, pooled = text_features(text)
    return [[context, {"pooled_output": pooled}]]


def prompt_of(shot: Shot) -> str:
    """What an artist would write: what is there and does what, the look left to the pictures."""
    return with_trigger(shot.caption(ground_colour=False))


def compositions(count: int, references: int | None, seed: int) -> list[Shot]:
    """Scenes with a given number of references; None: 1 to 5 in turn."""
    rng = np.random.default_rng(seed)
    return [random_shot(rng, random_cast(rng, references or i % MOST + 1)) for i in range(count)]


def train(model, vae, recipe: Recipe) -> dict[str, dict[str, torch.Tensor]]:
    """The two LoRAs by expert, in the key names core's Save LoRA writes."""
    latents, positive = [], []
    for shot in compositions(recipe.triples, None, 10_000 + recipe.seed):
        clip = torch.from_numpy(render(shot, np.arange(FRAMES)))
        latent, given, mask = triple(vae, clip, torch.from_numpy(canvas(shot)))
        ((context, extra),) = conditioning(prompt_of(shot))
        latents.append(latent)
        positive.append([[context, {**extra, "concat_latent_image": given, "concat_mask": mask}]])
    settings = {
        "batch_size": recipe.batch, "grad_accumulation_steps": 1, "steps": recipe.steps,
        "learning_rate": recipe.rate, "rank": recipe.rank, "optimizer": "AdamW", "loss_function": "MSE",
        "seed": recipe.seed, "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False,
        "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False,
        "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    made = {}
    for expert in EXPERTS:
        torch.manual_seed(recipe.seed)
        lists = {name: [value] for name, value in settings.items()}
        out = TrainLoraNode.execute(model=[expert_range(model, expert)], latents=latents, positive=positive, **lists)
        made[expert] = {name: t.detach().cpu() for name, t in out.result[0].items()}
    return made


def with_lora(model, lora: dict[str, torch.Tensor] | None):
    """The model as Load LoRA gives it, at the shift FFGo is used with."""
    if lora is not None:
        model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    return ModelSamplingSD3().patch(model, SHIFT)[0]


@torch.inference_mode()
def make_videos(
    model, vae, loras: dict[str, dict] | None, shots: list[Shot], seed: int, cfg: float = 1.0
) -> list[np.ndarray]:
    """A video `[25, 96, 96, 3]` of each shot, from its canvas and its prompt, by the two experts in turn."""
    experts = {e: with_lora(model, loras and loras[e]) for e in EXPERTS}
    sigmas = comfy.samplers.calculate_sigmas(experts[HIGH].get_model_object("model_sampling"), "simple", STEPS)
    change = int((sigmas >= BOUNDARY).sum())
    made = []
    for i, shot in enumerate(shots):
        start = torch.from_numpy(canvas(shot)).unsqueeze(0)
        positive, negative, latent = WanImageToVideo.execute(
            conditioning(prompt_of(shot)), conditioning(""), vae, WIDTH, HEIGHT, FRAMES, 1, start_image=start
        ).result
        x = latent["samples"]
        noise = comfy.sample.prepare_noise(x, 1000 * seed + i)
        settings = (STEPS, cfg, "euler", "simple", positive, negative)
        x = comfy.sample.sample(
            experts[HIGH], noise, *settings, x, last_step=change, disable_pbar=True, seed=seed
        )  # fmt: skip
        x = comfy.sample.sample(
            experts[LOW], torch.zeros_like(x), *settings, x, disable_noise=True, start_step=change, disable_pbar=True,
            force_full_denoise=True, seed=seed,
        )  # fmt: skip
        made.append(vae.decode(x)[0].float().clamp(0, 1).cpu().numpy())
    return made


def row(label: str, by_pair: list[list[Shown]]) -> tuple[str, dict[str, float]]:
    """One line of the table, and its figures. by_pair: the videos of each pair of LoRAs, whose shares stand apart too:
    the interval knows of the spread of videos only, not of that of trainings."""
    seen = [s for videos in by_pair for s in videos]
    found = np.concatenate([s.found for s in seen])
    right = np.concatenate([s.right for s in seen])
    hits = sum(s.activated for s in seen)
    low, high = wilson(hits, len(seen))
    figures = {
        "videos": len(seen), "canvas gone": np.mean([s.cut for s in seen]), "all references there": hits / len(seen),
        "low": low, "high": high, "references there": found.mean(), "right shape": right.sum() / max(found.sum(), 1e-9),
        "right ground": np.mean([s.cut and s.ground for s in seen]),
    }  # fmt: skip
    line = (
        f"| {label} | {len(seen)} | {figures['canvas gone']:.0%} | {hits / len(seen):.0%} ({low:.0%} to {high:.0%}) | "
        f"{figures['references there']:.0%} | {figures['right shape']:.0%} | {figures['right ground']:.0%} | "
        f"{' '.join(f'{np.mean([s.activated for s in videos]):.0%}' for videos in by_pair)} |"
    )
    return line, {name: float(value) for name, value in figures.items()}


def picture(videos: list[list[np.ndarray]], path: Path) -> None:
    """Frames 0, 3, 5, 10, 16 and 24 of videos, one video a row, groups side by side."""
    frames = [0, 3, 5, 10, 16, 24]
    rows = [np.concatenate([v[f] for group in line for v in [group] for f in frames], axis=1) for line in videos]
    Image.fromarray((np.concatenate(rows) * 255 + 0.5).astype(np.uint8)).save(path)


@dataclass(frozen=True)
class Job:
    """One run: a pair of LoRAs trained with this recipe, or none, and the videos made with it for each count."""

    recipe: Recipe | None
    seed: int
    videos: int
    cfg: float

    @property
    def label(self) -> str:
        """The row it belongs to."""
        return "without" if self.recipe is None else f"LoRA of {self.recipe.triples}"


@dataclass(frozen=True)
class Done:
    """A job's videos, measured: `seen[count]`. pair: its LoRAs, seconds: what their training took, drawn: the first
    video of each count."""

    seen: dict[int, list[Shown]]
    pair: dict[str, dict[str, torch.Tensor]] | None
    seconds: float
    drawn: list[np.ndarray]


def work(job: Job) -> Done:
    """Train, make, measure."""
    model, vae = load()
    began = time.monotonic()
    pair = None if job.recipe is None else train(model, vae, job.recipe)
    seconds, seen, drawn = time.monotonic() - began, {}, []
    for count in range(1, MOST + 1):
        shots = compositions(job.videos, count, 20_000 + 100 * count + job.seed)
        videos = make_videos(model, vae, pair, shots, job.seed, job.cfg)
        seen[count] = [measure(v, s) for v, s in zip(videos, shots, strict=True)]
        drawn.append(videos[0])
    return Done(seen, pair, seconds, drawn)


def all_done(do: Callable, jobs: Sequence, workers: int) -> Iterator:
    """What `do` makes of each job, in their order; by several workers in processes of one thread each."""
    if workers == 1:
        yield from map(do, jobs)
        return
    with multiprocessing.Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap(do, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=16, help="videos for each count of references and each LoRA")
    parser.add_argument("--loras", type=int, default=2, help="LoRA pairs trained, each on other triples and seeds")
    parser.add_argument("--triples", type=int, nargs="+", default=[40], help="few-shot sizes")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps of each expert")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each (CPU only)")
    parser.add_argument("--picture", type=Path, help="write frames of the first videos here (PNG)")
    parser.add_argument("--ship", action="store_true", help="write the first pair of LoRAs into selftest_models/loras")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    args = parser.parse_args()
    check_files()
    recipes = [None, *(Recipe(triples=size, steps=args.steps) for size in args.triples)]
    arms = [[Job(r and replace(r, seed=i), i, args.videos, args.cfg) for i in range(args.loras)] for r in recipes]
    print("| model, references | videos | canvas gone | all there (95 %) | there | shape | ground | by run |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    figures: list[tuple[str, str, float]] = []
    drawn, first = [], None
    done = all_done(work, [job for arm in arms for job in arm], args.workers)
    for arm in arms:
        made = [next(done) for _ in arm]
        for count in range(1, MOST + 1):
            label = f"{arm[0].label}, {count}"
            line, values = row(label, [d.seen[count] for d in made])
            print(line, flush=True)
            figures.extend((label, name, value) for name, value in values.items())
        if arm[0].recipe is not None:
            first = first or made[0].pair
            print(f"(training of each pair: {', '.join(f'{d.seconds:.0f} s' for d in made)})", flush=True)
        drawn.append(made[0].drawn)
    if args.ship and first:
        ship(first)
    if args.picture:
        picture(list(zip(*drawn, strict=True)), args.picture)
    if args.record:
        sizes = " ".join(str(t) for t in args.triples)
        record.append(f"benchmarks.ffgo --videos {args.videos} --loras {args.loras} --triples {sizes}", figures)


def ship(pair: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write a pair beside the base they were trained on."""
    for expert, lora in pair.items():
        path = MODELS / LORAS[expert]
        path.parent.mkdir(exist_ok=True)
        comfy.utils.save_torch_file({name: t.to(torch.bfloat16).contiguous() for name, t in lora.items()}, str(path))


if __name__ == "__main__":
    main()
