"""Does memory stay flat? 200 sections, and the decode of ten minutes: `python scripts/run.py -m benchmarks.memory`.

Two processes, so that neither sees what the other held. The first samples sections with the shipped self-test model
through the pack's own sampler, each kept in a project and the video written beside it. The second makes a project of
the size of a real video, 640x608 at 30 frames per second, with the journal's own calls, and saves it as Save Long
Video does: sections read from disk, windows decoded and crossfaded, guards, 8-bit frames, encoder. Only the
autoencoder's network is replaced, by one that paints latents as squares: it makes tensors of the true shapes and
holds no memory of its own, so what is measured is what a video adds to a model. With --samples it saves the LATENT
that Anti-Drift Sampler hands on, whose numbers lie in a file that the system maps into memory. What it has read of a
file it can take back at any time, so the bounds then count what it cannot, and RSS is told beside it.

Exits with 1 if a bound fails: the last section within 64 MB of section 10 (RSS, and GPU memory where there is a GPU);
the whole decoding process below 2 GB; its growth below 50 MB for each minute of video.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEGABYTE = 2**20
SECTIONS, SETTLED = 200, 10
SECTION_BOUND = 64.0
MINUTES, DECODE_BOUND, GROWTH_BOUND = 10.0, 2048.0, 50.0
# A shorter video is over before memory has settled, and its slope says nothing.
LEAST_MINUTES = 1.0
# A section of 9 latent frames is 36 pixel frames.
SECTION_FRAMES, FPS = 36, 30
WIDTH, HEIGHT = 640, 608
# What is measured after each section, and its name for people.
SERIES = (("rss", "RSS"), ("vram", "VRAM"), ("heap", "heap in use"))
SAMPLE_SECONDS = 0.1


def resident() -> float:
    """Resident memory of this process, MB."""
    import psutil

    return psutil.Process().memory_info().rss / MEGABYTE


def highest() -> float:
    """The most memory that this process ever had resident, MB, by the system's own count; now's where it keeps none.

    Not `ru_maxrss`: on Linux that begins with what the process had that started this one.
    """
    import psutil

    try:
        told = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        found = psutil.Process().memory_info()
        return getattr(found, "peak_wset", found.rss) / MEGABYTE
    kilobytes = next(line.split()[1] for line in told.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) / 1024


def unbacked() -> float:
    """Resident memory that is no copy of a file, MB: what the system cannot take back. RSS where it does not tell."""
    import psutil

    found = psutil.Process().memory_info()
    return (found.rss - getattr(found, "shared", 0)) / MEGABYTE


def on_gpu() -> float:
    """Memory that torch holds on the GPU, MB; 0 without one."""
    import torch

    return torch.cuda.memory_allocated() / MEGABYTE if torch.cuda.is_available() else 0.0


def in_use() -> float:
    """What the C heap has handed out and not got back, MB; 0 where glibc does not tell. Growth of RSS without growth
    of this is heap that was freed and is kept by glibc for later: no leak."""
    if not sys.platform.startswith("linux"):
        return 0.0
    import ctypes

    names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0.0
    ask.restype = info
    told = ask()
    return (told.uordblks + told.hblkhd) / MEGABYTE


class Peak:
    """The highest memory between two looks, seen by a thread of its own. measure: gives MB."""

    def __init__(self, measure: Callable[[], float] = resident) -> None:
        self._measure = measure
        self._peak, self._done = measure(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._measure())

    def take(self) -> float:
        """The peak since the last call, MB."""
        now = self._measure()
        peak, self._peak = max(self._peak, now), now
        return peak


def sample(sections: int, side: int, steps: int, folder: Path) -> dict:
    """Make sections with project and live video; memory after each of them, MB."""
    import comfy.samplers
    import numpy as np
    import torch
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

    from frame_memory.model.selftest import SelfTestText, SelfTestVision
    from frame_memory.plan import PRESETS, parse_schedule, sigma_schedule
    from frame_memory.sampling.long_video import Live, sample_long_video
    from frame_memory.sampling.project_run import ProjectRequest
    from frame_memory.sampling.unipc import sample_framepack_unipc
    from frame_memory.video.start_image import prepare

    from .quality import SHIFT, load
    from .world import random_scene, render

    scene = random_scene(np.random.default_rng(0))
    picture = torch.from_numpy(np.ascontiguousarray(render(scene, np.arange(1))[:, :side, :side]))
    with torch.inference_mode():  # as the host loads: weights of few bits are moved in that mode only
        model, vae = load("F1")
        image = prepare(vae, SelfTestVision(), picture, None, side, "white")
    text = SelfTestText()
    positive = text.encode_from_tokens_scheduled(text.tokenize(scene.caption))
    positive = [[c, {**d, "clip_vision_output": image.vision}] for c, d in positive]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    rss: list[float] = []
    vram: list[float] = []
    heap: list[float] = []

    def note() -> None:
        rss.append(resident())
        vram.append(on_gpu())
        heap.append(in_use())
        if len(rss) % 10 == 1 and len(rss) > 1:
            print(f"  section {len(rss) - 1:4d}: {rss[-1]:7.1f} MB, heap in use {heap[-1]:7.1f} MB", flush=True)

    class Watched(comfy.samplers.KSAMPLER):
        """Is asked for once a section: what is held then is what the sections before have left."""

        def sample(self, *arguments, **options):
            note()
            return super().sample(*arguments, **options)

    with torch.inference_mode():
        sample_long_video(
            noise=Noise_RandomNoise(0), guider=guider, sampler=Watched(sample_framepack_unipc),
            sigmas=torch.tensor(sigma_schedule(steps, SHIFT)), schedule=parse_schedule(PRESETS["F1 forward"]),
            start={**image.start, "frame_memory": {"base": "selftest"}}, seconds=sections * SECTION_FRAMES / FPS,
            project=ProjectRequest(folder, "memory"), live=Live(vae), say=lambda _: None,
        )  # fmt: skip
    note()
    if len(rss) != sections + 1:
        raise RuntimeError(f"{sections} sections were asked for, the sampler was called {len(rss) - 1} times")
    return {"rss": rss[1:], "vram": vram[1:], "heap": heap[1:]}


def painted(latents_BCTHW):
    """Latents as squares of colour, [1,4t-3,8H,8W,3] in 0..1: a decode that costs next to nothing."""
    import torch

    _, _, length, height, width = latents_BCTHW.shape
    colours = latents_BCTHW[:, :3].float().mul(0.1).add(0.5).clamp(0, 1)
    frames = torch.nn.functional.interpolate(colours, size=(4 * length - 3, 8 * height, 8 * width), mode="nearest")
    return frames.movedim(1, -1).contiguous()


def make_project(root: Path, sections: int, height: int, width: int) -> None:
    """A finished project of F1 sections with random latents, by the journal's own calls."""
    import torch

    from frame_memory.journal.project import IF_CHANGED, Project
    from frame_memory.plan import PRESETS, latent_bytes, parse_schedule, plan_sections
    from frame_memory.sampling.project_run import plan_record
    from frame_memory.sampling.stored import keep_front

    plan = plan_sections(parse_schedule(PRESETS["F1 forward"]), sections=sections, fps=float(FPS))
    mark = {"latent_format": "HunyuanVideo", "base": "selftest", "order": plan.order, "window": 9, "fps": float(FPS)}
    generator = torch.Generator().manual_seed(0)
    # One picture that changes slowly: it is memory that is measured, not the encoder.
    picture = torch.randn(1, 16, 1, height, width, generator=generator)
    with Project.open(
        root, "long", shape={}, fields={}, plan=plan_record(plan, mark, picture), if_changed=IF_CHANGED[0],
        section_bytes=latent_bytes(9, height, width, 16), sections=sections,
    ) as project:  # fmt: skip
        keep_front(project, picture)
        for section in plan.sections:
            drift = torch.arange(section.start, section.stop).view(1, 1, -1, 1, 1) * 1e-3
            project.save(
                index=section.index, start=section.start, stop=section.stop, key=f"section {section.index}",
                samples=(picture + drift).contiguous(),
            )  # fmt: skip


def decode(minutes: float, folder: Path, samples: bool = False) -> dict:
    """Save a project of so many minutes as Save Long Video does; peak memory around every window, MB.

    samples: as the LATENT of the sampler, in a mapped file, instead of section by section.
    """
    import copy

    import comfy.sd
    import comfy.utils

    from frame_memory.plan.mark import KEY
    from frame_memory.sampling.project_run import on_disk
    from frame_memory.sampling.save_source import choose
    from frame_memory.video.save import plan_save, save_video

    from .quality import AUTOENCODER, MODELS

    sections = max(2, round(minutes * 60 * FPS / SECTION_FRAMES))
    make_project(folder, sections, HEIGHT // 8, WIDTH // 8)
    vae = copy.copy(comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae" / AUTOENCODER))))
    vae.decode = painted
    source = choose(folder, None, "long")
    if samples:
        mapped = on_disk(source.stored, source.stored.latents)
        source = choose(folder, {"samples": mapped, KEY: {**source.samples[KEY], "project": "long"}}, "")
    plan = plan_save(vae, source.samples, 0, "windowed", source.windows)
    measure = unbacked if samples else resident
    before, began, series = measure(), time.monotonic(), []
    with Peak(measure) as peak:

        def note(done: int, count: int) -> None:
            series.append(peak.take())
            if done % 25 == 0 or done == count:
                speed = done / count * plan.frames / (time.monotonic() - began)
                print(f"  window {done:4d} of {count}: {series[-1]:7.1f} MB, {speed:.0f} frames/s", flush=True)

        written = save_video(
            plan, vae, folder / "long.mp4", crf=30, on_window=note, look=source.begin(plan.fps), announce=print
        )
        source.end()
        series.append(peak.take())
    frames = written.frames
    size = written.path.stat().st_size
    return {"rss": series, "before": before, "frames": frames, "bytes": size, "samples": samples, "end": resident()}


@contextmanager
def scratch(where: str | None):
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="frame-memory-", dir=where) as name:
        yield Path(name)


def in_child(
    part: str, kept: str | None, *arguments: str, module: str = "benchmarks.memory", variables: Mapping[str, str] = {}
) -> dict:
    """Run one part of a benchmark in a process of its own and return what it measured; `kept` is a folder that may hold
    it already. variables: of its environment."""
    with scratch(None) as folder:
        result = Path(kept or folder) / f"{part}.json"
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        line = [sys.executable, "-m", module, "--child", part, "--result", str(result), *arguments]
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        subprocess.run(line, check=True, env=environment)
        return json.loads(result.read_text(encoding="utf-8"))


def slope(values: list[float], length: float) -> float:
    """Growth over one unit of `length`, which all values span, by a straight line through all but the first tenth."""
    import numpy as np

    kept = values[len(values) // 10 :]
    if len(kept) < 2:
        return 0.0
    at = np.linspace(0, length * len(kept) / len(values), len(kept))
    return float(np.polyfit(at, kept, 1)[0])


def verdicts(sampled: dict | None, decoded: dict | None) -> list[tuple[str, str, float, float | None, str]]:
    """Rows `(case, measure, value, bound or None, unit)`."""
    rows: list[tuple[str, str, float, float | None, str]] = []
    if sampled is not None:
        count = len(sampled["rss"])
        for name, words in SERIES:
            values = sampled.get(name, [])
            if not any(values):
                continue
            growth = values[-1] - values[SETTLED - 1]
            rows.append((f"{count} sections", f"{words} after section {SETTLED}", values[SETTLED - 1], None, "MB"))
            rows.append((f"{count} sections", f"{words} after section {count}", values[-1], None, "MB"))
            rows.append((f"{count} sections", f"{words} growth since section {SETTLED}", growth, SECTION_BOUND, "MB"))
    if decoded is not None:
        minutes = decoded["frames"] / FPS / 60
        case, what = f"{minutes:.1f} minutes of {WIDTH}x{HEIGHT}", "RSS"
        if decoded.get("samples"):
            case, what = f"{case}, from 'samples'", "memory without file pages"
            rows.append((case, "RSS at the end", decoded["end"], None, "MB"))
        rows.append((case, f"{what} before", decoded["before"], None, "MB"))
        rows.append((case, f"{what} peak", max(decoded["rss"]), DECODE_BOUND, "MB"))
        if minutes >= LEAST_MINUTES:
            rows.append((case, f"{what} growth", slope(decoded["rss"], minutes), GROWTH_BOUND, "MB a minute"))
    return rows


def draw(path: Path, sampled: dict, decoded: dict) -> None:
    """Both curves with their bounds as a PNG."""
    from frame_memory.video.plots import Curve, Panel, save_panels

    count, minutes = len(sampled["rss"]), decoded["frames"] / FPS / 60
    allowed = sampled["rss"][SETTLED - 1] + SECTION_BOUND
    measured = [(name, words) for name, words in SERIES if any(sampled.get(name, []))]
    top = Panel(
        f"Sampling {count} sections: memory after each",
        "section",
        "MB",
        [Curve(words, list(range(1, count + 1)), sampled[name]) for name, words in measured],
        [(allowed, f"bound: section {SETTLED} + {SECTION_BOUND:.0f} MB")],
        max(allowed, *sampled["rss"]) * 1.15,
    )
    at = [minutes * (i + 1) / len(decoded["rss"]) for i in range(len(decoded["rss"]))]
    bottom = Panel(
        f"Save Long Video, {minutes:.0f} minutes of {WIDTH}x{HEIGHT}: peak memory in each window",
        "minute of video",
        "MB",
        [Curve("RSS", at, decoded["rss"])],
        [(DECODE_BOUND, f"bound: {DECODE_BOUND:.0f} MB")],
        max(DECODE_BOUND, *decoded["rss"]) * 1.1,
    )
    save_panels(path, [top, bottom])


def child(args: argparse.Namespace) -> None:
    """One part, in this process."""
    import torch
    from comfy.cli_args import args as comfy_args

    comfy_args.cpu = comfy_args.cpu or not torch.cuda.is_available()
    logging.getLogger("frame_memory").setLevel(logging.ERROR)  # guards see squares and two steps, and say so
    with scratch(args.folder) as folder:
        if args.child == "sampling":
            found = sample(args.sections, args.side, args.steps, folder)
        else:
            found = decode(args.minutes, folder, args.samples)
    Path(args.result).write_text(json.dumps(found), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=SECTIONS, help=f"more than {SETTLED}; 0 leaves sampling out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of video to decode; 0 leaves decoding out")
    parser.add_argument("--samples", action="store_true", help="save the sampler's LATENT instead of the project")
    parser.add_argument("--side", type=int, default=32, help="pixels of the sampled picture, up to 64")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", help="where the projects are written and removed again; a 10-minute one has 1.8 GB")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results.csv and draw memory.png")
    parser.add_argument("--kept", help="a folder that keeps the curves, so that an interrupted run does not begin anew")
    parser.add_argument("--child", choices=("sampling", "decoding"), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0
    if args.sections and args.sections <= SETTLED:
        parser.error(f"--sections is {args.sections}, expected more than {SETTLED}, or 0")
    where = ["--folder", args.folder] if args.folder else []
    saved = ["--samples"] if args.samples else []
    sampled = decoded = None
    if args.sections:
        print(f"Sampling {args.sections} sections of the self-test model at {args.side}x{args.side}", flush=True)
        size = ["--sections", str(args.sections), "--side", str(args.side), "--steps", str(args.steps)]
        sampled = in_child("sampling", args.kept, *size, *where)
    if args.minutes:
        print(
            f"Saving {args.minutes:g} minutes of {WIDTH}x{HEIGHT}; the autoencoder's network is a stand-in", flush=True
        )
        decoded = in_child("decoding", args.kept, "--minutes", str(args.minutes), *saved, *where)
    rows = verdicts(sampled, decoded)
    print("| case | measure | value | bound | verdict |\n|---|---|---|---|---|")
    for case, measure, value, bound, unit in rows:
        words = "" if bound is None else f"{bound:.0f} {unit}"
        verdict = "" if bound is None else ("passed" if value <= bound else "FAILED")
        print(f"| {case} | {measure} | {value:.1f} {unit} | {words} | {verdict} |")
    if args.record:
        from . import record

        record.append("benchmarks.memory", [(case, f"{name}, {unit}", value) for case, name, value, _, unit in rows])
        if sampled is not None and decoded is not None and not args.samples:
            draw(HERE / "memory.png", sampled, decoded)
    return int(any(bound is not None and value > bound for _, _, value, bound, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
