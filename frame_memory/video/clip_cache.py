"""Latents of training clips on disk, each in a file named by what decided it: the video's bytes, the part of it, the
size, the VAE. So a renamed video is found again, and a changed one never mistaken for what it was.

Two kinds of files: `KEY.json`, where a video has its cuts, and `KEY-FIRST-COUNT.safetensors`, the latents of COUNT
pixel frames from number FIRST on. Both appear only when they are complete. What cannot be read is made anew, and told.

Shape suffixes: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor

from ..model import tensor_file
from .files import put_in_place, reserve_part
from .shots import Stretch

# Changes with anything here or in `shots` that makes other latents or other stretches of the same video.
FORMAT = "1"
BLOCK = 2**22
FULL = (errno.ENOSPC, errno.EDQUOT)


def content_of(path: Path, interrupt: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file's bytes, read in pieces; interrupt() is called between them. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            interrupt()
            digest.update(block)
    return digest.hexdigest()


def key_of(*parts: object) -> str:
    """A file name out of everything that decides what is in it."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


class ClipCache:
    """A folder of such files. Made where it is missing; where nothing can be written, nothing is kept, and `trouble`
    says why.

    damaged: files that could not be read, with the reason, by name. read, written: latents found and made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.damaged: dict[str, str] = {}
        self.trouble = ""
        self.read = self.written = 0

    def stretches(self, key: str) -> list[Stretch] | None:
        """What was found of a video's cuts; None where that is not known."""
        path = self.folder / f"{key}.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["stretches"]
            found = [Stretch(int(start), int(stop), float(motion)) for start, stop, motion in rows]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.damaged[path.name] = f"not a list of stretches ({type(error).__name__})"
            return None
        joined = [found[0].start, *(s.stop for s in found)] if found else [1]
        if joined[0] != 0 or [s.start for s in found] != joined[:-1] or joined != sorted(set(joined)):
            self.damaged[path.name] = "its stretches do not follow each other"
            return None
        return found

    def keep_stretches(self, key: str, name: str, found: list[Stretch]) -> None:
        """Write a video's cuts down. name: of the video, for people who look into the folder."""
        text = json.dumps({"video": name, "stretches": [astuple(stretch) for stretch in found]}, ensure_ascii=False)
        self._write(self.folder / f"{key}.json", lambda part: part.write_text(text, encoding="utf-8"))

    def path(self, key: str, first: int, count: int) -> Path:
        """The file of `count` pixel frames from number `first` on."""
        return self.folder / f"{key}-{first:06d}-{count}.safetensors"

    def latents(self, path: Path, frames: int) -> Tensor | None:
        """The latents [1,C,T,H,W] in a file, `frames` of them, mapped into memory; None where they must be made."""
        if not path.is_file():
            return None
        try:
            entries, about = tensor_file.read_header(str(path))
            samples_BCTHW = entries["samples"].mapped()
            if samples_BCTHW.ndim != 5 or samples_BCTHW.shape[:3:2] != (1, frames):
                raise ValueError(f"latents of shape {tuple(samples_BCTHW.shape)}, expected {frames} frames")
            if about.get("crc32") != _checksum(samples_BCTHW):
                raise ValueError("its numbers are not the ones that were written")
            if not is_finite(samples_BCTHW):
                raise ValueError("it holds NaN or infinite numbers")
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            reason = str(error).split(". ")[0].replace(f"{path}", "it")
            self.damaged[path.name] = reason or type(error).__name__
            return None
        self.read += 1
        return samples_BCTHW

    def keep(self, path: Path, samples_BCTHW: Tensor, about: dict[str, str]) -> Tensor:
        """Write latents and return them as they now lie in the file; as they are where it cannot be written."""
        samples_BCTHW = samples_BCTHW.detach().to("cpu", torch.float32).contiguous()
        self.written += 1
        metadata = {**about, "format": "Frame Memory training clip", "crc32": _checksum(samples_BCTHW)}

        def write(part: Path) -> None:
            with part.open("wb") as file:
                tensor_file.write_to(file, {"samples": samples_BCTHW}, metadata)

        if not self._write(path, write):
            return samples_BCTHW
        try:
            return tensor_file.read_header(str(path))[0]["samples"].mapped()
        except (OSError, RuntimeError, tensor_file.FileError):
            return samples_BCTHW

    def _write(self, path: Path, write) -> bool:
        """Whether a file was written, whole, under its name."""
        part = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = reserve_part(path)
            write(part)
            put_in_place(part, path)
        except OSError as error:
            what = "the disk is full" if error.errno in FULL else error.strerror or type(error).__name__
            self.trouble = f"{self.folder} cannot be written to ({what}), so what is made now is made again next time"
            return False
        finally:
            if part is not None:
                part.unlink(missing_ok=True)
        return True


def is_finite(samples_BCTHW: Tensor) -> bool:
    """Whether all numbers are; looked at frame by frame, since latents of a minute are large."""
    return all(bool(torch.isfinite(frame_BCHW).all()) for frame_BCHW in samples_BCTHW.unbind(2))


def _checksum(samples_BCTHW: Tensor) -> str:
    """CRC of the numbers' bytes."""
    flat = samples_BCTHW.detach().reshape(-1).view(torch.uint8).numpy()
    crc = 0
    for start in range(0, len(flat), BLOCK):
        crc = zlib.crc32(memoryview(flat[start : start + BLOCK]), crc)
    return f"{crc:08x}"
