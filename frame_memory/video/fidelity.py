"""How near a picture is to the one it shall be: PSNR and SSIM.

Shape suffixes: H height, W width, C colours; values 0..1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Wang et al. 2004, "Image quality assessment": window, its spread, and the two constants for values up to 1.
_WINDOW, _SPREAD = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(a_HWC: Tensor, b_HWC: Tensor) -> float:
    """Peak signal to noise in dB; infinite for equal pictures."""
    error = float((a_HWC.double() - b_HWC.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def ssim(a_HWC: Tensor, b_HWC: Tensor) -> float:
    """Structural similarity, -1 to 1, the mean over all whole windows and colours; 1 for equal pictures.

    The window shrinks to the picture where that is smaller.
    """
    size = min(_WINDOW, *a_HWC.shape[:2])
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-at.square() / (2 * _SPREAD**2))
    window = (line[:, None] * line)[None, None] / line.sum() ** 2
    a, b = (x.double().movedim(-1, 0)[:, None] for x in (a_HWC, b_HWC))

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    mean_a, mean_b = mean(a), mean(b)
    spread_a, spread_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    return float((top / ((mean_a**2 + mean_b**2 + _C1) * (spread_a + spread_b + _C2))).mean())
