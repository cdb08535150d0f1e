"""tests/sampling/conftest.py, for the tests of memory: a tiny FramePack file, prompts, and one run of the sampler."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "sampling_runs", Path(__file__).resolve().parent.parent / "sampling" / "conftest.py"
)
_module = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

HEIGHT, WIDTH, TEXT = _module.HEIGHT, _module.WIDTH, _module.TEXT
conditioning, guider_for, of_kind = _module.conditioning, _module.guider_for, _module.of_kind
run, start_latent, tiny_file = _module.run, _module.start_latent, _module.tiny_file
