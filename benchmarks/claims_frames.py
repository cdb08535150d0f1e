"""Frame preservation's two tables at small scale: what is remembered of single frames, and who comes back.

One base, the self-test's F1, and no weight of it learns. Stage 1 trains an encoder and a LoRA by frame queries; stage 2
begins from the encoder of that, with a new LoRA, on sections behind the history. Its rows are shown the start frame and
the memory and nothing else, on the video's own time axis, unless they say more.

Pictures are 64x64, which the base is trained for: a token of 4x4x2 stands for all of 2 latent frames, so that at this
rate the table is about what a token holds, and not about where it is. A token has 128 numbers and a block of latents
2048, where the paper's has 3072 for as many; so less can be kept.

A step of the default settings takes 0.2 to 0.6 s of one CPU core in stage 1 and 0.4 to 0.7 s in stage 2, and all rows
of a seed but the two with cross-attention some 8,300 s with what is measured. Processes may share a folder where they
fill different rows and the clips are there already.

Source: pfp reference 3, 4, 6 and 7.2 to 7.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import comfy.ops
import torch
from torch import Tensor

from frame_memory.forcing.preserving import draw_follow, draw_query, frame_query, next_section
from frame_memory.forcing.stages import LORA, MEMORY, PACK_NAME, Trained
from frame_memory.forcing.video_trainer import VideoSettings
from frame_memory.model.cross_attention import spec_of
from frame_memory.model.preservation import PreservationSpec
from frame_memory.model.preserved_history import PreservedHistory, initialise_all
from frame_memory.plan import PRESETS, plan_sections

from .claims_queries import CASES, histories, queried
from .claims_queries import MEASURES as QUERY_MEASURES
from .claims_rows import chosen, fresh, returns_in
from .claims_training import Claim, Measures, Workshop, read_weights, slug
from .claims_videos import GIVEN, LONG_MEASURES, Packed, Preserved, Sampling, measured, of_seconds
from .clips import ORDERS
from .long_clips import WORLD, codec_of
from .quality import FILES, MODELS

KIND = "F1"
FRAMEPACK = PRESETS[ORDERS[KIND]]
# The start frame alone, and the last 3 latent frames beside it.
ALONE, WINDOW = "f1k1_x_g9", "f1k1_x_f3k1_g9"
# A quarter of the paper's widths: the base's own is 128, and the paper's bases have 3072 and more.
CHANNELS, HEADS = (16, 32, 64, 128), 4
BASE, STAGE_1, STAGE_2 = range(3)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    rates: of its encoders; none for the base as it is. schedule: of stage 2, which clean frames are shown; "" for a row
    of stage 1. after: the row of the same seed that stage 2 goes on from, "" for a fresh encoder. frozen: the encoder
    of stage 2 stays as it is. cross: the network also reads the features before the projection, in both stages.
    """

    name: str
    rates: tuple[str, ...] = ("4x4x2",)
    branches: str = "both"
    schedule: str = ""
    after: str = ""
    frozen: bool = False
    cross: bool = False

    @property
    def leg(self) -> int:
        """The last of the legs of its training."""
        if not self.rates:
            return BASE
        return STAGE_2 if self.schedule else STAGE_1

    @property
    def untaught(self) -> bool:
        """Whether nothing of its encoder learns: it is frozen, or the base's own embedding."""
        return self.frozen or self.branches == "low"

    @property
    def parts(self) -> tuple[str, ...]:
        """What learns."""
        return (LORA,) if self.frozen else (MEMORY, LORA)


BRANCHES = {"large patchifier": "patchifier", "only LR": "low", "without LR": "high", "both": "both"}
QUERIES = (
    *(Row(f"{name}, {rate}", (rate,), kind) for rate in ("4x4x2", "2x2x2", "2x2x1") for name, kind in BRANCHES.items()),
    Row("both, 4x4x2 + 2x2x8", ("4x4x2", "2x2x8")),
    Row("both, 4x4x2, cross-attention", cross=True),
)
FOLLOWS = (
    Row("F1 without a memory", rates=(), schedule=FRAMEPACK),
    Row("memory", schedule=ALONE, after="both, 4x4x2"),
    Row("without stage 1", schedule=ALONE),
    Row("frozen encoder", schedule=ALONE, after="both, 4x4x2", frozen=True),
    Row("+ sliding window", schedule=WINDOW, after="both, 4x4x2"),
    Row("+ second encoder", ("4x4x2", "2x2x8"), schedule=ALONE, after="both, 4x4x2 + 2x2x8"),
    Row("+ FramePack's context", schedule=FRAMEPACK, after="both, 4x4x2"),
    Row("+ cross-attention", schedule=ALONE, after="both, 4x4x2, cross-attention", cross=True),
)


@dataclass(frozen=True)
class Budget:
    """How much is trained; plain numbers that are written beside each result.

    steps, next_steps: of the two stages. alone: share of them in which the encoder learns and the LoRA waits. batch:
    scenes a step. clips: scenes in all. rank: of the LoRAs. asked: clips of the longest history of stage 1. rate: of
    AdamW. sections: length of stage 2's videos. returns: share of its steps on a section in which the visitor comes
    back; it does so in one of seven.
    """

    steps: int = 600
    next_steps: int = 600
    alone: float = 1 / 3
    batch: int = 4
    clips: int = 800
    rank: int = 32
    asked: int = 8
    rate: float = 1e-3
    sections: int = 17
    returns: float = 0.6

    def until(self, leg: int) -> dict[str, float | str]:
        """What weights depend on that were trained up to a leg; so other settings of the rest leave them valid."""
        asking = ("steps", "alone", "batch", "clips", "rank", "asked", "rate")
        used = {STAGE_1: asking, BASE: ()}.get(leg, tuple(asdict(self)))
        base = hashlib.sha256((MODELS / "diffusion_models" / FILES[KIND]).read_bytes()).hexdigest()[:12]
        return {"world": WORLD, "base": base, **{name: getattr(self, name) for name in used}}


@dataclass
class FramesWorkshop(Workshop):
    """Where rows of the claim are trained and measured."""

    def figures(self, variant: Row, seed: int, cases: Sequence[str]) -> dict[str, dict[str, float]]:
        """Measures of the frames that are asked for, or of videos, by case. Raises OutOfTime."""
        codec, sampling = codec_of(self.folder), Sampling(self.sample_steps)
        follow = partial(
            measured, scenes=self.scenes, codec=codec, schedule=variant.schedule, cases=cases, sampling=sampling,
            seed=1000 + seed, device=self.device, alive=self.alive,
        )  # fmt: skip
        if variant.leg == BASE:
            return follow(partial(Packed, fresh(KIND).requires_grad_(False).to(self.device), None))
        trained = self.trained(variant, seed)
        with trained.ready(), torch.no_grad():
            if variant.leg == STAGE_2:
                return follow(partial(Preserved, trained.forced))
            video = histories(self.scenes, codec).to(self.device)
            return queried(trained.forced, video, codec, cases, sampling, seed, self.alive)

    def trained(self, row: Row, seed: int) -> Trained:
        """A row's network with what it has learned, trained here where that is not done yet. Raises OutOfTime."""
        path, identity = self.folder / f"{slug(row.name)}-s{seed}.safetensors", self.identity(row)
        made = self._fresh(row, seed)
        if not path.exists():
            if row.after:
                _load(made, self._weights(FramePreservationClaim.variants[row.after], seed), PACK_NAME)
            steps = self.budget.steps if row.leg == STAGE_1 else self.budget.next_steps
            settings = VideoSettings(rate=self.budget.rate, warmup=20, betas=(0.9, 0.99), average=0.99, seed=seed + 1)

            def tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
                return {**{PACK_NAME + n: v for n, v in made.memory(weights).items()}, **weights}

            losses, alone = self._losses(made, row), 0 if row.untaught else int(steps * self.budget.alone)

            def losses_at(step: int):
                made.hold_lora(step < alone)
                return losses

            self.train(path.stem, made, losses_at, settings, steps, identity, tensors)
        _load(made, read_weights(path, identity))
        return made

    def identity(self, row: Row) -> dict:
        """What a row's weights depend on."""
        return {"variant": row.name, **self.budget.until(row.leg)}

    def _weights(self, row: Row, seed: int) -> dict[str, Tensor]:
        self.trained(row, seed)
        return read_weights(self.folder / f"{slug(row.name)}-s{seed}.safetensors", self.identity(row))

    def _fresh(self, row: Row, seed: int) -> Trained:
        network = fresh(KIND).requires_grad_(False).to(self.device)
        embedding = network.img_in.proj
        options = {"branches": row.branches, "channels": CHANNELS, "heads": HEADS, "cross_attention": row.cross}
        specs = [PreservationSpec.of(embedding, 16, rate=rate, **options) for rate in row.rates]
        cross = spec_of(network, CHANNELS[-1]) if row.cross else None
        history = PreservedHistory(specs, torch.float32, self.device, comfy.ops.disable_weight_init, cross)
        initialise_all(history, embedding.weight, embedding.bias, seed)
        return Trained(network, history, row.parts, rank=self.budget.rank, seed=seed, device=self.device)

    def _losses(self, trained: Trained, row: Row):
        budget, clips = self.budget, self.clips
        sections = plan_sections(FRAMEPACK, sections=budget.sections).sections
        due = [section for section in returns_in(sections) if section.index]

        def losses(generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
            index = torch.randint(len(clips.captions), (budget.batch,), generator=generator).sort().values.numpy()
            video = clips.video(index, 1 + 9 * budget.sections).to(self.device)
            if row.leg == STAGE_1:
                # Histories of all lengths, but with one whole block at least.
                count = 1 + int(torch.randint(budget.asked, (), generator=generator))
                made = frame_query(trained.forced, video, draw_query(video, count, trained.pack.rates, generator))
            else:
                draw = draw_follow(video, budget.sections, generator)
                draw = replace(draw, clip=chosen(sections[1:], due, budget.returns, generator).index)
                made = next_section(trained.forced, video, draw, row.schedule)
            for clip in made:
                yield clip.loss, 1.0

        return losses


def _load(trained: Trained, weights: Mapping[str, Tensor], begin: str = "") -> None:
    """Put in weights whose names begin so."""
    own = trained.parameters | {PACK_NAME + n: p for n, p in trained.pack.named_parameters()}
    with torch.no_grad():
        for name, parameter in own.items():
            if name.startswith(begin):
                parameter.copy_(weights[name])


class FramePreservationClaim(Claim):
    """Frame preservation: frames asked of the memory, and content of videos made behind it."""

    folder = Path("training/claims-frame-preservation")
    variants = {row.name: row for row in (*QUERIES, *FOLLOWS)}
    tables = {
        "1. Frames asked of the memory, after stage 1": tuple(row.name for row in QUERIES),
        "2. Content of videos made section by section": tuple(row.name for row in FOLLOWS),
    }
    budget, workshop = Budget, FramesWorkshop
    settings = {"steps": "stage 1, frame queries", "next_steps": "stage 2, next sections"}
    seconds = (20.0,)

    def toy(self, budget: Budget) -> Budget:
        """The smallest budget that runs everything, for a test."""
        return replace(budget, steps=1, next_steps=1, batch=1, clips=2, asked=2, sections=2)

    def measures(self, variant: Row) -> Measures:
        """Those of single frames, or of long videos."""
        return LONG_MEASURES if variant.schedule else QUERY_MEASURES

    def cases(self, variant: Row, seconds: Sequence[float]) -> dict[str, str]:
        """How frames are asked for, or videos of so many seconds."""
        return of_seconds(seconds) if variant.schedule else CASES

    def identity(self, variant: Row, budget: Budget, scenes: int, sample_steps: int) -> dict:
        """The settings that a row depends on."""
        given = {"given": GIVEN} if variant.schedule else {}
        return {**budget.until(variant.leg), "scenes": scenes, "sample_steps": sample_steps, **given}
