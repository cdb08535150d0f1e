"""A tiny encoder with random weights, and frame preservation written again as plain sums in float64.

The second is the tests' own word on pfp reference 2.1 to 2.3: one sample, sizes rounded down, blocks from the top left.
`sd` is an encoder's state dict.
"""

from __future__ import annotations

import math

import comfy.ops
import torch
from torch import Tensor

from frame_memory.model.preservation import PreservationEncoder, PreservationSpec

TINY = {"hidden": 10, "in_channels": 3, "channels": (4, 6, 8, 8), "heads": 2}
# pfp reference 2.3, as (time, space), a line a layer.
TABLE = {
    "4x4x2": [(1, 1), (2, 1), (1, 2), (1, 2), (1, 2)],
    "2x2x2": [(1, 1), (2, 1), (1, 2), (1, 2), (1, 1)],
    "2x2x1": [(1, 1), (1, 1), (1, 2), (1, 2), (1, 1)],
    "2x2x4": [(1, 1), (2, 1), (2, 1), (1, 2), (1, 2)],
    "2x2x8": [(1, 1), (2, 1), (2, 1), (2, 2), (1, 2)],
}


def random_encoder(seed: int = 0, dtype=torch.float32, **options) -> PreservationEncoder:
    """All weights random, the projection and norms too, so that nothing hides behind a zero."""
    encoder = PreservationEncoder(
        PreservationSpec(**{**TINY, **options}), dtype=dtype, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(encoder.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * 1.5 / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise + name.endswith("norm.weight"))
    return encoder


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolution(sd: dict, name: str, x_CTHW: Tensor, time: int, space: int) -> Tensor:
    """3x3x3 by its 27 shifted copies, then SiLU. Frames before the first show the first; beyond an edge is zero."""
    weight, bias = sd[f"{name}.weight"].double(), sd[f"{name}.bias"].double()
    _, frames, rows, columns = x_CTHW.shape
    framed = torch.zeros(x_CTHW.shape[0], frames, rows + 2, columns + 2, dtype=torch.float64)
    framed[:, :, 1:-1, 1:-1] = x_CTHW
    out = bias[:, None, None, None].expand(-1, frames // time, rows // space, columns // space)
    first = 0 if space == 1 else 1  # of the three rows that the first output sees, counted in `framed`
    for dt in range(3):
        ts = [max(time * t + dt - (3 - time), 0) for t in range(frames // time)]
        for dy in range(3):
            ys = [space * y + dy + first for y in range(rows // space)]
            for dx in range(3):
                xs = [space * x + dx + first for x in range(columns // space)]
                seen = framed[:, ts][:, :, ys][:, :, :, xs]
                out = out + torch.einsum("oc,cthw->othw", weight[:, :, dt, dy, dx], seen)
    return out * torch.sigmoid(out)


def linear(sd: dict, name: str, x: Tensor) -> Tensor:
    return x @ sd[f"{name}.weight"].double().T + sd[f"{name}.bias"].double()


def attention(sd: dict, name: str, x_NE: Tensor, heads: int) -> Tensor:
    centred = x_NE - x_NE.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * sd[f"{name}.norm.weight"].double() + sd[f"{name}.norm.bias"].double()
    query, key, value = (linear(sd, f"{name}.{part}", normed) for part in ("query", "key", "value"))
    size = x_NE.shape[-1] // heads
    out = torch.zeros_like(x_NE)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for token in range(len(x_NE)):
            weight = torch.exp(key[:, part] @ query[token, part] / math.sqrt(size))
            out[token, part] = (weight / weight.sum()) @ value[:, part]
    return x_NE + linear(sd, f"{name}.out", out)


def features(sd: dict, spec, chunk_CTHW: Tensor) -> Tensor:
    """`[N, E]` of one chunk."""
    x = chunk_CTHW.double()
    for number, (time, space) in enumerate(TABLE[spec.rate]):
        x = convolution(sd, f"high.convolutions.{number}.conv", x, time, space)
    x = x.flatten(1).T
    for number in range(spec.blocks):
        x = attention(sd, f"high.attention.{number}", x, spec.heads)
    return x


def middle(index: int, step: int) -> list[int]:
    """Of the pixels of a block, those nearest its middle: one of one, the two inner ones of an even number."""
    return [index] if step == 1 else [index * step + step // 2 - 1, index * step + step // 2]


def small_copy(rate, x_CTHW: Tensor) -> Tensor:
    """Each pixel of the low-resolution copy: the mean of the pixels around the middle of what it stands for."""
    _, frames, rows, columns = x_CTHW.shape
    out = torch.zeros(x_CTHW.shape[0], frames // rate.time, rows // rate.height, columns // rate.width).double()
    for t in range(out.shape[1]):
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                ts, ys, xs = middle(t, rate.time), middle(y, rate.height), middle(x, rate.width)
                out[:, t, y, x] = x_CTHW.double()[:, ts][:, :, ys][:, :, :, xs].mean(dim=(1, 2, 3))
    return out


def patches(weight: Tensor, bias: Tensor, x_CTHW: Tensor, block: tuple[int, int, int]) -> Tensor:
    """`[N, D]`: one sum over each whole block, by time, row and column."""
    deep, tall, wide = block
    _, frames, rows, columns = x_CTHW.shape
    tokens = []
    for t in range(0, frames - deep + 1, deep):
        for y in range(0, rows - tall + 1, tall):
            for x in range(0, columns - wide + 1, wide):
                cell = x_CTHW.double()[:, t : t + deep, y : y + tall, x : x + wide]
                tokens.append((weight.double() * cell).sum(dim=(1, 2, 3, 4)) + bias.double())
    return torch.stack(tokens)


def low(sd: dict, rate, chunk_CTHW: Tensor) -> Tensor:
    return patches(sd["embed.weight"], sd["embed.bias"], small_copy(rate, chunk_CTHW), (1, 2, 2))


def tokens(sd: dict, spec, rate, chunk_CTHW: Tensor) -> Tensor:
    """`[N, D]` of one chunk."""
    return low(sd, rate, chunk_CTHW) + linear(sd, "project", features(sd, spec, chunk_CTHW))
