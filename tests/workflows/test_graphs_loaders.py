"""Load Video LoRA and the converted copy of Load FramePack Model, on the real server."""

import copy
import json
import shutil

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.claims_rows import fresh
from frame_memory.model import key_map
from frame_memory.sampling.prompts import lost_spaces
from scripts.client import PromptError
from scripts.workflow import set_inputs

from .tiny import REPO, one, shrink

LOADER, LORA, SAVE = "FrameMemoryLoadFramePack", "FrameMemoryLoraLoader", "FrameMemorySaveLongVideo"
FINISHED, SAMPLER = "section 1 is finished", "FrameMemoryAntiDriftSampler"
STEM = "diffusion_pytorch_model"
FOLDER = "FramePack_F1_mini"


@pytest.fixture(scope="module")
def smallest(api):
    """The self-test graph with one section of two steps."""
    return shrink(api(REPO / "workflows" / "selftest.json"), seconds=1.2, steps=2)


@pytest.fixture(scope="module")
def weights():
    """The self-test F1 in bf16, as files are published."""
    return {name: value.bfloat16() for name, value in fresh("F1").state_dict().items()}


def video_of(server, prompt):
    """(run, frames of its mp4). Sampled, not found: sections that an equal run has finished would be reused."""
    shutil.rmtree(server.base / "output" / "frame_memory", ignore_errors=True)
    before = server.log().count(FINISHED)
    run = server.client.queue(prompt, timeout=600)
    cached = [node_id for data in run.of("execution_cached") for node_id in data["nodes"]]
    assert one(prompt, SAMPLER)[0] in cached or server.log().count(FINISHED) == before + 1
    (file,) = run.outputs[one(prompt, SAVE)[0]]["images"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        return run, np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def between(prompt, **inputs):
    """The graph with Load Video LoRA behind the model loader."""
    changed = copy.deepcopy(prompt)
    loader = one(prompt, LOADER)[0]
    for node in changed.values():
        for name, value in node["inputs"].items():
            if value == [loader, 0]:
                node["inputs"][name] = ["lora", 0]
    inputs = {"model": [loader, 0], "strength": 1.0, **inputs}
    changed["lora"] = {"class_type": LORA, "inputs": inputs, "_meta": {"title": "LoRA"}}
    return changed


def text_of(run, node_id: str) -> str:
    return "\n".join(run.outputs[node_id]["text"])


@pytest.fixture(scope="module")
def loras(server, weights):
    """A LoRA in kohya names that fits wholly, and one of which nothing fits."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    fitting = {}
    hidden = weights["img_in.proj.bias"].shape[0]
    for block in ("transformer_blocks_0", "single_transformer_blocks_0"):
        name = f"lora_unet_{block}_attn_to_q"
        fitting[f"{name}.lora_down.weight"] = torch.randn(4, hidden, generator=generator)
        fitting[f"{name}.lora_up.weight"] = torch.randn(hidden, 4, generator=generator)
    save_file(fitting, folder / "fits.safetensors")
    save_file({f"lora_unet_zzz_{i}.lora_down.weight": torch.zeros(2, 2) for i in range(4)}, folder / "not.safetensors")
    return folder


def test_a_lora_says_how_much_of_it_fits_and_acts(server, smallest, loras):
    _, plain = video_of(server, smallest)
    run, changed = video_of(server, between(smallest, lora_name="fits.safetensors"))
    report = text_of(run, "lora")
    assert report.startswith("fits.safetensors\n2 of 2 modules matched (100%); FramePack in kohya (musubi) names.")
    assert np.abs(plain.astype(int) - changed).max() > 20
    _, off = video_of(server, between(smallest, lora_name="fits.safetensors", strength=0.0))
    assert np.array_equal(off, plain)


def test_fault_38_a_lora_of_which_nothing_fits_is_refused_or_passed_on(server, smallest, loras):
    with pytest.raises(PromptError) as error:
        server.client.queue(between(smallest, lora_name="not.safetensors"), timeout=600)
    text = str(error.value)
    assert text.startswith(LORA) and "'Load Video LoRA'" in text
    assert all(f"lora_unet_zzz_{i}.lora_down.weight" in text for i in range(3))
    run, video = video_of(server, between(smallest, lora_name="not.safetensors", allow_no_match=True))
    assert "0 of 4 modules matched" in text_of(run, "lora") and "Warning" in text_of(run, "lora")
    assert np.array_equal(video, video_of(server, smallest)[1])


@pytest.fixture(scope="module")
def shards(server, weights):
    """The self-test model as a published folder: diffusers names in three files."""
    folder = server.base / "models" / "diffusion_models" / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    published = key_map.convert_native(weights)
    names = [f"{STEM}-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for i, name in enumerate(names):
        part = {k: v.contiguous() for k, v in list(published.items())[i::3]}
        save_file(part, folder / name, metadata={"frame_memory.base": "selftest"})
    where = {key: names[i] for i in range(3) for key in list(published)[i::3]}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return f"{FOLDER}/{names[1]}"


def test_a_tokenizer_that_loses_spaces_is_told_where_a_real_model_is_loaded(server, smallest, weights):
    """CLIP Text Encode cannot say it, and nobody would see it but by videos that do not follow their prompt."""
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "of_hunyuan_f1.safetensors")
    loader, node = one(smallest, LOADER)
    inputs = {**node["inputs"], "model_name": "of_hunyuan_f1.safetensors"}
    shown = {"class_type": "PreviewAny", "inputs": {"source": [loader, 1]}}
    run = server.client.queue({loader: {**node, "inputs": inputs}, "shown": shown}, timeout=600)
    assert ("loses the spaces" in text_of(run, loader)) is bool(lost_spaces())


def test_a_kind_that_the_file_contradicts_is_warned_of(server, smallest, weights):
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "says_F1.safetensors", metadata={"frame_memory.kind": "F1"})
    loader, node = one(smallest, LOADER)
    inputs = {**node["inputs"], "model_name": "says_F1.safetensors", "kind": "F0 (inverted)"}
    shown = {"class_type": "PreviewAny", "inputs": {"source": [loader, 1]}}
    run = server.client.queue({loader: {**node, "inputs": inputs}, "shown": shown}, timeout=600)
    warning, kind, *_ = text_of(run, loader).splitlines()
    assert warning.startswith("Warning: 'kind' is F0, and the file's metadata says F1.")
    assert "FramePack F0, as the widget says" in kind


def test_a_published_folder_is_converted_once_and_stock_nodes_read_it(server, smallest, weights, shards):
    said = {"frame_memory.base": "selftest", "frame_memory.kind": "F1"}
    save_file(weights, server.base / "models" / "diffusion_models" / "whole_F1.safetensors", metadata=said)
    _, expected = video_of(server, set_inputs(smallest, LOADER, {"model_name": "whole_F1.safetensors"}))
    convert = set_inputs(smallest, LOADER, {"model_name": shards, "save_converted": True})
    loader = one(smallest, LOADER)[0]
    run, video = video_of(server, convert)
    report = text_of(run, loader)
    assert f"{shards}: FramePack F1, as the file's name says" in report and "3 file(s)" in report
    assert f"saved in ComfyUI's layout as {FOLDER}_comfy.safetensors" in report
    assert np.array_equal(video, expected)
    made = server.base / "models" / "diffusion_models" / f"{FOLDER}_comfy.safetensors"
    before = made.stat().st_mtime_ns, made.read_bytes()

    run, _ = video_of(server, set_inputs(convert, LOADER, {"kind": "F1 (forward)"}))
    report = text_of(run, loader)
    assert f"not saved again: {made.name} is there already" in report and "as the widget says" in report
    assert (made.stat().st_mtime_ns, made.read_bytes()) == before

    ours = set_inputs(smallest, LOADER, {"model_name": made.name, "save_converted": True})
    run, video = video_of(server, ours)
    report = text_of(run, loader)
    assert "FramePack F1, as the file's metadata says" in report and "in ComfyUI's layout already" in report
    assert np.array_equal(video, expected)

    stock = copy.deepcopy(smallest)
    stock[loader].update(class_type="UNETLoader", inputs={"unet_name": made.name, "weight_dtype": "default"})
    assert np.array_equal(video_of(server, stock)[1], expected)
