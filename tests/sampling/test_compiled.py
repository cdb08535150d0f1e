"""torch.compile as core's node TorchCompileModel puts it on: one piece, few graphs, and the numbers of the plain run.

The backend here runs what was captured and generates no code: what is captured is what differs between models.
"""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from torch._dynamo.utils import counters

from benchmarks import parity_models as pm
from frame_memory.model.preserved_memory import attach_preserved, new_memory, with_tokens
from frame_memory.model.wan import KEY, attach
from frame_memory.sampling.attention_backend import AttentionBackend
from frame_memory.sampling.attention_check import TOKENS, Place
from frame_memory.sampling.guards import with_attention as options_with_attention

from . import wan_runs
from .conftest import conditioning, guider_for, of_kind, run, start_latent
from .test_guards import with_attention

T2V = "2.1 T2V"


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing captured before counts, and nothing stays."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model):
    """A clone as the node makes it, that refuses to be captured in more than one piece."""
    clone, options = model.clone(), {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend="eager", options=options, fullgraph=True)
    return clone


def framepack(kind: str, preset: str):
    """What makes so many sections with two prompts, which have padding."""

    def made(model, sections: int, **more):
        prompts = [conditioning(1), conditioning(5)]
        for prompt in prompts:
            prompt[0][1]["attention_mask"] = torch.tensor([[1] * 5 + [0] * 2])
        guider = guider_for(of_kind(model, kind), *prompts, cfg=2.0)
        more = {"seconds": 1.2 * sections, "steps": 2, "kind": None, "preset": preset, **more}
        return run(model, guider=guider, **more)[0]["samples"]

    return made


def wan(model, sections: int, **more):
    return wan_runs.made(model, T2V, seconds=0.5 * sections, **more)[0]["samples"]


F1, F0 = framepack("F1", "F1 forward"), framepack("F0", "F0 inverted")


@pytest.mark.parametrize("family", [F1, F0, wan])
def test_one_graph_is_all_that_a_run_needs(family, model):
    """All steps of all sections and both prompts; F0's distances to the end are other ones in each section."""
    plain = wan_runs.attached(T2V) if family is wan else model
    made = compiled(plain)
    if family is wan:  # as a node behind core's, whose wrapper ours is inside of then
        made = attach(made, *plain.get_additional_models_with_key(KEY))
    assert torch.equal(family(made, 3), family(plain, 3))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("family", [F1, wan])
def test_a_memory_that_grows_is_one_graph_more(family, model):
    """The first section is shown none; the count of tokens is another one in each section after it."""
    plain = wan_runs.attached(T2V) if family is wan else model
    memory = with_tokens(new_memory(plain, "2x2x2", cross_attention=True, channels=(4, 6, 8, 8), heads=2), 1000)
    with torch.no_grad():
        for index, value in enumerate(memory.history.parameters()):
            value += 0.1 * wan_runs.reference.drawn(*value.shape, seed=index)
    plain = attach_preserved(plain, memory)
    made, more = compiled(plain), {"memory": memory, "start": start_latent(height=8, width=10)}
    assert torch.equal(family(made, 4, **more), family(plain, 4, **more))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no compiler for generated code")
def test_generated_code_rounds_time_and_guidance_as_the_plain_run_does(monkeypatch):
    """Guidance 10 is 9984 to the model in bf16; generated code would leave that cast out (framepack.md 1, M2)."""
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # inductor reads setuptools, other tests had distutils
    network = pm.make_ours(pm.make_reference(heads=1, double=1, single=1).state_dict(), torch.bfloat16)
    given = torch.tensor([703.0]), torch.randn(1, 768).bfloat16(), torch.tensor([10.0]).bfloat16(), torch.bfloat16
    with torch.no_grad():
        plain, time = network._modulation_vector(*given)
        made, rounded = torch.compile(network._modulation_vector, backend="inductor", fullgraph=True)(*given)
        exact = network.guidance_in(timestep_embedding(torch.tensor([1e4]), 256, time_factor=1.0).bfloat16())
        coarse = network.guidance_in(timestep_embedding(torch.tensor([9984.0]), 256, time_factor=1.0).bfloat16())
    assert torch.equal(time, torch.tensor([704.0])) and torch.equal(rounded, time)
    assert pm.relative_rms(made, plain) < 0.1 * pm.relative_rms(plain - coarse + exact, plain)


def test_a_section_with_nan_is_made_again_without_the_graph_that_made_it(model):
    """The graph holds the attention it was captured with; core drops the guards that would tell the two apart."""

    def broken(func, q, *args, **kwargs):
        return func(q, *args, **kwargs) * (1.0 if q.shape[-2] == TOKENS else float("nan"))

    guider = guider_for(compiled(with_attention(model, broken)))
    latent, report = run(model, guider=guider, seconds=1.2, steps=2)
    plain, _ = run(model, guider=guider_for(with_attention(model, broken)), seconds=1.2, steps=2)
    assert torch.isfinite(latent["samples"]).all() and torch.equal(latent["samples"], plain["samples"])
    assert "plain PyTorch attention, without torch.compile" in report
    assert guider.model_patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)


def test_a_graph_is_of_one_attention(model, monkeypatch):
    """Zeros, none of ours, ones: each compiled run gives what its plain run gives, in whatever order they come."""
    model = of_kind(model, "F1")

    def backend(value: float):
        monkeypatch.setitem(
            attention.REGISTERED_ATTENTION_FUNCTIONS, f"all {value}",
            lambda *args, **kwargs: torch.full_like(attention.attention_basic(*args, **kwargs), value),
        )  # fmt: skip
        return AttentionBackend(f"all {value}", f"all {value}", Place.of(model).head, torch.float32, "cpu")

    def made(patcher, override, then=lambda patcher: patcher):
        chosen = patcher.clone()
        if override is not None:
            chosen.model_options = options_with_attention(patcher.model_options, override)
        return run(model, guider=guider_for(then(chosen)), seconds=1.2, steps=2, kind=None)[0]["samples"]

    monkeypatch.setattr("frame_memory.sampling.long_video.checked_attention", lambda guider: (guider, []))
    zeros, ones = backend(0.0), backend(1.0)
    plain = {o: made(model, o) for o in (None, zeros, ones)}
    assert not torch.equal(plain[zeros], plain[ones]) and not torch.equal(plain[zeros], plain[None])
    behind = compiled(model)
    for override in (None, zeros, ones, None, zeros):
        assert torch.equal(made(model, override, compiled), plain[override])
        assert torch.equal(made(behind, override), plain[override])
