"""Pictures to be measured, whatever they lie in: how many, how fast, and a few at a time.

Shape suffixes: T time, H height, W width, C colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..plan.mark import as_fps
from .clips import open_clip
from .history import CHUNK_FRAMES, read_video
from .images import ImageError
from .source import NODE as HISTORY
from .source import HistoryError


class FootageError(ValueError):
    """Nothing, or too much, to measure. The message names the node and its sockets."""


@dataclass(frozen=True, eq=False)
class Footage:
    """frames at fps, width x height. words: what it is, as a sentence. between(start, stop): chunks [T,H,W,C] of them,

    uint8 or floats 0..1, in order of time.
    """

    frames: int
    fps: float
    width: int
    height: int
    words: str
    between: Callable[[int, int], Iterator[torch.Tensor | np.ndarray]]

    def chunks(self) -> Iterator[tuple[int, torch.Tensor | np.ndarray]]:
        """(number of the first frame, frames) of the whole."""
        first = 0
        for chunk_THWC in self.between(0, self.frames):
            yield first, chunk_THWC
            first += len(chunk_THWC)


def of_images(images_BHWC: torch.Tensor, fps: float, node: str, interrupt: Callable[[], None]) -> Footage:
    """A batch of pictures as a video of `fps`. Raises ImageError for what is no IMAGE."""
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] not in (1, 3, 4) or 0 in images_BHWC.shape:
        raise ImageError(
            f"The socket 'images' of '{node}' got a tensor of shape {tuple(images_BHWC.shape)}, expected an IMAGE "
            "[frames, height, width, 3] with at least one frame."
        )
    count, height, width = images_BHWC.shape[:3]

    def between(start: int, stop: int) -> Iterator[torch.Tensor]:
        for first in range(start, stop, CHUNK_FRAMES):
            interrupt()
            yield images_BHWC[first : min(first + CHUNK_FRAMES, stop)]

    return Footage(count, float(fps), width, height, f"{count} image{'s' * (count != 1)} of {width}x{height}.", between)


def of_video(video, folder: Path, node: str, interrupt: Callable[[], None]) -> Footage:
    """A VIDEO at its own rate and size, read from its file. folder: for one that is no file yet.

    Raises HistoryError, in this node's name, where it cannot be read.
    """
    try:
        clip = open_clip(video, as_fps(float(video.get_frame_rate())), folder, node)
    except HistoryError as error:
        raise HistoryError(_named(error, node)) from error
    facts, size = clip.facts, (clip.facts.width, clip.facts.height)

    def between(start: int, stop: int) -> Iterator[np.ndarray]:
        wanted = clip.frames[start:stop]
        try:
            yield from read_video(facts, wanted, fps=clip.fps, size=size, interrupt=interrupt, on_grid=False)
        except HistoryError as error:
            raise HistoryError(_named(error, node)) from error

    part = " (the part that is left of it)" if clip.trimmed else ""
    return Footage(len(clip.frames), float(clip.fps), *size, f"{facts.path.name}{part}, {size[0]}x{size[1]}.", between)


def _named(error: Exception, node: str) -> str:
    return str(error).replace(f"'{HISTORY}'", f"'{node}'")
