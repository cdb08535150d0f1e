"""A contact sheet: one frame of every section with its number and time, as one PNG.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import put_in_place, reserve_part

THUMBNAIL_WIDTH = 240
# Longest side of a sheet, pixels: what browsers and viewers open without trouble; many sections get smaller frames.
SHEET_SIDE = 4096
GAP = 6
CAPTION = 18
BACKGROUND, MISSING, TEXT = (24, 24, 27), (48, 48, 54), (228, 228, 231)


@dataclass(frozen=True)
class SheetSection:
    """A section on the sheet: the number an artist knows it by, its pixel frames [start_frame, stop_frame)."""

    number: int
    start_frame: int
    stop_frame: int

    @property
    def shown_frame(self) -> int:
        """The frame that stands for the section: its middle, away from the blends at both ends."""
        return (self.start_frame + self.stop_frame) // 2


def to_bytes(frame_HWC: torch.Tensor | np.ndarray) -> np.ndarray:
    """One frame as uint8 [H,W,3]; floats are 0..1, rounded; NaN becomes 0."""
    if isinstance(frame_HWC, torch.Tensor):
        if frame_HWC.is_floating_point():
            frame_HWC = frame_HWC.float().mul(255).nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)
        frame_HWC = frame_HWC.cpu().numpy()
    elif frame_HWC.dtype != np.uint8:
        frame_HWC = np.nan_to_num(frame_HWC * 255.0).round().clip(0, 255).astype(np.uint8)
    return frame_HWC


class ContactSheet:
    """Collects thumbnails from pieces in any order: `sheet.add(piece.start_frame, piece.frames_THWC)`.

    `sections` in the order they are to be shown. Holds one small picture a section, packed; the frames are not kept.
    """

    def __init__(
        self, sections: Sequence[SheetSection], fps: Fraction | float, *, width: int = THUMBNAIL_WIDTH
    ) -> None:
        self.sections, self.fps = tuple(sections), float(fps)
        self.columns = max(1, math.ceil(math.sqrt(len(self.sections))))
        self.width = max(16, min(width, (SHEET_SIDE - GAP) // self.columns - GAP))
        self._pictures: dict[int, bytes] = {}
        self._height = 0

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of the sections that have no picture yet."""
        return tuple(s.number for i, s in enumerate(self.sections) if i not in self._pictures)

    def add(self, start_frame: int, frames_THWC: torch.Tensor | np.ndarray) -> None:
        """Take what the sheet needs from frames that begin at `start_frame`: uint8, or floats 0..1. Not mutated."""
        for i, section in enumerate(self.sections):
            offset = section.shown_frame - start_frame
            if 0 <= offset < len(frames_THWC):
                picture = Image.fromarray(to_bytes(frames_THWC[offset]))
                size = self._size(picture)
                self._height = max(self._height, size[1])
                if size < picture.size:
                    picture = picture.resize(size, Image.Resampling.BOX)
                packed = io.BytesIO()
                picture.save(packed, format="PNG", compress_level=1)
                self._pictures[i] = packed.getvalue()

    def _size(self, picture: Image.Image) -> tuple[int, int]:
        return self.width, max(1, round(self.width * picture.height / picture.width))

    def _picture(self, index: int) -> Image.Image | None:
        """The thumbnail of a section at the size of the sheet."""
        if index not in self._pictures:
            return None
        picture = Image.open(io.BytesIO(self._pictures[index]))
        return picture.resize(self._size(picture), Image.Resampling.BOX)

    def draw(self) -> Image.Image:
        """The sheet. Sections without a picture are grey boxes that say so."""
        height = self._height or round(self.width * 9 / 16)
        rows = max(1, math.ceil(len(self.sections) / self.columns))
        cell_width, cell_height = self.width + GAP, height + CAPTION + GAP
        sheet = Image.new("RGB", (self.columns * cell_width + GAP, rows * cell_height + GAP), BACKGROUND)
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(8, min(13, self.width // 11)))
        for i, section in enumerate(self.sections):
            left, top = GAP + i % self.columns * cell_width, GAP + i // self.columns * cell_height
            picture = self._picture(i)
            if picture is None:
                pen.rectangle((left, top, left + self.width - 1, top + height - 1), fill=MISSING)
                pen.text((left + 4, top + 4), "not finished", fill=TEXT, font=font)
            else:
                sheet.paste(picture, (left, top))
            pen.text((left, top + height + 2), self.caption(section), fill=TEXT, font=font)
        return sheet

    def caption(self, section: SheetSection) -> str:
        """Number and time of a section: "#3  0:02.4"."""
        seconds = section.start_frame / self.fps
        return f"#{section.number}  {int(seconds // 60)}:{seconds % 60:04.1f}"

    def save(self, path: Path) -> None:
        """Write the sheet as PNG, whole or not at all. Raises OSError."""
        path = Path(path)
        part = reserve_part(path)
        try:
            self.draw().save(part, format="PNG")
            put_in_place(part, path)
        finally:
            part.unlink(missing_ok=True)
