"""Wan 2.2's two experts in one guider: against a plain loop, in projects, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frame_memory.model.experts import check_pair
from frame_memory.model.framepack import FRAME_TOKENS
from frame_memory.model.memory import MemoryMismatch
from frame_memory.model.preserved_memory import attach_preserved, new_memory, with_tokens
from frame_memory.plan import PlanError
from frame_memory.sampling import experts as experts_module
from frame_memory.sampling.experts import WanExpertGuider, steps_above
from frame_memory.sampling.guards import made_safe
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.unipc import framepack_unipc

from .conftest import guider_for
from .test_wan_run import A14B, TI2V, plainly
from .wan_runs import SIGMAS, attached, euler, made, prompt, reference

CFGS, BOUNDARY = (2.0, 3.0), 0.9


def guider_of(high, low, cfgs=CFGS, boundary=BOUNDARY):
    guider = WanExpertGuider(high, low, *cfgs, boundary)
    guider.set_conds(prompt(3), prompt(4))
    return guider


@pytest.fixture(scope="module")
def experts():
    return attached(A14B, seed=0), attached(A14B, seed=1)


def test_two_experts_in_each_section_equal_a_plain_loop(experts):
    latent, _ = made(experts[0], A14B, guider=guider_of(*experts))
    with torch.no_grad():
        expected = plainly(experts, A14B, 2, CFGS, BOUNDARY)
    assert torch.allclose(latent["samples"].double(), expected, atol=2e-3, rtol=2e-3)
    alone, _ = made(experts[0], A14B)
    assert not torch.allclose(latent["samples"][:, :, 1:], alone["samples"][:, :, 1:], atol=1e-2)


@pytest.mark.parametrize(("boundary", "which"), [(0.0, 0), (1.5, 1)])
def test_a_boundary_beyond_all_steps_is_one_expert_bit_for_bit(experts, boundary, which):
    latent, _ = made(experts[0], A14B, guider=guider_of(*experts, boundary=boundary))
    alone = guider_for(experts[which], prompt(3), prompt(4), cfg=CFGS[which])
    plain, _ = made(experts[which], A14B, guider=alone)
    assert torch.equal(latent["samples"], plain["samples"])


@pytest.mark.parametrize(("sampler", "bound"), [(euler, 1e-5), (framepack_unipc, 0.02)])
def test_the_same_model_on_both_sides_is_one_guider(experts, sampler, bound):
    """A sampler that remembers begins anew at the boundary, so the two are near; euler remembers nothing."""
    model, sigmas = experts[0], torch.linspace(1, 0, 21)
    alone = guider_for(model, prompt(3), prompt(4), cfg=CFGS[0])
    noise = reference.drawn(1, 16, 2, 4, 6)
    with torch.inference_mode():
        one, two = (
            guider.sample(noise, torch.zeros_like(noise), sampler(), sigmas, disable_pbar=True, seed=0)
            for guider in (alone, guider_of(model, model, cfgs=(CFGS[0], CFGS[0])))
        )
    assert (two - one).norm() <= bound * one.norm()


def test_without_guidance_no_negative_is_needed_and_with_it_its_lack_is_refused(experts):
    bare = experts_module.guider_of(*experts, prompt(3), None, (1.0, 1.0), BOUNDARY)
    latent, _ = made(experts[0], A14B, guider=bare, seconds=0.5)
    given, _ = made(experts[0], A14B, guider=guider_of(*experts, cfgs=(1.0, 1.0)), seconds=0.5)
    assert torch.equal(latent["samples"], given["samples"])
    for cfgs in ((1.0, 3.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match="Wan Expert Guider.*no negative.*cfg_low .*set both to 1"):
            experts_module.guider_of(*experts, prompt(3), None, cfgs, BOUNDARY)


def test_steps_are_counted_as_one_row_and_nothing_given_is_changed(experts):
    guider, seen = guider_of(*experts), []
    before = dict(vars(guider)), dict(vars(guider.low))
    noise = reference.drawn(1, 16, 2, 4, 6)
    bare = guider_of(*(reference.load(A14B, layers=1, seed=s) for s in (0, 1)))
    with torch.inference_mode():
        bare.sample(noise, torch.zeros_like(noise), euler(), torch.tensor(SIGMAS), disable_pbar=True, seed=0,
                    callback=lambda step, x0, x, total: seen.append((step, total)))  # fmt: skip
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert steps_above(torch.tensor([1.0, 0.9, 0.8999, 0.0]), 0.9) == 2
    made(experts[0], A14B, guider=guider, seconds=0.5)
    assert vars(guider) == before[0] and vars(guider.low) == before[1]


def test_a_project_knows_both_experts(experts, tmp_path):
    request = ProjectRequest(tmp_path, "p")
    first = made(experts[0], A14B, guider=guider_of(*experts), project=request)
    again = made(experts[0], A14B, guider=guider_of(*experts), project=request)
    assert "2 of 2 sections were finished before" in again.report
    assert torch.equal(first.latent["samples"], again.latent["samples"])
    for changed in (
        guider_of(experts[0], attached(A14B, seed=2)), guider_of(*experts, cfgs=(2.0, 3.5)),
        guider_of(*experts, boundary=0.5),
    ):  # fmt: skip
        assert "All 2 sections were made now" in made(experts[0], A14B, guider=changed, project=request).report


def test_both_are_made_safe_and_the_given_ones_stay(experts):
    guider = guider_of(*experts)
    safe, _ = made_safe(guider)
    for one in (safe, safe.low):
        assert "optimized_attention_override" in one.model_options["transformer_options"]
    for one in (guider, guider.low):
        assert "optimized_attention_override" not in one.model_options.get("transformer_options", {})


def test_pairs_that_cannot_be_and_experts_without_patchifiers_are_refused(experts):
    bare = reference.load(A14B, layers=1)
    with pytest.raises(PlanError, match="Low noise expert: .*'Wan Frame Context'"):
        made(experts[0], A14B, guider=guider_of(experts[0], bare))
    with pytest.raises(ValueError, match="Wan21 latents and 'low' on Wan22"):
        check_pair(experts[0], reference.load(TI2V, layers=1))
    high, low = (m.clone() for m in experts)
    high.cached_patcher_init = (None, ("wan2.2_i2v_low_noise_14B.safetensors",))
    low.cached_patcher_init = (None, ("wan2.2_i2v_high_noise_14B.safetensors",))
    with pytest.raises(ValueError, match="Swap the two"):
        check_pair(high, low)
    check_pair(low, high)
    check_pair(*experts)
    assert isinstance(guider_of(*experts), comfy.samplers.CFGGuider)


# --- frame preservation ---------------------------------------------------------------------------------------------


def remembered(model, **more):
    memory = new_memory(model, "2x2x2", channels=(4, 6, 8, 8), heads=2)
    return replace(with_tokens(memory, 1000), **more)


def shown(experts, **more):
    """What a run of two sections gives, and how many tokens of the memory each expert was shown at most."""
    seen, models = [], []
    for model in experts:
        calls, watched = [], model.clone()

        def watch(executor, *args, calls=calls, **kwargs):
            tokens = kwargs.get(FRAME_TOKENS)
            calls.append(0 if tokens is None else tokens.shape[1])
            return executor(*args, **kwargs)

        # In front of ours, which takes the tokens out.
        watched.wrappers[WrappersMP.APPLY_MODEL] = {"test": [watch], **watched.wrappers[WrappersMP.APPLY_MODEL]}
        seen.append(calls)
        models.append(watched)
    return made(models[0], A14B, guider=guider_of(*models), **more), [max(calls) for calls in seen]


def test_a_memory_is_shown_to_the_experts_that_bring_it_and_no_other(experts, tmp_path):
    """Section 2 holds 3 frames of 5x6 behind it: one token of 2x2x2 blocks. Each way is a video of its own."""
    memory, project = remembered(experts[0], base=None), ProjectRequest(tmp_path, "p")
    videos = []
    for bring in ((True, True), (True, False), (False, True)):
        models = [attach_preserved(m, memory) if yes else m for m, yes in zip(experts, bring)]
        done, tokens = shown(models, memory=memory, project=project)
        assert [count > 0 for count in tokens] == list(bring)
        assert "All 2 sections were made now" in done.report
        without = [f"The {name} noise expert is not shown the memory" in done.report for name in ("high", "low")]
        assert without == [not yes for yes in bring]
        videos.append(done.latent["samples"][:, :, 3:])
    (plain, _), tokens = shown(experts)
    assert tokens == [0, 0]
    videos.append(plain["samples"][:, :, 3:])
    assert not any(torch.allclose(a, b, atol=1e-4) for i, a in enumerate(videos) for b in videos[:i])


def test_memories_that_no_expert_or_the_wrong_one_brings_are_refused(experts):
    memory, other = (remembered(experts[0]) for _ in range(2))
    brought = attach_preserved(experts[0], memory)
    with pytest.raises(PlanError, match="no expert of the guider brings.*'Wan Expert Guider'"):
        shown(experts, memory=memory)
    with pytest.raises(MemoryMismatch, match="another base"):
        shown((brought, attach_preserved(experts[1], memory)), memory=memory)
    with pytest.raises(PlanError, match="low noise expert brings another encoder"):
        shown((brought, attach_preserved(experts[1], other)), memory=memory)
    (_, report), _ = shown((experts[0], brought))
    assert "'memory' of 'Anti-Drift Sampler' is not connected" in report
