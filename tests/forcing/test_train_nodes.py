"""The nodes that train, on core's Wan: a memory and its LoRA from the node, and what 'write' refuses."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from memory.test_memory_nodes import PACK, nodes  # noqa: F401 (fixture)
from model import wan_reference as reference

from .test_preserving_wan import SMALL, T2V
from .test_train_run import load, tiny_file  # noqa: F401 (fixture)

WRITE = "write for the command line"


@pytest.fixture
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder, with the folders of models in it."""
    known, before = folder_paths.folder_names_and_paths, folder_paths.get_output_directory()
    for name in ("frame_memory", "loras"):
        monkeypatch.setitem(known, name, ([str(tmp_path / name)], {".safetensors"}))
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


def videos(text: int, fps: float, base: str, frames: int = 21, **more) -> dict:
    """A clip of one Wan section, or two of FramePack's, as 'Video Clips' hands it on."""
    latent = {"samples": reference.drawn(1, 16, frames, 8, 10, seed=3), "frame_memory": {"base": base, "fps": fps}}
    return {"latents": [latent], "positive": [[[reference.drawn(1, 3, text, seed=4), more]]]}


def node(family: str, name: str, /, **asked):
    """Run a node as core does, with a list for each input."""
    given = {"steps": 1, "training_seed": 0, "learning_rate": 1e-3, "name": "mine", "rank": 2} | asked
    lists = {"latents", "positive"}
    values = {key: value if key in lists else [value] for key, value in given.items()}
    with torch.inference_mode():
        return getattr(importlib.import_module(f"{PACK}.nodes.{family}"), name).execute(**values).result


def test_frame_preservation_is_trained_on_wan(nodes, output):  # noqa: F811
    own = importlib.import_module(f"{PACK}.frame_memory.model.preserved_memory")
    model = reference.load(T2V, layers=1)
    given = own.new_memory(model, "4x4x2", **SMALL)
    asked = {"model": model, "memory": given, "stage": "1: frame query", "clips": 1, "encoder_first": 0.0}
    clips = videos(24, 16.0, "Wan21")
    trained, memory, file, _, report = node("preservation_training", "FrameMemoryTrainPreservation", **asked, **clips)
    assert "1: frame query: 1 of 1 steps on 1 videos" in report and "LoRA: models/loras/mine.safetensors" in report
    assert memory.trained and memory.fingerprint != given.fingerprint
    assert len(trained.patches) == 10 and not model.patches
    assert (output / "frame_memory" / file).is_file() and (output / "loras" / "mine.safetensors").is_file()


@pytest.mark.parametrize("stage", ["1: frame query", "2: next section", "Wan: frame context"])
def test_nothing_holds_a_model_after_it_was_trained_or_cancelled(nodes, output, stage):  # noqa: F811
    """Not even a cycle: core may take a MODEL that its garbage collector lets go of for a leak."""
    parts = ("frame_memory.model.preserved_memory", "frame_memory.model.wan_file", "nodes.sockets", "frame_memory.plan")
    own, wan_file, sockets, plan = (importlib.import_module(f"{PACK}.{part}") for part in parts)

    def train(base, name: str) -> None:
        asked = {"model": wan_file.with_new(base)[0], "stage": stage, "name": name, **videos(24, 16.0, "Wan21", 41)}
        if stage == "Wan: frame context":
            context = sockets.FrameContext(plan.parse_schedule(plan.PRESETS["Wan, 81 frames"]))
            node("wan_training", "FrameMemoryTrainWanContext", **asked, frame_context=context)
        else:
            more = {"memory": own.new_memory(base, "4x4x2", **SMALL), "clips": 2, "encoder_first": 0.0}
            node("preservation_training", "FrameMemoryTrainPreservation", **asked, **more)

    interrupt = comfy.model_management.interrupt_current_processing
    gc.collect()
    gc.disable()
    try:
        for name, cancel in (("whole", False), ("stopped", True)):
            base, stopped = reference.load(T2V, layers=1), False
            held = weakref.ref(base.model)
            interrupt(cancel)
            try:
                train(base, name)
            except comfy.model_management.InterruptProcessingException:
                stopped = True
            del base
            assert stopped == cancel and held() is None, name
    finally:
        gc.enable()
        interrupt(False)


WRITTEN = {
    "rate": (False, "training", "FrameMemoryTrainDirectForcing", 16.0, "has 16 frames a second, and the MODEL makes"),
    "Wan": (True, "training", "FrameMemoryTrainDirectForcing", 16.0, "'Train Direct Forcing'.* FramePack"),
    "Wan's rate": (True, "preservation_training", "FrameMemoryTrainPreservation", 30.0, "the MODEL makes 16"),
    "FramePack": (False, "wan_training", "FrameMemoryTrainWanContext", 30.0, "Expected Wan 2.1 or 2.2"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_nothing_is_written_for_the_command_line_that_it_would_refuse(nodes, output, tiny_file, case):  # noqa: F811
    on_wan, family, name, fps, said = WRITTEN[case]
    asked = {"model": reference.load(T2V, layers=1) if on_wan else load(tiny_file), "stage": WRITE, "memory": None}
    if family == "wan_training":
        sockets, plan = (importlib.import_module(f"{PACK}.{part}") for part in ("nodes.sockets", "frame_memory.plan"))
        asked["frame_context"] = sockets.FrameContext(plan.parse_schedule(plan.PRESETS["Wan, 81 frames"]))
    more = {} if on_wan else {"pooled_output": torch.zeros(1, 768)}
    clips = videos(24 if on_wan else 64, fps, "Wan21" if on_wan else "HunyuanVideo", **more)
    with pytest.raises(ValueError, match=said):
        node(family, name, **asked, **clips)
    assert not list(output.rglob("*.safetensors"))
