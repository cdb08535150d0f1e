"""The video on disk while its sections are made: what is final, what Cancel leaves, what a resume does not repeat."""

from __future__ import annotations

from pathlib import Path

import av
import comfy.model_management
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch

from frame_memory.journal import read_manifest
from frame_memory.plan import decode_windows
from frame_memory.sampling.long_video import Live
from frame_memory.video.decode import decode_stream
from frame_memory.video.vae import VAEError

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


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_the_written_video_is_the_decoded_latent(model, vae, tmp_path, kind, preset):
    shown: list[int] = []
    live = Live(vae, show=lambda path: shown.append(len(pictures(path))))
    done, _ = made_with(model, tmp_path, start=marked(), kind=kind, preset=preset, seconds=SECONDS, live=live)
    samples = done.latent["samples"]
    windows = decode_windows(done.latent["frame_memory"]["order"], samples.shape[2])
    with torch.inference_mode():
        expected = torch.cat(list(decode_stream(vae.decode, samples, windows))).clamp(0, 1).numpy() * 255
    made = pictures(done.video)
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
    model, vae, tmp_path, kind, preset, monkeypatch
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


def test_a_vae_of_another_family_is_refused_before_sampling(model, tmp_path):
    sampler = Plain([])
    with pytest.raises(VAEError, match="Load VAE"):
        run(model, sampler=sampler, project=project(tmp_path), live=Live(comfy.sd.VAE(sd=image_vae())))
    assert not sampler.log


def image_vae() -> dict:
    from comfy.taesd.taesd import TAESD

    taesd = TAESD()
    return {f"taesd_{k}": v for k, v in taesd.state_dict().items() if "vae_s" not in k} or taesd.state_dict()
