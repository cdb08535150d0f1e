"""A whole training run on a MODEL of the host: what it writes, that it resumes, that the MODEL is left as it was."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import parity_models
from frame_memory.forcing.clips import ForcingError, StoredVideo, stored_videos
from frame_memory.forcing.flow import Conditioning
from frame_memory.forcing.prepared import read_videos, write_videos
from frame_memory.forcing.results import write_result
from frame_memory.forcing.training_run import (
    STAGE_HEAD,
    STAGE_LORA,
    STAGE_MEMORY,
    Faces,
    Request,
    TrainingRun,
    without_head_patches,
)  # fmt: skip
from frame_memory.forcing.training_state import TrainingFolder
from frame_memory.forcing.video_trainer import VideoSettings
from frame_memory.model import checkpoint, head, lora, memory_file
from frame_memory.model.base_signature import Base
from frame_memory.model.framepack import MODEL_OPTION
from frame_memory.model.memory import MemoryMismatch, encoder_from_tensors, new_encoder
from frame_memory.model.provenance import loras_of, present
from frame_memory.sampling.identity import patches_of

FAST = VideoSettings(rate=1e-3, warmup=1, average=0.5)
SHAPES = {"height": 4, "width": 6}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "FramePack_F1_tiny.safetensors"
    sd = parity_models.make_reference(seed=0, heads=1, double=1, single=1, text_features=64).state_dict()
    save_file({k: v.contiguous() for k, v in sd.items()}, str(path))
    return path


def load(tiny_file, kind: str = "F1"):
    model = checkpoint.load_framepack(str(tiny_file))
    model.model_options = {**model.model_options, MODEL_OPTION: {"kind": kind, "base": "HunyuanVideo"}}
    return model


def videos(count: int = 2, clips: int = 2, channels: int = 16) -> list[StoredVideo]:
    g = torch.Generator().manual_seed(3)

    def one(i: int) -> StoredVideo:
        cond = Conditioning(torch.randn(1, 5, 64, generator=g), torch.randn(1, 768, generator=g),
                            torch.randn(1, 4, 1152, generator=g))  # fmt: skip
        samples = torch.randn(1, channels, 1 + 9 * clips, 4, 6, generator=g)
        return StoredVideo(samples, cond, f"video {i}")

    return [one(i) for i in range(count)]


def request(stage: str, steps: int = 2, **more) -> Request:
    return Request(stage, steps, clips=more.pop("clips", 2), save_every=1, rank=2, settings=FAST, **more)


class Cancelled(BaseException):
    pass


def weights_of(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}


def test_stage_two_writes_a_head_that_loads_and_leaves_the_model_as_it_was(tiny_file, tmp_path):
    model = load(tiny_file)
    before, said, moments = weights_of(model), [], []
    run = TrainingRun(model, None, videos(), request(STAGE_HEAD), tmp_path / "run", Faces(said.append, moments.append))
    with torch.inference_mode():  # as core runs a node
        outcome = run.run()
    assert [m.step for m in moments] == [1, 2] and [m.clips for m in moments] == [1, 2]
    assert moments[0].estimate.shape == (1, 16, 9, 4, 6) and all(m == m for m in outcome.losses)
    after = weights_of(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    result = write_result(run, outcome, "tiny", tmp_path / "models", tmp_path / "loras", said.append)
    assert result.checkpoint == tmp_path / "models" / "tiny.safetensors" and result.memory is None
    file = memory_file.read(str(result.checkpoint))
    assert file.kind == memory_file.DIRECT_FORCING and not file.pack
    assert file.recipe["stage"] == STAGE_HEAD and file.recipe["steps"] == 2
    file.check_base(Base.of(model), "x")
    for name in memory_file.HEAD:
        assert torch.equal(file.head[name], outcome.weights["model." + name])
        assert not torch.equal(file.head[name], before[name].float()), name
    assert not (tmp_path / "loras").exists() and not said and not loras_of(file.recipe)


def test_stage_one_trains_a_memory_and_a_lora_that_core_loads(tiny_file, tmp_path):
    import comfy.sd

    model = load(tiny_file)
    run = TrainingRun(model, None, videos(), request(STAGE_LORA), tmp_path / "run", Faces(lambda _: None))
    with torch.inference_mode():
        outcome = run.run()
        result = write_result(run, outcome, "both", tmp_path / "models", tmp_path / "loras", lambda _: None)
    file = memory_file.read(str(result.checkpoint))
    assert file.kind == memory_file.SEMANTIC_PACK and not file.head and result.memory.trained
    assert [named.name for named in loras_of(file.recipe)] == ["both.safetensors"]
    fresh = new_encoder(model).pack.state_dict()
    changed = [n for n, v in result.memory.pack.state_dict().items() if not torch.equal(v, fresh[n])]
    assert "gate" in changed and result.memory.fingerprint != run.memory.fingerprint
    # A fresh gate is closed, and nothing behind it would learn: training opens its own copy.
    assert float(run.memory.pack.gate) == 0 and float(result.memory.pack.gate) == pytest.approx(0.5, abs=0.01)
    assert {"embed.weight", "squeeze.attention.value.weight", "text_in.weight"} <= set(changed)
    patched, _ = comfy.sd.load_lora_for_models(model, None, checkpoint.tensor_file.read(str(result.lora)), 1.0, 0.0)
    blocks = [k for k in patched.patches if "_blocks." in k]
    layers = {k.rsplit(".", 1)[0] for k in outcome.trained.parameters if k.startswith("lora.")}
    assert len(blocks) == len(layers) > 0
    ours = lora.apply_lora(model, checkpoint.tensor_file.read(str(result.lora)))[0]
    assert present(result.memory.loras, ours) == present(result.memory.loras, patched) == result.memory.loras
    assert not present(result.memory.loras, model)
    for on, count in ((model, 1), (patched, 0)):
        said: list[str] = []
        TrainingRun(on, result.memory, videos(), request(STAGE_HEAD), tmp_path / "head", Faces(said.append))
        assert ["both.safetensors was trained together" in text for text in said] == [True] * count


def losses_of(tiny_file, folder: Path, stage: str, steps: int, interrupt=lambda: None) -> list[float]:
    faces = Faces(lambda _: None, interrupt=interrupt)
    return TrainingRun(load(tiny_file), None, videos(), request(stage, steps), folder, faces).run().losses


@pytest.mark.parametrize("stage", [STAGE_HEAD, STAGE_MEMORY])
def test_fault_t1_a_run_cancelled_in_the_middle_of_a_video_goes_on_bit_for_bit(tiny_file, tmp_path, stage):
    whole = losses_of(tiny_file, tmp_path / "whole", stage, 4)
    calls = iter(range(99))

    def cancel():
        if next(calls) == 5:  # in the third or fourth step, between two clips or before the first
            raise Cancelled

    with pytest.raises(Cancelled):
        losses_of(tiny_file, tmp_path / "parts", stage, 4, cancel)
    said: list[str] = []
    run = TrainingRun(load(tiny_file), None, videos(), request(stage, 4), tmp_path / "parts", Faces(said.append))
    outcome = run.run()
    assert 0 < outcome.resumed < 4 and f"Going on from step {outcome.resumed} of 4" in said[0]
    assert outcome.losses == whole
    last = "step-00000004.safetensors"
    ours, theirs = (checkpoint.tensor_file.read(str(tmp_path / n / last)) for n in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_cancel_says_how_to_go_on(tiny_file, tmp_path):
    said: list[str] = []
    calls = iter(range(99))

    def cancel():
        if next(calls) == 2:
            raise Cancelled

    run = TrainingRun(
        load(tiny_file), None, videos(), request(STAGE_HEAD, 9), tmp_path / "run", Faces(said.append, interrupt=cancel)
    )
    with pytest.raises(Cancelled):
        run.run()
    assert "Stopped after step 2 of 9" in said[-1] and "same name to go on" in said[-1]


def stop_at(number: int, error: BaseException):
    """An `interrupt` that raises at its call of that number, from 0 on."""
    calls = iter(range(99))

    def interrupt():
        if next(calls) == number:
            raise error

    return interrupt


def run_of(tiny_file, folder: Path, steps: int, said: list[str], interrupt=lambda: None, **more) -> TrainingRun:
    faces = Faces(said.append, interrupt=interrupt)
    return TrainingRun(
        load(tiny_file), None, videos(clips=1), request(STAGE_HEAD, steps, clips=1, **more), folder, faces
    )


@pytest.mark.parametrize(("at", "kept"), [(0, False), (2, True)], ids=["first step", "later"])
def test_a_full_gpu_is_told_as_such_to_the_artist_and_to_the_host(tiny_file, tmp_path, at, kept):
    """ComfyUI frees its models where the error is of the type it knows; no checkpoint is named that is not there."""
    error = torch.cuda.OutOfMemoryError("tried to allocate")
    with pytest.raises(torch.cuda.OutOfMemoryError, match=f"full in step {at + 1} .*Cheaper are") as raised:
        run_of(tiny_file, tmp_path, 4, [], stop_at(at, error)).run()
    assert ("The checkpoint of step 2 is kept" in str(raised.value)) == kept
    assert (tmp_path / "step-00000002.safetensors").exists() == kept and ("checkpoint" in str(raised.value)) == kept


def test_fault_t6_a_torn_checkpoint_is_written_anew_at_its_step(tiny_file, tmp_path):
    run_of(tiny_file, tmp_path, 3, []).run()
    torn = tmp_path / "step-00000003.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    said: list[str] = []
    assert run_of(tiny_file, tmp_path, 3, said).run().resumed == 2
    assert "step-00000003.safetensors cannot be read" in said[0]
    assert "parameter.model.final_layer.linear.weight" in checkpoint.tensor_file.read(str(torn))


def test_fault_t3_a_run_that_learned_nothing_leaves_no_result(tiny_file, tmp_path):
    run = run_of(tiny_file, tmp_path, 20, [])
    for video in run.videos:
        video.samples[:] = float("nan")
    with pytest.raises(ForcingError, match=r"Nothing was learned\. The loss was not a finite number 10 steps"):
        run.run()


def test_the_rate_that_is_told_after_a_loss_that_was_no_number_is_the_halved_one(tiny_file, tmp_path):
    told: list[float] = []
    run = run_of(tiny_file, tmp_path, 3, [])
    whole = [video.samples.clone() for video in run.videos]

    def watch(moment):
        told.append(moment.rate)
        for video, samples in zip(run.videos, whole, strict=True):
            video.samples.copy_(samples)

    run.faces = Faces(lambda _: None, watch)
    for video in run.videos:
        video.samples[:] = float("nan")
    losses = run.run().losses
    assert losses[0] != losses[0] and losses[1] == losses[1]
    assert told == pytest.approx([FAST.rate, FAST.rate / 2, FAST.rate / 2 * 2 ** (1 / 20)])


def test_a_memory_that_does_not_learn_is_read_in_the_numbers_that_sampling_reads_it_in(tiny_file, tmp_path):
    model = load(tiny_file)
    given = new_encoder(model)
    given.pack.gate.data.fill_(0.25)
    half = encoder_from_tensors({k: v.bfloat16() for k, v in given.pack.state_dict().items()}, given.spec, label="x")
    for stage, dtype in ((STAGE_HEAD, torch.bfloat16), (STAGE_MEMORY, torch.float32)):
        trained = TrainingRun(model, half, videos(), request(stage), tmp_path / "run")._trained()
        assert trained.pack.dtype == dtype == trained.pack.gate.dtype
        for name, value in trained.pack.state_dict().items():
            assert torch.equal(value, half.pack.state_dict()[name].to(dtype)), name


def test_a_head_behind_an_untrained_memory_is_trained_without_it_and_says_so(tiny_file, tmp_path):
    model, said = load(tiny_file), []
    run = TrainingRun(model, new_encoder(model), videos(), request(STAGE_HEAD), tmp_path / "run", Faces(said.append))
    assert len(said) == 1 and said[0].startswith("Warning: ") and "(new) is closed" in said[0]
    assert "trained without a memory, and the result holds none" in said[0]
    outcome = run.run()
    result = write_result(run, outcome, "x", tmp_path / "m", tmp_path / "l", said.append)
    assert result.memory is None and not memory_file.read(str(result.checkpoint)).pack
    alone = TrainingRun(model, None, videos(), request(STAGE_HEAD), tmp_path / "alone", Faces(said.append))
    assert len(said) == 1 and alone.identity() == run.identity() and alone.run().losses == outcome.losses


def test_a_memory_that_was_trained_on_since_is_told_in_words(tiny_file, tmp_path):
    """Nobody can set a fingerprint back: the message says what changed, and what to do."""
    model, memory = load(tiny_file), new_encoder(load(tiny_file))
    memory.pack.gate.data.fill_(0.25)

    def run(memory, steps=1, stage=STAGE_HEAD, **more):
        return TrainingRun(model, memory, videos(), request(stage, steps, **more), tmp_path / "run", Faces(lambda _: 0))

    run(memory).run()
    began = memory.fingerprint
    memory.pack.gate.data.fill_(0.5)
    with pytest.raises(ForcingError) as error:
        run(memory, 2).run()
    words = str(error.value)
    assert "since then the memory was trained on, or another one was connected" in words
    assert f"({began}, now {memory.fingerprint})" in words and "('name' in 'Train Direct Forcing')" in words
    assert "begin anew with this memory; or connect the memory that it began with" in words
    with pytest.raises(ForcingError, match="begun with a memory, and now none is connected"):
        run(None).run()
    with pytest.raises(ForcingError, match=rf"trains stage '{re.escape(STAGE_HEAD)}', and stage '1: memory' is asked"):
        run(memory, stage=STAGE_MEMORY).run()


def test_steps_below_those_done_train_nothing_and_say_so(tiny_file, tmp_path):
    run_of(tiny_file, tmp_path, 3, []).run()
    said: list[str] = []
    outcome = run_of(tiny_file, tmp_path, 2, said).run()
    assert len(outcome.losses) == outcome.resumed == 3
    assert said[-1].startswith("3 steps are done already") and "2 are asked for: nothing is trained" in said[-1]
    assert said[-1].endswith("the result is that of 3.")


def test_a_patched_head_is_where_training_begins(tiny_file, tmp_path):
    """The result replaces the head whole, so what a Direct Forcing checkpoint put on must be in it, once."""
    model = load(tiny_file)
    key = "final_layer.linear.weight"
    base = weights_of(model)[key].float()
    patched = model.clone()
    patched.add_patches({"diffusion_model." + key: ("diff", (torch.full_like(base, 0.5),))}, 0.5)
    said: list[str] = []
    run = TrainingRun(patched, None, videos(), request(STAGE_HEAD, 1), tmp_path / "run", Faces(said.append))
    assert len(said) == 1 and "do not put it on once more beside 'Load Direct Forcing Checkpoint'" in said[0]
    run._load()
    trained = run._trained()
    assert torch.allclose(trained.masters[key], base + 0.25, atol=1e-6)
    outcome = run.run()
    result = write_result(run, outcome, "again", tmp_path / "m", tmp_path / "l", lambda _: None)
    file = memory_file.read(str(result.checkpoint))
    made, _ = head.apply_head(model, file, 1.0)
    assert made is not model and run.base.difference(Base.of(model)) == ""
    assert float((file.head[key] - base - 0.25).abs().max()) < 0.01
    assert file.recipe["losses"]["shift"] == 1.0, "what was used, where none was chosen"
    again, patch = head.apply_head(without_head_patches(made), file, 1.0)
    assert not patch.before and again.patches.keys() == made.patches.keys(), "a head that was taken off is not told of"
    assert head.apply_head(made, file, 1.0)[1].before


def test_results_of_other_runs_are_kept(tiny_file, tmp_path):
    said: list[str] = []

    def made(seed: int) -> Path:
        settings = VideoSettings(rate=1e-3, seed=seed)
        run = TrainingRun(load(tiny_file), None, videos(), Request(STAGE_HEAD, 1, 1, settings=settings),
                          tmp_path / f"run{seed}", Faces(said.append))  # fmt: skip
        return write_result(run, run.run(), "same", tmp_path, tmp_path, said.append).checkpoint

    assert made(0).name == "same.safetensors" and made(0).name == "same.safetensors" and len(said) == 1
    assert made(1).name == "same_2.safetensors" and "is of another run and is kept" in said[-1]


def test_a_run_is_not_gone_on_with_behind_another_lora(tiny_file, tmp_path):
    run_of(tiny_file, tmp_path, 1, []).run()
    model = load(tiny_file)
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    assert patches_of(model) == ""
    names = []
    for strength in (0.5, 0.5, 0.7):
        patched = model.clone()
        patched.add_patches({key: ("diff", (torch.ones(model.model.state_dict()[key].shape),))}, strength)
        names.append(patches_of(patched))
    assert names[0] == names[1] != names[2]
    with pytest.raises(ForcingError, match=r"LoRA and patches: None, now '1 patched tensors.*Choose another name"):
        TrainingRun(model, None, videos(), request(STAGE_HEAD, 2), tmp_path, patches=names[0]).run()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"kind": "F0"}, MemoryMismatch, "F0"),
        ({"clips": 1}, ForcingError, "a memory learns from 2 clips on"),
        ({"clips": 0}, ForcingError, "video 0 has 1 latent frames; expected at least 10"),
        ({"channels": 4}, ForcingError, "video 0 has 4 latent channels, and the MODEL works on 16"),
    ],
    ids=["F0", "one clip", "short", "another VAE"],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(tiny_file, tmp_path, change, error, said):
    kind, change = change.get("kind", "F1"), {k: v for k, v in change.items() if k != "kind"}
    with pytest.raises(error, match=said):
        TrainingRun(load(tiny_file, kind), None, videos(**change), request(STAGE_MEMORY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loader", ["Load FramePack Model", "stock"])
def test_fault_22_latents_of_another_vae_of_the_same_shape_are_refused(tiny_file, tmp_path, loader):
    model, cond = load(tiny_file), [[torch.randn(1, 5, 64), {"pooled_output": torch.randn(1, 768)}]]
    if loader == "stock":
        model.model_options = {k: v for k, v in model.model_options.items() if k != MODEL_OPTION}

    def run(**mark):
        latent = {"samples": torch.randn(1, 16, 19, 4, 6), **({"frame_memory": mark} if mark else {})}
        return TrainingRun(model, None, stored_videos([latent], [cond]), request(STAGE_HEAD), tmp_path)

    with pytest.raises(ForcingError, match=r"1 of 1 \(a.mp4\) was .* Wan 2.1 VAE .*'Load VAE'.* to the Hunyuan.* VAE"):
        run(base="Wan21", fps=30.0, source="a.mp4")
    with pytest.raises(ForcingError, match="was encoded with the Wan 2.1 VAE"):  # the rate is the VAE's, and no cure
        run(base="Wan21", fps=16.0)
    with pytest.raises(ForcingError, match=r"\(a.mp4\) has 16 frames a second, and the MODEL makes 30.*Set 'fps'"):
        run(base="HunyuanVideo", fps=16.0, source="a.mp4")
    assert run(base="HunyuanVideo").videos[0].family == "HunyuanVideo" and not run().videos[0].family


def test_videos_for_the_command_line_come_back_as_they_were(tmp_path):
    g = torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(1, 16, 1 + 9 * k, 4, 6, generator=g)} for k in (1, 3, 2)]
    positive = [[[torch.randn(1, 5, 64), {"pooled_output": torch.randn(1, 768)}]] for _ in latents]
    given, said = stored_videos(latents, positive), []
    write_videos(tmp_path, given, "HunyuanVideo")
    back, family = read_videos(tmp_path, said.append)
    assert family == "HunyuanVideo" and [v.clips for v in back] == [1, 3, 2] and not said
    for ours, theirs in zip(back, given, strict=True):
        assert torch.equal(ours.samples, theirs.samples) and torch.equal(ours.cond.text, theirs.cond.text)
        assert ours.cond.vision is None and ours.name == theirs.name
    write_videos(tmp_path, given[:2], "HunyuanVideo")
    (tmp_path / "video-00001.safetensors").write_bytes(b"torn")
    back, _ = read_videos(tmp_path, said.append)
    assert [v.clips for v in back] == [3] and "video-00001.safetensors is left out" in said[0]
    with pytest.raises(ForcingError, match="no training videos"):
        read_videos(tmp_path / "none", said.append)


def test_the_command_line_trains_from_the_same_files(tiny_file, tmp_path, capsys, monkeypatch):
    """In this process, which has ComfyUI on the CPU already."""
    from frame_memory.forcing.__main__ import main

    monkeypatch.setattr(sys, "argv", ["frame_memory.forcing"])
    write_videos(tmp_path / "videos", videos(), "HunyuanVideo")
    arguments = ["--model", str(tiny_file), "--videos", str(tmp_path / "videos"), "--output", str(tmp_path / "out")]
    arguments += ["--name", "cli", "--steps", "2", "--clips", "2", "--cpu", "--rate", "1e-3", "--stage", "memory"]
    assert main(arguments) == 0
    assert "step 2/2" in capsys.readouterr().out
    made = tmp_path / "out" / "cli.safetensors"
    assert memory_file.read(str(made)).kind == memory_file.SEMANTIC_PACK
    assert main([*arguments, "--memory", str(tmp_path / "none.safetensors"), "--name", "x"]) == 1
    said = capsys.readouterr().err
    assert "There is no file at" in said and "'--memory'" in said and "Load " not in said
    model = load(tiny_file)
    head_only = str(tmp_path / "head.safetensors")
    memory_file.write(head_only, Base.of(model), head={n: weights_of(model)[n] for n in memory_file.HEAD})
    assert main([*arguments, "--memory", head_only, "--name", "y"]) == 1
    said = capsys.readouterr().err
    assert "head.safetensors holds a Direct Forcing head and no memory" in said and "'--memory'" in said


def test_fault_t1_ctrl_c_twice_keeps_the_whole_step_to_go_on_from(tiny_file, tmp_path, capsys, monkeypatch):
    """Launchers send it once more while the checkpoint is written; and it may come in the middle of an update."""
    from frame_memory.forcing import __main__ as command

    def then_again(real):
        return lambda self, *arguments: (signal.raise_signal(signal.SIGINT), real(self, *arguments))[1]

    def in_step(optimiser, *arguments, **more):
        made = real_step(optimiser, *arguments, **more)
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return made

    steps: list[int] = []
    real_step, before = torch.optim.AdamW.step, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["frame_memory.forcing"])
    write_videos(tmp_path / "videos", videos(), "HunyuanVideo")
    arguments = ["--model", str(tiny_file), "--videos", str(tmp_path / "videos"), "--output", str(tmp_path / "out")]
    arguments += ["--clips", "2", "--cpu", "--rate", "1e-3", "--warmup", "1", "--steps", "5", "--name"]
    assert command.main([*arguments, "whole"]) == 0
    with monkeypatch.context() as pressed:
        pressed.setattr(torch.optim.AdamW, "step", in_step)
        pressed.setattr(TrainingFolder, "save", then_again(TrainingFolder.save))
        assert command.main([*arguments, "stopped"]) == 130
    assert "Stopped after step 3 of 5" in capsys.readouterr().out and signal.getsignal(signal.SIGINT) is before
    assert command.main([*arguments, "stopped"]) == 0
    assert "Going on from step 3 of 5" in capsys.readouterr().out
    whole, stopped = (memory_file.read(str(tmp_path / "out" / f"{n}.safetensors")).head for n in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in memory_file.HEAD)
