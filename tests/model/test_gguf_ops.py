"""Loaders of the GGUF kind bring their own operations: the model runs on packed weights, and LoRAs work on them."""

import comfy.sd
import pytest
import torch

from benchmarks import parity_models as pm
from frame_memory.model import checkpoint, framepack, key_map, lora

from . import checkpoint_files as cf
from . import gguf_operations as gguf


def in_blocks(key, value):
    return cf.in_block(key) and key.endswith(".weight") and value.ndim == 2


@pytest.fixture
def packed(native):
    """The model a GGUF loader makes: block matrices packed, everything else in bf16 as such files have it."""
    framepack.register()
    sd = {k: gguf.PackedTensor(gguf.pack(v)) if in_blocks(k, v) else v.bfloat16() for k, v in native.items()}
    return comfy.sd.load_diffusion_model_state_dict(sd, model_options={"custom_operations": gguf.PackedOperations})


@pytest.fixture(scope="module")
def meaning(native):
    """What the packed file's numbers are."""
    return {k: gguf.unpack(gguf.pack(v)) if in_blocks(k, v) else v.bfloat16().float() for k, v in native.items()}


def run(network):
    return pm.run_ours(network, cf.tiny_inputs(), torch.float32)


def plain_network(numbers):
    return pm.make_ours(key_map.convert_native(numbers))


def test_packing_is_the_q8_format():
    weight = torch.linspace(-2, 2, 128).reshape(2, 64)
    packed = gguf.pack(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 68)
    step = weight.reshape(2, 2, 32).abs().amax(-1) / 127
    assert ((gguf.unpack(packed) - weight).reshape(2, 2, 32).abs().amax(-1) <= 0.51 * step + 1e-3 * step * 127).all()


def test_packed_weights_give_the_same_video_as_their_numbers(packed, meaning):
    assert isinstance(packed.model, framepack.FramePack)
    before = gguf.PackedOperations.unpacked_forwards
    out = run(packed.model.diffusion_model)
    assert gguf.PackedOperations.unpacked_forwards > before  # it did run on packed weights
    assert torch.equal(out, run(plain_network(meaning)))


def test_fault_41_gguf_with_precise_context_weights(packed, native):
    network = packed.model.diffusion_model
    assert isinstance(network.single_blocks[0].linear1.weight.data, gguf.PackedTensor)
    assert network.clean_x_embedder.proj_4x.weight.dtype in (torch.bfloat16, torch.float32)
    out = run(network)
    assert torch.isfinite(out).all() and pm.relative_rms(out, run(plain_network(native))) <= 0.05


@pytest.mark.parametrize("lowvram", [False, True])
def test_lora_on_packed_weights(packed, meaning, lowvram):
    generator = torch.Generator().manual_seed(0)
    file, expected = {}, key_map.convert_native(meaning)
    for module in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp", "norm_out.linear"):
        out, into = expected[f"{module}.weight"].shape
        down, up = torch.randn(4, into, generator=generator) / 8, torch.randn(out, 4, generator=generator) / 8
        file[f"transformer.{module}.lora_A.weight"], file[f"transformer.{module}.lora_B.weight"] = down, up
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + 0.8 * up @ down
    before = run(packed.model.diffusion_model)
    clone, match = lora.apply_lora(packed, file, 0.8)
    assert match.share == 1.0
    clone.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1 if lowvram else 0)
    out = run(clone.model.diffusion_model)
    clone.unpatch_model(torch.device("cpu"))
    assert pm.relative_rms(out, run(pm.make_ours(expected))) <= 1e-6
    assert pm.relative_rms(out, before) > 1e-3
    assert torch.equal(run(packed.model.diffusion_model), before)


def test_our_loader_hands_operations_on(tmp_path, native):
    path = cf.write_file(tmp_path / "a.safetensors", native)
    ours = checkpoint.load_framepack(path, {"custom_operations": gguf.PackedOperations})
    assert isinstance(ours.model.diffusion_model.double_blocks[0].img_attn.qkv, gguf.PackedOperations.Linear)
    assert torch.equal(run(ours.model.diffusion_model), run(plain_network(native)))
