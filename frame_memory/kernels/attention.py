"""Attention without a mask: the plain twin, half the bits on processors with a unit for them, cuDNN's where PyTorch
prefers it and the host does not, and which of the host's backends are worth a try on which device.

Shape suffixes: B batch, H heads, L queries, M keys, D numbers a head.
Source: reference/performance.md sections 1 and 3; benchmarks/notes.md for what was measured on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .op import Backend, Call, Needs, Op

_HALF = (torch.float16, torch.bfloat16)


def attention_twin(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v `[B, H, L, D]`, in the inputs' number format."""
    scores_BHLM = q_BHLD @ k_BHMD.transpose(-1, -2) * q_BHLD.shape[-1] ** -0.5
    return scores_BHLM.softmax(-1) @ v_BHMD


def _in_bf16(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    narrow = (x.to(torch.bfloat16) for x in (q_BHLD, k_BHMD, v_BHMD))
    return scaled_dot_product_attention(*narrow).to(q_BHLD.dtype)


# PyTorch's kernel does bf16 on the matrix unit (AMX): with the conversions 1.4 times as fast as fp32 at 128 tokens, 1.7
# to 3.4 times from 1,000 on, half as fast at 16 (`benchmarks.attention`). Off by 4e-3 of the result, a tenth of what
# SageAttention's 8 bits are off by.
BF16 = Backend("bf16", _in_bf16, Needs(("cpu",), (torch.float32,), features=("amx_bf16",), rows=(128, 1 << 30)))

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def _cudnn_first(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):  # for this call; PyTorch's own order is back behind it
        return scaled_dot_product_attention(q_BHLD, k_BHMD, v_BHMD)


# PyTorch itself prefers cuDNN's kernel on these GPUs, of cuDNN 9.15.1 on: older ones have an error at lengths that 128
# does not divide. ComfyUI asks for FlashAttention 2 before it on every NVIDIA GPU.
CUDNN = Backend(
    "cudnn",
    _cudnn_first,
    Needs(("cuda",), _HALF, capability=((9, 0), (11, 0)), widths=(8, 128), multiple=8, cudnn=91501),
)
SDPA = Backend("sdpa", scaled_dot_product_attention, Needs(gradient=True))
ATTENTION = Op(attention_twin, (BF16, CUDNN, SDPA))


def fast_attention(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    """Attention `[B, L, H D]`, as models take it, by the fastest backend that can take the call; no gradient.

    fp32 may be computed in bf16. One op for torch.compile.
    """
    # By its name: a second copy of the pack registers it anew, and torch then destroys what this module had registered.
    return torch.ops.frame_memory.fast_attention(q_BHLD, k_BHMD, v_BHMD)


@torch.library.custom_op(
    "frame_memory::fast_attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor"
)
def _fast_attention(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
    made_BHLD = ATTENTION.choose(Call.of(q_BHLD, k_BHMD, v_BHMD)).run(q_BHLD, k_BHMD, v_BHMD)
    return made_BHLD.transpose(1, 2).flatten(2).contiguous()


@_fast_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, head = q.shape
    return q.new_empty(batch, length, heads * head)


@dataclass(frozen=True)
class Candidate:
    """A backend of whole attention calls that may take the place of the host's choice.

    label: for people. host: the name that the host registers it under; "" for `fast_attention`. needs: of the device.
    pays: where it is taken to be faster than those behind it in the list; elsewhere it is taken on demand only.
    fewer_bits: whether it computes in fewer bits than the call's number format has, and so gives other numbers.
    """

    label: str
    host: str
    needs: Needs
    pays: Needs = field(default_factory=Needs)
    fewer_bits: bool = False


# The fastest first, by what is published; none was timed here on a GPU. SageAttention 2 multiplies in 8 bits on every
# GPU since Ampere, 2.7 to 3.9 times as fast as FlashAttention 2; the first version was tuned for Ampere and Ada.
# FlashAttention 2 is what PyTorch's own is at best there, and by ComfyUI's order on Hopper too, where PyTorch by itself
# takes cuDNN's. xformers is for GPUs older than both.
CANDIDATES = (
    Candidate(
        "SageAttention 2",
        "sage",
        Needs(
            ("cuda",), _HALF, capability=((8, 0), (14, 0)), widths=(1, 128), modules=("sageattention",), major=(2, 9)
        ),
        fewer_bits=True,
    ),
    Candidate(
        "SageAttention 1",
        "sage",
        Needs(
            ("cuda",), _HALF, capability=((8, 0), (14, 0)), widths=(64, 128), multiple=32,
            modules=("sageattention",), major=(1, 1),
        ),
        Needs(capability=((8, 0), (9, 0))),
        fewer_bits=True,
    ),
    Candidate(
        "FlashAttention",
        "flash",
        Needs(("cuda",), _HALF, capability=((8, 0), (14, 0)), widths=(8, 256), multiple=8, modules=("flash_attn",)),
        Needs(capability=((8, 0), (9, 0))),
    ),
    Candidate(
        "xformers",
        "xformers",
        Needs(("cuda",), modules=("xformers",)),
        Needs(capability=((5, 0), (8, 0))),
    ),
    Candidate("bf16 on the CPU", "", BF16.needs, fewer_bits=True),
    Candidate("PyTorch with cuDNN", "", CUDNN.needs),
    Candidate("PyTorch", "pytorch", Needs(gradient=True)),
)  # fmt: skip
