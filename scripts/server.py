"""Starts the host's ComfyUI server with this pack in custom_nodes, as an artist would have it, and stops it again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

from scripts import host as hosts
from scripts.client import Client

PACK_NAME = "frame-memory"
# What an artist's folder would not hold; only used where the pack must be copied.
NOT_THE_PACK = shutil.ignore_patterns(".git", "__pycache__", "tests", "benchmarks", "shared", ".*_cache")
CPU_FLAGS = ("--cpu", "--use-pytorch-cross-attention")


class ServerError(RuntimeError):
    """The server did not start. The text ends with the last lines of its log."""


def mount(pack: Path, custom_nodes: Path, name: str = PACK_NAME) -> Path:
    """Make the pack appear in a custom_nodes folder: a link, on Windows a junction, else a copy. Repeatable."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    place = custom_nodes / name
    if place.exists() and place.resolve() == pack.resolve():
        return place
    unmount(place)
    try:
        if sys.platform == "win32":  # links need a privilege there, junctions do not
            import _winapi

            _winapi.CreateJunction(str(pack), str(place))
        else:
            place.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, place, ignore=NOT_THE_PACK)
    return place


def unmount(place: Path) -> None:
    """Remove what ``mount`` made, never what a link points to."""
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        try:
            os.rmdir(place)  # a junction is an empty folder to rmdir
        except OSError:
            shutil.rmtree(place)


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A ComfyUI server with a base directory of its own: models, inputs and outputs of no other ComfyUI are touched."""

    def __init__(self, host: hosts.Host, base: Path, port: int = 0, flags: tuple[str, ...] = CPU_FLAGS) -> None:
        self.host, self.base = host, base
        self.port = port or free_port()
        self.flags = flags
        self.address = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "server.log"
        self.client = Client(self.address)
        self._process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        """The command line of the server."""
        database = (self.base / "comfyui.db").as_posix()
        return [
            str(self.host.python), str(self.host.comfyui / "main.py"), "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(self.base), "--database-url", f"sqlite:///{database}",
            "--disable-api-nodes", "--disable-auto-launch", "--preview-method", "latent2rgb", *self.flags,
        ]  # fmt: skip

    def start(self, timeout: float = 900) -> Server:
        """Start, and return when it answers. Raises ServerError."""
        for name in ("models", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        mount(hosts.REPO, self.base / "custom_nodes")
        drop = {"PYTHONPATH", "PYTHONHOME"}
        environment = {k: v for k, v in os.environ.items() if k not in drop}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        if self.host.installed_by_us:
            environment["PYTHONNOUSERSITE"] = "1"
            environment.pop(hosts.NO_BYTECODE, None)
        new_group: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.base, env=environment, **new_group,
            )  # fmt: skip
        try:
            self._wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_ready(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if not self.running():
                raise ServerError(f"ComfyUI stopped while starting. Its last words:\n{self.log_tail()}")
            try:
                self.client.get("/system_stats", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s. Its last words:\n{self.log_tail()}")

    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The server's process id."""
        return self._process.pid if self._process else None

    def log(self) -> str:
        """Everything the server has printed, all starts of this base directory together."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def stop(self, grace: float = 10) -> None:
        """Ask the process and its children to end, then end them."""
        self.client.close()
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self._signal(process, hard=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        self._signal(process, hard=True)  # children that outlived it as well
        process.wait()
        self._process = None

    def kill(self) -> None:
        """End it at once, as a crash or `kill -9` would."""
        if self._process is not None:
            self._signal(self._process, hard=True)
            self._process.wait()
            self._process = None
        self.client.close()

    @staticmethod
    def _signal(process: subprocess.Popen, hard: bool) -> None:
        if sys.platform == "win32":
            if hard or process.poll() is None:
                flags = ["/F"] if hard else []
                subprocess.run(["taskkill", "/T", *flags, "/PID", str(process.pid)], capture_output=True, check=False)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them may be gone
            os.killpg(process.pid, signal.SIGKILL if hard else signal.SIGTERM)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
