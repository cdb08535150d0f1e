"""A run of the section loop whose sections go into a project on disk and come from it where they are finished.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, in VAE space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..journal.project import IF_CHANGED, Project
from ..plan import LongVideoPlan, Section, latent_bytes
from .identity import RunIdentity, guider_fields, model_fields, prompt_field, short
from .section_loop import Inputs, Made

FOLDER = "frame_memory"
AUTOMATIC = "video"


@dataclass(frozen=True)
class ProjectRequest:
    """Where an artist wants a run kept. root: the folder of all projects. name: "" names it after the start picture.

    if_changed: one of the journal's IF_CHANGED.
    """

    root: Path
    name: str = ""
    if_changed: str = IF_CHANGED[0]


def shape_fields(patcher, kind: str | None, base: str, plan: LongVideoPlan, inputs: Inputs) -> dict[str, str]:
    """What all sections of one video must share."""
    batch, channels, _, height, width = inputs.start.shape
    return {
        "model family": f"{type(patcher.model).__name__} {kind or 'F0 or F1, not known'}",
        "latents": base,
        "size": f"{width * 8}x{height * 8}",
        "latent channels": str(channels),
        "batch": str(batch),
        "window": str(plan.schedule.window),
        "fps": f"{plan.fps:g}",
    }


def run_fields(runner, plan: LongVideoPlan, inputs: Inputs, changes) -> tuple[dict[str, str], RunIdentity]:
    """Everything else of a run, a line for each cause of change, and the part that every section depends on."""
    shared = {**model_fields(runner.guider.model_patcher), **guider_fields(runner.guider, runner.sampler, runner.sigmas)}
    timeline = runner.timeline
    words = [] if timeline is None else [timeline.timeline, prompt_field({"timeline": list(timeline.conditionings)})]
    fields = {
        **shared,
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
    return fields, RunIdentity(shared)


def _change_words(change) -> str:
    parts = [] if change.seed is None else [f"seed {change.seed}"]
    parts += [] if change.positive is None else [f"prompt {prompt_field({'positive': change.positive})}"]
    return f"{change.number}: {' and '.join(parts) or 'as it was'}"


def plan_record(plan: LongVideoPlan, mark: Mapping) -> dict:
    """What a later node needs to read the sections as one video."""
    return {
        "mark": dict(mark),
        "total_frames": plan.total_frames,
        "given_frames": max(plan.given_frames, 1),
        "sections": [[s.start, s.stop] for s in plan.sections],
    }


def open_project(
    request: ProjectRequest, plan: LongVideoPlan, inputs: Inputs, shape: Mapping, fields: Mapping, mark: Mapping
) -> Project:
    """Open or create the project. Raises JournalError before any sampling: locked, conflicting, full, not writable."""
    name = request.name.strip() or f"{AUTOMATIC}-{short([dict(shape), inputs.start, fields['existing video']])}"
    batch, channels, _, height, width = inputs.start.shape
    return Project.open(
        request.root,
        name,
        shape=shape,
        fields=fields,
        plan=plan_record(plan, mark),
        if_changed=request.if_changed,
        section_bytes=batch * latent_bytes(plan.schedule.window, height, width, channels),
        sections=len(plan.sections),
    )


class JournalKeeper:
    """The section loop's Keeper over a project."""

    def __init__(self, project: Project):
        self.project = project
        self.reused: list[int] = []

    def find(self, section: Section, key: str) -> Tensor | None:
        """A finished section with this key from this project, its takes, or a sibling project."""
        found = self.project.find(key)
        if found is None:
            return None
        self.project.adopt(section.index, section.start, section.stop, key)
        self.reused.append(section.index)
        return found

    def keep(self, made: Made) -> None:
        """Write the section; it is finished when this returns."""
        section = made.section
        self.project.save(
            section.index, section.start, section.stop, made.key, made.window, seconds=made.seconds, notes=made.notes
        )

    def load(self, index: int) -> Tensor:
        """A finished section, read again."""
        return self.project.load(index)
