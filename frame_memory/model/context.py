"""A planned section's context, gathered from the frames made so far.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plan import BLANK, END, START, Section
from .packing import ContextLayout


@dataclass(frozen=True)
class PackedContext:
    """Context tensors in plan order with their layout."""

    latents: list[Tensor]
    layout: ContextLayout = field(repr=False)


def layout_of(section: Section) -> ContextLayout:
    """The rotary layout of a planned section."""
    groups: list[tuple[int | str, tuple[int, ...]]] = [(g.kernel, g.positions) for g in section.groups]
    if section.tail is not None and section.tail.frames:
        groups.insert(0, (section.tail.kind, (section.tail.position,)))
    return ContextLayout(positions=section.positions, groups=tuple(groups))


def gather_context(
    section: Section,
    video: Tensor | Callable[[int], Tensor],
    start_BC1HW: Tensor,
    end_BC1HW: Tensor | None,
    blank,
) -> PackedContext:
    """Pick a section's context out of a video.

    video: `[B, C, T, H, W]` with the frames made so far at their video positions, or what gives one frame
    `[B, C, 1, H, W]` by its position. blank: a tensor `[1, C, 1, 1, 1]` or a number for frames that do not exist
    (zero in model space).
    """
    zero = torch.zeros_like(start_BC1HW) + blank

    def frame(ref: int) -> Tensor:
        if ref == BLANK:
            return zero
        if ref == START:
            return start_BC1HW
        if ref == END:
            if end_BC1HW is None:
                raise ValueError("The plan shows an end frame, and none was given.")
            return end_BC1HW
        return video[:, :, ref : ref + 1] if isinstance(video, Tensor) else video(ref)

    latents = [torch.cat([frame(ref) for ref in group.frames], dim=2) for group in section.groups]
    if section.tail is not None and section.tail.frames:
        latents.insert(0, torch.cat([frame(ref) for ref in section.tail.frames], dim=2))
    return PackedContext(latents, layout_of(section))
