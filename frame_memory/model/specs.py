"""Descriptions of networks that go through JSON into the metadata of a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Spec = TypeVar("Spec")


def from_plain(cls: type[Spec], data: Mapping, *tuples: str) -> Spec:
    """A dataclass from plain data. tuples: its fields that JSON holds as lists.

    Raises ValueError for names that this version does not know, or missing ones.
    """
    kind: Any = cls
    known = {f.name for f in fields(kind)}
    if not set(data) <= known:
        raise ValueError(f"A memory of a newer version: {', '.join(sorted(set(data) - known))} is not known here.")
    try:
        return kind(**{**data, **{name: tuple(data[name]) for name in tuples}})
    except (KeyError, TypeError) as error:
        raise ValueError(f"The description of the memory is not complete: {error}") from error
