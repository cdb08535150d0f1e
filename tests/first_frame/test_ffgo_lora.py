"""FFGo's LoRA files on a Wan 2.2 of full depth and tiny width: real files through the real server's loaders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.client import PromptError

from . import wan_files
from .wan_files import HIGH, LOW

UNMATCHED = "lora key not loaded"
OURS, STOCK = "FrameMemoryLoraLoader", "LoraLoaderModelOnly"
KEYS = {"official names": wan_files.official, "converted names": wan_files.converted}


@pytest.fixture(scope="module")
def weights(server):
    """The tiny model's weights; its files lie in the server's folders, and with them the LoRAs of both styles."""
    folder = server.base / "models"
    for name in ("diffusion_models", "loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made = wan_files.save_model(folder / "diffusion_models" / LOW)
    (folder / "diffusion_models" / HIGH).write_bytes((folder / "diffusion_models" / LOW).read_bytes())
    return made


@pytest.fixture(scope="module", params=KEYS, ids=lambda name: name.split()[0])
def lora(request, server, weights):
    """(file name, what it adds to each weight)."""
    name = f"ffgo_{request.param.split()[0]}_LOW.safetensors"
    return name, wan_files.save_lora(server.base / "models" / "loras" / name, weights, KEYS[request.param])


def graph(loader: str, lora_name: str, model: str = LOW, prefix: str | None = None, **more) -> dict:
    """Load Diffusion Model, a LoRA, and what writes the patched weights into a file; a preview without a prefix."""
    strength = {"strength": 1.0} if loader == OURS else {"strength_model": 1.0}
    last = {"class_type": "ModelSave", "inputs": {"model": ["lora", 0], "filename_prefix": prefix}}
    if prefix is None:
        last = {"class_type": "PreviewAny", "inputs": {"source": ["lora", 1]}}
    return {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}},
        "lora": {"class_type": loader, "inputs": {"model": ["model", 0], "lora_name": lora_name, **strength, **more}},
        "last": last,
    }


def saved_weights(server, prefix: str) -> dict:
    (path,) = (server.base / "output").glob(f"{prefix}_*.safetensors")
    return {k.removeprefix("model.diffusion_model."): v for k, v in load_file(path).items()}


def report(server, *line, **more) -> str:
    run = server.client.queue(graph(OURS, *line, **more), timeout=300)
    return "\n".join(run.outputs["lora"]["text"])


@pytest.mark.parametrize("loader", [STOCK, OURS])
def test_fault_39_all_401_modules_change_the_model_by_what_the_file_says(server, weights, lora, loader):
    name, added = lora
    assert len(added) == 401
    prefix, before = f"{loader}_{name[:-12]}", server.log().count(UNMATCHED)
    run = server.client.queue(graph(loader, name, prefix=prefix), timeout=300)
    assert server.log().count(UNMATCHED) == before
    if loader == OURS:
        assert "401 of 401 modules matched (100%)" in "\n".join(run.outputs["lora"]["text"])
    got = saved_weights(server, prefix)
    for key, value in weights.items():
        expected = value + added[key] if key in added else value
        torch.testing.assert_close(got[key].float(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_fault_38_what_a_wan_model_lacks_is_counted(server, weights):
    """Half the blocks under strange names: core's node logs each of them, ours says it on the node."""
    path = server.base / "models" / "loras" / "half.safetensors"
    wan_files.save_lora(path, weights)
    file = {k: v for k, v in load_file(path).items() if "_blocks_" in k or "time" in k}
    save_file({k.replace("self_attn", "other_attn").replace("_ffn", "_mlp"): v for k, v in file.items()}, path)
    said = report(server, "half.safetensors")
    assert "161 of 401 modules matched (40%)" in said and "Warning: less than half of this LoRA fits" in said
    assert "Not matched: lora_unet_blocks_0_mlp_0" in said and "and 237 more" in said


def refused(server, *line, **more) -> str:
    with pytest.raises(PromptError) as error:
        report(server, *line, **more)
    return str(error.value)


def test_fault_39_a_hunyuan_lora_on_wan_and_one_for_another_width_are_refused(server, weights):
    folder = server.base / "models" / "loras"
    keys = [f"transformer.double_blocks.{i}.img_attn_qkv.lora_{ab}.weight" for i in range(3) for ab in "AB"]
    save_file({key: torch.zeros(2, 2) for key in keys}, folder / "hunyuan.safetensors")
    said = refused(server, "hunyuan.safetensors")
    assert "Not one of the LoRA's 3 modules fits this Wan 2.1 or 2.2 model" in said and "look like HunyuanVideo" in said
    assert all(key in said for key in sorted(keys)[:3]) and "'Load Video LoRA'" in said
    wide = {k: torch.zeros(256, 256) if v.ndim == 2 else v for k, v in weights.items()}
    wan_files.save_lora(folder / "wide.safetensors", wide)
    said = refused(server, "wide.safetensors")
    assert "They look like Wan" in said and "changes 256 rows where this model has 128" in said
    on = report(server, "wide.safetensors", allow_no_match=True)
    assert "0 of 401 modules matched" in on and "Warning" in on


def test_fault_39_the_ffgo_lora_on_framepack_is_refused(server, weights):
    wan_files.save_lora(server.base / "models" / "loras" / "ffgo.safetensors", weights)
    said = refused(server, "ffgo.safetensors", "frame_memory_selftest_F1.safetensors")
    assert "fits this FramePack model" in said and "They look like Wan" in said
    assert all(key in said for key in sorted(wan_files.official("blocks.0.cross_attn.k"))[:2])


def test_fault_39_a_low_noise_lora_on_the_high_noise_model_is_told(server, lora):
    assert "this LoRA is for the low noise model, and this is the high noise one" in report(server, lora[0], HIGH)
    assert "Warning" not in report(server, lora[0], LOW)
