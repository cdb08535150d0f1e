"""Tiny files with the topology of Wan 2.2 I2V A14B, its VAE and FFGo's LoRAs, for tests on the real server.

The model: core's own Wan with 40 blocks, 36 input channels and no vision branch, at width 128 (core takes one head for
each 128), for the self-test encoders' text of 64 features. Random weights: videos are noise, but every node runs.
"""

import json

import torch
from comfy.ldm.wan.model import WanModel
from comfy.ldm.wan.vae import WanVAE
from safetensors.torch import save_file

BLOCKS, WIDTH, INNER, RANK = 40, 128, 32, 2
TEXT_FEATURES = 64
HIGH, LOW, VAE = "tiny_wan_high_noise.safetensors", "tiny_wan_low_noise.safetensors", "tiny_wan_vae.safetensors"
LORA_HIGH, LORA_LOW = "tiny_ffgo_HIGH.safetensors", "tiny_ffgo_LOW.safetensors"


def filled(module: torch.nn.Module, seed: int) -> dict:
    """Random weights for a module whose parameters were never set."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in module.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        scale = 1.0 if value.ndim < 2 or "gamma" in name else value[0].numel() ** -0.5
        weights[name] = (
            (drawn * 0.1 + 1) if name.endswith(("gamma", "norm_q.weight", "norm_k.weight")) else drawn * scale
        )
    return weights


def save_model(path, seed: int = 0, width: int = WIDTH, blocks: int = BLOCKS) -> dict:
    """Writes a model file as ComfyUI's loader reads it, and returns its weights."""
    with torch.device("meta"):
        model = WanModel(
            model_type="t2v", in_dim=36, dim=width, ffn_dim=INNER, freq_dim=256, text_dim=TEXT_FEATURES, out_dim=16,
            num_heads=width // 128, num_layers=blocks, device="meta", dtype=torch.float32, operations=torch.nn,
        )  # fmt: skip
    weights = filled(model, seed)
    # Core reads the text's width from nowhere else; published files have the default of 4096.
    save_file(weights, path, metadata={"config": json.dumps({"transformer": {"text_dim": TEXT_FEATURES}})})
    return weights


def save_vae(path, seed: int = 0) -> None:
    """Writes a VAE of the self-test Wan's kind."""
    with torch.device("meta"):
        vae = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                     temperal_downsample=[False, True, True], image_channels=3, dropout=0.0)  # fmt: skip
    save_file(filled(vae, seed), path, metadata={"frame_memory.base": "selftest Wan"})


def modules(weights: dict) -> list[str]:
    """The modules FFGo trains: the ten Linears of each block, and the projection of the time."""
    linears = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"] + ["ffn.0", "ffn.2"]
    names = [f"blocks.{block}.{linear}" for block in range(BLOCKS) for linear in linears] + ["time_projection.1"]
    assert all(f"{name}.weight" in weights for name in names)
    return names


def official(module: str) -> tuple[str, str, str]:
    """The three keys of a module in the published files (VideoX-Fun)."""
    name = "lora_unet__" + module.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def converted(module: str) -> tuple[str, str, None]:
    """The keys of a module in the converted files that ComfyUI users load; a rank without alpha."""
    return f"diffusion_model.{module}.lora_A.weight", f"diffusion_model.{module}.lora_B.weight", None


def save_lora(path, weights: dict, keys=official, seed: int = 1) -> dict:
    """Writes a LoRA for all modules and returns what it adds to each weight, worked out here."""
    generator = torch.Generator().manual_seed(seed)
    file, added = {}, {}
    for module in modules(weights):
        rows, columns = weights[f"{module}.weight"].shape
        down, up = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator) * 0.1
        for key, value in zip(keys(module), (down, up, torch.tensor(float(RANK))), strict=True):
            if key:
                file[key] = value
        added[f"{module}.weight"] = up @ down
    save_file(file, path)
    return added
