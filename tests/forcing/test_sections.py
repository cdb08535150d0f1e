"""The loss of one section behind a disturbed history, on Wan: golden losses of a plain loop, and what is left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from frame_memory.forcing.flow import WanConditioning
from frame_memory.forcing.sections import Disturbance, Sample, section_loss, with_noise
from frame_memory.forcing.stages import Trained
from frame_memory.model import wan
from frame_memory.model.context import gather_context
from frame_memory.plan import PRESETS, plan_sections

from .reference_context import Plain
from .test_stages_wan import patchifiers_of

GOLDEN = json.loads(Path(__file__).with_name("golden_context.json").read_text())
SHIFT = 3.0
# family, section, noise on the history, share of own estimates
CASES = {
    "first": ("2.1 T2V", 0, 0.0, 0.0),
    "noise": ("2.1 T2V", 1, 0.5, 0.0),
    "own": ("2.2 A14B I2V", 2, 0.0, 1.0),
    "both": ("2.2 A14B I2V", 1, 0.5, 1.0),
}
SECTIONS = plan_sections(PRESETS["F1 forward"], sections=3).sections


def videos(batch: int = 2, size=(3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    latents = reference.drawn(batch, 16, 28, *size, seed=5).cumsum(2) * 0.3
    return latents, reference.drawn(batch, 3, 24, seed=6)


def sample_of(family: str, number: int) -> Sample:
    latents, text = videos()
    channels, out, _ = reference.FAMILIES[family]
    cond = WanConditioning(text, beside=channels - out)
    return Sample(latents, cond, SECTIONS[number], SECTIONS[number - 1] if number else None)


def trained_of(family: str) -> Trained:
    patcher = reference.load(family)
    patchifiers = patchifiers_of(patcher)
    network = patcher.model.diffusion_model.requires_grad_(False)
    return Trained(network, None, (), options=wan.options(patchifiers), beside={"patchifiers": patchifiers})


def plain_loss(case: str) -> float:
    """What golden_context.json holds; `make_golden.write_context` writes it."""
    family, number, noise, own = CASES[case]
    weights = dict(patchifiers_of(reference.load(family)).named_parameters())
    plain = Plain(family, reference.checkpoint(family), {n: p.detach() for n, p in weights.items()})
    return plain.loss(*videos(), number, noise, own, SHIFT, torch.Generator().manual_seed(4))


@pytest.mark.parametrize("case", CASES)
def test_golden_losses(case):
    family, number, noise, own = CASES[case]
    trained, sample = trained_of(family), sample_of(family, number)
    before = sample.latents.clone()
    with trained.ready():
        generator = torch.Generator().manual_seed(4)
        disturbance = Disturbance(noise, own)
        loss, estimate = section_loss(trained, sample, disturbance, SHIFT, generator, trained.forced.options)
        loss.backward()
    assert estimate.shape == sample.latents[:, :, 1:10].shape and not estimate.requires_grad
    assert float(loss.detach()) == pytest.approx(GOLDEN["losses"][case], rel=GOLDEN["tolerance"])
    assert torch.equal(sample.latents, before)
    grads = {name: p.grad for name, p in trained.parameters.items()}
    # Blanks are shown too, so even the first section, which has frames at 1x alone, teaches the other biases.
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads.values()) and grads


def test_one_of_the_golden_losses_is_what_the_plain_loop_makes_today():
    assert plain_loss("both") == pytest.approx(GOLDEN["losses"]["both"], rel=1e-9)


def test_noise_leaves_the_start_frame_and_blanks():
    latents, _ = videos()
    section = SECTIONS[1]
    context = gather_context(section, latents, latents[:, :, :1], None, 0.0)
    noisy = with_noise(context, section, 0.5, torch.Generator().manual_seed(0))
    for before, after, group in zip(context.latents, noisy.latents, section.groups, strict=True):
        for i, frame in enumerate(group.frames):
            changed = not torch.equal(before[:, :, i], after[:, :, i])
            assert changed == (frame >= 0), (group, frame)
    assert noisy.layout == context.layout
