"""Attention's backends against its twin, and its op as torch.compile sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from frame_memory.kernels import attention, op
from frame_memory.kernels.attention import ATTENTION, BF16, CANDIDATES, CUDNN, attention_twin, fast_attention
from frame_memory.kernels.op import Backend, Call, Op, cpu_features

# Of the result's norm; the twin itself is that of fp64. fp32 in bf16 has bf16's error.
TOLERANCE = {("sdpa", torch.float32): 2e-6, ("sdpa", torch.bfloat16): 8e-3, ("bf16", torch.float32): 8e-3}


def parts(dtype, queries=131, keys=203, head=40):
    """Odd sizes, a batch of 2, and the layout that models have: heads beside their numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, 3, head) for length in (queries, keys, keys)]
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(131, 203, 40), (129, 17, 64), (257, 257, 128)])
def test_every_backend_agrees_with_the_twin(dtype, sizes):
    q, k, v = parts(dtype, *sizes)
    expected = attention_twin(q.double(), k.double(), v.double())
    for backend in ATTENTION.capable(Call.of(q)):
        made = backend.run(q, k, v)
        bound = TOLERANCE.get((backend.name, dtype), {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype])
        assert made.dtype == dtype and made.shape == expected.shape
        assert float((made.double() - expected).norm() / expected.norm()) < bound, backend.name


def test_fp32_is_narrowed_only_where_the_processor_has_a_unit_for_it_and_never_for_a_gradient():
    q, _, _ = parts(torch.float32)
    chosen = ATTENTION.choose(Call.of(q)).name
    assert chosen == ("bf16" if cpu_features().get("amx_bf16") else "sdpa")
    assert ATTENTION.choose(Call.of(q.requires_grad_())).name == "sdpa"
    assert ATTENTION.choose(Call.of(q.detach()[:, :, :127])).name == "sdpa"


def test_the_op_is_one_for_torch_compile_and_gives_what_models_take():
    q, k, v = parts(torch.float32)
    torch.library.opcheck(
        torch.ops.frame_memory.fast_attention.default, (q, k, v), test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda *x: fast_attention(*x) * 2, fullgraph=True, backend="eager")
    made = fast_attention(q, k, v)
    assert torch.equal(compiled(q, k, v), made * 2)
    chosen = ATTENTION.choose(Call.of(q)).run(q, k, v)
    assert torch.equal(made, chosen.transpose(1, 2).reshape(2, 131, 120)) and made.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnn_first_is_pytorchs_attention_and_its_order_is_put_back(dtype, monkeypatch):
    def noted(*parts):
        inside.append(torch._C._get_sdp_priority_order()[0])
        return torch.nn.functional.scaled_dot_product_attention(*parts)

    inside, before = [], torch._C._get_sdp_priority_order()
    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    q, k, v = parts(dtype)
    made = CUDNN.run(q, k, v)
    assert torch.equal(made, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert inside == [int(SDPBackend.CUDNN_ATTENTION)]
    assert torch._C._get_sdp_priority_order() == before and torch.backends.cuda.flash_sdp_enabled()


def test_cudnn_first_is_captured_in_one_piece(monkeypatch):
    """Within the op, so that a graph is not told of the order."""
    monkeypatch.setattr(attention, "ATTENTION", Op(attention_twin, (Backend("cudnn", CUDNN.run),)))
    q, k, v = parts(torch.bfloat16)
    compiled = torch.compile(lambda *x: fast_attention(*x) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), fast_attention(q, k, v) * 2)


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "taken"),
    [
        ((9, 0), 128, torch.bfloat16, True),
        ((10, 0), 64, torch.float16, True),
        ((8, 9), 128, torch.bfloat16, False),
        ((12, 0), 128, torch.bfloat16, False),
        ((9, 0), 136, torch.bfloat16, False),
        ((9, 0), 128, torch.float32, False),
    ],
)
def test_cudnn_is_first_where_pytorch_itself_would_have_it(capability, width, dtype, taken, monkeypatch):
    """A made-up GPU with nothing installed."""
    monkeypatch.setattr(op, "capability", lambda device: capability)
    monkeypatch.setattr(op, "_there", lambda module: False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    call = Call(torch.device("cuda", 0), dtype, width, 333)
    first = next(c for c in CANDIDATES if not (c.needs.missing(call) or c.pays.missing(call)))
    assert first.label == ("PyTorch with cuDNN" if taken else "PyTorch") and not first.fewer_bits
    assert ATTENTION.choose(call).name == ("cudnn" if taken else "sdpa")
    assert ATTENTION.choose(replace(call, gradient=True)).name == "sdpa"


def test_the_list_ends_with_what_every_device_has():
    for device in ("cpu", "mps", "xpu", "cuda"):
        assert CANDIDATES[-1].needs.missing(Call(torch.device(device), torch.float32, 77, 3, gradient=True)) == ""
    assert len({c.label for c in CANDIDATES}) == len(CANDIDATES) and BF16.needs in [c.needs for c in CANDIDATES]
