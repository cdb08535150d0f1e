"""LoRAs of all styles, exact against merging them into the file before conversion."""

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import pytest
import torch

from benchmarks import parity_models as pm
from frame_memory.model import framepack, key_map, lora
from frame_memory.model.experts import expert_of
from frame_memory.sampling.identity import model_fields

from . import checkpoint_files as cf

HIDDEN = 128
# A name of each style: (prefix, what stands for the module, tensor names of the two factors).
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")


@pytest.fixture(scope="module")
def patcher(native):
    framepack.register()
    return comfy.sd.load_diffusion_model_state_dict(dict(native))


def matrices(sd, only=""):
    """Module names of all 2-D weights."""
    return [k.removesuffix(".weight") for k, v in sd.items() if k.endswith(".weight") and v.ndim == 2 and only in k]


def make_lora(sd, modules, name_of, factors, *, ranks=(1, 4, 7), alpha=None, seed=0):
    """(file tensors, merged copy of `sd` at strength 1): W + alpha / rank * up @ down, computed in fp64."""
    generator = torch.Generator().manual_seed(seed)
    file, merged = {}, dict(sd)
    for i, module in enumerate(modules):
        out, into = sd[f"{module}.weight"].shape
        rank = ranks[i % len(ranks)]
        down, up = torch.randn(rank, into, generator=generator) / into**0.5, torch.randn(out, rank, generator=generator)
        name = name_of(module)
        file[f"{name}.{factors[0]}"], file[f"{name}.{factors[1]}"] = down, up
        scale = 1.0
        if alpha is not None:
            file[f"{name}.alpha"] = torch.tensor(float(alpha))
            scale = alpha / rank
        merged[f"{module}.weight"] = (sd[f"{module}.weight"].double() + scale * (up.double() @ down.double())).float()
    return file, merged


def patched_weights(patcher):
    """The network's numbers while the patches are in, after which they are taken out again."""
    patcher.patch_model()
    try:
        return {k: v.detach().clone() for k, v in patcher.model.diffusion_model.state_dict().items()}
    finally:
        patcher.unpatch_model()


def assert_equal(got, expected, strength=1.0, base=None):
    for key, value in expected.items():
        wanted = value if base is None else base[key] + strength * (value - base[key])
        assert (got[key] - wanted).abs().max() <= 2e-6 * wanted.abs().max().clamp(min=1), key


def kohya(prefix):
    return lambda module: prefix + module.replace(".", "_")


def dotted(prefix):
    return lambda module: prefix + module


FRAMEPACK_STYLES = [
    (kohya("lora_unet_"), KOHYA, 4, "FramePack in kohya (musubi) names"),
    (kohya("lora_transformer_"), KOHYA, 1, "FramePack in kohya (musubi) names"),
    (dotted("transformer."), PEFT, None, "FramePack in diffusers names"),
    (dotted("diffusion_model."), PEFT, None, "FramePack in diffusers names"),
    (dotted("base_model.model."), PEFT, None, "FramePack in diffusers names"),
    (dotted(""), PEFT, 8, "FramePack in diffusers names"),
    (dotted("transformer."), ("lora_A.default.weight", "lora_B.default.weight"), None, "FramePack in diffusers names"),
]


@pytest.mark.parametrize("name_of,factors,alpha,style", FRAMEPACK_STYLES)
@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_framepack_styles_equal_merging_before_conversion(
    patcher, reference, native, name_of, factors, alpha, style, strength
):
    # every matrix of the file, norm_out with its swapped halves among them
    file, merged = make_lora(reference, matrices(reference), name_of, factors, alpha=alpha)
    before = {k: v.clone() for k, v in file.items()}
    clone, match = lora.apply_lora(patcher, file, strength)
    assert (match.matched, match.total, match.unmatched, match.style) == (len(file) // (2 + bool(alpha)),) * 2 + (
        (),
        style,
    )
    assert match.warnings == () and match.share == 1.0
    assert_equal(patched_weights(clone), key_map.convert_diffusers(merged), strength, native)
    restored = patcher.model.diffusion_model.state_dict()
    assert all(torch.equal(restored[k], native[k]) for k in native)
    assert all(torch.equal(file[k], before[k]) for k in before) and not patcher.patches


ORIGINAL_NAMES = {
    "double_blocks.0.img_attn.qkv": "double_blocks.0.img_attn_qkv",
    "double_blocks.0.txt_attn.proj": "double_blocks.0.txt_attn_proj",
    "double_blocks.0.img_mlp.0": "double_blocks.0.img_mlp.fc1",
    "double_blocks.0.txt_mlp.2": "double_blocks.0.txt_mlp.fc2",
    "double_blocks.0.img_mod.lin": "double_blocks.0.img_mod.linear",
    "single_blocks.1.linear1": "single_blocks.1.linear1",
    "single_blocks.0.linear2": "single_blocks.0.linear2",
    "single_blocks.1.modulation.lin": "single_blocks.1.modulation.linear",
    "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
    "txt_in.individual_token_refiner.blocks.0.mlp.0": "txt_in.individual_token_refiner.blocks.0.mlp.fc1",
    "final_layer.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}


def test_at_strength_0_a_model_is_as_without_it(patcher, reference):
    file, _ = make_lora(reference, matrices(reference), dotted("transformer."), PEFT)
    clone, match = lora.apply_lora(patcher, file, 0.0)
    assert clone is not patcher and match.matched == match.total and model_fields(clone) == model_fields(patcher)
    with pytest.raises(lora.LoraError):
        lora.apply_lora(patcher, {"no.lora_A.weight": torch.zeros(2, 2)}, 0.0)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lora_unet_"])
def test_original_hunyuan_and_kohya_hunyuan_names(patcher, native, prefix):
    flat = prefix.endswith("_")

    def name_of(module):
        return prefix + (ORIGINAL_NAMES[module].replace(".", "_") if flat else ORIGINAL_NAMES[module])

    file, merged = make_lora(native, list(ORIGINAL_NAMES), name_of, KOHYA if flat else PEFT, alpha=2 if flat else None)
    clone, match = lora.apply_lora(patcher, file)
    assert match.matched == match.total == len(ORIGINAL_NAMES)
    assert match.style == ("HunyuanVideo in kohya names" if flat else "HunyuanVideo in original names")
    assert_equal(patched_weights(clone), merged)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_stock_lora_loader_handles_original_hunyuan_names(patcher, native, prefix):
    modules = [m for m in ORIGINAL_NAMES if not m.startswith("final_layer")]
    file, merged = make_lora(native, modules, lambda m: prefix + ORIGINAL_NAMES[m], PEFT)
    stock, _ = comfy.sd.load_lora_for_models(patcher, None, file, 0.7, 0.0)  # what LoraLoaderModelOnly calls
    ours, _ = lora.apply_lora(patcher, file, 0.7)
    assert len(stock.patches) == len(modules)
    got, expected = patched_weights(stock), patched_weights(ours)
    assert_equal(got, merged, 0.7, native)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_what_the_stock_lora_loader_misses(patcher, native, reference):
    """The reason for a loader node: if core learns these names, this test says so."""
    missed = [m for m in ORIGINAL_NAMES if "mlp" in m or "mod" in m and "adaLN" not in m]
    kohya_file, _ = make_lora(native, missed, lambda m: "lora_unet_" + ORIGINAL_NAMES[m].replace(".", "_"), KOHYA)
    diffusers_file, _ = make_lora(reference, matrices(reference, "attn.to_"), dotted("transformer."), PEFT)
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    for file in (kohya_file, diffusers_file):
        assert comfy.lora.load_lora(file, names, log_missing=False) == {}
        assert lora.match_lora(file, patcher.model).share == 1.0


def test_two_loras_stack_and_one_comes_off(patcher, reference, native):
    first, merged_first = make_lora(reference, matrices(reference, "attn.to_"), kohya("lora_unet_"), KOHYA, alpha=4)
    second, merged_second = make_lora(reference, matrices(reference, "single"), dotted("transformer."), PEFT, seed=1)
    one, _ = lora.apply_lora(patcher, first, 0.5)
    both, _ = lora.apply_lora(one, second, 1.5)
    a, b = key_map.convert_diffusers(merged_first), key_map.convert_diffusers(merged_second)
    expected = {k: native[k] + 0.5 * (a[k] - native[k]) + 1.5 * (b[k] - native[k]) for k in native}
    assert_equal(patched_weights(both), expected)
    assert_equal(patched_weights(one), a, 0.5, native)


def _loha(generator, out, into, rank):
    w = [torch.randn(s, generator=generator) / 3 for s in ((out, rank), (rank, into), (out, rank), (rank, into))]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, w)), (w[0] @ w[1]) * (w[2] @ w[3])


def _lokr(generator, out, into, rank):
    w1, w2 = torch.randn(2, 4, generator=generator), torch.randn(out // 2, into // 4, generator=generator) / 10
    return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)


@pytest.mark.parametrize("kind", [_loha, _lokr])
@pytest.mark.parametrize("name_of", [kohya("lora_unet_"), kohya("lycoris_"), dotted("transformer.")])
def test_loha_and_lokr_on_fused_and_swapped_tensors(patcher, reference, native, kind, name_of):
    generator = torch.Generator().manual_seed(3)
    modules = [
        "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.add_v_proj", "norm_out.linear",
        "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.0.attn.to_q",
    ]  # fmt: skip
    file, merged = {}, dict(reference)
    for module in modules:
        weight = reference[f"{module}.weight"]
        parts, delta = kind(generator, *weight.shape, 4)
        file.update({f"{name_of(module)}.{k}": v for k, v in parts.items()})
        merged[f"{module}.weight"] = weight + delta
    clone, match = lora.apply_lora(patcher, file)
    assert match.matched == match.total == len(modules)
    assert_equal(patched_weights(clone), key_map.convert_diffusers(merged))


def test_biases_and_whole_differences_land_in_their_rows(patcher, reference, native):
    """Core's own loader drops a bias that belongs to rows of a fused tensor."""
    generator = torch.Generator().manual_seed(4)
    file, merged = {}, dict(reference)
    for module in ("transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp", "norm_out.linear"):
        for param, name in (("weight", "diff"), ("bias", "diff_b")):
            delta = torch.randn(reference[f"{module}.{param}"].shape, generator=generator)
            file[f"diffusion_model.{module}.{name}"] = delta
            merged[f"{module}.{param}"] = reference[f"{module}.{param}"] + delta
    clone, match = lora.apply_lora(patcher, file, 0.25)
    assert match.share == 1.0
    assert_equal(patched_weights(clone), key_map.convert_diffusers(merged), 0.25, native)


def test_whole_replacement_of_the_swapped_layer(patcher, reference):
    weight = torch.randn(reference["norm_out.linear.weight"].shape)
    clone, _ = lora.apply_lora(patcher, {"transformer.norm_out.linear.set_weight": weight})
    got = patched_weights(clone)["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(got, torch.cat([weight[HIDDEN:], weight[:HIDDEN]]))


def test_lora_on_a_scaled_fp8_model(tmp_path, reference):
    from frame_memory.model import checkpoint

    sd, layers = cf.scaled_fp8(reference, lambda key, w: torch.tensor(0.004))
    model = checkpoint.load_framepack(cf.write_file(tmp_path / "a.safetensors", sd, cf.as_metadata(layers)))
    file, _ = make_lora(reference, matrices(reference, "attn.to_"), kohya("lora_unet_"), KOHYA, alpha=1)
    clone, match = lora.apply_lora(model, file)
    assert match.share == 1.0
    meaning = cf.dequantised(sd)
    merged = dict(meaning)
    for module in matrices(reference, "attn.to_"):
        down, up = (file["lora_unet_" + module.replace(".", "_") + f".lora_{n}.weight"] for n in ("down", "up"))
        merged[f"{module}.weight"] = meaning[f"{module}.weight"] + up @ down / down.shape[0]
    clone.patch_model()
    got = cf.weight_of(clone, "single_blocks.0.linear1.weight")
    clone.unpatch_model()
    expected = key_map.convert_diffusers(merged)["single_blocks.0.linear1.weight"]
    assert pm.relative_rms(got, expected) <= 0.05  # core rounds the patched weight to fp8 again, with noise


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_fault_38_partial_match_is_counted_and_warned_of(patcher, reference):
    modules = matrices(reference, "transformer_blocks.0")
    file, _ = make_lora(reference, modules[:2], kohya("lora_unet_"), KOHYA, alpha=1)
    strange = {f"lora_unet_other_{i}.lora_down.weight": torch.zeros(1, 4) for i in range(3)}
    strange.update({f"lora_unet_other_{i}.lora_up.weight": torch.zeros(4, 1) for i in range(3)})
    match = lora.match_lora({**file, **strange}, patcher.model)
    assert (match.matched, match.total, match.share) == (2, 5, 0.4)
    assert match.unmatched == ("lora_unet_other_0", "lora_unet_other_1", "lora_unet_other_2")
    report = match.report()
    assert "2 of 5" in report and "40%" in report and "lora_unet_other_1" in report and "less than half" in report


def test_fault_38_nothing_matched_is_an_error_with_three_keys(patcher):
    file = {f"lora_unet_zzz_{i}.lora_{n}.weight": torch.zeros(2, 2) for i in range(5) for n in ("down", "up")}
    with pytest.raises(lora.LoraError) as raised:
        lora.apply_lora(patcher, file)
    message = str(raised.value)
    assert all(key in message for key in list(file)[:3]) and "'Load Video LoRA'" in message
    assert not patcher.patches


@pytest.mark.parametrize(
    "file", [{}, {"lora_unet_zzz_0.lora_down.weight": torch.zeros(2, 2)}], ids=["empty", "strange"]
)
def test_fault_38_the_opt_out_hands_the_model_on_unchanged(patcher, native, file):
    clone, match = lora.apply_lora(patcher, file, allow_none=True)
    assert (match.matched, match.total, match.share, match.patches) == (0, len(file), 0.0, {})
    report = match.report()
    assert f"0 of {len(file)}" in report and "Warning" in report and "'Load Video LoRA'" in report
    assert clone is not patcher and not clone.patches
    got = patched_weights(clone)
    assert all(torch.equal(got[k], native[k]) for k in native)


@pytest.mark.parametrize(
    "module,family",
    [
        ("diffusion_model.blocks.0.cross_attn.k", "Wan"),
        ("lora_unet_blocks_3_self_attn_q", "Wan"),
        ("transformer.joint_blocks.0.x_block.attn.qkv", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "Stable Diffusion 1, 2 or XL"),
        ("transformer.transformer_blocks.0.attn1.to_q", "LTX-Video"),
        ("transformer.transformer_blocks.0.img_mlp.net.2", "Qwen-Image"),
    ],
)
def test_fault_39_other_families_are_named(patcher, module, family):
    file = {f"{module}.lora_down.weight": torch.zeros(2, 8), f"{module}.lora_up.weight": torch.zeros(8, 2)}
    with pytest.raises(lora.LoraError, match=family):
        lora.match_lora(file, patcher.model)


def test_fault_39_right_names_of_another_width_are_refused(patcher):
    name = "transformer.double_blocks.0.img_attn_qkv"
    file = {f"{name}.lora_A.weight": torch.zeros(4, 2048), f"{name}.lora_B.weight": torch.zeros(6144, 4)}
    with pytest.raises(lora.LoraError, match="6144 rows where this model has 384"):
        lora.match_lora(file, patcher.model)
    flat = "lora_unet_transformer_blocks_0_attn_to_q"
    file = {f"{flat}.lora_down.weight": torch.zeros(4, 256), f"{flat}.lora_up.weight": torch.zeros(128, 4)}
    with pytest.raises(lora.LoraError, match="256 columns where this model has 128"):
        lora.match_lora(file, patcher.model)


def test_fault_39_a_flux_lora_is_doubted():
    """FLUX has the same names and, at full width, the same shapes; only the count of blocks differs."""

    targets = {}
    for kind, count in (("double", 19), ("single", 38)):
        for i in range(count):
            target = lora.Target(f"{kind}_blocks.{i}.linear", "", key_map.GLOBAL_ROWS[0])
            targets[f"{kind}{i}"] = (target, lora.FRAMEPACK_NAMES)
    assert any("FLUX" in w for w in lora._warnings(57, 57, targets, 0))
    del targets["single37"]
    assert not lora._warnings(56, 56, targets, 0)


def test_text_encoder_parts_are_left_out_and_said(patcher, reference):
    file, _ = make_lora(reference, matrices(reference, "proj_mlp"), kohya("lora_unet_"), KOHYA)
    file["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(2, 2)
    match = lora.match_lora(file, patcher.model)
    assert match.share == 1.0 and "1 tensors for a text encoder" in match.report()


def test_a_file_that_is_no_lora(patcher):
    with pytest.raises(lora.LoraError, match="no LoRA"):
        lora.match_lora({}, patcher.model)


def test_fault_39_on_another_family_core_names_count(native, reference):
    """Plain HunyuanVideo has the same blocks under names that core knows; Stable Diffusion not even a count of them."""
    plain = {k: v for k, v in native.items() if not k.startswith(("clean_x_embedder.", "image_projection."))}
    hunyuan = comfy.sd.load_diffusion_model_state_dict(plain)
    config = comfy.supported_models.SD15({"disable_unet_model_creation": True})
    diffusion = comfy.model_base.BaseModel(config, device="cpu")
    file, _ = make_lora(reference, matrices(reference, "proj_mlp"), kohya("lora_unet_"), KOHYA)
    for model, name in ((hunyuan.model, "HunyuanVideo"), (diffusion, "BaseModel")):
        with pytest.raises(lora.LoraError, match=f"fits this {name} model.*made for this model in 'Load Video LoRA'"):
            lora.match_lora(file, model)
    rows, columns = native["double_blocks.0.img_attn.proj.weight"].shape
    name = "transformer.double_blocks.0.img_attn_proj"
    file = {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    match = lora.match_lora(file, hunyuan.model)
    assert match.share == 1.0 and list(match.patches) == ["diffusion_model.double_blocks.0.img_attn.proj.weight"]


@pytest.fixture(scope="module")
def flux():
    """A tiny Flux: core maps the diffusers names to rows of its fused tensors."""
    config = {
        "image_model": "flux", "hidden_size": 32, "depth": 1, "depth_single_blocks": 1, "num_heads": 2,
        "in_channels": 16, "out_channels": 16, "context_in_dim": 16, "vec_in_dim": 16, "mlp_ratio": 2.0,
        "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "guidance_embed": False, "patch_size": 2,
        "txt_ids_dims": [],
    }  # fmt: skip
    model = comfy.model_base.Flux(comfy.supported_models.Flux(config), device="cpu")
    for value in model.diffusion_model.parameters():
        torch.nn.init.normal_(value, std=0.02, generator=torch.Generator().manual_seed(value.numel()))
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def test_fault_39_a_model_whose_names_mean_rows_of_fused_tensors(flux):
    """Each name changes its rows and no others; a wrong count of rows is refused, as of whole tensors."""
    name, fused = "transformer.transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv"
    generator = torch.Generator().manual_seed(7)
    down, up, bias = (torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2), (32,)))
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.diff_b": bias}
    whole = "transformer.transformer_blocks.0.attn.to_out.0"
    file |= {f"{whole}.lora_A.weight": down, f"{whole}.lora_B.weight": up}
    before = patched_weights(flux)
    clone, match = lora.apply_lora(flux, file)
    assert match.share == 1.0 and match.total == 2, match.report()
    got = patched_weights(clone)
    expected = {k: v.clone() for k, v in before.items()}
    expected[f"{fused}.weight"][32:64] += up @ down
    expected[f"{fused}.bias"][32:64] += bias
    expected["double_blocks.0.img_attn.proj.weight"] += up @ down
    assert_equal(got, expected)
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.zeros(96, 2)}
    with pytest.raises(lora.LoraError, match="96 rows where this model has 32"):
        lora.match_lora(file, flux.model)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", "low"),
        ("Wan22_FFGO-LoRA-HIGH_bf16.safetensors", "high"),
        ("10_LargeMixedDatset_wan_14bLow_f81_LongCaption/checkpoint-600.safetensors", "low"),
        ("wan_14bLow_f81_r128.safetensors", "low"),
        ("i2vLOW_style.safetensors", "low"),
        ("low/style-high.safetensors", "high"),
        ("LowNoise_v2.safetensors", "low"),
        ("wan_low_vram_high_noise.safetensors", "high"),
        ("wan_low_vram_style.safetensors", None),
        ("low-poly_style.safetensors", None),
        ("highlands.safetensors", None),
        ("HIGH_and_LOW.safetensors", None),
        ("follow.safetensors", None),
    ],
)
def test_the_expert_is_read_from_the_name_of_the_file(name, expert):
    assert expert_of(name) == expert
