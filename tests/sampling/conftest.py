"""A tiny real FramePack MODEL and all that a run takes, made as a graph would make it."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from safetensors.torch import save_file

from benchmarks import parity_models
from frame_memory.model import checkpoint
from frame_memory.model.framepack import MODEL_OPTION
from frame_memory.plan import PRESETS, flow_shift, parse_schedule, sigma_schedule
from frame_memory.sampling.long_video import sample_long_video
from frame_memory.sampling.unipc import framepack_unipc

HEIGHT, WIDTH = 6, 10
TEXT = 64


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """A diffusers-layout FramePack file of the smallest network core detects."""
    path = tmp_path_factory.mktemp("models") / "FramePack_F1_tiny.safetensors"
    sd = parity_models.make_reference(seed=0, heads=1, double=1, single=2, text_features=TEXT).state_dict()
    save_file({k: v.contiguous() for k, v in sd.items()}, str(path))
    return path


@pytest.fixture
def model(tiny_file):
    return checkpoint.load_framepack(str(tiny_file))


def conditioning(seed: int = 1, tokens: int = 7, features: int = TEXT):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, features, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 10.0}]]


def of_kind(model, kind: str, base: str = ""):
    clone = model.clone()
    clone.model_options[MODEL_OPTION] = {"kind": kind, "base": base}
    return clone


def guider_for(model, positive=None, negative=None, cfg: float = 1.0):
    guider = comfy.samplers.CFGGuider(model)
    positive = positive or conditioning()
    guider.set_conds(positive, negative or positive)
    guider.set_cfg(cfg)
    return guider


def start_latent(batch: int = 1, frames: int = 1, seed: int = 2, height: int = HEIGHT, width: int = WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, 16, frames, height, width, generator=generator)}


def run(model, *, kind="F1", preset="F1 forward", seconds=2.4, steps=3, seed=7, start=None, sampler=None, **more):
    """One run with what is usual; everything can be overridden."""
    guider = more.pop("guider", None) or guider_for(of_kind(model, kind) if kind else model)
    start = start or start_latent()
    tokens = 9 * start["samples"].shape[-1] * start["samples"].shape[-2] // 4
    settings = {
        "noise": Noise_RandomNoise(seed),
        "guider": guider,
        "sampler": sampler or framepack_unipc(),
        "sigmas": torch.tensor(sigma_schedule(steps, flow_shift(tokens))),
        "schedule": parse_schedule(PRESETS.get(preset, preset)),
        "start": start,
        "seconds": seconds,
        "say": lambda _: None,
    }
    with torch.inference_mode():
        made = sample_long_video(**{**settings, **more})
    return (made.latent, made.report) if "project" not in more else made
