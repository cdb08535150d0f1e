"""Tiny Wan MODELs of core's own loader that take history, and runs of the section loop on them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference
from video.reference import shipped_vae as shipped_vae

from frame_memory.model import wan
from frame_memory.plan import Section, plan_sections

from .conftest import guider_for, run

# Windows of 2 latent frames, half a second: what history is at every rate, in little time.
SCHEDULE = "f1k1_td_f4k4f2k2f1k1_g2"
SIGMAS = (1.0, 0.95, 0.8, 0.4, 0.0)
TEXT = 24
HEIGHT, WIDTH = 5, 6


def attached(family: str, seed: int = 0, dtype=torch.float32):
    """A MODEL that takes history; its patchifiers are not the base's own kernels any more."""
    patcher = reference.load(family, dtype, seed=seed, layers=1)
    patchifiers = wan.patchifiers_of(patcher)
    with torch.no_grad():
        for index, value in enumerate(patchifiers.parameters()):
            value += 0.1 * reference.drawn(*value.shape, seed=index) / value[0].numel() ** 0.5
    return wan.attach(patcher, wan.patcher_of(patchifiers.requires_grad_(False)))


def prompt(seed: int = 3, tokens: int = 4, **extra) -> list:
    return [[reference.drawn(1, tokens, TEXT, seed=seed), extra]]


def start(family: str, batch: int = 1, frames: int = 1, seed: int = 2) -> dict:
    return {"samples": reference.drawn(batch, reference.FAMILIES[family][1], frames, HEIGHT, WIDTH, seed=seed)}


def made(model, family: str, seconds: float = 1.0, **more):
    """A run of two sections, or of as many as `seconds` say."""
    settings = {
        "guider": guider_for(model, prompt(3), prompt(4), cfg=2.0), "preset": SCHEDULE, "start": start(family),
        "sigmas": torch.tensor(SIGMAS), "seconds": seconds, "sampler": euler(), "kind": None,
    }  # fmt: skip
    return run(model, **{**settings, **more})


def euler():
    import comfy.samplers

    return comfy.samplers.sampler_object("euler")


def sections(count: int) -> tuple[Section, ...]:
    return plan_sections(SCHEDULE, sections=count).sections
