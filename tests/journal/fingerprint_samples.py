"""Values of every kind a fingerprint knows, made anew at each call, for one process to compare with another."""

import enum
import functools
import math
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import torch


class Colour(enum.Enum):
    """An enum."""

    RED = 1
    BLUE = 2


class Bits(enum.Flag):
    """A flag."""

    A = 1
    B = 2


@dataclass(frozen=True)
class Plan:
    """A frozen dataclass."""

    name: str
    groups: tuple = ()
    options: dict = field(default_factory=dict)


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("__hidden", "a")

    def __init__(self, a, hidden):
        self.a, self.__hidden = a, hidden


class Thing:
    """Any object."""

    def __init__(self, **held):
        self.__dict__.update(held)

    def method(self):
        """A method."""

    @functools.lru_cache  # noqa: B019
    def cached(self):
        """A cached one."""


def scaled(x, factor=2, *, shift=0):
    """A function with defaults."""


def closure(value):
    """A function that holds a value."""

    def inner(x):
        return x * value

    return inner


def doubling(function):
    """A decorator that keeps the name of what it wraps."""

    @functools.wraps(function)
    def wrapper(x):
        return 2 * function(x)

    return wrapper


def tripling(function):
    """Another one."""

    @functools.wraps(function)
    def wrapper(x):
        return 3 * function(x)

    return wrapper


def with_attribute(function, **attributes):
    """A function anew, with attributes."""
    made = functools.partial(function)
    made.__dict__.update(attributes)
    return made


def cycle(last):
    """A list that holds itself, through a dictionary."""
    outer = [1]
    outer.append({"back": outer, "last": last})
    return outer


def ring(order):
    """Two objects that know each other, named in either order."""
    a, b = Thing(n=1), Thing(n=2)
    a.other, b.other = b, a
    return {name: {"a": a, "b": b}[name] for name in order}


def tensors_and_arrays():
    """Numbers in bulk."""
    base = torch.arange(6, dtype=torch.float32)
    tensors = [base, base.view(2, 3), base.view(3, 2), base.double(), base.half(), base.bfloat16(), base.int()]
    tensors += [
        base.to(torch.float8_e4m3fn),
        base.to(torch.float8_e5m2),
        base.bool(),
        base.to(torch.complex64),
        base + 1,
    ]
    tensors += [torch.empty(0), torch.empty(0, 3), torch.empty(3, 0), torch.tensor(1.0), torch.tensor([1.0])]
    tensors += [torch.tensor(-0.0), torch.tensor(0.0), base.to_sparse(), torch.Generator().manual_seed(3)]
    arrays = [
        np.arange(6, dtype="f4"),
        np.arange(6, dtype="f8"),
        np.arange(6).reshape(2, 3),
        np.float32(1),
        np.float64(1),
    ]
    arrays += [
        np.array([None, "x"], dtype=object),
        np.zeros(2, [("a", "<i4"), ("b", "<f4")]),
        np.datetime64("2020-01-01"),
    ]
    return tensors + arrays


def functions():
    """Things to call."""
    found = [scaled, closure(1), closure(2), closure("1"), closure(closure(1)), lambda: 1, lambda: 2, lambda x=3: 1]
    found += [functools.partial(scaled, 1), functools.partial(scaled, x=1), doubling(scaled), tripling(scaled)]
    found += [
        Thing(a=1).method,
        Thing(a=2).method,
        Thing,
        Plan,
        len,
        "x".join,
        "y".join,
        str.join,
        np.add,
        torch.add,
    ]
    return found


def plain_and_nested():
    """Values of Python, and objects."""
    plain = [None, True, False, 0, 1, -1, 10**30, 0.0, -0.0, 1.0, math.nan, math.inf, 1j, "", "1", "a", b"", b"1", "é"]
    plain += ["e\u0301", "\ud800", ..., PurePosixPath("a"), Colour.RED, Colour.BLUE, Bits.A, Bits.A | Bits.B]
    nested = [
        [],
        (),
        set(),
        {},
        [1],
        (1,),
        {1},
        {1: None},
        [[1]],
        [1, 2],
        [2, 1],
        [[1], 2],
        [[1, 2]],
        ["a", "b"],
        ["ab"],
    ]
    nested += [
        {"a": 1},
        {"a": "1"},
        {"a": 1, "b": 2},
        {"b": 1, "a": 2},
        {1: "a"},
        {"1": "a"},
        [None],
        range(3),
        slice(3),
    ]
    objects = [
        Plan("a"),
        Plan("b"),
        Plan("a", (1,)),
        Plan("a", (), {"x": 1}),
        Thing(),
        Thing(a=1),
        Thing(a=2),
        Thing(b=1),
    ]
    objects += [Slotted(1, 2), Slotted(2, 1), cycle(1), cycle(2), ring("ab"), torch.float32, torch.device("cpu"), math]
    return plain + nested + objects


def different_values():
    """Values of which no two may share a fingerprint."""
    return plain_and_nested() + tensors_and_arrays() + functions()


def all_fingerprints():
    """One fingerprint each, in order."""
    from frame_memory.journal.fingerprint import fingerprint

    return [fingerprint(value) for value in different_values()]
