"""What single parts of the work around the network take: `python scripts/run.py -m benchmarks.section_parts`.

frames   Four frames of 832x480 on their way into a file: floats to 8 bits (as they come from the live video, and in the
         layout that a decoder leaves), 8 bits to the encoder's planes, and x264. They show patches of noise, coarse and
         fine, that move by 3 pixels a frame.
journal  A project with 1, 100 and 200 finished sections whose records are those of a run of the self-test model: what
         its files take on the disk, its manifest written, and one more section of 832x480 saved, of which the disk's
         flush.

Medians of repeated calls on one thread, in turn; seconds of the processor, and by the clock where a disk is waited for.
The encoder's threads count. Takes a minute; nothing is bound.

Shape legend: B batch, C latent channels, T frames, H W pixels.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from frame_memory.journal import Manifest, Project, read_manifest, section_name, write_manifest
from frame_memory.journal.manifest import SegmentRecord
from frame_memory.video.segments import segment_name
from frame_memory.video.writer import CONVERTED_FRAMES, VideoWriter, to_uint8

from . import record
from .memory import FPS, SECTION_FRAMES, scratch
from .memory_cost import Row, table
from .section_overhead import WALKS, walk
from .stage_two import FRAMES, HEIGHT, WIDTH

REPEATS, WRITTEN = 20, 3
SECTIONS = (1, 100, 200)
CASE = f"{8 * WIDTH}x{8 * HEIGHT}"


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """(seconds of the processor, seconds by the clock) of one call."""
    clock, processor = time.perf_counter(), time.process_time()
    job()
    return time.process_time() - processor, time.perf_counter() - clock


def medians(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians of `timed`, by name; the jobs take turns, and the first turn does not count."""
    turns = [{name: timed(job) for name, job in jobs.items()} for _ in range(repeats + 1)][1:]
    return {name: tuple(np.median([turn[name] for turn in turns], axis=0).tolist()) for name in jobs}


def frame_rows(folder: Path) -> list[Row]:
    """A section's frames into a file."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(HEIGHT // 4, WIDTH // 4), (HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH)]
    noise = [torch.randn(1, 3, *size, generator=generator) * 0.1 for size in sizes]
    full = (8 * HEIGHT, 8 * WIDTH)
    layers = [torch.nn.functional.interpolate(n, size=full, mode="bilinear")[0].movedim(0, -1) for n in noise]
    still_HWC = torch.stack(layers).sum(0).add(0.5).clamp(0, 1)
    frames_THWC = torch.stack([still_HWC.roll((t, 3 * t), (0, 1)) for t in range(SECTION_FRAMES)])
    four_THWC = frames_THWC[:CONVERTED_FRAMES]
    decoded_THWC = four_THWC.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    images = to_uint8(four_THWC, 0)

    def write() -> None:
        with VideoWriter(folder / "section.mp4", 8 * WIDTH, 8 * HEIGHT, FPS) as out:
            out.write(frames_THWC)

    with VideoWriter(folder / "other.mp4", 8 * WIDTH, 8 * HEIGHT, FPS) as out:
        out.write(four_THWC)
        took = medians(
            {
                "to 8 bits": lambda: to_uint8(four_THWC, 0),
                "to 8 bits, of a decoder's layout": lambda: to_uint8(decoded_THWC, 0),
                "to the encoder's planes": lambda: [out.planes(image) for image in images],
            },
            REPEATS,
        )
    parts = {name: processor for name, (processor, _) in took.items()}
    whole = medians({"": write}, WRITTEN)[""][0] * CONVERTED_FRAMES / SECTION_FRAMES
    parts["in x264 and the file"] = whole - parts["to 8 bits"] - parts["to the encoder's planes"]
    case = f"{CONVERTED_FRAMES} frames, {CASE}, fp32"
    return [(case, f"processor seconds {name}", value, None) for name, value in parts.items()]


def of_length(found: Manifest, sections: int) -> Manifest:
    """A manifest of so many sections, each with the records of the first one that was measured."""
    section = next(r for r in found.sections.values() if r.measures)
    piece = next(iter(found.segments.values()))
    records = {
        i: replace(section, index=i, key=f"{i:064d}", file=replace(section.file, name=section_name(i)))
        for i in range(sections)
    }
    names = [segment_name(i * SECTION_FRAMES, (i + 1) * SECTION_FRAMES) for i in range(sections)]
    segments = {name: SegmentRecord(name, {**piece, "name": name}) for name in names}
    return replace(found, sections=records, takes=(), run=tuple(records), segments=segments)


def lengthened(found: Manifest, sections: int, root: Path) -> Project:
    """An opened project of so many sections, without their files."""
    longer = of_length(found, sections)
    (root / longer.name).mkdir(parents=True)
    write_manifest(root / longer.name, longer)
    return Project.open(
        root, longer.name, shape=longer.shape, fields=longer.fields, plan=longer.plan, if_changed="refuse",
        section_bytes=0, sections=sections,
    )  # fmt: skip


def save_next(project: Project, samples_BCTHW: torch.Tensor, fields: dict[str, str]) -> None:
    """One more section."""
    at = len(project.manifest.sections)
    project.save(
        index=at, start=9 * at, stop=9 * at + 9, key=f"{at:064d}", samples=samples_BCTHW, fields=fields
    )  # fmt: skip


@contextmanager
def flushes(spent: list[float]) -> Iterator[None]:
    """Seconds by the clock of each flush inside."""
    real = os.fsync

    def counted(descriptor) -> None:
        began = time.perf_counter()
        real(descriptor)
        spent.append(time.perf_counter() - began)

    os.fsync = counted
    try:
        yield
    finally:
        os.fsync = real


def journal_rows(folder: Path) -> list[Row]:
    """Projects of several lengths."""
    walk(replace(WALKS["small"], sections=3, steps=1), folder / "seen")
    (seen,) = (folder / "seen").iterdir()
    found = read_manifest(seen)
    samples = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    with ExitStack() as opened:
        projects = {n: opened.enter_context(lengthened(found, n, folder / str(n))) for n in SECTIONS}
        jobs = {
            "to ask what it takes on the disk": Project.taken,
            "to write its manifest": lambda project: write_manifest(project.folder, project.manifest),
            f"to save a section of {CASE}": lambda project: save_next(project, samples, found.sections[0].fields),
        }
        for words, job in jobs.items():
            spent: list[float] = []
            with flushes(spent):
                took = medians({str(n): partial(job, project) for n, project in projects.items()}, REPEATS)
            for n in SECTIONS:
                case = f"project of {n} sections"
                rows.append((case, f"processor seconds {words}", took[str(n)][0], None))
                rows.append((case, f"seconds by the clock {words}", took[str(n)][1], None))
            if spent:
                flushed = sum(spent) / (REPEATS + 1) / len(SECTIONS)
                rows.append(("project", f"seconds by the clock of the disk's flush {words}, mean", flushed, None))
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where projects are written and removed again; up to 1 GB")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results.csv")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    args = parse(arguments)
    logging.getLogger("frame_memory").setLevel(logging.ERROR)  # guards see squares, and say so
    torch.set_num_threads(1)
    with scratch(args.folder) as folder:
        rows = [*frame_rows(folder), *journal_rows(folder)]
    print("\n".join(table(rows)[0]))
    if args.record:
        record.append("benchmarks.section_parts", [row[:3] for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
