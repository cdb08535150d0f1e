"""Frame preservation: the whole history of a video in few tokens of the DiT's own width, encoded segment by segment.

    tokens = embed(low-resolution copy) + project(attend(convolve(history)))

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, N tokens, D width of the DiT, E width of
the features before the projection, A heads. Latents are in model space. `high` names the branch that sees the history
at its full resolution, `low` the one that sees the copy.

Source: pfp reference 2.1 to 2.4 (TinyHistory, arXiv 2512.23851); there is no public code by the authors, and the layer
table is that reference's. In three things we differ from it, on purpose.

- A strided convolution is padded by one frame on the left and not by two. An output then sees frames 2i-1 to 2i+1,
  which holds its own block; with two it sees 2i-2 to 2i, and the branch never looks at the newest frame of a chunk.
- The low branch has a frozen copy of the DiT's patch embedding, in fp32 as core keeps Wan's: 0.33 M numbers of a base
  of 14 B. The encoder runs once a segment and then never needs the base, which may stay where it is.
- The projection to D is a linear layer over tokens, the same sums as a 1x1x1 convolution.

Counted from a forward pass (tests/model/test_preservation_counts.py) at 4x4x2 for HunyuanVideo, D 3072: 15.6 M numbers,
of which 0.2 M are the base's. 20 s at 480x832 and 24 fps, which are 120 latent frames of 60x104, become 5,460 tokens,
33.5 MB in bf16; that takes 0.67 T operations in chunks of 8 latent frames and 0.78 T in one (a multiplication and an
addition are two). The same history at 2x2x2 takes 1.2 T in chunks and 3.3 T in one, since attention spans the chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from torch import Tensor, nn

from ..plan.errors import refusal
from ..plan.preservation import PATCH, PRESERVATION, Rate, chunks, low_size, parse_rate, token_grid
from .specs import from_plain

# Strides in time, height and width of the convolutions, by rate (pfp reference 2.3).
STRIDES_OF_RATE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "4x4x2": ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)),
    "2x2x2": ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 1)),
    "2x2x1": ((1, 1, 1), (1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 1)),
    "2x2x4": ((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 2), (1, 2, 2)),
    "2x2x8": ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 2, 2), (1, 2, 2)),
}
# What the tokens are made of: both branches, one of them alone, or one large convolution as FramePack's (ablations).
BRANCHES = ("both", "low", "high", "patchifier")
_KERNEL = 3


@dataclass(frozen=True)
class PreservationSpec:
    """What an encoder is made of.

    hidden: D. channels: widths of the convolutions, the last one twice and E. patch: of the DiT, frames, rows and
    columns. branches: one of BRANCHES. cross_attention: whether the features before the projection are handed out, for
    the layers of `model.cross_attention`.
    """

    hidden: int
    in_channels: int = 16
    rate: str = "4x4x2"
    patch: tuple[int, int, int] = (1, PATCH, PATCH)
    heads: int = 8
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    blocks: int = 2
    branches: str = "both"
    cross_attention: bool = False

    def __post_init__(self):
        parse_rate(self.rate)
        if self.branches not in BRANCHES:
            raise ValueError(f"Branches {self.branches!r} are not known. Expected one of {', '.join(BRANCHES)}.")
        if tuple(self.patch) != (1, PATCH, PATCH):
            raise ValueError(
                f"The encoder is for models with patches of 1x{PATCH}x{PATCH} latent pixels (HunyuanVideo, FramePack, "
                f"Wan), not {'x'.join(map(str, self.patch))}."
            )
        if len(self.channels) != 4 or self.features % self.heads:
            raise ValueError(
                f"Channels {self.channels} do not suit {self.heads} heads. Expected 4 widths, the last a multiple of "
                "the heads, as (64, 128, 256, 512)."
            )
        if self.cross_attention and not self.high:
            raise ValueError(f"Branches {self.branches!r} have no features for cross-attention. Expected both or high.")

    @property
    def features(self) -> int:
        """E."""
        return self.channels[-1]

    @property
    def high(self) -> bool:
        """Whether there are convolutions over the history at its full resolution."""
        return self.branches in ("both", "high")

    @property
    def low(self) -> bool:
        """Whether a low-resolution copy is embedded."""
        return self.branches in ("both", "low")

    @classmethod
    def of(cls, patch_embedding: nn.Module, in_channels: int, **options) -> PreservationSpec:
        """The encoder for a DiT. patch_embedding: its first convolution. in_channels: C, which may be fewer than that
        convolution takes (Wan I2V adds mask and image). options: `rate`, `branches` and so on."""
        patch: tuple[int, ...] = tuple(patch_embedding.kernel_size)  # pyright: ignore[reportAttributeAccessIssue]
        return cls(hidden=patch_embedding.out_channels, in_channels=in_channels, patch=patch, **options)

    def to_dict(self) -> dict:
        """Plain data that JSON can hold."""
        return {**asdict(self), "patch": list(self.patch), "channels": list(self.channels)}

    @classmethod
    def from_dict(cls, data: Mapping) -> PreservationSpec:
        """Back from `to_dict`. Raises ValueError for names that this version does not know, or missing ones."""
        return from_plain(cls, data, "patch", "channels")


class Encoded(NamedTuple):
    """Tokens `[B, N, D]` by time, row and column, and features `[B, N, E]` for cross-attention or None."""

    tokens: Tensor
    features: Tensor | None


class _Convolution(nn.Module):
    """3x3x3 and SiLU. A stride halves its axis and rounds down: causal in time, padded behind in space."""

    def __init__(self, inner: int, outer: int, stride: tuple[int, int, int], dtype=None, device=None, operations=None):
        super().__init__()
        self.stride = stride
        self.conv = operations.Conv3d(inner, outer, _KERNEL, stride=stride, dtype=dtype, device=device)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        time, height, width = self.stride
        before = x_BCTHW[:, :, :1].expand(-1, -1, _KERNEL - time, -1, -1)
        x_BCTHW = F.pad(torch.cat((before, x_BCTHW), dim=2), (int(width == 1), 1, int(height == 1), 1))
        return F.silu(self.conv(x_BCTHW))


class _Attention(nn.Module):
    """Self-attention over all tokens of a chunk, behind a norm, added to what came in."""

    def __init__(self, width: int, heads: int, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.heads = heads
        self.norm = operations.LayerNorm(width, eps=1e-6, **made)
        self.query = operations.Linear(width, width, **made)
        self.key = operations.Linear(width, width, **made)
        self.value = operations.Linear(width, width, **made)
        self.out = operations.Linear(width, width, **made)

    def forward(self, x_BNE: Tensor) -> Tensor:
        normed = self.norm(x_BNE)
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        # Some that a host can be started with (Sage) have no gradient and do not say so.
        attend = attention_pytorch if torch.is_grad_enabled() and query.requires_grad else optimized_attention
        return x_BNE + self.out(attend(query, key, value, self.heads, skip_reshape=True))


class HighBranch(nn.Module):
    """The history at its full resolution to features: convolutions by the rate's strides, then attention."""

    def __init__(self, spec: PreservationSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device, "operations": operations}
        widths = (spec.in_channels, *spec.channels, spec.features)
        steps = zip(pairwise(widths), STRIDES_OF_RATE[spec.rate], strict=True)
        self.convolutions = nn.ModuleList(_Convolution(*ends, stride, **made) for ends, stride in steps)
        self.attention = nn.ModuleList(_Attention(spec.features, spec.heads, **made) for _ in range(spec.blocks))

    def forward(self, chunk_BCTHW: Tensor) -> Tensor:
        """Features `[B, E, T', H', W']` of one chunk on the grid of its tokens."""
        for convolution in self.convolutions:
            chunk_BCTHW = convolution(chunk_BCTHW)
        x_BNE = chunk_BCTHW.flatten(2).transpose(1, 2)
        for block in self.attention:
            x_BNE = block(x_BNE)
        return x_BNE.transpose(1, 2).unflatten(2, chunk_BCTHW.shape[2:])


class PreservationEncoder(nn.Module):
    """The network. Sizes are rounded as `plan.preservation` says, on both branches.

    Inputs are cast to `dtype`; the embedding of the low branch works in fp32. It never has a gradient, whatever a
    trainer asks for: it is the base's. Fresh weights are undefined under core's operations: call `initialise`.
    """

    def __init__(self, spec: PreservationSpec, dtype=None, device=None, operations=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.spec, self.rate, self.dtype = spec, parse_rate(spec.rate), dtype or torch.get_default_dtype()
        if spec.high:
            self.high = HighBranch(spec, operations=operations, **made)
            self.project = operations.Linear(spec.features, spec.hidden, **made)
        if spec.low:
            self.embed = operations.Conv3d(
                spec.in_channels, spec.hidden, spec.patch, stride=spec.patch, dtype=torch.float32, device=device
            ).requires_grad_(False)
        if spec.branches == "patchifier":
            block = self.rate.block
            self.patchify = operations.Conv3d(spec.in_channels, spec.hidden, block, stride=block, **made)

    def forward(self, history_BCTHW: Tensor, ends: Sequence[int] | None = None, low: Tensor | None = None) -> Encoded:
        """Tokens of a history. Its newest frames that fill no block are left out; a history shorter than a block has
        none, `[B, 0, D]`.

        ends: latent frames finished after each segment, None for one segment; each is encoded alone, so that encoding
        them one by one (`encode`, then `join`) gives the same. low: the copy at the plan's `low_size`, encoded again
        from pixels; None to shrink the latents. Raises PlanError for pictures smaller than a block and ValueError for
        other shapes.
        """
        frames, height, width = history_BCTHW.shape[2:]
        ends = (frames,) if ends is None else tuple(ends)
        if max(ends, default=0) > frames:
            expected = f"at most the {frames} frames there are"
            raise ValueError(refusal(f"segments to frame {max(ends)}", expected, str(frames), PRESERVATION))
        token_grid(self.rate, 0, 0, height, width)
        self._check_low(low, frames, height, width)
        parts = []
        for start, stop in chunks(ends, self.rate):
            copy = None if low is None else low[:, :, start // self.rate.time : stop // self.rate.time]
            parts.append(self.encode(history_BCTHW[:, :, start:stop], copy))
        return join(parts) if parts else self._nothing(history_BCTHW)

    def encode(self, chunk_BCTHW: Tensor, low_BCTHW: Tensor | None = None) -> Encoded:
        """Tokens of one chunk, whose frames are whole blocks. low: its part of the copy, as in `forward`."""
        self._check(chunk_BCTHW)
        self._check_low(low_BCTHW, *chunk_BCTHW.shape[2:])
        if self.spec.branches == "patchifier":
            return Encoded(_tokens(self.patchify(chunk_BCTHW.to(self.dtype))), None)
        tokens, features = None, None
        if self.spec.high:
            features = _tokens(self.high(chunk_BCTHW.to(self.dtype)))
            tokens = self.project(features)
        if self.spec.low:
            embedded = self._embed(low_latents(chunk_BCTHW, self.rate) if low_BCTHW is None else low_BCTHW)
            tokens = embedded if tokens is None else embedded + tokens
        return Encoded(tokens, features if self.spec.cross_attention else None)

    @torch.no_grad()
    def _embed(self, low_BCTHW: Tensor) -> Tensor:
        return _tokens(self.embed(low_BCTHW.float())).to(self.dtype)

    def _check(self, chunk_BCTHW: Tensor) -> None:
        channels, (frames, height, width) = chunk_BCTHW.shape[1], chunk_BCTHW.shape[2:]
        if channels != self.spec.in_channels:
            raise ValueError(f"The history has {channels} channels, the encoder reads {self.spec.in_channels}.")
        if not frames or frames % self.rate.time:
            near = str(max(round(frames / self.rate.time), 1) * self.rate.time)
            expected = f"a positive multiple of {self.rate.time}"
            raise ValueError(refusal(f"a chunk of {frames} latent frames", expected, near, PRESERVATION))
        token_grid(self.rate, 0, frames, height, width)

    def _check_low(self, low_BCTHW: Tensor | None, frames: int, height: int, width: int) -> None:
        wanted = low_size(self.rate, frames, height, width)
        if low_BCTHW is not None and tuple(low_BCTHW.shape[2:]) != wanted:
            given, expected = ("x".join(map(str, size)) for size in (low_BCTHW.shape[2:], wanted))
            said = f"{expected} latent frames, rows and columns at {self.rate.text}"
            raise ValueError(refusal(f"a low-resolution copy of {given}", said, expected, PRESERVATION))

    def _nothing(self, history_BCTHW: Tensor) -> Encoded:
        def empty(width: int) -> Tensor:
            return history_BCTHW.new_zeros((history_BCTHW.shape[0], 0, width), dtype=self.dtype)

        return Encoded(empty(self.spec.hidden), empty(self.spec.features) if self.spec.cross_attention else None)


def join(parts: Sequence[Encoded]) -> Encoded:
    """The memory of chunks that were encoded alone, in order of time. At least one."""
    features = [part.features for part in parts if part.features is not None]
    return Encoded(torch.cat([part.tokens for part in parts], 1), torch.cat(features, 1) if features else None)


def low_latents(history_BCTHW: Tensor, rate: Rate) -> Tensor:
    """The copy by trilinear interpolation of the latents, in fp32: cheap, needs no autoencoder.

    Each of its pixels lies inside one block, so chunks give the same as the whole. The exact way is to shrink the
    pixels and encode them again, which `low` of the encoder takes.
    """
    size = low_size(rate, *history_BCTHW.shape[2:])
    whole = [n * step for n, step in zip(size, (rate.time, rate.height, rate.width), strict=True)]
    cut = history_BCTHW[:, :, : whole[0], : whole[1], : whole[2]]
    return F.interpolate(cut.float(), size=size, mode="trilinear", align_corners=False)


def mask_frames(latents_BCTHW: Tensor, keep_BT: Tensor, noise_BCTHW: Tensor, level_BT: Tensor) -> Tensor:
    """Noise-as-mask: `(1 - level) x + level noise` on every frame but those kept, which stay bit-identical.

    keep_BT: bool, `[B, T]` or `[1, T]`; level_BT: 0 to 1, of the same shape. Source: pfp reference 3.
    """
    keep, level = (x[:, None, :, None, None] for x in (keep_BT, level_BT.to(latents_BCTHW)))
    return torch.where(keep, latents_BCTHW, (1 - level) * latents_BCTHW + level * noise_BCTHW)


def pooled_mask(keep_BT: Tensor, level_BT: Tensor, rate: Rate) -> tuple[Tensor, Tensor]:
    """The mask of the low-resolution copy, `[B, T / rate.time]` each: a frame is kept if all its sources are, and else
    as noisy as the noisiest of those that are not.

    To be applied to a copy of the clean history with noise of its own: a copy of the masked one would average the
    noise away, and show what is masked.
    """
    whole = keep_BT.shape[1] // rate.time * rate.time
    keep, level = (x[:, :whole].unflatten(1, (-1, rate.time)) for x in (keep_BT, level_BT))
    return keep.all(-1), level.masked_fill(keep, 0).amax(-1)


@torch.no_grad()
def initialise(
    encoder: PreservationEncoder, weight: Tensor | None = None, bias: Tensor | None = None, seed: int = 0
) -> PreservationEncoder:
    """Give a fresh encoder its weights, in place. Its projection is zero, so at first the low branch speaks alone.

    weight, bias: of the base's patch embedding, `[D, C or more, 1, 2, 2]` and `[D]`, unpacked and without patches; of
    more channels the first C count. None leaves that part random (for tests). The large patchifier begins as the base's
    embedding of block means.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(encoder.named_parameters()):
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        elif name.endswith("bias") or name == "project.weight":
            parameter.zero_()
        else:
            spread = (2 if "convolutions" in name else 1) / parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread**0.5)
    if weight is not None:
        kernel = weight[:, : encoder.spec.in_channels].detach().float().cpu()
        rate = encoder.rate
        for name in {"embed", "patchify"} & dict(encoder.named_children()).keys():
            layer = encoder.get_submodule(name)
            if name == "patchify":
                kernel = kernel.repeat_interleave(rate.height, 3).repeat_interleave(rate.width, 4)
                kernel = kernel.expand(-1, -1, rate.time, -1, -1) / rate.factor
            layer.get_parameter("weight").copy_(kernel)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias.detach().float().cpu())
    return encoder


def _tokens(volume_BDTHW: Tensor) -> Tensor:
    return volume_BDTHW.flatten(2).transpose(1, 2)
