"""What travels to a machine without a network: the right wheels, ComfyUI's code, pieces that fit, and the calls."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from scripts import carry, host

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
needs_git = pytest.mark.skipif(not (shutil.which("git") and (host.REPO / ".git").exists()), reason="no clone with git")
LOCK = """\
av==1.0 ; python_full_version < '3.12' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
av==2.0 ; python_full_version >= '3.12' \\
    --hash=sha256:cc
diffusers==3 \\
    --hash=sha256:dd
torch==4 \\
    --hash=sha256:ee
"""


@needs_pip
def test_a_version_for_that_python_is_asked_for_with_its_checksums():
    assert carry.requirements(LOCK, "3.12") == ["av==2.0 --hash=sha256:cc", "diffusers==3 --hash=sha256:dd"]
    assert carry.requirements(LOCK, "3.11")[0] == "av==1.0 --hash=sha256:aa --hash=sha256:bb"


@needs_pip
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_every_package_once(python):
    asked = carry.requirements(host.read_lock().text, python)
    assert [host.normalise(line.partition("==")[0]) for line in asked] == sorted(carry.LACKING)
    assert all(" --hash=sha256:" in line for line in asked)


def test_pieces_are_the_whole_and_the_last_call_unpacks_them(tmp_path, running_host, monkeypatch):
    """The calls themselves, with a stand-in of run.py that says what it was given."""
    packed, root = tmp_path / "host.tar", tmp_path / "repository"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "run.py").write_text(
        "import os, sys; print(*sys.argv[1:], *(os.environ[n] for n in ('COMFYUI_PATH', 'FRAME_MEMORY_COMMIT')))",
        encoding="utf-8",
    )
    code = list(carry.code_of(running_host.comfyui))[:40]
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "THERE = True")
    with tarfile.open(packed, "w") as tar:
        tar.add(wheel.filename, "some-1-py3-none-any.whl")
        for path in code:
            tar.add(path, f"comfyui/{path.relative_to(running_host.comfyui).as_posix()}")
    pieces = carry.cut(packed, root, 10_000)
    assert len(pieces) > 3 and max(piece.stat().st_size for piece in pieces) == 10_000
    monkeypatch.setattr(host, "REPO", root)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "host.99").write_bytes(b"of an earlier commit")
    said = ""
    for path, command in carry.calls(pieces, "abc", "--minutes 9"):
        assert (root / path).is_file() and len(command) < 2000
        here = command.replace(carry.THERE, str(tmp_path / "there")).replace("python3", sys.executable)
        line = ["bash", "-c", f"OUT=out; {here}"]
        said = subprocess.run(line, cwd=root, check=True, capture_output=True, text=True).stdout
    assert said.split()[:6] == ["-m", "benchmarks.gpu", "--out", "out", "--minutes", "9"]
    assert said.split()[6:] == [str(tmp_path / "there/comfyui"), "abc"]
    assert (tmp_path / "there/site/some/__init__.py").read_text() == "THERE = True"
    for path in code:
        assert (tmp_path / "there/comfyui" / path.relative_to(running_host.comfyui)).read_bytes() == path.read_bytes()


def test_of_comfyui_its_code_travels_and_no_large_data(running_host):
    found = {path.relative_to(running_host.comfyui).as_posix(): path for path in carry.code_of(running_host.comfyui)}
    assert {"main.py", "comfyui_version.py", "comfy/ldm/models/autoencoder.py"} <= set(found)
    assert {path for path in found if path.startswith("comfy/") and path.endswith(".py")} >= {
        path.relative_to(running_host.comfyui).as_posix() for path in (running_host.comfyui / "comfy").rglob("*.py")
    }
    assert sum(path.stat().st_size for path in found.values()) < 16 * 2**20


@needs_git
def test_the_checkout_leaves_room_for_pieces():
    assert carry.checkout_bytes() < carry.LIMIT * carry.MEBIBYTE - carry.SPARE - 2**24


def test_without_git_a_clone_or_pip_it_says_what_is_missing(tmp_path, monkeypatch):
    """Before anything is installed or fetched."""
    monkeypatch.setattr(host, "REPO", tmp_path)
    if shutil.which("git"):
        with pytest.raises(SystemExit, match="git cannot read .*in a clone"):
            carry.main([])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="git is not installed"):
        carry.main([])
    monkeypatch.setitem(sys.modules, "pip._vendor.packaging.requirements", None)
    with pytest.raises(SystemExit, match="has no pip"):
        carry.requirements(LOCK, "3.12")


def test_a_checkout_that_leaves_no_room_is_refused(monkeypatch):
    monkeypatch.setattr(carry, "checkout_bytes", lambda: 9 * 2**20)
    with pytest.raises(SystemExit, match="leaves 0 bytes of 8 MiB.*raise --megabytes"):
        carry.main(["--megabytes", "8"])
