"""Fingerprints: equal for equal values in any process, different for different ones."""

import copy
import functools
import math
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.journal.files import JournalError
from frame_memory.journal.fingerprint import fingerprint
from frame_memory.model import tensor_file
from frame_memory.model.tensor_file import StoredTensor

from . import fingerprint_samples as samples
from .fingerprint_samples import Plan, Thing, closure

REPO = Path(__file__).resolve().parents[2]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary()
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=3) | st.tuples(v, v) | st.dictionaries(st.text(max_size=3) | st.integers(), v),
    max_leaves=8,
)


def same(a, b):
    """Equal with types and the sign of zero, which == does not see: an oracle of its own."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(k in b and same(v, b[k]) for k, v in a.items())
    return a == b


def test_different_values_differ():
    values, prints = samples.different_values(), samples.all_fingerprints()
    seen = {}
    for value, text in zip(values, prints):
        assert text not in seen, f"{value!r} reads as {seen[text]!r}"
        seen[text] = value
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in prints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x, lambda x: x.permute(3, 1, 0, 2), lambda x: x[:1].expand(3, -1, -1, -1), lambda x: x[:, :, 1:, ::2],
        lambda x: x[:, :0].transpose(0, 1), lambda x: x[0, 0, 0, 0], lambda x: x.reshape(1, 1, -1).expand(2, 1, -1),
    ],
)  # fmt: skip
def test_a_tensor_whose_numbers_do_not_lie_in_order_is_read_in_small_pieces(view, dtype, monkeypatch):
    tensor = view(torch.randn(2, 7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    whole = fingerprint(tensor.clone(memory_format=torch.contiguous_format))
    monkeypatch.setattr(tensor_file, "PIECE", 40)
    pieces = list(tensor_file.pieces(tensor))
    assert fingerprint(tensor) == whole
    assert b"".join(p.float().numpy().tobytes() for p in pieces) == tensor.float().contiguous().numpy().tobytes()
    own = tensor.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == own or p.nbytes <= 40 for p in pieces)


def test_the_same_in_every_process_whatever_its_hash_seed():
    here = samples.all_fingerprints()
    assert here == samples.all_fingerprints()
    folders = [str(REPO), str(REPO / "tests")]
    code = f"import sys; sys.path[:0] = {folders}\nfrom {samples.__name__} import all_fingerprints"
    line = [sys.executable, "-c", code + "\nprint(*all_fingerprints())"]
    env = {**os.environ, "PYTHONHASHSEED": "4242"}
    there = subprocess.run(line, capture_output=True, text=True, check=True, env=env, cwd=REPO)
    assert there.stdout.split() == here


@given(VALUES, VALUES)
def test_equal_exactly_when_the_values_are(a, b):
    assert (fingerprint(a) == fingerprint(b)) == same(a, b)
    assert fingerprint(a) == fingerprint(copy.deepcopy(a))


@given(st.lists(st.tuples(st.text(max_size=4) | st.integers(), VALUES), max_size=4, unique_by=lambda pair: pair[0]))
def test_the_order_of_keys_does_not_count(items):
    value, turned = dict(items), dict(reversed(items))
    assert fingerprint(turned) == fingerprint(value) == fingerprint(types.MappingProxyType(value))
    assert fingerprint(set(value)) == fingerprint(set(turned))


def test_every_bit_of_a_float_counts_and_nan_is_one():
    assert fingerprint(0.1 + 0.2) != fingerprint(0.3)
    assert fingerprint(math.nan) == fingerprint(-math.nan) == fingerprint(float("inf") - float("inf"))


def test_a_tensors_layout_in_memory_does_not_count():
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    same_values = [
        base.clone(),
        base.t().contiguous().t(),
        torch.cat([base, base], 1)[:, :6],
        base.clone().requires_grad_(),
    ]
    same_values += [torch.nn.Parameter(base.clone()), torch._neg_view(-base)]
    same_values += [StoredTensor(lambda: base, base.shape, base.dtype)]
    assert {fingerprint(t) for t in same_values} == {fingerprint(base)}
    complex_one = torch.complex(base, base)
    assert fingerprint(complex_one.conj()) == fingerprint(torch.complex(base, -base))
    assert base.equal(same_values[0]), "the input is left as it was"


def test_numpy_arrays_read_the_same_in_either_byte_order_and_layout():
    value = np.arange(12, dtype="<i4").reshape(3, 4)
    assert fingerprint(value) == fingerprint(value.astype(">i4")) == fingerprint(np.asfortranarray(value))
    assert fingerprint(np.array(1.5)) == fingerprint(np.array(1.5)) != fingerprint(np.array([1.5]))


def test_paths_read_the_same_on_every_system():
    assert fingerprint(PurePosixPath("a/b")) == fingerprint(PureWindowsPath("a\\b")) != fingerprint("a/b")


def test_functions_are_their_names_defaults_and_what_they_hold():
    shared = [1, 2]
    assert fingerprint(closure(shared)) == fingerprint(closure([1, 2]))
    assert fingerprint(functools.partial(closure, 1)) == fingerprint(functools.partial(closure, 1))
    a, b = lambda x: x, lambda x: x
    assert fingerprint(a) == fingerprint(b)
    b.strength = 2
    assert fingerprint(a) != fingerprint(b)


def recursive(n):
    def inner(k):
        return inner(k - n)

    return inner


def test_cycles_end_and_do_not_depend_on_where_they_lie_in_memory_or_on_order():
    assert fingerprint(samples.cycle(3)) == fingerprint(samples.cycle(3))
    assert fingerprint(samples.ring("ab")) == fingerprint(samples.ring("ba"))
    assert fingerprint(recursive(1)) == fingerprint(recursive(1)) != fingerprint(recursive(2))


def test_values_that_are_shared_read_as_if_they_were_not():
    part = Thing(data=torch.ones(3))
    assert fingerprint([part, {"x": part}]) == fingerprint([copy.deepcopy(part), {"x": copy.deepcopy(part)}])


def test_a_diamond_of_many_levels_takes_no_time():
    value = [1]
    for _ in range(60):
        value = [value, value]
    assert fingerprint(value)


class Opaque(threading.Thread):
    """An object that holds a lock somewhere."""


@pytest.mark.parametrize(
    "value, way",
    [
        (threading.Lock(), "the value itself"),
        ({"options": [Thing(inner=threading.Lock())]}, r"\['options'\]\[0\]\['inner'\]"),
        (torch.empty(3, device="meta"), "meta"),
        (iter([1]), "iterator"),
        (Opaque(), "at "),
    ],
)
def test_what_shows_nothing_of_itself_is_refused_with_the_way_to_it(value, way):
    with pytest.raises(JournalError, match=way):
        fingerprint(value)


def test_a_dataclass_is_its_class_and_fields():
    assert fingerprint(Plan("a", (1,), {"x": 1, "y": 2})) == fingerprint(Plan("a", (1,), {"y": 2, "x": 1}))
    assert fingerprint(Plan("a")) != fingerprint({"name": "a", "groups": (), "options": {}})
