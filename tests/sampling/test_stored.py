"""A project read back as a latent: the numbers of the run, whole or in part, and words for what is missing."""

from __future__ import annotations

import pytest
import torch

from frame_memory.journal import JournalError, ProjectLock, read_manifest
from frame_memory.plan.decode import decode_windows
from frame_memory.sampling.stored import open_stored, state_of

from .test_project import ORDERS, made_with, start_latent

SECONDS = 3.6  # three sections


def root(tmp_path):
    return tmp_path / "frame_memory"


def all_of(stored):
    return torch.cat([stored.frames(item, 0, stored.shape[2]) for item in range(stored.shape[0])])


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_a_finished_project_is_the_latent_of_the_run(model, tmp_path, kind, preset):
    more = {"start": start_latent(batch=2), "kind": kind, "preset": preset, "seconds": SECONDS}
    done, _ = made_with(model, tmp_path, **more)
    stored = open_stored(root(tmp_path), " p ")
    assert stored.whole and torch.equal(all_of(stored), done.latent["samples"]) and not stored.notes
    assert stored.windows == decode_windows(done.latent["frame_memory"]["order"], 28)
    assert stored.same_as(done.latent["samples"]) and not stored.same_as(done.latent["samples"] + 1)
    assert "all 3 sections, 3.63 s" in stored.describe()
    assert done.latent["frame_memory"]["project"] == "p" and done.latent["frame_memory"]["given"] == 1


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_of_an_unfinished_project_the_finished_part_is_read(model, tmp_path, kind, preset):
    more = {"kind": kind, "preset": preset, "seconds": SECONDS}
    made_with(model, tmp_path, fail_at=3, error=RuntimeError("power cut"), **more)
    stored = open_stored(root(tmp_path), "p")
    part = all_of(stored)
    assert "2 of 3 sections" in stored.describe() and not stored.whole
    whole, _ = made_with(model, tmp_path, **more)
    span = slice(0, 19) if kind == "F1" else slice(10, 28)
    assert torch.equal(part, whole.latent["samples"][:, :, span])
    # The windows of the whole video that lie in the part, so that what is final has its final pixels.
    planned = {(w.start - span.start, w.stop - span.start) for w in decode_windows(stored.mark.order, 28)}
    windows = [(w.start, w.stop) for w in stored.windows]
    assert set(windows) < planned and windows[0][0] == 0 and windows[-1][1] == stored.shape[2]


def test_an_existing_video_in_front_is_part_of_it(model, tmp_path):
    history = start_latent(frames=12, seed=4)
    done, _ = made_with(model, tmp_path, seconds=1.2, history=history)
    assert torch.equal(all_of(open_stored(root(tmp_path), "p")), done.latent["samples"])


def test_names_that_are_not_there_are_refused_with_the_nearest(model, tmp_path):
    with pytest.raises(JournalError, match="no project yet"):
        open_stored(root(tmp_path), "p")
    made_with(model, tmp_path, seconds=1.2)
    with pytest.raises(JournalError, match="'pp'.*Nearest: 'p'.*Anti-Drift Sampler"):
        open_stored(root(tmp_path), "pp")
    for name in ("u12-z8", "u12-killref"):
        (root(tmp_path) / name).mkdir()
        (root(tmp_path) / name / "manifest.json").touch()
    with pytest.raises(JournalError, match="'U12-KILLREF'.*Nearest: 'u12-killref'"):
        open_stored(root(tmp_path), "U12-KILLREF")
    with pytest.raises(JournalError, match="leads out"):
        open_stored(root(tmp_path), "../p")
    made_with(model, tmp_path / "b", fail_at=1, error=RuntimeError("at once"))
    with pytest.raises(JournalError, match="no finished section"):
        open_stored(root(tmp_path / "b"), "p")


def test_a_damaged_section_is_left_out_and_named(model, tmp_path):
    made_with(model, tmp_path, seconds=SECONDS)
    path = root(tmp_path) / "p" / "sections" / "002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    stored = open_stored(root(tmp_path), "p")
    assert stored.shape[2] == 19 and any("Section 3" in note and "damaged" in note for note in stored.notes)


def test_reading_needs_no_lock_and_says_who_writes(model, tmp_path):
    done, _ = made_with(model, tmp_path, seconds=1.2)
    assert "The only section was made now." in done.report
    with ProjectLock(root(tmp_path) / "p"):
        stored = open_stored(root(tmp_path), "p")
    assert torch.equal(all_of(stored), done.latent["samples"])
    assert any("being written by process" in note for note in stored.notes)


def test_a_section_replaced_while_it_is_read_is_found_among_the_takes(model, tmp_path):
    done, _ = made_with(model, tmp_path, seconds=2.4)
    stored = open_stored(root(tmp_path), "p")
    made_with(model, tmp_path, seconds=2.4, seed=8)
    assert torch.equal(all_of(stored), done.latent["samples"])
    assert not torch.equal(all_of(open_stored(root(tmp_path), "p")), done.latent["samples"])


def test_the_state_changes_with_what_is_finished_and_not_with_measures(model, tmp_path):
    from dataclasses import replace

    from frame_memory.journal import write_manifest

    assert state_of(root(tmp_path), "p") == ""
    made_with(model, tmp_path, seconds=1.2)
    first = state_of(root(tmp_path), "p")
    manifest = read_manifest(root(tmp_path) / "p")
    sections = {i: replace(r, measures={"luma": 1.0}) for i, r in manifest.sections.items()}
    write_manifest(root(tmp_path) / "p", replace(manifest, sections=sections))
    assert first and state_of(root(tmp_path), "p") == first
    made_with(model, tmp_path, seconds=2.4)
    assert state_of(root(tmp_path), "p") != first


def test_a_lost_manifest_is_told_apart_from_a_project_that_never_was(tmp_path):
    (tmp_path / "p" / "sections").mkdir(parents=True)
    (tmp_path / "p" / "sections" / "000.safetensors").write_bytes(b"x")
    with pytest.raises(JournalError, match="holds sections but no manifest.json.*Put the file back"):
        open_stored(tmp_path, "p")
