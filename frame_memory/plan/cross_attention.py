"""Cross-attention from an encoder's features into a DiT, in the plan: its sizes, and what it costs.

Each block of the DiT gets one: the window's tokens ask, and the features before the encoder's projection answer. That
is beside the memory's tokens in the sequence and not in their place. Source: pfp reference 6; the wiring is our choice,
since the paper does not say it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CrossAttentionSpec:
    """What it is made of.

    hidden: D, width of the DiT. features: E, width of the encoder's features. heads: of the DiT. double, single: its
    blocks of each of core's kinds; Wan has the first kind alone.
    """

    hidden: int
    features: int
    heads: int
    double: int
    single: int = 0

    def __post_init__(self):
        if self.hidden % self.heads:
            raise ValueError(f"A width of {self.hidden} does not suit {self.heads} heads of cross-attention.")

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """The DiT's blocks by core's names, in their order."""
        kinds = {"double_block": self.double, "single_block": self.single}
        return tuple((kind, number) for kind, count in kinds.items() for number in range(count))

    @property
    def numbers(self) -> int:
        """How many are trained: 756 million for HunyuanVideo, 118 million for Wan 1.3B."""
        block = 2 * self.hidden + 2 * (self.features + 1) * self.hidden + (self.hidden + 1) * self.hidden
        return 2 * self.features + len(self.blocks) * block

    def bytes(self, itemsize: int = 2) -> int:
        """Bytes that the weights take beside the DiT's."""
        return self.numbers * itemsize

    def operations(self, window: int, tokens: int) -> int:
        """Operations of one forward pass; a multiplication and an addition are two.

        window: tokens of the window. tokens: of the memory, whose features are read.
        """
        keys = 4 * tokens * self.features * self.hidden
        attention, out = 4 * window * tokens * self.hidden, 2 * window * self.hidden**2
        return len(self.blocks) * (keys + attention + out)
