"""Installs a program for the tests where the system's package manager may be used without asking anybody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

UPDATE_LIST = ("apt-get", "update", "-qq")
INSTALL = ("apt-get", "install", "-y", "-qq", "--no-install-recommends")


def may_install() -> bool:
    """Whether this is a system where apt-get can be run without asking anybody."""
    return sys.platform.startswith("linux") and bool(shutil.which("apt-get")) and os.geteuid() == 0


def install(package: str, purpose: str, say: Callable[[str], None]) -> None:
    """Install a package where that may be done; a failure is told, and left to the caller who looks for it again."""
    if not may_install():
        return
    say(f"No {package} found for {purpose}; installing it with apt-get.")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for line in (UPDATE_LIST, (*INSTALL, package)):
        done = subprocess.run(line, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            say(f"  {' '.join(line)} failed:\n{done.stderr.strip()[-600:]}")
