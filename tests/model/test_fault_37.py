"""Fault 37 as far as there are no memory encoders yet: their files, and weights of another width, are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from frame_memory.model import checkpoint
from frame_memory.model.key_map import KeyMapError

from .checkpoint_files import tiny_reference, write_file


@pytest.mark.parametrize("name", ["semantic_pack.squeeze.q.weight", "frame_preservation.lr.proj.weight"])
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
    with pytest.raises((checkpoint.CheckpointError, KeyMapError, RuntimeError), match=r"256, 256.*128, 128"):
        checkpoint.load_framepack(path)
