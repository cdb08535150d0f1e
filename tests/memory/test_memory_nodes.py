"""The nodes: a new encoder, one from a file, and what they say."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import folder_paths
import pytest
import torch

from frame_memory.forcing.clips import TRAIN
from frame_memory.model import memory_file, wan_file
from frame_memory.model.framepack import CONTRADICTED, MODEL_OPTION
from frame_memory.model.memory import check_model, new_encoder

from .conftest import Seen, opened, prompt
from .runs import of_kind

PACK = "frame_memory_pack_of_memory_tests"


@pytest.fixture(scope="module")
def nodes():
    """nodes/memory.py as the host imports it: in a package with relative imports."""
    spec = importlib.util.spec_from_loader(PACK, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules[PACK] = package
    yield importlib.import_module(f"{PACK}.nodes.memory")
    for key in [key for key in sys.modules if key == PACK or key.startswith(f"{PACK}.")]:
        del sys.modules[key]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "frame_memory", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def save(path, memory, **more):
    parts = {"pack": memory.pack.state_dict(), "spec": memory.spec.to_dict()}
    memory_file.write(str(path), memory.base, **{**parts, **more})


def test_a_new_encoder_says_that_it_is_untrained_and_needs_a_model(nodes, model):
    made, report = nodes.FrameMemoryLoadEncoder.execute(nodes.NEW, model).result
    assert not made.trained and "UNTRAINED" in report and "gate 0" in report
    with pytest.raises(ValueError, match="'model' is not connected.*Load FramePack Model"):
        nodes.FrameMemoryLoadEncoder.execute(nodes.NEW)
    with pytest.raises(ValueError, match="or, of Wan, 'Load Diffusion Model'"):
        nodes.FrameMemoryLoadEncoder.execute(next(iter(nodes.NEW_FRAMES)))
    with pytest.raises(ValueError, match="no past to remember"):
        nodes.FrameMemoryLoadEncoder.execute(nodes.NEW, of_kind(model, "F0"))


def test_a_model_whose_file_says_another_kind_is_refused_for_all_that_is_made_on_it(nodes, model, memory):
    """The wrong kind can be forced for a video; a memory or a head made for it would be lost work."""
    known = {**model.model_options.get(MODEL_OPTION, {}), CONTRADICTED: "the file's metadata says F0"}
    wrong = model.clone()
    wrong.model_options = {**model.model_options, MODEL_OPTION: known}
    said = "taken for FramePack F1, and the file's metadata says F0.*'from the file'"
    with pytest.raises(ValueError, match="'MemoryPack Encoder' is " + said):
        nodes.FrameMemoryMemoryPack.execute(wrong, memory, prompt())
    with pytest.raises(ValueError, match="'Train Direct Forcing' is " + said):
        check_model(wrong, TRAIN)


def test_a_file_is_loaded_as_it_was_and_offered_in_the_list(nodes, model, memory, files):
    save(files / "mine.safetensors", memory)
    options = nodes.FrameMemoryLoadEncoder.define_schema().inputs[0].options
    assert options == [nodes.NEW, *nodes.NEW_FRAMES, "mine.safetensors"]
    made, report = nodes.FrameMemoryLoadEncoder.execute("mine.safetensors", model).result
    assert made.trained and made.fingerprint == memory.fingerprint and "UNTRAINED" not in report
    for name, value in memory.pack.state_dict().items():
        assert torch.equal(made.pack.get_parameter(name), value)
    before = nodes.FrameMemoryLoadEncoder.fingerprint_inputs("mine.safetensors")
    save(files / "mine.safetensors", opened(memory), licence="a longer file under the same name")
    assert nodes.FrameMemoryLoadEncoder.fingerprint_inputs("mine.safetensors") != before


def test_each_node_offers_the_files_that_it_takes_and_those_that_say_nothing(nodes, memory, files):
    tensors = {"proj.bias": torch.zeros(2)}
    save(files / "forcing.safetensors", memory, head={name: torch.zeros(2) for name in memory_file.HEAD})
    save(files / "frames.safetensors", memory, pack=None, frames=tensors)
    save(files / "pack.safetensors", memory)
    wan_file.write(str(files / "wan.safetensors"), memory.base, tensors)
    (files / "whatever.safetensors").write_bytes(b"not one")
    for module, name, offered in (
        ("memory", "FrameMemoryLoadEncoder", ["forcing", "frames", "pack"]),
        ("memory_files", "FrameMemoryLoadDirectForcing", ["forcing", "pack"]),
        ("wan", "FrameMemoryWanFrameContext", ["wan"]),
    ):
        node = getattr(importlib.import_module(f"{PACK}.nodes.{module}"), name)
        (combo,) = [given for given in node.define_schema().inputs if given.id in ("encoder_name", "file")]
        listed = [option for option in combo.options if option.endswith(".safetensors")]
        assert listed == [f"{file}.safetensors" for file in (*offered, "whatever")]


def test_a_file_with_a_closed_gate_says_untrained_as_a_new_encoder_does(nodes, model, files):
    save(files / "closed.safetensors", new_encoder(model))
    report = nodes.FrameMemoryLoadEncoder.execute("closed.safetensors", model).result[1]
    assert "gate 0" in report and "UNTRAINED: its gate is closed" in report


def test_files_that_hold_no_memory_are_refused(nodes, model, memory, files):
    head = {name: torch.zeros(2) for name in memory_file.HEAD}
    save(files / "head.safetensors", memory, pack=None, spec=None, head=head)
    with pytest.raises(ValueError, match="head and no memory.*Load Direct Forcing Checkpoint"):
        nodes.FrameMemoryLoadEncoder.execute("head.safetensors")
    save(files / "later.safetensors", memory, spec={**memory.spec.to_dict(), "layers": 2})
    with pytest.raises(ValueError, match=r"later.safetensors.*newer version.*Load Memory Encoder"):
        nodes.FrameMemoryLoadEncoder.execute("later.safetensors")


def test_memorypack_encoder_anchors_attaches_and_reports(nodes, model, memory):
    given, _ = nodes.FrameMemoryLoadEncoder.execute(nodes.NEW, model).result
    patched, anchored, report = nodes.FrameMemoryMemoryPack.execute(model, given, prompt(picture=False), Seen(2)).result
    assert given.text is None and not model.additional_models
    assert patched.get_additional_models()[0].model is anchored.pack is given.pack
    assert torch.equal(anchored.vision, Seen(2).last_hidden_state)
    assert "7 tokens of the prompt and 4 tokens of the picture" in report and "Made for this base" in report
