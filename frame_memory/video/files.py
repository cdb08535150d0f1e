"""A finished file gets its name in one step: reserved beside it, flushed to disk, renamed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from pathlib import Path

LOCKED_TRIES = 20
# Windows refuses to replace a file that a player has open; two seconds outlast a preview that is being read.
LOCKED_WAIT = 0.1

log = logging.getLogger(__name__)


def full_words(folder: Path) -> str:
    """That the disk of a folder is full, with the bytes that are free on it."""
    try:
        free = str(shutil.disk_usage(folder).free)
    except OSError:
        free = "an unknown number of"
    return f"The disk of {folder} is full ({os.strerror(errno.ENOSPC)}; {free} bytes are free)"


def reserve_part(path: Path) -> Path:
    """Create the temporary file of `path` under a free name: an earlier one may be all that is left of a render."""
    for number in range(1, 10_000):
        part = path.with_name(f"{path.stem}.part{'' if number == 1 else number}{path.suffix}")
        try:
            part.open("xb").close()
        except FileExistsError:
            continue
        return part
    raise FileExistsError(errno.EEXIST, f"9999 unfinished files named {path.stem}.part*{path.suffix} are in the way")


def put_in_place(part: Path, path: Path) -> None:
    """Flush a complete file to disk and give it its name, replacing what is there. Raises OSError."""
    flush_to_disk(part)
    for tries in range(1, LOCKED_TRIES + 1):
        try:
            os.replace(part, path)
            break
        except PermissionError:
            if tries == LOCKED_TRIES:
                raise
            time.sleep(LOCKED_WAIT)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder where the system has that (not on Windows)."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Network and FUSE folders may refuse to be flushed; the file itself must not.
        if not folder:
            raise
        log.debug("folder %s cannot be flushed: %s", path, error)
    finally:
        os.close(handle)
