"""Multi-rate context packing: history latents to tokens, and the rotary table that goes with them.

Shape legend: B batch, C latent channels, T latent frames, H W latent height and width, D hidden size,
N tokens, F rotary frequencies (head size / 2).

Source: reference/framepack.md section 1.1 (paper section 3.1). Rates are spatial-temporal: rate r embeds
r latent frames by 2r x 2r latent pixels in one token. Rates 1, 2 and 4 have weights of their own; rate 8 and
the tail kinds follow the paper's rule for larger kernels (pool first, then the largest kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAIL_APPEND = "a"
TAIL_COMPRESS = "c"
KERNEL_OF_RATE = {1: (1, 2, 2), 2: (2, 4, 4), 4: (4, 8, 8)}


@dataclass(frozen=True)
class ContextLayout:
    """Where the window and every context group sit on the rotary time axis.

    positions: one time position for each latent frame of the noisy window.
    groups: `(rate, positions)` for each context tensor, in token order; a tail is `("a"|"c", (position,))`.
    """

    positions: tuple[int, ...]
    groups: tuple[tuple[int | str, tuple[int, ...]], ...]

    def check(self, latents: Sequence[Tensor], window_BCTHW: Tensor) -> None:
        """Raise ValueError unless these context tensors `[B, C, T_g, H, W]` and this window are the ones laid out."""
        frames, size = window_BCTHW.shape[2], tuple(window_BCTHW.shape[-2:])
        if len(latents) != len(self.groups) or len(self.positions) != frames:
            raise ValueError(
                f"The frame context does not fit the window: {len(latents)} context tensors for {len(self.groups)} "
                f"groups, {len(self.positions)} positions for {frames} latent frames. Check 'window' in 'Frame Context "
                "Packer'."
            )
        for latent in latents:
            if tuple(latent.shape[-2:]) != size:
                raise ValueError(
                    f"A context frame is {tuple(latent.shape[-2:])} latent pixels but the window is {size}. Start, end "
                    "and history must come from 'FramePack Image' nodes of one size."
                )


def pad_end(x: Tensor, multiple: tuple[int, ...]) -> Tensor:
    """Replicate the last frame, row and column of `x [B, C, T, H, W]` up to multiples of `multiple`."""
    pad: list[int] = []
    for size, step in zip(reversed(x.shape[2:]), reversed(multiple), strict=True):
        pad += [0, -size % step]
    return F.pad(x, pad, mode="replicate") if any(pad) else x


def pool_end(x: Tensor, factor: tuple[int, ...]) -> Tensor:
    """Average `x [B, C, T, H, W]` over cells of `factor` after end padding."""
    return F.avg_pool3d(pad_end(x, factor), factor, factor)


def rotate(x_BANF: Tensor, pe: Tensor) -> Tensor:
    """Rotate `[B, A, N, 2F]` (A heads) by the table `[1, 1, N, F, 2, 2]`; differentiable, unlike core's kernel."""
    pairs = x_BANF.float().unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2).type_as(x_BANF)


class CleanEmbedder(nn.Module):
    """The checkpoint's three patchifiers for finished frames (`clean_x_embedder.*`)."""

    def __init__(self, in_channels: int, hidden_size: int, dtype=None, device=None, operations=None):
        super().__init__()
        for name, rate in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
            kernel = KERNEL_OF_RATE[rate]
            conv = operations.Conv3d(in_channels, hidden_size, kernel, stride=kernel, dtype=dtype, device=device)
            self.add_module(name, conv)

    def forward(self, latent_BCTHW: Tensor, rate: int | str) -> Tensor:
        """Embed one context group; returns tokens `[B, N, D]`."""
        if rate == TAIL_COMPRESS:
            latent_BCTHW = latent_BCTHW.mean(dim=(2, 3, 4), keepdim=True)
        elif rate == TAIL_APPEND:
            # One latent pixel a frame; each must fill a whole cell of the kernel, or frames would be mixed.
            latent_BCTHW = latent_BCTHW.mean(dim=(3, 4), keepdim=True).repeat_interleave(KERNEL_OF_RATE[4][0], dim=2)
        elif rate == 8:
            latent_BCTHW = pool_end(latent_BCTHW, (2, 2, 2))
        step = rate if rate in KERNEL_OF_RATE else 4
        conv = {1: self.proj, 2: self.proj_2x, 4: self.proj_4x}[step]
        padded_BCTHW = pad_end(latent_BCTHW, KERNEL_OF_RATE[step])
        return conv(padded_BCTHW).flatten(2).transpose(1, 2)  # pyright: ignore[reportCallIssue]


class ImageProjection(nn.Module):
    """CLIP-vision tokens to the hidden size (`image_projection.*`): Linear, SiLU, Linear."""

    def __init__(self, in_features: int, hidden_size: int, dtype=None, device=None, operations=None):
        super().__init__()
        self.up = operations.Linear(in_features, hidden_size * 3, dtype=dtype, device=device)
        self.down = operations.Linear(hidden_size * 3, hidden_size, dtype=dtype, device=device)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x_BND)))


def grid_rope(
    pe_embedder: Callable[[Tensor], Tensor], positions: tuple[int, ...], height: int, width: int, device
) -> Tensor:
    """Rotary table `[T, height, width, F, 2, 2]` of full-rate tokens at the given time positions."""
    ids = torch.zeros((len(positions), height, width, 3), device=device)
    ids[..., 0] = torch.tensor(positions, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    ids[..., 1] = torch.arange(height, device=device, dtype=torch.float32).reshape(1, -1, 1)
    ids[..., 2] = torch.arange(width, device=device, dtype=torch.float32)
    return pe_embedder(ids.reshape(1, -1, 3)).reshape(len(positions), height, width, -1, 2, 2)


def pooled_rope(table: Tensor, rate: int | str, frames: int) -> Tensor:
    """Average the phases of a full-rate table over each token's cell; returns `[N, F, 2, 2]`.

    The averages are not unit rotations and are not renormalised (reference/framepack.md 1.1). A tail's
    tokens all get the mean phase of the whole frame at the tail's one position.
    """
    if rate == 1:
        return table.flatten(0, 2)
    if rate in (TAIL_APPEND, TAIL_COMPRESS):
        tokens = 1 if rate == TAIL_COMPRESS else frames
        return table.mean(dim=(0, 1, 2)).expand(tokens, *table.shape[3:])
    volume = table.flatten(3).permute(3, 0, 1, 2).unsqueeze(0)
    pooled = pool_end(volume, (rate, rate, rate))[0].permute(1, 2, 3, 0)
    return pooled.flatten(0, 2).unflatten(-1, table.shape[3:])


def packed_rope(
    pe_embedder: Callable[[Tensor], Tensor],
    layout: ContextLayout,
    frames: tuple[int, ...],
    grid_h: int,
    grid_w: int,
    device,
) -> Tensor:
    """Rotary table `[1, 1, N, F, 2, 2]` of the packed sequence: context groups in order, then the window.

    frames: latent frames of each context tensor (a tail holds more frames than it has positions).
    """
    parts = [
        pooled_rope(grid_rope(pe_embedder, positions, grid_h, grid_w, device), rate, count)
        for (rate, positions), count in zip(layout.groups, frames, strict=True)
    ]
    parts.append(grid_rope(pe_embedder, layout.positions, grid_h, grid_w, device).flatten(0, 2))
    return torch.cat(parts)[None, None]
