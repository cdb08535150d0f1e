"""The memory's network against the same written as plain sums; its variants; what it learns by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.model.semantic_pack import PackSpec, initialise
from frame_memory.plan.memory import memory_tokens

from . import naive
from .small import SPEC, clips, drawn, features, random_pack

NEAR = {"atol": 2e-4, "rtol": 2e-4}


@torch.no_grad()
def stepwise(pack, text, vision, shown):
    """psi after each clip, as a run updates it."""
    psi = pack.anchor(text, vision)
    for number, clip in enumerate(shown):
        psi = pack.update(psi, clip, first=number == 0)
        yield psi


@settings(max_examples=12)
@given(frames=st.integers(1, 9), height=st.integers(1, 17), width=st.integers(1, 17))
def test_a_clip_s_tokens_equal_plain_sums(frames, height, width):
    pack = random_pack()
    (clip,) = clips([frames], batch=1, height=height, width=width)
    with torch.no_grad():
        got = pack.clip_tokens(clip)
    assert got.shape == (1, memory_tokens(frames, height, width), SPEC["hidden"])
    assert torch.allclose(got[0].double(), naive.clip_tokens(pack.state_dict(), pack.spec, clip[0]), **NEAR)


@pytest.mark.parametrize("zero_psi", [False, True])
@pytest.mark.parametrize("squeeze", ["A", "B", "C"])
def test_psi_step_by_step_equals_psi_from_scratch(squeeze, zero_psi):
    pack = random_pack(squeeze=squeeze, zero_psi=zero_psi)
    text, vision = features(batch=2)
    shown = clips([9, 3, 9], batch=2)
    sd = pack.state_dict()
    for count, psi in enumerate(stepwise(pack, text, vision, shown), 1):
        for i in range(2):
            expected = naive.memory_of(sd, pack.spec, text[i], vision[i], [c[i] for c in shown[:count]])
            assert torch.allclose(psi[i].double(), expected, **NEAR), (count, i)


def test_how_many_tokens_each_variant_keeps():
    """A: those of the clip at hand. B: the prompt's and the picture's. C: these and the first clip's."""
    text, vision = features()
    shown = clips([9, 9, 5])
    clip, short, anchor = memory_tokens(9, 5, 11), memory_tokens(5, 5, 11), 3 + 5
    expected = {"A": [clip, clip, short], "B": [anchor] * 3, "C": [anchor + clip] * 3}
    for squeeze, counts in expected.items():
        kept = [psi.shape[1] for psi in stepwise(random_pack(squeeze=squeeze), text, vision, shown)]
        assert kept == counts, squeeze


def test_zero_psi_keeps_the_shape_and_forgets_prompt_and_picture():
    pack, (text, vision), other = random_pack(zero_psi=True), features(), features(seed=50)
    assert pack.anchor(text, vision).shape == (1, 8, SPEC["hidden"]) and not pack.anchor(text, vision).any()
    mine, theirs = (list(stepwise(pack, *f, clips([9, 9])))[-1] for f in ((text, vision), other))
    assert torch.equal(mine, theirs)
    with_anchor = random_pack()
    mine, theirs = (list(stepwise(with_anchor, *f, clips([9, 9])))[-1] for f in ((text, vision), other))
    assert not torch.allclose(mine, theirs)


def test_an_anchor_without_a_picture_and_one_prompt_for_a_batch():
    pack, (text, vision) = random_pack(), features(batch=2)
    sd = pack.state_dict()
    with torch.no_grad():
        alone, both = pack.anchor(text[:1]), pack.anchor(text[:1], vision)
    assert torch.allclose(alone[0].double(), naive.anchor(sd, pack.spec, text[0], None), **NEAR)
    for i in range(2):
        assert torch.allclose(both[i].double(), naive.anchor(sd, pack.spec, text[0], vision[i]), **NEAR)


@settings(max_examples=20)
@given(frames=st.integers(1, 9), height=st.integers(1, 12), width=st.integers(1, 12))
def test_fault_20_a_short_clip_leaves_fewer_tokens_and_none_of_padding(frames, height, width):
    """A clip of fewer frames is the clip whose last frame, row and column go on to the end of their cells: no token
    stands for frames that are not there, and none is zero. The same with and without a gradient, so in training."""
    pack = random_pack()
    (clip,) = clips([frames], height=height, width=width)
    whole = [-(-size // step) * step for size, step in zip((frames, height, width), (4, 8, 8))]
    index = [torch.arange(n).clamp(max=size - 1) for n, size in zip(whole, (frames, height, width))]
    longer = clip[:, :, index[0]][:, :, :, index[1]][:, :, :, :, index[2]]
    with torch.no_grad():
        got, expected = pack.clip_tokens(clip), pack.clip_tokens(longer)
    assert torch.equal(got, expected)
    assert got.shape[1] == whole[0] // 4 * (whole[1] // 8) * (whole[2] // 8)
    assert torch.allclose(pack.clip_tokens(clip), got, atol=1e-5)


def test_fault_20_a_first_memory_of_a_short_clip_is_read_as_it_is():
    """psi of one token serves the next clip: its attention runs over that token alone."""
    pack, (text, vision) = random_pack(), features()
    shown = clips([1, 9])
    *_, psi = stepwise(pack, text, vision, shown)
    expected = naive.memory_of(pack.state_dict(), pack.spec, text[0], vision[0], [c[0] for c in shown])
    assert torch.allclose(psi[0].double(), expected, **NEAR)


def test_a_fresh_memory_is_the_last_clip_and_what_was_before_it_and_its_gate_is_closed():
    """psi_n = m_n + 2 mean(psi_n-1), each normalised: no matrix but the embedders' has a say yet."""
    pack = initialise(random_pack())
    for attention in (pack.squeeze.attention,):  # what is asked decides nothing, so the mean is a plain one
        torch.nn.init.zeros_(attention.query.weight)
    text, vision = features()
    shown = clips([9, 9, 9])
    *_, psi = stepwise(pack, text, vision, shown)
    sd = pack.state_dict()
    expected = naive.anchor(sd, pack.spec, text[0], vision[0])
    for clip in shown:
        m, before = (whitened(x) for x in (naive.embedded(sd, clip[0])[0], expected))
        expected = m + 2 * before.mean(0)
    assert torch.allclose(psi[0].double(), expected, atol=1e-4)
    with torch.no_grad():
        assert pack.tokens(psi) is None


def whitened(x_MD):
    centred = x_MD - x_MD.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_a_fresh_memory_still_holds_the_first_of_ten_clips():
    """Two videos that differ in their first clip only; the reference's zero matrix would have made them one."""
    pack = initialise(random_pack())
    text, vision = features()
    shown, other = clips([9] * 10), clips([9], seed=99)
    (*_, mine), (*_, theirs) = (list(stepwise(pack, text, vision, [first, *shown[1:]])) for first in (shown[0], *other))
    assert float((mine - theirs).norm() / mine.norm()) > 0.02


class Packed(torch.nn.Linear):
    """A layer that keeps its numbers in a form of its own and unpacks them when asked, as GGUF loaders' layers do."""

    def get_weight(self, tensor, dtype):
        return tensor.to(dtype) * 2


def test_a_fresh_memory_unpacks_the_layers_it_begins_with():
    base: Any = torch.nn.Module()
    for name in ("clean_x_embedder", "txt_in", "image_projection"):
        base.add_module(name, torch.nn.Module())
    hidden = SPEC["hidden"]
    base.clean_x_embedder.proj_4x = torch.nn.Conv3d(SPEC["in_channels"], hidden, (4, 8, 8))
    base.txt_in.input_embedder = Packed(SPEC["text"], hidden)
    base.image_projection.up = Packed(SPEC["vision"], 3 * hidden)
    base.image_projection.down = torch.nn.Linear(3 * hidden, hidden)
    patched = {"image_projection.down.weight": drawn(hidden, 3 * hidden)}
    pack = initialise(random_pack(), base, originals=patched)
    assert torch.equal(pack.embed.weight, base.clean_x_embedder.proj_4x.weight)
    assert torch.equal(pack.text_in.weight, 2 * base.txt_in.input_embedder.weight)
    assert torch.equal(pack.image_in.up.bias, 2 * base.image_projection.up.bias)
    assert torch.equal(pack.image_in.down.weight, patched["image_projection.down.weight"])


def test_tokens_are_scaled_by_the_open_gate_and_left_out_by_the_closed_one():
    pack, psi = random_pack(), drawn(1, 4, SPEC["hidden"])
    pack.gate.data.fill_(0.7)
    with torch.no_grad():
        assert torch.allclose(pack.tokens(psi), psi * 0.6043677771)  # tanh 0.7
    pack.gate.data.zero_()
    with torch.no_grad():
        assert pack.tokens(psi) is None
    assert torch.equal(pack.tokens(psi), torch.zeros_like(psi))  # a gradient is wanted
    pack.requires_grad_(False)
    assert pack.tokens(psi) is None


@pytest.mark.parametrize("squeeze", ["A", "B", "C"])
def test_in_training_gradients_reach_everything(squeeze):
    pack = random_pack(squeeze=squeeze)
    text, vision = features()
    psi = pack.anchor(text, vision)
    for number, clip in enumerate(clips([9, 9])):
        psi = pack.update(psi, clip, first=number == 0)
    tokens = pack.tokens(psi)
    assert tokens is not None
    (tokens * drawn(*psi.shape)).sum().backward()
    assert not [name for name, value in pack.named_parameters() if value.grad is None or not value.grad.any()]


def test_gradients_equal_finite_differences():
    """Through the rotation too, which has no gradient in core's kernel."""
    pack, (clip,) = random_pack(seed=3).double(), clips([5])
    pack.dtype = torch.float64
    probe = drawn(1, memory_tokens(5, 5, 11), SPEC["hidden"], seed=9).double()

    def value() -> torch.Tensor:
        return (pack.clip_tokens(clip) * probe).sum()

    value().backward()
    for name in ("memorize.0.attention.query.weight", "memorize.1.attention.key.weight", "embed.bias"):
        weight = pack.get_parameter(name)
        flat, gradient = weight.data.view(-1), weight.grad.view(-1)
        at = int(gradient.abs().argmax())
        step = 1e-3  # the rotation is computed in fp32, as core's
        flat[at] += step
        above = value().item()
        flat[at] -= 2 * step
        below = value().item()
        flat[at] += step
        assert gradient[at].item() == pytest.approx((above - below) / (2 * step), rel=0.01), name


def test_bf16_stays_near_fp32():
    exact, rough = random_pack(), random_pack(dtype=torch.bfloat16)
    text, vision = features()
    (*_, a), (*_, b) = (list(stepwise(p, text, vision, clips([9, 9]))) for p in (exact, rough))
    assert b.dtype == torch.bfloat16
    assert float((a - b.float()).norm() / a.norm()) < 0.05


def test_a_description_goes_through_json_and_refuses_what_it_does_not_know():
    spec = PackSpec(**SPEC, squeeze="B", zero_psi=True)
    assert PackSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="newer version: depth"):
        PackSpec.from_dict({**spec.to_dict(), "depth": 3})
    with pytest.raises(ValueError, match="not complete"):
        PackSpec.from_dict({"hidden": 32, "axes_dim": [4, 6, 6]})
    with pytest.raises(ValueError, match="A, B, C"):
        PackSpec(**SPEC, squeeze="D")
    with pytest.raises(ValueError, match="do not make a hidden size"):
        PackSpec(**{**SPEC, "heads": 3})
