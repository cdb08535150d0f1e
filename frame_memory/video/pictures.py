"""Draws the pictures whose geometry `plan.layout` gives.

Shape legend: H W pixels, 3 colour channels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..plan.layout import PackingPicture


def _rgb(colour: int) -> tuple[int, int, int]:
    return (colour >> 16) & 255, (colour >> 8) & 255, colour & 255


def draw(picture: PackingPicture) -> Tensor:
    """The picture as a ComfyUI IMAGE `[1, H, W, 3]`, 0..1."""
    canvas = Image.new("RGB", (picture.width, picture.height), _rgb(picture.background))
    pen = ImageDraw.Draw(canvas)
    for rect in picture.rects:
        right, bottom = rect.x + max(rect.width, 1) - 1, rect.y + max(rect.height, 1) - 1
        pen.rectangle((rect.x, rect.y, right, bottom), fill=_rgb(rect.colour))
    for label in picture.labels:
        font = ImageFont.load_default(label.size)
        pen.text((label.x, label.y), label.text, fill=_rgb(label.colour), font=font)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)[None]
