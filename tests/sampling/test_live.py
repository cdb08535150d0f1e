"""The video on disk while its sections are made: what is final, what Cancel leaves, what a resume does not repeat."""

from __future__ import annotations

import errno
import inspect
import os
import threading
import time
from pathlib import Path

import av
import comfy.model_management
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch

from frame_memory.journal import Project, read_manifest
from frame_memory.plan import decode_windows
from frame_memory.sampling import live
from frame_memory.sampling.long_video import Live
from frame_memory.sampling.preview import resources
from frame_memory.video import segments
from frame_memory.video.decode import decode_stream
from frame_memory.video.vae import VAEError
from frame_memory.video.writer import VideoWriteError

from .test_project import ORDERS, Plain, made_with, project, run, start_latent

REPO = Path(__file__).resolve().parents[2]
VAE_FILE = REPO / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"
SECONDS, SECTIONS = 3.6, 3


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_FILE)))


def pictures(path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.average_rate == 30 and stream.codec_context.pix_fmt == "yuv420p"
        assert [round(f.time * 30) for f in frames] == list(range(len(frames)))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames])


def marked():
    """A start that says it belongs to the self-test VAE."""
    return {**start_latent(), "frame_memory": {"base": "selftest"}}


def small() -> dict:
    """As little as makes a video: 16x16 pixels, one step."""
    return {"start": {**start_latent(height=2, width=2), "frame_memory": {"base": "selftest"}}, "steps": 1}


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_the_written_video_is_the_decoded_latent(model, vae, tmp_path, kind, preset, written):
    shown: list[int] = []

    def show(path):
        shown.append(len(pictures(path)))
        written.check_video(path, shown[-1], 30, (80, 48))

    watched = Live(vae, show=show)
    done, _ = made_with(model, tmp_path, start=marked(), kind=kind, preset=preset, seconds=SECONDS, live=watched)
    samples = done.latent["samples"]
    windows = decode_windows(done.latent["frame_memory"]["order"], samples.shape[2])
    with torch.inference_mode():
        expected = torch.cat(list(decode_stream(vae.decode, samples, windows))).clamp(0, 1).numpy() * 255
    made = pictures(done.video)
    written.check_video(done.video, 109, 30, (80, 48))
    assert made.shape == expected.shape == (109, 48, 80, 3)
    error = np.abs(made.astype(np.float32) - expected)
    # Only what the encoder loses at crf 18; a wrong frame order or a missing blend is many times that.
    other = np.abs(made.astype(np.float32)[:-9] - expected[9:])
    assert error.mean() < 0.35 * other.mean()
    assert len(shown) == SECTIONS and shown == sorted(shown) and shown[0] > 0 and shown[-1] == 109
    assert (done.video.parent / "contact_sheet.png").stat().st_size > 100
    assert not list(done.video.parent.glob("*unfinished*")) and "Video:" in done.report
    records = read_manifest(done.video.parent).finished
    assert all("luma" in record.measures for record in records)


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_fault_05_cancel_leaves_a_playable_video_and_a_resume_writes_only_the_rest(
    model, vae, tmp_path, kind, preset, monkeypatch, written
):
    stop = comfy.model_management.InterruptProcessingException()
    said: list[str] = []
    more = {"kind": kind, "preset": preset, "seconds": SECONDS}
    made_with(model, tmp_path, start=marked(), fail_at=3, error=stop, live=Live(vae), say=said.append, **more)
    folder = tmp_path / "frame_memory" / "p"
    (kept,) = folder.glob("*unfinished.mp4")
    finished = len(pictures(kept))
    # Two sections of 36 frames, and with F1 the start picture in front of them.
    assert finished == (73 if kind == "F1" else 69)
    written.check_video(kept, finished, 30, (80, 48))
    assert any(str(kept) in text for text in said)
    segments = dict(read_manifest(folder).segments)
    done, count = made_with(model, tmp_path, start=marked(), live=Live(vae), **more)
    assert count == 1
    after = read_manifest(folder).segments
    assert segments and all(after[name] == info for name, info in segments.items())
    whole, _ = made_with(model, tmp_path / "other", start=marked(), live=Live(vae), **more)
    assert np.array_equal(pictures(done.video), pictures(whole.video))


def test_a_rerolled_section_replaces_only_the_pieces_it_shows_in(model, vae, tmp_path):
    from frame_memory.sampling.changes import SectionChange

    first, _ = made_with(model, tmp_path, start=marked(), seconds=SECONDS, live=Live(vae))
    before = pictures(first.video)
    second, _ = made_with(
        model, tmp_path, start=marked(), seconds=SECONDS, live=Live(vae), changes=(SectionChange(3, 5),)
    )
    after = pictures(second.video)
    assert np.array_equal(before[:37], after[:37]) and not np.array_equal(before[80:], after[80:])


@pytest.mark.parametrize("refused", [False, True], ids=["written", "refused"])
def test_a_section_is_written_while_the_next_one_is_sampled(model, vae, tmp_path, monkeypatch, refused):
    """The first piece waits for the second section's sampling; where it is refused, that sampling ends at once."""
    sampling, asked, held = threading.Event(), threading.Event(), []
    real = live.write_segment

    def write(*args, **kwargs):
        held.append(bool(held) or sampling.wait(30))
        asked.set()
        if refused:
            raise VideoWriteError("There is no room.")
        return real(*args, **kwargs)

    class Telling(Plain):
        def sample(self, *args, **kwargs):
            if self.log:
                sampling.set()
                assert asked.wait(30)
            return super().sample(*args, **kwargs)

    monkeypatch.setattr(live, "write_segment", write)
    before, log = set(threading.enumerate()), []
    settings = {**small(), "steps": 30, "project": project(tmp_path), "live": Live(vae), "sampler": Telling(log)}
    if refused:
        with pytest.raises(VideoWriteError, match="no room"):
            run(model, seconds=SECONDS, **settings)
        assert len(log) == 2 and len(read_manifest(tmp_path / "frame_memory" / "p").finished) == 1
    else:
        assert len(pictures(run(model, seconds=SECONDS, **settings).video)) == 109
    assert held[0] and set(threading.enumerate()) == before


def test_fault_47_a_preview_that_is_being_played_does_not_stop_the_run(model, vae, tmp_path, monkeypatch):
    """Windows refuses to replace a file that a browser holds open; and what shows it may fail by itself."""
    replace = os.replace

    def locked(source, target):
        if os.path.basename(target) == "preview.mp4":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    def broken(path):
        raise ConnectionError("the browser is gone")

    monkeypatch.setattr("frame_memory.video.files.LOCKED_WAIT", 0)
    monkeypatch.setattr(os, "replace", locked)
    done, count = made_with(model, tmp_path / "a", **small(), seconds=2.4, live=Live(vae))
    assert count == 2 and len(pictures(done.video)) == 73
    assert done.report.count("The video so far cannot be played on the node") == 1
    monkeypatch.undo()
    done, count = made_with(model, tmp_path / "b", **small(), seconds=2.4, live=Live(vae, show=broken))
    assert count == 2 and len(pictures(done.video)) == 73 and done.report.count("the browser is gone") == 1


def test_a_contact_sheet_that_cannot_be_written_does_not_stop_the_run(model, vae, tmp_path, monkeypatch):
    """A full disk; a sheet of another video would be wrong, so it is taken away."""
    made_with(model, tmp_path, **small(), seconds=1.2, live=Live(vae))
    sheet = tmp_path / "frame_memory" / "p" / "contact_sheet.png"
    assert sheet.exists()

    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("frame_memory.video.contact.ContactSheet.save", full)
        done, _ = made_with(model, tmp_path, **small(), seconds=2.4, live=Live(vae))
    assert len(pictures(done.video)) == 73 and not sheet.exists()
    assert done.report.count("The contact sheet cannot be written") == 1 and "No space left" in done.report


def cancelled_after(monkeypatch, name: str):
    """Presses Cancel, as the server does, when a function of live.py has done its work, or given its first chunk."""
    real = getattr(live, name)

    def chunks(*args, **kwargs):
        for chunk in real(*args, **kwargs):
            comfy.model_management.interrupt_current_processing(True)
            yield chunk

    def once(*args, **kwargs):
        made = real(*args, **kwargs)
        comfy.model_management.interrupt_current_processing(True)
        return made

    monkeypatch.setattr(live, name, chunks if inspect.isgeneratorfunction(real) else once)


@pytest.mark.parametrize("decoded", [True, False], ids=["with the pieces", "without"])
def test_fault_05_cancel_before_the_first_new_section_still_leaves_a_video(model, vae, tmp_path, decoded, written):
    """A killed run, queued again and cancelled while the model loads; also where nothing was decoded before."""
    stop = comfy.model_management.InterruptProcessingException()
    killed = {"fail_at": 3, "error": RuntimeError("killed"), "live": Live(vae) if decoded else None}
    made_with(model, tmp_path, **small(), seconds=SECONDS, **killed)
    folder = tmp_path / "frame_memory" / "p"
    unfinished = folder / "p-unfinished.mp4"
    unfinished.unlink(missing_ok=True)
    made_with(model, tmp_path, **small(), seconds=SECONDS, fail_at=1, error=stop, live=Live(vae))
    written.check_video(unfinished, 73, 30, (16, 16))
    done, count = made_with(model, tmp_path, **small(), seconds=SECONDS, live=Live(vae))
    assert count == 1 and len(pictures(done.video)) == 109


def test_a_second_cancel_leaves_what_was_decoded_by_then(model, vae, tmp_path, monkeypatch):
    stop = comfy.model_management.InterruptProcessingException()
    made_with(model, tmp_path, **small(), seconds=SECONDS, fail_at=3, error=RuntimeError("killed"))
    unfinished = tmp_path / "frame_memory" / "p" / "p-unfinished.mp4"
    cancelled_after(monkeypatch, "write_segment")
    said: list[str] = []
    made_with(model, tmp_path, **small(), seconds=SECONDS, fail_at=1, error=stop, live=Live(vae), say=said.append)
    comfy.model_management.interrupt_current_processing(False)
    assert str(unfinished) in said[-1]
    assert 1 <= len(pictures(unfinished)) < 73


def test_cancel_acts_while_a_resume_looks_through_what_is_there(model, vae, tmp_path, monkeypatch):
    made_with(model, tmp_path, **small(), seconds=2.4, live=Live(vae))
    cancelled_after(monkeypatch, "read_segment")
    stop = comfy.model_management.InterruptProcessingException()
    again, count = made_with(model, tmp_path, **small(), seconds=2.4, error=stop, live=Live(vae))
    assert again is None and count == 0
    folder = tmp_path / "frame_memory" / "p"
    assert len(pictures(folder / "p-unfinished.mp4")) == 73 and (folder / "contact_sheet.png").exists()
    monkeypatch.undo()
    comfy.model_management.interrupt_current_processing(False)
    done, count = made_with(model, tmp_path, **small(), seconds=2.4, live=Live(vae))
    assert count == 0 and len(pictures(done.video)) == 73


def test_after_cancel_no_preview_is_joined_any_more(model, vae, tmp_path, monkeypatch):
    """The second section's piece is still being written when Cancel comes, and the preview with it waits behind."""
    cancelled, joined = threading.Event(), []
    write, join, close = live.write_segment, live.join_segments, live.Beside.close

    def held(folder, piece, *args, **kwargs):
        assert not joined or cancelled.wait(30)
        return write(folder, piece, *args, **kwargs)

    def noted(folder, segments, path, *args, **kwargs):
        joined.append(path.name)
        return join(folder, segments, path, *args, **kwargs)

    def ended(beside):
        cancelled.set()
        close(beside)

    monkeypatch.setattr(live, "write_segment", held)
    monkeypatch.setattr(live, "join_segments", noted)
    monkeypatch.setattr(live.Beside, "close", ended)
    stop = comfy.model_management.InterruptProcessingException()
    made_with(model, tmp_path, **small(), seconds=SECONDS, fail_at=3, error=stop, live=Live(vae))
    folder = tmp_path / "frame_memory" / "p"
    assert joined == ["preview.mp4", "p-unfinished.mp4"] and len(pictures(folder / "p-unfinished.mp4")) == 73
    assert sum("luma" in record.measures for record in read_manifest(folder).finished) == 1, "it is judged all the same"


def test_a_batch_says_which_video_is_written(model, vae, tmp_path):
    small_batch = {
        **small(),
        "start": {**start_latent(batch=2, height=2, width=2), "frame_memory": {"base": "selftest"}},
    }
    said: list[str] = []
    done, _ = made_with(model, tmp_path, **small_batch, seconds=1.2, live=Live(vae), say=said.append)
    words = "The node plays and writes the first of 2 videos, as p.mp4. 'Save Long Video' makes a file of each"
    assert words in done.report and any(words in text for text in said)


def test_the_disk_that_a_project_takes_is_what_its_files_take(model, vae, tmp_path):
    """Takes, pieces, the joined video and all else; a folder that is gone stops no step."""
    for seed in (0, 1):
        made_with(model, tmp_path, **small(), seconds=2.4, live=Live(vae), seed=seed)
    folder = tmp_path / "frame_memory" / "p"
    found = read_manifest(folder)
    with Project.open(
        folder.parent, "p", shape=found.shape, fields=found.fields, plan=found.plan, if_changed="refuse",
        section_bytes=0, sections=2,
    ) as work:  # fmt: skip
        files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        assert work.manifest.takes and work.manifest.segments and work.taken() == sum(files)
        assert resources(work).startswith(f"disk {sum(files) / 2**20:.1f} MB used")
        folder.rename(tmp_path / "unplugged")
        assert resources(work).startswith("RAM ")
        (tmp_path / "unplugged").rename(folder)


def test_a_vae_of_another_family_is_refused_before_sampling(model, tmp_path):
    sampler = Plain([])
    with pytest.raises(VAEError, match="Load VAE"):
        run(model, sampler=sampler, project=project(tmp_path), live=Live(comfy.sd.VAE(sd=image_vae())))
    assert not sampler.log


def image_vae() -> dict:
    from comfy.taesd.taesd import TAESD

    taesd = TAESD()
    return {f"taesd_{k}": v for k, v in taesd.state_dict().items() if "vae_s" not in k} or taesd.state_dict()


def test_fault_12_a_project_whose_mp4_is_refused_ends_as_mkv(model, vae, tmp_path, monkeypatch):
    """A muxer that is missing, by its name alone: what is written instead is a real mkv."""
    real = segments._mux

    def picky(folder, ordered, part, *rest):
        if ".mp4" in part.name:
            raise ValueError("mp4 is not available")
        return real(folder, ordered, part, *rest)

    monkeypatch.setattr(segments, "_mux", picky)
    done, _ = made_with(model, tmp_path, seconds=1.2, live=Live(vae), **small())
    assert done.video.suffix == ".mkv" and len(pictures(done.video)) == 37
    assert "mp4 is not available" in done.report and done.video.name in done.report


def test_pieces_are_looked_at_one_after_the_other(model, vae, tmp_path, monkeypatch):
    """Those that are written again, on the thread beside, before those that an earlier run has left."""
    history = {**start_latent(frames=37, height=2, width=2, seed=9), "frame_memory": {"base": "selftest"}}
    settings = {**small(), "history": history, "project": project(tmp_path), "live": Live(vae)}
    run(model, seconds=1.2, **settings)
    folder = tmp_path / "frame_memory" / "p"
    min((folder / "segments").iterdir()).unlink()
    busy, together = [], []
    real = live.LiveVideo._look_at

    def look(watched, first, frames):
        together.append(len(busy))
        busy.append(first)
        time.sleep(0.05)
        real(watched, first, frames)
        busy.remove(first)

    monkeypatch.setattr(live.LiveVideo, "_look_at", look)
    run(model, seconds=2.4, **settings)
    assert len(together) > 1 and not any(together)
