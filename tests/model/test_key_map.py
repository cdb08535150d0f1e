"""The key map against diffusers' own state dict and core's own module, at several depths and widths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import parity_models as pm
from frame_memory.model import key_map

TINY = {"heads": 1, "double": 1, "single": 2, "text_features": 64}


@pytest.fixture(scope="module")
def reference():
    return pm.make_reference(**TINY).state_dict()


def test_counts_of_the_published_checkpoint():
    # reference/framepack.md 2.2: 1274 tensors in the file, 866 in core's layout
    table = key_map.rows(20, 40)
    assert sum(len(row.sources) * len(row.params) for row in table) == 1274
    assert sum(len(row.params) for row in table) == 866
    names = [s for row in table for s in row.sources]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("double,single,heads", [(1, 1, 1), (2, 3, 1), (3, 1, 2)])
def test_every_key_of_both_sides_is_covered(double, single, heads):
    theirs = pm.make_reference(heads=heads, double=double, single=single, text_features=64).state_dict()
    native = key_map.convert_diffusers(theirs)
    ours = pm.make_ours(theirs)
    assert native.keys() == ours.state_dict().keys()
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_fused_rows_and_swapped_halves(reference):
    native = key_map.convert_diffusers(reference)
    hidden = 128
    linear1 = native["single_blocks.1.linear1.weight"]
    assert torch.equal(linear1[2 * hidden : 3 * hidden], reference["single_transformer_blocks.1.attn.to_v.weight"])
    assert torch.equal(linear1[3 * hidden :], reference["single_transformer_blocks.1.proj_mlp.weight"])
    text_qkv = native["double_blocks.0.txt_attn.qkv.bias"]
    assert torch.equal(text_qkv[hidden : 2 * hidden], reference["transformer_blocks.0.attn.add_k_proj.bias"])
    out = native["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(out[:hidden], reference["norm_out.linear.weight"][hidden:])  # shift first in core
    gates = "context_embedder.token_refiner.refiner_blocks.1.norm_out.linear.weight"
    assert torch.equal(native["txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1.weight"], reference[gates])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer.", "diffusion_model.", "module."])
def test_prefixes_are_taken_off(reference, prefix):
    plain = key_map.convert_diffusers(reference)
    given = {prefix + k: v for k, v in reference.items()}
    converted = key_map.convert_diffusers(given)
    assert converted.keys() == plain.keys()
    assert all(torch.equal(converted[k], plain[k]) for k in plain)
    assert list(given) == [prefix + k for k in reference]


def test_there_and_back_is_exact(reference):
    back = key_map.convert_native(key_map.convert_diffusers(reference))
    assert back.keys() == reference.keys()
    assert all(torch.equal(back[k], reference[k]) for k in reference)


KEYS = tuple(
    f"{s}.{p}" for row in key_map.rows(1, 2) for s in row.sources for p in row.params if row.target != "img_in.proj"
)


@given(st.sets(st.sampled_from(KEYS), min_size=1, max_size=9))
def test_missing_tensors_are_named_and_nothing_is_invented(lost):
    all_keys = {f"{s}.{p}" for row in key_map.rows(1, 2) for s in row.sources for p in row.params}
    left = all_keys - lost
    if key_map.block_counts(left) != (1, 2):
        return  # a whole block is gone: then the network is a smaller one, which the counts decide
    with pytest.raises(key_map.KeyMapError) as raised:
        key_map.check_keys(left, diffusers=True)
    assert set(raised.value.missing) == lost
    assert all(name in str(raised.value) for name in raised.value.missing[: key_map.NAMED_IN_ERRORS])


def test_left_over_tensors_are_named(reference):
    given = {**reference, "transformer_blocks.0.attn.norm_q.bias": torch.zeros(128), "extra.thing": torch.zeros(1)}
    with pytest.raises(key_map.KeyMapError, match=r"extra\.thing, transformer_blocks\.0\.attn\.norm_q\.bias"):
        key_map.convert_diffusers(given)


def test_third_refiner_block_is_refused(reference):
    given = dict(reference)
    for key in reference:
        if ".refiner_blocks.1." in key:
            given[key.replace(".refiner_blocks.1.", ".refiner_blocks.2.")] = reference[key]
    with pytest.raises(key_map.KeyMapError, match="refiner_blocks"):
        key_map.convert_diffusers(given)


def test_quantisation_keys_do_not_count_as_left_over():
    keys = {f"{s}.{p}" for row in key_map.rows(1, 1) for s in row.sources for p in row.params}
    beside = {
        "scaled_fp8",
        "transformer_blocks.0.attn.to_q.scale_weight",
        "single_transformer_blocks.0.proj_mlp.comfy_quant",
    }
    assert len(key_map.check_keys(keys | beside, diffusers=True)) == len(key_map.rows(1, 1))
