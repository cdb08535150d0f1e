"""Drift Meter on latents and projects: the order and the sections their marks name, decoded a few frames at a time."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch

from frame_memory.journal import JournalError
from frame_memory.sampling.measured import decoded
from frame_memory.video.drift import DriftMeter
from frame_memory.video.footage import FootageError

from .test_project import made_with, start_latent

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])
VAE_FILE = Path(__file__).resolve().parents[2] / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"


@pytest.fixture(scope="module")
def vae():
    weights, metadata = comfy.utils.load_torch_file(str(VAE_FILE), return_metadata=True)
    return comfy.sd.VAE(sd=weights, metadata=metadata)


def footage_of(vae, tmp_path, samples=None, project="", order="forward"):
    said = []
    return decoded(tmp_path / "frame_memory", samples, project, vae, order, "Drift Meter", lambda: None, said.append)


def latent(order: str | None, frames: int = 19, given: int = 1) -> dict:
    samples = torch.randn(1, 16, frames, 2, 2, generator=torch.Generator().manual_seed(3))
    mark = {"base": "selftest", "order": order, "window": 9, "fps": 30.0, "given": given}
    return {"samples": samples, **({"frame_memory": mark} if order else {})}


@pytest.mark.parametrize("order", ["forward", "inverted", "both ends first", None])
def test_a_latent_says_its_order_and_sections_itself(vae, tmp_path, order):
    samples = latent(order)
    footage, timing = footage_of(vae, tmp_path, samples, order="inverted")
    assert (footage.frames, footage.fps, footage.width, footage.height) == (73, 30.0, 16, 16)
    if order is None:
        assert timing.order == "inverted" and not timing.named, "nothing is known but what is typed"
        return
    # Latent frame 0 is the given picture, pixel frame 0; the sections are 36 pixel frames each.
    assert (timing.order, timing.given, timing.named) == (order, 1, True)
    assert timing.sections == ((1, 1, 37), (2, 37, 73))
    with torch.inference_mode():
        whole = vae.decode(samples["samples"])[0]
        meter = DriftMeter(timing)
        for first, chunk in footage.chunks():
            assert len(chunk) <= 8
            meter.look(first, chunk)
    luma = (whole.float() @ LUMA).mean(dim=(1, 2)).numpy() * 255
    making = {"forward": range(1, 73), "inverted": range(72, 0, -1), "both ends first": [*range(37, 73), *range(1, 37)]}
    in_order = luma[list(making[order])]
    curve = meter.result().curves["brightness"]
    assert curve.first == pytest.approx(np.mean(in_order[:11]), abs=0.05), "15 % of 72 frames"
    assert curve.last == pytest.approx(np.mean(in_order[-11:]), abs=0.05)
    part = torch.cat(list(footage.between(5, 20)))
    assert torch.allclose(part, whole[5:20], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "preset", "order"), [("F1", "F1 forward", "forward"), ("F0", "F0 inverted", "inverted")]
)
def test_a_project_is_measured_by_its_name_also_unfinished(model, vae, tmp_path, kind, preset, order):
    start = {**start_latent(height=2, width=2), "frame_memory": {"base": "selftest"}}
    more = {"kind": kind, "preset": preset, "seconds": 3.6, "start": start, "steps": 1}
    made_with(model, tmp_path, fail_at=3, error=RuntimeError("power cut"), **more)
    footage, timing = footage_of(vae, tmp_path, project="p")
    assert timing.order == order and footage.words.startswith("Project 'p' is not finished: 2 of 3 sections")
    if order == "forward":
        assert (timing.given, timing.sections) == (1, ((1, 1, 37), (2, 37, 73)))
    else:
        # Its end: sections 2 and 3 of three, whose first latent frame begins the stretch as one picture.
        assert timing.given == 0 and [number for number, _, _ in timing.sections] == [2, 3]
        assert timing.sections[-1][2] == footage.frames
    done, _ = made_with(model, tmp_path, **more)
    footage, timing = footage_of(vae, tmp_path, project=" p ")
    assert timing.sections == ((1, 1, 37), (2, 37, 73), (3, 73, 109)) and timing.given == 1 and footage.frames == 109
    same, by_latent = footage_of(vae, tmp_path, done.latent)
    assert by_latent.sections == timing.sections
    with torch.inference_mode():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(footage.chunks(), same.chunks(), strict=True))


def test_what_cannot_be_decoded_is_refused_in_the_nodes_own_name(vae, tmp_path):
    with pytest.raises(FootageError, match="'Drift Meter' needs the VAE"):
        footage_of(None, tmp_path, latent("forward"))
    with pytest.raises(FootageError, match="socket 'samples' of 'Drift Meter' got a latent of shape .1, 16, 2, 2."):
        footage_of(vae, tmp_path, {"samples": torch.zeros(1, 16, 2, 2)})
    wrong = latent("forward")
    wrong["frame_memory"]["base"] = "HunyuanVideo"
    with pytest.raises(FootageError, match="Load VAE.*HunyuanVideo"):
        footage_of(vae, tmp_path, wrong)


def test_the_part_of_a_project_without_its_end_was_made_forward(model, vae, tmp_path):
    """Both ends first: the last section is made first, and does not hang together with what is made next."""
    start = {**start_latent(height=2, width=2), "frame_memory": {"base": "selftest"}}
    more = {"kind": None, "preset": "Anti-drifting, both ends first", "seconds": 4.8, "start": start, "steps": 1}
    made_with(model, tmp_path, fail_at=4, error=RuntimeError("power cut"), **more)
    footage, timing = footage_of(vae, tmp_path, project="p")
    assert timing.sections == ((1, 1, 37), (2, 37, 73)) and timing.making() == list(range(1, 73))
    assert "Measured: 0.0 to 2.4 s" in footage.words and "then measure again" in footage.words
    assert "finished sections lie beyond a gap" in footage.words, "the last section is there and is not looked at"
    made_with(model, tmp_path, **more)
    _, timing = footage_of(vae, tmp_path, project="p")
    assert timing.making() == [*range(109, 145), *range(1, 109)]


def test_a_project_that_is_not_there_is_told_in_the_nodes_own_name(vae, tmp_path):
    with pytest.raises(JournalError, match="'project' of 'Drift Meter' is 'none'"):
        footage_of(vae, tmp_path, project="none")
