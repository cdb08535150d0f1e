"""What every step of a section would compute to the same numbers, computed in its first step and kept to its last.

A prompt of a section carries a `Once` to the network beside its context (on Wan all prompts with the same history carry
the same one), and core lets go of it with the section. So nothing outlives what it was computed from; a network that is
called without one computes everything each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class Once:
    """Tensors by name, each for the sizes and the device that it was computed for."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Hashable, Tensor]] = {}

    def __call__(self, name: str, made_for: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name. made_for: all that it depends on and that may be other in the next call."""
        held = self._held.get(name)
        if held is None or held[0] != made_for:
            self._held[name] = held = (made_for, make())
        return held[1]


def every_time(name: str, made_for: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What stands in for a `Once` where nothing is to be kept."""
    return make()
