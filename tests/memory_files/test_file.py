"""Files of models/frame_memory: what goes in comes out, and nothing else is taken for one."""

import json
import os
import pickle

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import parity_models as pm
from frame_memory.model import framepack, key_map, memory_file, tensor_file
from frame_memory.model.base_signature import Base, Signature
from frame_memory.model.memory_file import MemoryFileError
from frame_memory.model.tensor_file import FileError

TINY = {"heads": 1, "double": 1, "single": 2, "text_features": 64}

NODE = "Load Direct Forcing Checkpoint"
SPEC = {"hidden": 128, "heads": 1, "squeeze": "A", "axes_dim": [16, 56, 56]}


def reference(seed=0):
    """diffusers' state dict of a tiny network, every number random."""
    return pm.make_reference(seed=seed, **TINY).state_dict()


@pytest.fixture(scope="module")
def native():
    return key_map.convert_diffusers(reference())


def load(native, kind="F1", family="HunyuanVideo"):
    framepack.register()
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(native))
    said = {"base": family, "kind": kind}
    patcher.model_options = {**patcher.model_options, framepack.MODEL_OPTION: said}
    return patcher


@pytest.fixture(scope="module")
def base(native):
    return Base.of(load(native))


def head_of(native, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(native[k].shape, generator=generator) for k in memory_file.HEAD}


def small_pack():
    return {"gate": torch.tensor([0.25]), "embed.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)}


def test_a_head_and_a_pack_come_back_as_they_were(tmp_path, native, base):
    path = str(tmp_path / "sub" / "memory.safetensors")
    head, recipe = head_of(native), {"losses": "direct", "steps": 7, "sigma": {"shift": 0.8}}
    memory_file.write(path, base, pack=small_pack(), spec=SPEC, head=head, recipe=recipe, licence="Apache-2.0")
    read = memory_file.read(path)
    assert (read.kind, read.head_form, read.licence) == ("direct_forcing", "replacement", "Apache-2.0")
    assert read.spec == SPEC and read.recipe == recipe and read.base == base
    assert all(torch.equal(read.head[k], head[k]) for k in head) and set(read.head) == set(head)
    assert set(read.pack) == set(small_pack())
    for key, value in small_pack().items():
        assert torch.equal(read.pack[key], value) and read.pack[key].dtype == value.dtype


def test_the_file_names_everything_in_its_metadata_as_strings(tmp_path, native, base):
    path = str(tmp_path / "head.safetensors")
    memory_file.write(path, base, head=head_of(native), head_form="difference", recipe={"steps": 3})
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    said = header.pop("__metadata__")
    assert all(isinstance(v, str) for v in said.values())
    assert said["frame_memory.format"] == "1" and said["frame_memory.kind"] == "direct_forcing"
    assert (said["frame_memory.base"], said["frame_memory.framepack_kind"]) == ("HunyuanVideo", "F1")
    sizes = json.loads(said["frame_memory.topology"])
    assert sizes == {"hidden": 128, "heads": 1, "depth": 1, "single_depth": 2, "channels": 16, "text": 64}
    assert said["frame_memory.head"] == "difference" and json.loads(said["frame_memory.recipe"]) == {"steps": 3}
    assert {f"head.{k}" for k in memory_file.HEAD} == set(header)
    assert os.listdir(tmp_path) == ["head.safetensors"]


@pytest.mark.parametrize("wrong", [
    {}, {"pack": {"gate": torch.zeros(1)}}, {"spec": SPEC}, {"head": {"final_layer.linear.weight": torch.zeros(2, 2)}},
    {"head_form": "sum"},
])  # fmt: skip
def test_parts_that_make_no_file_are_refused_and_the_file_before_stays(tmp_path, native, base, wrong):
    path = tmp_path / "memory.safetensors"
    memory_file.write(str(path), base, head=head_of(native))
    before = path.read_bytes()
    given = {"head": head_of(native), **wrong} if "head_form" in wrong else wrong
    with pytest.raises(MemoryFileError):
        memory_file.write(str(path), base, **given)
    assert path.read_bytes() == before


def test_numbers_that_are_not_finite_are_neither_written_nor_loaded(tmp_path, native, base):
    path = str(tmp_path / "memory.safetensors")
    head = head_of(native)
    head["final_layer.linear.bias"][3] = float("nan")
    with pytest.raises(MemoryFileError, match=r"linear\.bias.*not finite"):
        memory_file.write(path, base, head=head)
    save_file(head, path)
    with pytest.raises(MemoryFileError, match=r"linear\.bias.*not finite"):
        memory_file.read(path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.path.join(os.environ["PYTEST_TMP_BOMB"], "ran"),))


def test_fault_33_and_40_files_that_are_no_safetensors_are_named_and_never_run(tmp_path, monkeypatch, native, base):
    monkeypatch.setenv("PYTEST_TMP_BOMB", str(tmp_path))
    whole = tmp_path / "whole.safetensors"
    memory_file.write(str(whole), base, head=head_of(native))
    data = whole.read_bytes()
    files = {
        "cut.safetensors": (data[:-100], "interrupted download"),
        "headless.safetensors": (data[:40], "interrupted download"),
        "empty.safetensors": (b"", "0 bytes"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\nsize 99\n", "Git-LFS pointer"),
        "page.safetensors": (b"<!DOCTYPE html><html>", "web page"),
        "bomb.pt": (pickle.dumps(Bomb()), "not opened"),
        "bomb.safetensors": (pickle.dumps(Bomb()), "not opened"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=f"(?s){words}.*'{NODE}'|{words}") as raised:
            memory_file.read(str(tmp_path / name), NODE)
        assert name in str(raised.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0x280, 0x580, 0x3C20], ids=["pickle 2", "pickle 5", "web page"])
def test_a_header_whose_length_begins_as_another_kind_of_file_is_read(tmp_path, length):
    path, kept = tmp_path / "file.safetensors", {"a": torch.arange(3.0)}
    save_file(kept, path, {"note": ""})
    save_file(kept, path, {"note": "x" * (length - int.from_bytes(path.read_bytes()[:8], "little"))})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert torch.equal(tensor_file.read(str(path))["a"], kept["a"])


def test_other_safetensors_files_are_named_and_refused(tmp_path, native):
    lora = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 128)}
    cases = ((lora, "'Load Video LoRA'"), (native, "'Load FramePack Model'"), ({"x": torch.zeros(2)}, "a head alone"))
    for number, (tensors, words) in enumerate(cases):
        path = str(tmp_path / f"{number}.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        with pytest.raises(MemoryFileError, match=words) as raised:
            memory_file.read(path, NODE)
        assert path in str(raised.value) and NODE in str(raised.value)


def test_of_a_large_file_that_is_none_of_ours_only_the_names_are_read(tmp_path, monkeypatch):
    path = str(tmp_path / "other.safetensors")
    save_file({"encoder.weight": torch.zeros(64, 64), "norm_out.linear.weight": torch.zeros(4, 4)}, path)
    monkeypatch.setattr(tensor_file.Entry, "read", lambda self: pytest.fail("it was read"))
    with pytest.raises(MemoryFileError, match="a head alone"):
        memory_file.read(path, NODE)


@pytest.mark.parametrize(("change", "words"), [
    ({"format": "2"}, "format version 2.*Update"), ({"format": None}, "no format version"),
    ({"kind": "x"}, "kind is 'x'"), ({"head": "x"}, "head is 'x'"), ({"recipe": "{"}, "recipe"),
    ({"recipe": "[]"}, "recipe"), ({"spec": None}, "spec"), ({"topology": "{}x"}, "which base"),
    ({"base_signature": None}, "which base"), ({"base_signature": "?"}, "which base"),
])  # fmt: skip
def test_damaged_metadata_is_named(tmp_path, native, base, change, words):
    path = str(tmp_path / "m.safetensors")
    memory_file.write(path, base, head=head_of(native), pack=small_pack(), spec=SPEC, recipe={"a": 1})
    with open(path, "rb") as file:
        said = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    for key, value in change.items():
        said.pop(f"frame_memory.{key}")
        said |= {} if value is None else {f"frame_memory.{key}": value}
    held = {f"head.{k}": v for k, v in head_of(native).items()}
    save_file(held | {f"semantic_pack.{k}": v for k, v in small_pack().items()}, path, metadata=said)
    with pytest.raises(MemoryFileError, match=words) as raised:
        memory_file.read(path, NODE)
    assert path in str(raised.value)


def test_fault_37_another_base_width_or_kind_is_refused_with_both_fingerprints(tmp_path, native, base):
    path = str(tmp_path / "memory.safetensors")
    memory_file.write(path, base, head=head_of(native))
    file = memory_file.read(path)
    assert "Trained on this base" in file.check_base(base, NODE)
    trained_on = key_map.convert_diffusers(reference(seed=5))
    wide = key_map.convert_diffusers(pm.make_reference(**{**TINY, "heads": 2}).state_dict())
    deep = key_map.convert_diffusers(pm.make_reference(**{**TINY, "single": 3}).state_dict())
    others = {
        "kind is F1, not F0": Base.of(load(native, kind="F0")),
        "family is HunyuanVideo, not Wan": Base.of(load(native, family="Wan")),
        r"\d+% agree": Base.of(load(trained_on)),
        "hidden is 128, not 256": Base.of(load(wide)),
        "single depth is 2, not 3": Base.of(load(deep)),
    }
    for words, other in others.items():
        with pytest.raises(MemoryFileError, match=words) as raised:
            file.check_base(other, NODE)
        text = str(raised.value)
        assert base.signature.short in text and other.signature.short in text
        assert str(base) in text and str(other) in text and NODE in text


def test_a_model_from_a_stock_loader_says_no_kind_and_is_taken_with_a_word_on_it(tmp_path, native, base):
    path = str(tmp_path / "memory.safetensors")
    memory_file.write(path, base, head=head_of(native))
    framepack.register()
    stock = Base.of(comfy.sd.load_diffusion_model_state_dict(dict(native)))
    said = memory_file.read(path).check_base(stock, NODE)
    assert "does not say: which VAE it works with and whether it is F0 or F1." in said


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp8 blocks"])
def test_one_base_in_other_number_formats_is_the_same_base(stored, native, base):
    def kept(key, value):
        if stored == "fp8 blocks" and value.ndim == 2 and "blocks." in key:
            return value.to(torch.float8_e4m3fn)
        return value.half() if stored == "fp16" else value.bfloat16()

    other = Base.of(load({k: kept(k, v) for k, v in native.items()}))
    assert base.difference(other) == "" and base.signature.agreement(other.signature) == 1.0
    assert base.signature.short == other.signature.short or stored == "fp16"


def test_loras_and_heads_on_a_loaded_model_do_not_change_its_base(native, base):
    import comfy.model_management

    patcher = load(native).clone()
    keys = [f"diffusion_model.{k}" for k, v in native.items() if v.ndim == 1]
    patcher.add_patches({k: ("diff", (torch.ones_like(native[k.removeprefix("diffusion_model.")]),)) for k in keys})
    assert Base.of(patcher) == base
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    try:
        bias = patcher.model.diffusion_model.img_in.proj.bias
        assert torch.allclose(bias, native["img_in.proj.bias"] + 1, atol=0.02)  # the patch is in the weights
        assert Base.of(patcher) == base
    finally:
        comfy.model_management.unload_all_models()


def test_the_signature_reads_only_vectors_outside_the_head_and_survives_as_text():
    network = torch.nn.Module()
    network.first = torch.nn.Linear(8, 8)
    network.final_layer = torch.nn.Linear(8, 8)
    made = Signature.of(network, {})
    expected = network.first.bias.detach()[[0, 2, 4, 6]].bfloat16().float()
    assert torch.equal(torch.tensor(made.numbers), expected)
    assert Signature.from_text(made.to_text()) == made
    changed = Signature.of(network, {"first.bias": expected.new_zeros(8)})
    assert changed.numbers == (0.0,) * 4 and made.agreement(changed) == 0.0 and made.agreement(made) == 1.0
