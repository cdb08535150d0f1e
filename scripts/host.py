"""Installs the real ComfyUI this pack is tested in, once, into a cache folder, and finds it again.

``scripts/host.lock`` names the ComfyUI source distribution and every package with the checksums of its files. One
folder in the user's cache belongs to one lock file, Python version and platform::

    <cache>/frame-memory/<key>/venv/            the environment
    <cache>/frame-memory/<key>/comfyui/         the ComfyUI tree
    <cache>/frame-memory/<key>/complete.json    written last: what was installed; without it the folder is rebuilt
    <cache>/frame-memory/<key>/install.log      everything pip said
    <cache>/frame-memory/<key>.lock             held while one process installs; the system frees it if that one dies

Environment: ``FRAME_MEMORY_CACHE`` moves the cache, ``COMFYUI_PATH`` uses a ComfyUI that is already there,
``FRAME_MEMORY_PYTHON`` names the Python to run that one with. pip's own variables (index, proxy, certificate, cache)
work as always. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts import advice

REPO = Path(__file__).resolve().parent.parent
LOCK_FILE = REPO / "scripts" / "host.lock"
TREE_FAULT = "files of ComfyUI are missing or changed"
PACK_MODULES = ("diffusers", "einops", "safetensors", "numpy", "PIL", "torch", "av")
MINIMUM_COMFYUI = (0, 30, 0)
# Our installation begins without bytecode. Where none may be written, each start of ComfyUI compiles 5000 files: 15 of
# its 25 seconds of processor time. So what runs in our installation does not get this variable.
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
NEEDED_BYTES = {"linux": 9_000_000_000, "win32": 4_000_000_000, "darwin": 4_000_000_000}  # peak, with pip's downloads


class HostError(RuntimeError):
    """The host cannot be installed or used. The text is for the person at the keyboard."""


@dataclass(frozen=True)
class Lock:
    """What host.lock says: the sdist that carries ComfyUI, and the packages of the environment."""

    sdist: str  # name==version
    sdist_sha256: str
    tree: str  # folder of ComfyUI inside the sdist
    version: str  # ComfyUI's version
    text: str

    @property
    def key(self) -> str:
        """Name of the cache folder: lock contents, Python version, system and machine."""
        about = f"{self.text}\n{sys.version_info[:2]} {sys.platform} {platform.machine()}"
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def packages(self) -> dict[str, set[str]]:
        """Locked versions by normalised name, of all platforms and Python versions together."""
        found: dict[str, set[str]] = {}
        for name, version in re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", self.text, re.MULTILINE):
            found.setdefault(normalise(name), set()).add(version)
        return found


@dataclass(frozen=True)
class Host:
    """A ComfyUI that can be run: its Python and its tree."""

    python: Path
    comfyui: Path
    installed_by_us: bool


def normalise(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path = LOCK_FILE) -> Lock:
    """Parse the lock file. Raises HostError when its first line does not name ComfyUI's source."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    line = re.search(r"^# comfyui (\S+) from (\S+==\S+) tree (\S+) sha256 ([0-9a-f]{64})$", text, re.MULTILINE)
    if not line:
        raise HostError(f"{path} has no line '# comfyui VERSION from NAME==VERSION tree FOLDER sha256 SUM'.")
    version, sdist, tree, sha256 = line.groups()
    return Lock(sdist=sdist, sdist_sha256=sha256, tree=tree, version=version, text=text)


def cache_root() -> Path:
    """The folder that holds installations, demo projects and test servers' folders."""
    named = os.environ.get("FRAME_MEMORY_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "frame-memory"


def python_in(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def say(text: str) -> None:
    """Progress goes to stderr, so that what a command prints on stdout stays its own."""
    print(text, file=sys.stderr, flush=True)


# --- an existing ComfyUI ---


def in_ci() -> bool:
    """Whether this run may not skip anything: CI is set to something other than no."""
    return os.environ.get("CI", "").strip().lower() not in ("", "0", "false", "no", "off")


def existing_host(path: Path) -> Host:
    """The ComfyUI that COMFYUI_PATH names. Nothing is installed into it. Raises HostError when it cannot be used."""
    path = path.expanduser().absolute()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise HostError(
            f"COMFYUI_PATH is {path}, but there is no ComfyUI in it (no main.py beside a comfy folder). "
            "Name the folder that holds main.py, or unset COMFYUI_PATH to let this script install ComfyUI."
        )
    version = comfyui_version(path)
    if version and tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < MINIMUM_COMFYUI:
        wanted = ".".join(map(str, MINIMUM_COMFYUI))
        raise HostError(f"The ComfyUI in {path} is {version}; Frame Memory needs {wanted} or newer. Update ComfyUI.")
    named = os.environ.get("FRAME_MEMORY_PYTHON")
    if named:
        python = Path(named).expanduser()
        if not python.is_file():
            raise HostError(f"FRAME_MEMORY_PYTHON is {named}, which is not a file.")
        return Host(python.absolute(), path, installed_by_us=False)
    beside = [python_in(folder / name) for folder in (path, path.parent) for name in (".venv", "venv")]
    beside.append(path.parent / "python_embeded" / "python.exe")  # ComfyUI's Windows portable spells it so
    python = next((p for p in beside if p.is_file()), Path(sys.executable))
    return Host(python, path, installed_by_us=False)


def comfyui_version(tree: Path) -> str | None:
    """The version a ComfyUI tree gives itself, or None where it gives none."""
    with contextlib.suppress(OSError):
        found = re.search(r'__version__\s*=\s*"([^"]+)"', (tree / "comfyui_version.py").read_text(encoding="utf-8"))
        return found.group(1) if found else None
    return None


def missing_in(host: Host, modules: tuple[str, ...]) -> list[str]:
    """Which modules a host's Python cannot find; for hosts that are not ours to install into."""
    code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    done = subprocess.run([str(host.python), "-c", code, *modules], **_captured())
    if done.returncode:
        raise HostError(f"{host.python} does not run:\n{done.stderr.strip()[-600:]}")
    return done.stdout.split()


def require_in(host: Host, modules: tuple[str, ...], what: str, remedy: str) -> None:
    """Raise HostError with the remedy when an existing ComfyUI's Python lacks modules; ours has them by its lock."""
    gone = [] if host.installed_by_us else missing_in(host, modules)
    if gone:
        install_line = f"{host.python} -m pip install {remedy}"
        raise HostError(f"{what} needs {', '.join(gone)}, which {host.python} does not have. Run: {install_line}")


# --- our own installation ---


def ensure_host() -> Host:
    """The host to run in: COMFYUI_PATH's, or ours, installed or repaired first where needed. Raises HostError."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return existing_host(Path(named))
    lock = read_lock()
    folder = cache_root() / lock.key
    host = Host(python_in(folder / "venv"), folder / "comfyui", installed_by_us=True)
    if not faults_of(folder, lock):
        return host
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(folder.name + ".lock")) as handle:
            faults = faults_of(folder, lock)  # another process may have installed while we waited
            if faults == [TREE_FAULT]:
                say(f"Repairing the installation in {folder}, since {TREE_FAULT}.")
                remove(folder / "comfyui")
                fetch_comfyui(folder, lock, Pip(folder, handle))
                write_stamp(folder, lock)
            elif faults:
                install(folder, lock, faults, handle)
    except OSError as error:
        raise HostError(advice.for_disk(error, folder)) from error
    return host


def installed_host() -> Host | None:
    """The host if it is already usable; never installs."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return existing_host(Path(named))
    lock = read_lock()
    folder = cache_root() / lock.key
    if faults_of(folder, lock):
        return None
    return Host(python_in(folder / "venv"), folder / "comfyui", installed_by_us=True)


def faults_of(folder: Path, lock: Lock) -> list[str]:
    """What is missing or changed in an installation, in words; empty when it is whole. Takes a few milliseconds."""
    stamp = folder / "complete.json"
    if not folder.exists():
        return ["it is not installed yet"]
    try:
        said = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["an earlier installation did not finish"]
    faults = []
    if tree_digest(folder / "comfyui") != said.get("tree"):
        faults.append(TREE_FAULT)
    if not python_in(folder / "venv").is_file():
        faults.append("the environment has no Python (was the Python it was made with removed?)")
    gone = sorted(set(said.get("packages", [])) - set(packages_in(folder / "venv")))
    if gone or not said.get("packages"):
        faults.append(f"packages are missing: {', '.join(gone[:5])}")
    return faults


def tree_digest(tree: Path) -> str:
    """Digest of the names and sizes of ComfyUI's source files: finds what is missing, cut short or edited in length."""
    lines = []
    for parent, folders, names in os.walk(tree):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        inside = Path(parent).relative_to(tree).as_posix()
        for name in sorted(n for n in names if n.endswith(".py")):
            lines.append(f"{inside}/{name} {os.stat(os.path.join(parent, name)).st_size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def packages_in(environment: Path) -> list[str]:
    """Installed distributions as name==version, read from the folder names in site-packages."""
    pattern = "Lib/site-packages" if sys.platform == "win32" else "lib/python3.*/site-packages"
    found = []
    for site in environment.glob(pattern):
        for info in site.glob("*.dist-info"):
            if (info / "RECORD").is_file():  # pip writes it last
                name, _, version = info.name[: -len(".dist-info")].rpartition("-")
                found.append(f"{normalise(name)}=={version}")
    return sorted(found)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Hold a lock file; wait, saying so, while another process holds it. The system frees it when its holder dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not try_lock(handle):
            if not told:
                say("Another process is installing the host; waiting for it.")
                told = True
            time.sleep(0.5)
        yield handle
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Take the lock of an open file if nobody has it; closing the file gives it back."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def install(folder: Path, lock: Lock, faults: list[str], handle: int) -> None:
    """Build an installation from nothing. Raises HostError with advice when a step fails."""
    began = time.monotonic()
    say(f"Installing ComfyUI {lock.version} for Frame Memory into {folder}")
    if folder.exists():
        say(f"  Starting over, since {'; '.join(faults)}. What pip has downloaded is kept.")
        remove(folder)
    needed = NEEDED_BYTES.get(sys.platform, NEEDED_BYTES["linux"])
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise HostError(advice.for_space(folder, free, needed))
    folder.mkdir()
    runner = Pip(folder, handle)
    say("  [1/4] Python environment")
    make = [sys.executable, "-m", "venv", str(folder / "venv")]
    done = subprocess.run(make, env=clean_environment(), **held_open(handle), **_captured())
    if done.returncode:
        raise HostError(advice.for_venv(done.stdout + done.stderr))
    say("  [2/4] Packages (about 3 GB to download on Linux, 0.7 GB elsewhere; several minutes on a slow line)")
    only = ["--no-deps", "--no-compile", "--only-binary", ":all:"]
    runner.run("install", *only, "--require-hashes", "-r", str(LOCK_FILE))
    say(f"  [3/4] ComfyUI {lock.version}")
    fetch_comfyui(folder, lock, runner)
    say("  [4/4] Checking")
    check_imports(folder)
    write_stamp(folder, lock)
    say(f"  Done in {time.monotonic() - began:.0f} s. The next start installs nothing.")
    for other in sorted(folder.parent.glob("[0-9a-f]" * 16)):
        if other != folder:
            say(f"  {other} belongs to another version of the lock file; delete it if you no longer use that one.")


def remove(folder: Path) -> None:
    """Delete an installation or a part of it: moved away first, then for good, again while something holds files."""
    if not folder.exists():
        return
    away = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    os.replace(folder, away)
    for _ in range(20):
        shutil.rmtree(away, ignore_errors=True)
        if not away.exists():
            return
        time.sleep(0.5)
    say(f"  {away} could not be removed completely; delete it when nothing uses it any more.")


def held_open(handle: int) -> dict:
    """How a child process keeps the lock: if this process is killed, nobody builds here while the child still writes.

    On Windows handles of locked files are not passed on; there `remove` copes with a child that lingers.
    """
    return {} if sys.platform == "win32" else {"pass_fds": (handle,)}


def write_stamp(folder: Path, lock: Lock) -> None:
    """Declare an installation whole: what later starts compare it with."""
    stamp = {"comfyui": lock.version, "tree": tree_digest(folder / "comfyui"), "packages": packages_in(folder / "venv")}
    partial = folder / "complete.json.part"
    partial.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(partial, folder / "complete.json")


def fetch_comfyui(folder: Path, lock: Lock, runner: Pip) -> None:
    """Download ComfyUI's source distribution, check its sha256, and unpack ComfyUI's part of it."""
    download = folder / "download"
    remove(download)  # of a repair that was killed
    download.mkdir()
    wanted = folder / "comfyui.txt"
    wanted.write_text(f"{lock.sdist} --hash=sha256:{lock.sdist_sha256}\n", encoding="utf-8")
    # The sdist declares a newer Python than ComfyUI itself needs; only its ComfyUI folder is used. pip insists on
    # reading a source distribution's metadata, for which the locked setuptools is there already.
    only = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--no-build-isolation"]
    runner.run("download", *only, "--require-hashes", "-d", str(download), "-r", str(wanted))
    archives = list(download.glob("*.tar.gz"))
    if len(archives) != 1:
        raise HostError(f"Expected one source archive of {lock.sdist} in {download}, found {len(archives)}.")
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != lock.sdist_sha256:
        raise HostError(f"{archives[0].name} has sha256 {found}, expected {lock.sdist_sha256}. Start again.")
    unpack(archives[0], lock.tree, folder / "comfyui")
    shutil.rmtree(download)
    wanted.unlink()
    version = comfyui_version(folder / "comfyui")
    if version != lock.version:
        raise HostError(f"{lock.sdist} carries ComfyUI {version}, the lock file says {lock.version}.")


def unpack(archive: Path, tree: str, target: Path) -> None:
    """Write the regular files below ``<top>/<tree>/`` of a tar archive under target; nothing may leave target."""
    target.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/")[2]
            if not member.isfile() or not inside.startswith(tree + "/"):
                continue
            path = target / inside[len(tree) + 1 :]
            if ".." in path.parts or not path.is_relative_to(target):
                raise HostError(f"{archive.name} holds a file outside its folder: {member.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # isfile() was true
            with source, open(path, "wb") as out:
                shutil.copyfileobj(source, out)


def check_imports(folder: Path) -> None:
    """Prove that the environment works: the packages that hold machine code are imported together."""
    code = "import torch, torchvision, torchaudio, numpy, scipy, av, safetensors, aiohttp, transformers, diffusers"
    done = subprocess.run([str(python_in(folder / "venv")), "-c", code], env=clean_environment(), **_captured())
    if done.returncode:
        raise HostError(advice.for_import(done.stderr))


def _captured() -> dict:
    return {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace"}


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would point a virtual environment's Python or pip elsewhere."""
    drop = {"PYTHONHOME", "PYTHONPATH", NO_BYTECODE}
    drop |= {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIREMENT"}
    return {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1"}


class Pip:
    """Runs the environment's pip, shows what it is at, and turns its failures into advice."""

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder, self.handle = folder, handle
        self.log = folder / "install.log"
        self.total = 0  # packages being installed, once pip has said so
        self.at = ""  # the large file being downloaded

    def run(self, command: str, *arguments: str) -> None:
        """One pip command. Raises HostError with the likely cause and what to do."""
        line = [str(python_in(self.folder / "venv")), "-m", "pip", command, "--progress-bar", "off"]
        text: list[str] = []
        with open(self.log, "a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [*line, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, encoding="utf-8", errors="replace", env=clean_environment(), **held_open(self.handle),
            )
            done = threading.Event()
            threading.Thread(target=self.tell_while_silent, args=(done,), daemon=True).start()
            try:
                assert child.stdout is not None
                for got in child.stdout:
                    log.write(got)
                    text.append(got)
                    self.show(got)
            except BaseException:
                child.kill()
                child.wait()
                raise
            finally:
                done.set()
        if child.wait():
            raise HostError(advice.for_pip("".join(text), self.log))

    def show(self, line: str) -> None:
        """Pass on the lines of pip that tell a person how far it is."""
        found = re.match(r"\s+(?:Downloading|Using cached) .*?([\w.]+)-(\d[\w.]*)[-.+].*\(([\d.]+) ([kMG])B\)", line)
        if found:
            name, version, size, unit = found.groups()
            if unit == "G" or (unit == "M" and float(size) >= 20):  # the small ones pass in a moment
                self.at = f"{name} {version} ({size} {unit}B)"
                say(f"        {self.at}")
        elif line.startswith("Installing collected packages"):
            self.total = line.count(",") + 1
            say(f"        installing {self.total} packages")

    def tell_while_silent(self, done: threading.Event) -> None:
        """A line every 20 seconds, so that nobody takes a large download or thousands of small files for a hang."""
        began = time.monotonic()
        while not done.wait(20):
            what = f"downloading, last {self.at}" if self.at else "working"
            if self.total:
                what = f"{len(packages_in(self.folder / 'venv'))} of {self.total} packages installed"
            say(f"        ... {time.monotonic() - began:.0f} s, {what}")


# --- running things in the host ---


def command(host: Host, arguments: list[str]) -> list[str]:
    """The command line that runs ``-m MODULE``, ``-c CODE`` or a file in the host's Python."""
    return [str(host.python), str(REPO / "scripts" / "boot.py"), str(host.comfyui), str(REPO), *arguments]


def environment(host: Host) -> dict[str, str]:
    """The caller's environment, with ComfyUI first and the repository second for child processes' imports too."""
    paths = [str(host.comfyui), str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1", "FRAME_MEMORY_COMFYUI": str(host.comfyui)}
    drop = {"PYTHONHOME"}
    if host.installed_by_us:
        ours["PYTHONNOUSERSITE"] = "1"
        drop.add(NO_BYTECODE)
    return {k: v for k, v in os.environ.items() if k not in drop} | ours
