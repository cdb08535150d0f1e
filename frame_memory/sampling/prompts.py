"""Prompts over time: which CONDITIONING a section gets, blended linearly where two meet.

Shape legend: B batch, L text tokens, D text features.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Timeline, weights_for


@dataclass(frozen=True)
class EncodedTimeline:
    """TIMELINE socket: the parsed timeline and one stock CONDITIONING for each of its entries."""

    timeline: Timeline
    conditionings: tuple[list, ...]


def blend_text(a_BLD: Tensor, b_BLD: Tensor, weight_b: float) -> Tensor:
    """Linear blend; the shorter text is padded with zeros, as FramePack pads its text features."""
    length = max(a_BLD.shape[1], b_BLD.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in (a_BLD, b_BLD))
    return torch.lerp(a, b, weight_b)


def section_text(encoded: EncodedTimeline, time_s: float, section_s: float) -> tuple[Tensor, Tensor | None]:
    """Text features and pooled features of the section that begins at `time_s` seconds."""
    weights = weights_for(encoded.timeline, time_s, section_s)
    entries = [(encoded.conditionings[i][0], w) for i, w in weights]
    (text, extra), _ = entries[0]
    pooled = extra.get("pooled_output")
    if len(entries) == 1:
        return text, pooled
    (other, other_extra), weight = entries[1]
    other_pooled = other_extra.get("pooled_output")
    if pooled is not None and other_pooled is not None:
        pooled = torch.lerp(pooled, other_pooled, weight)
    return blend_text(text, other, weight), pooled


def with_text(conds: list[dict], text_BLD: Tensor, pooled: Tensor | None) -> list[dict]:
    """A guider's conditioning entries with other text and all else (guidance, vision, hooks) kept."""
    changed = []
    for cond in conds:
        cond = {**cond, "cross_attn": text_BLD, "uuid": uuid.uuid4()}
        cond.pop("attention_mask", None)
        if pooled is not None:
            cond["pooled_output"] = pooled
        changed.append(cond)
    return changed
