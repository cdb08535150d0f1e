"""Save Long Video from a project or a LATENT: which one is saved, and what is found in its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frame_memory.journal import ProjectLock, read_manifest
from frame_memory.sampling.frames import AT_HAND
from frame_memory.sampling.save_source import choose
from frame_memory.video.decode import DecodeError
from frame_memory.video.guards import warnings_of
from frame_memory.video.save import plan_save, save_video

from .test_live import marked, pictures
from .test_live import vae as vae
from .test_project import ORDERS, made_with

SECONDS = 3.6  # three sections


def saved(vae, tmp_path, samples=None, project="", name="a.mp4"):
    """(pixels, report lines, source) of one save."""
    with torch.inference_mode():
        source = choose(tmp_path / "frame_memory", samples, project)
        plan = plan_save(vae, source.samples, 0, "windowed", source.windows)
        written = save_video(plan, vae, tmp_path / name, look=source.begin(plan.fps))
    return pictures(written.path), "\n".join(source.end()), source


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_a_project_is_saved_like_its_latent_and_read_section_by_section(model, vae, tmp_path, kind, preset):
    done, _ = made_with(model, tmp_path, start=marked(), kind=kind, preset=preset, seconds=7.2)
    assert done.video is None and "are looked for when the video is decoded" in done.report
    expected, _, _ = saved(vae, tmp_path, done.latent, name="latent.mp4")
    made, report, source = saved(vae, tmp_path, project="p")
    assert np.array_equal(made, expected) and len(made) == 217
    assert "all 6 sections, 7.23 s" in report and "Contact sheet:" in report
    assert len(source.stored.latents._held) <= AT_HAND < 6


@pytest.mark.parametrize("by", ["project", "samples"])
def test_measures_and_warnings_reach_report_and_manifest_without_a_vae_on_the_sampler(model, vae, tmp_path, by):
    done, _ = made_with(model, tmp_path, start=marked(), seconds=SECONDS)
    folder = tmp_path / "frame_memory" / "p"
    assert not any(record.measures for record in read_manifest(folder).finished)
    _, report, _ = saved(vae, tmp_path, **{by: "p" if by == "project" else done.latent})
    manifest = read_manifest(folder)
    assert all("luma" in record.measures for record in manifest.finished)
    notes = [note for r in manifest.finished for note in warnings_of(manifest.number(r.index), r.measures)]
    assert all(f"Warning: {note}" in report for note in notes)
    assert (folder / "contact_sheet.png").is_file()
    again, _ = made_with(model, tmp_path, start=marked(), seconds=SECONDS)
    assert all(f"Warning: {note}" in again.report for note in notes)


def test_a_frozen_section_is_said_for_a_latent_without_a_project(vae, tmp_path):
    samples = torch.zeros(1, 16, 19, 4, 6) + 0.1
    mark = {"base": "selftest", "order": "forward", "window": 9, "fps": 30, "given": 1, "project": "gone"}
    _, report, source = saved(vae, tmp_path, {"samples": samples, "frame_memory": mark})
    assert source.stored is None and "Section 2 is frozen" in report
    _, report, _ = saved(vae, tmp_path, {"samples": samples}, name="b.mp4")
    assert report == "", "nobody knows the sections of a latent without a mark"


def test_the_finished_part_of_an_unfinished_project_plays(model, vae, tmp_path):
    more = {"start": marked(), "seconds": SECONDS, "kind": "F0", "preset": "F0 inverted"}
    made_with(model, tmp_path, fail_at=3, error=RuntimeError("power cut"), **more)
    made, report, _ = saved(vae, tmp_path, project="p")
    assert "is not finished: 2 of 3 sections are there. Saved: 1.3 to 3.6 s of 3.6 s" in report
    assert len(made) == 4 * 18 - 3


def test_neither_both_and_two_different_videos(model, vae, tmp_path):
    root = tmp_path / "frame_memory"
    done, _ = made_with(model, tmp_path, start=marked(), seconds=1.2)
    with pytest.raises(DecodeError, match="nothing to save.*'project' is empty"):
        choose(root, None, "  ")
    _, report, _ = saved(vae, tmp_path, done.latent, "p")
    assert "are the same video: 'samples' was saved" in report
    other = {**done.latent, "samples": done.latent["samples"] + 1}
    with pytest.raises(DecodeError, match="two different videos"):
        choose(root, other, "p")


def test_fault_11_a_project_in_use_is_saved_and_only_its_manifest_left_alone(model, vae, tmp_path):
    made_with(model, tmp_path, start=marked(), seconds=1.2)
    with ProjectLock(tmp_path / "frame_memory" / "p"):
        made, report, _ = saved(vae, tmp_path, project="p")
    assert len(made) == 37 and "being written by process" in report and "were not stored in the project" in report
