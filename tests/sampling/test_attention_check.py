"""A backend that is wrong for the GPU or the head size is found before the run (fault 14)."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules import attention

from frame_memory.sampling import attention_check
from frame_memory.sampling.attention_check import Place, attention_problem

from .conftest import guider_for, run
from .test_guards import with_attention

CPU = torch.device("cpu")


def nan(func, *args, **kwargs):
    return func(*args, **kwargs) * float("nan")


def swapped(func, q, k, v, *args, **kwargs):
    """Plausible numbers, all wrong: as a kernel compiled for another architecture gives them."""
    return func(k, q, v, *args, **kwargs)


def edge_dropped(func, q, k, v, *args, **kwargs):
    """The tokens after the last whole tile are not looked at."""
    made = func(q, k, v, *args, **kwargs)
    whole = made.shape[1] // 64 * 64
    return torch.cat([made[:, :whole], torch.zeros_like(made[:, whole:])], dim=1)


def refuses(func, *args, **kwargs):
    raise RuntimeError("head size 128 is not supported")


def folded(func, *args, **kwargs):
    return func(*args, **kwargs).flatten(1)


WRONG = {nan: "NaN", swapped: "is off by", edge_dropped: "is off by", refuses: "head size 128 is", folded: "the shape"}


@pytest.mark.parametrize("override", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [64, 128])
def test_fault_14_wrong_attention_is_put_in_words(override, dtype, head):
    assert WRONG[override] in attention_problem(override, Place(head, dtype, CPU))


@pytest.mark.parametrize("name", ["pytorch", "sub_quad", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_14_every_backend_of_the_host_passes_on_the_cpu(name, dtype, monkeypatch):
    backend = attention.get_attention_function(name)
    monkeypatch.setattr(attention, "optimized_attention", backend)
    for head in (40, 64, 128):
        assert attention_problem(None, Place(head, dtype, CPU)) is None


def eight_bit(func, q, k, v, *args, **kwargs):
    """Queries and keys in 8 bits, values in fp8: the error of SageAttention's arithmetic."""
    q, k = (torch.round(x / (s := x.abs().amax(-1, keepdim=True) / 127)) * s for x in (q.float(), k.float()))
    return func(q, k, v.to(torch.float8_e4m3fn).float(), *args, **kwargs)


def test_fault_14_arithmetic_in_eight_bits_passes():
    assert attention_problem(eight_bit, Place(128, torch.bfloat16, CPU)) is None


def test_fault_14_a_run_with_a_wrong_backend_is_right_and_says_so(model):
    plain, before = run(model, seconds=1.2)
    latent, report = run(model, guider=guider_for(with_attention(model, swapped)), seconds=1.2)
    assert torch.allclose(latent["samples"], plain["samples"], atol=1e-4)
    assert "'swapped' is wrong on cpu" in report and "--use-pytorch-cross-attention" in report
    assert "attention backend" not in before


def test_fault_14_a_backend_is_looked_at_once(model, monkeypatch):
    looked = []
    monkeypatch.setattr(attention_check, "_found", {})
    monkeypatch.setattr(attention_check, "attention_problem", lambda *args: looked.append(args))
    for _ in range(2):
        attention_check.checked_attention(guider_for(model))
    assert len(looked) == 1
