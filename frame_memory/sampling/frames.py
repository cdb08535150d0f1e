"""The latent frames of a video while it is made: in memory, or on disk with a few sections at hand.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, in VAE space.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

# A context reads at most 19 latent frames behind the window, so three sections of 9 and the one at work.
AT_HAND = 4


@dataclass
class LatentFrames:
    """Frames `[B, C, total, H, W]` by their place in the video.

    first: the start frame or an existing video, which lies in front. load: reads a finished section again by its place
    in the order of making; where it is given, only the `AT_HAND` sections used last stay in memory.
    """

    first: Tensor
    total: int
    load: Callable[[int], Tensor] | None = None
    _spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    # By place: looked up for every frame of a context, so it must cost the same however long the video is.
    _makers: dict[int, tuple[int, int]] = field(default_factory=dict)
    _held: OrderedDict[int, Tensor] = field(default_factory=OrderedDict)

    def put(self, index: int, start: int, window: Tensor) -> None:
        """Add the section `index`, whose frames begin at `start`."""
        self.expect(index, start, start + window.shape[2])
        self._hold(index, window)

    def expect(self, index: int, start: int, stop: int) -> None:
        """Add the section `index` without reading it; `load` does when one of its frames is asked for."""
        self._spans[index] = (start, stop)
        self._makers |= {place: (index, place - start) for place in range(start, stop)}

    def _hold(self, index: int, window: Tensor) -> Tensor:
        self._held[index] = window
        self._held.move_to_end(index)
        while self.load is not None and len(self._held) > AT_HAND:
            self._held.popitem(last=False)
        return window

    def window_of(self, index: int) -> Tensor:
        """A finished section's frames."""
        if index in self._held:
            return self._hold(index, self._held[index])
        assert self.load is not None  # else nothing was ever let go
        return self._hold(index, self.load(index))

    def made_by(self, place: int) -> tuple[int, int] | None:
        """The section that a frame belongs to and its number in there; None in front of them and where none is made."""
        return None if place < self.first.shape[2] else self._makers.get(place)

    def frame(self, place: int) -> Tensor:
        """One frame `[B, C, 1, H, W]`; zeros where none has been made yet."""
        if place < self.first.shape[2]:
            return self.first[:, :, place : place + 1]
        made = self.made_by(place)
        if made is None:
            return torch.zeros_like(self.first[:, :, :1])
        index, number = made
        return self.window_of(index)[:, :, number : number + 1]

    def between(self, start: int, stop: int) -> Tensor:
        """Frames `[start, stop)` as one tensor."""
        return torch.cat([self.frame(place) for place in range(start, stop)], dim=2)

    def spans_in_time(self) -> dict[tuple[int, int], Callable[[], Tensor]]:
        """`(start, stop)` of the frames in front and of every section, in the order of time, with what reads them."""
        spans: dict[tuple[int, int], Callable[[], Tensor]] = {(0, self.first.shape[2]): lambda: self.first}
        for index, span in sorted(self._spans.items(), key=lambda item: item[1]):
            spans[span] = partial(self.window_of, index)
        return spans

    def whole(self) -> Tensor:
        """The video `[B, C, total, H, W]`, in memory."""
        return torch.cat([load() for load in self.spans_in_time().values()], dim=2)
