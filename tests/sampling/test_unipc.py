"""UniPC against a problem whose flow is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from comfy.samplers import KSAMPLER

from frame_memory.plan import sigma_schedule
from frame_memory.sampling.unipc import framepack_unipc, sample_framepack_unipc

MEAN, SPREAD = 0.7, 0.4


def gaussian_x0(x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
    """E[data | x] where data is N(MEAN, SPREAD^2): what a perfect network would say."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1)).double()
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return MEAN + (1 - s) * SPREAD**2 / variance * (x - (1 - s) * MEAN)


def exact(noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """x at `sigma` on the exact flow that starts in `noise` at sigma 1."""
    return (1 - sigma) * MEAN + math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2) * noise


def error(steps: int) -> float:
    """Largest error of the last x0 over `steps` even steps of lambda from sigma 1 to 0.2."""
    sigmas = torch.exp(-torch.linspace(0, math.log(5), steps, dtype=torch.float64))
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).reshape(1, 1, 1, 8, 8)
    made = sample_framepack_unipc(gaussian_x0, noise, torch.cat([sigmas, sigmas.new_zeros(1)]))
    last = sigmas[-1]
    return float((made - gaussian_x0(exact(noise, float(last)), last[None])).abs().max())


def test_converges_with_third_order():
    coarse, fine = error(20), error(40)
    assert fine < 1e-4
    assert math.log2(coarse / fine) > 2.5


def test_one_evaluation_a_step_and_the_last_x0_is_returned():
    seen = []

    def model(x, sigma, **_):
        seen.append(float(sigma[0]))
        return torch.full_like(x, len(seen))

    sigmas = torch.tensor(sigma_schedule(5, 7.0))
    calls = []
    made = sample_framepack_unipc(model, torch.ones(2, 16, 3, 4, 4), sigmas, callback=lambda d: calls.append(d["i"]))
    assert seen == pytest.approx([float(s) for s in sigmas[:-1]])
    assert calls == [0, 1, 2, 3, 4]
    assert (made == 5).all()


def test_sigmas_that_end_above_zero_end_in_x_at_that_sigma():
    """As core expects of a sampler: another one goes on from there."""
    sigmas = torch.linspace(1, 0.6, 41, dtype=torch.float64)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).reshape(1, 1, 1, 8, 8)
    made = sample_framepack_unipc(gaussian_x0, noise, sigmas)
    assert float((made - exact(noise, 0.6)).abs().max()) < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(steps):
    sigmas = torch.tensor(sigma_schedule(steps, 7.0), dtype=torch.float64)
    made = sample_framepack_unipc(gaussian_x0, torch.randn(1, 1, 1, 4, 4, dtype=torch.float64), sigmas)
    assert torch.isfinite(made).all()


def test_sigmas_that_do_not_fall_are_refused_by_name():
    for values in ([1.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.0]):
        with pytest.raises(ValueError, match="FramePack Sigmas"):
            sample_framepack_unipc(gaussian_x0, torch.zeros(1, 1, 1, 2, 2), torch.tensor(values))


def test_is_a_stock_sampler_and_leaves_the_sigmas_alone():
    assert isinstance(framepack_unipc(), KSAMPLER)
    sigmas = torch.tensor(sigma_schedule(4, 7.0))
    before = sigmas.clone()
    sample_framepack_unipc(gaussian_x0, torch.zeros(1, 1, 1, 2, 2), sigmas)
    assert torch.equal(sigmas, before)
