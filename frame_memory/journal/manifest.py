"""`manifest.json`: what a project is, and which of its sections are finished. It is replaced whole, never edited."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .files import FileRecord, JournalError, patiently, write_durable

FORMAT = 1
NAME = "manifest.json"
# Its folder of finished sections.
SECTIONS = "sections"
# Characters of a value that a difference shows.
SHOWN = 60


class UnreadableManifest(JournalError):
    """A manifest that is missing, damaged, or of another format."""


@dataclass(frozen=True)
class SectionRecord:
    """A finished section. index: order of making; start, stop: its latent frames; key: fingerprint of what decides it.

    fields: the same in readable words; measures: numbers taken of its pixels among their neighbours; notes: how it was
    made, without its number; seconds: wall time it took; finished: ISO time, UTC.
    """

    index: int
    start: int
    stop: int
    key: str
    file: FileRecord
    fields: dict[str, str] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    finished: str = ""

    @cached_property
    def line(self) -> bytes:
        """The index and the record as JSON, made once: the manifest is written several times for each section.

        JSON has no NaN and no infinity: those numbers are written as words.
        """
        numbers = {k: v if math.isfinite(v) else str(v) for k, v in self.measures.items()}
        return b'"%d": %b' % (self.index, _json({**asdict(self), "measures": numbers}))


class SegmentRecord(dict[str, Any]):
    """What is known of an encoded piece of video, by name: JSON values, which are replaced and never changed."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.name = name

    @property
    def size(self) -> int:
        """Bytes of its file; 0 where that is not told."""
        told = self.get("bytes")
        return told if isinstance(told, int) else 0

    @cached_property
    def line(self) -> bytes:
        """The name and the record as JSON, made once."""
        return b"%b: %b" % (_json(self.name), _json(self))


@dataclass(frozen=True)
class Manifest:
    """A project. shape: what one video must share; fields: everything else of the run, in words; plan: JSON values.

    sections: the current one of each index; takes: replaced ones; run: indices that the latest run has found or made,
    so the sections that make one video (others wait from an earlier run); segments: encoded pieces, by name.
    parent: the project this one was forked from. format: the version of this file.
    """

    name: str
    shape: dict[str, str]
    fields: dict[str, str]
    plan: dict[str, Any]
    created: str
    sections: dict[int, SectionRecord] = field(default_factory=dict)
    takes: tuple[SectionRecord, ...] = ()
    run: tuple[int, ...] = ()
    segments: dict[str, SegmentRecord] = field(default_factory=dict)
    parent: str | None = None
    format: int = FORMAT

    @property
    def finished(self) -> tuple[SectionRecord, ...]:
        """The sections of the latest run, in order of making."""
        return tuple(self.sections[i] for i in sorted(self.run) if i in self.sections)

    @property
    def named(self) -> int:
        """Bytes of all files that it names."""
        sections = sum(record.file.bytes for record in (*self.sections.values(), *self.takes))
        return sections + sum(record.size for record in self.segments.values())

    def number(self, index: int) -> int:
        """The place in the video, from 1, of the section that is made as number `index` (from 0).

        Where the plan does not list its sections' latent frames, the place in the order of making.
        """
        try:
            starts = [int(start) for start, _ in self.plan["sections"]]
            return sorted(starts).index(starts[index]) + 1
        except (KeyError, IndexError, TypeError, ValueError):
            return index + 1


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a project's folder.

    Raises UnreadableManifest where it is missing or damaged, or was written in another format; nothing is changed then.
    """
    path = folder / NAME
    try:
        text = patiently(path.read_bytes).decode("utf-8")
    except FileNotFoundError as error:
        raise UnreadableManifest(
            f"There is no project in {folder}: it has no {NAME}. Check the name in 'project'."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    try:
        data = json.loads(text)
        found = data["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        advice = "Update Frame Memory" if newer else "Open it with the version that wrote it"
        raise UnreadableManifest(
            f"{path} has format {found!r}, written by {data.get('written_by', 'an unknown version')}; this Frame "
            f"Memory reads and writes format {FORMAT}. Nothing was changed. {advice}, or choose another name for "
            "'project'."
        )
    try:
        return _decode(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def manifest_in(folder: Path) -> Manifest | None:
    """A project's manifest; None in a new folder. Sections without a manifest are never written over: refused."""
    if os.path.lexists(folder / NAME):
        return read_manifest(folder)
    if any((folder / SECTIONS).glob("*.safetensors")):
        raise UnreadableManifest(
            f"{folder} holds sections but no {NAME}. Nothing was changed. Put the file back, or choose another name "
            "for 'project' to start anew. An mp4 in the folder still plays."
        )
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest. Raises DiskFull or JournalError; the old one is then still there, whole."""
    data = encode(manifest)
    write_durable(folder / NAME, lambda file: file.write(data), hashed=False)


def encode(manifest: Manifest) -> bytes:
    """The bytes of the file: strict JSON in UTF-8, with a line for each section."""
    values = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
    data = {"format": values.pop("format"), "written_by": f"Frame Memory journal {FORMAT}", **values}
    sections = [manifest.sections[i].line for i in sorted(manifest.sections)]
    takes = [record.line.partition(b": ")[2] for record in manifest.takes]
    many = {
        "sections": (b"{\n", b",\n".join(sections), b"\n}"),
        "takes": (b"[\n", b",\n".join(takes), b"\n]"),
        "segments": (b"{", b", ".join([record.line for record in manifest.segments.values()]), b"}"),
    }
    parts = [b"{"]  # joined at once, since they are long
    for name, value in data.items():
        parts += [b",\n" if len(parts) > 1 else b"\n", _json(name), b": ", *(many.get(name) or (_json(value),))]
    return b"".join([*parts, b"\n}"])


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _json(value) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", errors="backslashreplace")  # a lone surrogate becomes JSON's escape


def _decode(data: dict) -> Manifest:
    sections = {int(i): _section(record) for i, record in data["sections"].items()}
    if any(i != record.index for i, record in sections.items()):
        raise ValueError("a section stands under another section's number")
    parent = data["parent"]
    return Manifest(
        name=str(data["name"]),
        shape=_strings(data["shape"]),
        fields=_strings(data["fields"]),
        plan=dict(data["plan"]),
        created=str(data["created"]),
        sections=sections,
        takes=tuple(_section(record) for record in data["takes"]),
        run=tuple(int(i) for i in data["run"]),
        segments={str(k): SegmentRecord(str(k), v) for k, v in data["segments"].items()},
        parent=None if parent is None else str(parent),
        format=data["format"],
    )


def _section(data: dict) -> SectionRecord:
    file = FileRecord(_inside(data["file"]["name"]), int(data["file"]["bytes"]), str(data["file"]["sha256"]))
    return SectionRecord(
        index=int(data["index"]),
        start=int(data["start"]),
        stop=int(data["stop"]),
        key=str(data["key"]),
        file=file,
        fields=_strings(data["fields"]),
        measures={str(k): float(v) for k, v in data["measures"].items()},
        notes=tuple(str(note) for note in data["notes"]),
        seconds=float(data["seconds"]),
        finished=str(data["finished"]),
    )


def _inside(name: str) -> str:
    """A file's name, if it stays inside the project: a manifest may come from somebody else."""
    posix = PurePosixPath(name)
    if posix.is_absolute() or ".." in posix.parts or "\\" in name or PureWindowsPath(name).drive or not posix.parts:
        raise ValueError(f"the file name {name!r} leads out of the project")
    return name


def _strings(data: Mapping) -> dict[str, str]:
    return {str(k): str(v) for k, v in data.items()}


def _damaged(path: Path, why: str) -> UnreadableManifest:
    return UnreadableManifest(
        f"{path} is damaged ({why}). Nothing was changed; finished sections are still in {path.parent / 'sections'}. "
        "Put a copy of the file back, or choose another name for 'project' to start anew."
    )


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What changed, one line a field, sorted: `  prompt: was 'a cat', now 'a dog'`. Empty when nothing did.

    Two fingerprints say nothing to people, so of those it is only told that they differ.
    """
    lines = []
    for name in sorted({*old, *new}):
        if name not in new:
            lines.append(f"  {name}: was {_shown(old[name], '')}, now not given")
        elif name not in old:
            lines.append(f"  {name}: was not given, now {_shown(new[name], '')}")
        elif old[name] != new[name] and _is_fingerprint(old[name]) and _is_fingerprint(new[name]):
            lines.append(f"  {name}: changed")
        elif old[name] != new[name]:
            lines.append(f"  {name}: was {_shown(old[name], new[name])}, now {_shown(new[name], old[name])}")
    return "\n".join(lines)


def _is_fingerprint(text: str) -> bool:
    """As a field holds it in place of what cannot be read; digits alone may be a seed."""
    return len(text) == 8 and set(text) <= set("0123456789abcdef") and not text.isdecimal()


def _shown(text: str, other: str) -> str:
    """The value, or of a long one the part around the first place where the two differ."""
    if len(text) <= SHOWN:
        return repr(text)
    first = next((i for i, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
    start = max(0, min(first - SHOWN // 3, len(text) - SHOWN))
    before, after = "..." if start else "", "..." if start + SHOWN < len(text) else ""
    return before + repr(text[start : start + SHOWN]) + after


def conflict(folder: Path, found: Manifest, wanted: Manifest, if_changed: str) -> str:
    """Why `wanted` cannot go on in a project, with the difference field by field; empty where it can."""
    shape, fields = difference(found.shape, wanted.shape), difference(found.fields, wanted.fields)
    foreign = wanted.parent is not None and found.parent != wanted.parent
    if not foreign and not found.sections and not found.takes:
        return ""  # a run that was stopped before its first section binds nobody
    if not shape and not foreign and (not fields or if_changed == "reuse what fits"):
        return ""
    what = "a video that this graph cannot continue" if shape else "a video made with other settings"
    table = "\n".join(part for part in (shape, fields) if part)
    reuse = "" if shape else "'reuse what fits' to keep what does not depend on them, "
    return (
        f"The project {found.name!r} ({folder}) holds {what}:\n{table}\nIts {len(found.sections)} finished sections "
        f"are kept. Set 'if_changed' to {reuse}'fork' to make this video in a project beside it, change these settings "
        "back, or choose another name for 'project'."
    )
