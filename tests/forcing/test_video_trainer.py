"""The trainer of videos: one step a video, faults T1, T3, T5 and T6, several processes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch

from frame_memory.forcing.clips import ForcingError
from frame_memory.forcing.training_state import TrainingFolder, state_of
from frame_memory.forcing.video_trainer import MUON, TrainingStopped, VideoSettings
from frame_memory.forcing.workers import join
from frame_memory.model import tensor_file

from . import line_fit
from .line_fit import FAST, TWO, Line


def folder(path, said=None, identity=None, keep=3) -> TrainingFolder:
    return TrainingFolder(path, identity or {"stage": "line"}, (said if said is not None else []).append, keep)


def test_one_optimiser_step_a_video_of_the_mean_over_its_clips():
    """By hand: AdamW's first step on the mean gradient, its norm cut to 1, at the first warm-up rate."""
    line, twin = Line(), Line()
    calls = []
    for optimiser, _ in line.trainer.optimisers:
        optimiser.register_step_post_hook(lambda *_: calls.append(1))
    generator = torch.Generator().manual_seed(FAST.seed)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    torch.stack([loss for loss, _ in twin.losses(torch.Generator().manual_seed(seed))]).mean().backward()
    norm = torch.cat([twin.weight.grad.flatten(), twin.bias.grad]).norm()
    step = line.trainer.step(line.losses)
    assert calls == [1] and line.asked == 3
    assert step.norm == pytest.approx(float(norm), rel=1e-5) and norm > 1
    rate = FAST.rate / 3
    for ours, p in ((line.weight, twin.weight), (line.bias, twin.bias)):
        g = p.grad / norm
        expected = p.detach() * (1 - rate * FAST.weight_decay) - rate * g / (g.abs() + 1e-8)
        assert torch.allclose(ours, expected, atol=1e-6)


def test_the_default_is_the_papers_optimiser():
    (optimiser, rate), *more = Line(VideoSettings()).trainer.optimisers
    assert type(optimiser) is torch.optim.AdamW and rate == 1e-5 and not more
    assert [type(o).__name__ for o, _ in Line(VideoSettings(optimiser=MUON)).trainer.optimisers] == ["Muon", "AdamW"]


def test_averaged_weights_are_an_option():
    assert not Line(VideoSettings(average=0)).trainer.average
    line = Line(FAST)
    average, weights = line.weight.detach().clone(), []
    for done in range(5):
        line.run(done + 1)
        keep = min(0.9, (done + 1) / (done + 11))
        average = average * keep + line.weight.detach() * (1 - keep)
        weights.append(line.weight.detach().clone())
    assert torch.allclose(line.trainer.weights()["blocks.weight"], average, atol=1e-6)


@pytest.mark.parametrize("optimiser", ["AdamW", MUON])
def test_fault_t1_interrupt_and_resume_equal_uninterrupted(tmp_path, optimiser):
    """Stopped in the middle of a video, and again later: the same losses and weights, bit for bit."""
    settings = VideoSettings(rate=0.01, warmup=3, average=0.9, optimiser=optimiser, videos=2)
    whole = Line(settings).run(9)

    class Cancelled(Exception):
        pass

    parts = Line(settings)
    for stop in (4, 7):
        parts = Line(settings)
        folder(tmp_path).resume(parts.trainer)
        parts.run(stop)

        def broken(generator, parts=parts):
            for place, loss in enumerate(parts.losses(generator)):
                if place == 2:
                    raise Cancelled
                yield loss

        with pytest.raises(Cancelled):
            parts.trainer.step(broken)
        assert all(p.grad is None for p in parts.trainer.parameters.values())
        assert folder(tmp_path).save(parts.trainer)
    resumed = Line(settings)
    assert folder(tmp_path).resume(resumed.trainer).name == "step-00000007.safetensors"
    resumed.run(9)
    assert resumed.trainer.losses == whole.trainer.losses
    assert torch.equal(resumed.numbers(), whole.numbers())


def test_fault_t3_a_loss_that_is_no_number_is_skipped_and_the_rate_backs_off():
    line = Line(broken=range(3, 5)).run(3)
    before = line.numbers().clone()
    skipped = [line.trainer.step(line.losses) for _ in range(2)]
    assert all(s.skipped and math.isnan(s.loss) for s in skipped) and line.trainer.factor == 0.25
    assert torch.equal(line.numbers(), before) and line.asked == 9 + 2, "no further clip of a broken video is computed"
    assert not line.trainer.step(line.losses).skipped
    assert not torch.equal(line.numbers(), before) and 0.25 < line.trainer.factor < 0.27
    assert line.run(80).trainer.factor == 1


def test_fault_t3_it_stops_after_so_many_in_a_row_with_its_checkpoint_kept(tmp_path):
    line = Line(VideoSettings(rate=0.01, bad_limit=4), broken=range(2, 99)).run(2)
    before = line.numbers().clone()
    with pytest.raises(TrainingStopped, match=r"4 steps in a row.*those of step 2.*Lower the learning rate"):
        line.run(99)
    assert torch.equal(line.numbers(), before) and line.trainer.done == 6
    assert folder(tmp_path).save(line.trainer)
    again = Line(VideoSettings(rate=0.01, bad_limit=4))
    folder(tmp_path).resume(again.trainer)
    again.run(8)
    assert again.trainer.factor < 0.1 and all(map(math.isfinite, again.trainer.losses[6:]))


def test_fault_t3_a_gradient_that_is_no_number_counts_as_well():
    line = Line()

    def losses(generator):
        yield (line.weight - line.weight.detach()).square().sum().sqrt(), 1.0  # 0, with a gradient of 0 / 0

    before = line.numbers().clone()
    assert line.trainer.step(losses).skipped and torch.equal(line.numbers(), before)


def test_fault_t5_a_checkpoint_without_the_optimisers_state_goes_on_and_says_so(tmp_path):
    line = Line().run(5)
    tensors, metadata = state_of(line.trainer)
    bare = {k: v for k, v in tensors.items() if not k.startswith("optimiser.")}
    tensor_file.write(str(tmp_path / "step-00000005.safetensors"), bare, {**metadata, "identity": '{"stage": "line"}'})
    said: list[str] = []
    again = Line()
    folder(tmp_path, said).resume(again.trainer)
    assert again.trainer.done == 5 and torch.equal(again.numbers(), line.numbers())
    assert len(said) == 1 and "holds no state of the optimiser" in said[0] and "step 5" in said[0]
    again.run(6)


@pytest.mark.parametrize("lost", ["parameter.bias", "generator"])
def test_fault_t5_a_checkpoint_without_weights_is_refused_and_changes_nothing(tmp_path, lost):
    line = Line().run(5)
    tensors, metadata = state_of(line.trainer)
    tensors.pop(lost)
    path = tmp_path / "step-00000005.safetensors"
    tensor_file.write(str(path), tensors, {**metadata, "identity": '{"stage": "line"}'})
    again = Line()
    before = again.numbers().clone()
    with pytest.raises(ForcingError, match="does not fit this run"):
        folder(tmp_path).resume(again.trainer)
    assert torch.equal(again.numbers(), before) and again.trainer.done == 0


def test_fault_t6_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    line, said = Line().run(2), []
    store = folder(tmp_path, said)
    assert store.save(line.trainer)
    before = (tmp_path / "step-00000002.safetensors").read_bytes()
    line.run(4)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not store.save(line.trainer)
    assert "step 4 could not be written" in said[0] and "step-00000002.safetensors, is kept" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002.safetensors"]
    assert (tmp_path / "step-00000002.safetensors").read_bytes() == before
    assert store.save(line.run(5).trainer)


def test_fault_t6_the_last_few_are_kept_and_a_torn_one_is_passed_over(tmp_path):
    line, said = Line(), []
    store = folder(tmp_path, said)
    for step in range(1, 6):
        store.save(line.run(step).trainer)
    (tmp_path / "step-notes.safetensors").write_bytes(b"mine")
    assert [p.name for p in store.states()] == [f"step-0000000{i}.safetensors" for i in (3, 4, 5)]
    torn = tmp_path / "step-00000005.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    again = Line()
    assert store.resume(again.trainer).name == "step-00000004.safetensors" and again.trainer.done == 4
    assert "step-00000005.safetensors cannot be read and is passed over" in said[0]
    for path in store.states():
        path.write_bytes(b"")
    with pytest.raises(ForcingError, match="None of the 3 checkpoints"):
        store.resume(Line().trainer)


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    folder(tmp_path, identity={"stage": "line", "seed": 0}).save(Line().run(2).trainer)
    with pytest.raises(ForcingError, match=r"seed: 0, now 1.*Choose another name"):
        folder(tmp_path, identity={"stage": "line", "seed": 1}).resume(Line().trainer)
    assert folder(tmp_path / "new").resume(Line().trainer) is None


def test_two_processes_with_a_video_each_equal_one_with_both():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {**os.environ, **meet, "OMP_NUM_THREADS": "1"}
    made = [
        subprocess.Popen(
            [sys.executable, line_fit.__file__], env={**env, "RANK": str(i), "LOCAL_RANK": str(i)}, text=True,
            stdout=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    first, _ = (process.communicate(timeout=300)[0] for process in made)
    losses, numbers, agreed = json.loads(first)
    assert agreed == [True, False], "whether both go on from the same step"
    alone = Line(TWO).run(4)
    assert losses == pytest.approx(alone.trainer.losses, rel=1e-6)
    assert numbers == pytest.approx(alone.numbers().tolist(), rel=1e-5, abs=1e-7)


def test_a_launcher_that_says_half_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        join("cpu")
