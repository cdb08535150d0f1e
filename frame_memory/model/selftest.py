"""Stand-ins for the text and vision encoders, for the shipped self-test models only.

The real encoders are gigabytes and cannot be shrunk, so the self-test models are trained on features that need
no weights: a word becomes a fixed vector drawn from its own hash, an image becomes its pixels in 16x16 patches.
They speak core's CLIP and CLIP_VISION interfaces as far as the stock encode nodes use them.

Shape legend: B batch, L tokens, H W pixels, C channels.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re

import comfy.utils
import torch
from comfy.clip_vision import Output
from torch import Tensor

TEXT_TOKENS = 20
TEXT_FEATURES = 64
POOLED_FEATURES = 768
VISION_FEATURES = 1152
VISION_SIZE = 64
VISION_PATCH = 16
VISION_PLACE = 4.0
PADDING_WORD = "<pad>"


def split_words(text: str) -> list[str]:
    """Lower-case words of any script, in order."""
    return re.findall(r"\w+", text.lower())


def word_vector(word: str, features: int) -> Tensor:
    """A fixed normal vector `[features]` that depends on nothing but the word."""
    digest = hashlib.sha256(f"{features}:{word}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(features, generator=generator)


def text_features(text: str) -> tuple[Tensor, Tensor]:
    """Text to `([1, 20, 64], [1, 768])`: one token a word, padded; words past the 20th are dropped."""
    words = split_words(text)[:TEXT_TOKENS]
    padded = words + [PADDING_WORD] * (TEXT_TOKENS - len(words))
    tokens = torch.stack([word_vector(w, TEXT_FEATURES) for w in padded])
    pooled = torch.stack([word_vector(w, POOLED_FEATURES) for w in (words or [PADDING_WORD])])
    return tokens[None], (pooled.sum(0) / math.sqrt(max(len(words), 1)))[None]


def vision_features(image_BHWC: Tensor) -> Tensor:
    """Image 0..1 to `[B, 16, 1152]`: squashed to 64x64, cut into 16x16 patches, each with its place, zero-padded."""
    x = image_BHWC[..., :3].movedim(-1, 1)
    if x.shape[-2:] != (VISION_SIZE, VISION_SIZE):
        x = comfy.utils.common_upscale(x, VISION_SIZE, VISION_SIZE, "bicubic", "disabled").clamp(0, 1)
    patches = torch.nn.functional.unfold(x * 2 - 1, VISION_PATCH, stride=VISION_PATCH).transpose(1, 2)
    # The model gives these tokens no position of their own; a real vision encoder's features carry it.
    place = VISION_PLACE * torch.eye(patches.shape[1], dtype=patches.dtype, device=patches.device)
    tokens = torch.cat([patches, place.expand(patches.shape[0], -1, -1)], dim=-1)
    return torch.nn.functional.pad(tokens, (0, VISION_FEATURES - tokens.shape[-1]))


class SelfTestText:
    """What stock `CLIPTextEncode` needs of a CLIP, without weights."""

    def tokenize(self, text: str, **kwargs) -> dict:
        words = split_words(text)
        if len(words) > TEXT_TOKENS:
            logging.warning("Self-test text encoder: %d words given, the first %d are used.", len(words), TEXT_TOKENS)
        return {"text": text}

    def encode_from_tokens_scheduled(self, tokens: dict, add_dict: dict | None = None, **kwargs) -> list:
        context, pooled = text_features(tokens["text"])
        return [[context, {"pooled_output": pooled, **(add_dict or {})}]]


class SelfTestVision:
    """What stock `CLIPVisionEncode` needs of a CLIP_VISION, without weights."""

    def encode_image(self, image: Tensor, crop: bool = True) -> Output:
        out = Output()
        out["last_hidden_state"] = vision_features(image)
        out["image_embeds"] = out["last_hidden_state"].mean(dim=1)
        out["penultimate_hidden_states"] = out["last_hidden_state"]
        return out
