"""A run of the section loop whose sections go into a project on disk and come from it where they are finished.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, in VAE space.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..journal.files import JournalError, write_durable
from ..journal.project import CHANGED, IF_CHANGED, Project
from ..model import tensor_file, wan
from ..model.families import pixels_a_latent, said
from ..model.framepack import is_framepack
from ..model.memory import is_attached
from ..model.tensor_file import StoredTensor
from ..plan import LongVideoPlan, Section, latent_bytes
from ..video.guards import warnings_of
from ..video.writer import estimate_bytes
from .experts import low_noise_of, models_of
from .frames import LatentFrames
from .guards import without_attention
from .identity import (
    STEP_CACHE,
    RunIdentity,
    guider_fields,
    model_fields,
    named_options,
    options_digest,
    outline,
    prompt_field,
    short,
)
from .section_loop import Inputs, Made
from .stored import front_name

AUTOMATIC = "video"
WHOLE = "latent-{}.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProjectRequest:
    """Where an artist wants a run kept. root: the folder of all projects. name: "" names it after the start picture.

    if_changed: one of the journal's IF_CHANGED.
    """

    root: Path
    name: str = ""
    if_changed: str = IF_CHANGED[0]


def shape_fields(patcher, base: str, plan: LongVideoPlan, inputs: Inputs) -> dict[str, str]:
    """What all sections of one video must share."""
    batch, channels, _, height, width = inputs.start.shape
    kind = f" {said(patcher).get('kind') or 'F0 or F1, not known'}" if is_framepack(patcher) else ""
    pixels = pixels_a_latent(patcher)
    return {
        "model family": f"{type(patcher.model).__name__}{kind}",
        "latents": base,
        "size": f"{width * pixels}x{height * pixels}",
        "latent channels": str(channels),
        "batch": str(batch),
        "window": str(plan.schedule.window),
        "fps": f"{plan.fps:g}",
    }


def run_fields(runner, plan: LongVideoPlan, inputs: Inputs, changes) -> tuple[dict[str, str], RunIdentity]:
    """Everything else of a run, a line for each cause of change, and the part that every section depends on."""
    shared, listed = {}, {}
    for which, patcher in models_of(runner.guider).items():
        own = {**model_fields(patcher), **patchifiers_field(patcher)}
        shared |= {which + name: value for name, value in own.items()}
        listed |= {which + name: value for name, value in options_fields(patcher).items()}
    shared |= guider_fields(runner.guider, runner.sampler, runner.sigmas)
    low = low_noise_of(runner.guider)
    if low is not None:
        shared["low noise guidance"] = guider_fields(low, runner.sampler, runner.sigmas)["guidance"]
        if runner.memory is not None:
            brings = (is_attached(patcher) for patcher in models_of(runner.guider).values())
            shared["memory shown to"] = " and ".join(which for which, own in zip(("high", "low"), brings) if own)
    timeline = runner.timeline
    words = [] if timeline is None else [timeline.timeline, prompt_field({"timeline": list(timeline.conditionings)})]
    fields = {
        **shared,
        **listed,
        "prompts": prompt_field(runner.guider.original_conds),
        "timeline": short(words) if words else "none",
        "seed": str(runner.noise.seed),
        "picked sections": ", ".join(_change_words(c) for c in changes) or "none",
        "start picture": short(inputs.start),
        "end picture": short(inputs.end) if inputs.end is not None else "none",
        "existing video": short(inputs.given) if inputs.given is not None else "none",
        "initial latents": short(inputs.initial) if inputs.initial is not None else "none",
        "schedule": plan.schedule.text,
        "order": plan.order,
        "length": f"{len(plan.sections)} sections, {plan.seconds:.2f} s",
    }
    if runner.memory is not None:  # projects from before there was memory have no such line
        fields["memory"] = runner.memory.words()
    return fields, RunIdentity(shared)


def options_fields(patcher) -> dict[str, str]:
    """A MODEL's options for people: a line for each that this pack's nodes have set, and a fingerprint of the rest."""
    named, options = named_options(patcher), patcher.model_options
    if "attention" in named:
        options = without_attention(options)
    left = {k: v for k, v in options.get("transformer_options", {}).items() if k != STEP_CACHE}
    return {**named, "model options": options_digest(patcher, {**options, "transformer_options": left})}


def patchifiers_field(patcher) -> dict[str, str]:
    """Readable identity of the patchifiers beside a Wan MODEL; empty for other models."""
    beside = [[outline(p.model), outline(p.patches)] for p in patcher.get_additional_models_with_key(wan.KEY)]
    return {"patchifiers": short(beside)} if beside else {}


def _change_words(change) -> str:
    parts = [] if change.seed is None else [f"seed {change.seed}"]
    parts += [] if change.positive is None else [f"prompt {prompt_field({'positive': change.positive})}"]
    return f"{change.number}: {' and '.join(parts) or 'as it was'}"


def plan_record(plan: LongVideoPlan, mark: Mapping, first: Tensor) -> dict:
    """What a later node needs to read the sections as one video. first: the frames in front of them."""
    return {
        "mark": dict(mark),
        "front": front_name(first),
        "total_frames": plan.total_frames,
        "given_frames": max(plan.given_frames, 1),
        "sections": [[s.start, s.stop] for s in plan.sections],
    }


def open_project(
    request: ProjectRequest, runner, plan: LongVideoPlan, inputs: Inputs, mark: Mapping, base: str, changes, live: bool
) -> Project:
    """Open or create the project; live: whether its video is written too.

    Raises JournalError before any sampling: locked, conflicting, full, not writable.
    """
    patcher = runner.guider.model_patcher
    shape = shape_fields(patcher, base, plan, inputs)
    fields, runner.identity = run_fields(runner, plan, inputs, changes)
    memory = 0 if runner.memory is None else runner.memory.bytes_a_section(inputs.start.shape)
    name = request.name.strip() or f"{AUTOMATIC}-{short([shape, inputs.start, fields['existing video']])}"
    return Project.open(
        request.root,
        name,
        shape=shape,
        fields=fields,
        plan=plan_record(plan, mark, inputs.first),
        if_changed=request.if_changed,
        section_bytes=section_bytes(plan.schedule.window, inputs.start.shape, live, pixels_a_latent(patcher)) + memory,
        sections=len(plan.sections),
    )


def section_bytes(window: int, latent_shape: tuple[int, ...], live: bool, pixels: int = 8) -> int:
    """Bytes on disk that a section of `window` latent frames needs at most. latent_shape: `[B, C, T, H, W]`.

    pixels: of a side for one latent pixel.
    Its latent lies there twice: in its own file and, once all are there, in that of the whole video. Its pixels (live)
    three times: as pieces, in the preview and in the finished mp4, of the batch's first video.
    """
    batch, channels, _, height, width = latent_shape
    latents = 2 * batch * latent_bytes(window, height, width, channels)
    return latents + (3 * estimate_bytes(pixels * width, pixels * height, 4 * window) if live else 0)


def attach(runner, project: Project | None) -> JournalKeeper | None:
    """Let a runner keep its sections in a project."""
    runner.keeper = None if project is None else JournalKeeper(project)
    return runner.keeper


class JournalKeeper:
    """The section loop's Keeper over a project."""

    def __init__(self, project: Project):
        self.project = project
        self.reused: list[Section] = []

    def find(self, section: Section, key: str) -> Tensor | None:
        """A finished section with this key from this project, its takes, or a sibling project."""
        found = self.project.find(key)
        if found is None:
            return None
        self.project.adopt(key, index=section.index, start=section.start, stop=section.stop)
        self.reused.append(section)
        return found

    def keep(self, made: Made) -> None:
        """Write the section; it is finished when this returns."""
        section = made.section
        self.project.save(
            index=section.index, start=section.start, stop=section.stop, key=made.key, samples=made.window,
            seconds=made.seconds, notes=made.notes, fields=made.fields, beside=made.beside,
        )  # fmt: skip
        log.info("%s: section %d is finished", self.project.name, self.project.manifest.number(section.index))

    def alive(self) -> None:
        """A section is being sampled: the project is still ours."""
        self.project.alive()

    def load(self, index: int) -> Tensor:
        """A finished section, read again."""
        return self.project.load(index)

    def content(self, index: int) -> str:
        """The hash that a finished section's file was verified by."""
        return self.project.manifest.sections[index].file.sha256

    def beside(self, index: int, name: str) -> Tensor | None:
        """A tensor in a finished section's file beside its samples."""
        return self.project.beside(index, name)

    def forget_segments_but(self, names: Iterable[str]) -> None:
        """Of a finished run: pieces of other lengths go. A disk that refuses that is no reason to fail now."""
        try:
            self.project.keep_segments(names)
        except JournalError as error:
            log.warning("Older pieces of video stay in %s. %s", self.project.folder, error)

    def findings(self) -> list[str]:
        """How sections of the run were made where that is unusual, and what their pixels say, in order of time."""
        found = []
        number = self.project.manifest.number
        for record in sorted(self.project.manifest.finished, key=lambda r: r.start):
            found += [f"Section {number(record.index)} {note}" for note in record.notes]
            found += warnings_of(number(record.index), record.measures)
        return found

    def summary(self, plan: LongVideoPlan) -> str:
        """Which sections were there already, by their time in the video."""
        count = len(plan.sections)
        if not self.reused:
            made = f"All {count} sections were" if count > 1 else "The only section was"
            changed = any(note.startswith(CHANGED) for note in self.project.notes)
            return f"{made} made now{': none could be reused after the change' if changed else ''}."
        spans: list[tuple[float, float]] = []
        for begin, end in sorted(plan.span_seconds(s) for s in self.reused):
            joined = spans and abs(begin - spans[-1][1]) < 0.1
            spans[-1:] = [(spans[-1][0], end)] if joined else [*spans[-1:], (begin, end)]
        words = ", ".join(f"{a:.1f}-{b:.1f} s" for a, b in spans)
        which = f"{len(self.reused)} of {count} sections were" if count > 1 else "The only section was"
        return f"{which} finished before and reused: {words}."


def on_disk(project: Project, frames: LatentFrames) -> Tensor:
    """The whole video `[B, C, T, H, W]`, fp32, in a file of the project that the system maps into memory as it is read.

    The file is derived from the sections and may be deleted. Writing to the tensor changes a private copy of its pages.
    """
    keys = [record.key for record in project.manifest.finished]
    path = project.folder / WHOLE.format(short([keys, frames.first]))
    spans = frames.spans_in_time()
    names = [f"latent_frames_{start:06d}_TBCHW" for start, _ in spans]

    def stored(load, start: int, stop: int) -> StoredTensor:
        shape = (stop - start, *frames.first.shape[:2], *frames.first.shape[3:])
        return StoredTensor(lambda: load().permute(2, 0, 1, 3, 4), shape, torch.float32)

    # One tensor a section, in the order of time: their bytes lie behind one another and are one long tensor as well.
    parts = {name: stored(load, *span) for name, (span, load) in zip(names, spans.items(), strict=True)}
    shape = (frames.total, *frames.first.shape[:2], *frames.first.shape[3:])
    if not _is_whole(path, names, 4 * math.prod(shape)):
        write_durable(path, lambda file: tensor_file.write_to(file, parts, {"format": "Frame Memory whole latent"}))
        for old in project.folder.glob(WHOLE.format("*")):
            if old != path:
                with contextlib.suppress(OSError):  # Windows keeps what an earlier run's LATENT still maps
                    old.unlink()
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    count = path.stat().st_size // 4
    numbers = torch.from_file(str(path), shared=False, size=count, dtype=torch.float32)
    return numbers[offset // 4 :].view(shape).permute(1, 2, 0, 3, 4)


def _is_whole(path: Path, names: list[str], size: int) -> bool:
    """Whether a file of the whole video is there with these tensors, of `size` bytes together, and nothing is cut."""
    try:
        tensors, _ = tensor_file.read_header(str(path))
        with path.open("rb") as file:
            offset = 8 + int.from_bytes(file.read(8), "little")
        return list(tensors) == names and path.stat().st_size == offset + size
    except (OSError, tensor_file.FileError):
        return False
