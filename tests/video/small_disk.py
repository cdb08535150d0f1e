"""A real file system that is soon full, in a mount namespace of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def command_on(folder: Path, kilobytes: int) -> list[str]:
    """What to put in front of a command so that `folder` is a disk of that size; skips where mounting is refused."""
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$0" && exec "$@"'
    line = ["unshare", "-rm", "sh", "-c", mount, str(folder)]
    try:
        allowed = subprocess.run([*line, "true"], capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system does not let a test mount a file system")
    return line
