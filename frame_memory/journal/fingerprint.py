"""A hash of what a value says, the same in every process: two values with one fingerprint decide the same section.

Each value is fed as a tag of its type and its contents, every part with its length, so that no two different values
read alike. Memory addresses, the order of dictionaries and sets, and `repr` of unknown things take no part.
"""

from __future__ import annotations

import dataclasses
import decimal
import enum
import functools
import hashlib
import math
import re
import struct
import types
from collections.abc import Iterable, Mapping, Set
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from ..model.tensor_file import StoredTensor, bytes_of, pieces, real
from .files import JournalError

# CPython's flag of a class that was made while running; a compiled class without it may hide what it holds.
HEAP_TYPE = 1 << 9


def fingerprint(value: object) -> str:
    """sha256, hex, of a value of any of these kinds, nested in any way, in cycles too:

    None, bool, int, float (every bit counts: -0.0 is not 0.0; all NaN are one), complex, str, bytes, Path, enum,
    Decimal, range, slice, list, tuple, set, mapping (any order of keys), dataclass, torch tensor (dtype, shape, bytes;
    not its device or strides), torch dtype, device and Generator, numpy array and scalar, function (module, name,
    defaults, attributes, what its closure holds; its code too where other functions may have its name), method,
    functools.partial, class, module, and any other object by its class and attributes. Code differs between versions
    of Python, nothing else does.

    1, 1.0 and True differ, and so do a list and a tuple. Raises JournalError, with the way to it, for a value that
    shows nothing of what it holds.
    """
    return _Walk().digest(value).hex()


class _Walk:
    """One call's state: the values on the way down (for cycles) and the digests of those that are done."""

    def __init__(self) -> None:
        self._depth: dict[int, int] = {}
        self._names: list[str] = []
        self._done: dict[int, tuple[object, bytes]] = {}  # the value too, so that its id stays its own
        self._cyclic = False

    def digest(self, value: object, name: str = "") -> bytes:
        """The digest of one value. name: how it is reached from the value around it, for errors."""
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._depth:
            self._cyclic = True
            return _hash(b"cycle", str(len(self._depth) - self._depth[key]).encode())
        outer, self._cyclic = self._cyclic, False
        self._depth[key] = len(self._depth)
        self._names.append(name)
        result = _hash(*self._parts(value))
        self._names.pop()
        del self._depth[key]
        if not self._cyclic:  # a part of a cycle reads otherwise from where it is entered
            self._done[key] = (value, result)
        self._cyclic |= outer
        return result

    def _parts(self, value: object) -> Iterable[bytes | Tensor]:
        """The tag and the contents of a value, innermost kinds first: a bool is an int, an enum may be a str."""
        for kind, parts in _PLAIN:
            if isinstance(value, kind):
                return (_type_tag(value, kind), *parts(value))
        for kind, walk in _NESTED:
            if isinstance(value, kind):
                return (_type_tag(value, kind), *walk(self, value))
        if dataclasses.is_dataclass(value):
            attributes = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return (b"dataclass", _name(type(value)), *self._mapping(attributes))
        return (b"object", _name(type(value)), *self._mapping(self._attributes(value)))

    def _mapping(self, value: Mapping) -> Iterable[bytes]:
        pairs = ((self.digest(k, "key"), self.digest(v, f"[{k!r}]" if isinstance(k, (str, int)) else "[...]"))
                 for k, v in value.items())  # fmt: skip
        return [part for pair in sorted(pairs) for part in pair]

    def _sequence(self, value: Iterable) -> Iterable[bytes]:
        return [self.digest(part, f"[{i}]") for i, part in enumerate(value)]

    def _set(self, value: Set) -> Iterable[bytes]:
        return sorted(self.digest(part, "{}") for part in value)

    def _tensor(self, value: Tensor) -> Iterable[bytes | Tensor]:
        value = real(value).detach()
        if hasattr(value, "__tensor_flatten__") and not isinstance(value, StoredTensor):
            names, context = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            inner = {name: getattr(value, name) for name in names}
            return [b"made of", _name(type(value)), self.digest(inner, ".parts"), self.digest(context, ".context")]
        if value.is_sparse:
            value = value.coalesce()
            inner = (tuple(value.shape), value.indices(), value.values())
            return [b"sparse", self.digest(inner, ".parts")]
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise self._refusal(f"A tensor of layout {value.layout} on {value.device}")
        value = value.cpu().resolve_conj().resolve_neg()
        return [str(value.dtype).encode(), repr(tuple(value.shape)).encode(), value]

    def _array(self, value: np.ndarray | np.generic) -> Iterable[bytes]:
        value = np.asarray(value)
        shape = repr(tuple(int(n) for n in value.shape)).encode()
        if value.dtype.hasobject:
            return [b"objects", shape, self.digest(value.reshape(-1).tolist(), ".items")]
        value = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        return [repr(value.dtype.descr).encode(), shape, value.tobytes()]

    def _function(self, value: types.FunctionType) -> Iterable[bytes]:
        cells = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            try:
                cells[name] = (cell.cell_contents,)
            except ValueError:  # not yet filled
                cells[name] = ()
        inner = (value.__defaults__, value.__kwdefaults__, vars(value), cells)
        parts = [_name(value), self.digest(inner, "()")]
        if "<" in value.__qualname__ or cells or "__wrapped__" in vars(value):  # lambdas, inner functions, decorators
            parts.append(self.digest(_code(value.__code__), ".code"))
        return parts

    def _method(self, value) -> Iterable[bytes]:
        return [self.digest(value.__self__, ".__self__"), self.digest(value.__func__, ".__func__")]

    def _builtin(self, value) -> Iterable[bytes]:
        owner = getattr(value, "__self__", None)
        inner = None if isinstance(owner, types.ModuleType) else owner
        return [_name(value), self.digest(inner, ".__self__")]

    def _partial(self, value: functools.partial) -> Iterable[bytes]:
        return [self.digest((value.func, value.args, value.keywords), "()")]

    def _attributes(self, value: object) -> dict[str, object]:
        """What an object holds: its dictionary and its slots. Raises JournalError where it shows neither."""
        slots = [s for c in type(value).__mro__ for s in _slots(c)]
        found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        held = getattr(value, "__dict__", None)
        classes = type(value).__mro__[:-1]  # all but object
        shown = held is not None or all("__slots__" in c.__dict__ for c in classes)
        if not shown or not all(c.__flags__ & HEAP_TYPE for c in classes):
            raise self._refusal(f"A {_name(type(value)).decode()}")
        return {**found, **(held or {})}

    def _refusal(self, what: str) -> JournalError:
        way = "".join(self._names) or "the value itself"
        return JournalError(
            f"{what} (at {way}) shows nothing of what it holds, so what is made with it cannot be told from other "
            "results. Give the journal a description of it instead."
        )


def _slots(kind: type) -> list[str]:
    named = kind.__dict__.get("__slots__", ())
    names = [named] if isinstance(named, str) else list(named)
    hidden = [f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return [n for n in hidden if n not in ("__dict__", "__weakref__")]


def _code(code: types.CodeType) -> tuple:
    constants = tuple(_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames


def _name(thing) -> bytes:
    module = getattr(thing, "__module__", None)
    return f"{module}.{getattr(thing, '__qualname__', thing.__name__)}".encode(errors="surrogatepass")


def _type_tag(value: object, kind: type | tuple) -> bytes:
    """The kind's name; for a subclass of a plain kind its own name too, since it may mean something else."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    exact = type(value) in kinds or kind in _OPEN_KINDS
    return kinds[0].__name__.encode() + (b"" if exact else b" " + _name(type(value)))


def _hash(*parts: bytes | Tensor) -> bytes:
    """The digest of parts, each with its length in bytes; of a tensor on the CPU its numbers."""
    digest = hashlib.sha256()
    for part in parts:
        whole = isinstance(part, bytes)
        digest.update(struct.pack("<Q", len(part) if whole else part.numel() * part.dtype.itemsize))
        # Views, not copies: a history may be as large as the memory.
        for data in [part] if whole else map(bytes_of, pieces(part)):
            digest.update(data)
    return digest.digest()


def _text(value: str) -> tuple[bytes, ...]:
    return (value.encode("utf-8", "surrogatepass"),)


def _bits(value: float) -> tuple[bytes, ...]:
    return (b"nan" if math.isnan(value) else struct.pack("<d", value),)


def _number(value: int) -> tuple[bytes, ...]:
    return (b"%x" % value if value >= 0 else b"-%x" % -value,)


_FUNCTIONS = (types.BuiltinFunctionType, types.MethodWrapperType)
_DESCRIPTORS = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType, np.ufunc)
_OPEN_KINDS = (enum.Flag, enum.Enum, PurePath, Tensor, type, _FUNCTIONS, _DESCRIPTORS, np.generic)
_PLAIN = (
    (type(None), lambda v: ()),
    (enum.Flag, lambda v: (_name(type(v)), *_number(v.value))),
    (enum.Enum, lambda v: (_name(type(v)), *_text(v.name))),
    (bool, lambda v: (b"%d" % v,)),
    (int, lambda v: _number(int(v))),
    (np.generic, lambda v: _Walk()._array(v)),  # before float: np.float64 is one
    (float, lambda v: _bits(float(v))),
    (complex, lambda v: (*_bits(v.real), *_bits(v.imag))),
    (str, lambda v: _text(str.__str__(v))),
    ((bytes, bytearray, memoryview), lambda v: (bytes(v),)),
    (PurePath, lambda v: _text(v.as_posix())),
    (decimal.Decimal, lambda v: _text(str(v))),
    (torch.dtype, lambda v: _text(str(v))),
    (torch.device, lambda v: _text(str(v))),
    ((torch.layout, torch.memory_format), lambda v: _text(str(v))),
    (type, lambda v: (_name(v),)),
    (types.ModuleType, lambda v: _text(v.__name__)),
    ((type(Ellipsis), type(NotImplemented)), lambda v: _text(type(v).__name__)),
)
_NESTED = (
    (Tensor, _Walk._tensor),
    (np.ndarray, _Walk._array),
    (tuple, _Walk._sequence),
    (list, _Walk._sequence),
    ((set, frozenset), _Walk._set),
    ((dict, types.MappingProxyType), _Walk._mapping),
    (range, lambda w, v: w._sequence((v.start, v.stop, v.step))),
    (slice, lambda w, v: w._sequence((v.start, v.stop, v.step))),
    (torch.Generator, lambda w, v: w._tensor(v.get_state())),
    (types.FunctionType, _Walk._function),
    (types.MethodType, _Walk._method),
    (functools.partial, _Walk._partial),
    (_FUNCTIONS, _Walk._builtin),
    (_DESCRIPTORS, lambda w, v: [_name(v)]),
    (re.Pattern, lambda w, v: [w.digest((v.pattern, v.flags), ".pattern")]),
)
