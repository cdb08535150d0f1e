"""Measurements, training and the synthetic world: `python scripts/run.py -m benchmarks.<name>`."""

import torch
from comfy.cli_args import args

# Core asks for a GPU while it is imported, and fails without one unless it was told so before.
if not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()):
    args.cpu = True
