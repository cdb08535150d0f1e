"""Files that are whole or absent, names every system accepts, and errors that say what is kept.

A file is written under a temporary name beside its place, flushed, renamed, and its folder flushed. Whenever the
process or the power fails, the place holds the old file or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import BinaryIO, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# End of every temporary name: `.<name>.<token>.part`.
PART = ".part"
# Seconds to keep trying while another program has a file open; on Windows that blocks renaming and deleting.
PATIENCE = 10.0 if os.name == "nt" else 0.5
# Whether a folder can be flushed. Where not, a renamed file is flushed once more under its new name.
FOLDERS_FLUSH = os.name != "nt"
# Bytes asked for beyond what the files themselves need: the manifest, a temporary copy, the file system's own.
MARGIN = 16 * 2**20
# Characters of a project's name, so that the longest path inside still fits where 260 is the limit.
MAX_NAME = 64
CHUNK = 8 * 2**20
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EHOSTDOWN}
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
_RESERVED |= {f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789\u00b9\u00b2\u00b3"}

Result = TypeVar("Result")


class JournalError(RuntimeError):
    """What stopped the journal: the path, the cause, what is kept, and what to change."""


class DiskFull(JournalError):
    """There is no room for a file; nothing that was finished is touched."""


@dataclass(frozen=True)
class FileRecord:
    """A finished file. name: posix path relative to the project; bytes: its length; sha256: hex, of its contents."""

    name: str
    bytes: int
    sha256: str


class _Sink(io.RawIOBase):
    """Writes straight to a descriptor, whatever part of a write the system takes, and hashes what went out if asked."""

    def __init__(self, fd: int, hashed: bool) -> None:
        super().__init__()
        self._fd, self.bytes, self._hash = fd, 0, hashlib.sha256() if hashed else None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            part = view[done : done + CHUNK]
            count = os.write(self._fd, part)
            if self._hash is not None:
                self._hash.update(part[:count])
            done += count
        self.bytes += done
        return done

    @property
    def sha256(self) -> str:
        return "" if self._hash is None else self._hash.hexdigest()


def write_durable(path: Path, write: Callable[[BinaryIO], object], *, hashed: bool = True) -> tuple[int, str]:
    """Write a file that appears at `path` only when it is complete and on the disk; returns (bytes, sha256 if hashed).

    `write` gets an unbuffered binary file (no seeking). The folder must exist: a vanished one is never made anew, it
    may be a drive that is gone. On any failure, an interrupt included, the temporary file is removed and `path` keeps
    what it held. Raises DiskFull or JournalError.
    """
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}{PART}")
    sink = None
    try:
        with _removed_on_failure(temporary):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                sink = _Sink(fd, hashed)
                write(sink)  # type: ignore[arg-type]
                flush_file(fd)
            finally:
                os.close(fd)
            patiently(lambda: os.replace(temporary, path))
        flush_rename(path)
    except OSError as error:
        raise explained(error, path, sink and _size_of(write)) from error
    return sink.bytes, sink.sha256


def _size_of(write: Callable[[BinaryIO], object]) -> int | None:
    """Bytes that `write` writes, by letting it write to nowhere; None where it cannot be asked twice."""
    nowhere = _Nowhere()
    try:
        write(nowhere)  # type: ignore[arg-type]
    except Exception:
        return None
    return nowhere.bytes


class _Nowhere(io.RawIOBase):
    """Counts what is written."""

    bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        count = memoryview(data).nbytes
        self.bytes += count
        return count


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise


def move_durable(source: Path, target: Path) -> None:
    """Rename within one disk, replacing `target`; both folders are flushed. Raises DiskFull or JournalError."""
    try:
        patiently(lambda: os.replace(source, target))
        flush_rename(target, source.parent)
    except OSError as error:
        raise explained(error, target) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, so that a power loss keeps them. Raises DiskFull or JournalError."""
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
            flush_folder(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(path))
    except OSError as error:
        raise explained(error, path) from error


def flush_file(fd: int) -> None:
    """Down to the disk itself: macOS needs its own call for that, and some network folders know no flush at all."""
    try:
        if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # pyright: ignore[reportAttributeAccessIssue]
                return
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED - {errno.EACCES, errno.EBADF}:
            raise


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last through a power loss, where the system has a way to."""
    if not FOLDERS_FLUSH:
        return
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder one may write to but not list
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def flush_rename(path: Path, left: Path | None = None) -> None:
    """Make the new name of a renamed file last. left: the folder it came from, if another one."""
    if FOLDERS_FLUSH:
        for folder in dict.fromkeys((path.parent, left or path.parent)):
            flush_folder(folder)
        return
    with contextlib.suppress(PermissionError):  # another program reads it; the system writes its log soon after
        fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def patiently(action: Callable[[], Result]) -> Result:
    """Run `action`, and again while it raises PermissionError, for PATIENCE seconds: readers and scanners let go."""
    start, pause = time.monotonic(), 0.01
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() - start >= PATIENCE:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def explained(error: OSError, path: Path, needed: int | None = None) -> JournalError:
    """An error of the system as one that says what is kept and what to do. needed: bytes of the file, if known."""
    kept = "What was there before, and every section finished earlier, is kept."
    why = error.strerror or type(error).__name__
    if error.errno in _FULL or getattr(error, "winerror", None) in (39, 112):
        free = "an unknown number of"
        with contextlib.suppress(OSError):
            free = str(shutil.disk_usage(path.parent).free)
        size = "" if needed is None else f"it needs {needed} bytes, "
        return DiskFull(
            f"The disk is full: {path} could not be written ({why}; {size}{free} bytes are free in {path.parent}). "
            f"{kept} Free some space and queue the same graph again: it continues there."
        )
    if error.errno == errno.EROFS or isinstance(error, PermissionError):
        cause, advice = f"{why}: it is read-only, or open in another program", "Close that program, or allow writing"
    elif error.errno in _GONE:
        cause, advice = f"{why}: its folder or drive is gone or unreadable", "Connect it again, or choose another one"
    else:
        cause, advice = why, "Choose another output folder if this lasts"
    return JournalError(f"{path} could not be written ({cause}). {kept} {advice}, and queue the same graph again.")


def sha256_of(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file's contents, read in pieces. Raises OSError."""
    digest, count = hashlib.sha256(), 0
    with patiently(lambda: open(path, "rb", buffering=0)) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            count += len(piece)
    return count, digest.hexdigest()


def verify(folder: Path, record: FileRecord) -> str | None:
    """None when the file has the length and the hash that were recorded, else the reason in words."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{record.name} is {size} bytes, expected {record.bytes}"
        if sha256_of(path)[1] != record.sha256:
            return f"{record.name} holds other bytes than were written (its hash differs)"
    except FileNotFoundError:
        return f"{record.name} is missing"
    except OSError as error:
        return f"{record.name} cannot be read ({error.strerror or error})"
    return None


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskFull, with both numbers, if the disk of `folder` has less than `needed` bytes and MARGIN free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise explained(error, folder) from error
    if free < needed + MARGIN:
        raise DiskFull(
            f"{what} needs {megabytes(needed + MARGIN)} ({needed + MARGIN} bytes) in {folder}, which has "
            f"{megabytes(free)} ({free} bytes) free. Nothing was started. Free some space, make the video shorter or "
            "smaller, or choose another output folder."
        )


def megabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.1f} MB"


def sweep(folder: Path) -> list[str]:
    """Remove temporary files that a killed process left in a project; returns their names. Needs the project's lock.

    Videos and pictures too: in a project they are made of its sections, and made again where they are missing.
    """
    swept = []
    videos = [*folder.glob(f"*{PART}*"), *folder.glob(f"segments/*{PART}*")]
    ours = re.compile(rf"(preview|contact_sheet|\d+-\d+|{re.escape(folder.name)}(-unfinished)?)\{PART}\d*\.(mp4|png)")
    torn = [path for path in videos if ours.fullmatch(path.name)]
    for path in sorted([*folder.glob(f".*{PART}"), *folder.glob(f"*/.*{PART}"), *torn]):
        with contextlib.suppress(OSError):  # one that cannot be removed does no harm
            os.remove(path)
            swept.append(path.relative_to(folder).as_posix())
    return swept


def extended(path: Path) -> Path:
    """On Windows, the form of a long path that is exempt from the limit of 260 characters; elsewhere the same path."""
    return Path(extended_windows(path)) if isinstance(path, PureWindowsPath) else path


def extended_windows(path: PurePath, reserve: int = 140) -> str:
    r"""An absolute Windows path, with `\\?\` before it where fewer than `reserve` of 260 characters are left."""
    text = str(PureWindowsPath(path))
    if len(text) + reserve < 260 or text.startswith("\\\\?\\"):
        return text
    return "\\\\?\\UNC\\" + text[2:] if text.startswith("\\\\") else "\\\\?\\" + text


def safe_name(text: str) -> str:
    """A project's name as a folder name that Windows, macOS and Linux accept. Letters of any language are kept.

    Separators, control characters and `<>:"|?*` become `_`; dots and spaces at the ends go; reserved names (`CON`,
    `com1.x`) get a `_`; a long name is cut and ends in a hash of the whole. A result is its own safe name.
    Raises JournalError, with the nearest valid name, for an empty name and for one that leads out of the folder.
    """
    name = _tidy(text)
    leads_out = PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor
    if leads_out or set(re.split(r"[\\/]", text)) & {".", ".."}:
        reason = f"{text!r} leads out of the output folder"
    elif not name.strip():
        reason = f"{text!r} is empty"
    else:
        return name
    nearest = name if name.strip() else "video"
    raise JournalError(f"The project's name {reason}; expected a folder name, like {nearest!r}. Change 'project'.")


def _tidy(text: str) -> str:
    """The nearest name that every system accepts; empty where nothing is left."""
    text = unicodedata.normalize("NFC", text)
    bad = ("Cc", "Cs", "Cn", "Zl", "Zp")
    text = "".join("_" if c in '<>:"/\\|?*' or unicodedata.category(c) in bad else c for c in text).strip(" .")
    stem, dot, rest = text.partition(".")
    if stem.rstrip(" ").upper() in _RESERVED:
        text = f"{stem.rstrip(' ')}_{dot}{rest}"
    if len(text) > MAX_NAME or len(text.encode()) > 2 * MAX_NAME:
        cut = text.encode()[: 2 * MAX_NAME - 8].decode(errors="ignore")[: MAX_NAME - 8].strip(" .")
        text = f"{cut}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return text
