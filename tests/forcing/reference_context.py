"""Context finetuning of Wan written again as plain loops: one sample at a time, in float64, frames by their numbers.

The schedule is FramePack-F1's: behind each window of 9 latent frames 16 at 4x, 2 at 2x and 1 at 1x, and the start.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

WINDOW, NAMES = 9, {4: "proj_4x", 2: "proj_2x", 1: "proj"}
# Kernel, places on the time axis, and frames counted from the window's first; None is the start frame.
GROUPS = (
    (4, tuple(range(1, 17)), tuple(range(-19, -3))),
    (2, (17, 18), (-3, -2)),
    (1, (0,), (None,)),
    (1, (19,), (-1,)),
)
PLACES = tuple(range(20, 29))


def levels(count: int, shift: float, generator: torch.Generator) -> list[float]:
    even = ((torch.arange(count) + torch.rand(count, generator=generator)) / count).tolist()
    order = torch.randperm(count, generator=generator).tolist()
    return [shift * even[i] / (1 + (shift - 1) * even[i]) for i in order]


class Plain:
    """A network's weights `sd` and its patchifiers' `own` by name, of a family of wan_reference."""

    def __init__(self, family: str, sd: dict, own: dict):
        self.family, self.sd, self.own = family, sd, own

    def shown(self, video, first: int) -> list:
        """Frames `[C, 1, H, W]` of each group for the window that begins at `first`; zeros where there is none."""
        out = []
        for _, _, offsets in GROUPS:
            numbers = [0 if offset is None else first + offset for offset in offsets]
            out.append([video[:, n : n + 1] if n >= 0 else torch.zeros_like(video[:, :1]) for n in numbers])
        return out

    def velocity(self, noisy, sigma: float, text, shown: list):
        channels, out, _ = reference.FAMILIES[self.family]
        groups = [
            (rate, places, self.own[f"{NAMES[rate]}.weight"], self.own[f"{NAMES[rate]}.bias"], torch.cat(frames, 1))
            for (rate, places, _), frames in zip(GROUPS, shown, strict=True)
        ]
        x = torch.cat([noisy, torch.zeros(channels - out, *noisy.shape[1:])]) if channels > out else noisy
        times = [sigma * 1000] * noisy.shape[1]
        return reference.forward(self.sd, x, times, text, None, groups, None, PLACES, out)

    def loss(self, latents, text, section: int, noise: float, own: float, shift: float, generator) -> float:
        """Mean over the samples of the squared error of the velocity in window `section`, drawn as the pack draws."""
        count, first = len(latents), 1 + WINDOW * section
        history = [video.clone() for video in latents]
        if section and float(torch.rand((), generator=generator)) < own:
            before = first - WINDOW
            drawn = torch.randn(latents[:, :, before:first].shape, generator=generator)
            for i, sigma in enumerate(levels(count, shift, generator)):
                noisy = (1 - sigma) * latents[i, :, before:first] + sigma * drawn[i]
                made = self.velocity(noisy, sigma, text[i], self.shown(latents[i], before))
                history[i][:, before:first] = noisy - sigma * made
        shown = [self.shown(video, first) for video in history]
        if noise:
            strength = (torch.rand(count, generator=generator) * noise).tolist()
            for group, (_, _, offsets) in enumerate(GROUPS):
                shape = (count, latents.shape[1], len(offsets), *latents.shape[3:])
                drawn = torch.randn(shape, generator=generator)
                for i in range(count):
                    for place, offset in enumerate(offsets):
                        if offset is not None and first + offset >= 0:
                            frame = shown[i][group][place]
                            other = drawn[i, :, place : place + 1]
                            shown[i][group][place] = (1 - strength[i]) * frame + strength[i] * other
        window = latents[:, :, first : first + WINDOW]
        drawn = torch.randn(window.shape, generator=generator)
        total = 0.0
        for i, sigma in enumerate(levels(count, shift, generator)):
            noisy = (1 - sigma) * window[i] + sigma * drawn[i]
            made = self.velocity(noisy, sigma, text[i], shown[i])
            total += float((made - (drawn[i] - window[i])).square().mean())
        return total / count
