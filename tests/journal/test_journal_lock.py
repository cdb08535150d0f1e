"""One writer a project, and owners that are gone."""

import errno
import importlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, replace

import pytest

from frame_memory.journal import lock as lock_module
from frame_memory.journal.files import DiskFull, JournalError
from frame_memory.journal.lock import NAME, Owner, ProjectLock, ProjectLocked, process_start, read_owner

PROCESSES = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


def hold(folder, told):
    with ProjectLock(folder):
        told.send("held")
        time.sleep(60)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


def holder(folder):
    """Another process that has the lock."""
    heard, told = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=hold, args=(folder, told), daemon=True)
    process.start()
    assert heard.recv() == "held"
    return process


def written(folder, **changes):
    """A lock.json that its owner left without a lock of the system, as on a file system that has none."""
    pid = os.getpid()
    owner = Owner(pid, platform.node(), process_start(pid), "f" * 32, "2026-01-01 00:00:00", False)
    owner = replace(owner, **changes)
    (folder / NAME).write_text(json.dumps(asdict(owner)))
    return owner


@pytest.fixture
def no_system_locks(monkeypatch):
    monkeypatch.setattr(lock_module, "_system_lock", lambda file: None)
    monkeypatch.setattr(lock_module, "SETTLE", 0.02)


def test_fault_11_the_second_writer_in_the_same_process_is_refused(tmp_path):
    with ProjectLock(tmp_path):
        with pytest.raises(ProjectLocked) as refused, ProjectLock(tmp_path):
            pass
        text = str(refused.value)
        assert f"process {os.getpid()}" in text and platform.node() in text and str(tmp_path) in text
        assert "another name for 'project'" in text and "Wait" in text
    assert not (tmp_path / NAME).exists()
    with ProjectLock(tmp_path) as lock:
        assert lock.note is None


def test_fault_11_the_writer_of_another_process_is_named_and_its_death_frees_the_project(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ProjectLocked, match=f"process {process.pid} "), ProjectLock(tmp_path):
            pass
    finally:
        process.kill()
        process.join()
    assert (tmp_path / NAME).exists()
    with ProjectLock(tmp_path) as lock:
        assert f"process {process.pid}" in lock.note and "no longer runs" in lock.note
        assert read_owner(tmp_path).pid == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_fault_11_a_killed_owner_still_unreaped_is_gone(tmp_path):
    process = holder(tmp_path)
    process.kill()  # and not joined
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with ProjectLock(tmp_path):
                break
        except ProjectLocked:
            time.sleep(0.05)
    else:
        pytest.fail("a zombie kept the project")
    process.join()


def test_fault_11_a_live_owner_without_a_lock_of_the_system_is_respected(tmp_path, no_system_locks):
    written(tmp_path)
    with pytest.raises(ProjectLocked), ProjectLock(tmp_path):
        pass
    assert read_owner(tmp_path).token == "f" * 32


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"pid": 0}, {"pid": -1}])
def test_fault_11_a_dead_owner_without_a_lock_of_the_system_is_taken_over(tmp_path, no_system_locks, changes):
    written(tmp_path, **changes)
    with ProjectLock(tmp_path) as lock:
        assert "no longer runs" in lock.note


@linux
def test_fault_11_a_reused_process_number_is_recognised(tmp_path, no_system_locks):
    written(tmp_path, start="another boot 1")
    with ProjectLock(tmp_path) as lock:
        assert lock.note


def test_fault_11_another_machine_counts_as_gone_after_ten_minutes_without_a_touch(tmp_path):
    written(tmp_path, host="elsewhere", pid=2**22 + 1)
    with pytest.raises(ProjectLocked, match="elsewhere"), ProjectLock(tmp_path):
        pass
    old = time.time() - 590
    os.utime(tmp_path / NAME, (old, old))
    with pytest.raises(ProjectLocked), ProjectLock(tmp_path):
        pass
    os.utime(tmp_path / NAME, (old - 20, old - 20))
    with ProjectLock(tmp_path) as lock:
        assert "elsewhere" in lock.note


@pytest.mark.parametrize("text", ["", "{", '{"pid": 3}', "null", '{"pid": "x", "host": 1, "start": 2}'])
def test_fault_11_a_lock_file_its_writer_never_finished(tmp_path, text, monkeypatch):
    (tmp_path / NAME).write_text(text)
    with ProjectLock(tmp_path) as lock:
        assert "unfinished lock file" in lock.note
    (tmp_path / NAME).write_text(text)
    monkeypatch.setattr(lock_module, "_system_lock", lambda file: None)
    with pytest.raises(ProjectLocked), ProjectLock(tmp_path):
        pass


def test_fault_11_touch_keeps_it_and_notices_another_owner(tmp_path):
    with ProjectLock(tmp_path) as lock:
        os.utime(tmp_path / NAME, (1, 1))
        lock.touch()
        assert time.time() - (tmp_path / NAME).stat().st_mtime < 60
        (tmp_path / NAME).unlink()
        lock.touch()
        assert read_owner(tmp_path).pid == os.getpid()
        written(tmp_path, host="elsewhere")
        with pytest.raises(ProjectLocked, match="elsewhere"):
            lock.touch()
    assert read_owner(tmp_path).host == "elsewhere", "the other's lock is left alone"


def race(folder, wins):
    """Take, keep and give back, again and again; `inside` exists while somebody is in."""
    won = 0
    while won < 10:
        try:
            with ProjectLock(folder):
                with open(folder / "inside", "x"):
                    time.sleep(0.002)
                (folder / "inside").unlink()
                won += 1
        except ProjectLocked:
            time.sleep(0.001)
    wins.put(won)


def test_fault_11_never_two_at_once_in_a_race_of_takers(tmp_path):
    """Four processes, beginning with a dead owner's lock. Two at once would fail to make `inside`."""
    written(tmp_path, pid=2**22 + 1)
    wins = PROCESSES.Queue()
    racers = [PROCESSES.Process(target=race, args=(tmp_path, wins), daemon=True) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert sum(wins.get(timeout=10) for _ in racers) == 40


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@forks
def test_fault_11_a_forked_child_does_not_hold_the_project(tmp_path):
    read, write = os.pipe()
    begun, begin = os.pipe()
    with ProjectLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            os.write(begin, b"x")
            os.read(read, 1)
            os._exit(0)
        os.read(begun, 1)  # the child lets go as its first step, not before fork returns here
        lock._drop()  # as the parent's death does
        try:
            with ProjectLock(tmp_path) as next_one:
                assert "no longer runs" in next_one.note
        finally:
            os.write(write, b"x")
            os.waitpid(child, 0)
            for fd in (read, write, begun, begin):
                os.close(fd)


def die_while_forking(folder, told):
    """Take the lock and be killed right after a fork, whose child takes a while to its first step and then goes on."""
    os.register_at_fork(after_in_child=lambda: time.sleep(0.3))
    sys.modules.pop(lock_module.__name__)
    anew = importlib.import_module(lock_module.__name__)  # its own first step is registered behind that one
    with anew.ProjectLock(folder):
        if os.fork() == 0:
            told.send("let go")
            told.recv()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


@forks
@linux
def test_fault_11_an_owner_killed_while_it_forks_does_not_leave_the_project_locked(tmp_path):
    heard, told = PROCESSES.Pipe()
    process = PROCESSES.Process(target=die_while_forking, args=(tmp_path, told))
    process.start()
    process.join()  # with a timeout it would wait for the child as well
    assert process.exitcode == -signal.SIGKILL
    assert not heard.poll(), "the child has not yet made its first step"
    with ProjectLock(tmp_path) as lock:
        assert f"process {process.pid}" in lock.note
        assert heard.recv() == "let go"
        heard.send("end")


def test_fault_06_no_room_for_the_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock_module.os, "write", full)
    with pytest.raises(DiskFull, match=NAME), ProjectLock(tmp_path):
        pass
    monkeypatch.undo()
    assert not (tmp_path / NAME).exists()
    with ProjectLock(tmp_path):
        pass


def test_fault_07_a_folder_that_vanishes_is_named(tmp_path):
    folder = tmp_path / "drive"
    with pytest.raises(JournalError, match="drive is gone"), ProjectLock(folder):
        pass
    folder.mkdir()
    with ProjectLock(folder) as lock:
        (folder / NAME).unlink()
        folder.rmdir()
        with pytest.raises(JournalError, match="drive is gone"):
            lock.touch()
