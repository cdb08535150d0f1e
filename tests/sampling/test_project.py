"""Sections kept in a project: what is found again, what is made anew, and that the result is the same bit for bit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import weakref
from pathlib import Path

import comfy.model_management
import comfy.samplers
import pytest
import torch

from frame_memory.journal import JournalError, ProjectLock, ProjectLocked, read_manifest
from frame_memory.journal.files import verify
from frame_memory.journal.fingerprint import fingerprint
from frame_memory.model import checkpoint
from frame_memory.plan import parse_timeline
from frame_memory.sampling import identity
from frame_memory.sampling.changes import SectionChange
from frame_memory.sampling.device import DeviceLost, device_lost
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.prompts import EncodedTimeline
from frame_memory.sampling.unipc import sample_framepack_unipc

from .conftest import conditioning, guider_for, of_kind, run, start_latent

SECONDS = 4.8  # four sections
ORDERS = [("F1", "F1 forward"), ("F0", "F0 inverted")]


class Plain(comfy.samplers.KSAMPLER):
    """FramePack UniPC that counts sections and fails at one of them if told so.

    What it counts with is the class's: an instance's attributes are part of a sampler's identity.
    """

    def __init__(self, log: list, fail_at: int | None = None, error: BaseException | None = None):
        super().__init__(sample_framepack_unipc)
        type(self).log, type(self).fail_at, type(self).error = log, fail_at, error

    def sample(self, *args, **kwargs):
        self.log.append(1)
        if type(self).fail_at == len(self.log):
            raise type(self).error
        return super().sample(*args, **kwargs)


def project(tmp_path, name: str = "p", if_changed: str = "reuse what fits") -> ProjectRequest:
    return ProjectRequest(tmp_path / "frame_memory", name, if_changed)


def made_with(model, tmp_path, *, fail_at=None, error=None, kind="F1", preset="F1 forward", **more):
    """One run into the project; returns the result (None where it failed as told) and how many sections it sampled."""
    log: list = []
    sampler = Plain(log, fail_at, error)
    more.setdefault("project", project(tmp_path))
    failure = pytest.raises(type(error)) if error is not None else contextlib.nullcontext()
    done = None
    with failure:
        done = run(model, kind=kind, preset=preset, seconds=more.pop("seconds", SECONDS), sampler=sampler, **more)
    return done, len(log)


def plain(model, kind="F1", preset="F1 forward", **more):
    return run(model, kind=kind, preset=preset, seconds=more.pop("seconds", SECONDS), sampler=Plain([]), **more)[0][
        "samples"
    ]


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a project, by name."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
@pytest.mark.parametrize("fail_at", [1, 3, 4])
def test_a_run_that_fails_goes_on_where_it_was_and_ends_bit_identical(model, tmp_path, kind, preset, fail_at):
    expected = plain(model, kind, preset)
    more = {"kind": kind, "preset": preset}
    done, count = made_with(model, tmp_path, fail_at=fail_at, error=RuntimeError("the machine broke"), **more)
    assert done is None and count == fail_at
    done, count = made_with(model, tmp_path, **more)
    assert count == 4 - (fail_at - 1)
    assert torch.equal(done.latent["samples"], expected)
    again, count = made_with(model, tmp_path, **more)
    assert count == 0 and torch.equal(again.latent["samples"], expected)
    assert "4 of 4 sections were finished before" in again.report


def test_fault_08_resume_needs_no_node_cache_and_no_loaded_model(tiny_file, tmp_path):
    first, _ = made_with(checkpoint.load_framepack(str(tiny_file)), tmp_path)
    again, count = made_with(checkpoint.load_framepack(str(tiny_file)), tmp_path)
    assert count == 0 and torch.equal(first.latent["samples"], again.latent["samples"])


def test_a_moved_comfyui_finds_its_sections(monkeypatch):
    """ComfyUI names a pack's modules by the folder it lies in."""
    named = []
    for root in ("/one/custom_nodes/frame-memory", "C:\\two\\custom_nodes\\frames_x_1"):
        monkeypatch.setattr(identity, "__name__", f"{root}.frame_memory.sampling.identity")
        monkeypatch.setattr(sample_framepack_unipc, "__module__", f"{root}.frame_memory.sampling.unipc")
        ours = identity.outline(sample_framepack_unipc)
        monkeypatch.setattr(sample_framepack_unipc, "__module__", f"{root}/../other.sampler")
        named.append((ours, identity.outline(sample_framepack_unipc)))
    assert named[0] == named[1]
    assert "frame_memory.sampling.unipc.sample_framepack_unipc" in named[0][0][0]
    assert named[0][1][0].startswith("other.sampler.")


def test_a_prompt_is_hashed_once_and_anew_when_it_changed():
    digests, tensor = identity.Digests(), torch.randn(3, 500)
    first = digests(tensor)
    assert digests(tensor) == first == fingerprint(tensor) and len(digests._known) == 1
    tensor[:, ::2] += 1
    assert digests(tensor) == fingerprint(tensor) != first
    digests._known[id(tensor)] = (weakref.ref(torch.zeros(1)), *digests._known[id(tensor)][1:])
    assert digests(tensor) == fingerprint(tensor), "another tensor had that id before"


def encoded(text: str) -> EncodedTimeline:
    timeline = parse_timeline(text, 0)
    return EncodedTimeline(timeline, tuple(conditioning({"a": 1, "b": 9}[e.text]) for e in timeline.entries))


@pytest.mark.parametrize(
    ("kind", "preset", "words", "fresh", "same"),
    [
        ("F1", "F1 forward", "0-3.6: a\n3.6-: b", 1, slice(0, 28)),
        ("F1", "F1 forward", "0-1.2: a\n1.2-: b", 3, slice(0, 10)),
        # F0 makes the end first: a change at the beginning leaves what lies behind it in time.
        ("F0", "F0 inverted", "0-1.2: b\n1.2-: a", 1, slice(10, 37)),
        ("F0", "F0 inverted", "0-3.6: a\n3.6-: b", 4, slice(0, 1)),
    ],
)
def test_fault_09_a_changed_prompt_keeps_what_does_not_depend_on_it(model, tmp_path, kind, preset, words, fresh, same):
    more = {"kind": kind, "preset": preset}
    before, _ = made_with(model, tmp_path, timeline=encoded("a"), **more)
    after, count = made_with(model, tmp_path, timeline=encoded(words), **more)
    assert count == fresh
    assert torch.equal(after.latent["samples"], plain(model, kind, preset, timeline=encoded(words)))
    assert torch.equal(after.latent["samples"][:, :, same], before.latent["samples"][:, :, same])
    assert "timeline" in after.report
    # The first video is not lost: its sections are takes now.
    back, count = made_with(model, tmp_path, timeline=encoded("a"), **more)
    assert count == 0 and torch.equal(back.latent["samples"], before.latent["samples"])


def test_a_longer_video_goes_on_from_the_shorter_one(model, tmp_path):
    made_with(model, tmp_path, seconds=2.4)
    done, count = made_with(model, tmp_path, seconds=4.8)
    assert count == 2 and torch.equal(done.latent["samples"], plain(model))


@pytest.mark.parametrize("change", ["seed", "model", "cfg", "steps", "start", "schedule"])
def test_fault_10_what_decides_a_section_is_noticed(model, tmp_path, change):
    made_with(model, tmp_path, seconds=1.2)
    more: dict = {"seed": {"seed": 8}, "steps": {"steps": 4}, "start": {"start": start_latent(seed=5)}}.get(change, {})
    if change == "schedule":
        more = {"preset": "f1k1_td_f8k4f2k2f1k1_g9"}
    if change == "cfg":
        more = {"guider": guider_for(of_kind(model, "F1"), conditioning(), conditioning(3), cfg=2.0)}
    if change == "model":
        other = of_kind(model, "F1")
        key = "diffusion_model.final_layer.linear.weight"
        weight = other.model.diffusion_model.final_layer.linear.weight
        other.add_patches({key: ("diff", (torch.full_like(weight, 1e-3),))}, 1.0)
        more = {"guider": guider_for(other)}
    done, count = made_with(model, tmp_path, seconds=1.2, **more)
    assert count == 1
    assert torch.equal(done.latent["samples"], plain(model, seconds=1.2, **more))


def test_fault_10_another_size_is_refused_field_by_field_or_forked(model, tmp_path):
    made_with(model, tmp_path, seconds=1.2)
    other = {"start": start_latent(height=8), "seconds": 1.2}
    with pytest.raises(JournalError, match="size.*80x48.*80x64") as refused:
        made_with(model, tmp_path, **other)
    assert "fork" in str(refused.value)
    done, count = made_with(model, tmp_path, project=project(tmp_path, if_changed="fork"), **other)
    assert count == 1 and done.project == "p-2"
    with pytest.raises(JournalError, match="seed"):
        made_with(model, tmp_path, seconds=1.2, seed=9, project=project(tmp_path, if_changed="refuse"))


@pytest.mark.parametrize(("kind", "preset"), ORDERS)
def test_a_picked_section_gets_its_own_seed_and_the_old_take_comes_back(model, tmp_path, kind, preset):
    more = {"kind": kind, "preset": preset}
    before, _ = made_with(model, tmp_path, **more)
    picked = (SectionChange(3, seed=99),)
    after, count = made_with(model, tmp_path, changes=picked, **more)
    # Section 3 of 4 in time: F1 makes the fourth anew as well, F0 the first two.
    assert count == (2 if kind == "F1" else 3)
    kept = slice(0, 19) if kind == "F1" else slice(28, 37)
    assert torch.equal(before.latent["samples"][:, :, kept], after.latent["samples"][:, :, kept])
    assert not torch.allclose(before.latent["samples"][:, :, 19:28], after.latent["samples"][:, :, 19:28])
    back, count = made_with(model, tmp_path, **more)
    assert count == 0 and torch.equal(back.latent["samples"], before.latent["samples"])


def test_a_picked_section_can_have_its_own_prompt_and_bad_picks_are_refused(model, tmp_path):
    before, _ = made_with(model, tmp_path)
    after, count = made_with(model, tmp_path, changes=(SectionChange(4, positive=conditioning(9)),))
    assert count == 1 and torch.equal(before.latent["samples"][:, :, :28], after.latent["samples"][:, :, :28])
    assert not torch.equal(before.latent["samples"][:, :, 28:], after.latent["samples"][:, :, 28:])
    for bad in ((SectionChange(5, 1),), (SectionChange(0, 1),), (SectionChange(2, 1), SectionChange(2, 2))):
        with pytest.raises(ValueError, match="Pick Section"):
            made_with(model, tmp_path, changes=bad)


def test_fault_05_cancel_keeps_every_finished_section(model, tmp_path):
    stop = comfy.model_management.InterruptProcessingException()
    done, count = made_with(model, tmp_path, fail_at=3, error=stop)
    assert done is None and count == 3
    done, count = made_with(model, tmp_path)
    assert count == 2 and torch.equal(done.latent["samples"], plain(model))


def test_fault_01_out_of_memory_in_a_section_keeps_the_others_and_says_what_helps(model, tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    sampler = Plain([], 3, error)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="section 3 of 4") as raised:
        run(model, seconds=SECONDS, sampler=sampler, project=project(tmp_path))
    text = str(raised.value)
    assert "GiB" in text and "size" in text and "fp8" in text and "Frame Context Packer" in text
    assert "2 of 4" in text and "Tried to allocate 2.00 GiB" in text
    done, count = made_with(model, tmp_path)
    assert count == 2 and torch.equal(done.latent["samples"], plain(model))


LOST = (
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "HIP error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
)


@pytest.mark.parametrize("words", LOST)
def test_fault_44_a_lost_gpu_leaves_the_journal_whole_and_says_to_restart(model, tmp_path, words):
    log: list = []
    with pytest.raises(DeviceLost, match="section 3 of 4") as raised:
        run(model, seconds=SECONDS, sampler=Plain(log, 3, RuntimeError(words)), project=project(tmp_path))
    text = str(raised.value)
    assert "restart ComfyUI" in text and "queue the same graph again" in text and words in text
    assert "The 2 sections finished before it are safe" in text
    # Not taken for a lack of memory, which ComfyUI answers by unloading models; not tried again.
    assert not comfy.model_management.is_oom(raised.value) and "memory while" not in text and len(log) == 3
    folder = tmp_path / "frame_memory" / "p"
    manifest = read_manifest(folder)
    assert manifest.run == (0, 1) and all(verify(folder, r.file) is None for r in manifest.finished)
    with pytest.raises(DeviceLost, match="section 4 of 4.*The 0 sections finished"):  # F0 makes the end first
        run(
            model, kind="F0", preset="F0 inverted", seconds=SECONDS, sampler=Plain([], 1, RuntimeError(words)),
            project=project(tmp_path / "f0"),
        )  # fmt: skip
    if words == LOST[0]:
        done, count = made_with(model, tmp_path)
        assert count == 2 and torch.equal(done.latent["samples"], plain(model))


def test_fault_44_only_a_lost_device_is_taken_for_one(model, tmp_path):
    with pytest.raises(RuntimeError, match="^The size of tensor a") as raised:
        run(model, sampler=Plain([], 1, RuntimeError("The size of tensor a (3) must match")), project=project(tmp_path))
    assert not isinstance(raised.value, DeviceLost)
    with pytest.raises(DeviceLost, match="'project'"):
        run(model, sampler=Plain([], 1, RuntimeError(LOST[0])))
    for full in (torch.OutOfMemoryError("CUDA out of memory."), ValueError("CUDA error"), RuntimeError("no such file")):
        assert not device_lost(full)


def hold(folder, told):
    with ProjectLock(folder):
        told.send("held")
        told.recv()


def test_fault_11_a_project_held_by_another_process_is_refused_before_any_model_call(model, tmp_path):
    made_with(model, tmp_path, seconds=1.2)
    folder = tmp_path / "frame_memory" / "p"
    processes = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    heard, told = processes.Pipe()
    owner = processes.Process(target=hold, args=(folder, told), daemon=True)
    owner.start()
    try:
        assert heard.recv() == "held"
        before = contents(folder)
        log: list = []
        with pytest.raises(ProjectLocked, match=f"process {owner.pid} on .*another name for 'project'"):
            run(model, seconds=SECONDS, sampler=Plain(log), project=project(tmp_path))
        assert not log and contents(folder) == before
        heard.send("done")
        owner.join()
    finally:
        owner.kill()
    done, count = made_with(model, tmp_path)
    assert count == 3 and torch.equal(done.latent["samples"], plain(model))


def test_without_a_name_a_project_is_named_after_its_start(model, tmp_path):
    request = ProjectRequest(tmp_path)
    first, _ = made_with(model, tmp_path, seconds=1.2, project=request)
    again, count = made_with(model, tmp_path, seconds=1.2, seed=8, project=request)
    assert first.project == again.project and count == 1
    other, _ = made_with(model, tmp_path, seconds=1.2, start=start_latent(seed=5), project=request)
    assert other.project != first.project


def test_the_latent_is_mapped_from_disk_and_outlives_the_next_run(model, tmp_path):
    first, _ = made_with(model, tmp_path, seconds=2.4)
    expected = first.latent["samples"].clone()
    with torch.inference_mode():
        first.latent["samples"].mul_(2)  # changes a private copy of its pages, never the file
    again, _ = made_with(model, tmp_path, seconds=2.4)
    assert torch.equal(again.latent["samples"], expected)
    made_with(model, tmp_path, seconds=2.4, seed=8)
    assert torch.equal(again.latent["samples"], expected)
    files = list((tmp_path / "frame_memory" / "p").glob("latent-*.safetensors"))
    assert len(files) == 1
