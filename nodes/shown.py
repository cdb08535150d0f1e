"""Text on a node: what it understood, made, or warns of, while it runs and afterwards."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer

from ..frame_memory.sampling.stored import FOLDER as PROJECTS
from ..frame_memory.video.place import inside


def show(node, text: str) -> None:
    """Write `text` on the running node, a node class that declares the hidden input unique_id.

    The editor's font is proportional and it swallows runs of spaces, so bars set columns apart.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden is not None and node.hidden.unique_id is not None:
        server.send_progress_text(re.sub(r"(?<=\S) {2,}", " | ", text), node.hidden.unique_id)


def warnings_first(lines: list[str]) -> str:
    """Lines as one text, warnings in front: a video on the node leaves room for few lines."""
    return "\n".join(sorted(lines, key=lambda line: not line.startswith("Warning: ")))


class Announced:
    """Takes a sentence that an artist should see at once: on the node, in the log, and kept for the report."""

    def __init__(self, node):
        self.node, self.texts = node, []

    def __call__(self, text: str) -> None:
        logging.warning("%s: %s", self.node.GET_SCHEMA().display_name, text)
        self.texts.append(text)
        show(self.node, text)


def container_metadata(hidden) -> dict:
    """Prompt and workflow for a video file, as core's Save Video stores them; nothing with --disable-metadata."""
    if args.disable_metadata or hidden is None:
        return {}
    metadata = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        metadata["prompt"] = hidden.prompt
    return metadata


def projects_folder() -> Path:
    """Where all projects lie: in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / PROJECTS


def saved(path: Path) -> ui.SavedResult:
    """A file in ComfyUI's output folder, as the editor finds it."""
    folder, name = inside(str(path), folder_paths.get_output_directory())
    return ui.SavedResult(name, folder, io.FolderType.output)


def picture_of(path: Path | None) -> torch.Tensor | None:
    """A picture file as an IMAGE `[1, height, width, 3]`, 0..1; None where it could not be written or read."""
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
    except OSError as error:
        logging.warning("%s cannot be read: %s", path, error)
        return None


def show_video(node, path: Path) -> None:
    """Play a video on the running node before it is done; `path` lies in the output folder."""
    server = getattr(PromptServer, "instance", None)
    if server is None or node.hidden is None or node.hidden.unique_id is None:
        return
    output = ui.PreviewVideo([saved(path)]).as_dict()
    message = {"node": node.hidden.unique_id, "display_node": node.hidden.unique_id, "output": output}
    server.send_sync("executed", {**message, "prompt_id": server.last_prompt_id}, server.client_id)
