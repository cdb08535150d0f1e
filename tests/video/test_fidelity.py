"""PSNR and SSIM against their definitions, one window at a time."""

import math

import pytest
import torch

from frame_memory.video.fidelity import psnr, ssim


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(a_HWC, b_HWC, size=11):
    """SSIM by sums over each window, with Wang's weights."""
    half, cells = size // 2, [(y, x) for y in range(size) for x in range(size)]
    weights = [math.exp(-((y - half) ** 2 + (x - half) ** 2) / 4.5) for y, x in cells]
    total = sum(weights)
    found = []
    for colour in range(a_HWC.shape[2]):
        for top in range(a_HWC.shape[0] - size + 1):
            for left in range(a_HWC.shape[1] - size + 1):
                points = [
                    (w / total, *(float(p[top + y, left + x, colour]) for p in (a_HWC, b_HWC)))
                    for w, (y, x) in zip(weights, cells, strict=True)
                ]  # fmt: skip
                mean_a, mean_b = (sum(p[0] * p[i] for p in points) for i in (1, 2))
                spread_a = sum(w * (a - mean_a) ** 2 for w, a, _ in points)
                spread_b = sum(w * (b - mean_b) ** 2 for w, _, b in points)
                both = sum(w * (a - mean_a) * (b - mean_b) for w, a, b in points)
                top_part = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                found.append(top_part / ((mean_a**2 + mean_b**2 + 1e-4) * (spread_a + spread_b + 9e-4)))
    return sum(found) / len(found)


def test_ssim_equals_sums_over_windows():
    a, b = drawn(13, 14, 2), drawn(13, 14, 2, seed=1)
    for other in (b, 0.7 * a + 0.3 * b):
        assert ssim(a, other) == pytest.approx(by_hand(a, other), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0) and ssim(a[:5, :7], a[:5, :7]) == pytest.approx(1.0)


def test_psnr():
    a = drawn(6, 5, 3).double()
    assert psnr(a, a) == math.inf and psnr(a, a + 0.1) == pytest.approx(20.0)
    assert psnr(torch.zeros(2, 2, 3), torch.ones(2, 2, 3)) == 0
