"""Files of models/frame_memory: memories and Direct Forcing weights, and what says which base they belong to.

Safetensors only, written at once or not at all. A file holds `semantic_pack.*` (the memory's network) and/or `head.*`
(the base's last modulation and output layer, core's names), or `frame_preservation.*` (encoders of frame preservation)
alone, and in its metadata the base it was trained on. A head alone, in diffusers' or in core's names and without our
metadata, is read too.
Source: design.md section 7, reference/memorypack.md sections 1.1 and 3.2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import tensor_file
from .base_signature import Base, Signature
from .key_map import GLOBAL_ROWS, is_diffusers, is_native, swap_halves
from .sources import LOAD_MODEL, WAN_CONTEXT

FOLDER = "frame_memory"
FORMAT = "1"
SEMANTIC_PACK, DIRECT_FORCING, FRAME_PRESERVATION = "semantic_pack", "direct_forcing", "frame_preservation"
KINDS = (SEMANTIC_PACK, DIRECT_FORCING, FRAME_PRESERVATION)
REPLACEMENT, DIFFERENCE = "replacement", "difference"
PACK_PREFIX, HEAD_PREFIX, FRAMES_PREFIX = "semantic_pack.", "head.", "frame_preservation."
HEAD_ROWS = tuple(row for row in GLOBAL_ROWS if row.target.startswith("final_layer."))
HEAD = tuple(f"{row.target}.{param}" for row in HEAD_ROWS for param in row.params)
PREFIXES = (PACK_PREFIX, HEAD_PREFIX, FRAMES_PREFIX)
LOAD_MEMORY, LOAD_DIRECT_FORCING = "Load Memory Encoder", "Load Direct Forcing Checkpoint"
OURS = "frame_memory."
# Of wan_file.py: tensors that only its node reads.
WAN_PREFIX = "wan_frame_context."
NAMED = 3


class MemoryFileError(ValueError):
    """A file of models/frame_memory that cannot be used, or belongs to another base."""


@dataclass(frozen=True)
class MemoryFile:
    """What a file holds, in RAM.

    kind: one of KINDS. base: what it was trained on; None where the file does not say.
    head: the four tensors of HEAD by core's names, or empty; head_form: REPLACEMENT or DIFFERENCE.
    pack: SemanticPack's tensors without prefix, frames: those of frame preservation, or empty. spec: what the two are
    made of, as plain data.
    recipe: how it was trained, as plain data. source: the names it was found in, for reports.
    """

    path: str
    kind: str
    base: Base | None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    head_form: str = REPLACEMENT
    pack: Mapping[str, Tensor] = field(default_factory=dict)
    frames: Mapping[str, Tensor] = field(default_factory=dict)
    spec: Mapping | None = None
    recipe: Mapping = field(default_factory=dict)
    licence: str = ""
    source: str = "Frame Memory"

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def check_base(self, base: Base, node: str) -> str:
        """Raise MemoryFileError, naming both fingerprints, unless the file belongs to `base`; else say how it was told.

        base: of the MODEL at hand (`Base.of`). node: display name of the node that the file was chosen in. A file that
        does not name its base is judged by the width of its head only, and the returned sentence says so.
        """
        if self.base is None:
            self._check_width(base, node)
            return "The file does not say which base it was trained on; only its width could be compared."
        wrong = self.base.difference(base)
        if wrong:
            raise MemoryFileError(
                f"{self.name} was trained on another base than this MODEL: {wrong}. The file's base is {self.base}; "
                f"this MODEL is {base}. Load the base that the file was trained on in '{LOAD_MODEL}', or choose a file "
                f"for this one in '{node}'."
            )
        return self.base.certainty(base)

    def _check_width(self, base: Base, node: str) -> None:
        hidden = base.topology.get("hidden")
        given = next((int(v.shape[1]) for k, v in self.head.items() if v.ndim == 2), hidden)
        if given != hidden:
            raise MemoryFileError(
                f"{self.name} is a head for a network {given} wide, and this MODEL is {hidden} wide. The file does not "
                f"name its base; this MODEL is {base}. Choose a file for this base in '{node}'."
            )


def write(
    path: str,
    base: Base,
    *,
    pack: Mapping[str, Tensor] | None = None,
    frames: Mapping[str, Tensor] | None = None,
    spec: Mapping | None = None,
    head: Mapping[str, Tensor] | None = None,
    head_form: str = REPLACEMENT,
    recipe: Mapping | None = None,
    licence: str = "",
) -> None:
    """Write a file of models/frame_memory; `path` appears, or is replaced, only when all of it is on the disk.

    pack: SemanticPack's state dict, frames: PreservedHistory's, with what they are made of as JSON-able data in `spec`.
    head: tensors by the names of HEAD. The kind follows from the parts; frames stand alone. Tensors may lie on any
    device. Raises MemoryFileError for parts that do not make a file, FileError (tensor_file) where the disk refuses.
    """
    pack, frames, head = dict(pack or {}), dict(frames or {}), dict(head or {})
    if not path.lower().endswith(".safetensors"):
        raise MemoryFileError(f"Memory files are .safetensors files, not {os.path.basename(path)}.")
    if head and set(head) != set(HEAD):
        raise MemoryFileError(f"A head is the tensors {', '.join(HEAD)}, not {', '.join(sorted(head))}.")
    if bool(pack or frames) != (spec is not None) or not (pack or frames or head) or (frames and (pack or head)):
        raise MemoryFileError(
            "A memory file needs a head, or a pack together with its spec, or both; or frame preservation with its "
            "spec, alone."
        )
    if head_form not in (REPLACEMENT, DIFFERENCE):
        raise MemoryFileError(f"A head is a '{REPLACEMENT}' or a '{DIFFERENCE}', not '{head_form}'.")
    parts = {PACK_PREFIX: pack, HEAD_PREFIX: head, FRAMES_PREFIX: frames}
    tensors = {prefix + k: v for prefix, part in parts.items() for k, v in part.items()}
    check_finite(path, tensors)
    said = {
        "format": FORMAT,
        "kind": DIRECT_FORCING if head else FRAME_PRESERVATION if frames else SEMANTIC_PACK,
        **base.to_metadata(),
        "spec": json.dumps(dict(spec)) if spec is not None else "",
        "head": head_form if head else "",
        "recipe": json.dumps(dict(recipe or {})),
        "licence": licence,
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    tensor_file.write(path, tensors, {**{OURS + k: v for k, v in said.items() if v}, "format": "pt"})


def read(path: str, node: str = LOAD_DIRECT_FORCING) -> MemoryFile:
    """Read a file of models/frame_memory into RAM. node: display name of the node that it was chosen in.

    Raises FileError for a file that is damaged or no safetensors file (nothing is unpickled), MemoryFileError for one
    that is whole but holds something else, a newer format, or numbers that are not finite.
    """
    entries, metadata = tensor_file.read_header(path, node)
    said = {k.removeprefix(OURS): v for k, v in metadata.items() if k.startswith(OURS)}
    if not any(name.startswith(PREFIXES) for name in entries):
        _refuse_other_files(path, entries, node)
        bare = _bare_head(entries, path, node)
        check_finite(path, bare[0])
        form = DIFFERENCE if said.get("head") == DIFFERENCE else REPLACEMENT
        return MemoryFile(path, DIRECT_FORCING, None, bare[0], form, licence=said.get("licence", ""), source=bare[1])
    check_format(path, said, node)
    tensors = {name: entry.read() for name, entry in entries.items()}
    check_finite(path, tensors)
    head, pack, frames = (
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in (HEAD_PREFIX, PACK_PREFIX, FRAMES_PREFIX)
    )
    base = Base.from_metadata(said)
    if base is None:
        raise damaged(path, "its metadata does not say which base it was trained on", node)
    left = [k for k in tensors if not k.startswith(PREFIXES)]
    if left or (head and set(head) != set(HEAD)):
        odd = left or sorted(set(head) ^ set(HEAD))
        raise damaged(path, f"its tensors are not those of the format: {shown(odd)}", node)
    return MemoryFile(
        path=path,
        kind=said["kind"],
        base=base,
        head=head,
        head_form=said.get("head", REPLACEMENT),
        pack=pack,
        frames=frames,
        spec=plain_data(path, said, "spec", node) if pack or frames else None,
        recipe=plain_data(path, said, "recipe", node) if "recipe" in said else {},
        licence=said.get("licence", ""),
    )


def kind_said(path: str) -> str:
    """The kind that a file's metadata names: one of KINDS or a kind of another module; empty where none can be read."""
    try:
        return tensor_file.read_header(path)[1].get(f"{OURS}kind", "")
    except (tensor_file.FileError, OSError):
        return ""


def check_format(path: str, said: Mapping[str, str], node: str, kinds: Sequence[str] = KINDS) -> None:
    """Raise MemoryFileError unless a file's metadata (without prefix) is of our format and of one of `kinds`."""
    if said.get("format") != FORMAT:
        given = said.get("format")
        newer = f"has format version {given}, this pack reads {FORMAT}. Update Frame Memory" if given else (
            f"says no format version in its metadata ({OURS}format), which some tools drop when they copy a file. "
            "Use the file as it was written"
        )  # fmt: skip
        raise MemoryFileError(f"{path} {newer}, or choose another file in '{node}'.")
    wanted = {"kind": tuple(kinds), "head": (REPLACEMENT, DIFFERENCE)}
    for key, allowed in wanted.items():
        if (key == "kind" or key in said) and said.get(key) not in allowed:
            raise damaged(path, f"{OURS}{key} is '{said.get(key)}', expected one of {', '.join(allowed)}", node)


def plain_data(path: str, said: Mapping[str, str], key: str, node: str) -> dict:
    """A mapping that a file's metadata holds as JSON. Raises MemoryFileError."""
    try:
        value = json.loads(said[key])
        if not isinstance(value, dict):
            raise TypeError(f"it is a {type(value).__name__}")
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(path, f"{OURS}{key} in its metadata cannot be read ({error})", node) from error
    return value


def damaged(path: str, what: str, node: str) -> MemoryFileError:
    """The error for a file that is not what it says."""
    return MemoryFileError(f"{path} is damaged: {what}. Write it anew, or choose another file in '{node}'.")


def check_finite(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise MemoryFileError for NaN or infinity."""
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v.float()).all())]
    if bad:
        raise MemoryFileError(
            f"{path}: {shown(bad)} hold numbers that are not finite (NaN or infinity): the training that made them "
            "went wrong, and every video would be black. Use an earlier checkpoint of it."
        )


def shown(names: list[str]) -> str:
    """The first few names, for people."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _refuse_other_files(path: str, keys: Mapping, node: str) -> None:
    """Say what a file is that holds no tensors of ours: a whole checkpoint, a LoRA, another model."""
    bare = [k.split("diffusion_model.")[-1].removeprefix("transformer.") for k in keys]
    looks = ""
    if any(k.startswith(WAN_PREFIX) for k in keys):
        looks = f"It holds patchifiers for Wan, which go into '{WAN_CONTEXT}'"
    elif any(".lora_" in k or k.startswith("lora_") for k in keys):
        looks = "It looks like a LoRA, which goes into 'Load Video LoRA'"
    elif is_diffusers(bare) or is_native(bare):
        looks = f"It looks like a whole model, which goes into '{LOAD_MODEL}'"
    if looks:
        raise MemoryFileError(f"{path} holds no memory and no head. {looks}; choose another file in '{node}'.")


def _bare_head(entries: Mapping[str, tensor_file.Entry], path: str, node: str) -> tuple[dict[str, Tensor], str]:
    """(the four tensors of HEAD, the names they were found in) of a file that holds a head and nothing else.

    Nothing of another file is read but its names. diffusers' norm_out.linear has its rows as [scale; shift], core's
    modulation as [shift; scale].
    """
    for source, style in ((0, "diffusers"), (1, "ComfyUI")):
        found: dict[str, tuple[str, bool]] = {}
        for row in HEAD_ROWS:
            for param in row.params:
                name = f"{(row.sources[0], row.target)[source]}.{param}"
                key = next((k for k in entries if k == name or k.endswith("." + name)), None)
                if key is not None:
                    found[f"{row.target}.{param}"] = key, row.swap_halves and source == 0
        if set(found) == set(HEAD) and {key for key, _ in found.values()} == set(entries):
            read = {name: (entries[key].read(), swap) for name, (key, swap) in found.items()}
            out = {name: swap_halves(value) if swap else value for name, (value, swap) in read.items()}
            return out, f"{style} names, without Frame Memory's metadata"
    wanted = ", ".join(f"{row.sources[0]}.{param}" for row in HEAD_ROWS for param in row.params)
    raise MemoryFileError(
        f"{path} holds {shown(list(entries)) or 'nothing'}. Expected a file that Frame Memory wrote, or a head alone "
        f"({wanted}, or the same in ComfyUI's names: {', '.join(HEAD)}). Choose another file in '{node}'."
    )


__all__ = ["HEAD", "Base", "MemoryFile", "MemoryFileError", "Signature", "read", "write"]
