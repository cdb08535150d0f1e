"""SemanticPack written again as plain sums in float64, from reference/memorypack.md 2.2: the tests' own word on it.

One sample at a time, one token at a time where that is readable. `sd` is a pack's state dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear(sd: dict, name: str, x: Tensor) -> Tensor:
    return x @ sd[f"{name}.weight"].double().T + sd[f"{name}.bias"].double()


def layer_norm(sd: dict, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * sd[f"{name}.weight"].double() + sd[f"{name}.bias"].double()


def rms_norm(sd: dict, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * sd[f"{name}.weight"].double()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(sd: dict, name: str, x: Tensor) -> Tensor:
    return linear(sd, f"{name}.2", gelu(linear(sd, f"{name}.0", x)))


def turned(x: Tensor, place: tuple[int, ...], axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """One head's vector turned by its place: neighbours in pairs, the i-th pair of an axis by place * theta^(-2i/d)."""
    out, at = x.clone(), 0
    for position, size in zip(place, axes_dim):
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            a, b = x[at + 2 * i], x[at + 2 * i + 1]
            out[at + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[at + 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        at += size
    return out


def attention(sd: dict, name: str, x: Tensor, source: Tensor, heads: int, rope=None) -> Tensor:
    """x `[M, D]` asks source `[S, D]`. rope: (places of the tokens, axes_dim, theta), or None."""
    size = x.shape[-1] // heads
    query = rms_norm(sd, f"{name}.query_norm", linear(sd, f"{name}.query", x))
    key = rms_norm(sd, f"{name}.key_norm", linear(sd, f"{name}.key", source))
    value = linear(sd, f"{name}.value", source)
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        q, k = query[:, part], key[:, part]
        if rope is not None:
            places, axes_dim, theta = rope
            q = torch.stack([turned(row, place, axes_dim, theta) for row, place in zip(q, places)])
            k = torch.stack([turned(row, place, axes_dim, theta) for row, place in zip(k, places)])
        for token in range(len(q)):
            weight = torch.exp(k @ q[token] / math.sqrt(size))
            out[token, part] = (weight / weight.sum()) @ value[:, part]
    return linear(sd, f"{name}.out", out)


def embedded(sd: dict, clip_CTHW: Tensor) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Cells of 4x8x8, a cell that reaches beyond the edge showing the edge again; tokens and their places."""
    weight, bias = sd["embed.weight"].double(), sd["embed.bias"].double()
    _, frames, rows, columns = clip_CTHW.shape
    tokens, places = [], []
    for t in range(math.ceil(frames / 4)):
        for h in range(math.ceil(rows / 8)):
            for w in range(math.ceil(columns / 8)):
                ts = [min(4 * t + i, frames - 1) for i in range(4)]
                hs = [min(8 * h + i, rows - 1) for i in range(8)]
                ws = [min(8 * w + i, columns - 1) for i in range(8)]
                cell = clip_CTHW.double()[:, ts][:, :, hs][:, :, :, ws]
                tokens.append((weight * cell).sum(dim=(1, 2, 3, 4)) + bias)
                places.append((t, h, w))
    return torch.stack(tokens), places


def clip_tokens(sd: dict, spec, clip_CTHW: Tensor) -> Tensor:
    x, places = embedded(sd, clip_CTHW)
    x = layer_norm(sd, "norm_embed", x)
    for n in range(spec.blocks):
        at = f"memorize.{n}"
        normed = layer_norm(sd, f"{at}.norm_attention", x)
        rope = (places, spec.axes_dim, spec.theta)
        x = x + attention(sd, f"{at}.attention", normed, normed, spec.heads, rope)
        x = x + mlp(sd, f"{at}.mlp", layer_norm(sd, f"{at}.norm_mlp", x))
    return x


def squeeze(sd: dict, spec, query: Tensor, source: Tensor) -> Tensor:
    asked = layer_norm(sd, "squeeze.norm_source", source)
    y = query + attention(sd, "squeeze.attention", layer_norm(sd, "squeeze.norm_query", query), asked, spec.heads)
    return y + mlp(sd, "squeeze.mlp", layer_norm(sd, "squeeze.norm_mlp", y))


def anchor(sd: dict, spec, text_LC: Tensor, vision_NC: Tensor | None) -> Tensor:
    parts = [linear(sd, "text_in", text_LC.double())]
    if vision_NC is not None:
        up = linear(sd, "image_in.up", vision_NC.double())
        parts = [linear(sd, "image_in.down", up * torch.sigmoid(up)), *parts]
    psi = torch.cat(parts)
    return psi * 0 if spec.zero_psi else psi


def memory_of(sd: dict, spec, text_LC: Tensor, vision_NC: Tensor | None, clips: list[Tensor]) -> Tensor:
    """psi after all clips, from nothing: reference/memorypack.md 2.2 and table 3."""
    psi = anchor(sd, spec, text_LC, vision_NC)
    for number, clip in enumerate(clips):
        m = clip_tokens(sd, spec, clip)
        if spec.squeeze == "A":
            psi = squeeze(sd, spec, m, psi)
        elif spec.squeeze == "C" and number == 0:
            psi = squeeze(sd, spec, torch.cat([psi, m]), m)
        else:
            psi = squeeze(sd, spec, psi, m)
    return psi
