"""What tests of files and LoRAs share: one tiny network, in diffusers' names and in core's."""

from __future__ import annotations

import pytest

from frame_memory.model import key_map

from . import checkpoint_files as cf


@pytest.fixture(scope="module")
def reference():
    """diffusers' state dict."""
    return cf.tiny_reference()


@pytest.fixture(scope="module")
def native(reference):
    """The same under core's names."""
    return key_map.convert_diffusers(reference)
