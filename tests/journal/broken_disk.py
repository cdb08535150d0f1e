"""Disks that fail: a process killed, a disk full, or the power lost, at any one call to the system.

The calls themselves are counted and made to fail; everything else is the real code on real files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

CALLS = ("open", "write", "fsync", "replace", "remove", "mkdir", "rmdir")
REAL = {name: getattr(os, name) for name in (*CALLS, "close")}


@contextlib.contextmanager
def intercepted(wrap: Callable[[str, Callable], Callable], names=CALLS) -> Iterator[None]:
    """The system calls replaced by what `wrap(name, real)` gives, for the length of the block."""
    try:
        for name in names:
            setattr(os, name, wrap(name, REAL[name]))
        yield
    finally:
        for name in names:
            setattr(os, name, REAL[name])


class Counter:
    """Calls to the system, counted; at number `at` (from 0) `fail` gets (name, real, arguments) instead of it."""

    def __init__(self, at: int, fail: Callable, lasting: bool = False) -> None:
        self.count, self.at, self.fail, self.lasting = 0, at, fail, lasting

    def __call__(self, name, real):
        def call(*args, **kwargs):
            number, self.count = self.count, self.count + 1
            if number == self.at or (self.lasting and number > self.at >= 0):
                return self.fail(name, real, args)
            return real(*args, **kwargs)

        return call


def die(name, real, args):
    """The process is killed before the call; a write gets half of its bytes out."""
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    os._exit(9)


def full(name, real, args):
    """The disk has no room: nothing grows, what frees room or only flushes or reads still works, save that a first
    flush may be where the system says so."""
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    if name in ("remove", "rmdir") or (name == "open" and not args[1] & os.O_CREAT):
        return real(*args)
    raise OSError(errno.ENOSPC, "No space left on device")


class Recorder:
    """What was asked of the disk, in order, by paths under `root`; each file has a number of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.steps = root, []
        self._fds: dict[int, tuple[str, object]] = {}
        self._numbers = itertools.count()
        self._files: dict[str, int] = {}

    def note(self, what) -> None:
        """A mark between the calls."""
        self.steps.append(("mark", what))

    def _inside(self, path) -> str | None:
        path = Path(path)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None

    def __call__(self, name, real):
        return getattr(self, f"_{name}", lambda *args: real(*args))

    def _open(self, path, flags, mode=0o777):
        fd, inside = REAL["open"](path, flags, mode), self._inside(path)
        if inside is None:
            return fd
        if flags & os.O_CREAT:
            self._files[inside] = next(self._numbers)
            self.steps.append(("create", inside, self._files[inside]))
        self._fds[fd] = ("folder", inside) if os.path.isdir(path) else ("file", self._files[inside])
        return fd

    def _close(self, fd):
        self._fds.pop(fd, None)
        REAL["close"](fd)

    def _write(self, fd, data):
        if fd in self._fds:
            self.steps.append(("write", self._fds[fd][1], bytes(data)))
        return REAL["write"](fd, data)

    def _fsync(self, fd):
        REAL["fsync"](fd)
        if fd in self._fds:
            kind, which = self._fds[fd]
            self.steps.append((f"sync {kind}", which))

    def _replace(self, source, target):
        REAL["replace"](source, target)
        a, b = self._inside(source), self._inside(target)
        self._files[b] = self._files.pop(a)
        self.steps.append(("replace", a, b))

    def _remove(self, path):
        REAL["remove"](path)
        self.steps.append(("remove", self._inside(path)))

    def _mkdir(self, path, mode=0o777):
        REAL["mkdir"](path, mode)
        self.steps.append(("mkdir", self._inside(path)))


def folder_of(path: str) -> str:
    """The folder whose flush makes a name last."""
    return Path(path).parent.as_posix()


class Disk:
    """A disk that keeps nothing it was not told to flush, and names in any combination.

    ordered: a file system whose log keeps names in order, and is written out by any file's flush (NTFS, where a folder
    cannot be flushed).
    """

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered
        self.names: dict[str, int | None] = {}  # None: a folder
        self.pending: list[tuple[tuple, set[str]]] = []
        self.now: dict[int, bytes] = {}
        self.safe: dict[int, bytes] = {}

    def step(self, step: tuple) -> None:
        """One call, carried out in memory; what lasts of it is another matter."""
        kind = step[0]
        if kind == "write":
            self.now[step[1]] += step[2]
        elif kind == "sync file":
            self.safe[step[1]] = self.now[step[1]]
            if self.ordered:
                self._settle({folder for _, folders in self.pending for folder in folders})
        elif kind == "sync folder":
            self._settle({step[1]})
        elif kind != "mark":
            if kind == "create":
                self.now[step[2]] = self.safe[step[2]] = b""
            paths = step[1:3] if kind == "replace" else step[1:2]
            self.pending.append((step, {folder_of(path) for path in paths}))

    def _settle(self, flushed: set[str]) -> None:
        left = []
        for step, folders in self.pending:
            folders = folders - flushed
            if folders:
                left.append((step, folders))
            else:
                self._apply(self.names, step)
        self.pending = left

    @staticmethod
    def _apply(names: dict, step: tuple) -> None:
        if step[0] == "create":
            names[step[1]] = step[2]
        elif step[0] == "mkdir":
            names[step[1]] = None
        elif step[0] == "remove":
            names.pop(step[1], None)
        elif step[1] in names:
            names[step[2]] = names.pop(step[1])

    def after_power_loss(self) -> Iterator[dict[str, bytes | None]]:
        """Every folder tree that may be found: path -> contents, None for a folder."""
        steps = [step for step, _ in self.pending]
        if self.ordered:
            chosen = [steps[:n] for n in range(len(steps) + 1)]
        else:
            assert len(steps) < 8, "too many names left unflushed"
            chosen = [list(itertools.compress(steps, bits)) for bits in itertools.product((0, 1), repeat=len(steps))]
        for applied in chosen:
            names = dict(self.names)
            for step in applied:
                self._apply(names, step)
            for share in (0, 0.5, 1):
                yield {p: None if n is None else self._contents(n, share) for p, n in names.items()}

    def _contents(self, number: int, share: float) -> bytes:
        safe, now = self.safe[number], self.now[number]
        return now[: len(safe) + int(share * (len(now) - len(safe)))]


def lay_out(root: Path, tree: dict[str, bytes | None]) -> None:
    """A folder tree as real files. What lies in a folder that did not last is gone with it."""
    root.mkdir()
    for path in sorted(tree):
        if (root / path).parent.is_dir():
            if tree[path] is None:
                (root / path).mkdir()
            else:
                (root / path).write_bytes(tree[path])
