"""Frame preservation trained on a MODEL of the host: what it writes, that it resumes, that the MODEL is left alone."""

from __future__ import annotations

import sys

import comfy.sd
import pytest
import torch

from frame_memory.forcing.clips import ForcingError
from frame_memory.forcing.prepared import write_videos
from frame_memory.forcing.preserving_run import STAGE_FOLLOW, STAGE_QUERY, PreservingRequest, PreservingRun
from frame_memory.forcing.results import write_result
from frame_memory.forcing.training_run import Faces
from frame_memory.model import memory_file, tensor_file
from frame_memory.model.base_signature import Base
from frame_memory.model.memory import MemoryMismatch, new_encoder
from frame_memory.model.preserved_memory import memory_of, new_memory

from .test_train_run import FAST, Cancelled, load, tiny_file, videos, weights_of  # noqa: F401 (a fixture)

SMALL = {"channels": (4, 6, 8, 8), "heads": 2}


def request(stage: str, steps: int = 2, **more) -> PreservingRequest:
    return PreservingRequest(stage, steps, clips=2, save_every=1, rank=2, settings=FAST, rates=("2x2x2",), **more)


def run_of(model, memory, folder, stage, steps=2, faces=None, **more) -> PreservingRun:
    faces = faces or Faces(lambda _: None)
    return PreservingRun(model, memory, videos(), request(stage, steps, **more), folder, faces)


@pytest.mark.parametrize("stage", [STAGE_QUERY, STAGE_FOLLOW])
def test_a_stage_writes_a_memory_and_a_lora_and_leaves_the_model_as_it_was(tiny_file, tmp_path, stage):  # noqa: F811
    model = load(tiny_file)
    given, before, moments = new_memory(model, "2x2x2", **SMALL), weights_of(model), []
    was = {n: v.clone() for n, v in given.history.state_dict().items()}
    run = run_of(model, given, tmp_path / "run", stage, faces=Faces(lambda _: None, moments.append))
    with torch.inference_mode():  # as core runs a node
        outcome = run.run()
        result = write_result(run, outcome, "mine", tmp_path / "models", tmp_path / "loras", lambda _: None)
    assert [m.step for m in moments] == [1, 2] and all(m == m for m in outcome.losses)
    assert all(torch.equal(v, before[k]) for k, v in weights_of(model).items())
    assert all(torch.equal(v, was[n]) for n, v in given.history.state_dict().items())
    held = memory_file.read(str(result.checkpoint))
    assert held.kind == memory_file.FRAME_PRESERVATION and held.recipe["stage"] == stage
    back = memory_of(held, "Load Memory Encoder", model)
    now = back.history.state_dict()
    assert result.memory.fingerprint == back.fingerprint and back.trained
    for name, value in was.items():
        if not name.endswith("key.bias"):  # it moves all scores of a token alike: its gradient is what rounding leaves
            assert torch.equal(now[name], value) == (".embed." in name), name
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensor_file.read(str(result.lora)), 1.0, 0.0)
    assert patched.patches and held.base.difference(run.base) == ""


@pytest.mark.parametrize("stage", [STAGE_QUERY, STAGE_FOLLOW])
def test_a_run_that_is_cancelled_goes_on_bit_for_bit(tiny_file, tmp_path, stage):  # noqa: F811
    def made(folder, interrupt=lambda: None):
        model = load(tiny_file)
        faces = Faces(lambda _: None, interrupt=interrupt)
        return run_of(model, new_memory(model, "2x2x2", **SMALL), tmp_path / folder, stage, 4, faces).run()

    whole, calls = made("whole"), iter(range(99))

    def cancel():
        if next(calls) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        made("parts", cancel)
    resumed = made("parts")
    assert resumed.resumed == 2 and resumed.losses == whole.losses
    last = "step-00000004.safetensors"
    ours, theirs = (tensor_file.read(str(tmp_path / n / last)) for n in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_cross_attention_begins_at_nothing_learns_and_stays_in_the_memory(tiny_file, tmp_path):  # noqa: F811
    model = load(tiny_file)
    given = new_memory(model, "2x2x2", **SMALL)
    run = run_of(model, given, tmp_path / "1", STAGE_QUERY, cross_attention=True)
    assert run.memory.cross is not None and given.cross is None and run.how() == "2x2x2 with cross-attention and LoRA"
    outcome = run.run()
    assert outcome.losses[0] == run_of(model, given, tmp_path / "0", STAGE_QUERY, steps=1).run().losses[0]
    result = write_result(run, outcome, "x", tmp_path / "m", tmp_path / "l", lambda _: None)
    back = memory_of(memory_file.read(str(result.checkpoint)), "Load Memory Encoder", model)
    assert back.cross == run.memory.cross == result.memory.cross and back.fingerprint == result.memory.fingerprint
    assert all(block.out.weight.any() for block in back.history.cross_attention.blocks)
    with pytest.raises(ForcingError, match="'freeze_encoder' is on, so it would learn nothing"):
        run_of(model, given, tmp_path, STAGE_FOLLOW, cross_attention=True, frozen=True)
    frozen = run_of(model, back, tmp_path / "2", STAGE_FOLLOW, steps=1, cross_attention=True, frozen=True)
    assert frozen.memory is back and all(n.startswith("lora.") for n in frozen.run().weights)
    low = new_memory(model, "2x2x2", **SMALL, branches="low")
    with pytest.raises(ForcingError, match="'cross_attention' of 'Train Frame Preservation': Branches 'low' have no"):
        run_of(model, low, tmp_path, STAGE_QUERY, cross_attention=True)


def test_frozen_encoders_learn_nothing_in_stage_two(tiny_file, tmp_path):  # noqa: F811
    model = load(tiny_file)
    given = new_memory(model, "2x2x2", **SMALL)
    outcome = run_of(model, given, tmp_path, STAGE_FOLLOW, frozen=True).run()
    assert outcome.weights and all(name.startswith("lora.") for name in outcome.weights)
    result = write_result(run_of(model, given, tmp_path, STAGE_FOLLOW, frozen=True), outcome, "x", tmp_path / "m",
                          tmp_path / "l", lambda _: None)  # fmt: skip
    assert result.memory.fingerprint == given.fingerprint
    assert request(STAGE_QUERY, frozen=True).parts == ("memory", "LoRA")


@pytest.mark.parametrize(("stage", "more", "held"), [
    (STAGE_QUERY, {"alone": 0.5}, 2), (STAGE_FOLLOW, {"alone": 0.5}, 2), (STAGE_QUERY, {"alone": 0.0}, 0),
    (STAGE_FOLLOW, {"alone": 0.5, "frozen": True}, 0),
])  # fmt: skip
def test_the_lora_waits_until_the_encoders_have_learned_alone(tiny_file, tmp_path, stage, more, held):  # noqa: F811
    """Untouched while it waits, and then it begins as a fresh one: AdamW's first move is the rate."""
    model = load(tiny_file)
    run = run_of(model, new_memory(model, "2x2x2", **SMALL), tmp_path, stage, 3, **more)
    run.run()
    kept = {step: tensor_file.read(str(tmp_path / f"step-{step:08d}.safetensors")) for step in (1, 2, 3)}
    downs = [name for name in kept[1] if name.startswith("parameter.lora.") and name.endswith(".down")]
    assert downs and (held < 2 or all(torch.equal(kept[1][name], kept[2][name]) for name in downs))
    for step, tensors in kept.items():
        far = max(float(tensors[name.removesuffix("down") + "up"].abs().max()) for name in downs)
        assert (far > 0) == (step > held), step
        if step == held + 1:
            assert far <= 1.001 * run.request.settings.rate


def test_a_run_that_is_made_longer_does_not_hold_a_lora_that_has_learned(tiny_file, tmp_path):  # noqa: F811
    model, said = load(tiny_file), []
    run_of(model, new_memory(model, "2x2x2", **SMALL), tmp_path, STAGE_QUERY, 2, alone=0.5).run()
    two, faces = tensor_file.read(str(tmp_path / "step-00000002.safetensors")), Faces(said.append)
    run_of(model, new_memory(model, "2x2x2", **SMALL), tmp_path, STAGE_QUERY, 5, faces, alone=0.9).run()
    three = tensor_file.read(str(tmp_path / "step-00000003.safetensors"))
    ups = [name for name in two if name.startswith("parameter.lora.") and name.endswith(".up")]
    assert any(not torch.equal(two[name], three[name]) for name in ups)
    assert not any("LoRA has not learned" in line for line in said)
    run_of(model, new_memory(model, "2x2x2", **SMALL), tmp_path / "x", STAGE_QUERY, 1, faces, alone=1.0).run()
    assert "Lower 'encoder_first' in 'Train Frame Preservation', or raise 'steps'." in said[-1]


def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(tiny_file, tmp_path):  # noqa: F811
    model = load(tiny_file)
    with pytest.raises(ForcingError, match="goes on with the memory of stage '1: frame query'"):
        run_of(model, None, tmp_path, STAGE_FOLLOW)
    with pytest.raises(MemoryMismatch, match="is new: SemanticPack"):
        run_of(model, new_encoder(model), tmp_path, STAGE_QUERY)
    with pytest.raises(ForcingError, match="video 0 has latents of 4x6, too small for a memory at 4x4x2. Raise 'size'"):
        run_of(model, new_memory(model, "4x4x2", **SMALL), tmp_path, STAGE_QUERY)
    given = new_memory(model, "2x2x2", **SMALL)
    with pytest.raises(ForcingError, match="needs 2, one to remember and one to make"):
        PreservingRun(model, given, videos(clips=1), request(STAGE_FOLLOW), tmp_path)
    assert run_of(model, None, tmp_path, STAGE_QUERY).memory.rates == ("2x2x2",)


def test_stage_two_warns_of_a_memory_that_was_never_trained(tiny_file, tmp_path):  # noqa: F811
    model, said = load(tiny_file), []
    given = new_memory(model, "2x2x2", **SMALL)
    for stage, count in ((STAGE_QUERY, 0), (STAGE_FOLLOW, 1)):
        run_of(model, given, tmp_path, stage, faces=Faces(said.append))
        assert len(said) == count
    assert said[0].startswith("Warning: the memory given (new) was never trained")


def test_what_is_wrong_is_told_with_the_name_of_its_own_node(tiny_file, tmp_path):  # noqa: F811
    model = load(tiny_file)
    given = new_memory(model, "2x2x2", **SMALL)
    run_of(model, given, tmp_path, STAGE_QUERY, steps=1).run()
    with pytest.raises(ForcingError, match="another 'name' in 'Train Frame Preservation'"):
        run_of(model, given, tmp_path, STAGE_FOLLOW).run()
    with pytest.raises(ForcingError, match="'name' in 'Train Frame Preservation'"):
        run_of(model, new_memory(model, "2x2x2", seed=5, **SMALL), tmp_path, STAGE_QUERY).run()


def test_the_command_line_trains_both_stages(tiny_file, tmp_path, capsys, monkeypatch):  # noqa: F811
    """In this process, which has ComfyUI on the CPU already."""
    from frame_memory.forcing.__main__ import main

    monkeypatch.setattr(sys, "argv", ["frame_memory.forcing"])
    write_videos(tmp_path / "videos", videos(), "HunyuanVideo")
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_file), "--videos", str(tmp_path / "videos"), "--output", str(out), "--cpu"]
    arguments += ["--steps", "1", "--clips", "2", "--rank", "2"]
    model, first = load(tiny_file), str(tmp_path / "first.safetensors")
    given = new_memory(model, "2x2x2", **SMALL)
    memory_file.write(first, Base.of(model), frames=given.history.state_dict(), spec=given.to_spec())
    follow = [*arguments, "--stage", "follow", "--memory", first]
    assert main([*arguments, "--stage", "query", "--memory", first, "--name", "asked"]) == 0
    assert main([*follow, "--name", "second", "--freeze-encoder"]) == 0
    assert main([*follow, "--name", "third", "--cross-attention"]) == 0
    assert memory_file.read(str(out / "third.safetensors")).spec["cross_attention"]["single"] == 1
    said = capsys.readouterr().out
    assert "step 1/1" in said and "is of another run" not in said
    assert tensor_file.read(str(out / "loras" / "second.safetensors")), "not beside the memory, which has its name"
    asked, second = (memory_file.read(str(out / f"{name}.safetensors")).frames for name in ("asked", "second"))
    was = given.history.state_dict()
    assert all(torch.equal(second[n], v) for n, v in was.items()) and any(
        not torch.equal(asked[n], was[n]) for n in was
    )
    assert main([*follow, "--name", "x", "--forcing", "teacher"]) == 1
    assert "--forcing: plays no part in the stage follow" in capsys.readouterr().err
