"""Files of Wan's patchifiers: exact round trips, other bases refused by both fingerprints, and damage in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from frame_memory.model import families, memory_file, wan, wan_file
from frame_memory.model.base_signature import Base
from frame_memory.model.memory_file import MemoryFileError
from frame_memory.model.tensor_file import FileError

I2V = "2.2 A14B I2V"


@pytest.fixture(scope="module")
def patcher():
    return reference.load(I2V, layers=1)


@pytest.fixture
def path(patcher, tmp_path):
    made = wan.patchifiers_of(patcher)
    with torch.no_grad():
        made.proj.weight.add_(1.0)
    recipe = {"schedule": "f1k1_td_f2k1_g2", "steps": 3}
    path = str(tmp_path / "a.safetensors")
    wan_file.write(path, Base.of(patcher), made.state_dict(), recipe=recipe, licence="Apache-2.0")
    return path


def test_a_file_gives_back_its_weights_and_says_what_it_is(patcher, path):
    made, lines = wan_file.with_file(patcher, wan_file.read(path))
    beside = made.get_additional_models_with_key(wan.KEY)[0].model.state_dict()
    fresh = wan.patchifiers_of(patcher).state_dict()
    assert torch.equal(beside["proj.weight"], fresh["proj.weight"] + 1)
    assert all(torch.equal(beside[k], fresh[k]) for k in fresh if k != "proj.weight")
    assert not wan.is_attached(patcher) and wan.accepts_context(made)
    report = "\n".join(lines)
    for words in ("a.safetensors", "Trained on this base", "f1k1_td_f2k1_g2", "Licence: Apache-2.0"):
        assert words in report
    assert "Not compared" not in report, "Wan knows no F0 and F1"
    noted = families.said(made)
    assert noted[families.TRAINED] and noted[families.SCHEDULE] == "f1k1_td_f2k1_g2" and not families.said(patcher)
    # 16 channels: the mask and the image of image-to-video are folded in.
    assert beside["proj_4x.weight"].shape == (128, 16, 4, 8, 8)


def test_new_ones_say_that_they_are_untrained(patcher):
    made, lines = wan_file.with_new(patcher)
    assert wan.accepts_context(made) and "UNTRAINED" in lines[0]
    assert families.said(made)[families.TRAINED] is False


def test_numbers_of_half_the_size_are_read_as_fp32(patcher, tmp_path):
    fresh, path = wan.patchifiers_of(patcher), str(tmp_path / "b.safetensors")
    wan_file.write(path, Base.of(patcher), fresh.state_dict(), dtype=torch.bfloat16)
    made, _ = wan_file.with_file(patcher, wan_file.read(path))
    beside = made.get_additional_models_with_key(wan.KEY)[0].model
    assert beside.proj.weight.dtype == torch.float32
    assert torch.equal(beside.proj.weight, fresh.proj.weight.bfloat16().float())


@pytest.mark.parametrize(("other", "said"), [
    ({"family": I2V, "layers": 1, "seed": 1}, "% agree"),
    ({"family": I2V, "layers": 2}, "depth is 1, not 2"),
    ({"family": I2V, "layers": 1, "dim": 256}, "hidden is 128, not 256"),
    ({"family": "2.1 T2V", "layers": 1}, "channels is 36, not 16"),
    ({"family": "2.2 TI2V 5B", "layers": 1}, "family is Wan21, not Wan22"),
])  # fmt: skip
def test_another_base_is_refused_with_both_fingerprints(path, other, said):
    patcher, held = reference.load(**other), wan_file.read(path)
    with pytest.raises(MemoryFileError, match=said) as refused:
        wan_file.with_file(patcher, held)
    for base in (held.base, Base.of(patcher)):
        assert base.signature.short in str(refused.value)
    assert "FramePack" not in str(refused.value)


def test_a_lora_on_the_model_is_no_other_base(patcher, path):
    clone = patcher.clone()
    clone.add_patches({"diffusion_model.blocks.0.norm3.bias": (torch.ones(128),)})
    made, _ = wan_file.with_file(clone, wan_file.read(path))
    assert wan.accepts_context(made) and made.patches


def test_what_is_no_such_file_is_refused_in_words(patcher, path, tmp_path):
    def rewritten(tensors=None, **said):
        entries, metadata = memory_file.tensor_file.read_header(path)
        held = {k: e.read() for k, e in entries.items()} if tensors is None else tensors
        other = tmp_path / "other.safetensors"
        save_file(held, other, {**metadata, **{f"frame_memory.{k}": v for k, v in said.items()}})
        return str(other)

    for tensors, said, words in (
        (None, {"kind": "semantic_pack"}, "kind is 'semantic_pack'"), (None, {"format": "2"}, "format version 2"),
        (None, {"base_signature": "?"}, "which base"), (None, {"recipe": json.dumps([1])}, "recipe"),
        ({"blocks.0.x": torch.zeros(1)}, {}, "holds blocks.0.x"),
        ({"wan_frame_context.proj.bias": torch.full((128,), torch.nan)}, {}, "not finite"),
    ):  # fmt: skip
        with pytest.raises(MemoryFileError, match=words):
            wan_file.read(rewritten(tensors, **said))
    part = rewritten({"wan_frame_context.proj.bias": torch.zeros(128)})
    with pytest.raises(MemoryFileError, match="missing"):
        wan_file.with_file(patcher, wan_file.read(part))
    with pytest.raises(MemoryFileError, match="patchifiers for Wan, which go into 'Wan Frame Context'"):
        memory_file.read(path)
    pickled = tmp_path / "c.safetensors"
    pickled.write_bytes(b"\x80\x04\x95" + bytes(20))
    with pytest.raises(FileError, match="pickle"):
        wan_file.read(str(pickled))
