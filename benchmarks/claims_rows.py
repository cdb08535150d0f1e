"""The variants of the paper's three tables, trained at small scale: one row a variant and seed, each cached on disk.

One base of each kind is trained first, from the self-test models; all rows begin from it, and are trained on the same
videos. The base F1 of the default settings ships as the self-test's F1, rounded to bf16, and is not trained again. In
stage 1 either the network learns or a memory before the frozen network, by as many steps. Both at once was tried: a
memory that says nothing yet is a disturbance, and the network first learns to look away from it.
Source: reference/memorypack.md sections 3.2, 3.3 and 6.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from frame_memory.forcing.draws import DIRECT, LOGIT_NORMAL, STUDENT, TEACHER, UNIFORM, Recipe, clips_at, draw_video
from frame_memory.forcing.flow import flow_loss, shifted_sigmas
from frame_memory.forcing.forcings import LOSSES
from frame_memory.forcing.stages import ALL, HEAD_PART, MEMORY, Trained
from frame_memory.forcing.video_trainer import MUON, VideoSettings
from frame_memory.model import checkpoint, framepack, tensor_file
from frame_memory.model.context import gather_context
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise, open_gate
from frame_memory.model.stored_weights import unpacked
from frame_memory.plan import PRESETS, Section, plan_sections

from .claims_training import Claim, Measures, Workshop, read_weights, slug
from .claims_videos import GIVEN, LONG_MEASURES, Packed, Sampling, measured, of_seconds
from .clips import ORDERS, ClipSet
from .long_clips import WORLD, LongClips, codec_of
from .long_world import LongScene, away, visit
from .quality import AUTOENCODER, FILES, MODELS
from .train_selftest import SectionLoss, build, picture_encoder

SHIFT = 6.0  # of the base's noise levels, as the self-test models were trained
# How the self-test models themselves were finished: noise on the history, and own estimates in it.
DISTURB, OWN = 0.1, 0.25
MODEL, PACK = "model.", "pack."
ANEW = "For one that is trained as that was: the order of commands in benchmarks/ship_selftest.py."
# Of the metadata of a shipped file that is such a base: its settings.
TRAINING = "frame_memory.training"


BASE, STAGE_1, STAGE_2 = range(3)  # the legs of a training: the base, then a memory (or the base again), then the head


@dataclass(frozen=True)
class Variant:
    """A row of the paper's tables, or what a row goes on from.

    kind: F0 or F1. forcing: "" for a row that trains nothing. parts: what learns (frame_memory/forcing/stages.py).
    memory: options of its PackSpec, None without a memory. after: the variant of the same seed that it goes on from, ""
    for the base.
    """

    name: str
    kind: str = "F1"
    forcing: str = ""
    parts: tuple[str, ...] = ()
    memory: Mapping | None = None
    after: str = ""

    @property
    def leg(self) -> int:
        """The last of the legs of its training."""
        if not self.forcing:
            return BASE
        return STAGE_2 if self.parts == (HEAD_PART,) else STAGE_1


def _with_memory(name: str, **options) -> Variant:
    return Variant(name, forcing=TEACHER, parts=(MEMORY,), memory=options)


VARIANTS = {
    v.name: v
    for v in (
        Variant("F0", kind="F0"),
        Variant("F1"),
        Variant("F1 tuned", forcing=TEACHER, parts=(ALL,)),
        _with_memory("MemoryPack"),
        _with_memory("zero-psi", zero_psi=True),
        Variant("student forcing", forcing=STUDENT, parts=(HEAD_PART,), memory={}, after="MemoryPack"),
        Variant("Direct Forcing (all)", forcing=DIRECT, parts=(HEAD_PART,), memory={}, after="MemoryPack"),
        _with_memory("Squeeze B", squeeze="B"),
        _with_memory("Squeeze C", squeeze="C"),
    )
}
# What the paper's tables 1, 2 and 3 compare. Squeeze A is MemoryPack itself.
TABLES = {
    "1. FramePack and ours": ("F0", "F1", "Direct Forcing (all)"),
    "2. Ablation, trained on the same videos": (
        "F1 tuned", "MemoryPack", "zero-psi", "student forcing", "Direct Forcing (all)"
    ),
    "3. Squeeze": ("MemoryPack", "Squeeze B", "Squeeze C"),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much is trained; plain numbers that are written beside each result.

    base_steps, steps, head_steps: of the three legs. short_from, short: from this share of the base's steps on, this
    share of them is on the self-test models' own videos, which they would forget otherwise. batch: scenes a step.
    clips: scenes in all. sections: length of the training videos. returns: share of the steps, but for the head's, on
    a section in which the visitor comes back; it does so in one of seven. counted: clips of a video whose loss counts
    in one step of stage 1. unroll: clips that gradients reach back through psi. most: clips of a video at the end of
    stage 2's curriculum. rate: of AdamW; matrix_rate: of Muon.
    """

    base_steps: int = 5000
    steps: int = 1000
    head_steps: int = 100
    short_from: float = 0.5
    short: float = 0.5
    batch: int = 8
    clips: int = 800
    sections: int = 40
    returns: float = 0.6
    rate: float = 4e-4
    matrix_rate: float = 1.5e-3
    counted: int = 1
    unroll: int = 6
    most: int = 16
    head_rate: float = 1e-3

    def until(self, leg: int) -> dict[str, float | str]:
        """What weights depend on that were trained up to a leg; so other settings of the rest leave them valid."""
        later = [name for number in range(leg + 1, STAGE_2 + 1) for name in FIRST_USED[number]]
        return {"world": WORLD, **{name: value for name, value in asdict(self).items() if name not in later}}

    def steps_of(self, leg: int) -> int:
        """Steps of a leg."""
        return (self.base_steps, self.steps, self.head_steps)[leg]


# Settings by the first leg that uses them; all others are the base's.
FIRST_USED = {
    STAGE_1: ("steps", "counted", "unroll"),
    STAGE_2: ("head_steps", "most", "head_rate"),
}


@dataclass
class MemoryPackWorkshop(Workshop):
    """Where rows of the claim are trained."""

    def figures(self, variant: Variant, seed: int, cases: Sequence[str]) -> dict[str, dict[str, float]]:
        """Measures of a row's videos, by their seconds. Raises OutOfTime."""
        network, pack = self.network(variant, seed)
        return measured(
            partial(Packed, network, pack), self.scenes, codec_of(self.folder), PRESETS[ORDERS[variant.kind]], cases,
            Sampling(self.sample_steps), 1000 + seed, self.device, self.alive,
        )  # fmt: skip

    def base(self, kind: str) -> dict[str, Tensor]:
        """The weights of the shared base: those that ship where they are this base, else trained here, once."""
        path = self.folder / f"base-{kind}.safetensors"
        identity = {"base": kind, **self.budget.until(BASE)}
        if not path.exists():
            if shipped_training(kind) == identity:
                return {MODEL + name: value for name, value in fresh(kind).state_dict().items()}
            if shipped_training(kind) is not None:
                self.say(f"{path.stem} begins from the shipped {kind}, which is such a base already. {ANEW}")
            network = fresh(kind)
            trained = Trained(network.to(self.device), None, (ALL,), device=self.device)
            short = ClipSet.make(self.folder, codec_of(self.folder), self.budget.clips, seed=1)
            losses = base_losses(trained, self.clips, short, kind, self.budget, self.device)
            self._train(f"base-{kind}", trained, losses, self.budget.base_steps, identity, seed=0)
        return read_weights(path, identity)

    def network(self, variant: Variant, seed: int) -> tuple[nn.Module, SemanticPack | None]:
        """A variant's network and memory, trained here where they are not yet. Raises OutOfTime."""
        if variant.leg == BASE:
            return self._assembled(variant, self.base(variant.kind))
        path = self.folder / f"{slug(variant.name)}-s{seed}.safetensors"
        before = VARIANTS[variant.after] if variant.after else None
        identity = {"variant": variant.name, **self.budget.until(variant.leg)}
        if not path.exists():
            network, pack = self.network(before, seed) if before else self._assembled(variant, self.base(variant.kind))
            trained = Trained(network, pack, variant.parts, device=self.device)
            steps = self.budget.steps_of(variant.leg)
            losses = forcing_losses(trained, self.clips, variant, self.budget, steps, self.device)
            self._train(path.stem, trained, losses, steps, identity, seed=seed + 1)
        return self._assembled(variant, read_weights(path, identity))

    def _assembled(self, variant: Variant, weights: Mapping[str, Tensor]) -> tuple[nn.Module, SemanticPack | None]:
        network = build().requires_grad_(False)
        network.load_state_dict({k.removeprefix(MODEL): v for k, v in weights.items() if k.startswith(MODEL)})
        network = network.to(self.device).eval()
        if variant.memory is None:
            return network, None
        pack = SemanticPack(PackSpec.of(network, **variant.memory), dtype=torch.float32, operations=torch.nn)
        held = {k.removeprefix(PACK): v for k, v in weights.items() if k.startswith(PACK)}
        if held:
            pack.load_state_dict(held)
        else:
            open_gate(initialise(pack, network))
        return network, pack.requires_grad_(False).to(self.device)

    def _train(self, name: str, trained: Trained, losses_at, steps: int, identity: Mapping, seed: int) -> None:
        head = trained.parts == (HEAD_PART,)
        settings = VideoSettings(
            rate=self.budget.head_rate if head else self.budget.rate, matrix_rate=self.budget.matrix_rate, warmup=20,
            average=0.995, seed=seed, optimiser=MUON,
        )  # fmt: skip

        def tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
            network = {MODEL + n: p for n, p in trained.model.named_parameters()}
            pack = {PACK + n: p for n, p in trained.memory(weights).items()}
            return {**network, **{n: v for n, v in weights.items() if n.startswith(MODEL)}, **pack}

        self.train(name, trained, losses_at, settings, steps, identity, tensors)


def shipped_training(kind: str) -> dict | None:
    """The settings by which the shipped weights of a kind were trained here; None where they were not."""
    said = tensor_file.read_header(str(MODELS / "diffusion_models" / FILES[kind]))[1].get(TRAINING)
    return None if said is None else json.loads(said)


def fresh(kind: str) -> nn.Module:
    """The self-test network with the shipped weights of a kind, in fp32."""
    framepack.register()
    shipped = checkpoint.load_framepack(str(MODELS / "diffusion_models" / FILES[kind])).model.diffusion_model
    network = build()
    network.load_state_dict(
        {
            name: unpacked(shipped.get_submodule(name.rpartition(".")[0]), value)
            for name, value in shipped.named_parameters()
        }
    )
    return network


def base_losses(trained: Trained, clips: LongClips, short: ClipSet, kind: str, budget: Budget, device: str):
    """By the number of a step: flow matching on one random section of a random plan, as FramePack is trained."""
    encode = picture_encoder(MODELS / "vae" / AUTOENCODER)
    more = {"disturb": DISTURB, "own": OWN, "encode": encode, "device": device}
    own_world = SectionLoss(trained, {kind: short}, budget.batch, **more)

    def mixed(generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
        if float(torch.rand((), generator=generator)) < budget.short:
            yield own_world(generator), 1.0
        else:
            yield from losses(generator)

    def losses(generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
        count = int(torch.randint(1, budget.sections + 1, (), generator=generator))
        plan = plan_sections(PRESETS[ORDERS[kind]], sections=count)
        section = chosen(plan.sections, returns_in(plan.sections), budget.returns, generator)
        index = torch.randint(len(clips.captions), (budget.batch,), generator=generator).sort().values.numpy()
        video = clips.video(index, plan.total_frames).to(device)
        context = gather_context(section, video.latents, video.latents[:, :, :1], None, 0.0)
        x = video.latents[:, :, section.start : section.stop]
        noise = torch.randn(x.shape, generator=generator).to(device)
        sigma = shifted_sigmas(budget.batch, SHIFT, generator).to(device)
        yield flow_loss(trained, x, noise, sigma, video.cond, context, trained.forced.options)[0], 1.0

    return lambda step: losses if step < budget.short_from * budget.base_steps else mixed


def forcing_losses(trained: Trained, clips: LongClips, variant: Variant, budget: Budget, steps: int, device: str):
    """By the number of a step: its losses. Stage 1 begins anywhere in a video, stage 2 at its start, clip by clip."""
    head = variant.leg == STAGE_2
    recipe = Recipe(
        forcing=variant.forcing, sampling=LOGIT_NORMAL if head else UNIFORM, shift=0.0 if head else SHIFT,
        unroll=budget.unroll, random_start=not head, drop_memory=0.0 if head else 0.1, rollout_shift=4.0,
    )  # fmt: skip

    every = plan_sections(PRESETS[ORDERS[variant.kind]], sections=budget.sections).sections
    due = returns_in(every)

    def at(step: int):
        count = clips_at(step, steps, budget.most) if head else budget.counted
        sections = max(count, 1) if head else budget.sections

        def losses(generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
            index = torch.randint(len(clips.captions), (budget.batch,), generator=generator).sort().values.numpy()
            video = clips.video(index, 1 + 9 * sections).to(device)
            draw = draw_video(video, count, recipe, generator)
            if not head:
                draw = replace(draw, first=chosen(every[: sections + 1 - count], due, budget.returns, generator).index)
            for clip in LOSSES[recipe.forcing](trained.forced, video, draw, recipe):
                yield clip.loss, 1 / draw.count

        return losses

    return at


def returns_in(sections: Sequence[Section]) -> list[Section]:
    """Sections that begin with the visitor away and end with it in the picture, after an earlier visit."""
    scene, due = LongScene(), []
    for section in sections:
        ends = np.array([4 * section.start - 4, 4 * section.stop - 4])
        gone = away(scene, ends)
        if gone[0] and not gone[1] and visit(scene, ends)[1]:
            due.append(section)
    return due


def chosen(sections: Sequence[Section], due: Sequence[Section], share: float, generator: torch.Generator) -> Section:
    """One of the sections by chance; in `share` of the cases one of those that are due, where there are any."""
    among = due if due and float(torch.rand((), generator=generator)) < share else sections
    return among[int(torch.randint(len(among), (), generator=generator))]


class MemoryPackClaim(Claim):
    """The paper's tables."""

    folder = Path("training/claims")
    variants, tables, budget, workshop = VARIANTS, TABLES, Budget, MemoryPackWorkshop
    settings = {
        "base_steps": "each base", "steps": "stage 1: of a memory, or of the network", "head_steps": "stage 2",
    }  # fmt: skip
    seconds = (10.0, 30.0, 60.0)

    def toy(self, budget: Budget) -> Budget:
        """The smallest budget that runs everything, for a test."""
        return replace(budget, base_steps=1, steps=1, head_steps=1, batch=1, clips=2, sections=2, most=2, unroll=1)

    def measures(self, variant: Variant) -> Measures:
        """Those of long videos."""
        return LONG_MEASURES

    def cases(self, variant: Variant, seconds: Sequence[float]) -> dict[str, str]:
        """Videos of so many seconds."""
        return of_seconds(seconds)

    def identity(self, variant: Variant, budget: Budget, scenes: int, sample_steps: int) -> dict:
        """The settings that a row depends on."""
        return {**budget.until(variant.leg), "scenes": scenes, "given": GIVEN, "sample_steps": sample_steps}
