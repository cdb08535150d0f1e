"""Helios on core's Wan blocks: against diffusers' own class, from files that diffusers wrote."""

from __future__ import annotations

import copy
import json

import comfy.ldm.wan.model
import comfy.model_base
import comfy.samplers
import comfy.sd
import pytest
import torch
from diffusers import HeliosTransformer3DModel

from benchmarks.parity_models import randomise, relative_rms
from frame_memory.model import checkpoint, families, helios, wan
from frame_memory.model.packing import ContextLayout
from frame_memory.model.tensor_file import real

from . import checkpoint_files as cf
from . import wan_reference as reference

FP32_BOUND, BF16_BOUND = 1e-5, 1e-2
TEXT = 24
# As the pipeline lays them out; and with other numbers of frames, that fill no whole cell of 2x and 4x.
PUBLISHED = ContextLayout(tuple(range(20, 29)), ((4, tuple(range(1, 17))), (2, (17, 18)), (1, (0,)), (1, (19,))))
ODD = ContextLayout((9, 10), ((4, (1, 2, 3, 4, 5)), (2, (6, 7, 8)), (1, (0, 8))))


@pytest.fixture(scope="module")
def theirs():
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 320, "text_dim": TEXT}
    model = HeliosTransformer3DModel(**config).eval()
    randomise(model, 0)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """diffusers' folder of three shards with an index and a configuration."""
    path = tmp_path_factory.mktemp("helios")
    theirs.save_pretrained(path / "transformer", max_shard_size="4MB")
    assert len(list((path / "transformer").glob("*-of-*.safetensors"))) > 2
    return path


def load(path, dtype=torch.float32):
    return helios.load_helios(str(path), {"dtype": dtype})


@pytest.fixture(scope="module")
def ours(folder):
    return load(folder)


def test_messages_name_the_node_that_loads_it(ours):
    assert families.loader_of(ours) == "Load Memory Model"


def inputs(layout: ContextLayout, size: tuple[int, int], batch: int = 2) -> dict:
    """Window, timesteps, text and a latent for each group, in model space."""
    return {
        "x": reference.drawn(batch, 16, len(layout.positions), *size, seed=2),
        "timestep": torch.tensor([731.3, 42.0])[:batch],
        "text": reference.drawn(batch, 5, TEXT, seed=3),
        "groups": [reference.drawn(batch, 16, len(p), *size, seed=5 + i) for i, (_, p) in enumerate(layout.groups)],
    }


@torch.inference_mode()
def run_theirs(model, layout, given, dtype=torch.float32):
    """diffusers takes groups of one rate side by side."""
    merged = {}
    for rate, word in {1: "short", 2: "mid", 4: "long"}.items():
        picked = [(p, c) for (r, p), c in zip(layout.groups, given["groups"], strict=True) if r == rate]
        merged[f"indices_latents_history_{word}"] = torch.tensor([[i for p, _ in picked for i in p]])
        merged[f"latents_history_{word}"] = torch.cat([c for _, c in picked], dim=2).to(dtype)
    batch = given["x"].shape[0]
    return model(
        given["x"].to(dtype), given["timestep"], given["text"].to(dtype),
        indices_hidden_states=torch.tensor([layout.positions]).expand(batch, -1),
        **{k: v.expand(batch, -1) if k.startswith("indices") else v for k, v in merged.items()},
    ).sample  # fmt: skip


@torch.inference_mode()
def run_ours(patcher, layout, given, dtype=torch.float32):
    wrappers = patcher.get_wrappers("diffusion_model", wan.KEY)
    options = {"wrappers": {"diffusion_model": {wan.KEY: wrappers}}}
    past = {wan.CONTEXT: [c.to(dtype) for c in given["groups"]], wan.LAYOUT: layout}
    return patcher.model.diffusion_model(
        given["x"].to(dtype), given["timestep"], given["text"].to(dtype), transformer_options=options, **past
    )


SIZES = [(PUBLISHED, (6, 10)), (PUBLISHED, (8, 16)), (ODD, (2, 6)), (ODD, (14, 22))]


@pytest.mark.parametrize("layout,size", SIZES)
def test_forward_pass_equals_diffusers(theirs, ours, layout, size):
    """Grids of 3x5, 4x8, 1x3 and 7x11 tokens a frame; two samples at two timesteps."""
    given = inputs(layout, size)
    truth, got = run_theirs(theirs, layout, given), run_ours(ours, layout, given)
    assert got.shape == truth.shape == given["x"].shape
    assert relative_rms(got, truth) <= FP32_BOUND
    assert (got - truth).abs().max() <= FP32_BOUND * truth.abs().max()


def test_what_is_left_is_the_rounding_of_large_timesteps(theirs, ours):
    """diffusers and core reach the frequencies by exp and by pow; the phases differ in proportion to the timestep."""
    given = {**inputs(ODD, (6, 10)), "timestep": torch.tensor([1.0, 0.0])}
    assert relative_rms(run_ours(ours, ODD, given), run_theirs(theirs, ODD, given)) <= FP32_BOUND / 10


def test_a_bf16_network_is_near(theirs, folder):
    """Nearer to the fp32 truth than diffusers' own network in bf16, which keeps 1.5 %."""
    given, bf16 = inputs(PUBLISHED, (6, 10)), torch.bfloat16
    truth = run_theirs(theirs, PUBLISHED, given)
    half = copy.deepcopy(theirs).bfloat16()
    ours, own = run_ours(load(folder, bf16), PUBLISHED, given, bf16), run_theirs(half, PUBLISHED, given, bf16)
    assert relative_rms(ours, truth) <= min(relative_rms(own, truth), BF16_BOUND)


@pytest.mark.parametrize("rule", ["text", "timestep", "position"])
def test_the_bound_notices_a_broken_rule(theirs, folder, rule):
    given, layout = inputs(PUBLISHED, (6, 10)), PUBLISHED
    truth, patcher = run_theirs(theirs, layout, given), load(folder)
    if rule == "text":
        for block in patcher.model.diffusion_model.blocks:
            block.cross_attn.__class__ = comfy.ldm.wan.model.WanT2VCrossAttention
    elif rule == "timestep":
        given = {**given, "timestep": given["timestep"] + 1.0}
    else:
        layout = ContextLayout(layout.positions, (*layout.groups[:3], (1, (18,))))
    assert relative_rms(run_ours(patcher, layout, given), truth) > 100 * FP32_BOUND


# ---- a MODEL of core's ---------------------------------------------------------------------------------------------


def test_without_history_it_is_core_s_wan_bit_for_bit(folder, ours):
    _, stored, metadata = helios.open_state_dict(str(folder))
    plain = {k: real(v) for k, v in stored.items() if not k.startswith("proj")}
    core = comfy.sd.load_diffusion_model_state_dict(plain, {"dtype": torch.float32}, metadata=metadata)
    assert type(ours.model) is type(core.model) is comfy.model_base.WAN21
    assert type(ours.model.diffusion_model) is comfy.ldm.wan.model.WanModel
    assert ours.model.state_dict().keys() == core.model.state_dict().keys()
    given = inputs(ODD, (5, 7))
    with torch.inference_mode():
        made = [m.model.diffusion_model(given["x"], given["timestep"], given["text"]) for m in (ours, core)]
    assert torch.equal(*made)


@torch.inference_mode()
def sample(model):
    given = inputs(PUBLISHED, (6, 10), batch=1)
    context = {"latents": given["groups"], "layout": PUBLISHED}
    conds = [[given["text"], {"model_conds": wan.conditions(model.model, context=context)}]]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conds, conds)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.6, 0.0])
    noise = given["x"]
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)


def test_core_samples_it_and_its_clones(folder, ours):
    wanted = sample(ours)
    assert torch.isfinite(wanted).all() and wan.is_attached(ours)
    assert torch.equal(sample(ours.clone()), wanted)
    # As core makes one for another device: from the file again.
    fresh = ours.clone(force_deepcopy=True)
    assert fresh.model is not ours.model and torch.equal(sample(fresh), wanted)


def test_its_videos_are_made_at_24_frames_a_second(ours):
    """Other models on Wan 2.1's latents make 16; the section loop asks this note first."""
    assert families.said(ours)[families.FPS_SAID] == 24 and families.why_no_history(ours) is None


def test_fp8_is_for_the_matrices_of_the_blocks(folder):
    network = load(folder, torch.float8_e4m3fn).model.diffusion_model
    few = {name for name, value in network.state_dict().items() if value.dtype == torch.float8_e4m3fn}
    assert few == {k for k, v in network.state_dict().items() if k.startswith("blocks.") and v.ndim == 2}


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors(theirs):
    return theirs.state_dict()


@pytest.mark.parametrize("given", ["folder", "any shard", "transformer.", "model.diffusion_model."])
def test_a_checkpoint_by_any_of_its_names_is_the_same(tmp_path, folder, tensors, ours, given):
    path = folder / "transformer"
    if given == "any shard":
        path = sorted(path.glob("*.safetensors"))[1]
    elif given != "folder":
        path = cf.write_file(tmp_path / "helios.safetensors", {given + k: v for k, v in tensors.items()})
    loaded = load(path)
    sides = [m.get_additional_models_with_key(wan.KEY)[0].model.state_dict() for m in (loaded, ours)]
    for got, wanted in (sides, [m.model.state_dict() for m in (loaded, ours)]):
        assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_every_tensor_is_used_once(tensors):
    table = helios.names(2)
    own = {k for k in tensors if k.startswith(("patch_short", "patch_mid", "patch_long"))}
    assert len(own) == 6 and set(table.values()) == set(tensors) - own and len(set(table.values())) == len(table)


def test_a_tensor_that_diffusers_passes_over_is_passed_over(tmp_path, tensors, ours):
    more = {**tensors, "blocks.0.attn2.norm_added_q.weight": torch.ones(256)}
    loaded = load(cf.write_file(tmp_path / "a.safetensors", more))
    assert loaded.model.state_dict().keys() == ours.model.state_dict().keys()


def test_the_report_counts_what_the_folder_holds(folder, tensors):
    info, numbers = helios.inspect(str(folder)), sum(v.numel() for v in tensors.values())
    files = list((folder / "transformer").glob("*.safetensors"))
    assert (info.tensors, info.dtypes, len(info.shards)) == (len(tensors), (("F32", numbers),), len(files))
    assert info.bytes == sum(f.stat().st_size for f in files)
    assert info.report()[1] == f"in the file: F32 {numbers / 1e6:.1f} M"


BROKEN = {
    "missing": (lambda sd: sd.pop("blocks.1.attn2.norm_k.weight"), "is missing blocks.1.attn2.norm_k.weight"),
    "left over": (lambda sd: sd.update(extra=torch.zeros(1)), "Helios does not know: extra"),
    "amplified": (lambda sd: sd.update({"blocks.0.attn1.history_key_scale": torch.ones(2)}), "amplifies the history"),
    "two models": (
        lambda sd: sd.update({"proj_out.bias": torch.zeros(3)}),
        r"head.head.bias is \[3\], expected \[64\]",
    ),
    "other patches": (
        lambda sd: sd.update({"patch_mid.bias": torch.zeros(3)}),
        r"patch_mid is \[3\], expected \[256\]",
    ),
    "Wan": (lambda sd: [sd.pop(k) for k in list(sd) if k.startswith("patch_long")], "It looks like Wan"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_helios_is_refused_by_name(tmp_path, tensors, fault):
    change, said = BROKEN[fault]
    sd = dict(tensors)
    change(sd)
    path = cf.write_file(tmp_path / "a.safetensors", sd)
    with pytest.raises(ValueError, match=said) as caught:
        load(path)
    assert path in str(caught.value) and "'Load Memory Model'" in str(caught.value)


def test_another_configuration_is_refused(tmp_path, tensors):
    path = cf.write_file(tmp_path / "a.safetensors", tensors)
    settings = {"_class_name": "HeliosTransformer3DModel", "zero_history_timestep": False, "rope_dim": [44, 42, 42]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="says zero_history_timestep False, expected True: core's Wan blocks cannot"):
        load(path)


def test_loaders_name_each_other_s_files_and_missing_shards(tmp_path, folder):
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    with pytest.raises(checkpoint.CheckpointError, match="It looks like Helios, which goes into 'Load Memory Model'"):
        checkpoint.inspect(str(folder))
    (tmp_path / shards[0].name).write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match="00002-of.* then run 'Load Memory Model' again"):
        load(tmp_path / shards[0].name)


@pytest.mark.parametrize("pipeline", ["HeliosPipeline", "HeliosPyramidPipeline"])
def test_checkpoints_that_grow_in_size_are_refused_by_the_index_beside_them(tmp_path, tensors, pipeline):
    (tmp_path / "transformer").mkdir()
    path = cf.write_file(tmp_path / "transformer" / "a.safetensors", tensors)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if pipeline == "HeliosPipeline":
        assert helios.inspect(path).tensors == len(tensors)
    else:
        with pytest.raises(checkpoint.CheckpointError, match="this is Helios-Mid or Helios-Distilled .* Helios-Base"):
            helios.inspect(path)
