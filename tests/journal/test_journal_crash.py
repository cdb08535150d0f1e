"""Every order of crash: at each call to the system in turn the process is killed, the disk is full, the power is lost.

Whatever happens, every section whose save returned is found again bit for bit, the project opens, and no temporary
file is left; only the section that was being written may have to be made again.
"""

import os
import pickle
import shutil

import pytest
import torch

from frame_memory.journal import files, project
from frame_memory.journal.files import DiskFull
from frame_memory.journal.lock import NAME as LOCK
from frame_memory.journal.project import Project

from .broken_disk import Counter, Disk, Recorder, die, full, intercepted, lay_out

KEYS = {name: f"{name}{i}" * 16 for i, name in enumerate(("first", "second", "third", "again", "other"))}
SAMPLES = {key: torch.randn(1, 2, 3, 2, 2, generator=torch.Generator().manual_seed(i))
           for i, key in enumerate(KEYS.values())}  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    monkeypatch.setattr(files, "MARGIN", 0)


def opened(root, name="film"):
    return Project.open(root, name, shape={"kind": "F1"}, fields={"prompt": "a cat"}, plan={"sections": 3},
                        if_changed="refuse", section_bytes=100, sections=3)  # fmt: skip


def saved(work, index, name):
    work.save(index=index, start=9 * index, stop=9 * index + 9, key=KEYS[name], samples=SAMPLES[KEYS[name]])


def other_project(root):
    with opened(root, "elsewhere") as work:
        saved(work, 0, "other")


def story(root, done):
    """A project's life: three sections, one of them rolled again, the old one chosen again, one from elsewhere.

    done(key) is called when a section with that key has been finished.
    """
    with opened(root) as work:
        for index, name in enumerate(("first", "second", "third")):
            saved(work, index, name)
            done(KEYS[name])
        saved(work, 1, "again")
        done(KEYS["again"])
        work.adopt(KEYS["second"], index=1, start=9, stop=18)
        work.annotate({1: {"sharpness": 0.5}})
        work.adopt(KEYS["other"], index=2, start=18, stop=27)
        done(KEYS["other"])
        saved(work, 0, "first")
        work.set_segment("000.mp4", {"frames": 33})
    return work


def check(root, done, to_the_end=True):
    """The promise. Also that the story can be told to its end from there, which takes its time."""
    with opened(root) as work:
        assert not list(root.rglob("*.part")), "temporary files are swept"
        for key in done:
            found = work.find(key)
            assert found is not None and found.equal(SAMPLES[key]), f"{key} is lost; {work.notes}"
        for index in work.manifest.sections:
            assert any(work.load(index).equal(samples) for samples in SAMPLES.values())
        assert not any("damaged" in note for note in work.notes)
    if not to_the_end:
        return
    work = story(root, lambda key: None)
    assert [work.manifest.sections[i].key for i in range(3)] == [KEYS[n] for n in ("first", "second", "other")]
    assert work.manifest.run == (0, 1, 2) and work.manifest.segments == {"000.mp4": {"frames": 33}}
    with opened(root) as work:
        for key, samples in SAMPLES.items():
            assert work.find(key).equal(samples)


def count_calls(root):
    other_project(root)
    counter = Counter(-1, None)
    with intercepted(counter):
        story(root, lambda key: None)
    return counter.count


def test_the_story_ends_well(tmp_path):
    assert 100 < count_calls(tmp_path) < 400
    check(tmp_path, KEYS.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fault_03_killed_at_any_call_to_the_system(tmp_path):
    calls = count_calls(tmp_path / "whole")
    deaths = 0
    for at in range(calls):
        root, told = tmp_path / str(at), tmp_path / f"{at}.done"
        other_project(root)
        child = os.fork()
        if child == 0:
            try:
                with open(told, "a") as out, intercepted(Counter(at, die)):
                    story(root, lambda key: print(key, file=out, flush=True))
            finally:
                os._exit(0)
        deaths += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        check(root, told.read_text().split(), at % 4 == 0)
        shutil.rmtree(root)
    assert deaths == calls


@pytest.mark.parametrize("lasting", [False, True], ids=["one call fails", "full from there on"])
def test_fault_06_full_at_any_call_to_the_system(tmp_path, lasting):
    calls = count_calls(tmp_path / "whole")
    refused = 0
    for at in range(calls):
        root, done = tmp_path / str(at), []
        other_project(root)
        try:
            with intercepted(Counter(at, full, lasting)):
                story(root, done.append)
        except DiskFull as error:
            refused += 1
            assert str(root) in str(error) and "is kept" in str(error)
            assert not list(root.rglob("*.part")), "removed at once, to make room"
        assert not (root / "film" / LOCK).exists()
        check(root, done, at % 4 == 0)
        shutil.rmtree(root)
    assert refused > calls / 2


def test_fault_06_the_same_project_goes_on_when_there_is_room_again(tmp_path):
    """Without closing it: a run pauses at a full disk, and what it holds in memory still agrees with the disk."""
    at = 0
    while True:
        root = tmp_path / str(at)
        with opened(root) as work:
            saved(work, 0, "first")
            counter = Counter(at, full)
            try:
                with intercepted(counter):
                    saved(work, 0, "again")
            except DiskFull:
                assert work.manifest.sections[0].key == KEYS["first"]
                assert work.find(KEYS["first"]).equal(SAMPLES[KEYS["first"]])
                saved(work, 0, "again")
            assert work.load(0).equal(SAMPLES[KEYS["again"]])
            assert work.find(KEYS["first"]).equal(SAMPLES[KEYS["first"]])
        if counter.count <= at:
            break
        at += 1
    assert at > 10


@pytest.mark.parametrize("ordered", [False, True], ids=["folders flushed", "NTFS"])
def test_fault_04_power_lost_at_any_call_to_the_system(tmp_path, monkeypatch, ordered):
    """Unflushed bytes gone, half there, or all there; unflushed names in any combination (NTFS: in their order)."""
    monkeypatch.setattr(files, "FOLDERS_FLUSH", not ordered)
    root = tmp_path / "recorded"
    root.mkdir()
    recorder = Recorder(root)
    with intercepted(recorder, ("open", "close", "write", "fsync", "replace", "remove", "mkdir")):
        other_project(root)
        recorder.note("begin")
        story(root, recorder.note)
    disk, done, begun, seen = Disk(ordered), [], False, set()
    for step in recorder.steps:
        disk.step(step)
        if step == ("mark", "begin"):
            begun = True
        elif step[0] == "mark":
            done.append(step[1])
        if not begun:
            continue
        for tree in disk.after_power_loss():
            state = pickle.dumps((sorted(tree.items(), key=str), tuple(done)))
            if state not in seen:
                seen.add(state)
                lay_out(tmp_path / "found", tree)
                check_after_power_loss(tmp_path / "found", done)
                shutil.rmtree(tmp_path / "found")
    assert len(done) == 5 and len(seen) > 60


def check_after_power_loss(root, done):
    with opened(root) as work:
        assert not list(root.rglob("*.part"))
        for key in done:
            found = work.find(key)
            assert found is not None and found.equal(SAMPLES[key]), f"{key} is lost; {work.notes}"
        for index in work.manifest.sections:
            work.load(index)


def test_fault_04_the_test_of_power_loss_sees_a_missing_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "flush_file", lambda fd: None)
    with pytest.raises((AssertionError, files.JournalError)):
        test_fault_04_power_lost_at_any_call_to_the_system(tmp_path, monkeypatch, False)


def test_fault_04_the_test_of_power_loss_sees_a_missing_flush_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "flush_folder", lambda folder: None)
    with pytest.raises((AssertionError, files.JournalError)):
        test_fault_04_power_lost_at_any_call_to_the_system(tmp_path, monkeypatch, False)


def test_fault_03_the_test_of_kills_sees_a_section_that_is_not_looked_for(tmp_path, monkeypatch):
    """A twin that trusts the recorded name only, as a plain journal would: moves aside then lose a section."""
    monkeypatch.setattr(project, "locate", lambda f, r: r.file if files.verify(f, r.file) is None else None)
    with pytest.raises((AssertionError, files.JournalError)):
        test_fault_03_killed_at_any_call_to_the_system(tmp_path)
