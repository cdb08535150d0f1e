"""The encoder of frame preservation against the same written as plain sums; chunks, branches, what trains, masks."""

from __future__ import annotations

import json

import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.mmdit import PatchEmbed
from comfy.ldm.wan.model import WanModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from frame_memory.model.preservation import (
    BRANCHES,
    STRIDES_OF_RATE,
    PreservationEncoder,
    PreservationSpec,
    initialise,
    join,
    low_latents,
)
from frame_memory.plan import BUCKETS, PlanError
from frame_memory.plan.preservation import RATES, chunks, low_size, token_count, token_grid

from . import preserved
from .preserved import TINY, drawn, random_encoder

NEAR = {"atol": 2e-4, "rtol": 2e-4}
ENDS = (1, 9, 20, 21)


@torch.no_grad()
def one_by_one(encoder, history, ends):
    """As a run does it: each segment as it comes, only frames that are new or waited."""
    parts, done = [], 0
    for count, end in enumerate(ends, 1):
        for start, stop in chunks(ends[:count], encoder.rate):
            if stop > done:
                parts.append(encoder.encode(history[:, :, start:stop].clone()))
                done = stop
        assert done <= end
    return join(parts)


@settings(max_examples=12)
@given(st.sampled_from(list(RATES)), st.integers(1, 2), st.integers(8, 13), st.integers(8, 17))
def test_tokens_equal_plain_sums(name, blocks, height, width):
    encoder, rate = random_encoder(rate=name, cross_attention=True), RATES[name]
    chunk = drawn(1, 3, blocks * rate.time, height, width)
    with torch.no_grad():
        got = encoder.encode(chunk)
    sd = encoder.state_dict()
    assert got.tokens.shape == (1, token_count(rate, blocks * rate.time, height, width), TINY["hidden"])
    assert torch.allclose(got.tokens[0].double(), preserved.tokens(sd, encoder.spec, rate, chunk[0]), **NEAR)
    assert torch.allclose(got.features[0].double(), preserved.features(sd, encoder.spec, chunk[0]), **NEAR)


@pytest.mark.parametrize("name", RATES)
def test_a_history_in_segments_equals_plain_sums_over_each(name):
    encoder, rate = random_encoder(rate=name), RATES[name]
    history = drawn(2, 3, 21, 9, 11)
    with torch.no_grad():
        got = encoder(history, ENDS).tokens
    sd = encoder.state_dict()
    for i in range(2):
        spans = chunks(ENDS, rate)
        parts = [preserved.tokens(sd, encoder.spec, rate, history[i, :, start:stop]) for start, stop in spans]
        assert torch.allclose(got[i].double(), torch.cat(parts), **NEAR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RATES)
def test_encoding_segments_as_they_come_equals_encoding_at_once(name, dtype):
    encoder = random_encoder(rate=name, dtype=dtype, cross_attention=True)
    history = drawn(2, 3, 21, 13, 18)
    with torch.no_grad():
        at_once = encoder(history, ENDS)
    alone = one_by_one(encoder, history, ENDS)
    assert at_once.tokens.dtype == dtype and at_once.tokens.shape[1] == token_count(RATES[name], 21, 13, 18)
    assert torch.allclose(at_once.tokens, alone.tokens, atol=1e-6)
    assert torch.allclose(at_once.features, alone.features, atol=1e-6)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_of_every_bucket_both_branches_have_one_grid_and_segments_may_come_alone(bucket, name):
    rate, (height, width) = RATES[name], (bucket[0] // 8, bucket[1] // 8)
    encoder = random_encoder(rate=name, channels=(1, 2, 2, 2), heads=1, in_channels=1, hidden=2, blocks=1)
    frames = 2 * rate.time
    history = drawn(1, 1, frames, height, width)
    with torch.no_grad():
        high = encoder.high(history).shape[2:]
        low = encoder.embed(low_latents(history, rate)).shape[2:]
        at_once = encoder(history, (rate.time, frames)).tokens
    assert tuple(high) == tuple(low) == token_grid(rate, 0, frames, height, width).shape
    alone = one_by_one(encoder, history, (rate.time, frames)).tokens
    assert at_once.shape[1] == token_count(rate, frames, height, width)
    assert torch.allclose(at_once, alone, atol=1e-6)


@settings(max_examples=20)
@given(st.sampled_from(list(RATES)), st.integers(1, 3), st.integers(8, 40), st.integers(8, 40))
def test_both_branches_have_one_grid_at_any_size(name, blocks, height, width):
    rate = RATES[name]
    encoder = PreservationEncoder(
        PreservationSpec(**{**TINY, "rate": name}), device="meta", operations=comfy.ops.disable_weight_init
    )
    history = torch.empty(1, 3, blocks * rate.time, height, width, device="meta")
    high, low = encoder.high(history).shape[2:], encoder.embed(low_latents(history, rate)).shape[2:]
    assert tuple(high) == tuple(low) == token_grid(rate, 0, blocks * rate.time, height, width).shape


def test_strides_are_the_block_of_the_rate():
    for name, table in STRIDES_OF_RATE.items():
        total = [1, 1, 1]
        for stride in table:
            total = [a * b for a, b in zip(total, stride)]
        assert tuple(total) == RATES[name].block
        assert [(time, height) for time, height, width in table] == preserved.TABLE[name]


@pytest.mark.parametrize("name", RATES)
def test_every_frame_row_and_column_reaches_a_token(name):
    """Those of a block, and in space what is left over too. Without attention, which spreads all over the chunk."""
    encoder, rate = random_encoder(rate=name, branches="high", blocks=0), RATES[name]
    frames, height, width = 2 * rate.time, 2 * rate.block[1] + 3, 2 * rate.block[2] + 1
    history = drawn(1, 3, frames, height, width).requires_grad_()
    encoder(history).tokens.square().sum().backward()
    reached = history.grad.abs()
    for axis in (2, 3, 4):
        others = [a for a in range(5) if a != axis]
        assert (reached.sum(dim=others) > 0).all(), axis


@pytest.mark.parametrize("name", RATES)
def test_a_token_sees_no_later_block(name):
    encoder, rate = random_encoder(rate=name, branches="high", blocks=0), RATES[name]
    history = drawn(1, 3, 3 * rate.time, 9, 9).requires_grad_()
    per_time = encoder.high(history)
    per_time[:, :, 1].square().sum().backward()
    by_frame = history.grad.abs().sum(dim=(0, 1, 3, 4))
    assert (by_frame[: 2 * rate.time] > 0).any() and not by_frame[2 * rate.time :].any()
    assert (by_frame[rate.time : 2 * rate.time] > 0).all()


def test_a_segment_is_encoded_alone():
    encoder = random_encoder(cross_attention=True)
    history = drawn(1, 3, 18, 9, 9)
    other = history.clone()
    other[:, :, :8] += 1
    with torch.no_grad():
        mine, theirs = encoder(history, (8, 18)), encoder(other, (8, 18))
    first = token_count(encoder.rate, 8, 9, 9)
    for a, b in zip(mine, theirs):
        assert torch.equal(a[:, first:], b[:, first:]) and not torch.isclose(a[:, :first], b[:, :first]).all(-1).any()


@pytest.mark.parametrize("name", RATES)
def test_tokens_stand_where_the_plan_says(name):
    """A change inside one block is seen by the one token whose place in the plan is that block's middle."""
    encoder, rate = random_encoder(rate=name, branches="low"), RATES[name]
    deep, tall, wide = rate.block
    frames, height, width = 2 * deep, 2 * tall + 1, 3 * wide + 3
    history = drawn(1, 3, frames, height, width)
    places = token_grid(rate, 0, frames, height, width).positions()
    for t, y, x in ((0, 0, 0), (1, 1, 2), (1, 0, 1)):
        other = history.clone()
        other[:, :, t * deep : (t + 1) * deep, y * tall : (y + 1) * tall, x * wide : (x + 1) * wide] += 1
        with torch.no_grad():
            moved = (encoder(history).tokens != encoder(other).tokens).any(-1)[0].nonzero().flatten().tolist()
        middle = (int((t + 0.5) * deep), int((y + 0.5) * rate.height), int((x + 0.5) * rate.width))
        assert moved == [places.index(middle)]


def test_a_fresh_encoder_is_the_low_branch_alone():
    base = torch.nn.Conv3d(3, 10, (1, 2, 2), stride=(1, 2, 2))
    both = initialise(random_encoder(), base.weight, base.bias)
    low = initialise(random_encoder(branches="low"), base.weight, base.bias)
    history = drawn(2, 3, 4, 17, 24)
    with torch.no_grad():
        assert torch.equal(both(history).tokens, low(history).tokens)
        assert not both.project(both.high(history).flatten(2).transpose(1, 2)).any()
    expected = preserved.patches(base.weight, base.bias, preserved.small_copy(both.rate, history[1]), (1, 2, 2))
    assert torch.allclose(both(history).tokens[1].double(), expected, **NEAR)


def test_branches_add():
    both = random_encoder()
    parts = [random_encoder(branches=name) for name in ("low", "high")]
    for part in parts:
        part.load_state_dict(both.state_dict(), strict=False)
    history = drawn(1, 3, 4, 16, 16)
    with torch.no_grad():
        low, high = (part(history).tokens for part in parts)
        assert torch.allclose(both(history).tokens, low + high, atol=1e-6)


@pytest.mark.parametrize("name", RATES)
def test_the_large_patchifier_begins_as_the_base_on_means(name):
    """FramePack's way to enlarge a patch embedding: on the means of each cell it says what the base's would."""
    rate = RATES[name]
    base = torch.nn.Conv3d(3, 10, (1, 2, 2), stride=(1, 2, 2))
    encoder = initialise(random_encoder(rate=name, branches="patchifier"), base.weight, base.bias)
    history = drawn(2, 3, 2 * rate.time, 17, 25)
    cell = (rate.time, rate.height, rate.width)
    means = F.avg_pool3d(history, cell, cell)
    expected = F.conv3d(means, base.weight, base.bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    got = encoder(history).tokens
    assert torch.allclose(got, expected, atol=1e-5)
    by_hand = preserved.patches(encoder.patchify.weight, encoder.patchify.bias, history[0], rate.block)
    assert torch.allclose(got[0].double(), by_hand, **NEAR)
    assert set(encoder.state_dict()) == {"patchify.weight", "patchify.bias"}


def wan(model_type: str, in_dim: int):
    return WanModel(
        model_type=model_type, in_dim=in_dim, out_dim=3, dim=24, ffn_dim=8, freq_dim=8, text_dim=8, num_heads=2,
        num_layers=1, image_model="wan2.1", operations=comfy.ops.manual_cast, dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize(("model_type", "in_dim"), [("t2v", 3), ("i2v", 7)])
def test_the_low_branch_says_what_wans_own_first_layer_says(model_type, in_dim):
    """Bit for bit, with mask and picture of an I2V model at zero, also in bf16."""
    first = wan(model_type, in_dim).patch_embedding
    torch.nn.init.normal_(first.weight)
    torch.nn.init.normal_(first.bias)
    spec = PreservationSpec.of(first, 3, branches="low", rate="2x2x2")
    assert (spec.hidden, spec.in_channels, spec.patch) == (24, 3, (1, 2, 2))
    encoder = PreservationEncoder(spec, dtype=torch.bfloat16, operations=comfy.ops.manual_cast)
    initialise(encoder, first.weight, first.bias)
    copy = drawn(1, 3, 2, 6, 7)
    padded = F.pad(copy, (0, 0, 0, 0, 0, 0, 0, in_dim - 3))
    with torch.no_grad():
        got = encoder.encode(drawn(1, 3, 4, 12, 14), copy).tokens
        assert torch.equal(got, first(padded).flatten(2).transpose(1, 2).to(torch.bfloat16))


def test_an_encoder_for_hunyuanvideos_first_layer():
    first = PatchEmbed(None, (1, 2, 2), 16, 24, conv3d=True, operations=comfy.ops.manual_cast).proj
    spec = PreservationSpec.of(first, 16, rate="2x2x8", branches="high", cross_attention=True)
    assert (spec.hidden, spec.rate, spec.features) == (24, "2x2x8", 512)


def test_a_copy_that_was_encoded_again_is_taken_in_place_of_the_shrunk_latents():
    encoder, history = random_encoder(), drawn(2, 3, 9, 17, 18)
    copy = drawn(2, 3, *low_size(encoder.rate, 9, 17, 18), seed=4)
    with torch.no_grad():
        got = encoder(history, (4, 9), copy).tokens
        own = encoder(history, (4, 9), low_latents(history, encoder.rate)).tokens
        assert torch.equal(own, encoder(history, (4, 9)).tokens)
    sd = encoder.state_dict()
    parts = [preserved.features(sd, encoder.spec, history[1, :, a:b]) for a, b in ((0, 4), (4, 8))]
    residual = preserved.linear(sd, "project", torch.cat(parts))
    expected = residual + preserved.patches(sd["embed.weight"], sd["embed.bias"], copy[1], (1, 2, 2))
    assert torch.allclose(got[1].double(), expected, **NEAR)


@pytest.mark.parametrize("name", RATES)
def test_a_short_history_has_no_tokens_yet_and_new_frames_wait(name):
    rate = RATES[name]
    encoder = random_encoder(rate=name, cross_attention=True)
    for frames in (0, rate.time - 1):
        got = encoder(drawn(2, 3, frames, 9, 9))
        assert got.tokens.shape == (2, 0, 10) and got.features.shape == (2, 0, 8)
    history = drawn(1, 3, 2 * rate.time - 1, 9, 9)
    with torch.no_grad():
        assert torch.equal(encoder(history).tokens, encoder(history[:, :, : rate.time]).tokens)
    assert random_encoder(rate=name)(history[:, :, :0]).features is None


def test_bf16_stays_near_fp32():
    exact, rough = random_encoder(), random_encoder(dtype=torch.bfloat16)
    history = drawn(2, 3, 8, 17, 18)
    with torch.no_grad():
        a, b = exact(history).tokens, rough(history).tokens
    assert b.dtype == torch.bfloat16
    assert float((a - b.float()).norm() / a.norm()) < 0.03


def test_in_training_gradients_reach_everything_but_the_bases_embedding():
    for branches, trained in (("both", 32), ("high", 32), ("patchifier", 2), ("low", 0)):
        encoder = random_encoder(branches=branches).requires_grad_(True)
        tokens = encoder(drawn(1, 3, 8, 16, 16), (4, 8)).tokens
        if trained:
            (tokens * drawn(*tokens.shape, seed=9)).sum().backward()
        got = {name for name, value in encoder.named_parameters() if value.grad is not None and value.grad.any()}
        blind = {name for name in dict(encoder.named_parameters()) if name.endswith("key.bias")}  # softmax cancels it
        every = {name for name in dict(encoder.named_parameters()) if not name.startswith("embed.")}
        assert got - blind == every - blind and len(every) == trained, branches
        assert tokens.requires_grad == bool(trained)


def test_the_frozen_embedding_says_so_itself():
    frozen = [name for name, value in random_encoder().named_parameters() if not value.requires_grad]
    assert frozen == ["embed.weight", "embed.bias"]


def test_a_fresh_encoder_learns_from_the_first_step_on():
    encoder = initialise(random_encoder())
    history, wanted = drawn(1, 3, 4, 16, 16), drawn(1, 8, 10, seed=3)
    optimiser = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (encoder(history).tokens - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_gradients_equal_finite_differences():
    encoder = random_encoder(seed=3, branches="high").double()
    encoder.dtype = torch.float64
    history = drawn(1, 3, 4, 9, 9).double()
    probe = drawn(1, 2, 10, seed=9).double()
    (encoder(history).tokens * probe).sum().backward()
    for name in ("high.convolutions.1.conv.weight", "high.attention.0.query.weight", "high.attention.1.out.weight"):
        weight = encoder.get_parameter(name)
        flat, gradient, step = weight.data.view(-1), weight.grad.view(-1), 1e-5
        at = int(gradient.abs().argmax())
        values = []
        for change in (step, -2 * step, step):
            flat[at] += change
            with torch.no_grad():
                values.append((encoder(history).tokens * probe).sum().item())
        assert gradient[at].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5), name


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_description_and_weights_go_to_a_file_and_back(branches, dtype):
    spec = PreservationSpec(**TINY, rate="2x2x4", branches=branches, cross_attention=branches in ("both", "high"))
    assert PreservationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    encoder = random_encoder(dtype=dtype, **{k: v for k, v in spec.to_dict().items() if k not in TINY})
    back = PreservationEncoder(spec, dtype=dtype, operations=comfy.ops.manual_cast)
    back.load_state_dict(load(save(encoder.state_dict())))
    history = drawn(2, 3, 9, 9, 9)
    with torch.no_grad():
        for a, b in zip(encoder(history), back(history)):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_fresh_encoder_follows_its_seed_and_leaves_no_weight_undefined():
    made = [initialise(random_encoder(seed=n), seed=5).state_dict() for n in range(2)]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    other = initialise(random_encoder(), seed=6).state_dict()
    assert not torch.equal(other["high.convolutions.0.conv.weight"], made[0]["high.convolutions.0.conv.weight"])


WRONG_SPECS = [
    ({"rate": "4x4x4"}, "rate '4x4x4'"),
    ({"branches": "hr"}, "both, low, high, patchifier"),
    ({"patch": (1, 1, 1)}, "not 1x1x1"),
    ({"heads": 3}, "do not suit 3 heads"),
    ({"channels": (4, 8)}, "Expected 4 widths"),
    ({"branches": "low", "cross_attention": True}, "Expected both or high"),
]


@pytest.mark.parametrize(("options", "said"), WRONG_SPECS)
def test_a_description_that_cannot_be_built_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        PreservationSpec(**{**TINY, **options})


def test_a_description_of_another_version_is_refused():
    data = PreservationSpec(**TINY).to_dict()
    with pytest.raises(ValueError, match="newer version: depth"):
        PreservationSpec.from_dict({**data, "depth": 3})
    with pytest.raises(ValueError, match="not complete"):
        PreservationSpec.from_dict({"hidden": 8})
    with pytest.raises(ValueError, match="not complete"):
        PreservationSpec.from_dict({k: v for k, v in data.items() if k != "hidden"})


def test_what_does_not_fit_the_encoder_is_refused():
    encoder = random_encoder()
    with pytest.raises(PlanError, match="at least 8x8.*Nearest valid: 8x9"):
        encoder(drawn(1, 3, 4, 7, 9))
    with pytest.raises(PlanError, match="at least 8x8"):
        encoder.encode(drawn(1, 3, 4, 7, 9))
    with pytest.raises(ValueError, match="chunk of 3 latent frames.*multiple of 2.*Nearest valid: 4"):
        encoder.encode(drawn(1, 3, 3, 9, 9))
    with pytest.raises(ValueError, match="4 channels, the encoder reads 3"):
        encoder(drawn(1, 4, 4, 9, 9))
    with pytest.raises(ValueError, match="segments to frame 5.*at most the 4"):
        encoder(drawn(1, 3, 4, 9, 9), (2, 5))
    with pytest.raises(ValueError, match="copy of 3x2x2.*2x2x2 latent frames"):
        encoder(drawn(1, 3, 4, 9, 9), (2, 4), drawn(1, 3, 3, 2, 2))
