"""Fault 37 where a model is loaded: memory files, and weights of another width, are refused.

Memory files on another base: tests/memory_files.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from frame_memory.model import checkpoint
from frame_memory.model.key_map import convert_diffusers

from .checkpoint_files import tiny_reference, write_file


@pytest.mark.parametrize("name", [
    "semantic_pack.squeeze.q.weight", "frame_preservation.lr.proj.weight", "head.final_layer.linear.weight",
])  # fmt: skip
def test_fault_37_a_memory_encoder_is_named_and_refused_as_a_model(tmp_path, name):
    path = tmp_path / "FramePack_F1_memory.safetensors"
    save_file({name: torch.zeros(4, 4)}, str(path))
    with pytest.raises(checkpoint.CheckpointError, match="Frame Memory encoder"):
        checkpoint.load_framepack(str(path))


def test_fault_37_parts_of_another_width_are_refused_with_both_shapes(tmp_path):
    sd = tiny_reference()
    key = "transformer_blocks.0.attn.to_out.0.weight"
    sd[key] = torch.zeros(256, 256)
    path = write_file(tmp_path / "FramePack_F1_mixed.safetensors", sd)
    with pytest.raises(checkpoint.CheckpointError, match=r"256, 256.*128, 128.*'Load FramePack Model'") as raised:
        checkpoint.load_framepack(path)
    assert path in str(raised.value)


def test_fault_37_parts_of_one_matrix_that_do_not_fit_name_the_file(tmp_path):
    sd = tiny_reference()
    sd["single_transformer_blocks.1.attn.to_k.weight"] = torch.zeros(128, 256)
    path = write_file(tmp_path / "FramePack_F1_mixed.safetensors", sd)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"to_k\.weight \[128, 256\].*'Load FramePack Model'"
    ) as raised:
        checkpoint.load_framepack(path)
    assert path in str(raised.value)


DETECTED_BY = ("img_in.proj.weight", "final_layer.linear.weight", "txt_in.input_embedder.weight")


@pytest.mark.parametrize("shape", [(7,), (64, 3), (0,), (), (250, 16, 1, 2, 2), (128, 16, 0, 2, 2)])
@pytest.mark.parametrize("key", [*DETECTED_BY, "clean_x_embedder.proj_2x.weight", "double_blocks.0.img_mod.lin.bias"])
def test_fault_37_tensors_of_another_shape_are_refused_in_words(tmp_path, key, shape):
    """Those that core reads the network's sizes from, and some that only have to fit."""
    native = convert_diffusers(tiny_reference())
    path = write_file(tmp_path / "FramePack_F1.safetensors", {**native, key: torch.zeros(shape)})
    with pytest.raises(checkpoint.CheckpointError, match=r"'Load FramePack Model'") as raised:
        checkpoint.load_framepack(path)
    assert path in str(raised.value)
