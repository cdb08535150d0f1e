"""Frame preservation trained on Wan: golden losses of a plain loop, runs that resume, files that load, refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from frame_memory.forcing.clips import ForcingError, StoredVideo, TrainingVideo
from frame_memory.forcing.flow import Conditioning, WanConditioning
from frame_memory.forcing.forcings import Forced
from frame_memory.forcing.prepared import write_videos
from frame_memory.forcing.preserving import draw_follow, draw_query, frame_query, next_section
from frame_memory.forcing.preserving_run import STAGE_FOLLOW, STAGE_QUERY, PreservingRequest, PreservingRun
from frame_memory.forcing.results import write_result
from frame_memory.forcing.training_run import Faces
from frame_memory.model import families, memory_file, tensor_file, wan, wan_file
from frame_memory.model.base_signature import Base
from frame_memory.model.framepack import MODEL_OPTION
from frame_memory.model.preserved_memory import check_preserved, memory_of, new_memory
from frame_memory.video.video_clips import Request as ClipRequest

from . import reference_preserving
from .reference_preserving import FOLLOW, QUERY
from .test_stages_wan import patchifiers_of
from .test_train_run import FAST, Cancelled

T2V, I2V, TI2V = "2.1 T2V", "2.1 I2V", "2.2 TI2V 5B"
GOLDEN = json.loads(Path(__file__).with_name("golden_preserving.json").read_text())
CASES = tuple((family, stage) for family in (T2V, I2V, TI2V) for stage in (QUERY, FOLLOW))
SMALL = {"channels": (4, 6, 8, 8), "heads": 2}
SCHEDULE, WINDOW = "td_f3k1_g4", 4
FPS = {TI2V: 24.0}
QUIET = Faces(lambda _: None)


def memory_for(patcher):
    """New encoders, no part of them zero."""
    memory, generator = new_memory(patcher, "2x2x2", **SMALL), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(memory.history.named_parameters()):
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return memory


def case_of(family: str, stage: str):
    """(MODEL, its patchifiers, encoders, two videos at once, what was drawn)."""
    patcher, (channels, out, vision) = reference.load(family, layers=1), reference.FAMILIES[family]
    latents = reference.drawn(2, out, 1 + 3 * WINDOW, 5, 6, seed=5).cumsum(2) * 0.3
    seen = reference.drawn(2, 3, 1280, seed=4) if vision else None
    cond = WanConditioning(reference.drawn(2, 3, 24, seed=6), seen, channels - out)
    video, pack = TrainingVideo(latents, cond, "video", WINDOW), memory_for(patcher).history
    generator = torch.Generator().manual_seed(2)
    draw = draw_query(video, 2, pack.rates, generator) if stage == QUERY else draw_follow(video, 3, generator)
    return patcher, patchifiers_of(patcher), pack, video, draw


@torch.no_grad()
def plain_loss(family: str, stage: str) -> float:
    """What golden_preserving.json holds; `make_golden.write_preserving` writes it."""
    _, patchifiers, pack, video, draw = case_of(family, stage)
    call = reference_preserving.wan_call(family, reference.checkpoint(family, layers=1), patchifiers.state_dict())
    if stage == QUERY:
        return reference_preserving.frame_query(None, pack, video, draw, WINDOW, call)[0]
    return reference_preserving.next_wan_section(pack, video, draw, WINDOW, call)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
@torch.no_grad()
def test_golden_losses(case):
    """Odd rows, a batch, and the channels that an image-to-video model reads beside the noise."""
    patcher, patchifiers, pack, video, draw = case_of(*case)
    forced = Forced(patcher.model.diffusion_model, pack, options=wan.options(patchifiers))
    made = frame_query(forced, video, draw) if case[1] == QUERY else next_section(forced, video, draw, SCHEDULE)
    assert [float(clip.loss) for clip in made] == pytest.approx([GOLDEN["losses"][" ".join(case)]], rel=1e-5)


@pytest.mark.parametrize("case", [(T2V, QUERY), (I2V, FOLLOW)], ids=", ".join)
def test_golden_losses_are_what_the_plain_loop_makes_today(case):
    assert plain_loss(*case) == pytest.approx(GOLDEN["losses"][" ".join(case)], rel=1e-9)


def videos(family: str, clips: int = 3, **change) -> list[StoredVideo]:
    _, out, vision = reference.FAMILIES[family]
    cond = WanConditioning(reference.drawn(1, 3, 24, seed=3), reference.drawn(1, 3, 1280, seed=4) if vision else None)
    said = {"family": "Wan22" if family == TI2V else "Wan21", "fps": FPS.get(family, 16.0)} | change
    samples = [reference.drawn(1, out, 1 + WINDOW * clips + i, 5, 6, seed=20 + i) for i in range(2)]
    return [StoredVideo(s, cond, f"video {i}", **said) for i, s in enumerate(samples)]


def run_of(patcher, folder, stage: str, steps: int = 2, given=None, faces: Faces = QUIET, **more) -> PreservingRun:
    request = PreservingRequest(
        stage, steps, clips=3, save_every=1, rank=2, settings=FAST, schedule=SCHEDULE, drop_text=0.5, **more
    )
    given = given or videos(FAMILIES[patcher.model.diffusion_model.in_dim])
    return PreservingRun(patcher, memory_for(patcher), given, request, folder, faces)


FAMILIES = {16: T2V, 36: I2V, 48: TI2V}


def behind(patcher, schedule: str = ""):
    """The MODEL as 'Wan Frame Context' gives it, with the schedule that its patchifiers were trained on."""
    made = wan.attach(patcher, wan.patcher_of(patchifiers_of(patcher)))
    made.model_options = {**made.model_options, MODEL_OPTION: {families.SCHEDULE: schedule}}
    return made


@pytest.mark.parametrize(("family", "stage"), [(T2V, STAGE_QUERY), (TI2V, STAGE_QUERY), (I2V, STAGE_FOLLOW)])
def test_a_stage_that_was_cancelled_goes_on_bit_for_bit_and_its_files_load(tmp_path, family, stage):
    dtype = torch.bfloat16 if family == TI2V else torch.float32
    patcher = behind(reference.load(family, dtype, layers=1), SCHEDULE if stage == STAGE_QUERY else "")
    before = {n: p.clone() for n, p in patcher.model.diffusion_model.state_dict().items()}
    whole, calls = run_of(patcher, tmp_path / "whole", stage, 3).run(), iter(range(99))

    def cancel():
        if next(calls) == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        run_of(patcher, tmp_path / "parts", stage, 3, faces=Faces(lambda _: None, interrupt=cancel)).run()
    run = run_of(patcher, tmp_path / "parts", stage, 3)
    with torch.inference_mode():  # as core runs a node
        parts = run.run()
        result = write_result(run, parts, "mine", tmp_path / "models", tmp_path / "loras", lambda _: None)
    assert parts.resumed == 1 and parts.losses == whole.losses and len(whole.losses) == 3
    assert parts.weights.keys() == whole.weights.keys() and {n.split(".")[0] for n in parts.weights} == {"lora", "pack"}
    assert all(torch.equal(parts.weights[n], value) for n, value in whole.weights.items())
    assert all(torch.equal(p, before[n]) for n, p in patcher.model.diffusion_model.state_dict().items())
    memory = memory_of(memory_file.read(str(result.checkpoint)), "Load Memory Encoder", patcher)
    check_preserved(memory, patcher, "Frame Preservation Encoder")
    assert memory.trained and memory.fingerprint != run.memory.fingerprint
    seen = SCHEDULE if stage == STAGE_FOLLOW else ""
    assert memory.schedule == result.memory.schedule == seen, "stage 1 shows no frames beside the memory"
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensor_file.read(str(result.lora)), 1.0, 0.0)
    assert len(patched.patches) == len(parts.trained.pairs) > 0


def test_stage_two_is_of_the_patchifiers_and_the_schedule_that_it_began_with(tmp_path):
    patcher = reference.load(T2V, layers=1)
    run_of(behind(patcher), tmp_path, STAGE_FOLLOW, 1).run()
    with pytest.raises(ForcingError, match="other settings .patchifiers: "):
        run_of(wan.attach(patcher, wan.patcher_of(wan.patchifiers_of(patcher))), tmp_path, STAGE_FOLLOW).run()
    run = run_of(behind(patcher), tmp_path, STAGE_FOLLOW)
    other = replace(run.request, schedule="td_f2k1_g4")
    with pytest.raises(ForcingError, match="schedule: 'td_f3k1_g4', now 'td_f2k1_g4'"):
        PreservingRun(behind(patcher), run.memory, videos(T2V), other, tmp_path, QUIET).run()


@pytest.mark.parametrize(("stage", "taught", "learned"), [
    (STAGE_FOLLOW, "", "td_f3k1_g20"),
    (STAGE_FOLLOW, "td_f2k1_g20", "td_f2k1_g20"),
    (STAGE_QUERY, "", "f1k1_td_f16k4f2k2f1k1_g20"),
])  # fmt: skip
def test_where_nothing_is_asked_for_stage_two_shows_new_patchifiers_full_frames_alone(tmp_path, stage, taught, learned):
    """What was never trained at 2x and 4x has nothing to say; what was trained is asked as it was."""
    patcher = behind(reference.load(T2V, layers=1), taught)
    request = PreservingRequest(stage, 1, clips=2, settings=FAST)
    run = PreservingRun(patcher, memory_for(patcher), videos(T2V, clips=10), request, tmp_path, QUIET)
    assert run.schedule.text == learned


def test_what_cannot_be_trained_is_refused_in_words(tmp_path):
    patcher, larger = reference.load(T2V, layers=1), reference.load(TI2V, layers=1)
    with pytest.raises(ForcingError, match="has no patchifiers for them. Put 'Wan Frame Context' between"):
        run_of(patcher, tmp_path, STAGE_FOLLOW)
    with pytest.raises(ForcingError, match="video 0 has 30 frames a second, and the MODEL makes 16.*Clips' to 16"):
        run_of(patcher, tmp_path, STAGE_QUERY, given=videos(T2V, fps=30.0))
    with pytest.raises(ForcingError, match="video 0 has 16 frames a second, and the MODEL makes 24"):
        run_of(larger, tmp_path, STAGE_QUERY, given=videos(TI2V, fps=16.0))
    for vae, section, shortest in (("", 9, "6.8"), ("selftest Wan", 9, "6.8"), ("Wan21", 20, "5")):
        made = ClipRequest.of(64, float(shortest), 60.0, vae, 16.0)
        assert made.window == section and made.shortest * section in (20, 27), "one window of 20 and no more"
        said = f"expected at least 21, .* are 5.06 s. Set 'shortest' in 'Video Clips' to {shortest}: "
        with pytest.raises(ForcingError, match=f"video 0 has 13 latent frames; {said}"):
            run_of(patcher, tmp_path, STAGE_QUERY, given=[replace(videos(T2V)[0], family=vae)])
    packed = replace(videos(T2V)[0], cond=Conditioning(torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ForcingError, match="video 0 was prepared for a FramePack model"):
        run_of(patcher, tmp_path, STAGE_QUERY, given=[packed])
    with pytest.raises(ForcingError, match="run 'Video Clips' again; for the command line also 'Train Frame Preserv"):
        run_of(patcher, tmp_path, STAGE_QUERY, given=[replace(videos(T2V)[0], family="selftest")])
    inverted = PreservingRequest(STAGE_FOLLOW, 1, schedule="f1k1_x_g9_f1k1f2k2f16k4_td")
    with pytest.raises(ForcingError, match="makes later sections first.*'Frame Context Packer'"):
        PreservingRun(behind(patcher), memory_for(patcher), videos(T2V), inverted, tmp_path, QUIET)


def test_the_command_line_trains_wan_to_look_back_and_then_behind_a_memory(tmp_path, capsys, monkeypatch):
    """In this process, which has ComfyUI on the CPU already."""
    from frame_memory.forcing.__main__ import main

    monkeypatch.setattr(sys, "argv", ["frame_memory.forcing"])
    model, out, folder = tmp_path / "wan.safetensors", tmp_path / "out", str(tmp_path / "videos")
    save_file(reference.checkpoint(T2V, layers=1), model, reference.METADATA)
    write_videos(tmp_path / "videos", videos(T2V), "Wan21")
    arguments = ["--model", str(model), "--videos", folder, "--output", str(out), "--cpu", "--steps", "1"]
    arguments += ["--rank", "2", "--save-every", "1"]
    patcher = reference.load(T2V, layers=1)
    given = memory_for(patcher)
    memory = str(tmp_path / "asked.safetensors")
    memory_file.write(memory, Base.of(patcher), frames=given.history.state_dict(), spec=given.to_spec())
    assert main([*arguments, "--stage", "context", "--schedule", SCHEDULE, "--name", "context"]) == 0
    behind_it = [
        "--patchifiers",
        str(out / "context.safetensors"),
        "--lora",
        str(out / "loras" / "context.safetensors"),
    ]
    follow = [*arguments, *behind_it, "--stage", "follow", "--memory", memory, "--name", "followed"]
    assert main(follow) == 0
    recipe = memory_file.read(str(out / "followed.safetensors")).recipe
    assert recipe["schedule"] == SCHEDULE and recipe["identity"]["LoRA and patches"] and recipe["drop_text"] == 0.1
    assert wan_file.read(str(out / "context.safetensors")).recipe["schedule"] == SCHEDULE
    capsys.readouterr()
    assert main([*arguments, "--stage", "follow", "--memory", memory, "--name", "x"]) == 1
    assert "Put 'Wan Frame Context' between" in capsys.readouterr().err
    assert main([*arguments, "--stage", "context", "--drop-text", "0.5", "--memory", memory]) == 1
    assert "--drop-text, --memory: plays no part in the stage context" in capsys.readouterr().err
    for stage, idle in {
        "query": "--encoders 2x2x8 --memory x",
        "follow": "--encoders 2x2x8",
        "context": "--encoders 2x2x8 --clips 4",
        "memory": "--encoders 4x4x2",
        "head": "--rank 4 --no-checkpointing",
    }.items():
        assert main([*arguments[:7], "--stage", stage, *idle.split()]) == 1
        named = ", ".join(word for word in idle.split() if word.startswith("--") and word != "--memory")
        assert f"{named}: plays no part in the stage {stage}" in capsys.readouterr().err
    write_videos(tmp_path / "videos", videos(T2V, fps=30.0), "Wan21")
    assert main([*arguments, "--stage", "context", "--name", "fast"]) == 1
    assert "has 30 frames a second, and the MODEL makes 16" in capsys.readouterr().err
