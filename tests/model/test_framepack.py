"""The FramePack model as core's MODEL: packing against a naive twin, and what every core model can do."""

from __future__ import annotations

import comfy.conds
import comfy.model_detection
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import parity_models
from frame_memory.model import checkpoint, framepack
from frame_memory.model.key_map import convert_diffusers
from frame_memory.model.packing import CleanEmbedder, ContextLayout, grid_rope, packed_rope, pooled_rope
from frame_memory.plan import PRESETS, parse_schedule, plan_sections, section_tokens


@pytest.fixture(scope="module")
def reference_sd():
    return parity_models.make_reference(seed=0, heads=1, double=1, single=2, text_features=64).state_dict()


@pytest.fixture(scope="module")
def native_file(reference_sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "framepack.safetensors"
    save_file({k: v.contiguous() for k, v in convert_diffusers(reference_sd).items()}, str(path))
    return str(path)


@pytest.fixture
def patcher(native_file):
    framepack.register()
    return comfy.sd.load_diffusion_model(native_file)


def context(height=6, width=10, batch=1, preset="F1 forward"):
    section = plan_sections(PRESETS[preset], sections=2).sections[1]
    layout = ContextLayout(section.positions, tuple((g.kernel, g.positions) for g in section.groups))
    g = torch.Generator().manual_seed(3)
    latents = [torch.randn(batch, 16, len(p), height, width, generator=g) for _, p in layout.groups]
    return {"latents": latents, "layout": layout}


def guider(model, **extra):
    g = torch.Generator().manual_seed(1)
    cond = {"pooled_output": torch.randn(1, 768, generator=g), "frame_context": context(), **extra}
    conds = [[torch.randn(1, 7, 64, generator=g), cond]]
    made = comfy.samplers.CFGGuider(model)
    made.set_conds(conds, conds)
    return made


@torch.inference_mode()
def sample(model, **extra):
    noise = torch.randn(1, 16, 9, 6, 10, generator=torch.Generator().manual_seed(2))
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.6, 0.0])
    return guider(model, **extra).sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)


# --- packing against a naive twin -------------------------------------------------------------------------------


def naive_tokens(conv, latent, kernel):
    """Each token by hand: clamp indices past the end, gather the cell, one dot product."""
    kt, kh, kw = kernel
    _, _, t, h, w = latent.shape
    tokens = []
    for a in range(-(-t // kt)):
        for b in range(-(-h // kh)):
            for c in range(-(-w // kw)):
                frames = [min(a * kt + i, t - 1) for i in range(kt)]
                rows = [min(b * kh + i, h - 1) for i in range(kh)]
                columns = [min(c * kw + i, w - 1) for i in range(kw)]
                cell = latent[:, :, frames][:, :, :, rows][:, :, :, :, columns]
                tokens.append(torch.einsum("bcthw,dcthw->bd", cell, conv.weight) + conv.bias)
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize(("rate", "name"), [(1, "proj"), (2, "proj_2x"), (4, "proj_4x")])
@pytest.mark.parametrize("size", [(16, 6, 10), (5, 14, 22), (1, 2, 2), (3, 4, 18)])
def test_context_tokens_equal_a_naive_loop(rate, name, size):
    torch.manual_seed(0)
    embedder = CleanEmbedder(16, 8, operations=torch.nn)
    latent = torch.randn(2, 16, *size)
    with torch.no_grad():
        expected = naive_tokens(getattr(embedder, name), latent, (rate, 2 * rate, 2 * rate))
        assert torch.allclose(embedder(latent, rate), expected, atol=1e-5)


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("grid", [(3, 5), (7, 11), (1, 1), (8, 4)])
def test_rotary_table_equals_a_naive_mean_of_phases(rate, grid):
    from comfy.ldm.flux.layers import EmbedND

    embed, positions = EmbedND(128, 256, [16, 56, 56]), tuple(range(4, 4 + 5))
    full = grid_rope(embed, positions, *grid, "cpu")
    cells = []
    for a in range(-(-5 // rate)):
        for b in range(-(-grid[0] // rate)):
            for c in range(-(-grid[1] // rate)):
                picks = [
                    full[min(a * rate + i, 4), min(b * rate + j, grid[0] - 1), min(c * rate + k, grid[1] - 1)]
                    for i in range(rate)
                    for j in range(rate)
                    for k in range(rate)
                ]
                cells.append(torch.stack(picks).mean(0))
    assert torch.allclose(pooled_rope(full, rate, 5), torch.stack(cells), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *PRESETS.values(),
        "f1k1_x_g9_f1k1f2k2f16k8_td",
        "f1k1_ta_f16k4f2k2f1k1_g9",
        "f1k1_x_g9_f1k1f2k2f16k4_tc",
        "f1k1_g3",
    ],
)
def test_every_schedule_s_tokens_and_positions_agree_with_the_plan(text):
    """Sequence length by the plan's arithmetic equals the tokens the network really makes, tails and k8 included."""
    from comfy.ldm.flux.layers import EmbedND

    from frame_memory.model.context import gather_context

    embedder, embed = CleanEmbedder(16, 4, operations=torch.nn), EmbedND(128, 256, [16, 56, 56])
    plan = plan_sections(parse_schedule(text), sections=4)
    video = torch.randn(1, 16, plan.total_frames, 14, 10)
    for section in plan.sections:
        packed = gather_context(section, video, video[:, :, :1], video[:, :, :1], 0.0)
        count = section_tokens(section, 14, 10, image_tokens=0)
        groups = packed.layout.groups
        tokens = sum(embedder(c, rate).shape[1] for c, (rate, _) in zip(packed.latents, groups, strict=True))
        frames = tuple(c.shape[2] for c in packed.latents)
        assert tokens == count.context
        assert packed_rope(embed, packed.layout, frames, 7, 5, "cpu").shape[2] == count.video


# --- a core model -----------------------------------------------------------------------------------------------


def test_stock_loader_detects_framepack_and_plain_hunyuan_stays_plain(patcher, native_file, reference_sd):
    assert type(patcher.model).__name__ == "FramePack" and framepack.is_framepack(patcher)
    native = convert_diffusers(reference_sd)
    plain = {k: v for k, v in native.items() if not k.startswith(("clean_x_embedder", "image_projection"))}
    other = comfy.sd.load_diffusion_model_state_dict(plain)
    assert type(other.model).__name__ == "HunyuanVideo" and not framepack.is_framepack(other)


def test_registering_twice_changes_nothing():
    framepack.register()
    before = list(comfy.supported_models.models)
    framepack.register()
    assert comfy.supported_models.models == before
    assert [m.__name__ for m in before].count("FramePackConfig") == 1


def test_same_inputs_same_output_and_clones_agree(patcher):
    first = sample(patcher)
    assert torch.equal(first, sample(patcher))
    assert torch.equal(first, sample(patcher.clone()))


def test_unload_and_reload_agree(patcher):
    first = sample(patcher)
    comfy.model_management.unload_all_models()
    assert torch.equal(first, sample(patcher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_other_weight_dtypes_stay_near(native_file, patcher, dtype):
    small = comfy.sd.load_diffusion_model(native_file, model_options={"dtype": dtype})
    full, low = sample(patcher), sample(small)
    assert torch.isfinite(low).all()
    limit = 0.25 if dtype == torch.float8_e4m3fn else 0.05
    assert float((low - full).square().mean().sqrt() / full.square().mean().sqrt()) < limit


def test_partly_loaded_weights_agree(patcher):
    full = sample(patcher)
    other = patcher.clone()
    comfy.model_management.unload_all_models()
    other.partially_load(torch.device("cpu"), 1)
    assert torch.allclose(full, sample(other), atol=1e-5)


def test_memory_estimate_counts_the_history(patcher):
    bare = patcher.model.memory_required([1, 16, 9, 76, 80])
    cond = {"frame_context": context(76, 80)}
    shapes = {k: [v] for k, v in patcher.model.extra_conds_shapes(**cond).items()}
    packed = patcher.model.memory_required([1, 16, 9, 76, 80], cond_shapes=shapes)
    # 9 frames of window; 2 at full rate, 2 at an eighth, 16 at a sixty-fourth
    assert packed / bare == pytest.approx((9 + 2 + 2 / 8 + 16 / 64) / 9, rel=1e-3)


def test_guidance_default_is_ten(patcher):
    assert torch.equal(sample(patcher), sample(patcher, guidance=10.0))
    assert not torch.equal(sample(patcher), sample(patcher, guidance=6.0))


def test_positive_and_negative_are_computed_alone_whatever_memory_is_free(patcher):
    """In one batch, as core would where memory allows, their last bits differ: a resume must not depend on that."""
    calls = []

    def count(executor, x, *args, **kwargs):
        calls.append(x.shape[0])
        return executor(x, *args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    made = guider(clone)
    made.set_cfg(2.0)
    noise = torch.randn(1, 16, 9, 6, 10)
    with torch.inference_mode():
        made.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]))
    assert calls == [1, 1]


def test_batch_with_unlike_prompts_equals_single_runs(patcher):
    net = patcher.model.diffusion_model
    g = torch.Generator().manual_seed(5)
    text, y = torch.randn(2, 6, 64, generator=g), torch.randn(2, 768, generator=g)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    x, t = torch.randn(2, 16, 9, 7, 9, generator=g), torch.tensor([700.0, 300.0])
    packed = context(7, 9, batch=2)

    def run(rows, length, mask=None):
        with torch.no_grad():
            return net(
                x[rows], t[rows], context=text[rows, :length], y=y[rows],
                guidance=torch.tensor([10.0]).expand(len(t[rows])), attention_mask=mask,
                context_latents=[c[rows] for c in packed["latents"]],
                context_layout=packed["layout"], transformer_options={},
            )  # fmt: skip

    both = run(slice(0, 2), 6, mask)
    assert torch.allclose(both[:1], run(slice(0, 1), 3), atol=1e-5)
    assert torch.allclose(both[1:], run(slice(1, 2), 6), atol=1e-5)


def test_context_windows_keep_history_whole_and_move_positions(patcher):
    class Window:
        index_list = [2, 3, 4]
        causal_anchor_index = 0

    layout = context()["layout"]
    made = patcher.model.resize_cond_for_context_window(
        "context_layout", comfy.conds.CONDConstant(layout), Window(), None, "cpu"
    )
    assert made.cond.positions == tuple(layout.positions[i] for i in (0, 2, 3, 4))
    latents = comfy.conds.CONDList(context()["latents"])
    assert patcher.model.resize_cond_for_context_window("context_latents", latents, Window(), None, "cpu") is latents


def test_fault_48_wrappers_of_other_packs_fire_at_every_level(patcher):
    from comfy.patcher_extension import WrappersMP

    fired = []
    clone = patcher.clone()
    for level in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        clone.add_wrapper_with_key(
            level, "probe", lambda e, *a, _level=level, **k: (fired.append(_level), e(*a, **k))[1]
        )
    plain = sample(patcher)
    assert torch.equal(sample(clone), plain)
    assert set(fired) == {WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL}


def test_our_loader_and_the_stock_one_agree(patcher, reference_sd, tmp_path):
    path = tmp_path / "FramePackI2V_tiny.safetensors"
    save_file({k: v.contiguous() for k, v in reference_sd.items()}, str(path))
    assert torch.equal(sample(checkpoint.load_framepack(str(path))), sample(patcher))
