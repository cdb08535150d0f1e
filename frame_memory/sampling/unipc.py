"""FramePack's UniPC: order 3, bh1, data prediction over lambda = -ln sigma; returns the last x0.

Source: reference/framepack.md section 4. Core's `uni_pc` walks the same points but ends with a lower order and an
extra step, which moves the result by some percent; FramePack's answer is the x0 of the last evaluation. Sigmas that end
above zero, as those of the first of two samplers do, end in x at that sigma.
"""

from __future__ import annotations

import math

import comfy.samplers
import torch
from torch import Tensor

MAX_ORDER = 3


def coefficients(lambdas: list[float], i: int, order: int) -> tuple[list[float], list[float], list[float], float]:
    """Weights of one update from evaluation i-1 to i.

    Returns `(inverse_ratios, predictor, corrector, B)`: 1 / r of each older evaluation, the predictor's and the
    corrector's weights, and the common factor B = -h.
    """
    h = lambdas[i] - lambdas[i - 1]
    ratios = [(lambdas[i - 1 - k] - lambdas[i - 1]) / h for k in range(1, order)]
    hh = -h
    phi, factorial, rhs = math.expm1(hh) / hh - 1, 1, []
    for j in range(1, order + 1):
        factorial *= j
        rhs.append(phi * factorial / hh)
        phi = phi / hh - 1 / (factorial * (j + 1))
    nodes = torch.tensor([*ratios, 1.0], dtype=torch.float64)
    matrix = torch.stack([nodes**power for power in range(order)])
    target = torch.tensor(rhs, dtype=torch.float64)
    corrector = [0.5] if order == 1 else torch.linalg.solve(matrix, target).tolist()
    if order == 1:
        predictor = []
    elif order == 2:
        predictor = [0.5]
    else:
        predictor = torch.linalg.solve(matrix[:-1, :-1], target[:-1]).tolist()
    return [1 / r for r in ratios], predictor, corrector, hh


@torch.no_grad()
def sample_framepack_unipc(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
    """A k-diffusion style sampler: `model(x, sigma) -> x0`. Evaluates every sigma but the last.

    Raises ValueError where a sigma before the last is not above zero (no lambda exists for it).
    """
    steps = sigmas.shape[0] - 1
    values = [float(s) for s in sigmas[:steps]]
    if any(s <= 0 for s in values) or any(a <= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(
            f"FramePack UniPC needs sigmas that fall from step to step, only the last of them 0; given {values}. "
            "Use 'FramePack Sigmas', or choose another sampler for this schedule."
        )
    extra_args = extra_args or {}
    lambdas = [-math.log(s) for s in values]
    top_order = min(MAX_ORDER, max(steps - 1, 1))
    batch = x.new_ones([x.shape[0]])
    estimates: list[Tensor] = []
    for i in range(steps):
        if i == 0:
            point = x
        else:
            order = min(i, top_order)
            inverse, predictor, corrector, factor = coefficients(lambdas, i, order)
            newest = estimates[-1]
            base = (values[i] / values[i - 1]) * x - math.expm1(-(lambdas[i] - lambdas[i - 1])) * newest
            slopes = [(old - newest) * w for old, w in zip(reversed(estimates[-order:-1]), inverse, strict=True)]
            point = base - factor * _weighted(predictor, slopes, base)
        estimate = model(point, values[i] * batch, **extra_args)
        if i > 0:
            x = base - factor * (_weighted(corrector[:-1], slopes, base) + corrector[-1] * (estimate - newest))
        estimates = [*estimates[-(MAX_ORDER - 1) :], estimate]
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": estimate})
    left = float(sigmas[-1]) / values[-1]
    return estimates[-1] if left == 0 else left * x + (1 - left) * estimates[-1]


def _weighted(weights: list[float], tensors: list[Tensor], like: Tensor) -> Tensor:
    return sum((w * t for w, t in zip(weights, tensors, strict=True)), torch.zeros_like(like))


def framepack_unipc() -> comfy.samplers.KSAMPLER:
    """The sampler as core's SAMPLER."""
    return comfy.samplers.KSAMPLER(sample_framepack_unipc)
