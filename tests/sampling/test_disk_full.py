"""The disk is full at every single write of a run in turn: nothing finished is lost, and the run goes on bit for bit.

Two ways of writing are made to fail: the journal's calls to the system, and libav's writes of video files, which go
through a counted file object instead of libav's own.
"""

from __future__ import annotations

import errno
import io
import os
import re

import av
import av.error
import comfy.sd
import comfy.utils
import pytest
import torch

from frame_memory.journal import read_manifest
from frame_memory.journal.files import JournalError, verify
from frame_memory.sampling.long_video import Live
from frame_memory.video.writer import VideoWriteError

from .conftest import run, start_latent
from .test_live import VAE_FILE, pictures
from .test_project import Plain, project

SECONDS, SECTIONS = 2.4, 2
SIZE = {"height": 2, "width": 2}
WRITE = os.write


class FullAt:
    """Writes counted from 0; number `at` and all after it find no room, until `room()`."""

    def __init__(self, at: int) -> None:
        self.at, self.failed = at, False
        self.told: list[object] = []

    def full(self, file: object = None) -> bool:
        """A write, to a video file or, with None, of the journal: whether there is no room for it."""
        self.told.append(file)
        self.failed = self.failed or 0 <= self.at < len(self.told)
        return self.failed

    def telling(self) -> list[int]:
        """Numbers of the writes to try: all of the journal, and of each video file the first and last two.

        Between those lie writes of one kind: a frame each. FRAME_MEMORY_EVERY_WRITE tries them too.
        """
        if os.environ.get("FRAME_MEMORY_EVERY_WRITE"):
            return list(range(len(self.told)))
        files = {file: [n for n, told in enumerate(self.told) if told is file] for file in self.told}
        chosen = files.pop(None)
        return sorted({n for numbers in files.values() for n in (*numbers[:2], *numbers[-2:])} | set(chosen))

    def write(self, fd: int, data) -> int:
        """For the journal: half of the bytes still fit."""
        if not self.full():
            return WRITE(fd, data)
        WRITE(fd, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def file(self, path):
        """For libav."""
        return VideoFile(self, path)


class VideoFile:
    """A file whose writes are counted; it fails with the error that libav's own writing fails with."""

    def __init__(self, disk: FullAt, path) -> None:
        self.disk, self.name = disk, path
        self._file = io.FileIO(path, "w")
        self.seek, self.tell = self._file.seek, self._file.tell

    def write(self, data) -> int:
        if self.disk.full(self):
            raise av.error.FFmpegError(errno.ENOSPC, "No space left on device", self.name)
        return self._file.write(data)


@pytest.fixture
def disk(monkeypatch):
    """Makes a disk that is full from a write on; undone by a number below 0."""
    real = av.open

    def make(at: int) -> FullAt:
        made = FullAt(at)

        def opened(file, mode="r", **options):
            return real(made.file(file) if mode == "w" else file, mode=mode, **options)

        monkeypatch.setattr(av, "open", opened)
        monkeypatch.setattr(os, "write", made.write)
        return made

    return make


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_FILE)))


def film(model, vae, root, sampler=None):
    """One run; its latents and the pictures of its video."""
    start = {**start_latent(**SIZE), "frame_memory": {"base": "selftest"}}
    done = run(
        model, seconds=SECONDS, steps=1, start=start, sampler=sampler or Plain([]), project=project(root),
        live=Live(vae),
    )  # fmt: skip
    return done.latent["samples"].clone(), pictures(done.video)


def test_fault_06_full_at_every_write_of_a_run_in_turn(model, vae, tmp_path, disk):
    whole = disk(-1)
    latent, video = film(model, vae, tmp_path / "whole")
    refused = {JournalError: 0, VideoWriteError: 0}
    for at in whole.telling():
        root = tmp_path / str(at)
        folder = root / "frame_memory" / "p"
        full = disk(at)
        with pytest.raises((JournalError, VideoWriteError)) as raised:
            film(model, vae, root)
        assert full.failed
        kind = next(kind for kind in refused if isinstance(raised.value, kind))
        refused[kind] += 1
        text = str(raised.value)
        assert str(folder) in text and re.search(r"\d+ bytes", text) and "disk" in text, text
        kept = check_whole(folder)
        disk(-1)
        log: list = []
        again, shown = film(model, vae, root, Plain(log))
        assert torch.equal(again, latent) and (shown == video).all()
        assert len(log) == SECTIONS - kept
        assert not [path for path in folder.rglob("*") if ".part" in path.name]
    assert min(refused.values()) >= 12, refused


def check_whole(folder) -> int:
    """What is on the disk is whole; returns how many sections are finished."""
    if not (folder / "manifest.json").exists():
        return 0
    manifest = read_manifest(folder)
    assert all(verify(folder, record.file) is None for record in manifest.sections.values())
    assert not (folder / "lock.json").exists()
    for path in folder.rglob("*.mp4"):
        if ".part" not in path.name:
            pictures(path)
    return len(manifest.sections)
