"""FramePack's sampler and section loops written out plainly in fp64, from reference/framepack.md alone.

Nothing here imports the pack: this is the independent side of the rollout table. It favours being easy to check
against the text over everything else. Latents are in model space, shape [1, 16, T, H, W].
"""

from __future__ import annotations

import math

import torch

WINDOW = 9


def sigmas(steps: int, latent_height: int, latent_width: int, window: int = WINDOW) -> list[float]:
    """Section 4: shift from the window's tokens, clipped at ln 7; steps + 1 values, the last one 0."""
    tokens = window * latent_height * latent_width / 4
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = min(slope * tokens + (0.5 - 256 * slope), math.log(7.0))
    shift = math.exp(mu)
    out = []
    for i in range(steps + 1):
        t = 1 - i / steps
        out.append(shift * t / (1 + (shift - 1) * t))
    return out


def unipc(x0_of, x: torch.Tensor, sigma: list[float]) -> torch.Tensor:
    """Section 4: UniPC bh1 in data prediction; the result is the x0 prediction of the last evaluation.

    x0_of(x, sigma) predicts the clean latent. sigma: steps + 1 values, the last one 0, of which `steps` are used.
    """
    steps = len(sigma) - 1
    full_order = min(3, steps - 1)
    lam = [-math.log(s) if s > 0 else math.inf for s in sigma]
    model = [x0_of(x, sigma[0])]
    for i in range(1, steps):
        order = i if i < full_order else full_order
        h = lam[i] - lam[i - 1]
        hh = -h
        m0 = model[i - 1]
        ratios, differences = [], []
        for k in range(1, order):
            r = (lam[i - 1 - k] - lam[i - 1]) / h
            ratios.append(r)
            differences.append((model[i - 1 - k] - m0) / r)
        ratios.append(1.0)
        rho_p, rho_c = _weights(ratios, hh, order)
        base = (sigma[i] / sigma[i - 1]) * x - math.expm1(hh) * m0
        predicted = base.clone()
        for rho, d in zip(rho_p, differences):
            predicted = predicted - hh * rho * d
        now = x0_of(predicted, sigma[i])
        model.append(now)
        x = base - hh * rho_c[-1] * (now - m0)
        for rho, d in zip(rho_c[:-1], differences):
            x = x - hh * rho * d
    return model[-1]


def _weights(ratios: list[float], hh: float, order: int) -> tuple[list[float], list[float]]:
    """Predictor and corrector weights: R rho = b with R[j][k] = ratio_k ** j and b_j = phi_j * j! / B, B = hh."""
    b = []
    phi = math.expm1(hh) / hh - 1
    factorial = 1
    for j in range(1, order + 1):
        b.append(phi * factorial / hh)
        factorial *= j + 1
        phi = phi / hh - 1 / factorial
    matrix = [[r**j for r in ratios] for j in range(order)]
    corrector = [0.5] if order == 1 else _solve(matrix, b)
    if order == 1:
        return [], corrector
    if order == 2:
        return [0.5], corrector
    return _solve([row[:-1] for row in matrix[:-1]], b[:-1]), corrector


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    a, b = torch.tensor(matrix, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    return torch.linalg.solve(a, b).tolist()


def paddings(sections: int) -> list[int]:
    """Section 3.1: how many windows are skipped between the start frame and each section."""
    if sections > 4:
        return [3] + [2] * (sections - 3) + [1, 0]
    return list(range(sections - 1, -1, -1))


def inverted(network, start: torch.Tensor, sections: int, steps: int, generator: torch.Generator, sampler=unipc):
    """Section 3.1 (F0): windows of the video from its end to its beginning, in the order of making.

    network(x, sigma, window_index, clean, clean_index, two, two_index, four, four_index) predicts velocity.
    """
    _, channels, _, height, width = start.shape
    history = torch.zeros(1, channels, 1 + 2 + 16, height, width, dtype=torch.float64)
    made = []
    for padding in paddings(sections):
        blank = padding * WINDOW
        window_index = [1 + blank + i for i in range(WINDOW)]
        one_index = 1 + blank + WINDOW
        two_index = [one_index + 1, one_index + 2]
        four_index = [one_index + 3 + i for i in range(16)]
        clean = torch.cat([start, history[:, :, 0:1]], dim=2)
        noise = torch.randn((1, channels, WINDOW, height, width), generator=generator).double()
        x = _sample(network, noise, steps, sampler, window_index, clean, [0, one_index],
                    history[:, :, 1:3], two_index, history[:, :, 3:19], four_index)  # fmt: skip
        made.append(x)
        if padding == 0:
            x = torch.cat([start, x], dim=2)
        history = torch.cat([x, history], dim=2)
    return made


def forward(network, start: torch.Tensor, sections: int, steps: int, generator: torch.Generator, sampler=unipc):
    """Section 3.2 (F1): windows from the beginning to the end; see `inverted` for the arguments."""
    _, channels, _, height, width = start.shape
    history = torch.cat([torch.zeros(1, channels, 16 + 2 + 1, height, width, dtype=torch.float64), start], dim=2)
    made = []
    for _ in range(sections):
        last = history[:, :, -19:]
        clean = torch.cat([start, last[:, :, 18:19]], dim=2)
        noise = torch.randn((1, channels, WINDOW, height, width), generator=generator).double()
        x = _sample(network, noise, steps, sampler, list(range(20, 29)), clean, [0, 19],
                    last[:, :, 16:18], [17, 18], last[:, :, 0:16], list(range(1, 17)))  # fmt: skip
        made.append(x)
        history = torch.cat([history, x], dim=2)
    return made


def _sample(network, noise, steps, sampler, *context):
    def x0_of(x, sigma):
        return x - sigma * network(x, sigma, *context)

    return sampler(x0_of, noise, sigmas(steps, noise.shape[3], noise.shape[4]))
