"""History beside Wan's window: against plain sums, and nothing attached against core's own Wan bit for bit."""

from __future__ import annotations

import math

import comfy.patcher_extension
import pytest
import torch

from frame_memory.model import wan
from frame_memory.model.packing import ContextLayout

from . import wan_reference as reference

BOUND = 2e-5  # fp32 against float64, of values around 1
LAYOUT = ContextLayout((18, 19), ((4, (1, 2, 3, 4, 5)), (2, (16, 17)), (1, (0, 17))))
PLACES = ((0, 1, 1), (0, 1, 2), (300, 0, 0))


@pytest.fixture(scope="module", params=reference.FAMILIES)
def loaded(request):
    patcher = reference.load(request.param)
    patchifiers = wan.patchifiers_of(patcher)
    with torch.no_grad():
        for index, value in enumerate(patchifiers.parameters()):
            value += 0.1 * reference.drawn(*value.shape, seed=index) / value[0].numel() ** 0.5
    return request.param, patcher, patchifiers


def inputs(family: str, batch: int = 1, size=(2, 5, 6), dtype=torch.float32) -> dict:
    channels, _, vision = reference.FAMILIES[family]
    made = {
        "x": reference.drawn(batch, channels, *size, seed=2),
        "timestep": torch.tensor([700.0, 350.0])[:batch],
        "context": reference.drawn(batch, 4, 24, seed=3),
        "clip_fea": reference.drawn(batch, 3, 1280, seed=4) if vision else None,
    }
    return {k: v if v is None or k == "timestep" else v.to(dtype) for k, v in made.items()}


def latents(family: str, layout=LAYOUT, batch: int = 1, size=(5, 6)) -> list:
    channels = reference.FAMILIES[family][1]
    return [reference.drawn(batch, channels, len(t), *size, seed=10 + i) for i, (_, t) in enumerate(layout.groups)]


def history(family: str, batch: int = 1, layout=LAYOUT, size=(5, 6)) -> dict:
    return {
        wan.CONTEXT: latents(family, layout, batch, size),
        wan.LAYOUT: layout,
        wan.TOKENS: reference.drawn(batch, len(PLACES), 128, seed=9),
        wan.POSITIONS: torch.tensor(PLACES),
    }


@torch.inference_mode()
def run(patcher, patchifiers, given: dict, options=None, **extra):
    """The network as core's BaseModel calls it, with our wrapper where there are patchifiers."""
    options = dict(options or {})
    if patchifiers is not None:
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        options["wrappers"] = {kind: {wan.KEY: [wan._Wrapper(patchifiers)]}}
    given = dict(given)
    order = [given.pop(name) for name in ("x", "timestep", "context")]
    return patcher.model.diffusion_model(*order, transformer_options=options, **given, **extra)


def expected(family, patcher, patchifiers, given, past, sample=0):
    sd = patcher.model.diffusion_model.state_dict()
    out = reference.FAMILIES[family][1]
    convs = {4: patchifiers.proj_4x, 2: patchifiers.proj_2x, 1: patchifiers.proj}
    groups = []
    for (rate, times), latent in zip(past[wan.LAYOUT].groups, past[wan.CONTEXT], strict=True):
        groups.append((rate, times, convs[rate].weight, convs[rate].bias, latent[sample]))
    steps = given["timestep"][sample].reshape(-1).expand(given["x"].shape[2])
    image = None if given["clip_fea"] is None else given["clip_fea"][sample]
    memory = (past[wan.TOKENS][sample], PLACES) if wan.TOKENS in past else None
    positions = past[wan.LAYOUT].positions
    text = given["context"][sample]
    with torch.no_grad():
        return reference.forward(sd, given["x"][sample], steps, text, image, groups, memory, positions, out)


def test_context_and_memory_equal_plain_sums(loaded):
    family, patcher, patchifiers = loaded
    given, past = inputs(family, batch=2), history(family, batch=2)
    got = run(patcher, patchifiers, given, **past)
    assert got.shape == (2, reference.FAMILIES[family][1], 2, 5, 6)
    for sample in range(2):
        assert torch.allclose(got[sample].double(), expected(family, patcher, patchifiers, given, past, sample),
                              atol=BOUND, rtol=BOUND)  # fmt: skip
    assert not torch.allclose(got, run(patcher, patchifiers, given), atol=1e-2)


def test_a_timestep_a_frame_as_wan_2_2_5b_has_them():
    family = "2.2 TI2V 5B"
    patcher = reference.load(family)
    patchifiers = wan.patchifiers_of(patcher)
    given, past = {**inputs(family), "timestep": torch.tensor([[0.0, 650.0]])}, history(family)
    got = run(patcher, patchifiers, given, **past)
    assert torch.allclose(got[0].double(), expected(family, patcher, patchifiers, given, past), atol=BOUND, rtol=BOUND)


@pytest.mark.parametrize("part", ["context", "memory", "window"])
def test_each_part_alone_equals_plain_sums(loaded, part):
    family, patcher, patchifiers = loaded
    given, past = inputs(family), history(family)
    if part != "memory":
        del past[wan.TOKENS], past[wan.POSITIONS]
    if part != "context":
        past[wan.CONTEXT], past[wan.LAYOUT] = [], ContextLayout((40, 43), ())
    got = run(patcher, patchifiers, given, **past)
    assert torch.allclose(got[0].double(), expected(family, patcher, patchifiers, given, past), atol=BOUND, rtol=BOUND)


def test_memory_without_a_layout_leaves_the_window_where_core_places_it(loaded):
    family, patcher, patchifiers = loaded
    past = history(family)
    del past[wan.CONTEXT], past[wan.LAYOUT]
    placed = {**past, wan.CONTEXT: [], wan.LAYOUT: ContextLayout((0, 1), ())}
    given = inputs(family)
    got = run(patcher, patchifiers, given, **past)
    assert torch.allclose(got, run(patcher, patchifiers, given, **placed), atol=1e-6)


# --- nothing attached is core's Wan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 5, 6), (1, 4, 4), (3, 7, 3)])
@pytest.mark.parametrize("patched", [False, True])
def test_without_history_it_is_core_s_wan_bit_for_bit(dtype, size, patched):
    for family in reference.FAMILIES:
        patcher = reference.load(family, dtype)
        given = inputs(family, batch=2, size=size, dtype=dtype)
        options, seen = others() if patched else ({}, [])
        plain = run(patcher, None, given, options)
        assert torch.equal(plain, run(patcher, wan.patchifiers_of(patcher), given, options))
        assert plain.dtype == dtype and len(seen) == (6 if patched else 0)


def others():
    """What other packs put into `transformer_options`: a replaced block, patches behind blocks, stretched positions."""
    seen = []

    def block(args, extra):
        out = extra["original_block"]({**args, "img": args["img"] * 1.5})
        seen.append(("block", args["img"].shape[1], args["vec"].shape, args["pe"].shape[1]))
        return out

    def behind(args):
        offset = args["img_offset"]
        args["img"][:, offset] += 1  # the first token of the window
        seen.append(("behind", args["img"].shape[1], offset, args["vec"].shape))
        return args

    options = {
        "patches_replace": {"dit": {("double_block", 1): block}},
        "patches": {"double_block": [behind], "attn2_patch": [lambda args: args["x"] * 1.1]},
        "rope_options": {"scale_t": 1.5, "shift_y": 2.0},
    }
    return options, seen


def test_what_others_patch_goes_on_working_with_history(loaded):
    family, patcher, patchifiers = loaded
    options, seen = others()
    before = repr({k: sorted(map(str, v)) for k, v in options.items()})
    given, past = inputs(family), history(family)
    patched = run(patcher, patchifiers, given, options, **past)
    assert not torch.allclose(patched, run(patcher, patchifiers, given, **past), atol=1e-3)
    behind, window = 2 * 1 * 1 + 1 * 2 * 2 + 2 * 9 + len(PLACES), 18
    assert [s[1] for s in seen] == [window + behind, window + behind, window]
    assert [s[2] for s in seen if s[0] == "behind"] == [0, 0]  # the window is where it is without history
    assert repr({k: sorted(map(str, v)) for k, v in options.items()}) == before


@pytest.mark.parametrize("behind", [1, 2, 3, 7, 12, 24, 36, 97])
@pytest.mark.parametrize("window,rows", [
    (1, 1), (5, 1), (18, 1), (36, 1), (97, 1), (36, 3), (36, 36), (35, 4), (180, 1), (180, 5),
])  # fmt: skip
def test_rows_are_spread_to_the_right_tokens(behind, window, rows):
    """Against a loop over tokens; of a window of rows alone, core's own rule says which token has which."""
    from comfy.ldm.wan.model import repeat_e

    tokens = torch.zeros(2, window + behind, 5)
    clean, vec = torch.full((1, 1, 6, 5), -1.0), torch.rand(2, rows, 6, 5)
    made = wan.modulation_rows(vec, clean, window, behind)
    own = repeat_e(vec[:, :, 2], tokens[:, :window]).expand(-1, window, -1)
    got = repeat_e(made[:, :, 2], tokens)
    assert got.shape == tokens.shape
    for token in range(window + behind):
        assert torch.equal(got[:, token], own[:, token] if token < window else clean[:, 0, 2].expand(2, -1))
    assert wan.modulation_rows(vec, clean, window, 0) is vec


@pytest.mark.parametrize("size", [(480, 832), (416, 608), (672, 992), (624, 624), (720, 1280)])
@pytest.mark.parametrize("frames,rows", [(20, 1), (9, 1), (20, 20)])
def test_few_rows_of_modulation_are_enough_whatever_the_history(size, frames, rows):
    """Bytes of a row are those of 14B: 6 x 5120 in bf16. A row a token was 3.4 GiB at 672x992."""
    area = math.prod(side // 16 for side in size)
    for behind in (1, area // 7, 2503, 3926, 6563, 8191, 8192 + 6563, frames * area):
        made = wan.modulation_rows(torch.ones(1, rows, 6, 1), torch.zeros(1, 1, 6, 1), frames * area, behind)
        assert made.shape[1] * 6 * 5120 * 2 < 40 * 2**20
        assert made.shape[1] <= -(-(frames * area + behind) // (min(size) // 16))


# --- patchifiers ----------------------------------------------------------------------------------------------------


def test_patchifiers_begin_as_the_base_s_embedding_of_cell_means(loaded):
    """For image-to-video each cell is a given frame's: a mask of ones, and itself as image."""
    family, patcher, _ = loaded
    fresh = wan.patchifiers_of(patcher)
    base = patcher.model.diffusion_model.patch_embedding
    channels, out, _ = reference.FAMILIES[family]
    video = reference.drawn(2, out, 8, 16, 8, seed=5)
    for rate in (1, 2, 4):
        means = torch.zeros(2, out, 8 // rate, 16 // rate, 8 // rate)
        for t in range(rate):
            for y in range(rate):
                for x in range(rate):
                    means += video[:, :, t::rate, y::rate, x::rate] / rate**3
        if channels != out:  # core's order: noise, mask, image
            means = torch.cat([means, torch.ones_like(means[:, :4]), means], 1)
        with torch.no_grad():
            assert torch.allclose(fresh(video, rate), base(means).flatten(2).transpose(1, 2), atol=1e-5)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in fresh.parameters())
    assert {name.split(".")[0] for name in fresh.state_dict()} == {"proj", "proj_2x", "proj_4x"}


def test_patchifiers_have_gradients_through_the_blocks():
    """With core's own switch for training; no weight of the base gets one."""
    import comfy.model_management

    patcher = reference.load("2.1 T2V")
    patchifiers, given = wan.patchifiers_of(patcher), inputs("2.1 T2V")
    past = history("2.1 T2V")
    past[wan.TOKENS].requires_grad_(True)
    was, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            wrapped = run.__wrapped__(patcher, patchifiers, given, **past)
            wrapped.square().mean().backward()
    finally:
        comfy.model_management.in_training = was
    assert all(bool(p.grad.abs().sum() > 0) for p in patchifiers.parameters())
    assert bool(past[wan.TOKENS].grad.abs().sum() > 0)
    assert all(p.grad is None for p in patcher.model.diffusion_model.parameters())


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change,said", [
    ({wan.LAYOUT: ContextLayout((1, 2, 3), LAYOUT.groups)}, "3 positions for 2 latent frames"),
    ({wan.LAYOUT: ContextLayout((1, 2), LAYOUT.groups[:2])}, "3 context tensors for 2 groups"),
    ({wan.CONTEXT: latents("2.1 T2V", size=(4, 6))}, "4, 6"),
    ({"time_dim_concat": torch.zeros(1, 16, 1, 5, 6)}, "time_dim_concat"),
    ({"context_latents": [torch.zeros(1, 16, 1, 5, 6)]}, "context_latents"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, said):
    patcher = reference.load("2.1 T2V")
    with pytest.raises(ValueError, match=said):
        run(patcher, wan.patchifiers_of(patcher), inputs("2.1 T2V"), **{**history("2.1 T2V"), **change})
