"""A history in the tokens of one or several encoders of frame preservation, which stand beside each other.

Two encoders remember different things: 4x4x2 many moments coarsely, 2x2x8 few of them in detail (pfp reference 6).
Chunks end where blocks of all of them end, so all know the same frames.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, N tokens, D width of the DiT, E width of
the features before the projection. Latents are in model space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..plan.cross_attention import CrossAttentionSpec
from ..plan.preservation import Rate, chunks, token_grid
from . import cross_attention
from .preservation import Encoded, PreservationEncoder, PreservationSpec, initialise


class Remembered(NamedTuple):
    """Tokens `[B, N, D]`, their (frame, row, column) in the video, and features `[B, N', E]` or None.

    Only the encoders with cross-attention hand out features, so N' may be less than N.
    """

    tokens: Tensor
    places: list[tuple[int, int, int]]
    features: Tensor | None


class PreservedHistory(nn.Module):
    """The encoders, and what lets a DiT read the features of those that hand them out.

    specs: of one width and one count of channels. dtype: as PreservationEncoder's. cross: needed where features are
    handed out, and only there.
    """

    def __init__(
        self, specs: Sequence[PreservationSpec], dtype=None, device=None, operations=None,
        cross: CrossAttentionSpec | None = None,
    ):  # fmt: skip
        super().__init__()
        first = specs[0]
        if any((spec.hidden, spec.in_channels) != (first.hidden, first.in_channels) for spec in specs):
            raise ValueError("Encoders of one memory must have one width and one count of channels.")
        wanted = {(spec.hidden, spec.features) for spec in specs if spec.cross_attention}
        if wanted != (set() if cross is None else {(cross.hidden, cross.features)}):
            raise ValueError(f"Features of (D, E) {sorted(wanted)} are handed out, and read by {cross}.")
        made = {"dtype": dtype, "device": device, "operations": operations}
        self.specs = tuple(specs)
        self.encoders = nn.ModuleList(PreservationEncoder(spec, **made) for spec in specs)
        self.cross_attention = None if cross is None else cross_attention.CrossAttention(cross, **made)
        self.dtype = self.each[0].dtype

    @property
    def each(self) -> list[PreservationEncoder]:
        """The encoders, in order."""
        return list(self.encoders)  # pyright: ignore[reportReturnType]

    @property
    def rates(self) -> tuple[Rate, ...]:
        """Their rates."""
        return tuple(encoder.rate for encoder in self.each)

    @property
    def options(self) -> dict:
        """`transformer_options` with which a DiT reads the features; none where there are none."""
        return {} if self.cross_attention is None else {cross_attention.CROSS: self.cross_attention}

    def requires_grad_(self, requires_grad: bool = True) -> PreservedHistory:
        """As of any network, but the embedding of the low branch stays frozen: it is the base's."""
        super().requires_grad_(requires_grad)
        for encoder in self.each:
            if encoder.spec.low:
                encoder.embed.requires_grad_(False)
        return self

    def encode(self, chunk_BCTHW: Tensor) -> tuple[Encoded, ...]:
        """Tokens of one chunk, by encoder. Raises as PreservationEncoder.encode does."""
        return tuple(encoder.encode(chunk_BCTHW) for encoder in self.each)

    def forward(
        self, history_BCTHW: Tensor, ends: Sequence[int], lows: Sequence[Tensor | None] | None = None
    ) -> Remembered:
        """All that is remembered of a history in segments. ends: as PreservationEncoder's; lows: a copy an encoder.

        Frames that fill no block of every encoder are left out, so there may be no tokens.
        """
        stops = [0, *(stop for _, stop in chunks(ends, *self.rates))]
        lows = lows or [None] * len(self.specs)
        whole = history_BCTHW[:, :, : stops[-1]]
        tokens, places, features = [], [], []
        for encoder, low in zip(self.each, lows, strict=True):
            low = None if low is None else low[:, :, : stops[-1] // encoder.rate.time]
            made = encoder(whole, stops[1:], low)
            tokens.append(made.tokens)
            places += token_grid(encoder.rate, 0, stops[-1], *history_BCTHW.shape[3:]).positions()
            features += [] if made.features is None else [made.features]
        return Remembered(torch.cat(tokens, 1), places, torch.cat(features, 1) if features else None)


def initialise_all(
    history: PreservedHistory, weight: Tensor | None = None, bias: Tensor | None = None, seed: int = 0
) -> PreservedHistory:
    """Give fresh encoders, and their cross-attention, weights in place, as `initialise` of either does."""
    for number, encoder in enumerate(history.each):
        initialise(encoder, weight, bias, seed + number)
    if history.cross_attention is not None:
        cross_attention.initialise(history.cross_attention, seed)
    return history
