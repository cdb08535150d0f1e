"""What a project says of its sections: from the pixels that are there now, once each, by their place in the video."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch

from frame_memory.journal import DiskFull, Project, files, read_manifest, write_manifest
from frame_memory.model.tensor_file import read_header
from frame_memory.sampling import identity
from frame_memory.sampling.changes import SectionChange
from frame_memory.sampling.long_video import Live
from frame_memory.sampling.project_run import section_bytes
from frame_memory.sampling.stored import annotate_stored, open_stored
from frame_memory.video import guards
from frame_memory.video.writer import estimate_bytes

from .conftest import guider_for, of_kind, start_latent
from .test_project import Plain, made_with, project, run

REPO = Path(__file__).resolve().parents[2]
VAE_FILE = REPO / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"
F0 = {"kind": "F0", "preset": "F0 inverted", "seconds": 3.6}  # three sections, the last in time is made first


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_FILE)))


def marked():
    return {**start_latent(), "frame_memory": {"base": "selftest"}}


def warned(report: str) -> list[str]:
    return [line for line in report.splitlines() if re.match(r"Warning: Section \d+( |:)", line)]


def subjects(lines: list[str]) -> list[str]:
    """Which section and what of it, without the numbers that were measured."""
    return [re.sub(r"[-+]?\d+\.\d+", "x", line) for line in lines]


def by_start(folder: Path) -> dict[int, dict[str, float]]:
    return {record.start: record.measures for record in read_manifest(folder).finished}


def folder_of(tmp_path) -> Path:
    return tmp_path / "frame_memory" / "p"


def test_warnings_of_a_video_are_said_once_and_follow_its_pixels(model, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "LUMA_STEP", 0.001)  # every section warns
    first, _ = made_with(model, tmp_path, start=marked(), live=Live(vae), **F0)
    lines, measures = warned(first.report), by_start(folder_of(tmp_path))
    assert {line.split()[2] for line in lines} >= {"2:", "3:"}
    assert all("seam" in measures[start] for start in (10, 19)) and "luma_step" in measures[19]
    again, count = made_with(model, tmp_path, start=marked(), live=Live(vae), **F0)
    assert count == 0 and warned(again.report) == lines and by_start(folder_of(tmp_path)) == measures
    # Section 2 is made anew; section 3, made before it, now begins at another picture and is measured against that.
    picked = {"changes": (SectionChange(2, 5),)}
    rolled, count = made_with(model, tmp_path, start=marked(), live=Live(vae), **F0, **picked)
    fresh, _ = made_with(model, tmp_path / "b", start=marked(), live=Live(vae), **F0, **picked)
    assert count == 2 and len(subjects(warned(rolled.report))) == len(set(subjects(warned(rolled.report))))
    here, there = by_start(folder_of(tmp_path)), by_start(folder_of(tmp_path / "b"))
    for name in ("luma_step", "seam"):
        assert here[19][name] == pytest.approx(there[19][name], rel=0.25, abs=0.5)
    assert abs(here[19]["luma_step"] - measures[19]["luma_step"]) > 2 * abs(
        here[19]["luma_step"] - there[19]["luma_step"]
    )
    # A longer video: its pieces have other ranges, and those of the old one are forgotten.
    folder = folder_of(tmp_path)
    made_with(model, tmp_path, start=marked(), live=Live(vae), **{**F0, "seconds": 2.4})
    names = set(read_manifest(folder).segments)
    assert names == {path.name for path in (folder / "segments").iterdir()}
    spans = sorted((s["start_frame"], s["stop_frame"]) for s in read_manifest(folder).segments.values())
    assert spans[0][0] == 0 and spans[-1][1] == 73 and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))


def test_saving_a_project_replaces_its_measures(model, tmp_path):
    made_with(model, tmp_path, **F0)
    folder = folder_of(tmp_path)
    manifest = read_manifest(folder)
    old = {i: replace(r, measures={"seam": 9.0}, notes=("was made twice.",)) for i, r in manifest.sections.items()}
    write_manifest(folder, replace(manifest, sections=old))
    assert annotate_stored(open_stored(folder.parent, "p"), {1: ({"motion": 0.1}, ("old words",)), 3: ({}, ())}) == ""
    assert by_start(folder) == {1: {"motion": 0.1}, 10: {"seam": 9.0}, 19: {}}
    done, _ = made_with(model, tmp_path, **F0)
    # In the order of time, without a word that was stored for another number.
    assert [line[:26] for line in warned(done.report)] == [
        "Warning: Section 1 was mad", "Warning: Section 1 is froz", "Warning: Section 2 was mad",
        "Warning: Section 3 was mad",
    ]  # fmt: skip


def test_a_section_s_record_says_what_decided_it(model, tmp_path):
    made_with(model, tmp_path, **F0, changes=(SectionChange(2, seed=99),))
    fields = [record.fields for record in read_manifest(folder_of(tmp_path)).finished]
    assert [f["seed"] for f in fields] == ["7", "99", "9"] and len({f["prompts"] for f in fields}) == 1
    assert all("FramePack" in f["model"] and "3 steps" in f["sigmas"] for f in fields)


def test_every_step_says_that_the_project_is_in_use(model, tmp_path, monkeypatch):
    calls, real = [], Project.alive
    monkeypatch.setattr(Project, "alive", lambda self: (calls.append(1), real(self))[1])
    made_with(model, tmp_path, seconds=2.4)
    assert len(calls) == 2 * 3


def test_fault_06_room_for_the_video_is_asked_for_before_sampling(model, vae, tmp_path, monkeypatch):
    shape = (1, 16, 1, 6, 10)
    latents, all_of_it = section_bytes(9, shape, live=False), section_bytes(9, shape, live=True)
    assert all_of_it - latents == 3 * estimate_bytes(80, 48, 36)
    real = files.shutil.disk_usage

    def nearly_full(path):
        return real(path)._replace(free=files.MARGIN + 2 * latents + latents // 2)

    monkeypatch.setattr(files.shutil, "disk_usage", nearly_full)
    sampler = Plain([])
    with pytest.raises(DiskFull, match="2 sections"):
        run(model, start=marked(), seconds=2.4, sampler=sampler, project=project(tmp_path), live=Live(vae))
    assert not sampler.log
    made_with(model, tmp_path, start=marked(), seconds=2.4)


@pytest.mark.parametrize("harm", ["cut", "header", "none"])
def test_fault_04_a_torn_file_of_the_whole_latent_is_written_again(model, tmp_path, harm):
    done, _ = made_with(model, tmp_path, seconds=2.4)
    expected = done.latent["samples"].clone()
    del done
    (path,) = folder_of(tmp_path).glob("latent-*.safetensors")
    data, before = path.read_bytes(), path.stat().st_mtime_ns
    if harm != "none":
        path.write_bytes(data[:-100] if harm == "cut" else data[:8] + b"{" * 40 + data[48:])
    again, count = made_with(model, tmp_path, seconds=2.4)
    assert count == 0 and torch.equal(again.latent["samples"], expected) and path.read_bytes() == data
    assert (path.stat().st_mtime_ns == before) == (harm == "none") and read_header(str(path))


@pytest.mark.parametrize("frame", [0, 14, 27])
def test_any_changed_section_makes_a_latent_another_video(model, tmp_path, frame):
    done, _ = made_with(model, tmp_path, **F0)
    stored, samples = open_stored(tmp_path / "frame_memory", "p"), done.latent["samples"].clone()
    assert stored.same_as(samples)
    samples[:, :, frame, 2:4, 2:4] += 0.5
    assert not stored.same_as(samples)


def test_only_what_a_run_leaves_behind_is_no_part_of_the_identity(model):
    clone = of_kind(model, "F1")
    before = identity.model_fields(clone)
    left = {"sigmas": torch.ones(3), "cond_or_uncond": [0], "callbacks": {"x": [print]}}
    options = clone.model_options.get("transformer_options", {})
    clone.model_options["transformer_options"] = {**options, **left}
    assert identity.model_fields(clone) == before
    clone.model_options["another_pack"] = {"sigmas": [1.0, 0.0]}
    assert identity.model_fields(clone) != before

    def guided(settings):
        guider = guider_for(clone)
        guider.settings = settings
        return identity.guider_fields(guider, Plain([]), torch.ones(2))["guidance"]

    assert guided({"sigmas": [1.0, 0.5]}) != guided({"sigmas": [1.0, 0.7]})
    assert identity.prompt_field({"positive": [{"uuid": 1, "a": 2}]}) == identity.prompt_field({"positive": [{"a": 2}]})
