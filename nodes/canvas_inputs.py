"""Inputs that the nodes with an FFGo canvas share: its size, and how pictures lie on it."""

from __future__ import annotations

from comfy_api.latest import io

from ..frame_memory.plan import canvas


def side(name: str, default: int, tooltip: str) -> io.Int.Input:
    """width or height of a canvas in pixels."""
    return io.Int.Input(name, default=default, min=canvas.LEAST_CANVAS, max=canvas.MOST_SIDE, step=16, tooltip=tooltip)


def look(crop: str = "") -> list[io.Input]:
    """The advanced ones. crop: what the tooltip of crop_to_content says besides."""
    return [
        io.Boolean.Input(
            "keep_background_aspect",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Off: the background is squeezed to 16:9 first, as the LoRA was trained. On: it keeps its aspect.",
        ),
        io.Boolean.Input(
            "enlarge_small",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Off: pictures smaller than their room keep their size, as the LoRA was trained. On: they fill it "
                "(LANCZOS). Free boxes are always filled."
            ),
        ),
        io.Boolean.Input(
            "crop_to_content",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "On: cuts off the transparent border of references, so that the thing is as large as its room allows. "
                f"Off: keeps it, as published. {crop}".rstrip()
            ),
        ),
        io.String.Input(
            "canvas_colour",
            default="#ffffff",
            optional=True,
            advanced=True,
            tooltip="Colour of the empty canvas as #rrggbb. The LoRA was trained on white.",
        ),
    ]
