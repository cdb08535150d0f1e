"""A part of `benchmarks.parity` small enough for every run: the same bounds, fewer sizes and steps."""

import dataclasses

import pytest
import torch

from benchmarks import parity, parity_rollout
from benchmarks import parity_models as pm

CASES = [
    parity.Case("F0", 10, 18, 2, True),  # 5x9 grid: both axes padded for 2x and 4x
    parity.Case("F1", 14, 22, 1, True),
    parity.Case("F1", 12, 10, 2, False),
]


@pytest.fixture(scope="module")
def networks():
    return parity.Networks(pm.make_reference())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.height}x{c.width}-batch{c.batch}")
def test_forward_pass_equals_diffusers(networks, case):
    row = parity.compare(networks, case, image_tokens=49)
    assert row.fp32 <= parity.FP32_BOUND
    assert row.bf16 is None or row.bf16 <= parity.BF16_BOUND


@pytest.mark.parametrize("height,width", [(9, 17), (10, 15), (13, 10)])
def test_fault_19_odd_latent_sizes_are_padded_and_cropped_as_core_does(networks, height, width):
    """diffusers cannot take these sizes: it is given what core's pad rule makes of them, and its answer is cropped."""
    positions, groups = parity.section_layout("F0")
    given = pm.make_inputs(height, width, positions, groups, batch=2, text_lengths=(9, 4), image_tokens=9)

    def padded(x):
        return torch.nn.functional.pad(x, (0, width % 2, 0, height % 2, 0, 0), mode="replicate")

    even = dataclasses.replace(
        given, window_BCTHW=padded(given.window_BCTHW), context=tuple(padded(c) for c in given.context)
    )
    ours = pm.run_ours(networks.ours[torch.float32], given, torch.float32)
    theirs = pm.run_reference(networks.theirs[torch.float32], even, torch.float32)
    assert ours.shape == given.window_BCTHW.shape
    assert pm.relative_rms(ours, theirs[..., :height, :width]) <= parity.FP32_BOUND


def test_fault_19_a_batch_is_its_samples(networks):
    positions, groups = parity.section_layout("F1")
    given = pm.make_inputs(10, 14, positions, groups, batch=3, text_lengths=(9, 4, 1), image_tokens=9)
    network = networks.ours[torch.float32]
    whole = pm.run_ours(network, given, torch.float32)
    alone = torch.cat([pm.run_ours(network, pm.sample(given, i), torch.float32) for i in range(3)])
    assert pm.relative_rms(whole, alone) <= parity.FP32_BOUND


@pytest.mark.parametrize("kind", parity.KINDS)
def test_rollout_equals_plain_loops(kind):
    errors = parity_rollout.compare(kind, parity.KINDS[kind], steps=4)
    assert len(errors) == 3 and max(errors) <= parity.ROLLOUT_BOUND


def test_the_rollout_bound_notices_the_wrong_kind():
    assert min(parity_rollout.compare("F0", parity.KINDS["F1"], steps=2, sections=2)) > 100 * parity.ROLLOUT_BOUND
