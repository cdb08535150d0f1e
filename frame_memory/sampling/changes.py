"""Sections that an artist wants made anew: with another seed, other words, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..plan import LongVideoPlan, PlanError

NODE = "Pick Section"


@dataclass(frozen=True)
class SectionChange:
    """SECTION_CHANGES socket holds a tuple of these.

    number: the section's place in the video, from 1. seed: None keeps the run's own noise. positive: a stock
    CONDITIONING whose text takes the place of the run's, or None.
    """

    number: int
    seed: int | None = None
    positive: list | None = None


def by_index(changes: Sequence[SectionChange], plan: LongVideoPlan) -> Mapping[int, SectionChange]:
    """Changes by the place of their section in the order of making. Raises PlanError past the end, or for one twice."""
    in_time = sorted(plan.sections, key=lambda s: s.start)
    found: dict[int, SectionChange] = {}
    for change in changes:
        if not 1 <= change.number <= len(in_time):
            raise PlanError(
                f"'{NODE}' picks section {change.number}, but this video has sections 1 to {len(in_time)} "
                f"({plan.section_seconds:g} s each). Nearest: {min(max(change.number, 1), len(in_time))}. Change "
                f"'section' in '{NODE}'."
            )
        index = in_time[change.number - 1].index
        if index in found:
            raise PlanError(f"Two '{NODE}' nodes pick section {change.number}; expected one. Remove one of them.")
        found[index] = change
    return found
