"""The memory while it is trained: psi from the clips so far, with gradients through the newest ones only.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, M memory tokens, D hidden size.
Source: reference/memorypack.md sections 2.2 and 3.3, note 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.semantic_pack import SemanticPack
from .flow import Conditioning


class Recurrence:
    """psi after the clips folded so far. unroll: clips that gradients reach back through; 0 keeps no graph at all.

    Older clips are folded into a psi without a graph and are let go, so memory does not grow with the video. The graph
    of the newest ones is built anew each time psi is asked for, since a clip's loss is back-propagated at once.
    """

    def __init__(self, pack: SemanticPack, cond: Conditioning, unroll: int):
        self.pack, self.cond, self.unroll = pack, cond, unroll
        self.settled: Tensor | None = None
        self.recent: list[Tensor] = []
        self.folded = 0

    def fold(self, clip_BCTHW: Tensor) -> None:
        """Add the next clip of the video, as the model will see it: the truth, an estimate or a rollout."""
        self.recent.append(clip_BCTHW.detach())
        self.folded += 1
        while len(self.recent) > self.unroll:
            with torch.no_grad():
                psi = self._start()
                self.settled = self.pack.update(psi, self.recent[0], first=self.folded == len(self.recent))
            self.recent.pop(0)

    def tokens(self) -> Tensor | None:
        """The memory's tokens `[B, M, D]` for the clip that comes next; None where there are none to see."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.unroll > 0):
            psi = self._start()
            before = self.folded - len(self.recent)
            for place, clip in enumerate(self.recent):
                psi = self.pack.update(psi, clip, first=before + place == 0)
            return self.pack.tokens(psi)

    def _start(self) -> Tensor:
        return self.pack.anchor(self.cond.text, self.cond.vision) if self.settled is None else self.settled
