"""Files: whole or absent, names that every system accepts, errors in words."""

import builtins
import errno
import hashlib
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frame_memory.journal import files
from frame_memory.journal.files import DiskFull, FileRecord, JournalError, safe_name, verify, write_durable

NASTY = ["画像 é 🎬", "Künstler's Ordner &co", "x" * 200, "%TEMP%", "a\tb", "50% #1 {x}"]


def fill(data):
    return lambda file: file.write(data)


def left_over(folder):
    return [p.name for p in folder.rglob("*.part")]


def test_length_and_hash_are_those_of_what_was_written(tmp_path):
    def write(file):
        file.write(b"head")
        file.write(memoryview(bytearray(range(256))))

    size, digest = write_durable(tmp_path / "a.bin", write)
    data = (tmp_path / "a.bin").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest()) == (260, digest)
    assert verify(tmp_path, FileRecord("a.bin", size, digest)) is None


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    data = bytes(range(100))
    size, digest = write_durable(tmp_path / "a", fill(data))
    assert (tmp_path / "a").read_bytes() == data and (size, digest) == (100, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_was_there_stays_when_the_writer_fails(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    write_durable(tmp_path / "a", fill(b"old"))
    with pytest.raises(type(error)):
        write_durable(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"old" and not left_over(tmp_path)


def test_verify_says_what_is_wrong(tmp_path):
    record = FileRecord("a", *write_durable(tmp_path / "a", fill(b"12345678")))
    (tmp_path / "a").write_bytes(b"12345679")
    assert "other bytes" in verify(tmp_path, record)
    (tmp_path / "a").write_bytes(b"1234")
    assert "4 bytes, expected 8" in verify(tmp_path, record)
    (tmp_path / "a").unlink()
    assert "missing" in verify(tmp_path, record)
    (tmp_path / "a").mkdir()
    assert verify(tmp_path, record)


def test_a_folder_is_made_with_those_above_it_and_a_file_in_the_way_is_named(tmp_path):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "c").write_bytes(b"")
    with pytest.raises(JournalError, match=r"a/c|a\\c"):
        files.make_folder(tmp_path / "a" / "c")


def test_systems_that_cannot_flush_a_folder_flush_the_renamed_file(tmp_path, monkeypatch):
    flushed, real = [], os.fsync
    monkeypatch.setattr(files, "FOLDERS_FLUSH", False)
    monkeypatch.setattr(files.os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), real(fd)))
    write_durable(tmp_path / "a", fill(b"x"))
    assert flushed == [(tmp_path / "a").stat().st_ino] * 2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_flush_is_used_all_the_same(tmp_path, monkeypatch, code):
    def fsync(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fsync)
    assert write_durable(tmp_path / "a", fill(b"x"))[0] == 1


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
def test_fault_06_a_full_disk_is_named_and_nothing_is_truncated(tmp_path, monkeypatch, call):
    target = tmp_path / "a"
    write_durable(target, fill(b"old"))
    real = getattr(os, call)

    def full(*args, **kwargs):
        if call == "close":
            real(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(DiskFull, match="disk is full.*bytes are free in .*is kept.*Free some") as failed:
        write_durable(target, fill(b"new"))
    monkeypatch.undo()
    assert str(target) in str(failed.value)
    assert target.read_bytes() == b"old" and not left_over(tmp_path)


def test_fault_06_space_is_asked_for_in_bytes_before_anything_starts(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    files.check_space(tmp_path, 0, "nothing")
    with pytest.raises(
        DiskFull, match=rf"12 sections needs .*\({2 * free + files.MARGIN} bytes\).*Nothing was started"
    ):
        files.check_space(tmp_path, 2 * free, "12 sections")


def test_fault_07_a_vanished_folder_is_not_made_anew(tmp_path):
    with pytest.raises(JournalError, match="drive is gone.*Connect it again"):
        write_durable(tmp_path / "gone" / "a", fill(b"x"))
    assert not (tmp_path / "gone").exists()
    with pytest.raises(JournalError, match="drive is gone"):
        files.check_space(tmp_path / "gone", 1, "x")


def test_fault_07_a_folder_that_may_not_be_written(unprivileged):
    write_durable(unprivileged / "a", fill(b"old"))
    unprivileged.chmod(0o555)
    with pytest.raises(JournalError, match="read-only, or open in another program"):
        write_durable(unprivileged / "a", fill(b"new"))
    with pytest.raises(JournalError, match="read-only"):
        files.make_folder(unprivileged / "b" / "c")
    assert (unprivileged / "a").read_bytes() == b"old"


class Locked:
    """A file another Windows program has open: the next `times` calls are refused."""

    def __init__(self, real, times):
        self.real, self.times = real, times

    def __call__(self, *args, **kwargs):
        self.times -= 1
        if self.times >= 0:
            raise PermissionError(errno.EACCES, "The process cannot access the file: used by another process")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("name", NASTY)
def test_fault_47_a_locked_file_is_tried_again(tmp_path, monkeypatch, name):
    target = tmp_path / safe_name(name)
    write_durable(target, fill(b"old"))
    monkeypatch.setattr(files.os, "replace", Locked(os.replace, 3))
    record = FileRecord(target.name, *write_durable(target, fill(b"new")))
    monkeypatch.setattr(builtins, "open", Locked(builtins.open, 3))
    assert verify(tmp_path, record) is None


def test_fault_47_a_file_that_stays_locked_is_named_and_kept(tmp_path, monkeypatch):
    write_durable(tmp_path / "a", fill(b"old"))
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    monkeypatch.setattr(files.os, "replace", Locked(os.replace, 10**6))
    with pytest.raises(JournalError, match="open in another program.*Close that program"):
        write_durable(tmp_path / "a", fill(b"new"))
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"old" and not left_over(tmp_path)


@pytest.mark.parametrize(
    "given_name, name",
    [
        ("my film", "my film"), ("CON", "CON_"), ("con.final", "con_.final"), ("NUL .x", "NUL_.x"),
        ("Lpt9", "Lpt9_"), ("COM\u00b9", "COM\u00b9_"), ("console", "console"), ("CONIN$", "CONIN$_"),
        ("a/b\\c:d", "a_b_c_d"), ("film.. ", "film"), (".hidden", "hidden"), ("a\nb", "a_b"), ("画像", "画像"),
        ("e\u0301te\u0301", "été"), ("what?*", "what__"), ("\ud800x", "_x"),
    ],
)  # fmt: skip
def test_fault_47_names_that_windows_refuses(given_name, name):
    assert safe_name(given_name) == name


@pytest.mark.parametrize(
    "bad, nearest",
    [("", "video"), ("  ", "video"), ("..", "video"), ("...", "video"), ("../x", "_x"), ("a/../../b", "a_.._.._b"),
     ("/etc", "_etc"), ("C:\\films", "C__films"), ("\\\\host\\share", "__host_share"), ("C:x", "C_x"),
     ("a/./b", "a_._b")],
)  # fmt: skip
def test_fault_47_names_that_lead_out_are_refused_with_the_nearest(bad, nearest):
    with pytest.raises(JournalError) as refused:
        safe_name(bad)
    assert f"like {nearest!r}" in str(refused.value) and "'project'" in str(refused.value)
    assert safe_name(nearest) == nearest


@given(st.text(st.characters(), max_size=300))
@example("CON." + "a" * 60)
@example("CON" + " " * 100 + "x")
@example("é" * 100)
@example("🎬" * 64)
def test_fault_47_any_text_gives_a_folder_name_or_a_refusal(tmp_path_factory, text):
    try:
        name = safe_name(text)
    except JournalError:
        return
    assert safe_name(name) == name and unicodedata.is_normalized("NFC", name)
    assert 0 < len(name) <= files.MAX_NAME and len(name.encode()) <= 2 * files.MAX_NAME
    assert not set(name) & set('<>:"/\\|?*') and name == name.strip(" .") and min(map(ord, name)) >= 32
    assert name.split(".")[0].rstrip().upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}
    folder = Path(tempfile.mkdtemp())
    (folder / name).mkdir()
    assert os.listdir(folder) == [name]
    shutil.rmtree(folder)


def test_fault_47_long_names_that_begin_alike_stay_apart():
    assert safe_name("x" * 100 + "1") != safe_name("x" * 100 + "2")


def test_fault_47_long_windows_paths_take_the_form_without_a_limit():
    short, long = "C:\\out\\film", "C:\\" + "o" * 200
    assert files.extended_windows(PureWindowsPath(short)) == short
    assert files.extended_windows(PureWindowsPath(long)) == "\\\\?\\" + long
    assert files.extended_windows(PureWindowsPath("\\\\server\\share\\" + "o" * 200)).startswith("\\\\?\\UNC\\server\\")
    once = files.extended_windows(PureWindowsPath(long))
    assert files.extended_windows(PureWindowsPath(once)) == once
    assert files.extended(Path("here")) == Path("here")


def test_fault_47_a_path_over_260_characters_is_written_and_read(tmp_path):
    folder = tmp_path / ("o" * 120) / ("p" * 120)
    files.make_folder(folder)
    record = FileRecord("画像.bin", *write_durable(folder / "画像.bin", fill(b"x")))
    assert len(str(folder)) > 240 and verify(folder, record) is None


def test_temporary_files_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / "sections").mkdir()
    torn = [".manifest.json.1a.part", "sections/.000.safetensors.2b.part"]
    for name in (*torn, "sections/000.safetensors", "x.part.mp4"):
        (tmp_path / name).write_bytes(b"x")
    assert files.sweep(tmp_path) == torn
    assert (tmp_path / "sections/000.safetensors").exists() and (tmp_path / "x.part.mp4").exists()
