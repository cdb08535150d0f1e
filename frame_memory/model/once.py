"""What every step of a section would compute to the same numbers, computed before its first step and kept to its last.

A prompt of a section carries a `Once` to the model beside its context (on Wan all prompts with the same history carry
the same one), and core lets go of it with the section. So nothing outlives what it was computed from. It is filled
before the network is called, which then gets tensors alone: a network that torch.compile has captured is one graph for
all steps of all sections. A network that is called without them computes them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

Made = TypeVar("Made")


class Once(Generic[Made]):
    """The last thing that was made, and all that it was made for."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, Made] | None = None

    def __call__(self, made_for: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives. made_for: all that it depends on and that may be other in the next call."""
        held = self._held  # core may run two prompts in threads, each on a GPU of its own
        if held is None or held[0] != made_for:
            self._held = held = (made_for, make())
        return held[1]


def vary(*sizes: tuple[Tensor | None, int]) -> None:
    """Tell torch.compile of sizes, (tensor or None, dimension) each, that the next section has others.

    The first graph then serves these too, where the second time torch would find out itself and capture another.
    """
    for tensor, dim in sizes:
        if tensor is not None:
            maybe_mark_dynamic(tensor, dim)
