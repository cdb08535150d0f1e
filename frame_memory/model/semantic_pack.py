"""SemanticPack: a memory of the whole video in a constant number of tokens, updated once a section.

    psi_0 = [image features ; text features],   psi_n+1 = Squeeze(psi_n, Memorize(clip_n))

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, L text tokens, N vision tokens, M memory
tokens, D hidden size, A heads, F rotary frequencies. Latents are in model space.

Source: reference/memorypack.md section 2.2; what the paper leaves open is chosen there (CHOICE) and here.
Three things differ from that table on purpose. psi must not change from one sampling step to the next, and core's text
refiner reads the noise level: so the pack has a text projection of its own that begins as the refiner's first linear
layer, and a copy of the image projection. A gate of exactly 0 leaves the tokens out (`SemanticPack.tokens`). And
Squeeze begins by carrying the memory on, where the table's zero output matrix begins by forgetting all but the last
clip: what FramePack itself cannot see lies several clips back, so that matrix's gradient would be a product of as many
zeros. A linear reading finds the colour of a visitor that left in the section before last in 22 % of the scenes with
the zero matrix (of 6 colours) and in 69 % with this one (`benchmarks.fresh_memory`). It takes a norm behind the
embedder, whose numbers are some 20 times larger than what attention adds and would drown it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from comfy.ops import cast_to_input
from torch import Tensor, nn

from .packing import KERNEL_OF_RATE, ImageProjection, pad_end, rotate
from .specs import from_plain
from .stored_weights import unpacked

SQUEEZES = ("A", "B", "C")
# Rate of the memory's embedder: (4, 8, 8) latent frames, rows and columns a token, as `proj_4x`.
RATE = 4
# Which layers of the base are the beginning of which of the pack's.
_BEGINNINGS = {
    "clean_x_embedder.proj_4x": "embed",
    "txt_in.input_embedder": "text_in",
    "image_projection.up": "image_in.up",
    "image_projection.down": "image_in.down",
}
# Spread of the matrices that no layer of the base gives a beginning.
_SPREAD = 0.02
# What Squeeze adds at first to a clip's tokens: the memory so far, so many times as strong as they are. Of a clip's
# share in psi, 2 / sqrt(1 + 2^2) = 0.9 is then left after each further clip.
_CARRY = 2.0
# Where training opens a closed gate.
_OPEN = 0.5


@dataclass(frozen=True)
class PackSpec:
    """What a SemanticPack is made of.

    squeeze: which side asks (reference/memorypack.md table 3). A: the new clip asks the memory. B: the memory asks the
    clip. C: like B, but the first clip's tokens become part of the memory. zero_psi: psi_0 is zero (the ablation).
    true_image: the model it was trained with saw the image at its true distance in time (section 2.4).
    """

    hidden: int
    heads: int
    axes_dim: tuple[int, ...]
    theta: int
    in_channels: int
    text: int
    vision: int = 1152
    blocks: int = 2
    mlp_ratio: float = 4.0
    squeeze: str = "A"
    zero_psi: bool = False
    true_image: bool = True

    def __post_init__(self):
        if self.squeeze not in SQUEEZES:
            raise ValueError(f"Squeeze {self.squeeze!r} is not known. Expected one of {', '.join(SQUEEZES)}.")
        if self.heads * sum(self.axes_dim) != self.hidden:
            raise ValueError(
                f"{self.heads} heads of {sum(self.axes_dim)} ({'+'.join(map(str, self.axes_dim))}) do not make a "
                f"hidden size of {self.hidden}."
            )

    @classmethod
    def of(cls, transformer, **options) -> PackSpec:
        """The pack that belongs to a FramePackTransformer. options: `blocks`, `squeeze`, `zero_psi` and so on."""
        params = transformer.params
        return cls(
            hidden=transformer.hidden_size, heads=transformer.num_heads, axes_dim=tuple(params.axes_dim),
            theta=params.theta, in_channels=transformer.in_channels, text=params.context_in_dim,
            vision=transformer.image_projection.up.in_features, **options,
        )  # fmt: skip

    def to_dict(self) -> dict:
        """Plain data that JSON can hold."""
        return {**asdict(self), "axes_dim": list(self.axes_dim)}

    @classmethod
    def from_dict(cls, data: Mapping) -> PackSpec:
        """Back from `to_dict`. Raises ValueError for names that this version does not know, or missing ones."""
        return from_plain(cls, data, "axes_dim")


class _Attention(nn.Module):
    """Multi-head attention from `x` to `source`, RMS norms on query and key over the whole width, as Wan's."""

    def __init__(self, hidden: int, heads: int, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.heads = heads
        self.query = operations.Linear(hidden, hidden, **made)
        self.key = operations.Linear(hidden, hidden, **made)
        self.value = operations.Linear(hidden, hidden, **made)
        self.out = operations.Linear(hidden, hidden, **made)
        self.query_norm = operations.RMSNorm(hidden, eps=1e-6, **made)
        self.key_norm = operations.RMSNorm(hidden, eps=1e-6, **made)

    def forward(self, x_BMD: Tensor, source_BMD: Tensor, pe: Tensor | None = None) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = split(self.query_norm(self.query(x_BMD)))
        key = split(self.key_norm(self.key(source_BMD)))
        if pe is not None:
            query, key = _turn(query, pe), _turn(key, pe)
        value = split(self.value(source_BMD))
        # Some that a host can be started with (Sage) have no gradient and do not say so.
        attend = attention_pytorch if torch.is_grad_enabled() and query.requires_grad else optimized_attention
        return self.out(attend(query, key, value, self.heads, skip_reshape=True))


def _turn(x_BAMF: Tensor, pe: Tensor) -> Tensor:
    """Rotate by a rotary table; core's kernel has no gradient."""
    return rotate(x_BAMF, pe) if torch.is_grad_enabled() and x_BAMF.requires_grad else apply_rope1(x_BAMF, pe)


def _mlp(hidden: int, ratio: float, dtype=None, device=None, operations=None) -> nn.Sequential:
    inner = int(hidden * ratio)
    return nn.Sequential(
        operations.Linear(hidden, inner, dtype=dtype, device=device),
        nn.GELU(approximate="tanh"),
        operations.Linear(inner, hidden, dtype=dtype, device=device),
    )


class MemorizeBlock(nn.Module):
    """Self-attention over one clip, then an MLP, each behind its own norm."""

    def __init__(self, spec: PackSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device, "operations": operations}
        self.norm_attention = operations.LayerNorm(spec.hidden, eps=1e-6, dtype=dtype, device=device)
        self.attention = _Attention(spec.hidden, spec.heads, **made)
        self.norm_mlp = operations.LayerNorm(spec.hidden, eps=1e-6, dtype=dtype, device=device)
        self.mlp = _mlp(spec.hidden, spec.mlp_ratio, **made)

    def forward(self, x_BMD: Tensor, pe: Tensor) -> Tensor:
        normed = self.norm_attention(x_BMD)
        x_BMD = x_BMD + self.attention(normed, normed, pe)
        return x_BMD + self.mlp(self.norm_mlp(x_BMD))


class SqueezeLayer(nn.Module):
    """One cross-attention and an MLP: what asks keeps its own tokens and adds what it finds in `source`."""

    def __init__(self, spec: PackSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device, "operations": operations}
        self.norm_query = operations.LayerNorm(spec.hidden, eps=1e-6, dtype=dtype, device=device)
        self.norm_source = operations.LayerNorm(spec.hidden, eps=1e-6, dtype=dtype, device=device)
        self.attention = _Attention(spec.hidden, spec.heads, **made)
        self.norm_mlp = operations.LayerNorm(spec.hidden, eps=1e-6, dtype=dtype, device=device)
        self.mlp = _mlp(spec.hidden, spec.mlp_ratio, **made)

    def forward(self, query_BMD: Tensor, source_BMD: Tensor) -> Tensor:
        y_BMD = query_BMD + self.attention(self.norm_query(query_BMD), self.norm_source(source_BMD))
        return y_BMD + self.mlp(self.norm_mlp(y_BMD))


class SemanticPack(nn.Module):
    """The network. Any number of frames and any size: a clip is padded at its end by replication, as the DiT's own
    embedders pad, and a short clip leaves fewer tokens, never zeros in the place of missing frames.

    All inputs are cast to `dtype`. Fresh weights are undefined under core's operations: call `initialise`.
    """

    def __init__(self, spec: PackSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device, "operations": operations}
        kernel = KERNEL_OF_RATE[RATE]
        self.spec, self.dtype = spec, dtype or torch.get_default_dtype()
        self.embed = operations.Conv3d(spec.in_channels, spec.hidden, kernel, stride=kernel, dtype=dtype, device=device)
        self.norm_embed = operations.LayerNorm(spec.hidden, eps=1e-6, dtype=dtype, device=device)
        self.text_in = operations.Linear(spec.text, spec.hidden, dtype=dtype, device=device)
        self.image_in = ImageProjection(spec.vision, spec.hidden, **made)
        self.memorize = nn.ModuleList(MemorizeBlock(spec, **made) for _ in range(spec.blocks))
        self.squeeze = SqueezeLayer(spec, **made)
        self.gate = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        self.rotary = EmbedND(dim=sum(spec.axes_dim), theta=spec.theta, axes_dim=list(spec.axes_dim))

    def anchor(self, text_BLC: Tensor, vision_BNC: Tensor | None = None) -> Tensor:
        """psi_0 `[B, N + L, D]`: image features, then text features; zeros of that shape with `zero_psi`.

        text_BLC: the text encoder's output without padding. vision_BNC: the vision encoder's last hidden state. One of
        the two may hold a single sample for a batch of the other.
        """
        parts = [self.text_in(text_BLC.to(self.dtype))]
        if vision_BNC is not None:
            image = self.image_in(vision_BNC.to(self.dtype))
            batch = max(image.shape[0], parts[0].shape[0])
            parts = [part.expand(batch, -1, -1) for part in (image, parts[0])]
        psi = torch.cat(parts, dim=1)
        return torch.zeros_like(psi) if self.spec.zero_psi else psi

    def clip_tokens(self, clip_BCTHW: Tensor) -> Tensor:
        """Memorize: a clip's tokens `[B, ceil(T/4) ceil(H/8) ceil(W/8), D]`, attention inside the clip only."""
        volume = self.embed(pad_end(clip_BCTHW.to(self.dtype), KERNEL_OF_RATE[RATE]))
        pe = self._positions(volume.shape[2:], volume.device)
        tokens = self.norm_embed(volume.flatten(2).transpose(1, 2))
        for block in self.memorize:
            tokens = block(tokens, pe)
        return tokens

    def squeeze_in(self, psi: Tensor, m_BMD: Tensor, *, first: bool) -> Tensor:
        """psi with a clip's tokens taken in. first: whether the clip is the first one, which only variant C asks."""
        psi = psi.expand(m_BMD.shape[0], -1, -1)
        if self.spec.squeeze == "A":
            return self.squeeze(m_BMD, psi)
        if self.spec.squeeze == "C" and first:
            psi = torch.cat((psi, m_BMD), dim=1)
        return self.squeeze(psi, m_BMD)

    def update(self, psi: Tensor, clip_BCTHW: Tensor, *, first: bool) -> Tensor:
        """psi after one more clip. psi: `[B or 1, M, D]`; first: whether this is the video's first clip."""
        return self.squeeze_in(psi, self.clip_tokens(clip_BCTHW), first=first)

    def tokens(self, psi: Tensor) -> Tensor | None:
        """What goes into the context stream, `tanh(gate) psi`, or None where nothing must.

        None where the gate is exactly 0 and takes no gradient: tokens of zero are still tokens, which attention would
        look at, and the published model would not be reproduced. In training they must be there, or the gate could
        never leave 0; `open_gate` opens it at once.

        The transformer normalises every token before it reads it, so beyond |gate| of about 1e-3 the strength of psi
        hardly changes any more: the gate works as a switch, with a steep slope at 0 and a flat one elsewhere. Measured
        on a random network 128 wide with 6 tokens of memory: zero tokens alone move its output by 1.1 %; from there
        psi moves it by 0.1 % at a gate of 1e-4, 0.5 % at 1e-3, 0.8 % at 0.1 and 1.2 % at 1.
        """
        wanted = torch.is_grad_enabled() and self.gate.requires_grad
        if not wanted and not bool(self.gate):
            return None
        return torch.tanh(cast_to_input(self.gate, psi)) * psi

    def _positions(self, grid: tuple[int, ...], device) -> Tensor:
        """Rotary table `[1, 1, M, F, 2, 2]` of the clip's own grid."""
        axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
        return self.rotary(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3))


@torch.no_grad()
def initialise(
    pack: SemanticPack,
    transformer: nn.Module | None = None,
    seed: int = 0,
    originals: Mapping[str, Tensor] = MappingProxyType({}),
) -> SemanticPack:
    """Give a fresh pack its weights, in place: the embedders of the base, and branches that add nothing at first.

    transformer: the FramePackTransformer it is made for; None leaves the embedders random (for tests). originals: its
    weights by name where patches have replaced them. The last linear layer of every residual branch and the gate are
    zero, but for Squeeze's attention, which hands on what it reads: so at first psi_n is the embedding of clip n-1,
    normalised, and `_CARRY` times a mean of the normalised psi_n-1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(pack.named_parameters()):
        norm, bias = "norm" in name, name.endswith("bias")
        if norm and not bias:
            parameter.fill_(1)
        elif bias or norm or name == "gate" or name.endswith(("attention.out.weight", "mlp.2.weight")):
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _SPREAD)
    nn.init.eye_(pack.squeeze.attention.value.weight)
    nn.init.eye_(pack.squeeze.attention.out.weight).mul_(_CARRY)
    if transformer is not None:
        for source, target in _BEGINNINGS.items():
            for name in ("weight", "bias"):
                value = originals.get(f"{source}.{name}", transformer.get_parameter(f"{source}.{name}"))
                pack.get_parameter(f"{target}.{name}").copy_(unpacked(transformer.get_submodule(source), value))
    return pack


@torch.no_grad()
def open_gate(pack: SemanticPack) -> None:
    """Open a closed gate, in place, to begin training with: behind one at exactly 0 nothing else has a gradient, and
    small rates leave it there (500 steps at 1e-5 take it to 0.005)."""
    if not bool(pack.gate):
        pack.gate.fill_(_OPEN)
