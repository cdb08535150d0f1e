"""Finds an installed Chromium for the browser tests, and installs one where the system's package manager may."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from scripts import packages

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
MAC = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
WINDOWS = (
    "Google/Chrome/Application/chrome.exe",
    "Chromium/Application/chrome.exe",
    "Microsoft/Edge/Application/msedge.exe",
)


def find() -> str | None:
    """The path of a Chromium, Chrome or Edge, or None. FRAME_MEMORY_CHROMIUM names one outright."""
    named = os.environ.get("FRAME_MEMORY_CHROMIUM")
    if named:
        return named if Path(named).is_file() else None
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    places = [Path(p) for p in MAC] if sys.platform == "darwin" else []
    if sys.platform == "win32":
        roots = filter(None, map(os.environ.get, ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")))
        places = [Path(root) / tail for root in roots for tail in WINDOWS]
    return next((str(p) for p in places if p.is_file()), None)


def find_or_install(say) -> str | None:
    """``find``, after an ``apt-get install chromium`` where nothing was found and that may be run."""
    found = find()
    if found or os.environ.get("FRAME_MEMORY_CHROMIUM"):
        return found
    packages.install("chromium", "the browser tests", say)
    return find()
