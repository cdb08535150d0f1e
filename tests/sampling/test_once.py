"""What no step of a section changes is computed once, and the numbers are those of computing it each time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import comfy.clip_vision
import comfy.hooks
import comfy.ops
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import parity_models as pm
from frame_memory.model import wan
from frame_memory.model.cross_attention import CROSS, CrossAttention, spec_of
from frame_memory.model.framepack import FRAME_FEATURES, FRAME_POSITIONS, FRAME_TOKENS, ONCE
from frame_memory.model.once import Once
from frame_memory.model.packing import ContextLayout
from frame_memory.sampling.experts import WanExpertGuider

from .conftest import TEXT, conditioning, guider_for, of_kind, run
from .wan_runs import attached, made, prompt, reference

GROUPS = ((2, (17, 18)), (1, (0, 19)))
PLACES = [(0, 1, 2), (3, 0, 0), (700, 3, 5)]
T2V, A14B = "2.1 T2V", "2.2 A14B I2V"
LAYOUT = ContextLayout((20, 21), GROUPS)


def inputs_of(height: int, width: int, positions=(20, 21), batch: int = 2) -> pm.Inputs:
    return pm.make_inputs(
        height, width, positions, GROUPS, batch=batch, text_lengths=(7, 4), image_tokens=5, text_features=TEXT
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


# --- Wan ------------------------------------------------------------------------------------------------------------


def past(height: int, width: int, layout=LAYOUT, batch: int = 2, dtype=torch.float32) -> dict:
    frames = [reference.drawn(batch, 16, len(t), height, width, seed=i).to(dtype) for i, (_, t) in enumerate(GROUPS)]
    tokens = reference.drawn(batch, len(PLACES), 128, seed=9).to(dtype)
    return {wan.CONTEXT: frames, wan.LAYOUT: layout, wan.TOKENS: tokens, wan.POSITIONS: torch.tensor(PLACES)}


@torch.no_grad()
def called(model, height: int, width: int, time=700.0, dtype=torch.float32, options=None, batch: int = 2, **more):
    """A window through core's BaseModel, as its samplers call it."""
    x, text = reference.drawn(batch, 16, 2, height, width).to(dtype), reference.drawn(batch, 4, 24).to(dtype)
    given = {"wrappers": model.wrappers, **(options or {})}
    sigma = torch.full((batch,), time / 1000)
    return model.model.apply_model(x, sigma, c_crossattn=text, transformer_options=given, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_s_numbers_are_those_of_computing_it_each_time(dtype):
    """An odd size and another one, other positions, stretched ones, and tokens of a memory behind core's own window."""
    model, once = attached(T2V, dtype=dtype), Once()
    stretched = {"rope_options": {"scale_t": 0.5, "shift_y": 3.0}}
    alone = {wan.CONTEXT: None, wan.LAYOUT: None}
    for size, layout, options, other in (
        ((5, 7), LAYOUT, None, {}), ((4, 6), LAYOUT, None, {}), ((4, 6), ContextLayout((30, 31), GROUPS), None, {}),
        ((4, 6), LAYOUT, stretched, {}), ((5, 7), None, None, alone),
    ):  # fmt: skip
        shown = {**past(*size, layout, dtype=dtype), **other}
        for time in (900.0, 400.0):
            expected = called(model, *size, time, dtype, options, **shown)
            assert torch.equal(called(model, *size, time, dtype, options, **shown, **{ONCE: once}), expected)


@pytest.mark.parametrize("sigmas", [(1.0, 0.0), (1.0, 0.95, 0.4, 0.0)])
def test_a_wan_section_computes_them_once_whatever_its_steps_and_prompts(sigmas):
    model, calls = attached(T2V), Counter()
    network, steps = model.model.diffusion_model, len(sigmas) - 1
    side = model.get_additional_models_with_key(wan.KEY)[0].model
    parts = {"patchifiers": side, "rope_embedder": network.rope_embedder, "time_projection": network.time_projection}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    made(model, T2V, sigmas=torch.tensor(sigmas))
    # Two sections, with a context of 4 groups and a table for each of them and the window; core's own once a prompt.
    core = 2 * 2 * steps
    assert calls == {"patchifiers": 2 * 4, "rope_embedder": 2 * 5 + core, "time_projection": 2 + core}


def test_two_experts_that_share_a_network_keep_nothing_of_each_other():
    """As with a LoRA on the MODEL of one of them: the same numbers as two networks with those weights."""
    name = "time_projection.1.weight"
    high = attached(A14B)
    change = 0.3 * reference.drawn(*high.model.diffusion_model.state_dict()[name].shape)
    low, other = high.clone(), attached(A14B)
    low.add_patches({f"diffusion_model.{name}": (change,)})
    other.model.diffusion_model.get_parameter(name).data += change
    shared, apart = (WanExpertGuider(high, second, 2.0, 2.0, 0.9) for second in (low, other))
    for guider in (shared, apart):
        guider.set_conds(prompt(3), prompt(4))
    expected, _ = made(high, A14B, guider=apart)
    assert torch.equal(made(high, A14B, guider=shared)[0]["samples"], expected["samples"])


def test_prompts_with_the_same_history_share_it_and_those_with_hooks_keep_nothing():
    model, context = attached(T2V), {"latents": past(5, 7)[wan.CONTEXT], "layout": LAYOUT}
    carried, same = (wan.conditions(model.model, context) for _ in range(2))
    entries = [{"model_conds": dict(carried)} for _ in range(2)]
    hooked, other = {**entries[0], "hooks": comfy.hooks.HookGroup()}, {"model_conds": same}
    given = {"positive": [entries[0], hooked, other], "negative": [entries[1], {"model_conds": {}}]}
    seen = wan._begin(lambda *args: args[2], None, [1, 16, 2, 4, 6], given)
    kept = [[entry["model_conds"].get(ONCE) for entry in seen[name]] for name in seen]
    assert kept[0][0] is kept[1][0] is not None and kept[0][1] is None is kept[1][1]
    assert kept[0][2] is not None and kept[0][2].cond is not kept[0][0].cond
    assert ONCE not in entries[0]["model_conds"], "the prompts that are given stay as they are"


# --- the packed sequence --------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts what makes a tensor `[B, N, D]` of so many tokens without computing anything."""

    def __init__(self, width: int, *tokens: int):
        super().__init__()
        self.shapes, self.made = {(1, count, width) for count in tokens}, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("cat", "clone", "copy_", "_to_copy", "constant_pad_nd") and tuple(out.shape) in self.shapes:
            self.made.update([name])
        return out


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("family", ["FramePack", "Wan"])
def test_the_packed_sequence_is_joined_once_a_step_and_the_head_sees_the_window(family, crossed):
    """FramePack's is joined with the text once more, by the blocks of core's second kind."""
    seen, size = [], (9, 11)
    window = 2 * 5 * 6
    more = {ONCE: Once(), **({FRAME_FEATURES: torch.randn(1, 5, 8)} if crossed else {})}
    if family == "Wan":
        model = attached(T2V)
        network = model.model.diffusion_model
        behind = 2 * 5 * 6 + 3 * 3 + len(PLACES)
        watch, tokens = network.head, [window + behind]
    else:
        network = pm.make_ours(pm.make_reference(heads=2, double=2, single=2, text_features=TEXT).state_dict())
        behind = 2 * 5 * 6 + 3 * 3
        watch, tokens = network.final_layer, [window + behind, window + behind + 5 + 7]
    cross = CrossAttention(spec_of(network, 8), operations=torch.nn).requires_grad_(False)
    options = {CROSS: cross} if crossed else {}
    watch.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with Copies(cross.spec.hidden, *tokens) as copies:
        if family == "Wan":
            called(model, *size, options=options, batch=1, **past(*size, batch=1), **more)
        else:
            pm.run_ours(network, inputs_of(*size, batch=1), torch.float32, transformer_options=options, **more)
    assert copies.made == {"cat": len(tokens)} and seen == [window]


MEMORIES = {
    "MemoryPack": {"memory_tokens": (1, 5, 128)},
    "frame preservation": {FRAME_TOKENS: (1, len(PLACES), 128), FRAME_FEATURES: (1, len(PLACES), 16)},
}


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kept", [True, False])
def test_what_an_encoder_hands_out_follows_the_window_to_its_device(name, kept):
    """Tokens lie in RAM, the network on a GPU: here on the device that has shapes alone."""
    network = pm.make_ours(pm.make_reference(heads=1, double=1, single=1, text_features=TEXT).state_dict()).to("meta")
    given = inputs_of(9, 11, batch=1)
    given = pm.moved(dataclasses.replace(given, text_lengths=(7,), text_BLD=given.text_BLD[:, :7]), "meta")
    shown = {key: torch.zeros(shape) for key, shape in MEMORIES[name].items()}
    if name == "frame preservation":
        cross = CrossAttention(spec_of(network, 16), device="meta", operations=comfy.ops.disable_weight_init)
        shown |= {FRAME_POSITIONS: torch.tensor(PLACES), "transformer_options": {CROSS: cross}}
    made = pm.run_ours(network, given, torch.float32, Once() if kept else None, **shown)
    assert made.device.type == "meta" and made.shape == given.window_BCTHW.shape
