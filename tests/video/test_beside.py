"""Encoding beside the decode: the bytes of one after the other, errors at once, a bounded queue, no thread left."""

from __future__ import annotations

import contextvars
import errno
import os
import threading

import av.error
import pytest
import torch

from frame_memory.video.beside import Beside
from frame_memory.video.save import pixels_of, plan_save, save_video
from frame_memory.video.writer import VideoWriteError, VideoWriter

from .test_video_save import long_latent, read_back

LONG = 30  # seconds that a broken test waits


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_jobs_keep_their_order_and_one_waits_at_most():
    done, go, begun = [], threading.Semaphore(0), threading.Semaphore(0)

    def job(number: int) -> None:
        begun.release()
        assert go.acquire(timeout=LONG)
        done.append(number)

    with Beside("test") as beside:
        beside.give(lambda: job(0))
        assert begun.acquire(timeout=LONG)
        beside.give(lambda: job(1))
        third = threading.Thread(target=lambda: beside.give(lambda: job(2)))
        third.start()
        third.join(0.2)
        assert third.is_alive() and not done, "one is at work, one waits, and the third is held up"
        for _ in range(3):
            go.release()
        third.join()
        beside.wait()
        assert done == [0, 1, 2]
    beside.give(lambda: done.append("at once"))
    assert done[-1] == "at once"
    beside.close()


def test_an_error_comes_to_the_caller_once_and_ends_the_work():
    done: list = []
    with Beside("test") as beside:
        beside.give(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            beside.wait()
        beside.give(lambda: done.append(1))
        beside.wait()
    assert not done, "what follows an error is left out"
    with pytest.raises(ZeroDivisionError), Beside("test") as beside:
        beside.give(lambda: 1 // 0)


def test_an_error_of_the_caller_comes_first_and_what_was_given_is_done():
    done: list = []
    with pytest.raises(KeyboardInterrupt), Beside("test") as beside:
        beside.give(lambda: done.append(1))
        beside.give(lambda: 1 // 0)
        raise KeyboardInterrupt
    assert done == [1]


def test_jobs_see_the_mode_and_the_context_of_the_caller():
    word = contextvars.ContextVar("word", default="")
    word.set("here")
    for mode in (True, False):
        seen: list = []
        with torch.inference_mode(mode), Beside("test") as beside:
            beside.give(lambda seen=seen: seen.append((torch.ones(1).is_inference(), word.get())))
        assert seen == [(mode, "here")]


@pytest.mark.parametrize("mode", ["carried", "windowed", "whole"])
@pytest.mark.parametrize("order", ["inverted", "forward"])
def test_a_save_writes_the_bytes_of_one_after_the_other(tmp_path, tiny_vae, mode, order):
    looked: list = []
    with torch.inference_mode():
        plan = plan_save(tiny_vae, long_latent(3, order=order), 0, mode)
        look = lambda first, frames: looked.append((first, frames.clone()))  # noqa: E731
        save_video(plan, tiny_vae, tmp_path / "a.mp4", look=look)
        with VideoWriter(tmp_path / "b.mp4", plan.width, plan.height, plan.fps, expected_frames=plan.frames) as writer:
            for chunk in pixels_of(plan, tiny_vae, 0, None, None):
                writer.write(chunk)
        pixels = torch.cat(list(pixels_of(plan, tiny_vae, 0, None, None)))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert torch.equal(torch.cat([frames for _, frames in looked]), pixels)
    assert [first for first, _ in looked] == [sum(len(f) for _, f in looked[:n]) for n in range(len(looked))]


def test_what_is_decoded_is_encoded_while_the_next_window_is_decoded(tmp_path, tiny_vae):
    """The first frames are held up in their encoding until the second window is decoded: alone, that would never be."""
    decoded = threading.Event()
    held: list[bool] = []
    with torch.inference_mode():
        plan = plan_save(tiny_vae, long_latent(4, order="forward"), 0, "windowed")
        save_video(
            plan, tiny_vae, tmp_path / "a.mp4", on_window=lambda done, _: done == 2 and decoded.set(),
            look=lambda first, _: first == 0 and held.append(decoded.wait(LONG)),
        )  # fmt: skip
    assert held == [True]


def test_fault_06_a_disk_that_fills_beside_the_decode_ends_the_save_at_once(tmp_path, tiny_vae, monkeypatch):
    """The second frame's write finds no room; the decode of a long latent stops at its next window."""
    windows: list[int] = []
    encode = VideoWriter._encode

    def full(self, image):
        if self.frames == 1:
            raise av.error.FFmpegError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        encode(self, image)

    monkeypatch.setattr(VideoWriter, "_encode", full)
    with torch.inference_mode():
        plan = plan_save(tiny_vae, long_latent(8), 0, "carried")
        with pytest.raises(VideoWriteError, match="Free some space and queue again"):
            save_video(plan, tiny_vae, tmp_path / "a.mp4", on_window=lambda done, _: windows.append(done))
    # One step is at work and one waits when the error comes, and one more may be decoded meanwhile.
    assert len(windows) <= 5 < plan.steps and not (tmp_path / "a.mp4").exists()


def test_fault_05_cancel_keeps_every_decoded_frame(tmp_path, tiny_vae):
    from comfy.model_management import InterruptProcessingException

    steps: list[int] = []

    def interrupt() -> None:
        if len(steps) == 5:
            raise InterruptProcessingException

    with torch.inference_mode(), pytest.raises(InterruptProcessingException):
        plan = plan_save(tiny_vae, long_latent(4))
        save_video(
            plan, tiny_vae, tmp_path / "a.mp4", interrupt=interrupt, on_window=lambda done, _: steps.append(done)
        )  # fmt: skip
    assert len(read_back(tmp_path / "a.part.mp4")) == 1 + 4 * 8
