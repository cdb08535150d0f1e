"""fp8 and int8 by core's quantised operations: what is rounded, which products are taken, and what it costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from benchmarks import parity_models as pm
from benchmarks import precision
from frame_memory.model import checkpoint, key_map, quantised
from frame_memory.model.quantised import FP8, INT8, ROUND_TO

from . import checkpoint_files as cf

BF16, F32 = torch.bfloat16, torch.float32
LAYOUTS = {FP8: "TensorCoreFP8E4M3Layout", INT8: "TensorWiseINT8Layout"}
# What core calls once for each product in a format: the rounding of what goes into fp8's (a CPU then has no product of
# two fp8 matrices, and core multiplies what they stand for), and int8's whole layer.
PRODUCTS = {FP8: "comfy_kitchen::quantize_fp8", INT8: "comfy_kitchen::int8_linear"}


def int8_parts(sd: dict, settings: dict | None = None) -> dict[str, torch.Tensor]:
    """diffusers' names with the blocks' matrices in int8; odd layers have one scale a row, the others one."""
    out = {}
    for number, (key, value) in enumerate(sd.items()):
        if not (cf.in_block(key) and value.ndim == 2):
            out[key] = value.to(BF16)
            continue
        largest = value.abs().amax(1, keepdim=True) if number % 2 else value.abs().max()
        layer = key.removesuffix(".weight")
        out[key], out[f"{layer}.weight_scale"] = (value / largest * 127).round().to(torch.int8), largest / 127
        out[f"{layer}.comfy_quant"] = quantised.mark({"format": INT8, **(settings or {})})
    return out


def test_int8_parts_become_one_matrix_without_loss(tmp_path, reference):
    sd = int8_parts(reference)
    patcher = checkpoint.load_framepack(cf.write_file(tmp_path / "a.safetensors", sd))
    meaning = key_map.convert_diffusers(cf.dequantised(sd))
    for key in (
        "single_blocks.0.linear1.weight",
        "single_blocks.1.linear2.weight",
        "double_blocks.0.txt_attn.qkv.weight",
    ):
        assert torch.equal(cf.weight_of(patcher, key), meaning[key]), key


def test_int8_that_is_turned_keeps_its_turn_and_is_not_mixed(tmp_path, reference):
    turn = {"convrot": True, "convrot_groupsize": 64}
    sd = int8_parts(reference, turn)
    network = checkpoint.load_framepack(cf.write_file(tmp_path / "a.safetensors", sd)).model.diffusion_model
    # Turned numbers are joined row by row, as they lie in the file.
    stored = key_map.convert_diffusers({k: v for k, v in sd.items() if not key_map.is_quant_key(k)})
    meaning = key_map.convert_diffusers(cf.dequantised(sd))
    for layer in ("single_blocks.0.linear1", "double_blocks.0.txt_attn.qkv"):
        weight, key = network.get_submodule(layer).weight, f"{layer}.weight"
        assert (weight._params.convrot, weight._params.convrot_groupsize) == (True, 64), layer
        assert weight._qdata.dtype == torch.int8 and torch.equal(weight._qdata, stored[key]), layer
        assert torch.equal(weight._qdata * weight._params.scale, meaning[key]), layer
    for settings in ({"format": INT8}, {"format": FP8}):
        layer = "transformer_blocks.0.attn.to_k"
        mixed = {**sd, f"{layer}.comfy_quant": quantised.mark(settings)}
        with pytest.raises(quantised.QuantError, match=rf"{layer} .*in different ways.*'Load FramePack Model'"):
            checkpoint.open_state_dict(cf.write_file(tmp_path / "b.safetensors", mixed))


@pytest.mark.parametrize("name", [FP8, INT8])
def test_a_file_in_full_is_rounded_in_its_blocks_alone(tmp_path, reference, native, name):
    given = {k: v.to(BF16) for k, v in reference.items()}
    given["single_transformer_blocks.1.proj_out.weight"].zero_()
    path = cf.write_file(tmp_path / "a.safetensors", given)
    patcher = checkpoint.load_framepack(path, {ROUND_TO: name})
    network, exact = patcher.model.diffusion_model, checkpoint.load_state_dict(path)[0]
    for key in native:
        module, param = key_map.layer_of(key)
        layer, got, truth = network.get_submodule(module), cf.weight_of(patcher, key), exact[key].float()
        if not (cf.in_block(key) and truth.ndim == 2):
            assert not isinstance(getattr(layer, param), QuantizedTensor) and torch.equal(got, truth), key
            continue
        assert layer.weight._layout_cls == LAYOUTS[name], key
        # Half a step: of e4m3, whose steps grow with the number, or of the row's int8.
        largest = truth.abs().max() if name == FP8 else truth.abs().amax(1, keepdim=True)
        half = torch.maximum(truth.abs() / 16, largest / 448 / 2**10) if name == FP8 else largest / 254
        assert ((got - truth).abs() <= half * 1.001).all(), key
        full = name == FP8 and module.endswith(("_mod.lin", "modulation.lin"))
        assert layer._full_precision_mm_config == full, key
    called = {FP8: "fp8_e4m3fn", INT8: "int8"}[name]
    said = checkpoint.in_memory(patcher, checkpoint.inspect(path), called)
    rest = {torch.float32: "F32", BF16: "BF16"}[network.img_in.proj.weight.dtype]
    assert said == [f"in memory: {called} in the blocks, {rest} elsewhere"]
    again, arguments = patcher.cached_patcher_init[:2]
    assert torch.equal(cf.weight_of(again(*arguments), key), cf.weight_of(patcher, key))


def test_plain_fp8_keeps_its_bytes_and_scales_keep_their_format(tmp_path, reference):
    plain = cf.write_file(tmp_path / "a.safetensors", cf.plain_fp8(reference))
    key, expected = "single_blocks.0.linear1.weight", checkpoint.load_state_dict(plain)[0]
    assert torch.equal(cf.weight_of(checkpoint.load_framepack(plain, {ROUND_TO: FP8}), key), expected[key].float())
    scaled, layers = cf.scaled_fp8(reference)
    path = cf.write_file(tmp_path / "b.safetensors", scaled, cf.as_metadata(layers))
    asked, as_it_is = (checkpoint.load_framepack(path, options) for options in ({ROUND_TO: INT8}, {}))
    assert torch.equal(cf.weight_of(asked, key), cf.weight_of(as_it_is, key))
    said = checkpoint.in_memory(asked, checkpoint.inspect(path), "int8")
    assert said[0].startswith("in memory: fp8_e4m3fn in the blocks")
    assert said[1] == "weight_dtype int8 is not used: the file has scales of its own and keeps its format"
    assert checkpoint.in_memory(as_it_is, checkpoint.inspect(path)) == said[:1]


# ---- on a device that multiplies in the format ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", [FP8, INT8])
def test_the_blocks_multiply_in_the_format_by_the_hosts_own_product(native, name, dtype):
    network = pm.make_quantised(quantised.rounded(native, name), dtype)
    with torch.profiler.profile(acc_events=True) as seen:
        out = pm.run_ours(network, cf.tiny_inputs(), dtype)
    calls = sum(event.count for event in seen.key_averages() if event.key == PRODUCTS[name])
    # qkv, proj and two of the MLP for picture and text, two of a single block.
    modulations = 0 if name == FP8 else 2 * cf.TINY["double"] + cf.TINY["single"]
    assert calls == 8 * cf.TINY["double"] + 2 * cf.TINY["single"] + modulations
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_a_gradient_goes_through_both(native):
    """It is that of the numbers the matrix stands for."""
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)).requires_grad_()
    for name in (FP8, INT8):
        layer = pm.make_quantised(quantised.rounded(native, name)).double_blocks[0].img_mlp[0]
        x.grad = None
        layer(x).sum().backward()
        expected = layer.weight.dequantize().float().sum(0).expand_as(x)
        assert pm.relative_rms(x.grad, expected) <= 1e-5, name


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_a_forward_pass_loses_no_more_than_is_said(monkeypatch, capsys):
    monkeypatch.setitem(precision.CASES, "random", partial(precision.random_case, heads=1))
    assert precision.main(["--cases", "random", "F1", "--seeds", "1"]) == 0
    told = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in told] == 2 * list(precision.BOUNDS)
    # F1 is in fp8 already. All else loses something: a network that was not rounded would pass every bound.
    assert [row[:2] for row in told if float(row[2]) < 1e-3] == [["| F1", "fp8, a scale a matrix"]]


def test_a_coarser_format_is_noticed(monkeypatch, capsys):
    """One bit of the mantissa less, under the scales of before: the three rows that are rounded here, and no others."""
    exact = quantised._quantise

    def coarse(weight, name):
        return exact((weight * 8).to(torch.float8_e5m2).float() / 8, name)

    monkeypatch.setattr(quantised, "_quantise", coarse)
    monkeypatch.setitem(precision.CASES, "random", partial(precision.random_case, heads=1))
    assert precision.main(["--cases", "random", "--seeds", "1"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert [line.split(" | ")[1] for line in failed] == list(precision.BOUNDS)[3:6]


def test_what_the_losses_are_measured_from_is_what_the_file_means(reference):
    parts = precision.in_parts(key_map.convert_diffusers(reference))
    read, meaning = precision.in_full(parts), cf.dequantised(parts)
    assert read.keys() == meaning.keys() and all(torch.equal(read[key], meaning[key]) for key in meaning)
    assert sum(value.dtype == cf.F8 for value in parts.values()) == sum(key.endswith("_scale") for key in parts) > 0
