"""What no step of a section changes is computed once, and the numbers are those of computing it each time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import comfy.clip_vision
import comfy.hooks
import pytest
import torch

from benchmarks import parity_models as pm
from frame_memory.model.framepack import ONCE
from frame_memory.model.once import Once

from .conftest import TEXT, conditioning, guider_for, of_kind, run

GROUPS = ((2, (17, 18)), (1, (0, 19)))
PLACES = [(0, 1, 2), (3, 0, 0), (700, 3, 5)]


def inputs_of(height: int, width: int, positions=(20, 21)) -> pm.Inputs:
    return pm.make_inputs(
        height, width, positions, GROUPS, batch=2, text_lengths=(7, 4), image_tokens=5, text_features=TEXT
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_computing_it_each_time(dtype):
    """Two prompts of different length, memory tokens, an odd size; then another size, and other positions."""
    reference = pm.make_reference(heads=1, double=1, single=2, text_features=TEXT)
    network, once = pm.make_ours(reference.state_dict(), dtype), Once()
    shown = {"frame_memory_positions": torch.tensor(PLACES)}
    for given in (inputs_of(9, 11), inputs_of(8, 12), inputs_of(8, 12, (30, 31))):
        batch = given.window_BCTHW.shape[0]
        shown["frame_memory_tokens"] = torch.randn(batch, len(PLACES), network.hidden_size).to(dtype)
        for sigma in (0.9, 0.4):
            now = dataclasses.replace(given, timestep_B=torch.full((batch,), 1000 * sigma))
            expected = pm.run_ours(network, now, dtype, **shown)
            assert torch.equal(pm.run_ours(network, now, dtype, once, **shown), expected)


def counted(model) -> Counter:
    """How often the parts that no step changes have run since."""
    calls, network = Counter(), model.model.diffusion_model
    for name in ("image_projection", "clean_x_embedder", "pe_embedder"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("steps", [1, 3])
def test_a_section_computes_them_once_a_prompt_whatever_its_steps(model, steps):
    seen = comfy.clip_vision.Output()
    seen["last_hidden_state"] = torch.randn(1, 5, 1152)
    both = conditioning(1) + conditioning(5)
    prompts = [[[text, {**extra, "clip_vision_output": seen}]] for text, extra in both]
    calls = counted(model)
    run(model, guider=guider_for(of_kind(model, "F1"), *prompts, cfg=3.0), seconds=2.4, steps=steps)
    # Two sections of two prompts; a context of 4 groups, and a rotary table for each of them and the window.
    assert calls == {"image_projection": 4, "clean_x_embedder": 16, "pe_embedder": 20}


def test_weights_that_hooks_may_change_between_steps_are_computed_with_each_time(model):
    asked = {"device": "cpu", "noise": torch.zeros(1, 16, 9, 6, 10), "frame_context": {"latents": [], "layout": None},
             "pooled_output": torch.zeros(1, 768)}  # fmt: skip
    assert ONCE in model.model.extra_conds(**asked)
    assert ONCE not in model.model.extra_conds(**asked, hooks=comfy.hooks.HookGroup())
