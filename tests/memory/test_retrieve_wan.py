"""One frame asked of a memory on core's Wan: its time, its window, its prompts, and videos that are not the MODEL's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy.patcher_extension import WrappersMP

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from frame_memory.model import families
from frame_memory.model.framepack import FRAME_POSITIONS, FRAME_TOKENS, MODEL_OPTION
from frame_memory.model.memory import MEMORY_PACK, MemoryMismatch, check_model
from frame_memory.model.preserved_memory import attach_preserved, check_preserved, new_memory, with_tokens
from frame_memory.plan import PRESETS, PlanError, plan_sections
from frame_memory.sampling.memory import with_memory
from frame_memory.sampling.preservation import words_of_budget
from frame_memory.sampling.retrieve import retrieve_frame
from frame_memory.sampling.section_loop import Inputs
from frame_memory.video.vae import VAEError

from .small import Pixels
from .test_preserved_run import SMALL, filled

T2V, I2V, A14B, TI2V = reference.FAMILIES


def loaded(family: str, seen: list | None = None, schedule: str = ""):
    """A MODEL that notes the window of each call and the memory that it is shown."""
    seen, memories = [] if seen is None else seen, []

    def remember(executor, *args, **kwargs):
        memories.append((kwargs[FRAME_TOKENS].clone(), kwargs[FRAME_POSITIONS].tolist()))
        return executor(*args, **kwargs)

    def watch(executor, x, *args, **kwargs):
        seen.append((x.shape, *memories.pop()))
        return executor(x, *args, **kwargs)

    model = reference.load(family, layers=1)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", remember)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", watch)
    if schedule:
        model.model_options = {**model.model_options, MODEL_OPTION: {families.SCHEDULE: schedule}}
    return model


def video(frames: int, **mark) -> dict:
    return {"samples": reference.drawn(1, 16, frames, 6, 10, seed=3), **({"frame_memory": mark} if mark else {})}


def ask(model, samples, seconds: float, **more):
    memory = with_tokens(filled(new_memory(model, "2x2x2", **SMALL)), 1000)
    settings = {
        "model": attach_preserved(model, memory), "memory": memory, "positive": [[reference.drawn(1, 4, 24), {}]],
        "latent": samples, "vae": Pixels("Wan21"), "seconds": seconds, "steps": 1, "seed": 1, **more,
    }  # fmt: skip
    with torch.inference_mode():
        return retrieve_frame(**settings)


def test_a_latent_without_a_rate_is_asked_at_the_models_own():
    report = ask(loaded(T2V), video(9), 1.5).report
    assert "Frame at 1.50 s (picture 24, latent frame 6)" in report
    with pytest.raises(PlanError, match=r"the video ends at 2.00 s"):
        ask(loaded(T2V), video(9), 2.05)
    with pytest.raises(PlanError, match="'samples' of Retrieve Frame holds 30 frames a second, and the MODEL makes 16"):
        ask(loaded(T2V), video(9, fps=30.0), 0.5)


@pytest.mark.parametrize(("schedule", "mark", "spans"), [
    ("", {}, [(0, 10), (10, 30)]),
    ("", {"window": 9, "fps": 16.0}, [(0, 4), (4, 12), (12, 22), (22, 30)]),
    ("td_f1k1_g15", {}, [(0, 16), (16, 30)]),
    ("td_f1k1_g15", {"base": "Wan21"}, [(0, 16), (16, 30)]),
])  # fmt: skip
def test_the_video_is_cut_as_the_run_that_made_it_or_as_the_model_was_trained(schedule, mark, spans):
    seen: list = []
    model, samples = loaded(T2V, seen, schedule), video(31, **mark)
    ask(model, samples, 1.0)
    memory = filled(new_memory(model, "2x2x2", **SMALL))
    with torch.no_grad():
        latents = model.model.process_latent_in(samples["samples"])
        expected = torch.cat([memory.history.encoders[0].encode(latents[:, :, a:b]).tokens for a, b in spans], 1)
    assert len(seen) == 1 and torch.allclose(seen[0][1], expected, atol=1e-5)


@pytest.mark.parametrize("family", [I2V, A14B])
def test_frames_that_the_prompt_gives_are_left_out(family):
    """'Wan Image To Video' makes them as long as a window, and one frame is asked for."""
    given = {"concat_latent_image": reference.drawn(1, 16, 21, 6, 10), "concat_mask": torch.zeros(1, 1, 21, 6, 10)}
    text, seen = reference.drawn(1, 4, 24), []
    bare = ask(loaded(family), video(9), 0.5)
    made = ask(loaded(family, seen), video(9), 0.5, positive=[[text, given]])
    assert torch.equal(made.picture, bare.picture) and seen[0][0] == (1, 36, 1, 6, 10)


def test_a_video_of_another_family_is_refused():
    told = "'samples' of Retrieve Frame was made with the {}.*'Load VAE' behind.*to the Wan 2.1 VAE.*or the small VAE"
    with pytest.raises(PlanError, match=told.format("HunyuanVideo VAE")):
        ask(loaded(T2V), video(9, base="HunyuanVideo"), 0.5, vae=Pixels("HunyuanVideo"))
    with pytest.raises(PlanError, match=told.format("small VAE of the self-test FramePack models")):
        ask(loaded(T2V), video(9, base="selftest"), 0.5)
    with pytest.raises(VAEError, match="with the small VAE of the self-test Wan model"):
        ask(loaded(T2V), video(9, base="selftest Wan"), 0.5)
    with pytest.raises(VAEError, match="gave a tiny HunyuanVideo VAE"):
        ask(loaded(T2V), video(9), 0.5, vae=Pixels("HunyuanVideo"))


def test_what_is_farther_than_positions_reach_stays_at_the_farthest_place():
    seen: list = []
    ask(loaded(T2V, seen), video(811), 0.0)
    assert [t for t, _, _ in seen[0][2]] == [min(t, 800) for t in range(1, 810, 2) for _ in range(2)]


def test_messages_name_nodes_and_presets_of_wan():
    model, other = reference.load(T2V, layers=1), reference.load(T2V, layers=1, seed=5)
    with pytest.raises(MemoryMismatch, match="'MemoryPack Encoder' is Wan.* are for FramePack-F1") as said:
        check_model(model, MEMORY_PACK)
    assert "memory for Wan is frame preservation" in str(said.value) and "WAN21" not in str(said.value)
    assert "'Load Memory Encoder' and connect it to 'Frame Preservation Encoder'" in str(said.value)
    assert families.why_no_history(model).startswith("The MODEL behind the guider is Wan and has no patchifiers")
    memory = with_tokens(new_memory(model, "2x2x2", **SMALL), 1000)
    with pytest.raises(MemoryMismatch, match="made for another base.*in 'Load Diffusion Model', or"):
        check_preserved(memory, other, "x")
    plan = plan_sections(PRESETS["F0 inverted"], sections=2)
    packed = PRESETS["Wan, 81 frames"]
    for schedule, named in {"": "'Wan, 3 clean frames'", packed: "'Wan, 81 frames'", "td_f2k1_g9": "td_f"}.items():
        told = f"order inverted.*Expected order forward: {named}.*in 'Frame Context Packer'"
        with pytest.raises(PlanError, match=told) as raised:
            memory = replace(memory, schedule=schedule)
            with_memory(memory, attach_preserved(model, memory), plan, Inputs(torch.zeros(1, 16, 1, 6, 10)))
        assert "FramePack" not in str(raised.value)


@pytest.mark.parametrize(("family", "seconds", "fps"), [(T2V, 45, 16), (TI2V, 152, 24)])
def test_how_far_the_tokens_reach_is_told_for_the_models_own_rate_and_pixels(family, seconds, fps):
    """832x480 is 30x52 patches on Wan 2.1 and 15x26 on 2.2 5B, so 7x13 and 3x6 whole blocks of 4x4 by 2 latent frames:
    91 x 16 / 8 = 182 tokens a second, and 18 x 24 / 8 = 54."""
    model = reference.load(family, layers=1)
    words = words_of_budget(with_tokens(new_memory(model, "4x4x2", **SMALL), 8192), model)
    assert f"about {seconds} s of 832x480 at {fps} fps" in words
