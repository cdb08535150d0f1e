"""Training videos with their prompts in a folder, for the command line: one file a video, read as it is used.

The text and vision encoders and the VAE run in the graph; training on several GPUs then needs none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import tensor_file
from .clips import TRAIN, TRAIN_FRAMES, ForcingError, StoredVideo
from .flow import Conditioning, WanConditioning

FORMAT = "frame_memory training video 1"


def write_videos(folder: Path, videos: Sequence[StoredVideo], family: str) -> list[Path]:
    """Write `video-00001.safetensors` and so on; files of an earlier set with higher numbers are taken away.

    family: of the latents, as 'Load FramePack Model' notes it; empty where nobody says. Raises FileError where the disk
    refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, video in enumerate(videos, 1):
        path = folder / f"video-{number:05d}.safetensors"
        tensors = {"samples": video.samples, "text": video.cond.text}
        if isinstance(video.cond, Conditioning):
            tensors["pooled"] = video.cond.pooled
        if video.cond.vision is not None:
            tensors["vision"] = video.cond.vision
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        said = {"format": FORMAT, "name": video.name, "base": family, "fps": f"{video.fps:g}"}
        tensor_file.write(str(path), plain, said)
        paths.append(path)
    for old in set(folder.glob("video-*.safetensors")) - set(paths):
        try:
            old.unlink()
        except OSError as error:
            raise tensor_file.FileError(
                f"{old} is of an earlier set and cannot be deleted: {error}. Stop what reads it, or choose another "
                f"name in '{TRAIN}' or '{TRAIN_FRAMES}'."
            ) from error
    return paths


def read_videos(folder: Path, say) -> tuple[list[StoredVideo], str]:
    """(videos, family of their latents). A file that cannot be read is named by `say` and left out.

    Raises ForcingError where none is left, or where the families differ.
    """
    videos, families = [], set()
    for path in sorted(folder.glob("video-*.safetensors")):
        try:
            video, family = _read(path)
        except (tensor_file.FileError, KeyError, OSError) as error:
            say(f"{path.name} is left out: {error}")
            continue
        videos.append(video)
        families.add(family)
    if not videos:
        raise ForcingError(
            f"There are no training videos in {folder}. Choose 'write for the command line' in '{TRAIN}' or "
            f"'{TRAIN_FRAMES}' and run the graph once."
        )
    if len(families) > 1:
        raise ForcingError(f"The videos in {folder} belong to several models ({', '.join(sorted(families))}).")
    return videos, families.pop()


def _read(path: Path) -> tuple[StoredVideo, str]:
    entries, metadata = tensor_file.read_header(str(path), TRAIN)
    if metadata.get("format") != FORMAT:
        raise tensor_file.FileError(f"{path} is not a training video of this version.")
    held = {part: entries[part].read() for part in ("text", "pooled", "vision") if part in entries}
    cond = Conditioning(**held) if "pooled" in held else WanConditioning(**held)
    samples = entries["samples"].mapped()
    if not all(bool(torch.isfinite(t.float()).all()) for t in (*held.values(), samples)):
        raise tensor_file.FileError(f"{path} holds numbers that are not finite.")
    name, family, fps = metadata.get("name", path.stem), metadata["base"], float(metadata.get("fps", 0))
    return StoredVideo(samples, cond, name, family, fps), family
