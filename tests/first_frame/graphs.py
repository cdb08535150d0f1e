"""Small graphs of the first-frame nodes in API format, shared by the tests."""

from __future__ import annotations

import numpy as np

COMPOSER, PROMPT, DROP = "FrameMemoryFirstFrameComposer", "FrameMemoryFFGoPrompt", "FrameMemoryDropTransitionFrames"


def colour(value: int, width: int, height: int, count: int = 1) -> dict:
    """A batch of pictures of one colour."""
    inputs = {"width": width, "height": height, "batch_size": count, "color": value}
    return {"class_type": "EmptyImage", "inputs": inputs}


def composer(**inputs) -> dict:
    """First Frame Composer at 320x192; inputs by their names."""
    usual = {"width": 320, "height": 192, "layout": "official stack", "boxes": ""}
    return {"class_type": COMPOSER, "inputs": {**usual, **inputs}}


def preview(node: str, slot: int = 0) -> dict:
    """Show pictures of a node."""
    return {"class_type": "PreviewImage", "inputs": {"images": [node, slot]}}


def text(node: str, slot: int) -> dict:
    """Show any value as text."""
    return {"class_type": "PreviewAny", "inputs": {"source": [node, slot]}}


def pictures_of(server, run, node: str) -> list[np.ndarray]:
    """What a node showed."""
    from PIL import Image

    files = run.outputs[node]["images"]
    return [np.asarray(Image.open(server.base / f["type"] / f["subfolder"] / f["filename"])) for f in files]
