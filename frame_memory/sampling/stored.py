"""A project on disk as a latent that can be decoded: what is finished of it, read section by section.

Reading takes no lock: a manifest is replaced whole, and what it names stays, if only as a take. So a project can be
saved while a sampler writes it.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, in VAE space.
"""

from __future__ import annotations

import contextlib
import difflib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..journal.files import JournalError, patiently, safe_name, write_durable
from ..journal.lock import ProjectLock, is_alive, read_owner
from ..journal.manifest import Manifest, SectionRecord, manifest_in, read_manifest, write_manifest
from ..journal.project import Project, list_projects, locate
from ..model import tensor_file
from ..plan import pixel_frames
from ..plan.decode import DecodeWindow, decode_windows
from ..plan.mark import KEY, LatentMark, read_mark
from ..video.decode import DecodeError
from .frames import LatentFrames
from .identity import short

# Folder of all projects, in ComfyUI's output folder.
FOLDER = "frame_memory"
FRONT = "front-{}.safetensors"
NODE = "Save Long Video"
# How many names of other projects a message shows.
SHOWN_NAMES = 5


def front_name(first: Tensor) -> str:
    """File, relative to a project, that holds the frames in front of the first section; it names what is in it."""
    return FRONT.format(short(first))


def keep_front(project: Project, first: Tensor) -> None:
    """Write the start frame, or the existing video, into the project: the sections alone make no video."""
    path = project.folder / front_name(first)
    if path.exists() and _front_in(path) is not None:
        return
    write_durable(path, lambda file: tensor_file.write_to(file, {"samples": first}, {"format": "front"}))
    for old in project.folder.glob(FRONT.format("*")):
        if old != path:
            with contextlib.suppress(OSError):
                old.unlink()


def _front_in(path: Path) -> Tensor | None:
    """The frames of a front file, mapped: an existing video may be an hour long. None where it is missing or holds
    something else than its name says."""
    try:
        first = tensor_file.read_header(str(path))[0]["samples"].mapped()
    except (OSError, KeyError, tensor_file.FileError):
        return None
    return first if path.name == front_name(first) else None


@dataclass(frozen=True, eq=False)
class StoredVideo:
    """The longest gapless stretch of a project that is finished. A LatentSource.

    start, stop: its latent frames in the video of `total`. sections: latent frames of all sections of the plan, in
    order of time; records: those that are finished and whole. notes: what is missing, damaged or still being written.
    """

    folder: Path
    manifest: Manifest
    latents: LatentFrames
    shape: tuple[int, ...]
    start: int
    stop: int
    total: int
    sections: tuple[tuple[int, int], ...]
    records: tuple[SectionRecord, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def mark(self) -> LatentMark:
        """What made it and how it must be decoded."""
        mark = read_mark({KEY: self.manifest.plan["mark"]})
        assert mark is not None
        return mark

    @property
    def whole(self) -> bool:
        """Whether nothing of the video is missing."""
        return (self.start, self.stop) == (0, self.total)

    @property
    def first_frame(self) -> int:
        """The pixel frame of the video that the stretch begins with."""
        return pixel_frames(self.start, self.mark.clip) if self.mark.clips else 4 * self.start

    @property
    def windows(self) -> tuple[DecodeWindow, ...]:
        """Those windows of the whole video that lie in the stretch, counted from its start."""
        planned = decode_windows(self.mark.order, self.total, self.mark.window, self.mark.clips)
        inside = [w for w in planned if self.start <= w.start and w.stop <= self.stop]
        inside = inside or [DecodeWindow(self.start, self.stop)]
        return tuple(w.counted_from(self.start, self.first_frame) for w in inside)

    def frames(self, item: int, start: int, stop: int) -> Tensor:
        """Latent frames [start, stop) of the stretch, of one video of the batch. Raises DecodeError for NaN."""
        latents_BCTHW = self.latents.between(self.start + start, self.start + stop)[item : item + 1]
        if not bool(torch.isfinite(latents_BCTHW).all()):
            raise DecodeError(
                f"The project {self.folder.name!r} holds NaN or Inf in latent frames {start} to {stop}, which would be "
                "saved as black. Make those sections anew: 'Pick Section'."
            )
        return latents_BCTHW

    def samples(self) -> dict:
        """As a LATENT: this source in the place of the tensor, with the mark."""
        return {"samples": self, KEY: self.manifest.plan["mark"]}

    def describe(self, done_with: str = "Saved", again: str = "save") -> str:
        """A line for the artist: what of the project this is. done_with, again: what the node does, in two words."""
        fps = float(self.mark.fps or 30)
        made, count = len(self.records), len(self.sections)
        clip = self.mark.clip
        length = pixel_frames(self.total, clip) / fps
        if self.whole:
            return f"Project {self.folder.name!r}: all {count} sections, {length:.2f} s"
        begin, end = self.first_frame / fps, pixel_frames(self.stop, clip) / fps
        return (
            f"Project {self.folder.name!r} is not finished: {made} of {count} sections are there. {done_with}: "
            f"{begin:.1f} to {end:.1f} s of {length:.1f} s. Queue its graph again to make the rest, then {again} again"
        )

    def same_as(self, latents_BCTHW: Tensor) -> bool:
        """Whether a latent is this whole video: its length, and one channel of every frame, number by number.

        All channels would be read at the cost of the whole video in memory, and no edit leaves one channel alone.
        """
        if not self.whole or tuple(latents_BCTHW.shape) != self.shape:
            return False
        front = (0, self.sections[0][0])
        for start, stop in (front, *self.sections):
            mine = self.latents.between(start, stop)[:, :1]
            if not torch.equal(latents_BCTHW[:, :1, start:stop].to(mine.device, mine.dtype), mine):
                return False
        return True


def project_folder(root: Path, name: str) -> Path:
    """The folder of a project that is there. Raises JournalError with the nearest names."""
    folder = root / safe_name(name.strip())
    known = list_projects(root)
    if folder.name in known:
        return folder
    manifest_in(folder)  # says so where sections are there and only the manifest is gone
    # Letters of the other case are the most likely slip, and count as none.
    like = difflib.get_close_matches(folder.name.casefold(), {n.casefold() for n in known}, SHOWN_NAMES, 0.3)
    near = [n for folded in like for n in known if n.casefold() == folded][:SHOWN_NAMES] or known[:SHOWN_NAMES]
    there = f"Nearest: {', '.join(map(repr, near))}." if near else "There is no project yet."
    raise JournalError(
        f"'project' of '{NODE}' is {name.strip()!r}, and there is no project of that name in {root}. {there} Type the "
        "name of its folder, or connect 'project' of 'Anti-Drift Sampler'."
    )


def state_of(root: Path, name: str) -> str:
    """Changes when what a project's latest run has finished changes; empty where there is no such project."""
    try:
        manifest = read_manifest(root / safe_name(name.strip()))
    except JournalError:
        return ""
    return short([manifest.plan, [[record.key, record.file.sha256] for record in manifest.finished]])


def open_stored(root: Path, name: str) -> StoredVideo:
    """What is finished of a project, verified. Raises JournalError: no such project, nothing finished, damaged."""
    folder = project_folder(root, name)
    manifest = read_manifest(folder)
    plan = manifest.plan
    try:
        total, given = int(plan["total_frames"]), int(plan["given_frames"])
        sections = tuple(sorted((int(start), int(stop)) for start, stop in plan["sections"]))
        front = _front_in(folder / Path(plan.get("front", FRONT)).name)
    except (KeyError, TypeError, ValueError) as error:
        words = f"{folder} does not say how its video is put together ({error}). Queue its graph again."
        raise JournalError(words) from error
    notes = _in_use(folder)
    records = _whole_records(folder, manifest, notes)
    if not records:
        raise JournalError(
            f"The project {folder.name!r} ({folder}) has no finished section yet, so there is nothing to save. Queue "
            "its graph again."
        )
    if front is None:
        notes.append("The start frame is missing from the project; queue its graph again to put it back.")
    start, stop = _longest_stretch(records, given if front is not None else 0)
    latents, batch_shape = _frames_of(folder, records, front, total)
    records_in = tuple(r for r in records if start <= r.start and r.stop <= stop)
    if len(records_in) < len(records):
        notes.append(f"{len(records) - len(records_in)} finished sections lie beyond a gap and are not in this file.")
    b, c, h, w = batch_shape
    return StoredVideo(
        folder, manifest, latents, (b, c, stop - start, h, w), start, stop, total, sections, tuple(records), notes
    )


def _in_use(folder: Path) -> list[str]:
    owner = read_owner(folder)
    if owner is None or (owner.host == platform.node() and is_alive(owner.pid, owner.start) is False):
        return []
    return [f"It is being written by {owner.words}: this is what was finished when the save began."]


def _whole_records(folder: Path, manifest: Manifest, notes: list[str]) -> list[SectionRecord]:
    """The latest run's sections whose files are whole, in order of time."""
    whole = []
    for record in manifest.finished:
        file = locate(folder, record)
        if file is None:
            notes.append(f"Section {manifest.number(record.index)} is damaged or missing; it is left out.")
        else:
            whole.append(replace(record, file=file))
    return sorted(whole, key=lambda record: record.start)


def _longest_stretch(records: Sequence[SectionRecord], given: int) -> tuple[int, int]:
    """Latent frames of the longest run of sections without a gap, with the frames in front where it begins there."""
    stretches: list[list[int]] = []
    for record in records:
        if stretches and stretches[-1][1] == record.start:
            stretches[-1][1] = record.stop
        else:
            stretches.append([record.start, record.stop])
    start, stop = max(stretches, key=lambda s: s[1] - s[0])
    return (0 if given and start == given else start), stop


def _frames_of(folder: Path, records: Sequence[SectionRecord], front: Tensor | None, total: int):
    """The frames, none of them read yet but those in front, and `(B, C, H, W)`."""
    by_index = {record.index: record for record in records}

    def load(index: int) -> Tensor:
        return _samples_of(folder, by_index[index])

    b, c, _, h, w = load(records[0].index).shape
    latents = LatentFrames(torch.zeros(b, c, 0, h, w) if front is None else front, total, load)
    for record in records:
        latents.expect(record.index, record.start, record.stop)
    return latents, (b, c, h, w)


def _samples_of(folder: Path, record: SectionRecord) -> Tensor:
    """A section's frames; where a run has replaced it since it was recorded, those of the take it became."""
    path = folder / record.file.name
    try:
        _, about = patiently(lambda: tensor_file.read_header(str(path)))
        if about.get("key") != record.key:
            file = locate(folder, record)
            path = path if file is None else folder / file.name
            _, about = tensor_file.read_header(str(path))
        if about.get("key") == record.key:
            return patiently(lambda: tensor_file.read(str(path)))["samples"].float()
    except (OSError, KeyError, tensor_file.FileError) as error:
        raise JournalError(f"{path} can no longer be read ({error}). Save again.") from error
    raise JournalError(f"{path} was replaced while it was being saved. Save again.")


def annotate_stored(stored: StoredVideo, results: Mapping[int, tuple[dict[str, float], tuple[str, ...]]]) -> str:
    """Put measures of sections, by number in time, in the place of older ones; empty, or why that was not done."""
    numbers = {start: number for number, (start, _) in enumerate(stored.sections, 1)}
    found = {r.key: results[numbers[r.start]][0] for r in stored.records if numbers[r.start] in results}
    try:
        with ProjectLock(stored.folder):
            manifest = read_manifest(stored.folder)
            sections = {i: replace(r, measures=found.get(r.key, r.measures)) for i, r in manifest.sections.items()}
            if sections != manifest.sections:
                write_manifest(stored.folder, replace(manifest, sections=sections))
    except JournalError as error:
        return f"The measures of the sections were not stored in the project. {error}"
    return ""
