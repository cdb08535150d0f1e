"""Where published files come from, for the messages about files that arrived damaged. Nothing is ever downloaded."""

from __future__ import annotations

import re

LOAD_MODEL, LOAD_LORA = "Load FramePack Model", "Load Video LoRA"
LOAD_MEMORY_MODEL = "Load Memory Model"
WAN_CONTEXT, LOAD_WAN = "Wan Frame Context", "Load Diffusion Model"
TRAIN_CONTEXT = "Train Wan Frame Context"
# In messages about a number format, where a video of either family may have been made.
LOADERS = f"'{LOAD_MODEL}' (Wan: '{LOAD_WAN}')"
HOME = "https://huggingface.co/"
# What a path holds, to the model page of that file; the first that fits counts.
PAGES = (
    (r"frame_?packi2v_hy[^\\/]*\.safetensors$|frame_?pack_?f1_i2v_hy[^\\/]*\.safetensors$", "Kijai/HunyuanVideo_comfy"),
    (r"frame_?pack_?f1_i2v_hy", "lllyasviel/FramePack_F1_I2V_HY_20250503"),
    (r"frame_?packi2v_hy", "lllyasviel/FramePackI2V_HY"),
)


def page_of(path: str) -> str | None:
    """The address of the model page of a published file, by its name or its folder's, or None."""
    found = next((page for pattern, page in PAGES if re.search(pattern, path.lower())), None)
    return HOME + found if found else None


def get_it_again(path: str, node: str) -> str:
    """What to do about a damaged file: where to get it, and the node to choose it in."""
    return f"Download it again from {page_of(path) or 'where it came from'} and choose it in '{node}'."


def choose(node: str) -> str:
    """What to do about a file that is none of those a loader reads."""
    return f"Choose a {'Helios' if node == LOAD_MEMORY_MODEL else 'FramePack'} checkpoint in '{node}'."
