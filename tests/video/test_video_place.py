"""A written file as the editor asks for it, through links, long Windows paths and locked names."""

import ntpath
import os
import threading
import time

import pytest

from frame_memory.video import files
from frame_memory.video.place import inside


def test_a_folder_that_is_a_link_to_another_disk(tmp_path):
    output, elsewhere = tmp_path / "output", tmp_path / "other disk"
    output.mkdir()
    elsewhere.mkdir()
    try:
        (output / "frame_memory").symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pytest.skip("this account may not make links")
    path = output / "frame_memory" / "p" / "p.mp4"
    assert inside(str(path), str(output)) == ("frame_memory/p", "p.mp4")
    assert inside(str(output / "a.mp4"), os.path.join(str(output), "")) == ("", "a.mp4")


@pytest.mark.parametrize(
    ("path", "output"),
    [
        (r"\\?\C:\out\frame_memory\p\p.mp4", r"C:\out"),
        (r"C:\out\frame_memory\p\p.mp4", r"\\?\C:\out"),
        (r"\\?\UNC\nas\videos\frame_memory\p\p.mp4", r"\\nas\videos"),
        (r"c:\OUT\frame_memory\p\p.mp4", "C:\\out\\"),
    ],
)
def test_long_windows_paths(path, output):
    assert inside(path, output, ntpath) == ("frame_memory/p", "p.mp4")


def test_a_file_that_a_player_holds_for_a_moment_is_replaced(tmp_path, monkeypatch):
    """Windows refuses to replace an open file; here the system's call says so until the player lets go."""
    part, path = tmp_path / "a.part.mp4", tmp_path / "a.mp4"
    part.write_bytes(b"new")
    path.write_bytes(b"old")
    real, held = os.replace, threading.Event()

    def replace(source, target):
        if not held.is_set():
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr(files, "LOCKED_WAIT", 0.02)
    monkeypatch.setattr(os, "replace", replace)
    threading.Timer(0.08, held.set).start()
    files.put_in_place(part, path)
    assert path.read_bytes() == b"new" and not part.exists()
    held.clear()
    part.write_bytes(b"newer")
    began = time.monotonic()
    with pytest.raises(PermissionError):
        files.put_in_place(part, path)
    assert time.monotonic() - began < 2 and path.read_bytes() == b"new" and part.exists()
