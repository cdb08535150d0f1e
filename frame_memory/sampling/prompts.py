"""Prompts over time: which CONDITIONING a section gets, blended linearly where two meet.

Shape legend: B batch, L text tokens, D text features.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Timeline, weights_for

# Tokens of the user's text that FramePack reads: 351 in all, 95 of them the template's (reference/framepack.md 5).
USER_TOKENS = 256
LLAMA = "llama"  # core's name for the tokens of HunyuanVideo's language model
BLANK_LINE = 271  # the language model's token for the two line ends that stand before every prompt
TEXT_SHOWN = 40
SPACES_LOST = (
    "The text encoder's tokenizer loses the spaces between words: a fault of the Python package transformers from "
    "version 5 on, in every node that reads a HunyuanVideo prompt. The video will follow the prompt badly. Install "
    "'transformers>=4.50.3,<5' with the Python that runs ComfyUI."
)


@dataclass(frozen=True)
class EncodedTimeline:
    """TIMELINE socket: the parsed timeline and one stock CONDITIONING for each of its entries."""

    timeline: Timeline
    conditionings: tuple[list, ...]


def tokenise(clip, text: str) -> tuple[Mapping, tuple[str, ...]]:
    """The tokens of a prompt for `clip`, at most 256 of them the user's, and warnings.

    What the cut leaves gives the very features that the published code makes of a long prompt. Encoders without a
    language model of this kind get their tokens as they are.
    """
    tokens = clip.tokenize(text)
    rows = tokens.get(LLAMA) if isinstance(tokens, Mapping) else None
    if not rows:
        return tokens, ()
    row, template = rows[0], clip.tokenize("")[LLAMA][0]
    warnings = _warn_of_lost_spaces(template)
    given = len(row) - len(template)
    if given < USER_TOKENS:
        return tokens, warnings
    begin = 0
    while begin < len(template) and isinstance(row[begin][0], int) and row[begin][0] == template[begin][0]:
        begin += 1
    kept = row[: begin + USER_TOKENS]
    if given > USER_TOKENS:
        start = text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}..."
        warnings += (
            f"The prompt '{start}' has {given} tokens; FramePack reads {USER_TOKENS}, so its last "
            f"{given - USER_TOKENS} are left out. Shorten it in 'Prompt Timeline'.",
        )
    # The end mark is cut off as well. Core drops the last token of a text without one: here, a copy of the last.
    return {**tokens, LLAMA: [[*kept, kept[-1]]]}, warnings


def _warn_of_lost_spaces(template: list[tuple]) -> tuple[str, ...]:
    """template: tokens of an empty prompt, in which the blank line survives if spaces do."""
    return () if BLANK_LINE in (t[0] for t in template if isinstance(t[0], int)) else (SPACES_LOST,)


def lost_spaces() -> tuple[str, ...]:
    """The warning of `tokenise` for core's HunyuanVideo tokenizer as it is in this ComfyUI, whichever node uses it."""
    from comfy.text_encoders.hunyuan_video import HunyuanVideoTokenizer  # only where a real checkpoint is loaded

    return _warn_of_lost_spaces(HunyuanVideoTokenizer().tokenize_with_weights("")[LLAMA][0])


def too_long(positive: list[dict]) -> list[str]:
    """A warning where a guider's text has more tokens than FramePack was trained to read; the end mark is one."""
    most = max((c["cross_attn"].shape[1] for c in positive if c.get("cross_attn") is not None), default=0)
    if most <= USER_TOKENS + 1:
        return []
    return [
        f"The positive prompt has about {most - 1} tokens; FramePack was trained with {USER_TOKENS} at most. Shorten "
        "it in 'CLIP Text Encode', or use 'Prompt Timeline', which leaves out the rest."
    ]


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
