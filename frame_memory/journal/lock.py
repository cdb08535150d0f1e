"""One writer a project: `lock.json` names its owner, and an owner that is gone is recognised.

The file is made exclusively, and its owner holds a lock of the operating system on it, which the system drops when the
process ends, however it ends. So on one machine the lock of the system decides; where a file system has none, the
process number with its start time does; and an owner on another machine counts as gone when it has not touched the
file for STALE_AFTER seconds, by the clock of the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import secrets
import time
import weakref
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from .files import PART, JournalError, explained, flush_file, patiently

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NAME = "lock.json"
# Seconds without a touch after which an owner on another machine counts as gone; a section takes far less.
STALE_AFTER = 600.0
# Seconds to wait before reading back a taken-over lock where no lock of the system tells two takers apart.
SETTLE = 0.3
# Seconds between two attempts where the owner is dead and a process it had just forked has yet to let go.
FORKED = 0.1
_LOCKED_BYTE = 2**30  # on Windows a locked byte cannot be read: one far behind the text

log = logging.getLogger(__name__)


class ProjectLocked(JournalError):
    """Another writer has the project; the message names it."""


@dataclass(frozen=True)
class Owner:
    """Who wrote lock.json. start: when its process started, None where that cannot be asked; time: ISO, UTC."""

    pid: int
    host: str
    start: str | None
    token: str
    time: str
    system_lock: bool

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host!r} (since {self.time} UTC)"


def process_start(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None where the system does not say or it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def is_alive(pid: int, start: str | None) -> bool | None:
    """Whether the process that said this about itself still runs on this machine; None where nobody can tell."""
    if pid <= 0:
        return False
    if process_start(os.getpid()) is not None:
        now = process_start(pid)
        return now is not None and start in (None, now)
    if os.name == "nt":  # os.kill would end it there
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def read_owner(folder: Path) -> Owner | None:
    """The owner that lock.json names; None without the file or with one that cannot be understood."""
    try:
        return _parse(patiently((folder / NAME).read_bytes))
    except OSError:
        return None


def _parse(data: bytes) -> Owner | None:
    try:
        found = json.loads(data)
        start = found["start"]
        return Owner(int(found["pid"]), str(found["host"]), None if start is None else str(start), str(found["token"]),
                     str(found["time"]), bool(found.get("system_lock")))  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class ProjectLock:
    """Context manager that owns a project's folder. `note` says whom it was taken over from, else None.

    A second one in the same process is refused like one of another process. Raises ProjectLocked, or JournalError
    where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.note = folder, None
        self._path, self._token = folder / NAME, secrets.token_hex(16)
        self._file: FileIO | None = None
        _held.add(self)

    def __enter__(self) -> ProjectLock:
        try:
            for _ in range(20):
                if self._try():
                    return self
        except OSError as error:
            self._drop()
            raise explained(error, self._path) from error
        except BaseException:
            self._drop()
            raise
        raise ProjectLocked(self._refusal(read_owner(self.folder)))

    def __exit__(self, *exception) -> None:
        """Give the project back. A lock that another has taken over meanwhile is left alone."""
        if self._file is None:
            return
        owner = read_owner(self.folder)
        ours = owner is not None and owner.token == self._token
        if os.name == "nt":  # an open file cannot be removed there, and a next owner's open one neither
            self._drop()
        if ours:
            with contextlib.suppress(OSError):
                os.remove(self._path)
        self._drop()

    def touch(self) -> None:
        """Say that the owner lives; called once a section. Raises ProjectLocked if another has taken over.

        A lock file that somebody removed is made again, unless the folder is gone: that raises JournalError.
        """
        try:
            removed = self.folder.is_dir() and not self._path.exists()
            owner = None if removed else _parse(patiently(self._path.read_bytes))
        except OSError as error:
            raise explained(error, self._path) from error
        if self._file is None or removed:
            self._drop()
            self.__enter__()
        elif owner is None or owner.token != self._token:
            raise ProjectLocked(self._refusal(owner))
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def _try(self) -> bool:
        """One attempt: True when owned, False when the file changed under it and another attempt is due."""
        try:
            self._file = patiently(lambda: FileIO(self._path, "x+"))
            fresh = True
        except FileExistsError:
            fresh = False
        if not fresh:
            try:
                self._file = patiently(lambda: FileIO(self._path, "r+"))
            except FileNotFoundError:
                return False
        assert self._file is not None
        system_lock = _system_lock(self._file)
        if system_lock is False or not self._is_current():
            return self._give_way(fresh, system_lock)
        if not fresh:
            self._take_over(system_lock)
        self._write(bool(system_lock))
        if system_lock or fresh:
            return True
        time.sleep(SETTLE)
        now = read_owner(self.folder)
        return now is not None and now.token == self._token or self._give_way(False, None)

    def _give_way(self, fresh: bool, system_lock: bool | None) -> bool:
        """Let go of a file that is another's, or no longer the one of that name. A live owner raises ProjectLocked."""
        self._drop()
        if system_lock is False and not fresh:
            owner = read_owner(self.folder)
            here = owner is not None and owner.host == platform.node()
            if not here or is_alive(owner.pid, owner.start) is not False:
                raise ProjectLocked(self._refusal(owner))
            # Killed while it forked: until the child's first step, that shares the lock of the system.
            time.sleep(FORKED)
        return False

    def _is_current(self) -> bool:
        """Whether the open file is still the one of that name; its owner may have removed it meanwhile."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _take_over(self, system_lock: bool | None) -> None:
        """Go on if the owner in the open file is gone, else raise ProjectLocked."""
        assert self._file is not None
        self._file.seek(0)
        owner = _parse(self._file.read() or b"")
        if owner is None:  # its writer was killed, or is about to write where no lock of the system shows it
            gone = bool(system_lock) or self._age() > STALE_AFTER
        elif owner.host != platform.node():
            gone = self._age() > STALE_AFTER
        elif owner.system_lock and system_lock:
            gone = True
        else:
            alive = is_alive(owner.pid, owner.start)
            gone = self._age() > STALE_AFTER if alive is None else not alive
        if not gone:
            raise ProjectLocked(self._refusal(owner))
        who = owner.words if owner else "a process that left an unfinished lock file"
        self.note = f"Took the project over from {who}, which no longer runs."
        log.warning("%s: %s", self.folder, self.note)

    def _age(self) -> float:
        """Seconds since the lock was touched, by the disk's own clock: a server's differs from ours."""
        probe = self.folder / f".clock.{self._token[:8]}{PART}"
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime - self._path.stat().st_mtime
        finally:
            with contextlib.suppress(OSError):
                os.remove(probe)

    def _write(self, system_lock: bool) -> None:
        assert self._file is not None
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        pid = os.getpid()
        owner = Owner(pid, platform.node(), process_start(pid), self._token, stamp, system_lock)
        data = json.dumps(asdict(owner), indent=1).encode()
        try:
            self._file.seek(0)
            self._file.truncate()
            while data:
                data = data[os.write(self._file.fileno(), data) :]
            flush_file(self._file.fileno())
        except OSError:
            if os.name == "nt":
                self._drop()
            with contextlib.suppress(OSError):
                os.remove(self._path)
            raise

    def _refusal(self, owner: Owner | None) -> str:
        who = owner.words if owner else "a process that does not say who it is"
        return (
            f"The project {self.folder.name!r} ({self.folder}) is being written by {who}: another queue item or "
            "another ComfyUI. Wait until it is done, or choose another name for 'project'."
        )

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _system_lock(file: FileIO) -> bool | None:
    """True: taken, until the file is closed. False: another open file has it. None: this file system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True


_held: weakref.WeakSet[ProjectLock] = weakref.WeakSet()


def _let_go_after_fork() -> None:
    """A forked child shares the open file, and would hold the lock beyond its parent's end."""
    for lock in _held:
        lock._drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_after_fork)
