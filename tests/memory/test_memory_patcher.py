"""The encoder beside its MODEL: loaded and counted with it, gone with it, and never for another base."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.sampler_helpers
import comfy.sd
import pytest
import torch

from benchmarks import parity_models
from frame_memory.model.context import gather_context
from frame_memory.model.framepack import FRAME_CONTEXT_KEY, MEMORY_KEY
from frame_memory.model.key_map import convert_diffusers
from frame_memory.model.memory import (
    ATTACHED,
    MemoryMismatch,
    attach,
    check_fits,
    detach,
    encoder_from_tensors,
    is_attached,
    new_encoder,
    with_features_of,
)
from frame_memory.plan import PRESETS, plan_sections
from frame_memory.sampling.unipc import framepack_unipc

from .conftest import Seen, opened, prompt
from .runs import HEIGHT, TEXT, WIDTH, guider_for, of_kind


def carried(tokens=None, height=HEIGHT, width=WIDTH):
    """What a section's prompt carries: context, and memory where there is one."""
    section = plan_sections(PRESETS["F1 forward"], sections=1).sections[0]
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(1, 16, 1, height, width, generator=generator)
    context = gather_context(section, torch.zeros(1, 16, 10, height, width), start, None, 0.0)
    more = {FRAME_CONTEXT_KEY: {"latents": context.latents, "layout": context.layout}}
    return more if tokens is None else {**more, MEMORY_KEY: tokens}


@torch.inference_mode()
def sampled(model, tokens=None):
    conds = prompt()
    conds[0][1].update(carried(tokens))
    noise = torch.randn(1, 16, 9, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    return guider_for(model, conds).sample(noise, torch.zeros_like(noise), framepack_unipc(), sigmas, seed=1)


def tokens_of(memory):
    with torch.no_grad():
        psi = memory.pack.update(
            memory.pack.anchor(memory.text, memory.vision), torch.ones(1, 16, 9, 6, 10), first=True
        )
        return memory.pack.tokens(psi)


def loaded_names():
    return [type(m.model.model).__name__ for m in comfy.model_management.current_loaded_models if m.model is not None]


def test_a_fresh_encoder_begins_as_the_model_s_own_embedders(model):
    memory = new_encoder(model)
    network, pack = model.model.diffusion_model, memory.pack
    assert torch.equal(pack.embed.weight, network.clean_x_embedder.proj_4x.weight)
    assert torch.equal(pack.text_in.weight, network.txt_in.input_embedder.weight)
    assert torch.equal(pack.image_in.up.bias, network.image_projection.up.bias)
    assert "UNTRAINED" in memory.describe() and "changes nothing" in memory.describe()
    again = new_encoder(model)
    assert again.fingerprint == memory.fingerprint


def test_it_is_loaded_with_the_model_and_survives_clone_and_unload(model, memory):
    tokens = tokens_of(memory)
    with_it = attach(model, memory).clone().clone()
    assert is_attached(with_it) and not is_attached(model)
    first = sampled(with_it, tokens)
    assert "SemanticPack" in loaded_names()
    comfy.model_management.unload_all_models()
    assert torch.equal(sampled(with_it, tokens), first)
    assert torch.equal(tokens_of(memory), tokens)


def test_fault_48_two_of_them_do_not_stack_and_none_is_left_when_it_is_taken_out(model, memory):
    before = sampled(model)
    other = replace(memory, label="other")
    twice = attach(attach(model, memory), other)
    assert len(twice.get_additional_models_with_key(ATTACHED)) == 1
    assert torch.equal(sampled(twice), before)  # nothing acts without the tokens
    sampled(twice, tokens_of(memory))
    gone = detach(twice)
    assert not gone.additional_models and gone.model_options == model.model_options
    assert torch.equal(sampled(gone), before) and torch.equal(sampled(model), before)


def test_the_memory_estimate_grows_by_the_tokens(model):
    shape = [1, 16, 9, 60, 104]
    without, with_tokens = (
        comfy.sampler_helpers.estimate_memory(model, shape, {"positive": [carried(t, 60, 104)]})
        for t in (None, torch.zeros(1, 312, 128))
    )
    # The window's 9 x 60 x 104 positions are 14,040 tokens; core doubles its batch for the first of the two numbers.
    a_token = model.model.memory_required(shape) / 14040
    for a, b in zip(without, with_tokens, strict=True):
        assert (b - a) == pytest.approx(312 * a_token, rel=0.01)


def test_a_lora_on_the_model_acts_with_memory_and_comes_off(model, memory):
    tokens, plain = tokens_of(memory), sampled(attach(model, memory), tokens_of(memory))
    name = "diffusion_model.double_blocks.0.img_attn.proj.weight"
    weight = model.model.diffusion_model.double_blocks[0].img_attn.proj.weight
    patched = attach(model, memory)
    patched.add_patches({name: ("diff", (torch.full_like(weight, 0.05),))}, 1.0)
    assert not torch.equal(sampled(patched, tokens), plain)
    assert check_fits(memory, patched, "x")  # a LoRA, merged or not, is no other base
    assert new_encoder(patched).fingerprint == new_encoder(model).fingerprint
    assert torch.equal(sampled(attach(model, memory), tokens), plain)


def test_a_lora_merged_into_the_embedders_is_not_inherited(model):
    clean = new_encoder(model).fingerprint
    name = "diffusion_model.clean_x_embedder.proj_4x.weight"
    patched = model.clone()
    patched.add_patches({name: ("diff", (torch.ones_like(model.model.state_dict()[name]),))}, 1.0)
    comfy.model_management.load_models_gpu([patched])
    assert patched.backup  # merged
    assert new_encoder(patched).fingerprint == clean


@pytest.fixture(scope="module")
def other_base():
    """The same network with other weights, and one that is twice as wide."""
    made = {}
    for name, seed, heads in (("weights", 5, 1), ("width", 0, 2)):
        sd = parity_models.make_reference(seed=seed, heads=heads, double=1, single=2, text_features=TEXT).state_dict()
        made[name] = comfy.sd.load_diffusion_model_state_dict(
            convert_diffusers({k: v.contiguous() for k, v in sd.items()})
        )
    return made


@pytest.mark.parametrize("what", ["weights", "width"])
def test_fault_37_a_memory_of_another_base_is_refused_with_both_fingerprints(memory, model, other_base, what):
    other = of_kind(other_base[what], "F1", "HunyuanVideo")
    with pytest.raises(MemoryMismatch) as refused:
        check_fits(memory, other, "MemoryPack Encoder")
    said = str(refused.value)
    assert memory.base.signature.short in said and new_encoder(other).base.signature.short in said
    assert "MemoryPack Encoder" in said and "Load Memory Encoder" in said


def test_fault_37_a_memory_for_f0_and_one_of_another_size_without_a_base(model, memory, other_base):
    with pytest.raises(MemoryMismatch, match="no past to remember"):
        check_fits(memory, of_kind(model, "F0"), "MemoryPack Encoder")
    with pytest.raises(MemoryMismatch, match="hidden is 128, not 256"):
        check_fits(replace(memory, base=None), other_base["width"], "MemoryPack Encoder")
    assert "only its sizes" in check_fits(replace(memory, base=None), model, "MemoryPack Encoder")


def test_weights_go_through_a_state_dict_and_odd_ones_are_refused(memory):
    tensors = memory.pack.state_dict()
    again = encoder_from_tensors(tensors, memory.spec, label="a.safetensors", base=memory.base)
    assert again.trained and again.fingerprint == memory.fingerprint
    bent = {**tensors, "gate": torch.zeros(3)}
    with pytest.raises(MemoryMismatch, match=r"gate has shape \(3,\), expected \(1,\)"):
        encoder_from_tensors(bent, memory.spec, label="b.safetensors")
    with pytest.raises(MemoryMismatch, match="1 tensors differ"):
        encoder_from_tensors({k: v for k, v in tensors.items() if k != "gate"}, memory.spec, label="c.safetensors")


def test_features_are_read_without_padding_and_with_the_picture_of_the_prompt(model):
    memory = new_encoder(model)
    cond = prompt()
    cond[0][1]["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    anchored, line = with_features_of(memory, cond)
    assert torch.equal(anchored.text, cond[0][0][:, :5]) and anchored.vision.shape == (1, 4, 1152)
    assert "5 tokens of the prompt and 4 tokens of the picture" in line
    alone, line = with_features_of(memory, prompt(picture=False))
    assert alone.vision is None and "no picture" in line
    own, _ = with_features_of(memory, prompt(picture=False), Seen(3))
    assert torch.equal(own.vision, Seen(3).last_hidden_state)


@pytest.mark.parametrize(
    ("conditioning", "vision", "words"),
    [
        (prompt(features=32), None, "'conditioning'.*32 numbers.*reads 64"),
        (prompt(), Seen(1, 768), "'clip_vision_output'.*768 numbers.*reads 1152"),
        ([], None, "is empty"),
    ],
)
def test_features_of_other_encoders_are_refused(model, conditioning, vision, words):
    with pytest.raises(MemoryMismatch, match=words):
        with_features_of(new_encoder(model), conditioning, vision)


def test_an_open_gate_makes_a_difference_and_a_closed_one_none(model, memory):
    before = sampled(model)
    assert not torch.equal(sampled(model, tokens_of(memory)), before)
    closed = opened(memory, gate=0.0)
    assert tokens_of(closed) is None
    assert torch.equal(sampled(attach(model, closed), tokens_of(closed)), before)
