"""The training graph on the real server: a folder of clips to two LoRAs by core's Train LoRA, which core then loads."""

import logging
import sys

import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file

from frame_memory.forcing.first_frame import EXPERTS

from .tiny import REPO, one, shrink_wan, ui_graph

sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from first_frame import clip_folders, wan_files

GRAPH = REPO / "workflows" / "ffgo_train.json"


@pytest.fixture(scope="module")
def trained(server, api, wan_stand_ins):
    """(API graph, run) of two steps for each expert on two clips."""
    folder = ui_graph(GRAPH)["nodes"][4]["widgets_values"][0]
    clip_folders.make(server.base / "input" / folder)
    prompt = shrink_wan(api(GRAPH))
    prompt[one(prompt, "FrameMemoryFFGoDataset")[0]]["inputs"].update(width=96, height=64, length=9)
    for node in prompt.values():
        if node["class_type"] == "TrainLoraNode":
            node["inputs"].update(steps=2, grad_accumulation_steps=1, rank=4)
    return prompt, server.client.queue(prompt, timeout=900, workflow=ui_graph(GRAPH))


def test_the_graph_has_the_published_settings_where_train_lora_has_them(api):
    prompt = api(GRAPH)
    experts = {i: n["inputs"] for i, n in prompt.items() if n["class_type"] == "FrameMemoryExpertRange"}
    assert {e["expert"] for e in experts.values()} == set(EXPERTS)
    for expert in experts.values():
        assert expert["boundary"] == 0.9 and expert["shift"] == 5
        file = prompt[expert["model"][0]]["inputs"]["unet_name"]
        assert expert["expert"].replace(" ", "_") in file, "each model at its own levels"
    training = [n["inputs"] for n in prompt.values() if n["class_type"] == "TrainLoraNode"]
    for inputs in training:
        assert inputs["model"][0] in experts and inputs["rank"] == 128 and inputs["optimizer"] == "AdamW"
        assert inputs["batch_size"] * inputs["grad_accumulation_steps"] == 4 and inputs["batch_size"] == 1
        assert inputs["training_dtype"] == "bf16" and not inputs["bucket_mode"] and inputs["steps"] == 600
    assert len({inputs["model"][0] for inputs in training}) == 2
    assert one(prompt, "FrameMemoryFFGoDataset")[1]["inputs"]["length"] == 81


def test_both_loras_are_trained_saved_and_loaded_with_nothing_unmatched(trained, server, caplog):
    prompt, run = trained
    data = one(prompt, "FrameMemoryFFGoDataset")[0]
    assert "2 of 2 clips used: 9 frames of 96x64" in run.outputs[data]["text"][0]
    files = sorted((server.base / "output" / "loras").glob("FFGo_*_2_steps_*.safetensors"))
    assert [f.name.split("_2_steps")[0] for f in files] == ["FFGo_high_noise", "FFGo_low_noise"]
    high, low = (load_file(f) for f in files)
    assert high.keys() == low.keys() and any(not torch.equal(high[name], low[name]) for name in high)
    for file, name in zip(files, (wan_files.HIGH, wan_files.LOW), strict=True):
        model = comfy.sd.load_diffusion_model(str(server.base / "models" / "diffusion_models" / name))
        with caplog.at_level(logging.WARNING):
            changed, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)
        assert not [r.getMessage() for r in caplog.records if "not loaded" in r.getMessage().lower()]
        linears = [key for key in changed.patches if ".blocks." in key and key.endswith(".weight")]
        assert len(linears) >= 10 * wan_files.BLOCKS


@pytest.mark.parametrize(("expert", "warned"), [("high noise", False), ("low noise", True)])
def test_a_model_at_the_other_experts_levels_is_told(server, wan_stand_ins, expert, warned):
    """Both have the same shapes, so hours of training would end in a LoRA that does nothing where it is used."""
    graph = {
        "model": {
            "class_type": "UNETLoader", "inputs": {"unet_name": wan_files.HIGH, "weight_dtype": "default"},
        },
        "range": {
            "class_type": "FrameMemoryExpertRange",
            "inputs": {"model": ["model", 0], "expert": expert, "boundary": 0.9, "shift": 5.0},
        },
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["range", 1]}},
    }  # fmt: skip
    (said,) = server.client.queue(graph, timeout=120).outputs["report"]["text"]
    assert said.startswith("Warning: by its file's name this is the high noise model") is warned
    assert f"{expert} expert: " in said
