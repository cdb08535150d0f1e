"""The choice of a folder of clips in ComfyUI's input folder, as FFGo Dataset and Video Clips have it."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..frame_memory.video.clip_folder import check_folder, state_of_folder


def chosen_folder(name: str, node: str) -> Path:
    """Where a chosen folder lies. node: display name of the node. Raises DatasetError for what is not in the list."""
    check_folder(name, folder_paths.get_input_subfolders(), node)
    return Path(folder_paths.get_input_directory()) / name


def state_of_chosen(name: str) -> str | list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a chosen folder, so that one that has changed is read again."""
    if name not in folder_paths.get_input_subfolders():
        return name  # `chosen_folder` refuses it; nothing outside of ComfyUI's input folder is looked at
    return state_of_folder(Path(folder_paths.get_input_directory()) / name)
