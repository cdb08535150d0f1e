"""Folders for the journal's tests."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def unprivileged():
    """A folder of a user who is not root: root may write anywhere."""
    if not hasattr(os, "seteuid"):
        pytest.skip("Windows folders have no mode bits")
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    folder.chmod(0o755)
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)
