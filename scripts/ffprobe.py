"""Finds ffprobe, with which the tests look at every kind of written video, and installs it where that may be done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from scripts import packages


def find() -> str | None:
    """The path of ffprobe, or None. FRAME_MEMORY_FFPROBE names one outright."""
    named = os.environ.get("FRAME_MEMORY_FFPROBE")
    if named:
        return named if Path(named).is_file() else None
    return shutil.which("ffprobe")


def find_or_install(say: Callable[[str], None]) -> str | None:
    """``find``, after an ``apt-get install ffmpeg`` where nothing was found and that may be run."""
    found = find()
    if found or os.environ.get("FRAME_MEMORY_FFPROBE"):
        return found
    packages.install("ffmpeg", "the tests of written videos (ffprobe)", say)
    return find()
