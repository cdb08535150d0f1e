"""Where a node that writes a video puts it."""

from __future__ import annotations

import os

import folder_paths


def output_place(prefix: str, default: str, width: int, height: int) -> tuple[str, str, int, str]:
    """(folder, start of the name, next number, subfolder) in ComfyUI's output folder for a `filename_prefix`.

    Where the prefix has no name, empty or only a folder, the default's is taken: the file would be a hidden one, or
    lie beside its folder.
    """
    folder, name = os.path.split(prefix.strip())
    if not name.strip(" ."):
        prefix = os.path.join(folder, os.path.basename(default)) if folder else default
    return folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), width, height)[:4]
