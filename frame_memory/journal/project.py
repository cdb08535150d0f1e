"""A project: one long video's folder. What is finished in it stays, in every order of crash and whatever is full.

A section is finished when its file and then the manifest are on the disk. The manifest names each file with its length
and hash; a file that was moved aside when the process died is found again by those, so no order of renames can lose
one. Between two writes the worst case is one file that no manifest knows, which the next run makes again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model import tensor_file
from .files import (
    FileRecord,
    JournalError,
    check_space,
    explained,
    extended,
    make_folder,
    megabytes,
    move_durable,
    patiently,
    safe_name,
    sha256_of,
    sweep,
    verify,
    write_durable,
)
from .lock import ProjectLock, ProjectLocked
from .manifest import (
    NAME,
    SECTIONS,
    Manifest,
    SectionRecord,
    SegmentRecord,
    UnreadableManifest,
    conflict,
    difference,
    manifest_in,
    read_manifest,
    write_manifest,
)

IF_CHANGED = ("reuse what fits", "fork", "refuse")
TAKES, SEGMENTS = "takes", "segments"
# Name of a section's latent in its file.
SAMPLES = "samples"
MOST_FORKS = 999
# How a note begins that tells what is not as it was in the latest run.
CHANGED = "These settings changed"
# Seconds between two touches of the lock while a section is sampled; far under the lock's STALE_AFTER.
HEARTBEAT = 30.0

log = logging.getLogger(__name__)


class ProjectConflict(JournalError):
    """The project holds another video; the message has the field-by-field difference and the choices."""


def section_name(index: int) -> str:
    """The current take of a section, relative to the project's folder."""
    return f"{SECTIONS}/{index:03d}.safetensors"


def locate(folder: Path, record: SectionRecord) -> FileRecord | None:
    """Where a finished section's file is, verified: where it was recorded, or where a dying process had moved it."""
    takes = sorted((folder / TAKES).glob(f"{record.index:03d}-*.safetensors"))
    names = [record.file.name, section_name(record.index), *(f"{TAKES}/{path.name}" for path in takes)]
    for name in dict.fromkeys(names):
        found = replace(record.file, name=name)
        if verify(folder, found) is None:
            return found
    return None


def list_projects(root: Path) -> list[str]:
    """Names of the projects in a folder, sorted; none where the folder is missing or cannot be read."""
    try:
        return sorted(path.name for path in Path(root).iterdir() if (path / NAME).is_file())
    except OSError:
        return []


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Project:
    """An opened project, which no other writer can have meanwhile; close it, or use it in a `with`.

    folder, name, manifest: as they are now. notes: in words, what was reused, taken over, found damaged or forked.
    Methods may be called from several threads. They raise DiskFull, ProjectLocked (another machine took it over) or
    JournalError; whatever they raise, every section that `save` or `adopt` had returned is still finished.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, lock: ProjectLock, sections: int, notes: Iterable[str]
    ) -> None:
        self.folder, self.name, self.manifest, self.notes = folder, folder.name, manifest, list(notes)
        self._lock: ProjectLock | None = lock
        self._sections, self._named = sections, manifest.named
        self._unwritten = False
        self._others: dict[str, list[tuple[Path, SectionRecord]]] | None = None
        self._last: tuple[Path, SectionRecord, FileRecord, tuple] | None = None
        self._mutex = threading.RLock()
        self._touched = time.monotonic()

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        *,
        shape: Mapping[str, str],
        fields: Mapping[str, str],
        plan: Mapping[str, Any],
        if_changed: str,
        section_bytes: int,
        sections: int,
    ) -> Project:
        """Create the project `name` in `root`, or continue it; everything that can stop it does so here.

        shape: what one video must share; another one is refused, or forked. fields: the rest of the run in words; a
        change is taken up, forked or refused as `if_changed` (one of IF_CHANGED) says. plan: JSON values, recorded.
        section_bytes, sections: the disk must have room for all that are missing. A fork is called name-2, name-3 ...;
        one that matches exactly is continued. Raises ProjectConflict, ProjectLocked, DiskFull or JournalError.
        """
        if if_changed not in IF_CHANGED:
            raise JournalError(f"'if_changed' is {if_changed!r}; expected one of {', '.join(map(repr, IF_CHANGED))}.")
        wanted = Manifest(
            name=safe_name(name),
            shape={str(k): str(v) for k, v in shape.items()},
            fields={str(k): str(v) for k, v in fields.items()},
            plan=json.loads(json.dumps(dict(plan), allow_nan=False)),
            created=_now(),
        )
        root = extended(Path(root).absolute())
        make_folder(root)
        found = cls._open_one(root, wanted, if_changed, section_bytes, sections)
        number = 2
        while isinstance(found, str):
            if if_changed != "fork":
                raise ProjectConflict(found)
            if number > MOST_FORKS:
                raise JournalError(f"{root} has {MOST_FORKS} forks of {wanted.name!r}. Choose another 'project'.")
            fork = replace(wanted, name=f"{wanted.name}-{number}", parent=wanted.name)
            with contextlib.suppress(UnreadableManifest):  # a damaged one is passed over
                found = cls._open_one(root, fork, if_changed, section_bytes, sections)
            number += 1
        if wanted.name != name.strip():
            found.notes.insert(0, f"{name.strip()!r} cannot name a folder: the project is called {wanted.name!r}.")
        if found.name != wanted.name:
            found.notes.insert(0, f"{wanted.name!r} holds another video: this one is made in its fork {found.name!r}.")
        for note in found.notes:
            log.info("%s: %s", found.folder, note)
        return found

    @classmethod
    def _open_one(
        cls, root: Path, wanted: Manifest, if_changed: str, section_bytes: int, sections: int
    ) -> Project | str:
        """The project of exactly that name, or in words why it is another video."""
        folder = root / wanted.name
        fresh = not folder.exists()
        if fresh:
            check_space(root, section_bytes * sections, f"The project {wanted.name!r} ({sections} sections)")
        make_folder(folder)
        lock = ProjectLock(folder)
        with contextlib.ExitStack() as undo:
            if fresh:
                undo.callback(_remove_if_empty, folder)
            undo.enter_context(lock)
            swept = sweep(folder)
            notes = [lock.note] if lock.note else []
            notes += [f"Removed {len(swept)} unfinished files of a run that was stopped."] if swept else []
            manifest = manifest_in(folder)
            if manifest is None:
                manifest, missing = wanted, sections
            else:
                refusal = conflict(folder, manifest, wanted, if_changed)
                if refusal:
                    return refusal
                changes = difference(manifest.fields, wanted.fields)
                if changes and (manifest.sections or manifest.takes):
                    notes.append(f"{CHANGED}; sections that do not depend on them are reused:\n{changes}")
                same = not changes and manifest.plan == wanted.plan
                run = manifest.run if same else ()
                manifest = replace(manifest, shape=wanted.shape, fields=wanted.fields, plan=wanted.plan, run=run)
                missing = sections - len([record for record in manifest.finished if record.index < sections])
            check_space(folder, section_bytes * max(0, missing), f"The project {wanted.name!r} ({missing} sections)")
            for inner in (SECTIONS, TAKES, SEGMENTS):
                make_folder(folder / inner)
            write_manifest(folder, manifest)
            _remove_unknown_segments(folder, manifest)
            undo.pop_all()
        return cls(folder, manifest, lock, sections, notes)

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Give the project back; closing twice does nothing. Never raises: what counts is on the disk already."""
        with self._mutex:
            if self._lock is None:
                return
            try:
                self._settle()
            except JournalError as error:
                log.warning("%s", error)
            self._lock.__exit__()
            self._lock = None

    def find(self, key: str) -> Tensor | None:
        """The samples of a finished section with this key, verified: this project's, its takes', another project's.

        None where there is none; the next step is then to make it. A damaged file is named in `notes` and passed over.
        """
        with self._mutex:
            for folder, record in self._holders(key):
                samples = self._read(folder, record)
                if samples is not None:
                    return samples
            self._settle()
            return None

    def save(
        self,
        *,
        index: int,
        start: int,
        stop: int,
        key: str,
        samples: Tensor,
        beside: Mapping[str, Tensor] | None = None,
        fields: Mapping[str, str] | None = None,
        measures: Mapping[str, float] | None = None,
        notes: Iterable[str] = (),
        seconds: float = 0.0,
    ) -> SectionRecord:
        """Keep a section that was just made, as the current one of `index`; finished when this returns.

        beside: more tensors for its file. Another section that was current there becomes a take. Sections that were
        made after it stay, but no longer count as this run's until they are found or made again.
        """
        with self._writing():
            takes = self._clear(index)
            path = self.folder / section_name(index)
            about = {"format": "Frame Memory section", "key": key, "index": index, "start": start, "stop": stop}
            text = {name: str(value) for name, value in about.items()}
            tensors = {**(beside or {}), SAMPLES: samples}
            size, sha256 = write_durable(path, lambda file: tensor_file.write_to(file, tensors, text))
            record = SectionRecord(
                index=index,
                start=start,
                stop=stop,
                key=key,
                file=FileRecord(section_name(index), size, sha256),
                fields={str(k): str(v) for k, v in (fields or {}).items()},
                measures={str(k): float(v) for k, v in (measures or {}).items()},
                notes=tuple(notes),
                seconds=float(seconds),
                finished=_now(),
            )
            self._put(record, takes)
            return record

    def adopt(
        self, key: str, *, index: int, start: int, stop: int, fields: Mapping[str, str] | None = None
    ) -> SectionRecord:
        """Make a finished section that `find` found the current one of `index` here; nothing moves where it is already.

        A take of this index changes places with the current section; any other is copied. What was measured of it
        among other neighbours is forgotten. Raises JournalError where no whole section has this key.
        """
        with self._writing():
            folder, source = self._holder(key, index)
            place, current = section_name(index), self.manifest.sections.get(index)
            own = folder == self.folder
            chosen = dict(source.fields) if fields is None else {str(k): str(v) for k, v in fields.items()}
            stays = own and source.index == index and current is not None and current.key == key
            record = replace(
                source, index=index, start=start, stop=stop, fields=chosen, file=replace(source.file, name=place),
                measures=source.measures if stays else {},
            )  # fmt: skip
            if own and record == current and source.file.name == place:
                self._confirm(index)
                return record
            data = None if own and source.index == index else self._bytes(folder, source)
            takes = self._clear(index, keep=source.file.sha256)
            if verify(self.folder, record.file) is not None:
                if data is None:
                    found = locate(self.folder, source)
                    move_durable(self.folder / (found or source.file).name, self.folder / place)
                else:
                    write_durable(self.folder / place, lambda file: file.write(data))
            if not own:
                self._note(f"Section {self.manifest.number(index)} is reused from the project {folder.name!r}.")
            self._put(record, takes)
            return record

    def load(self, index: int) -> Tensor:
        """The samples of the current section of an index. Raises JournalError where it is unfinished or damaged."""
        with self._mutex:
            record = self.manifest.sections.get(index)
            if record is None:
                number = self.manifest.number
                done = ", ".join(map(str, sorted(number(i) for i in self.manifest.sections))) or "none"
                raise JournalError(f"Section {number(index)} of {self.folder} is not finished. Finished: {done}.")
            samples = self._read(self.folder, record)
            if samples is None:
                raise JournalError(f"{self.notes[-1]} Queue the same graph again: only this section is made again.")
            return samples

    def beside(self, index: int, name: str) -> Tensor | None:
        """What `save` put beside the samples of the current section of an index; None where nothing has that name."""
        with self._mutex:
            record = self.manifest.sections.get(index)
            return None if record is None else self._read(self.folder, record, name)

    def annotate(self, measures: Mapping[int, Mapping[str, float]]) -> None:
        """Put numbers of finished sections, by index, in the place of those that were there; one write at most.

        Raises JournalError where a section is unfinished.
        """
        with self._writing():
            sections = dict(self.manifest.sections)
            for index, numbers in measures.items():
                if index not in sections:
                    raise JournalError(
                        f"Section {self.manifest.number(index)} of {self.folder} is not finished: there is nothing to "
                        "annotate."
                    )
                numbers = {str(k): float(v) for k, v in numbers.items()}
                sections[index] = replace(sections[index], measures=numbers)
            if sections != self.manifest.sections:
                self._write(replace(self.manifest, sections=sections), 0)

    def set_segment(self, name: str, info: Mapping[str, Any] | None) -> None:
        """Record an encoded piece of video under a name (JSON values), or forget it (None)."""
        with self._writing():
            segments = {k: v for k, v in self.manifest.segments.items() if k != name}
            old = self.manifest.segments.get(name)
            grown = 0 if old is None else -old.size
            if info is not None:
                segments[name] = SegmentRecord(name, json.loads(json.dumps(dict(info), allow_nan=False)))
                grown += segments[name].size
            self._write(replace(self.manifest, segments=segments), grown)

    def keep_segments(self, names: Iterable[str]) -> None:
        """Forget all other pieces of video, of lengths and plans that are no more, and remove their files."""
        with self._writing():
            wanted = set(names)
            segments = {k: v for k, v in self.manifest.segments.items() if k in wanted}
            if segments != self.manifest.segments:
                self._write(replace(self.manifest, segments=segments))
            _remove_unknown_segments(self.folder, self.manifest)

    def alive(self) -> None:
        """Say that the owner lives; for every step of a long section, since it acts only every HEARTBEAT seconds.

        Raises ProjectLocked if another has taken over: what is being made could not be kept. A disk that does not
        answer now is left to the next write.
        """
        with self._mutex:
            now = time.monotonic()
            if self._lock is None or now - self._touched < HEARTBEAT:
                return
            self._touched = now
            try:
                self._lock.touch()
            except ProjectLocked:
                raise
            except JournalError as error:
                log.warning("%s", error)

    def holdings(self) -> str:
        """For the screen before a run, which has to look at every section first: what there is to be reused."""
        held = len(self.manifest.sections)
        if not held:
            return f"Nothing is finished yet in {self.folder}"
        return f"{held} finished sections are in {self.folder}; those that fit this graph are reused."

    def status(self) -> str:
        """For the screen: how many sections of this run are finished, and what the whole project takes."""
        manifest = self.manifest
        done = len([record for record in manifest.finished if record.index < self._sections])
        return f"{done} of {self._sections} sections finished, {megabytes(self._named)} in {self.folder}"

    def taken(self) -> int:
        """Bytes that the project takes on the disk. Raises OSError where its folder is away.

        Of sections and pieces what the manifest says: to ask the disk for each takes longer with every section.
        """
        total = self._named
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # a temporary file that is gone by now
                    total += entry.stat().st_size if entry.is_file() else 0
        return total

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around every change: one thread, and the lock still ours."""
        with self._mutex:
            if self._lock is None:
                raise JournalError(f"The project {self.folder} is closed; open it again to write.")
            self._lock.touch()
            self._touched = time.monotonic()
            yield

    def _write(self, manifest: Manifest, grown: int | None = None) -> None:
        """The manifest in memory follows the one on the disk, never the other way round.

        grown: bytes by which the files that it names have grown; None where they are to be counted.
        """
        write_manifest(self.folder, manifest)
        self._named = manifest.named if grown is None else self._named + grown
        self.manifest, self._unwritten = manifest, False

    def _put(self, record: SectionRecord, takes: tuple[SectionRecord, ...]) -> None:
        index, old = record.index, self.manifest.sections.get(record.index)
        other = old is not None and old.key != record.key
        run = {i for i in self.manifest.run if not (other and i > index)} | {index}
        sections = {**self.manifest.sections, index: record}
        if other:  # what was measured of those behind it in time was measured against the old one
            later = {i: replace(r, measures={}) for i, r in sections.items() if i != index and r.start > record.start}
            sections |= later
        grown = record.file.bytes if old is None and takes == self.manifest.takes else None
        self._write(replace(self.manifest, sections=sections, takes=takes, run=tuple(sorted(run))), grown)

    def _confirm(self, index: int) -> None:
        """Count a section as this run's. Written with the next change, or when something has to be made."""
        if index not in self.manifest.run:
            self.manifest = replace(self.manifest, run=tuple(sorted({*self.manifest.run, index})))
            self._unwritten = True

    def _settle(self) -> None:
        if self._unwritten and self._lock is not None:
            self._lock.touch()
            self._write(self.manifest)

    def _clear(self, index: int, keep: str = "") -> tuple[SectionRecord, ...]:
        """Move a finished section away from an index's place, into takes/; returns the takes as they then are.

        A section whose sha256 is `keep` stays where it is and becomes no take. A file that no record knows is one that
        was never finished: it stays, to be written over.
        """
        path, current = self.folder / section_name(index), self.manifest.sections.get(index)
        mine = [r for r in (current, *self.manifest.takes) if r is not None and r.index == index]
        try:
            sha256 = sha256_of(path)[1] if mine else ""
        except FileNotFoundError:
            sha256 = ""
        except OSError as error:
            raise explained(error, path) from error
        occupant = next((r for r in mine if r.file.sha256 == sha256 != keep), None)
        if occupant is not None:
            move_durable(path, self._free_take(occupant))
        takes = []
        for record in self.manifest.takes:
            found = locate(self.folder, record) if record.index == index else None
            takes.append(replace(record, file=found) if found else record)
        if current is not None:
            found = locate(self.folder, current)
            if found is not None:
                takes.append(replace(current, file=found))
            else:
                number = self.manifest.number(index)
                self._note(f"Section {number} was damaged and is replaced: {verify(self.folder, current.file)}.")
        return tuple(record for record in takes if record.index != index or record.file.sha256 != keep)

    def _free_take(self, record: SectionRecord) -> Path:
        stem = f"{TAKES}/{record.index:03d}-{re.sub('[^0-9A-Za-z]', '_', record.key[:8])}"
        number, path = 1, self.folder / f"{stem}.safetensors"
        while path.exists():
            number += 1
            path = self.folder / f"{stem}-{number}.safetensors"
        return path

    def _holders(self, key: str, index: int = -1) -> Iterator[tuple[Path, SectionRecord]]:
        """Every record with a key: this project's own first, those of `index` before others, newest takes first."""
        own = [r for r in (*self.manifest.sections.values(), *reversed(self.manifest.takes)) if r.key == key]
        yield from ((self.folder, r) for r in sorted(own, key=lambda r: r.index != index))
        if self._others is None:
            self._others = self._read_others()
        yield from self._others.get(key, ())

    def _holder(self, key: str, index: int) -> tuple[Path, SectionRecord]:
        for folder, record in self._holders(key, index):
            file = self._just_read(folder, record) or locate(folder, record)
            if file is not None:
                return folder, replace(record, file=file)
        raise JournalError(f"No whole section in {self.folder.parent} has the key {key}: it has to be made again.")

    def _just_read(self, folder: Path, record: SectionRecord) -> FileRecord | None:
        """The file that `find` verified last, where it is this record's and was not touched since."""
        if self._last is None or self._last[:2] != (folder, record):
            return None
        _, _, file, stamp = self._last
        return file if stamp and _stamp(folder / file.name) == stamp else None

    def _read_others(self) -> dict[str, list[tuple[Path, SectionRecord]]]:
        """Sections of the other projects beside this one by key, newest project first."""
        found: dict[str, list[tuple[Path, SectionRecord]]] = {}
        folders = [self.folder.parent / name for name in list_projects(self.folder.parent) if name != self.name]
        for folder in sorted(folders, key=_changed, reverse=True):
            try:
                manifest = read_manifest(folder)
            except UnreadableManifest as error:
                self._note(f"The project {folder.name!r} was not searched for sections: {error}")
                continue
            for record in (*manifest.sections.values(), *reversed(manifest.takes)):
                found.setdefault(record.key, []).append((folder, record))
        return found

    def _read(self, folder: Path, record: SectionRecord, name: str = SAMPLES) -> Tensor | None:
        """A section's samples, or what lies beside them; None, with a note, where its file is damaged."""
        file = locate(folder, record)
        reason = verify(folder, record.file) if file is None else ""
        if file is not None:
            path = folder / file.name
            stamp = _stamp(path)
            try:
                entries, _ = patiently(lambda: tensor_file.read_header(str(path)))
                self._last = (folder, record, file, stamp)
                # Only what is asked for: a kept tensor that was read among others leaves holes where those were.
                return patiently(entries[name].read) if name == SAMPLES or name in entries else None
            except (OSError, KeyError, tensor_file.FileError) as error:
                reason = f"{file.name} cannot be read ({error})"
        which = f"Section {self.manifest.number(record.index)}" if folder == self.folder else "A section"
        self._note(f"{which} of {folder.name!r} is damaged and counts as unfinished: {reason}.")
        return None

    def _bytes(self, folder: Path, record: SectionRecord) -> bytes:
        path = folder / record.file.name
        try:
            data = patiently(path.read_bytes)
        except OSError as error:
            raise JournalError(f"{path} could not be copied to {self.folder} ({error}).") from error
        if hashlib.sha256(data).hexdigest() != record.file.sha256:
            raise JournalError(f"{path} changed while it was copied to {self.folder}. Queue the same graph again.")
        return data

    def _note(self, text: str) -> None:
        """Say it once, as the last note."""
        if text in self.notes:
            self.notes.remove(text)
        else:
            log.warning("%s: %s", self.folder, text)
        self.notes.append(text)


def _stamp(path: Path) -> tuple:
    """What changes when a file is replaced or written to."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _remove_unknown_segments(folder: Path, manifest: Manifest) -> None:
    """Remove pieces of video that no record knows: a killed run may have left one that was not final yet."""
    for path in (folder / SEGMENTS).glob("[0-9]*-[0-9]*.mp4"):
        if path.name not in manifest.segments:
            with contextlib.suppress(OSError):  # Windows keeps what a player has open
                path.unlink()


def _changed(folder: Path) -> float:
    try:
        return (folder / NAME).stat().st_mtime
    except OSError:
        return 0.0


def _remove_if_empty(folder: Path) -> None:
    for path in (*(folder / name for name in (SECTIONS, TAKES, SEGMENTS)), folder):
        with contextlib.suppress(OSError):
            os.rmdir(path)
