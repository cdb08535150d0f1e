"""What stands around the network in a section's time:
`python scripts/run.py -m benchmarks.section_overhead [--record]`.

length  Sections 1 to 200 through the sampler, its project and its live video: the tiny network that ships at a small
        picture, then latents of 832x480 with a stand-in for the network. Seconds of the processor around the network
        in each section, on the sampler's thread and beside it (encoding, measures, joining). What else the machine
        does slows the network of the same sections alike, and is taken out by that. A section ends when nothing goes on
        beside it any more, as it would long before the end of a real one. The video of 832x480 is left out here: on a
        CPU its encoder takes the caches from the tensors that are measured. Walks are repeated, and the median of each
        section counts. Through these goes the line of Theil and Sen (the median of the slopes between all pairs
        of sections, which outliers do not move) with its 95 % interval (Sen 1968, by Kendall's tau). Bound: from
        section 2 to 200 nothing grows on the sampler's thread, which is to say that the interval holds zero, or else by
        no more than 0.02 % of the fastest section below; which of the two is said. RAM grows less than 64 MB. Drawn
        into assets/section_overhead.png.
share   The same around one section of 832x480 of the 13 B model. What a CPU does is measured here, with the video
        written beside the sampling; the sampler's steps on latents, which a GPU does there, are told and not counted
        (25 times some 30 passes over 11 MB are 8 ms of a 4090's memory). What else a GPU does is counted on the meta
        device (packing, a memory's update, the decode with HunyuanVideo's VAE) and divided by half of the GPU's bf16
        peak, which is an assumption. A step's seconds are those of reference/performance.md section 2: nothing here was
        measured on a GPU. Bound: 5 %, which the decode alone is predicted to break: its operations are those of one of
        the 25 steps.

The autoencoder's network is a stand-in in what is measured. Exits with 1 if a bound fails.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from comfy.cli_args import args as host_args

host_args.use_pytorch_cross_attention = True  # the host's choice on a GPU; its choice on a CPU looks at free memory

import comfy.ops
import comfy.samplers
import numpy as np
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from torch import nn

from frame_memory.model.context import gather_context
from frame_memory.model.preservation import PreservationEncoder, PreservationSpec
from frame_memory.model.selftest import SelfTestText
from frame_memory.plan import PRESETS, parse_schedule, plan_sections, sigma_schedule
from frame_memory.sampling.long_video import Live, sample_long_video
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.unipc import sample_framepack_unipc
from frame_memory.video.plots import Curve, Panel, save_panels

from . import record
from .memory import FPS, SECTION_FRAMES, in_child, painted, resident, scratch
from .memory_cost import GPU_HIDDEN, Row, drawn, operations, pack_of, read_history, table
from .quality import SHIFT, load
from .stage_two import HEIGHT, TEXT, VISION, VISION_FEATURES, WIDTH, network

PICTURE = record.RESULTS.parent.parent / "assets" / "section_overhead.png"
SECTIONS, FEW, STEPS = 200, 5, 25
# From section 2 to the last: of the fastest section's seconds, and MB.
GROWTH_SHARE, MEMORY_BOUND = 2e-4, 64.0
SHARE = 0.05
HALF = 0.5  # of the peak: what is assumed of a GPU's convolutions and small matrices
NORMAL = 1.96
SIDES = {"on the sampler's thread": ("between", "steps"), "beside it": ("beside",)}
# Else glibc gives a latent's 4 MB back to the system at times, and clearing them anew doubles the steps on a CPU.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
QUIET = 1e-3  # seconds of the processor in 0.02 by the clock that are no work
NEAR = 5  # sections before and after one that tell how busy the machine was
# HunyuanVideo's autoencoder, as core reads it from its file.
AUTOENCODER = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "conv3d": True,
    "time_compress": 4,
}  # fmt: skip
WINDOW = 18  # latent frames that are decoded for each section


@dataclass(frozen=True)
class Card:
    """A GPU and a way of running the 13 B model: seconds of a step, and its dense bf16 peak in 1e12 a second."""

    name: str
    step: float
    peak: float


CACHED = 2.25  # times as fast with step caching, as published
CARDS = (
    Card("RTX 4090, bf16", 3.32, 165.2),
    Card("RTX 4090, fp8", 1.41, 165.2),
    Card("RTX 4090, fp8, cached", 1.41 / CACHED, 165.2),
    Card("H200, bf16", 0.78, 989.0),
    Card("H200, fp8", 0.49, 989.0),
    Card("H200, fp8, cached", 0.49 / CACHED, 989.0),
)
ALLOWED = GROWTH_SHARE * STEPS * min(card.step for card in CARDS)  # seconds


@dataclass(frozen=True)
class Walk:
    """A run that is measured. size: latent pixels. light: with a stand-in for the network. repeats: of the walk."""

    title: str
    size: tuple[int, int]
    sections: int
    steps: int
    light: bool
    live: bool
    repeats: int = 1


WALKS = {
    "small": Walk("32x32 with the tiny network, its video written", (4, 4), SECTIONS, 2, False, True, 3),
    "large": Walk("832x480 with a stand-in network", (HEIGHT, WIDTH), SECTIONS, 2, True, False, 3),
    "share": Walk("832x480, 25 steps, its video written", (HEIGHT, WIDTH), FEW, STEPS, True, True),
}


class Light(nn.Module):
    """Stands for the network: a real module with one number, which the sampler calls as it calls the other.

    Its work is the same at each call, and enough to tell how fast the machine is meanwhile. Not passes over memory:
    what the C library gives back and asks for anew changes in a process's first seconds.
    """

    def __init__(self, other: nn.Module):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.5), requires_grad=False)
        self.work = torch.full((512, 512), 1 / 512)
        self.dtype, self.params, self.patch_size = other.dtype, other.params, other.patch_size
        self.clean_x_embedder = None  # by which FramePack's networks are known

    def pack_once(self, *_, **__):
        """Nothing."""
        return ()

    def forward(self, x_BCTHW, *_, **__):
        """Half of what comes."""
        for _ in range(8):
            self.work = self.work @ self.work
        return self.scale * x_BCTHW


class Clock:
    """Seconds of the processor by section, on the sampler's thread and on others."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(("network", "left out", "sampling"), 0.0)
        self.marks: list[tuple[float, ...]] = []
        self.memory: list[float] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what is done inside."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.spent[name] += time.thread_time() - began

    def around(self, name: str, function: Callable) -> Callable:
        """A function whose calls are counted."""

        def counted(*arguments, **options):
            with self.of(name):
                return function(*arguments, **options)

        return counted

    def mark(self) -> None:
        """A section begins to be sampled."""
        here = time.thread_time()
        network, left_out, sampling = self.spent.values()
        self.marks.append((network, sampling - network, here - sampling - left_out, time.process_time() - here))
        self.memory.append(resident())

    def told(self) -> dict[str, list[float]]:
        """By section, from one beginning to the next: in the network, in the sampler's steps around it, between the
        samplings without the stand-in of the autoencoder, and on other threads."""
        parts = np.diff(np.array(self.marks), axis=0).T.tolist()
        return dict(zip(("network", "steps", "between", "beside"), parts, strict=True)) | {"memory": self.memory[1:]}


@torch.inference_mode()
def walk(asked: Walk, folder: Path) -> dict[str, list[float]]:
    """Make a video through the sampler; what the clock told."""
    torch.set_num_threads(1)  # so that threads beside the sampler's are not its own matrices
    model, vae = load("F1")
    watched, clock = model.model.diffusion_model, Clock()
    if asked.light:
        model, watched = model.clone(), Light(watched)
        model.add_object_patch("diffusion_model", watched)
    watched.forward = clock.around("network", watched.forward)
    watched.pack_once = clock.around("network", watched.pack_once)
    vae = copy.copy(vae)
    vae.decode = clock.around("left out", painted)
    text = SelfTestText()
    prompt = text.encode_from_tokens_scheduled(text.tokenize("a red square"))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt, prompt)

    class Marked(comfy.samplers.KSAMPLER):
        """Is asked for once a section."""

        def sample(self, *arguments, **options):
            clock.mark()
            with clock.of("sampling"):
                made = super().sample(*arguments, **options)
            with clock.of("left out"):
                settle()
            return made

    start = torch.randn(1, 16, 1, *asked.size, generator=torch.Generator().manual_seed(0))
    sample_long_video(
        noise=Noise_RandomNoise(0), guider=guider, sampler=Marked(sample_framepack_unipc),
        sigmas=torch.tensor(sigma_schedule(asked.steps, SHIFT)), schedule=parse_schedule(PRESETS["F1 forward"]),
        start={"samples": start, "frame_memory": {"base": "selftest"}}, say=lambda _: None,
        seconds=(asked.sections + 1) * SECTION_FRAMES / FPS, project=ProjectRequest(folder, "overhead"),
        live=Live(vae) if asked.live else None,
    )  # fmt: skip
    return clock.told()


def settle() -> None:
    """Until nothing goes on beside, which would be so long before the end of a section that takes 5 s and more."""
    quiet = 0
    while quiet < 3:
        began = time.process_time()
        time.sleep(0.02)
        quiet = quiet + 1 if time.process_time() - began < QUIET else 0


def at_one_pace(told: dict[str, list[float]], *names: str) -> list[float]:
    """Seconds by section as if the machine had been equally busy in all: the network takes the same in each."""
    network = np.asarray(told["network"])
    near = [np.median(network[max(i - NEAR, 0) : i + NEAR + 1]) for i in range(len(network))]
    return (np.sum([told[name] for name in names], axis=0) * np.median(network) / near).tolist()


def medians(runs: list[dict[str, list[float]]], *names: str) -> list[float]:
    """Seconds by section at one pace, of each the median of its walks."""
    return np.median([at_one_pace(told, *names) for told in runs], axis=0).tolist()


def line_through(values: list[float]) -> tuple[float, float, float]:
    """(what the line of Theil and Sen through all but the first grows by from the second to the last, and the ends of
    its 95 % interval)."""
    y = np.asarray(values[1:])
    count = len(y)
    i, j = np.triu_indices(count, 1)
    slopes = np.sort((y[j] - y[i]) / (j - i)) * (count - 1)
    spread = NORMAL * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low, high = round((len(slopes) - spread) / 2), round((len(slopes) + spread) / 2)
    return float(np.median(slopes)), float(slopes[max(low - 1, 0)]), float(slopes[min(high, len(slopes) - 1)])


def length_rows(asked: Walk, runs: list[dict[str, list[float]]]) -> list[Row]:
    """Figures and bounds of one length."""
    case, rows = f"{asked.sections} sections, {asked.title}", []
    for words, names in SIDES.items():
        values = medians(runs, *names)
        grown, low, high = line_through(values)
        bound = (-math.inf, max(grown - low, ALLOWED)) if names != ("beside",) else None
        rows.append((case, f"seconds a section {words}, median", float(np.median(values[1:])), None))
        rows.append((case, f"growth {words}, seconds, section 2 to {asked.sections}", grown, bound))
        rows.append((case, f"lower end of its 95 % interval {words}", low, None))
        rows.append((case, f"upper end of its 95 % interval {words}", high, None))
    grown, *_ = line_through(np.median([told["memory"] for told in runs], axis=0).tolist())
    return [*rows, (case, f"growth of RAM, MB, section 2 to {asked.sections}", grown, (-math.inf, MEMORY_BOUND))]


def verdict(asked: Walk, runs: list[dict[str, list[float]]]) -> str:
    """Which of the two bounds the sampler's thread keeps, in words."""
    words, names = next(iter(SIDES.items()))
    grown, low, high = (1e3 * value for value in line_through(medians(runs, *names)))
    told = f"{asked.title}, {words}: {grown:.2f} ms (95 % interval {low:.2f} to {high:.2f}) from section 2 to the last"
    allowed = f"{GROWTH_SHARE:.2%} of the fastest section, {1e3 * ALLOWED:.2f} ms"
    if low <= 0:
        return f"{told}, no growth: the interval holds zero."
    return f"{told}, {'a growth of no more than' if grown <= 1e3 * ALLOWED else 'a growth of MORE than'} {allowed}."


def counted() -> dict[str, float]:
    """Operations of what a GPU does once a section around the network at 832x480, 1e12."""
    size = (HEIGHT, WIDTH)
    pack = pack_of(GPU_HIDDEN, "meta")
    one, two = (operations(partial(read_history, pack, n * SECTION_FRAMES / FPS, "meta", size)) for n in (1, 2))
    plain = {"dtype": torch.bfloat16, "device": "meta", "operations": comfy.ops.disable_weight_init}
    encoder = PreservationEncoder(PreservationSpec(hidden=GPU_HIDDEN), **plain)
    with torch.device("meta"):
        autoencoder = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=16).to(torch.bfloat16)
    frames = partial(drawn, "meta", 1, 16)
    made = {
        "packing": _packing(size),
        "MemoryPack's update": two - one,
        "frame preservation": operations(lambda: encoder(frames(8, *size), None)),
        "decode": operations(lambda: autoencoder.decode(frames(WINDOW, *size))),
    }
    return {name: work / 1e12 for name, work in made.items()}


def _packing(size: tuple[int, int]) -> float:
    """What is computed before the first step of a section."""
    model, section = network(), plan_sections(PRESETS["F1 forward"], sections=2).sections[1]
    latents = drawn("meta", 1, 16, section.stop, *size)
    text, vision = drawn("meta", 1, TEXT, model.params.context_in_dim), drawn("meta", 1, VISION, VISION_FEATURES)
    context = gather_context(section, latents, latents[:, :, :1], None, 0.0)
    window = latents[:, :, section.start : section.stop]
    given = {"clip_fea": vision, "context_latents": context.latents, "context_layout": context.layout}
    return operations(lambda: model.pack(window, text, **given))


def share_rows(told: dict[str, list[float]], work: dict[str, float]) -> list[Row]:
    """Shares of a section's time, by GPU."""
    rows: list[Row] = [("832x480, once a section", f"operations of {k}, 1e12", v, None) for k, v in work.items()]
    # Without the first section, which is shown no history, and the last, after which the whole is joined.
    between, steps, beside = (float(np.median(told[name][1:])) for name in ("between", "steps", "beside"))
    rows += [("832x480, here", "processor seconds a section between the samplings", between, None)]
    rows += [("832x480, here", "processor seconds of the sampler's steps on a CPU", steps, None)]
    rows += [("832x480, here", "processor seconds a section beside the sampling", beside, None)]
    for card in CARDS:
        section = STEPS * card.step
        parts = {name: one / (HALF * card.peak) / section for name, one in work.items()}
        parts["loop, journal, report, measured here"] = between / section
        decode = parts.pop("decode")
        memory = max(parts.pop("MemoryPack's update"), parts.pop("frame preservation"))
        total = sum(parts.values()) + memory
        case = f"{card.name}, {section:.3g} s a section, predicted"
        rows += [(case, f"share of {name}", part, None) for name, part in (*parts.items(), ("a memory", memory))]
        rows.append((case, "share of all this", total, (0.0, SHARE)))
        rows.append((case, "share of the decode, which needs the same GPU", decode, None))
        rows.append((case, "share with the decode", total + decode, (0.0, SHARE)))
        rows.append((case, "share that goes on beside the sampling", beside / section, (0.0, 1.0)))
    return rows


def picture(told: dict[str, list[dict[str, list[float]]]]) -> None:
    """Both lengths as a PNG."""
    panels = []
    for name in told:
        curves, legend, asked = [], [], WALKS[name]
        for colour, (words, parts) in zip(("blue", "green"), SIDES.items()):
            if asked.live or parts != ("beside",):
                milliseconds = [1e3 * value for value in medians(told[name], *parts)[1:]]
                curves.append(Curve(words, list(range(2, len(milliseconds) + 2)), milliseconds, ""))
                legend.append(f"{colour}: {words}, median {np.median(milliseconds):.0f} ms")
        top = 1.3 * max(float(np.quantile(curve.y, 0.99)) for curve in curves)
        curves = [Curve(c.name, c.x, [min(y, top) for y in c.y], c.note) for c in curves]
        title, below = f"Around the network: {asked.title}", f"section ({'; '.join(legend)})"
        panels.append(Panel(title, below, "processor ms a section", curves, (), top))
    save_panels(PICTURE, panels)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where projects are written and removed again; up to 2 GB")
    parser.add_argument("--kept", help="a folder that keeps what was measured, so that an interrupted run goes on")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results.csv and draw the picture")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    args = parse(arguments)
    if args.child:
        logging.getLogger("frame_memory").setLevel(logging.ERROR)  # guards see squares, and say so
        with scratch(args.folder) as folder:
            told = walk(WALKS[args.child.partition("-")[0]], folder)
        Path(args.result).write_text(json.dumps(told), encoding="utf-8")
        return 0
    where = ["--folder", args.folder] if args.folder else []
    told = {
        name: [
            in_child(f"{name}-{number}", args.kept, *where, module="benchmarks.section_overhead", variables=HEAP)
            for number in range(asked.repeats)
        ]
        for name, asked in WALKS.items()
    }
    lengths = [name for name, asked in WALKS.items() if asked.sections > FEW]
    rows = [row for name in lengths for row in length_rows(WALKS[name], told[name])]
    rows += share_rows(told["share"][0], counted())
    lines, good = table(rows)
    print("\n".join([*lines, *(verdict(WALKS[name], told[name]) for name in lengths)]))
    if args.record:
        record.append("benchmarks.section_overhead", [row[:3] for row in rows])
        picture({name: told[name] for name in lengths})
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
