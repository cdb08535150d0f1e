"""Tokens of frame preservation in FramePack's visual sequence: against plain sums, and without them nothing changes."""

from __future__ import annotations

import dataclasses
import math

import comfy.samplers
import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.flux.layers import timestep_embedding

from benchmarks import parity_models as pm
from frame_memory.model import framepack, key_map
from frame_memory.model.packing import ContextLayout, pad_end

from . import checkpoint_files as cf

PLACES = [(0, 1, 2), (3, 0, 0), (700, 3, 5)]
GROUPS = ((2, (17, 18)), (1, (0, 19)))


@pytest.fixture(scope="module")
def network():
    return pm.make_ours(cf.tiny_reference())


def given(batch: int = 1, lengths=(7,)):
    return pm.make_inputs(8, 12, (20, 21), GROUPS, batch=batch, text_lengths=lengths, image_tokens=5, text_features=64)


def tokens(batch: int, width: int):
    return torch.randn(batch, len(PLACES), width, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def run(network, inputs, memory=None, places=PLACES, **options):
    extra = {} if memory is None else {"frame_memory_tokens": memory, "frame_memory_positions": torch.as_tensor(places)}
    return network(
        inputs.window_BCTHW, inputs.timestep_B, inputs.text_BLD, y=inputs.pooled_BD, clip_fea=inputs.image_BND,
        guidance=torch.full((len(inputs.window_BCTHW),), inputs.guidance), attention_mask=inputs.mask_BL(),
        context_latents=list(inputs.context), context_layout=ContextLayout(inputs.positions, inputs.groups),
        **extra, **options,
    )  # fmt: skip


# --- plain sums -----------------------------------------------------------------------------------------------------


def turning(place) -> torch.Tensor:
    """Complex rotations `[64]` of a token at (t, h, w): 8, 28 and 28 pairs, theta 256."""
    parts = []
    for value, width in zip(place, (16, 56, 56), strict=True):
        parts += [
            complex(math.cos(a), math.sin(a)) for a in (value / 256 ** (2 * i / width) for i in range(width // 2))
        ]
    return torch.tensor(parts, dtype=torch.complex64)


def attend(q, k, v, table):
    """`[N, heads, 128]` each; tokens turned, then a plain softmax for each head."""

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * table[:, None]
        return torch.view_as_real(pairs).flatten(-2)

    q, k = turned(q), turned(k)
    weights = torch.einsum("nad,mad->anm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("anm,mad->nad", weights.softmax(-1), v).flatten(1)


def split(qkv, norm, heads):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(1)
    return norm.query_norm(q), norm.key_norm(k), v


def normed(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def double(block, img, txt, img_rows, txt_rows, table):
    """rows: for every token the vector that its modulation is made of."""

    def mods(layer, rows):
        return layer.lin(F.silu(rows)).chunk(6, -1)

    i, t = mods(block.img_mod, img_rows), mods(block.txt_mod, txt_rows)
    ready_i = block.img_attn.qkv(normed(img) * (1 + i[1]) + i[0])
    ready_t = block.txt_attn.qkv(normed(txt) * (1 + t[1]) + t[0])
    parts = zip(
        split(ready_t, block.txt_attn.norm, block.num_heads), split(ready_i, block.img_attn.norm, block.num_heads)
    )
    out = attend(*(torch.cat(pair) for pair in parts), table)
    img = img + block.img_attn.proj(out[len(txt) :]) * i[2]
    txt = txt + block.txt_attn.proj(out[: len(txt)]) * t[2]
    img = img + block.img_mlp(normed(img) * (1 + i[4]) + i[3]) * i[5]
    return img, txt + block.txt_mlp(normed(txt) * (1 + t[4]) + t[3]) * t[5]


def single(block, x, rows, table):
    shift, scale, gate = block.modulation.lin(F.silu(rows)).chunk(3, -1)
    made = block.linear1(normed(x) * (1 + scale) + shift)
    out = attend(*split(made[:, : 3 * x.shape[1]], block.norm, block.num_heads), table)
    return x + block.linear2(torch.cat((out, block.mlp_act(made[:, 3 * x.shape[1] :])), -1)) * gate


@torch.no_grad()
def expected(network, inputs, memory, i=0):
    """One sample's velocity: sequence, positions and modulation by hand."""

    def vector(timestep):
        vec = network.time_in(timestep_embedding(timestep[i : i + 1], 256, time_factor=1.0))
        vec = vec + network.vector_in(inputs.pooled_BD[i : i + 1])
        return vec + network.guidance_in(timestep_embedding(torch.tensor([inputs.guidance]), 256))

    noisy, clean = vector(inputs.timestep_B), vector(torch.zeros_like(inputs.timestep_B))
    text = network.txt_in(inputs.text_BLD[i : i + 1, : inputs.text_lengths[i]], inputs.timestep_B[i : i + 1], None)
    txt = torch.cat((network.image_projection(inputs.image_BND[i : i + 1]), text), 1)[0]
    frames, grid = inputs.window_BCTHW.shape[2], (4, 6)
    parts, table = [memory[i]], [turning(place) for place in PLACES]
    for (rate, times), latent in zip(inputs.groups, inputs.context, strict=True):
        conv = {1: network.clean_x_embedder.proj, 2: network.clean_x_embedder.proj_2x}[rate]
        parts.append(conv(pad_end(latent[i : i + 1], (rate, 2 * rate, 2 * rate)))[0].flatten(1).T)
        for t in range(0, len(times), rate):
            for y in range(0, grid[0], rate):
                for x in range(0, grid[1], rate):
                    cell = [(times[t + a], y + b, x + c) for a in range(rate) for b in range(rate) for c in range(rate)]
                    table.append(torch.stack([turning(place) for place in cell]).mean(0))
    parts.append(network.img_in(inputs.window_BCTHW[i : i + 1])[0])
    table += [turning((t, y, x)) for t in inputs.positions for y in range(grid[0]) for x in range(grid[1])]
    img = torch.cat(parts)
    table = torch.cat((torch.ones(len(txt), 64, dtype=torch.complex64), torch.stack(table)))
    img_rows = torch.cat([clean] * len(PLACES) + [noisy] * (len(img) - len(PLACES)))
    txt_rows = torch.cat([noisy] * len(txt))
    for block in network.double_blocks:
        img, txt = double(block, img, txt, img_rows, txt_rows, table)
    x, rows = torch.cat((txt, img)), torch.cat((txt_rows, img_rows))
    for block in network.single_blocks:
        x = single(block, x, rows, table)
    out = network.final_layer(x[None, -frames * 24 :], noisy)[0].reshape(frames, *grid, 16, 2, 2)
    return out.permute(3, 0, 1, 4, 2, 5).reshape(16, frames, 8, 12)


def test_tokens_equal_plain_sums(network):
    inputs = given(batch=2, lengths=(7, 4))
    memory = tokens(2, network.hidden_size)
    got = run(network, inputs, memory)
    for i in range(2):
        assert torch.allclose(got[i], expected(network, inputs, memory, i), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(got, run(network, inputs), atol=1e-3)


def test_tokens_of_a_frame_stand_where_the_frame_would(network):
    """At timestep 0, where all tokens are modulated alike, they are worth a context group of the same tokens."""
    inputs = given()
    inputs.timestep_B.zero_()
    with torch.no_grad():
        memory = network.clean_x_embedder(inputs.context[1][:, :, :1], 1)
    places = [(33, y, x) for y in range(4) for x in range(6)]
    shown = dataclasses.replace(
        inputs, groups=((1, (33,)), *GROUPS), context=(inputs.context[1][:, :, :1], *inputs.context)
    )  # fmt: skip
    assert torch.allclose(run(network, inputs, memory, places), run(network, shown), atol=1e-5)


def test_no_tokens_change_nothing(network):
    inputs = given(batch=2)
    plain = run(network, inputs)
    none = torch.zeros(2, 0, network.hidden_size)
    assert torch.equal(run(network, inputs, none, torch.zeros(0, 3)), plain)
    assert framepack.token_conditions(none, []) == {} and framepack.token_conditions(None) == {}


def test_they_reach_the_network_through_core_s_sampler():
    framepack.register()
    model = comfy.sd.load_diffusion_model_state_dict(key_map.convert_diffusers(cf.tiny_reference()))
    inputs, memory = given(), tokens(1, model.model.diffusion_model.hidden_size)
    context = {"latents": list(inputs.context), "layout": ContextLayout(inputs.positions, inputs.groups)}

    def sample(**model_conds):
        guider = comfy.samplers.CFGGuider(model)
        entry = {"pooled_output": inputs.pooled_BD, "frame_context": context, "model_conds": model_conds}
        guider.set_conds([[inputs.text_BLD[:, :7], entry]], [[inputs.text_BLD[:, :7], entry]])
        noise = inputs.window_BCTHW
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"),
                                 torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True, seed=0)  # fmt: skip

    plain, conds = sample(), framepack.token_conditions(memory, PLACES)
    assert not torch.equal(sample(**conds), plain) and torch.equal(sample(), plain)
    entry = {"frame_context": context, "model_conds": conds}
    more = model.model.extra_conds_shapes(**entry)["context_latents"][2]
    assert more == model.model.extra_conds_shapes(frame_context=context)["context_latents"][2] + 4 * len(PLACES)
