"""Safetensors files read and written one tensor at a time, with plain words for files that are not what they say.

Bytes go straight from the file into the tensor that is kept: no memory map is left behind, so the RAM in use
is what has been loaded and nothing else. Nothing in a file is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .sources import LOAD_MODEL, get_it_again, page_of

MAX_HEADER = 100_000_000  # bytes, the format's own limit
SAFETENSORS = (".safetensors", ".sft")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes that are brought into order at once, of a tensor whose numbers do not lie in order.
PIECE = 8 * 2**20


class FileError(ValueError):
    """A file that cannot be read or written as safetensors; the message names the path and what it really is."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor's bytes lie. start, stop: bytes from the beginning of the file."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def read_into(self, out: Tensor) -> None:
        """Fill `out` (contiguous, same dtype and count of elements) from the file."""
        view = bytes_of(out)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            got = file.readinto(view) if len(view) else 0
        if got != len(view):
            raise FileError(f"{self.path} ended in the middle of a tensor: it changed while it was read.")

    def read(self) -> Tensor:
        """The tensor, newly allocated."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def mapped(self) -> Tensor:
        """The tensor as the system maps it into memory when it is used; writing to it changes a private copy.

        Read like any other where its bytes do not lie as the numbers need it, which `write` never does.
        """
        size = self.dtype.itemsize
        if self.start % size or self.start == self.stop:
            return self.read()
        count = os.path.getsize(self.path) // size
        numbers = torch.from_file(self.path, shared=False, size=count, dtype=self.dtype)
        return numbers[self.start // size : self.stop // size].view(self.shape)


class StoredTensor(Tensor):
    """A tensor that stays on disk until an operation needs its numbers; shape and dtype are known at once.

    Any operation on it reads the numbers anew, and keeps nothing: `parameter.copy_(stored)` holds one tensor
    of the file in RAM at a time, which is how a network is filled without a second copy of the file.
    read_into: fills a given contiguous tensor of the same shape and dtype, for a part of a larger one.
    """

    load: Callable[[], Tensor]
    read_into: Callable[[Tensor], object]

    @staticmethod
    def __new__(cls, load: Callable[[], Tensor], shape: Iterable[int], dtype: torch.dtype, read_into=None):
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device="cpu")
        self.load = load
        self.read_into = read_into or (lambda out: out.copy_(load()))
        return self

    def __init__(self, *args):
        pass

    def __repr__(self):
        return f"StoredTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(StoredTensor, lambda t: t.load(), (args, kwargs or {}))
        return func(*args, **kwargs)


def real(value: Tensor) -> Tensor:
    """The numbers of a stored tensor; any other tensor as it is."""
    return value.load() if isinstance(value, StoredTensor) else value


def read_header(path: str, node: str = LOAD_MODEL) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor's place, and the file's metadata. node: display name of the node that the file was chosen in.

    Raises FileError, in plain words, for anything that is not a complete safetensors file: an empty or cut-off
    file, a Git-LFS pointer, a web page, a pickle under any name, a GGUF file.
    """
    again = get_it_again(path, node)
    if not os.path.isfile(path):
        raise FileError(f"There is no file at {path}. {again}")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
        _refuse_foreign(path, size, head, node)
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER or length < 2:
            raise FileError(
                f"{path} is not a safetensors file: its first 8 bytes say that the header is {length} bytes long "
                f"(at most {MAX_HEADER}). It may be a .ckpt or .pt file with a changed name. {again}"
            )
        if 8 + length > size:
            raise _truncated(path, size, 8 + length, again)
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        entries = {name: _entry(path, info, 8 + length, again) for name, info in header.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} has a damaged safetensors header ({error}). {again}") from error
    end = max((e.stop for e in entries.values()), default=8 + length)
    if end > size:
        raise _truncated(path, size, end, again)
    return entries, metadata


def read(path: str, node: str = LOAD_MODEL) -> dict[str, Tensor]:
    """All tensors of a file, in RAM. Raises FileError as `read_header` does; nothing is ever unpickled."""
    return {name: entry.read() for name, entry in read_header(path, node)[0].items()}


def _entry(path: str, info: Mapping, base: int, again: str) -> Entry:
    if info["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise FileError(f"{path} holds numbers of the type {info['dtype']}, which is not one of {known}. {again}")
    dtype, shape = DTYPES[info["dtype"]], tuple(int(n) for n in info["shape"])
    start, stop = (int(n) for n in info["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} cannot lie in bytes {start} to {stop}")
    return Entry(path, dtype, shape, base + start, base + stop)


def _truncated(path: str, size: int, expected: int, again: str) -> FileError:
    return FileError(
        f"{path} is {size} bytes, expected {expected}: it looks like an interrupted download or copy. {again}"
    )


def _refuse_foreign(path: str, size: int, head: bytes, node: str) -> None:
    """Say what a file really is by its first bytes, without opening it as that."""
    again, page = get_it_again(path, node), page_of(path)
    if size == 0:
        raise FileError(f"{path} is empty (0 bytes): the download or copy failed. {again}")
    if head.startswith(b"version https://git-lfs"):
        wanted = next((line.split()[1].decode() for line in head.splitlines() if line.startswith(b"size ")), "more")
        raise FileError(
            f"{path} is {size} bytes, expected {wanted}: it is a Git-LFS pointer, a note that stands for the real "
            f"file. Run 'git lfs pull' in the folder it came from. Or: {again}"
        )
    if head.startswith(b"GGUF"):
        raise FileError(
            f"{path} is a GGUF file, which '{node}' does not read. Use a GGUF loader node: it reads FramePack files in "
            f"the native layout, which '{LOAD_MODEL}' can save."
        )
    # The length of a header can begin as a pickle does (1408 bytes) or as a web page (15392); what follows it does not.
    header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER
    if head.lstrip()[:1] == b"<" and not header:
        raise FileError(f"{path} is a web page, not a model: the download was refused or redirected. {again}")
    zip_file, pickled = head.startswith(b"PK\x03\x04"), head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"
    pickled = (zip_file or pickled) and not header
    if pickled or not path.lower().endswith(SAFETENSORS):
        what = "a PyTorch pickle (.ckpt, .pt, .bin)" if pickled else "not a .safetensors file"
        raise FileError(
            f"{path} is {what}. Such files can run programs when they are opened, so this one was not opened. "
            f"Choose its .safetensors version{f' from {page}' if page else ''} in '{node}'. Or convert it in a place "
            "you trust: load it with torch.load(path, weights_only=True), write it with safetensors.torch.save_file."
        )
    if size < 8:
        raise _truncated(path, size, 8, again)


def pieces(value: Tensor) -> Iterator[Tensor]:
    """Contiguous tensors whose bytes, one behind the other, are those of `value`, row-major.

    What lies in order is given as it is; copies are of PIECE bytes at most, so a video that the system maps into memory
    with its axes turned is never there as a whole.
    """
    size = value.numel() * value.dtype.itemsize
    if value.is_contiguous() or size <= PIECE:
        yield value.contiguous()
        return
    rows = PIECE * len(value) // size
    if rows:
        yield from (part.contiguous() for part in value.split(rows))
    else:
        for row in value:
            yield from pieces(row)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, as bytes."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; `path` appears only when it is complete and on the disk.

    Stored tensors are read and written one at a time. Raises FileError where the disk is too full (before
    anything is written), or the place cannot be written; what was at `path` before is then still there.
    """
    head, order, size = _layout(tensors, metadata)
    folder = os.path.dirname(os.path.abspath(path))
    part = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.part")
    try:
        free = shutil.disk_usage(folder).free
        if free < size:
            raise FileError(f"{path} needs {size} bytes, but {folder} has {free} bytes free.")
        with open(part, "wb") as file:
            _write_parts(file, head, order, tensors)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error}. Choose another folder or free the file.") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def write_to(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the bytes of a safetensors file to an open one; the caller sees to it that it is complete and flushed."""
    head, order, _ = _layout(tensors, metadata)
    _write_parts(file, head, order, tensors)


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str], int]:
    """The file's first bytes, the order of the tensors behind them, and the bytes of the whole."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {str(k): str(v) for k, v in metadata.items()}}
    offset = 0
    for name in order:
        value = tensors[name]
        stop = offset + value.numel() * value.dtype.itemsize
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, order, len(head) + offset


def _write_parts(file: BinaryIO, head: bytes, order: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    file.write(head)
    for name in order:
        for piece in pieces(real(tensors[name]).detach().cpu()):
            file.write(bytes_of(piece))
