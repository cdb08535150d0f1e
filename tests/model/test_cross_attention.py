"""Cross-attention from frame preservation's features: against plain loops on both families, and where it does nothing.

The tests' own word: hooks on core's blocks that change the window's tokens, one token and one head at a time.
"""

from __future__ import annotations

import contextlib
import math

import comfy.ops
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import parity_models as pm
from frame_memory.model import cross_attention, framepack, memory, wan
from frame_memory.model.cross_attention import CROSS, CrossAttention, reader_of, spec_of
from frame_memory.model.packing import ContextLayout
from frame_memory.model.preserved_history import PreservedHistory
from frame_memory.model.preserved_memory import attach_preserved, new_memory, with_cross_attention
from frame_memory.plan.cross_attention import CrossAttentionSpec
from frame_memory.plan.preservation import latent_frames, token_count

from . import wan_reference as reference
from .preserved import drawn, linear, random_encoder
from .test_frame_tokens import GROUPS, PLACES, network, run, tokens  # noqa: F401 (a fixture)
from .test_wan_context_model import sample

FEATURES, TOKENS = 8, 5
SMALL = {"channels": (4, 6, 8, 8), "heads": 2}


def opened(cross: CrossAttention, seed: int = 0) -> CrossAttention:
    """No part of it zero."""
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(cross.named_parameters())):
            noise = drawn(*value.shape, seed=seed + number)
            value.copy_(noise / value.shape[1] ** 0.5 if value.ndim == 2 else 0.3 * noise + name.endswith("m.weight"))
    return cross


def made_for(net, seed: int = 0) -> CrossAttention:
    return opened(CrossAttention(spec_of(net, FEATURES), operations=comfy.ops.manual_cast), seed).requires_grad_(False)


# --- plain loops ----------------------------------------------------------------------------------------------------


def norm(sd: dict, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    centred = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred * sd[f"{name}.weight"].double() + sd[f"{name}.bias"].double()


def read(sd: dict, number: int, heads: int, window_ND: Tensor, features_ME: Tensor) -> Tensor:
    """What a block adds to the window's tokens of one sample."""
    name, features = f"blocks.{number}", norm(sd, "norm", features_ME.double())
    asking = norm(sd, f"{name}.norm", window_ND.double())
    key, value = linear(sd, f"{name}.key", features), linear(sd, f"{name}.value", features)
    size, found = asking.shape[1] // heads, torch.zeros_like(asking)
    for token in range(len(asking)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            weights = torch.exp(key[:, part] @ asking[token, part] / math.sqrt(size))
            found[token, part] = (weights / weights.sum()) @ value[:, part]
    return linear(sd, f"{name}.out", found)


@contextlib.contextmanager
def by_hand(net, cross: CrossAttention, features_BME: Tensor, window: slice):
    """Core's blocks with `read` behind them, for the tokens of the window."""
    sd, spec = cross.state_dict(), cross.spec
    double = list(net.blocks if hasattr(net, "blocks") else net.double_blocks)
    blocks = [*double, *getattr(net, "single_blocks", ())]

    def hook(number):
        def changed(_, args, out):
            made = (out[0] if isinstance(out, tuple) else out).clone()
            for i, features in enumerate(features_BME):
                made[i, window] += read(sd, number, spec.heads, made[i, window], features).to(made)
            return (made, *out[1:]) if isinstance(out, tuple) else made

        return changed

    handles = [block.register_forward_hook(hook(number)) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("size", [(8, 12), (7, 11)])
def test_framepack_reads_them_in_every_block_of_either_kind(network, size):  # noqa: F811
    """Two samples whose prompts differ in length, at an odd size too."""
    inputs = pm.make_inputs(*size, (20, 21), GROUPS, batch=2, text_lengths=(7, 4), image_tokens=5, text_features=64)
    shown, features, cross = tokens(2, network.hidden_size), drawn(2, TOKENS, FEATURES), made_for(network)
    assert cross.spec == CrossAttentionSpec(network.hidden_size, FEATURES, network.num_heads, 1, 2)
    got = run(network, inputs, shown, frame_memory_features=features, transformer_options={CROSS: cross})
    each = []
    for i in range(2):  # the network takes samples one by one where texts differ
        one = pm.Inputs(**{
            **vars(inputs), **{n: vars(inputs)[n][i : i + 1] for n in vars(inputs) if n.endswith(("HW", "_B", "D"))},
            "context": tuple(c[i : i + 1] for c in inputs.context), "text_lengths": inputs.text_lengths[i : i + 1],
        })  # fmt: skip
        with by_hand(network, cross, features[i : i + 1], slice(-48, None)):
            each.append(run(network, one, shown[i : i + 1]))
    assert torch.allclose(got, torch.cat(each), atol=2e-5)
    assert not torch.allclose(got, run(network, inputs, shown), atol=1e-2)


@pytest.mark.parametrize("layout", [None, ContextLayout((6, 7, 8), ())])
def test_wan_reads_them_in_every_block_for_the_window_alone(layout):
    """Odd sizes, a batch, and the memory's own features for all of it as well as one for each."""
    net = reference.load("2.1 T2V").model.diffusion_model
    cross = made_for(net)
    past = {wan.TOKENS: drawn(2, len(PLACES), 128), wan.POSITIONS: torch.tensor(PLACES), wan.LAYOUT: layout}
    call = {"x": drawn(2, 16, 3, 5, 7), "timestep": torch.tensor([700.0, 300.0]), "context": drawn(2, 4, 24), **past}
    options = {**wan.options(), CROSS: cross}
    for features in (drawn(2, TOKENS, FEATURES, seed=4), drawn(1, TOKENS, FEATURES, seed=5)):
        with torch.no_grad():
            got = net(**call, **{framepack.FRAME_FEATURES: features}, transformer_options=options)
            with by_hand(net, cross, features.expand(2, -1, -1), slice(3 * 3 * 4)):
                expected = net(**call, transformer_options=wan.options())
            assert torch.allclose(got, expected, atol=2e-5)
            assert not torch.allclose(got, net(**call, transformer_options=options), atol=1e-2)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_a_block_equals_plain_loops_in_the_numbers_of_its_tokens(dtype, far):
    spec = CrossAttentionSpec(hidden=12, features=FEATURES, heads=3, double=1, single=1)
    cross = opened(CrossAttention(spec, operations=comfy.ops.manual_cast))
    window, features = drawn(2, 7, 12).to(dtype), drawn(2, TOKENS, FEATURES, seed=2).to(dtype)
    with torch.no_grad():
        got = cross.blocks[1](window, cross.norm(features), {})
    expected = torch.stack([read(cross.state_dict(), 1, 3, w, f) for w, f in zip(window, features)])
    assert got.dtype == dtype and (got - expected).abs().max() < far * expected.abs().max()


# --- nothing changes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_one_and_one_that_was_taken_off_change_nothing_bit_for_bit(dtype):
    """MODEL, encoder and cross-attention through core's sampler, with what a run carries."""
    model = reference.load("2.1 T2V", dtype)
    plain, bare = sample(model), new_memory(model, "2x2x2", **SMALL)
    fresh = with_cross_attention(bare, model)
    assert fresh.fingerprint != bare.fingerprint and with_cross_attention(fresh, model) is fresh
    history = drawn(1, 16, 4, 4, 6, seed=6)
    with torch.no_grad():
        seen, without = fresh.history(history, (4,)), bare.history(history, (4,))
    assert seen.features.shape == (1, 2, FEATURES) and torch.equal(seen.tokens, without.tokens)
    attached, past = attach_preserved(model, fresh), {"tokens": seen.tokens, "positions": seen.places}
    before = sample(attach_preserved(model, bare), **past)
    assert torch.equal(sample(attached, **past, features=seen.features), before) and not torch.equal(before, plain)
    opened(fresh.history.cross_attention)
    assert not torch.equal(sample(attached, **past, features=seen.features), before)
    assert torch.equal(sample(attached, **past), before), "tokens alone"
    assert torch.equal(sample(attached), plain) and torch.equal(sample(model), plain)
    assert reader_of(attached) is fresh.history.cross_attention and reader_of(model) is None
    assert reader_of(memory.detach(attached)) is None and reader_of(attach_preserved(attached, bare)) is None
    with pytest.raises(ValueError, match="no layers that read it.*'Frame Preservation Encoder'"):
        sample(attach_preserved(model, bare), **past, features=seen.features)


def test_others_around_a_block_stay_there_and_it_is_part_of_the_block(network):  # noqa: F811
    """A pack that leaves a block out leaves its cross-attention out as well."""
    inputs = pm.make_inputs(8, 12, (20, 21), GROUPS, text_lengths=(7,), image_tokens=5, text_features=64)
    more, cross, calls = {"frame_memory_features": drawn(1, TOKENS, FEATURES)}, made_for(network), []

    def watched(args, extra):
        calls.append(args["transformer_options"]["block_index"])
        return extra["original_block"](args)

    def left_out(args, extra):
        return {"img": args["img"]}

    def made(*replaced):
        dit = {("single_block", 1): replaced[0]} if replaced else {}
        options = {CROSS: cross, "patches_replace": {"dit": dit}}
        return run(network, inputs, tokens(1, network.hidden_size), **more, transformer_options=options)

    assert torch.equal(made(watched), made()) and calls == [1]
    without = made(left_out)
    with torch.no_grad():
        cross.blocks[2].out.weight.zero_(), cross.blocks[2].out.bias.zero_()
    assert torch.equal(made(left_out), without) and not torch.equal(made(), without)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "numbers"), [((3072, 512, 24, 20, 40), 756), ((1536, 512, 12, 30), 118)])
def test_numbers_and_operations_are_those_of_a_forward_pass(sizes, numbers):
    """HunyuanVideo and Wan 1.3B at full size on the meta device: 20 s of memory, a window of 9 frames at 480x832."""
    spec = CrossAttentionSpec(*sizes)
    cross = CrossAttention(spec, torch.bfloat16, "meta", comfy.ops.disable_weight_init).requires_grad_(False)
    known, window = token_count(random_encoder().rate, latent_frames(20, 24), 60, 104), 9 * 30 * 52
    features, shown = (torch.empty(1, n, d, device="meta", dtype=torch.bfloat16) for n, d in (
        (known, spec.features), (window, spec.hidden)))  # fmt: skip
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        for block in cross.blocks:
            block(shown, cross.norm(features), {})
    assert flops.get_total_flops() == spec.operations(window, known)
    assert sum(p.numel() for p in cross.parameters()) == spec.numbers and round(spec.numbers / 1e6) == numbers
    assert sum(p.nbytes for p in cross.parameters()) == spec.bytes()


def test_encoders_and_cross_attention_that_do_not_belong_together_are_refused():
    spec, cross = random_encoder(cross_attention=True).spec, CrossAttentionSpec(10, 8, 2, 1)
    made = {"operations": comfy.ops.manual_cast}
    for specs, wrong in (([spec], None), ([random_encoder().spec], cross), ([spec], CrossAttentionSpec(10, 6, 2, 1))):
        with pytest.raises(ValueError, match="are handed out, and read by"):
            PreservedHistory(specs, cross=wrong, **made)
    with pytest.raises(ValueError, match="does not suit 3 heads"):
        CrossAttentionSpec(10, 8, 3, 1)
    history = PreservedHistory([spec], cross=cross, **made)
    cross_attention.initialise(history.cross_attention, 1)
    zero = {name for name, value in history.cross_attention.named_parameters() if not value.any()}
    assert zero == {"norm.bias", *(f"blocks.0.{n}" for n in
                    ("norm.bias", "key.bias", "value.bias", "out.bias", "out.weight"))}  # fmt: skip
