"""Projects: continued, refused, forked, re-rolled; what is reused and what is found damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frame_memory.journal import (
    DiskFull,
    JournalError,
    Project,
    ProjectConflict,
    ProjectLocked,
    UnreadableManifest,
    files,
    list_projects,
    manifest,
    project,
    read_manifest,
)

SHAPE = {"family": "HunyuanVideo", "kind": "F1 forward", "latent": "16x8x8"}
FIELDS = {"model": "F1 ab12", "prompt": "a cat", "seed": "1"}
A, B, C = "a1" * 32, "b2" * 32, "c3" * 32


def opened(root, name="film", *, shape=SHAPE, fields=FIELDS, if_changed="reuse what fits", sections=4, **changes):
    plan = {"schedule": "f1k1", "sections": sections, "frames": (1, 2)}
    options = {"plan": plan, "section_bytes": 1000, "sections": sections, **changes}
    return Project.open(root, name, shape=shape, fields=fields, if_changed=if_changed, **options)


def samples(seed=0, dtype=torch.float32):
    return torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).to(dtype)


def saved(work, index, key, seed=0, **changes):
    return work.save(index=index, start=9 * index, stop=9 * index + 9, key=key, samples=samples(seed), **changes)


def adopted(work, index, key, **changes):
    return work.adopt(key, index=index, start=9 * index, stop=9 * index + 9, **changes)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)


def test_a_section_is_found_bit_for_bit_in_a_new_process_life(tmp_path):
    with opened(tmp_path) as work:
        assert work.find(A) is None and work.status().startswith("0 of 4 sections finished")
        record = saved(work, 0, A, fields={"prompt": "a cat"}, measures={"luma": 0.5}, notes=["n"], seconds=1.5)
        assert record.file.name == "sections/000.safetensors" and work.status().startswith("1 of 4")
    with opened(tmp_path) as work:
        assert work.find(A).equal(samples()) and work.load(0).equal(samples())
        assert work.manifest.sections[0] == record and work.manifest.run == (0,) and not work.notes
        assert adopted(work, 0, A) == record
    assert not (tmp_path / "film" / "lock.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_values_are_kept_and_the_input_is_left_alone(tmp_path, dtype):
    given = samples(dtype=dtype).transpose(3, 4)
    copy = given.clone()
    with opened(tmp_path) as work:
        work.save(index=0, start=0, stop=9, key=A, samples=given)
        assert work.load(0).dtype == dtype and work.load(0).equal(copy) and given.equal(copy)


def test_safetensors_itself_reads_a_section(tmp_path):
    from safetensors import safe_open

    with opened(tmp_path) as work:
        saved(work, 1000, A)
    with safe_open(tmp_path / "film/sections/1000.safetensors", "pt") as file:
        assert file.get_tensor("samples").equal(samples()) and file.metadata()["key"] == A


def test_a_rolled_section_keeps_the_old_take_and_either_can_be_chosen(tmp_path):
    with opened(tmp_path) as work:
        for index, key in enumerate((A, C)):
            saved(work, index, key, index)
        saved(work, 0, B, 7)
        take = work.manifest.takes[0]
        assert take.file.name == "takes/000-a1a1a1a1.safetensors" and take.key == A
        assert work.manifest.run == (0,), "what was made after it no longer counts, until it is found again"
        assert [r.key for r in work.manifest.finished] == [B]
        assert work.find(A).equal(samples(0)) and work.find(B).equal(samples(7)) and work.find(C).equal(samples(1))
        adopted(work, 0, A, fields={"prompt": "x"})
        assert work.load(0).equal(samples(0)) and [r.key for r in work.manifest.takes] == [B]
        assert work.manifest.sections[0].fields == {"prompt": "x"}
        saved(work, 0, A, 9)
        assert sorted(p.name for p in (tmp_path / "film/takes").iterdir()) == [
            "000-a1a1a1a1.safetensors", "000-b2b2b2b2.safetensors"]  # fmt: skip
        adopted(work, 1, C)
        assert read_manifest(tmp_path / "film").run == (0,)
    assert read_manifest(tmp_path / "film").run == (0, 1), "written when closed"


def test_fault_09_sections_found_again_under_changed_settings_make_the_run(tmp_path):
    with opened(tmp_path) as work:
        for index, key in enumerate((A, B)):
            saved(work, index, key, index)
    with opened(tmp_path, fields={**FIELDS, "prompt": "a dog"}) as work:
        assert "prompt: was 'a cat', now 'a dog'" in work.notes[0] and work.manifest.run == ()
        before = (tmp_path / "film/sections/000.safetensors").stat().st_mtime_ns
        assert work.find(A).equal(samples(0))
        adopted(work, 0, A)
        assert work.find(C) is None
        assert read_manifest(tmp_path / "film").run == (0,), "written before anything slow begins"
        saved(work, 1, C, 5)
        assert work.manifest.run == (0, 1) and work.find(B).equal(samples(1))
        assert (tmp_path / "film/sections/000.safetensors").stat().st_mtime_ns == before
    assert read_manifest(tmp_path / "film").fields["prompt"] == "a dog"


def test_a_section_of_another_project_is_copied_not_moved(tmp_path):
    with opened(tmp_path, "first") as work:
        saved(work, 0, A, 3, measures={"luma": 0.25})
    with opened(tmp_path, "second") as work:
        assert work.find(A).equal(samples(3))
        record = adopted(work, 2, A)
        assert (record.index, record.start) == (2, 18)
        assert record.measures == {}, "measured among other neighbours"
        assert "project 'first'" in work.notes[-1]
    shutil.rmtree(tmp_path / "first")
    with opened(tmp_path, "second") as work:
        assert work.load(2).equal(samples(3))


def test_an_unreadable_other_project_is_passed_over_with_a_note(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    with opened(tmp_path) as work:
        assert work.find(A) is None and "'broken' was not searched" in work.notes[0]
        work.find(B)
        assert len(work.notes) == 1
    assert list_projects(tmp_path) == ["broken", "film"] and list_projects(tmp_path / "none") == []


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "gone", "folder"])
def test_fault_03_a_torn_section_is_noticed_and_only_that_one_is_unfinished(tmp_path, harm):
    with opened(tmp_path) as work:
        for index, key in enumerate((A, B)):
            saved(work, index, key, index)
    path = tmp_path / "film/sections/000.safetensors"
    data = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "gone":
        path.write_bytes({"cut": data[:-1], "flip": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[harm])
    with opened(tmp_path) as work:
        assert work.find(A) is None and "'film' is damaged and counts as unfinished" in work.notes[-1]
        assert work.find(B).equal(samples(1))
        with pytest.raises(JournalError, match="only this section is made again"):
            work.load(0)
        with pytest.raises(JournalError, match="has to be made again"):
            adopted(work, 0, A)
        if harm != "folder":
            saved(work, 0, A)
            assert work.load(0).equal(samples()) and not work.manifest.takes


def test_methods_of_what_is_not_there(tmp_path):
    with opened(tmp_path) as work:
        saved(work, 1, A)
        with pytest.raises(JournalError, match="Section 1 .* is not finished. Finished: 2"):
            work.load(0)
        with pytest.raises(JournalError, match="Section 1 .*nothing to annotate"):
            work.annotate({0: {"x": 1}})
    work.close()
    with pytest.raises(JournalError, match="is closed"):
        saved(work, 0, A)


def test_an_artist_s_number_is_the_place_in_time(tmp_path):
    plan = {"sections": [[19, 28], [10, 19], [1, 10]]}  # F0 makes the end first
    with opened(tmp_path, plan=plan, sections=3) as work:
        assert [work.manifest.number(index) for index in range(4)] == [3, 2, 1, 4]
        saved(work, 0, A)
        with pytest.raises(JournalError, match="Section 1 .* is not finished. Finished: 3"):
            work.load(2)
        (tmp_path / "film/sections/000.safetensors").write_bytes(b"")
        assert work.find(A) is None and work.notes[-1].startswith("Section 3 of 'film' is damaged")


def test_measures_are_those_of_the_neighbours_that_are_there(tmp_path):
    """What was measured against a section that is replaced is forgotten; what lies before it in time is not."""
    with opened(tmp_path) as work:
        for index, key in enumerate((A, B, C)):
            saved(work, index, key, index)
        work.annotate({0: {"seam": 1.0}, 1: {"seam": 2.0}, 2: {"seam": 9.0}})
        work.annotate({2: {"luma": 4.0}})
        assert [work.manifest.sections[i].measures for i in range(3)] == [{"seam": 1.0}, {"seam": 2.0}, {"luma": 4.0}]
        before = (tmp_path / "film/manifest.json").stat().st_mtime_ns
        work.annotate({2: {"luma": 4.0}})
        assert (tmp_path / "film/manifest.json").stat().st_mtime_ns == before, "nothing new, nothing written"
        saved(work, 1, "d4" * 32, 8)
        assert [work.manifest.sections[i].measures for i in range(3)] == [{"seam": 1.0}, {}, {}]
        work.annotate({1: {"luma": 5.0}})
        assert adopted(work, 1, B).measures == {} and adopted(work, 0, A).measures == {"seam": 1.0}


def test_segments_of_other_lengths_are_forgotten_and_a_torn_run_s_edge_is_removed(tmp_path):
    folder = tmp_path / "film/segments"
    old, new, edge = "0000000-0000037.mp4", "0000000-0000073.mp4", "0000073-0000080.mp4"
    with opened(tmp_path) as work:
        for name in (old, new):
            (folder / name).write_bytes(b"v")
            work.set_segment(name, {"frames": 1})
        (folder / edge).write_bytes(b"not final")
        (folder / "mine.mp4").write_bytes(b"of the artist")
    with opened(tmp_path) as work:
        assert sorted(p.name for p in folder.iterdir()) == [old, new, "mine.mp4"]
        work.keep_segments([new])
        assert sorted(p.name for p in folder.iterdir()) == [new, "mine.mp4"]
    assert set(read_manifest(tmp_path / "film").segments) == {new}


def test_a_change_turns_its_own_record_into_json_and_none_of_the_others(tmp_path, monkeypatch):
    """Of a manifest that is written with each section, so that the hundredth costs what the second does."""
    said: list = []
    real = manifest._json
    with opened(tmp_path) as work:
        for index in range(5):
            saved(work, index, f"{index:064d}")
            work.set_segment(f"{index:03d}.mp4", {"bytes": index})
        monkeypatch.setattr(manifest, "_json", lambda value: said.append(value) or real(value))
        saved(work, 5, A)
        assert [value["key"] for value in said if isinstance(value, dict) and "key" in value] == [A]
        work.set_segment("005.mp4", {"bytes": 5})
        work.annotate({2: {"luma": 1.0}})
        assert [value for value in said if isinstance(value, dict) and "bytes" in value] == [{"bytes": 5}]
        assert [v["measures"] for v in said if isinstance(v, dict) and "key" in v] == [{}, {"luma": 1.0}]


def test_a_long_section_keeps_the_lock_alive(tmp_path, monkeypatch):
    lock = tmp_path / "film/lock.json"
    with opened(tmp_path) as work:
        saved(work, 0, A)
        os.utime(lock, (1, 1))
        work.alive()
        assert lock.stat().st_mtime == 1, "not at every step"
        monkeypatch.setattr(project, "HEARTBEAT", 0.0)
        work.alive()
        assert lock.stat().st_mtime > 1
        owner = json.loads(lock.read_text())
        lock.write_text(json.dumps({**owner, "host": "elsewhere", "token": "x"}))
        with pytest.raises(ProjectLocked, match="elsewhere"):
            work.alive()


def test_numbers_notes_and_segments_are_kept(tmp_path):
    with opened(tmp_path) as work:
        saved(work, 0, A, notes=["made twice"])
        work.annotate({0: {"luma": 1, "seam": float("inf")}})
        work.set_segment("000.mp4", {"frames": 33})
        work.set_segment("001.mp4", {"frames": 36})
        work.set_segment("000.mp4", None)
    found = read_manifest(tmp_path / "film")
    assert found.sections[0].measures == {"luma": 1.0, "seam": float("inf")} and found.sections[0].notes == (
        "made twice",
    )
    assert found.segments == {"001.mp4": {"frames": 36}}


@pytest.mark.parametrize("if_changed", ["reuse what fits", "refuse"])
def test_fault_10_another_shape_is_refused_field_by_field(tmp_path, if_changed):
    with opened(tmp_path) as work:
        saved(work, 0, A)
    before = (tmp_path / "film/manifest.json").read_bytes()
    with pytest.raises(ProjectConflict) as refused:
        opened(tmp_path, shape={**SHAPE, "latent": "16x9x9", "fps": "30"}, if_changed=if_changed)
    text = str(refused.value)
    assert "latent: was '16x8x8', now '16x9x9'" in text and "fps: was not given, now '30'" in text
    assert "'fork'" in text and "1 finished sections are kept" in text and "'reuse" not in text
    assert (tmp_path / "film/manifest.json").read_bytes() == before and not (tmp_path / "film/lock.json").exists()


def test_fault_10_refuse_names_every_changed_setting(tmp_path):
    with opened(tmp_path) as work:
        saved(work, 0, A)
    changed = {"model": "F1 cd34", "prompt": "a cat", "seed": "2", "lora": "film 1.0"}
    with pytest.raises(ProjectConflict) as refused:
        opened(tmp_path, fields=changed, if_changed="refuse")
    lines = str(refused.value).splitlines()
    assert lines[1:4] == ["  lora: was not given, now 'film 1.0'", "  model: was 'F1 ab12', now 'F1 cd34'",
                          "  seed: was '1', now '2'"]  # fmt: skip
    assert "'reuse what fits'" in lines[-1]
    opened(tmp_path, if_changed="refuse").close()


def test_fault_10_a_fork_is_made_beside_it_and_continued_when_it_matches(tmp_path):
    with opened(tmp_path) as work:
        saved(work, 0, A)
    other, third = {**FIELDS, "seed": "2"}, {**FIELDS, "seed": "3"}
    with opened(tmp_path, fields=other, if_changed="fork") as work:
        assert work.name == "film-2" and work.manifest.parent == "film" and "fork 'film-2'" in work.notes[0]
        assert work.find(A).equal(samples()), "what fits is found in the parent"
        adopted(work, 0, A)
        saved(work, 1, B)
    with opened(tmp_path, fields=third, shape={**SHAPE, "fps": "24"}, if_changed="fork") as work:
        assert work.name == "film-3"
        saved(work, 0, C)
    for fields, name in ((FIELDS, "film"), (other, "film-2")):
        with opened(tmp_path, fields=fields, if_changed="fork") as work:
            assert work.name == name
    assert read_manifest(tmp_path / "film").fields == FIELDS and list_projects(tmp_path) == ["film", "film-2", "film-3"]


def test_fault_10_a_fork_never_takes_a_project_that_only_has_its_name(tmp_path):
    with opened(tmp_path) as work:
        saved(work, 0, A)
    other = {**FIELDS, "seed": "2"}
    with opened(tmp_path, "film-2", fields=other) as work:
        saved(work, 0, B)
    (tmp_path / "film-3").mkdir()
    (tmp_path / "film-3/manifest.json").write_text("{")
    with opened(tmp_path, fields=other, if_changed="fork") as work:
        assert work.name == "film-4"


def test_a_run_that_was_stopped_before_its_first_section_binds_nobody(tmp_path):
    opened(tmp_path).close()
    with opened(tmp_path, shape={**SHAPE, "fps": "24"}, if_changed="refuse") as work:
        assert work.manifest.shape["fps"] == "24"


def test_fault_10_a_wrong_choice_and_a_damaged_manifest(tmp_path):
    with pytest.raises(JournalError, match="expected one of 'reuse what fits', 'fork', 'refuse'"):
        opened(tmp_path, if_changed="maybe")
    with opened(tmp_path) as work:
        saved(work, 0, A)
    manifest = tmp_path / "film/manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(UnreadableManifest, match="format 2.*Update"):
        opened(tmp_path)
    manifest.unlink()
    with pytest.raises(UnreadableManifest, match="sections but no manifest.json"):
        opened(tmp_path)
    assert (tmp_path / "film/sections/000.safetensors").exists() and not (tmp_path / "film/lock.json").exists()


def test_fault_11_two_queue_items_one_project(tmp_path):
    with opened(tmp_path) as work:
        with pytest.raises(ProjectLocked, match="another name for 'project'"):
            opened(tmp_path)
        saved(work, 0, A)
    opened(tmp_path).close()


def test_fault_11_a_project_taken_over_meanwhile_is_not_written(tmp_path):
    with opened(tmp_path) as work:
        saved(work, 0, A)
        owner = json.loads((tmp_path / "film/lock.json").read_text())
        (tmp_path / "film/lock.json").write_text(json.dumps({**owner, "host": "elsewhere", "token": "x"}))
        before = (tmp_path / "film/manifest.json").read_bytes()
        with pytest.raises(ProjectLocked, match="elsewhere"):
            saved(work, 1, B)
        assert (tmp_path / "film/manifest.json").read_bytes() == before


def test_fault_06_room_for_all_that_is_missing_is_asked_for_first(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DiskFull, match="'film' \\(4 sections\\) needs .*Nothing was started"):
        opened(tmp_path, section_bytes=free // 2)
    assert not (tmp_path / "film").exists()
    with opened(tmp_path) as work:
        for index in range(3):
            saved(work, index, A[:-1] + str(index))
    with opened(tmp_path, section_bytes=free // 2) as work:
        assert work.status().startswith("3 of 4")
    with pytest.raises(DiskFull, match="\\(4 sections\\)"):
        opened(tmp_path, section_bytes=free // 2, fields={**FIELDS, "seed": "2"})


@pytest.mark.skipif(os.name == "nt", reason="an open lock file keeps the folder there")
def test_fault_07_a_folder_that_vanishes_stops_the_run_and_is_not_made_anew(tmp_path):
    drive = tmp_path / "drive"
    with opened(drive) as work:
        saved(work, 0, A)
        drive.rename(tmp_path / "unplugged")
        with pytest.raises(JournalError, match="drive is gone.*queue the same graph again"):
            saved(work, 1, B)
        assert work.manifest.sections.keys() == {0} and not drive.exists()
        (tmp_path / "unplugged").rename(drive)
        saved(work, 1, B)
    with opened(drive) as work:
        assert work.status().startswith("2 of 4")


def test_fault_07_a_place_that_cannot_be_written_is_named_before_sampling(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JournalError, match="file.*could not be written"):
        opened(tmp_path / "file")
    if Path("/proc/self").exists():
        with pytest.raises(JournalError, match="could not be written"):
            opened(Path("/proc/self/films"))


def test_fault_07_a_project_that_became_read_only_stops_before_sampling(unprivileged):
    with opened(unprivileged) as work:
        saved(work, 0, A)
    for folder in (unprivileged / "film", unprivileged):
        folder.chmod(0o555)
        with pytest.raises(JournalError, match="read-only"):
            opened(unprivileged, "film" if folder.name == "film" else "new")
    for folder in (unprivileged, unprivileged / "film"):
        folder.chmod(0o755)
    with opened(unprivileged) as work:
        assert work.find(A).equal(samples())


@pytest.mark.parametrize("name", ["画像 é 🎬", "Künstler's Ordner &co", "CON", "a\\b/c", "x" * 300])
def test_fault_47_projects_of_any_name(tmp_path, name):
    with opened(tmp_path / "Ordner für 画像", name) as work:
        saved(work, 0, A)
        saved(work, 0, B)
    with opened(tmp_path / "Ordner für 画像", name) as work:
        assert work.find(A) is not None and list_projects(work.folder.parent) == [work.name]
        assert files.safe_name(name) == work.name


def test_fault_47_a_section_file_another_program_has_open(tmp_path, monkeypatch):
    """Windows refuses to move it; the move is tried again until the program lets go."""
    refusals, real = iter(range(3)), os.replace

    def replace(source, target):
        if next(refusals, None) is not None:
            raise PermissionError(13, "used by another process")
        return real(source, target)

    with opened(tmp_path) as work:
        saved(work, 0, A)
        monkeypatch.setattr(files, "PATIENCE", 5.0)
        monkeypatch.setattr(files.os, "replace", replace)
        saved(work, 0, B, 1)
        assert work.load(0).equal(samples(1)) and work.find(A).equal(samples(0))


def test_importing_the_journal_brings_in_no_comfy():
    repo = Path(__file__).resolve().parents[2]
    code = "import sys, frame_memory.journal; print([m for m in sys.modules if m.split('.')[0] == 'comfy'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_fault_47_a_name_that_is_no_folder_name_is_told(tmp_path):
    with opened(tmp_path, "a/b") as work:
        assert work.name == "a_b" and any("'a/b' cannot name a folder" in note for note in work.notes)


def test_what_is_there_is_told_before_a_run(tmp_path):
    with opened(tmp_path) as work:
        assert work.holdings().startswith("Nothing is finished yet in")
        saved(work, 0, A)
    with opened(tmp_path, fields={"seed": "another"}) as work:
        assert work.holdings().startswith("1 finished sections are in") and work.status().startswith("0 of")
