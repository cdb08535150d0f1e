"""Tiny Wan checkpoints of each family, and Wan with history in front written again as plain sums in float64.

The second is the tests' own word: one sample, tokens and rotations one by one, every token with its own modulation.
`sd` is the state dict of a WanModel. Wan's paper and public code are the source of the plain forward pass; the
positions and noise levels of the history are pfp reference 2.4 and framepack reference 1.1.
"""

from __future__ import annotations

import math

import comfy.sd
import torch
from torch import Tensor

# Text features are not told by a file's tensors; core takes them from here.
METADATA = {"config": '{"transformer": {"text_dim": 24}}'}
HEAD = 128  # core counts heads as width / 128
# in_dim, out_dim, whether CLIP-vision features are read.
FAMILIES = {
    "2.1 T2V": (16, 16, False),
    "2.1 I2V": (36, 16, True),
    "2.2 A14B I2V": (36, 16, False),
    "2.2 TI2V 5B": (48, 48, False),
}


def checkpoint(family: str, layers: int = 2, dim: int = 128, text: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of Wan's files, norms and modulations not at their neutral values."""
    channels, out, vision = FAMILIES[family]
    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}

    def linear(name: str, inner: int, outer: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner), (outer,)

    linear("text_embedding.0", text, dim), linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", 256, dim), linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    for i in range(layers):
        shapes[f"blocks.{i}.modulation"] = (1, 6, dim)
        for part in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                linear(f"blocks.{i}.{part}.{layer}", dim, dim)
            for layer in "qk":
                shapes[f"blocks.{i}.{part}.norm_{layer}.weight"] = (dim,)
        if vision:
            linear(f"blocks.{i}.cross_attn.k_img", dim, dim), linear(f"blocks.{i}.cross_attn.v_img", dim, dim)
            shapes[f"blocks.{i}.cross_attn.norm_k_img.weight"] = (dim,)
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = (dim,)
        linear(f"blocks.{i}.ffn.0", dim, 2 * dim), linear(f"blocks.{i}.ffn.2", 2 * dim, dim)
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", dim, 4 * out)
    if vision:
        for index, (inner, outer) in {"1": (1280, 1280), "3": (1280, dim)}.items():
            linear(f"img_emb.proj.{index}", inner, outer)
        for index, width in {"0": 1280, "4": dim}.items():
            shapes[f"img_emb.proj.{index}.weight"] = shapes[f"img_emb.proj.{index}.bias"] = (width,)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name or name.startswith(("img_emb.proj.0", "img_emb.proj.4"))
        if len(shape) == 1:
            made[name] = 0.3 * noise + (norm and name.endswith("weight"))
        else:
            made[name] = noise * 0.5 if "modulation" in name else noise / math.prod(shape[1:]) ** 0.5
    return made


def load(family: str, dtype=torch.float32, **options):
    """A MODEL by core's own detection and loader."""
    return comfy.sd.load_diffusion_model_state_dict(
        checkpoint(family, **options), model_options={"dtype": dtype}, metadata=METADATA
    )


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the forward pass, plainly --------------------------------------------------------------------------------------


def linear(sd: dict, name: str, x: Tensor) -> Tensor:
    return x @ sd[f"{name}.weight"].double().T + sd[f"{name}.bias"].double()


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(sd: dict, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * sd[f"{name}.weight"].double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def phases(position) -> Tensor:
    """Complex rotations `[64]` of one token at (t, h, w): 22 pairs turn with time, 21 with the row, 21 the column."""
    parts = []
    for value, width in zip(position, (HEAD - 4 * (HEAD // 6), 2 * (HEAD // 6), 2 * (HEAD // 6)), strict=True):
        for pair in range(width // 2):
            angle = float(value) / 10000 ** (2 * pair / width)
            parts.append(complex(math.cos(angle), math.sin(angle)))
    return torch.tensor(parts, dtype=torch.complex128)


def turn(x_NA: Tensor, table_NF: Tensor) -> Tensor:
    """Every head of every token turned; a mean of phases shrinks as well."""
    pairs = torch.view_as_complex(x_NA.reshape(len(x_NA), -1, HEAD // 2, 2).contiguous())
    return torch.view_as_real(pairs * table_NF[:, None]).reshape(x_NA.shape)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = torch.zeros_like(query)
    for start in range(0, query.shape[-1], HEAD):
        part = slice(start, start + HEAD)
        weights = torch.exp(query[:, part] @ key[:, part].T / math.sqrt(HEAD))
        out[:, part] = (weights / weights.sum(-1, keepdim=True)) @ value[:, part]
    return out


def time_row(sd: dict, timestep: float) -> tuple[Tensor, Tensor]:
    """The embedding `[D]` of a timestep and the modulation `[6, D]` of the blocks."""
    angles = [timestep / 10000 ** (i / 128) for i in range(128)]
    wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    embedded = linear(sd, "time_embedding.2", silu(linear(sd, "time_embedding.0", wave)))
    return embedded, linear(sd, "time_projection.1", silu(embedded)).reshape(6, -1)


def block(sd: dict, name: str, x: Tensor, rows: list[Tensor], table: Tensor, text: Tensor, image: Tensor | None):
    """One block over tokens `[N, D]`; rows: the modulation `[6, D]` of each token."""
    own = sd[f"{name}.modulation"].double()[0]

    def modulated(values: Tensor, shift: int, scale: int) -> Tensor:
        return torch.stack(
            [v * (1 + (own + row)[scale]) + (own + row)[shift] for v, row in zip(layer_norm(values), rows, strict=True)]
        )

    def gated(values: Tensor, gate: int) -> Tensor:
        return torch.stack([v * (own + row)[gate] for v, row in zip(values, rows, strict=True)])

    seen = modulated(x, 0, 1)
    query = turn(rms_norm(sd, f"{name}.self_attn.norm_q", linear(sd, f"{name}.self_attn.q", seen)), table)
    key = turn(rms_norm(sd, f"{name}.self_attn.norm_k", linear(sd, f"{name}.self_attn.k", seen)), table)
    mixed = attend(query, key, linear(sd, f"{name}.self_attn.v", seen))
    x = x + gated(linear(sd, f"{name}.self_attn.o", mixed), 2)

    cross = f"{name}.cross_attn"
    seen = layer_norm(x) * sd[f"{name}.norm3.weight"].double() + sd[f"{name}.norm3.bias"].double()
    query = rms_norm(sd, f"{cross}.norm_q", linear(sd, f"{cross}.q", seen))
    mixed = attend(
        query, rms_norm(sd, f"{cross}.norm_k", linear(sd, f"{cross}.k", text)), linear(sd, f"{cross}.v", text)
    )
    if image is not None:
        key = rms_norm(sd, f"{cross}.norm_k_img", linear(sd, f"{cross}.k_img", image))
        mixed = mixed + attend(query, key, linear(sd, f"{cross}.v_img", image))
    x = x + linear(sd, f"{cross}.o", mixed)

    hidden = gelu(linear(sd, f"{name}.ffn.0", modulated(x, 3, 4)))
    return x + gated(linear(sd, f"{name}.ffn.2", hidden), 5)


def patches(weight: Tensor, bias: Tensor, x_CTHW: Tensor) -> Tensor:
    """`[N, D]`: one sum a cell, in order of time, row and column; past the end the last frame, row, column counts."""
    deep, tall, wide = weight.shape[2:]
    _, frames, rows, columns = x_CTHW.shape
    tokens = []
    for t in range(0, frames, deep):
        for y in range(0, rows, tall):
            for x in range(0, columns, wide):
                ts = [min(t + i, frames - 1) for i in range(deep)]
                ys = [min(y + i, rows - 1) for i in range(tall)]
                xs = [min(x + i, columns - 1) for i in range(wide)]
                cell = x_CTHW.double()[:, ts][:, :, ys][:, :, :, xs]
                tokens.append((weight.double() * cell).sum(dim=(1, 2, 3, 4)) + bias.double())
    return torch.stack(tokens)


def coarse_phases(positions, rows: int, columns: int, rate: int) -> Tensor:
    """`[N, F]`: of each cell of rate x rate x rate patches the mean of what its patches turn by, ends repeated."""
    out = []
    for t in range(0, len(positions), rate):
        for y in range(0, rows, rate):
            for x in range(0, columns, rate):
                cell = [
                    phases((positions[min(t + i, len(positions) - 1)], min(y + j, rows - 1), min(x + k, columns - 1)))
                    for i in range(rate)
                    for j in range(rate)
                    for k in range(rate)
                ]
                out.append(torch.stack(cell).mean(0))
    return torch.stack(out)


def even(x_CTHW: Tensor) -> Tensor:
    """Core's rule for odd sizes: the first row and column follow the last."""
    x_CTHW = torch.cat((x_CTHW, x_CTHW[:, :, : x_CTHW.shape[2] % 2]), 2)
    return torch.cat((x_CTHW, x_CTHW[..., : x_CTHW.shape[3] % 2]), 3)


def forward(sd, x_CTHW, timesteps, text, image=None, groups=(), memory=None, positions=None, out=16) -> Tensor:
    """Velocity `[C, T, H, W]` of one sample.

    timesteps: of each frame of the window. groups: (rate, time positions, weight, bias, channels `[C, T, H, W]`) each.
    memory: (tokens `[M, D]`, their (t, h, w)). positions: of the window's frames.
    """
    given, x_CTHW = x_CTHW.shape, even(x_CTHW)
    frames, rows, columns = x_CTHW.shape[1], x_CTHW.shape[2] // 2, x_CTHW.shape[3] // 2
    positions = range(frames) if positions is None else positions
    tokens, table, clean = [], [], time_row(sd, 0.0)
    if memory is not None:
        tokens.append(memory[0].double())
        table.append(torch.stack([phases(place) for place in memory[1]]))
    for rate, times, weight, bias, latent in groups:
        tokens.append(patches(weight, bias, even(latent)))
        table.append(coarse_phases(times, rows, columns, rate))
    ahead = sum(map(len, tokens))
    tokens.append(patches(sd["patch_embedding.weight"], sd["patch_embedding.bias"], x_CTHW))
    table.append(coarse_phases(positions, rows, columns, 1))
    own = [time_row(sd, float(t)) for t in timesteps for _ in range(rows * columns)]
    modulation = [clean[1]] * ahead + [row for _, row in own]

    text = linear(sd, "text_embedding.2", gelu(linear(sd, "text_embedding.0", text.double())))
    if image is not None:
        image = layer_norm(image.double(), 1e-5)
        image = image * sd["img_emb.proj.0.weight"].double() + sd["img_emb.proj.0.bias"].double()
        image = linear(sd, "img_emb.proj.1", image)
        image = linear(sd, "img_emb.proj.3", 0.5 * image * (1 + torch.erf(image / math.sqrt(2))))
        image = layer_norm(image, 1e-5) * sd["img_emb.proj.4.weight"].double() + sd["img_emb.proj.4.bias"].double()
    x, table = torch.cat(tokens), torch.cat(table)
    for index in range(sum(name.endswith("norm3.bias") for name in sd)):
        x = block(sd, f"blocks.{index}", x, modulation, table, text, image)
    last = sd["head.modulation"].double()[0]
    shown = [
        v * (1 + last[1] + embedded) + last[0] + embedded
        for v, (embedded, _) in zip(layer_norm(x[ahead:]), own, strict=True)
    ]
    made = linear(sd, "head.head", torch.stack(shown)).reshape(frames, rows, columns, 2, 2, out)
    return made.permute(5, 0, 1, 3, 2, 4).reshape(out, frames, 2 * rows, 2 * columns)[..., : given[2], : given[3]]
