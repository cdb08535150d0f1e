"""Encoders of frame preservation as FRAME_MEMORY: made, kept in files, attached, refused where they do not belong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from benchmarks import parity_models
from frame_memory.model import checkpoint, head, memory_file
from frame_memory.model.framepack import CONTRADICTED, MODEL_OPTION
from frame_memory.model.memory import FrameMemory, MemoryMismatch, detach, encoder_of, new_encoder, of_kind
from frame_memory.model.memory_file import MemoryFileError
from frame_memory.model.preserved_memory import (
    PreservedMemory,
    attach_preserved,
    check_preserved,
    memory_of,
    new_memory,
    with_cross_attention,
    with_tokens,
)
from frame_memory.plan import PlanError
from frame_memory.plan.cross_attention import CrossAttentionSpec

from .conftest import opened
from .runs import of_kind as of_framepack
from .small import drawn

NODE = "Load Memory Encoder"
SMALL = {"channels": (4, 6, 8, 8), "heads": 2}


@pytest.fixture
def memory(model):
    """Two encoders with random numbers where fresh ones have zeros."""
    made = new_memory(model, "4x4x2", "2x2x8", **SMALL)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, value in sorted(made.history.named_parameters()):
            if not value.any():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return made


def write(path, memory, **more):
    parts = {"frames": memory.history.state_dict(), "spec": memory.to_spec()}
    memory_file.write(str(path), memory.base, **{**parts, **more})
    return str(path)


def test_a_fresh_memory_is_the_bases_embedding_of_a_small_copy(model):
    """By plain sums: of each block the mean of the pixels round its middle, patch by patch, by the base's weights."""
    made = new_memory(model, "2x2x1", **SMALL)
    layer = model.model.diffusion_model.img_in.proj
    assert not made.trained and made.base is not None and "UNTRAINED" in made.describe()
    history = drawn(2, 16, 3, 9, 13)
    with torch.no_grad():
        tokens = made.history(history, (1, 3)).tokens
    small = torch.stack([
        torch.stack([history[:, :, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((3, 4)) for x in range(6)], -1)
        for y in range(4)
    ], -2)  # fmt: skip
    weight, bias = layer.weight.float(), layer.bias.float()
    expected = [
        torch.einsum("bcyx,ocyx->bo", small[:, :, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2], weight[:, :, 0]) + bias
        for t in range(3) for y in range(2) for x in range(3)
    ]  # fmt: skip
    assert torch.allclose(tokens, torch.stack(expected, 1), atol=1e-4)


def test_loras_on_the_model_are_no_part_of_a_fresh_memory(model):
    key = "diffusion_model.img_in.proj.weight"
    patched = model.clone()
    patched.add_patches({key: ("diff", (torch.ones_like(model.model.diffusion_model.img_in.proj.weight),))})
    assert new_memory(patched, "4x4x2", **SMALL).fingerprint == new_memory(model, "4x4x2", **SMALL).fingerprint


def test_tokens_of_two_encoders_stand_beside_each_other_over_the_same_frames(memory):
    history = drawn(2, 16, 21, 9, 17)
    with torch.no_grad():
        made = memory.history(history, (1, 10, 19, 21))
        alone = [encoder(history[:, :, :16], (8, 16)) for encoder in memory.history.encoders]
    assert torch.equal(made.tokens, torch.cat([one.tokens for one in alone], 1))
    assert len(made.places) == made.tokens.shape[1] == 8 * 1 * 2 + 2 * 2 * 4
    assert made.places[0] == (1, 2, 2) and made.places[16] == (4, 1, 1) and made.places[-1] == (12, 3, 7)


@pytest.mark.parametrize(("recipe", "seen"), [
    ({"stage": "1: frame query", "schedule": "td_f3k1_g9"}, ("", "")),  # as written before it was stage 2's alone
    ({"stage": "2: next section", "schedule": "td_f3k1_g9", "identity": {"patchifiers": "1f"}}, ("td_f3k1_g9", "1f")),
    ({"stage": "2: next section", "schedule": None, "identity": {"patchifiers": None}}, ("", "")),
    ({"stage": "2: next section", "identity": "x"}, ("", "")),
])  # fmt: skip
def test_only_stage_two_says_which_frames_were_seen_beside_the_memory(memory, tmp_path, recipe, seen):
    back = memory_of(memory_file.read(write(tmp_path / "mine.safetensors", memory, recipe=recipe)), NODE)
    assert (back.schedule, back.patchifiers) == seen


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_comes_back_as_it_was(model, memory, tmp_path, dtype, cross):
    memory = with_cross_attention(memory, model) if cross else memory
    tensors = {n: v if ".embed." in n else v.to(dtype) for n, v in memory.history.state_dict().items()}
    path = write(tmp_path / "mine.safetensors", memory, frames=tensors, recipe={"steps": 3}, licence="Apache-2.0")
    held = memory_file.read(path)
    assert held.kind == memory_file.FRAME_PRESERVATION and held.recipe == {"steps": 3} and not held.pack
    assert held.base == memory.base and held.licence == "Apache-2.0"
    back = memory_of(held, NODE)
    assert isinstance(back, PreservedMemory) and back.specs == memory.specs and back.trained
    assert back.label == "mine.safetensors" and back.history.dtype == dtype and (back.cross is not None) == cross
    assert back.cross == memory.cross and ("cross_attention" in held.spec) == cross
    assert ("of them cross-attention in 3 blocks" in back.describe()) == cross
    for name, value in back.history.state_dict().items():
        assert torch.equal(value, tensors[name]) and value.dtype == tensors[name].dtype, name
    assert "Trained on this base" in check_preserved(back, model, NODE)


def test_a_semantic_pack_is_loaded_by_the_same_door(model, tmp_path):
    given = opened(new_encoder(model))
    path = str(tmp_path / "pack.safetensors")
    memory_file.write(path, given.base, pack=given.pack.state_dict(), spec=given.to_spec())
    assert isinstance(memory_of(memory_file.read(path), NODE, model), FrameMemory)


def test_parts_that_make_no_file_and_files_of_the_wrong_kind_are_refused_in_words(model, memory, tmp_path):
    pack = {"gate": torch.zeros(())}
    for wrong in ({"pack": pack}, {"spec": None}):
        with pytest.raises(MemoryFileError, match="frame preservation with its spec, alone"):
            write(tmp_path / "x.safetensors", memory, **wrong)
    held = memory_file.read(write(tmp_path / "mine.safetensors", memory))
    with pytest.raises(MemoryFileError, match="frame preservation and no head.*'Load Memory Encoder'"):
        head.apply_head(model, held, 1.0)
    with pytest.raises(MemoryMismatch, match="frame preservation and no SemanticPack.*'--memory'"):
        encoder_of(held, "--memory", model)
    later = memory.to_spec()
    later["encoders"][0]["layers"] = 2
    for spec in (later, {}, {"encoders": [{"rate": "3x3x3"}]}):
        held = memory_file.read(write(tmp_path / "later.safetensors", memory, spec=spec))
        with pytest.raises(MemoryMismatch, match=r"later.safetensors.*'Load Memory Encoder'"):
            memory_of(held, NODE)
    narrow = {**memory.to_spec(), "encoders": memory.to_spec()["encoders"][:1]}
    held = memory_file.read(write(tmp_path / "narrow.safetensors", memory, spec=narrow))
    with pytest.raises(MemoryMismatch, match=r"encoders.1.*tensors differ"):
        memory_of(held, NODE)


def test_another_base_width_or_kind_is_refused_with_both_fingerprints(model, memory, tmp_path):
    from safetensors.torch import save_file

    for number, sizes in enumerate(({"seed": 5}, {"heads": 2})):
        options = {"seed": 0, "heads": 1, "double": 1, "single": 2, "text_features": 64, **sizes}
        path = tmp_path / f"{number}.safetensors"
        tensors = parity_models.make_reference(**options).state_dict()
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(path))
        other = of_framepack(checkpoint.load_framepack(str(path)), "F1", "HunyuanVideo")
        with pytest.raises(MemoryMismatch, match="was made for another base") as raised:
            check_preserved(memory, other, NODE)
        assert memory.base.signature.short in str(raised.value)
    with pytest.raises(MemoryMismatch, match="no past to remember"):
        check_preserved(memory, of_framepack(model, "F0"), NODE)
    known = {**model.model_options.get(MODEL_OPTION, {}), CONTRADICTED: "the file's metadata says F0"}
    wrong = model.clone()
    wrong.model_options = {**model.model_options, MODEL_OPTION: known}
    with pytest.raises(MemoryMismatch, match="taken for FramePack F1"):
        new_memory(wrong, "4x4x2")


def test_cross_attention_for_another_number_of_blocks_is_refused(model, memory, tmp_path):
    read = with_cross_attention(memory, model)
    assert read.cross == CrossAttentionSpec(128, 8, 1, 1, 2)
    assert "Made for this base" in check_preserved(read, model, NODE)
    other = new_memory(reference.load("2.1 T2V"), "4x4x2", "2x2x8", **SMALL, cross_attention=True)
    with pytest.raises(MemoryMismatch, match="its cross-attention's double is 2, not 1"):
        check_preserved(replace(other, base=None), model, NODE)
    spec = {n: v for n, v in read.to_spec().items() if n != "cross_attention"}
    held = memory_file.read(write(tmp_path / "lost.safetensors", read, spec=spec))
    with pytest.raises(MemoryMismatch, match=r"lost.safetensors: Features.*read by None.*'Load Memory Encoder'"):
        memory_of(held, NODE)


def test_each_kind_is_refused_where_the_other_is_meant(model, memory):
    assert of_kind(memory, memory_file.FRAME_PRESERVATION, "A", "B") is memory
    with pytest.raises(MemoryMismatch, match="'A' is new: frame preservation 4x4x2 \\+ 2x2x8.*belongs into 'B'"):
        of_kind(memory, memory_file.SEMANTIC_PACK, "A", "B")
    with pytest.raises(MemoryMismatch, match="is new: SemanticPack"):
        of_kind(new_encoder(model), memory_file.FRAME_PRESERVATION, "A", "B")


def test_it_is_attached_to_a_copy_and_taken_off_without_trace(model, memory):
    patched = attach_preserved(model, memory)
    assert patched.get_additional_models()[0].model is memory.history and not model.additional_models
    assert not detach(patched).additional_models


def test_the_budget_names_its_policy(memory):
    """Of two encoders the finer goes first; of one the oldest chunk."""
    both = with_tokens(memory, 50).budget
    assert (both.rate, both.past, both.beside) == ("4x4x2", "thin", ("2x2x8",))
    turned = replace(memory, specs=memory.specs[::-1], tokens=50).budget
    assert turned == both
    one = replace(memory, specs=memory.specs[:1], tokens=50).budget
    assert (one.rate, one.past, one.beside) == ("4x4x2", "drop", ())
    with pytest.raises(PlanError, match="tokens 0"):
        with_tokens(memory, 0)


def test_what_a_trainer_makes_learn_leaves_the_bases_embedding_alone(memory):
    memory.history.requires_grad_(True)
    frozen = {n for n, p in memory.history.named_parameters() if not p.requires_grad}
    assert frozen == {f"encoders.{i}.embed.{n}" for i in (0, 1) for n in ("weight", "bias")}
    memory.history.requires_grad_(False)
    assert not any(p.requires_grad for p in memory.history.parameters())
