"""Inputs that the nodes which load a checkpoint share."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..frame_memory.model import quantised

DIFFUSION_MODELS = "diffusion_models"
DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {quantised.ROUND_TO: quantised.FP8},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    "int8": {quantised.ROUND_TO: quantised.INT8},
}


def model_file(shards: str) -> io.Combo.Input:
    """The file. shards: what published checkpoints come in."""
    return io.Combo.Input(
        "model_name",
        options=folder_paths.get_filename_list(DIFFUSION_MODELS),
        tooltip=(
            f"File in models/diffusion_models. Of a checkpoint in {shards} choose any one; the others "
            "must lie beside it."
        ),
    )


def number_format(saved: str) -> io.Combo.Input:
    """The number format in memory. saved: what a byte a number makes of a bf16 file."""
    return io.Combo.Input(
        "weight_dtype",
        options=list(DTYPES),
        default="default",
        advanced=True,
        tooltip=(
            "Number format of the transformer blocks in memory. default keeps the file's, which is right for an fp8 "
            f"file on any card. int8 (RTX 20 and newer) and fp8 halve the memory of a bf16 file ({saved}) at a small "
            "loss, int8 at the smallest; embedders and norms stay exact. fp8_e4m3fn_fast and int8 are also multiplied "
            "in, which GPUs can do at a higher rate (fp8 from RTX 40 on, int8 from RTX 20 on). A file with scales of "
            "its own keeps its format."
        ),
    )
