"""What every test needs: ComfyUI importable and on the CPU, few threads, and hypothesis without surprises."""

import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def put_on_path():
    """ComfyUI first, then the repository: `import nodes` must be ComfyUI's."""
    ours = {"", str(REPO), str(REPO / "tests"), os.getcwd()}
    sys.path[:] = [p for p in sys.path if p not in ours]
    sys.path.insert(0, str(REPO))
    from scripts import host

    named = os.environ.get("FRAME_MEMORY_COMFYUI")
    found = None if named else host.installed_host()
    comfyui = named or (str(found.comfyui) if found else None)
    if comfyui and comfyui not in sys.path[:1]:
        sys.path[:] = [p for p in sys.path if p != comfyui]
        sys.path.insert(0, comfyui)
    return comfyui


COMFYUI = put_on_path()

if COMFYUI:
    from comfy.cli_args import args

    args.cpu = True  # before any other import of comfy: without a GPU, torch refuses the question for one
    args.use_pytorch_cross_attention = True

try:
    import torch
except ModuleNotFoundError:
    pass  # the plan's tests need no torch
else:
    torch.set_num_threads(max(1, min(4, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))))

from hypothesis import HealthCheck, settings

settings.register_profile(
    "frame_memory",
    deadline=None,
    database=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("frame_memory")
