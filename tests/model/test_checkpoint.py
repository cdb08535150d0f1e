"""Reading, converting, loading and saving checkpoints of every kind, and what is said about bad files."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy import model_base

from benchmarks import parity_models as pm
from frame_memory.model import checkpoint, framepack, key_map, quantised, tensor_file

from . import checkpoint_files as cf

BF16 = torch.bfloat16


def run(patcher):
    """The loaded network's velocity in the dtype it computes in."""
    network = patcher.model.diffusion_model
    return pm.run_ours(network, cf.tiny_inputs(), torch.float32)


# ---- every way a checkpoint comes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["folder", "index", "first shard", "last shard", "without index", "parent folder"])
def test_three_shards_by_any_of_its_names(tmp_path, reference, native, given):
    folder = tmp_path / ("transformer" if given == "parent folder" else "FramePackI2V_HY")
    shards = cf.write_shards(folder, reference, index=given != "without index")
    path = {
        "folder": folder,
        "index": folder / "diffusion_pytorch_model.safetensors.index.json",
        "first shard": shards[0],
        "last shard": shards[2],
        "without index": shards[1],
        "parent folder": tmp_path,
    }[given]
    loaded, _ = checkpoint.load_state_dict(str(path))
    assert loaded.keys() == native.keys()
    assert all(torch.equal(loaded[k], native[k]) for k in native)
    info = checkpoint.inspect(str(path))
    assert (info.layout, len(info.shards), info.tensors) == ("diffusers", 3, len(reference))


def test_missing_shards_are_named(tmp_path, reference):
    shards = cf.write_shards(tmp_path, reference, index=False)
    os.remove(shards[1])
    with pytest.raises(checkpoint.CheckpointError, match=r"diffusion_pytorch_model-00002-of-00003\.safetensors"):
        checkpoint.inspect(shards[0])


def test_index_cannot_point_outside_its_folder(tmp_path):
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(checkpoint.CheckpointError, match="outside"):
        checkpoint.find_files(str(index))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer.", "diffusion_model.", "module."])
@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_single_file_with_any_prefix_loads_and_equals_diffusers(tmp_path, reference, native, prefix, layout):
    sd = reference if layout == "diffusers" else native
    path = cf.write_file(tmp_path / "FramePack_F1.safetensors", {prefix + k: v for k, v in sd.items()})
    patcher = checkpoint.load_framepack(path)
    assert isinstance(patcher.model, framepack.FramePack)
    theirs = pm.make_reference(**cf.TINY)
    assert pm.relative_rms(run(patcher), pm.run_reference(theirs, cf.tiny_inputs(), torch.float32)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_half_precision_files_keep_their_bits(tmp_path, reference, native, dtype):
    path = cf.write_file(tmp_path / "a.safetensors", {k: v.to(dtype) for k, v in reference.items()})
    loaded, _ = checkpoint.load_state_dict(path)
    assert all(torch.equal(loaded[k], native[k].to(dtype)) for k in native)


def test_native_file_is_framepack_for_the_stock_loader_and_plain_hunyuan_is_not(tmp_path, reference, native):
    framepack.register()
    path = str(tmp_path / "native.safetensors")
    checkpoint.save_native(native, path, {}, kind="F1", source="somewhere/FramePack_F1.safetensors")
    stock = comfy.sd.load_diffusion_model(path)
    assert isinstance(stock.model, framepack.FramePack)
    assert torch.equal(run(stock), run(checkpoint.load_framepack(path)))

    plain = {k: v for k, v in native.items() if not k.startswith(("clean_x_embedder.", "image_projection."))}
    plain_path = cf.write_file(tmp_path / "plain.safetensors", plain)
    assert type(comfy.sd.load_diffusion_model(plain_path).model) is model_base.HunyuanVideo


def test_loaded_model_reloads_itself_clones_and_offloads(tmp_path, reference):
    path = cf.write_file(tmp_path / "a.safetensors", reference)
    patcher = checkpoint.load_framepack(path, {"dtype": BF16})
    function, arguments = patcher.cached_patcher_init[:2]
    again = function(*arguments, disable_dynamic=True)
    sd, sd_again = patcher.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(sd[k], sd_again[k]) for k in sd)
    assert patcher.clone().cached_patcher_init == patcher.cached_patcher_init
    assert patcher.model_dtype() == BF16


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_tensors_for_a_host_that_pages_weights_in_from_disk(tmp_path, reference, native, layout):
    path = cf.write_file(tmp_path / "a.safetensors", reference if layout == "diffusers" else native)
    stored, _ = checkpoint.open_state_dict(path)
    kept = checkpoint._tensors_to_keep(path, stored, disk_backed=True)
    assert not any(isinstance(v, tensor_file.StoredTensor) for v in kept.values())
    assert kept.keys() == native.keys() and all(torch.equal(kept[k], native[k]) for k in native)


# ---- fp8 -----------------------------------------------------------------------------------------------------------


def test_plain_fp8_is_concatenated_bit_by_bit(tmp_path, reference):
    sd = cf.plain_fp8(reference)
    loaded, _ = checkpoint.load_state_dict(cf.write_file(tmp_path / "a.safetensors", sd))
    expected = key_map.convert_diffusers({k: v.float() for k, v in sd.items()})
    assert all(torch.equal(loaded[k].float(), expected[k]) for k in expected)
    assert loaded["single_blocks.0.linear1.weight"].dtype == cf.F8
    assert loaded["clean_x_embedder.proj_4x.weight"].dtype == BF16


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_fault_41_fp8_blocks_with_precise_context_weights(tmp_path, reference, native, layout):
    sd = cf.plain_fp8(reference if layout == "diffusers" else native)
    path = cf.write_file(tmp_path / "a.safetensors", sd)
    patcher = checkpoint.load_framepack(path, {"dtype": cf.F8})
    network = patcher.model.diffusion_model
    assert network.double_blocks[0].img_attn.qkv.weight.dtype == cf.F8
    for key in ("clean_x_embedder.proj_4x.weight", "image_projection.up.weight", "img_in.proj.weight",
                "final_layer.linear.weight", "double_blocks.0.img_attn.qkv.bias"):  # fmt: skip
        assert network.get_parameter(key).dtype == BF16, key
    expected = key_map.convert_diffusers({k: v.float() for k, v in cf.plain_fp8(reference).items()})
    truth = pm.make_ours(key_map.convert_native(expected))
    given = cf.tiny_inputs()
    out, exact = run(patcher), pm.run_ours(truth, given, torch.float32)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    assert pm.relative_rms(out, exact) <= 1e-5


def test_fault_41_fp8_asked_for_keeps_everything_outside_the_blocks(tmp_path, reference):
    path = cf.write_file(tmp_path / "a.safetensors", {k: v.to(BF16) for k, v in reference.items()})
    network = checkpoint.load_framepack(path, {"dtype": cf.F8}).model.diffusion_model
    for key, value in network.named_parameters():
        block_matrix = key.startswith(("double_blocks.", "single_blocks.")) and value.ndim == 2
        wanted = cf.F8 if block_matrix else BF16
        module, _, param = key.rpartition(".")
        noted = getattr(network.get_submodule(module), f"{param}_comfy_model_dtype")
        assert value.dtype == noted == wanted, key


def test_fault_41_fp8_asked_for_on_a_quantised_file(tmp_path, reference):
    sd, layers = cf.scaled_fp8(reference)
    path = cf.write_file(tmp_path / "a.safetensors", sd, cf.as_metadata(layers))
    asked, plain = checkpoint.load_framepack(path, {"dtype": cf.F8}), checkpoint.load_framepack(path)
    assert asked.model.diffusion_model.clean_x_embedder.proj_4x.weight.dtype not in (cf.F8, torch.float8_e5m2)
    assert torch.equal(run(asked), run(plain))


@pytest.mark.parametrize("mark", ["metadata", "comfy_quant", "legacy"])
def test_scaled_fp8_with_equal_scales_is_exact(tmp_path, reference, native, mark):
    name = "scale_weight" if mark == "legacy" else "weight_scale"
    sd, layers = cf.scaled_fp8(reference, lambda key, w: torch.tensor(0.004), name)
    metadata = cf.as_metadata(layers) if mark == "metadata" else None
    if mark == "legacy":
        sd["scaled_fp8"] = torch.zeros(2, dtype=cf.F8)
    if mark == "comfy_quant":
        conf = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        sd.update({f"{layer}.comfy_quant": quantised.mark(conf) for layer in layers})
    path = cf.write_file(tmp_path / "a.safetensors", sd, metadata)
    patcher = checkpoint.load_framepack(path)
    meaning = key_map.convert_diffusers(cf.dequantised(sd, name))
    assert checkpoint.inspect(path).quantised == len(layers)
    for key in ("single_blocks.0.linear1.weight", "double_blocks.0.img_mod.lin.weight", "final_layer.linear.weight"):
        assert torch.equal(cf.weight_of(patcher, key), meaning[key]), key
    truth = pm.make_ours(key_map.convert_native(meaning))
    assert pm.relative_rms(run(patcher), pm.run_ours(truth, cf.tiny_inputs(), torch.float32)) <= 1e-2


def test_scaled_fp8_with_different_scales_costs_what_the_docstring_says(tmp_path, reference):
    sd, layers = cf.scaled_fp8(reference, lambda key, w: (w.abs().max() / 448).float())
    path = cf.write_file(tmp_path / "a.safetensors", sd, cf.as_metadata(layers))
    patcher = checkpoint.load_framepack(path)
    meaning = cf.dequantised(sd)
    fused = key_map.convert_diffusers(meaning)
    first_loss = pm.relative_rms(fused["single_blocks.0.linear1.weight"], _fused(reference, "single_blocks.0.linear1"))
    scale = max(
        sd[f"single_transformer_blocks.0.{n}.weight_scale"] for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    )
    got = cf.weight_of(patcher, "single_blocks.0.linear1.weight")
    loss = pm.relative_rms(got, fused["single_blocks.0.linear1.weight"])
    assert loss <= 0.035 and loss <= 1.3 * first_loss, (loss, first_loss)
    # never more than half a step of e4m3, nor than half of the smallest step near zero
    change = (got - fused["single_blocks.0.linear1.weight"]).abs()
    assert (change <= torch.maximum(fused["single_blocks.0.linear1.weight"].abs() / 16, scale * 2**-10) * 1.001).all()
    # what was not fused is exact
    assert torch.equal(cf.weight_of(patcher, "single_blocks.0.linear2.weight"), fused["single_blocks.0.linear2.weight"])
    assert torch.equal(
        cf.weight_of(patcher, "double_blocks.0.img_mlp.0.weight"), fused["double_blocks.0.img_mlp.0.weight"]
    )
    # the part with the largest scale keeps its bytes
    largest = max(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                  key=lambda n: sd[f"single_transformer_blocks.0.{n}.weight_scale"].item())  # fmt: skip
    rows = dict(
        zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ((0, 128), (128, 128), (256, 128), (384, 512)))
    )
    assert torch.equal(got.narrow(0, *rows[largest]), meaning[f"single_transformer_blocks.0.{largest}.weight"])


def _fused(reference, target):
    return key_map.convert_diffusers(reference)[f"{target}.weight"]


@pytest.mark.parametrize("shape", ["rows", "blocks"])
def test_scales_by_row_or_block_become_one(tmp_path, reference, shape):
    def scale_of(key, w):
        return w.abs().amax(1, keepdim=True) / 448 if shape == "rows" else None

    sd, meaning = {}, {}
    for key, value in reference.items():
        if not (cf.in_block(key) and value.ndim == 2):
            sd[key] = value.to(BF16)
            continue
        cells = value.reshape(value.shape[0], 1 if shape == "rows" else value.shape[1] // 64, -1)
        scale = cells.abs().amax(2, keepdim=True) / 448
        q = (cells / scale).to(cf.F8)
        sd[key] = q.reshape(value.shape)
        sd[key.removesuffix("weight") + "scale_weight"] = scale if shape == "blocks" else scale[:, 0]
        meaning[key] = (q.float() * scale).reshape(value.shape)
    patcher = checkpoint.load_framepack(cf.write_file(tmp_path / "a.safetensors", sd))
    got = cf.weight_of(patcher, "single_blocks.1.linear2.weight")
    assert pm.relative_rms(got, meaning["single_transformer_blocks.1.proj_out.weight"]) <= 0.035


def test_formats_that_cannot_be_fused_are_refused_by_name(tmp_path, reference):
    sd = {k: v.to(BF16) for k, v in reference.items()}
    layer = "transformer_blocks.0.attn.to_q"
    sd[f"{layer}.weight"] = torch.zeros(128, 64, dtype=torch.uint8)
    sd[f"{layer}.weight_scale"] = torch.zeros(128, 8, dtype=cf.F8)
    sd[f"{layer}.comfy_quant"] = quantised.mark({"format": "nvfp4"})
    with pytest.raises(quantised.QuantError, match="nvfp4"):
        checkpoint.load_framepack(cf.write_file(tmp_path / "a.safetensors", sd))


@pytest.mark.parametrize("mark", ["metadata", "legacy"])
def test_scaled_fp8_in_native_layout_goes_to_core_as_it_is(tmp_path, native, mark):
    name = "scale_weight" if mark == "legacy" else "weight_scale"
    sd, layers = cf.scaled_fp8(native, scale_name=name)
    prefix = "diffusion_model."
    if mark == "legacy":
        sd["scaled_fp8"] = torch.zeros(2, dtype=cf.F8)
    metadata = cf.as_metadata([prefix + layer for layer in layers]) if mark == "metadata" else None
    path = cf.write_file(tmp_path / "a.safetensors", {prefix + k: v for k, v in sd.items()}, metadata)
    patcher = checkpoint.load_framepack(path)
    meaning = cf.dequantised(sd, name)
    for key in ("single_blocks.0.linear1.weight", "double_blocks.0.txt_attn.qkv.weight"):
        assert torch.equal(cf.weight_of(patcher, key), meaning[key]), key


def test_scaled_fp8_survives_saving(tmp_path, reference):
    sd, layers = cf.scaled_fp8(reference)
    source = cf.write_file(tmp_path / "a.safetensors", sd, cf.as_metadata(layers))
    stored, metadata = checkpoint.open_state_dict(source)
    target = str(tmp_path / "b.safetensors")
    checkpoint.save_native(stored, target, metadata, kind="F0")
    framepack.register()
    ours, stock = checkpoint.load_framepack(source), comfy.sd.load_diffusion_model(target)
    assert isinstance(stock.model, framepack.FramePack)
    assert torch.equal(run(ours), run(stock))


# ---- files that are not what they say ------------------------------------------------------------------------------


def _bad(path, content: bytes):
    path.write_bytes(content)
    return str(path)


def assert_says_what_to_do(error, place, node="Load FramePack Model"):
    """Every message about a damaged file says where to get it and the node to choose it in."""
    assert place in str(error) and f"'{node}'" in str(error), str(error)


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "empty"),
        (b"version https://git-lfs.example/spec\noid sha256:ab\nsize 257650\n", "expected 257650: it is a Git-LFS"),
        (b"<!DOCTYPE html><html>not found", "web page"),
        (b"abc", "interrupted download"),
        ((5000).to_bytes(8, "little") + b'{"a":', "interrupted download"),
    ],
)  # fmt: skip
def test_fault_33_truncated_pointer_and_empty_files(tmp_path, content, words):
    path = _bad(tmp_path / "FramePackI2V_HY_bf16.safetensors", content)
    with pytest.raises(tensor_file.FileError, match=words) as raised:
        checkpoint.inspect(path)
    assert path in str(raised.value)
    assert_says_what_to_do(raised.value, "https://huggingface.co/Kijai/HunyuanVideo_comfy")
    unknown = _bad(tmp_path / "model.safetensors", content)
    with pytest.raises(tensor_file.FileError, match=words) as raised:
        tensor_file.read(unknown, "Load Video LoRA")
    assert_says_what_to_do(raised.value, "where it came from", "Load Video LoRA")


def test_fault_33_cut_off_in_the_tensors(tmp_path, reference):
    path = cf.write_file(tmp_path / "a.safetensors", reference)
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(
        tensor_file.FileError, match=rf"is {size - 1000} bytes, expected {size}: .*interrupted"
    ) as raised:
        checkpoint.load_framepack(path)
    assert_says_what_to_do(raised.value, "where it came from")


@pytest.mark.parametrize(
    "path,page",
    [
        ("/m/FramePackI2V_HY_fp8_e4m3fn.safetensors", "Kijai/HunyuanVideo_comfy"),
        ("FramePack_F1_I2V_HY_20250503_fp8_e4m3fn.safetensors", "Kijai/HunyuanVideo_comfy"),
        ("C:\\m\\FramePackI2V_HY\\diffusion_pytorch_model-00001-of-00003.safetensors", "lllyasviel/FramePackI2V_HY"),
        ("FramePack_F1_I2V_HY_20250503/a-00001-of-00003.safetensors", "lllyasviel/FramePack_F1_I2V_HY_20250503"),
    ],
)
def test_fault_33_published_files_name_their_model_page(path, page):
    """Pages as in the README, whose links are tested against the example graphs."""
    from frame_memory.model.sources import page_of

    assert page_of(path) == f"https://huggingface.co/{page}"
    assert page in (cf.REPO / "README.md").read_text(encoding="utf-8")


def test_fault_34_header_too_large_and_renamed_checkpoints(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "zip.ckpt")
    renamed = [_bad(tmp_path / "zip.safetensors", (tmp_path / "zip.ckpt").read_bytes())]
    renamed.append(_bad(tmp_path / "old.safetensors", pickle.dumps({"a": 1})))
    for path in renamed:
        with pytest.raises(tensor_file.FileError, match="PyTorch pickle.*'Load FramePack Model'"):
            checkpoint.inspect(path)
        with pytest.raises(tensor_file.FileError, match="PyTorch pickle.*'Load Video LoRA'"):
            tensor_file.read(path, "Load Video LoRA")
    with pytest.raises(tensor_file.FileError, match="its first 8 bytes.*where it came from.*'Load FramePack Model'"):
        checkpoint.inspect(_bad(tmp_path / "x.safetensors", b"\xff" * 600))
    with pytest.raises(tensor_file.FileError, match="GGUF loader"):
        checkpoint.inspect(_bad(tmp_path / "x.gguf", b"GGUF" + b"\0" * 600))
    with pytest.raises(
        tensor_file.FileError, match="damaged safetensors header.*where it came from.*Load FramePack Model"
    ):
        checkpoint.inspect(
            _bad(tmp_path / "y.safetensors", (20).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}' + b" " * 90)
        )


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": None},
        7,
    ],
)
def test_fault_34_headers_that_lie(tmp_path, info):
    text = json.dumps({"a": info}).encode()
    path = _bad(tmp_path / "a.safetensors", len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(tensor_file.FileError, match=r"a\.safetensors.*'Load FramePack Model'"):
        checkpoint.inspect(path)


def test_fault_35_checkpoints_without_context_weights(tmp_path, reference, native):
    context = ("clean_x_embedder.", "image_projection.")
    families = {
        "plain HunyuanVideo": {k: v for k, v in native.items() if not k.startswith(context)},
        "Wan": {"blocks.0.cross_attn.k.weight": torch.zeros(2, 2), "patch_embedding.weight": torch.zeros(2)},
        "FLUX": {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2), "img_in.weight": torch.zeros(2)},
        "Stable Diffusion 1, 2 or XL": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)},
        "a LoRA": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2)},
        "a VAE": {"decoder.conv_in.conv.weight": torch.zeros(2)},
        "Its first tensors are something.else": {"something.else": torch.zeros(2)},
    }
    families["plain HunyuanVideo "] = {k: v for k, v in reference.items() if not k.startswith(context)}
    for family, sd in families.items():
        path = cf.write_file(tmp_path / "a.safetensors", sd)
        with pytest.raises(checkpoint.CheckpointError, match="no packed-context weights") as raised:
            checkpoint.load_framepack(path)
        assert family.strip() in str(raised.value), family


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_fault_35_incomplete_checkpoints_are_never_filled_up(tmp_path, reference, native, layout):
    sd = dict(reference if layout == "diffusers" else native)
    lost = "image_projection.down.bias"
    del sd[lost]
    with pytest.raises(key_map.KeyMapError, match=lost):
        checkpoint.load_framepack(cf.write_file(tmp_path / "a.safetensors", sd))
    sd = {**(reference if layout == "diffusers" else native), "strange.weight": torch.zeros(1)}
    with pytest.raises(key_map.KeyMapError, match=r"strange\.weight"):
        checkpoint.load_framepack(cf.write_file(tmp_path / "b.safetensors", sd))


@pytest.mark.parametrize(
    "path,kind",
    [
        ("FramePackI2V_HY_fp8_e4m3fn.safetensors", "F0"),
        ("FramePack_F1_I2V_HY_20250503_fp8_e4m3fn.safetensors", "F1"),
        ("models--x--FramePack_F1_I2V_HY/snapshots/ab/diffusion_pytorch_model-00001-of-00003.safetensors", "F1"),
        ("FramePackI2V_HY\\diffusion_pytorch_model-00001-of-00003.safetensors", "F0"),
        ("framepackf1.safetensors", "F1"),
        ("my-f1-tune.safetensors", "F1"),
        ("FramePack_F1/FramePackI2V_HY.safetensors", "F0"),
        ("FramePack/model.safetensors", None),
        ("FramePack/f1/model.safetensors", "F1"),
        ("something.safetensors", None),
        ("f16_model.safetensors", None),
        ("/mnt/u/FramePack/ComfyUI/models/diffusion_models/model.safetensors", None),
        ("D:\\FramePack_F1\\ComfyUI\\models\\diffusion_models\\model.safetensors", None),
        ("D:\\FramePack_F1\\ComfyUI\\models\\diffusion_models\\FramePackI2V_HY.safetensors", "F0"),
    ],
)  # fmt: skip
def test_fault_36_kind_by_name(path, kind):
    assert checkpoint.kind_from_name(path) == kind


def test_fault_36_where_comfyui_lies_says_nothing_about_the_kind(tmp_path, native):
    folder = tmp_path / "FramePack_F1" / "ComfyUI" / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    path = cf.write_file(folder / "model.safetensors", native)
    for name in ("", "model.safetensors"):
        info = checkpoint.inspect(path, name)
        assert (info.kind, info.kind_from) == (None, "")
    (folder / "FramePackI2V_HY").mkdir()
    shards = cf.write_shards(folder / "FramePackI2V_HY", cf.tiny_reference())
    info = checkpoint.inspect(shards[0], os.path.join("FramePackI2V_HY", os.path.basename(shards[0])))
    assert (info.kind, info.kind_from) == ("F0", "name")


def test_fault_36_kind_by_metadata_wins_over_the_name(tmp_path, native):
    path = str(tmp_path / "FramePackI2V_HY.safetensors")
    checkpoint.save_native(native, path, {}, kind="F1", source=str(tmp_path / "folder" / "FramePack_F1.safetensors"))
    info = checkpoint.inspect(path, "FramePackI2V_HY.safetensors")
    assert (info.kind, info.kind_from) == ("F1", "metadata")
    _, metadata = tensor_file.read_header(path)
    assert metadata["frame_memory.source"] == "FramePack_F1.safetensors"  # a name, never a path of this machine
    assert metadata["frame_memory.format"] == checkpoint.FORMAT


class _Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["evil.pt", "evil.ckpt", "evil.bin", "evil.safetensors"])
@pytest.mark.parametrize("wrap", ["zip", "raw"])
def test_fault_40_a_pickle_is_never_opened(tmp_path, name, wrap):
    target, path = tmp_path / "executed", tmp_path / name
    if wrap == "zip":
        torch.save({"clean_x_embedder.proj_4x.weight": _Payload(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": _Payload(target)}))
    for read in (checkpoint.inspect, checkpoint.load_framepack):
        with pytest.raises(tensor_file.FileError, match="was not opened.*in 'Load FramePack Model'"):
            read(str(path))
    with pytest.raises(tensor_file.FileError, match="was not opened.*in 'Load Video LoRA'"):
        tensor_file.read(str(path), "Load Video LoRA")
    assert not target.exists()


# ---- saving --------------------------------------------------------------------------------------------------------


def test_save_is_atomic_and_complete(tmp_path, native):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"before")
    bad = {k: v for k, v in native.items() if k != "img_in.proj.bias"}
    with pytest.raises(key_map.KeyMapError):
        checkpoint.save_native(bad, str(path), {}, kind="F0")
    with pytest.raises(checkpoint.CheckpointError, match="'F2'"):
        checkpoint.save_native(native, str(path), {}, kind="F2")

    def torn():
        raise OSError("the disk went away")

    broken = {**native, "img_in.proj.bias": tensor_file.StoredTensor(torn, (128,), torch.float32)}
    with pytest.raises(tensor_file.FileError, match="the disk went away"):
        checkpoint.save_native(broken, str(path), {}, kind="F0")
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]

    checkpoint.save_native(native, str(path), {"license": "x"}, kind="F0")
    loaded, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    assert metadata["license"] == "x" and all(torch.equal(loaded[k], native[k]) for k in native)


def test_save_into_a_folder_that_is_not_there(tmp_path, native):
    with pytest.raises(tensor_file.FileError, match="could not be written"):
        checkpoint.save_native(native, str(tmp_path / "no" / "a.safetensors"), {}, kind="F0")


# ---- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from comfy.cli_args import args
args.cpu = True
import psutil, torch
torch.set_num_threads(1)
from frame_memory.model import checkpoint, framepack
torch.zeros(4096, 4096).to(torch.bfloat16)
process, peak, stop = psutil.Process(), [0], []
def watch():
    while not stop:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.05)
before = process.memory_info().rss
what, path = sys.argv[1:3]
if what == "convert":
    kept = checkpoint.load_state_dict(path)
elif what == "load":
    kept = checkpoint.load_framepack(path, {"dtype": torch.bfloat16})
elif what == "save":
    stored, metadata = checkpoint.open_state_dict(path)
    checkpoint.save_native(stored, sys.argv[3], metadata, kind="F0")
stop.append(True)
print(peak[0] - before)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """A bf16 file of some 400 MB: hidden size 1024, one double and eight single blocks, random numbers."""
    config = pm.reference_config(heads=8, double=1, single=8)
    with torch.device("meta"):
        from diffusers import HunyuanVideoFramepackTransformer3DModel

        shapes = {k: v.shape for k, v in HunyuanVideoFramepackTransformer3DModel(**config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    sd = {k: torch.randint(0, 2**14, s, dtype=torch.int16, generator=generator).view(BF16) for k, s in shapes.items()}
    return cf.write_file(tmp_path_factory.mktemp("large") / "a.safetensors", sd)


@pytest.mark.parametrize("what,bound", [("convert", 1.2), ("load", 1.2), ("save", 0.25)])
def test_peak_memory_is_at_most_1_2_times_the_file(tmp_path, large_file, what, bound):
    size = os.path.getsize(large_file)
    assert size > 300e6
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), what, large_file, str(tmp_path / "b.safetensors")]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.strip().splitlines()[-1]) <= bound * size
