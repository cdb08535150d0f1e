"""What a backend needs is looked at before a call, and said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frame_memory.kernels.op import EAGER, Backend, Call, Needs, Op, cpu_features

CALL = Call(torch.device("cpu"), torch.bfloat16, width=64, rows=300)
LACKS = {
    "it runs on cuda or xpu, not on cpu": Needs(devices=("cuda", "xpu")),
    "it knows float16 and float32, not bfloat16": Needs(dtypes=(torch.float16, torch.float32)),
    "no_such_library is not installed": Needs(modules=("no_such_library",)),
    "the processor has no made_up": Needs(features=("made_up",)),
    "a width of 64; it knows 1 to 63": Needs(widths=(1, 63)),
    "a width of 64; it knows 24 to any number in steps of 24": Needs(multiple=24),
    "300 tokens; it is for 301 to 400": Needs(rows=(301, 400)),
}


@pytest.mark.parametrize("words", LACKS)
def test_what_is_missing_is_said(words):
    assert LACKS[words].missing(CALL) == words


def test_a_gpu_too_old_or_too_new_is_told_by_its_compute_capability(monkeypatch):
    """The only stand-in here: there is no GPU to ask."""
    monkeypatch.setattr("frame_memory.kernels.op.capability", lambda device: (8, 6))
    call = replace(CALL, device=torch.device("cuda", 0))
    assert Needs(capability=((8, 0), (9, 0))).missing(call) == ""
    for bounds in (((8, 9), (9, 0)), ((7, 0), (8, 6))):
        assert "a GPU of compute capability 8.6" in Needs(capability=bounds).missing(call)
    assert Needs(capability=((8, 9), (9, 0))).missing(CALL) == ""


@pytest.mark.parametrize(("own", "words"), [(91500, "cuDNN is of version 91500; it is for 91501 on"), (91501, "")])
def test_a_cudnn_too_old_is_told_on_a_gpu_alone(own, words, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: own)
    assert Needs(cudnn=91501).missing(replace(CALL, device=torch.device("cuda", 0))) == words
    assert Needs(cudnn=91501).missing(CALL) == ""


def test_nothing_asked_for_is_nothing_missing():
    everything = Needs(("cpu",), (torch.bfloat16,), None, (), (300, 300), (64, 64), 64, ("torch",), gradient=True)
    assert Needs().missing(CALL) == everything.missing(replace(CALL, gradient=True)) == ""
    assert Needs().missing(replace(CALL, gradient=True)) == "it gives no gradient"


def test_the_first_capable_backend_is_chosen_and_else_the_twin():
    op = Op(torch.neg, (Backend("a", torch.abs, Needs(widths=(1, 8))), Backend("b", torch.sign)))
    x = torch.ones(2, 5, 8)
    assert [b.name for b in op.capable(Call.of(x))] == ["a", "b", EAGER]
    assert op.choose(Call.of(x[..., :7])).name == "a" and op.choose(CALL).name == "b"
    assert op.choose(Call.of(x.requires_grad_())).run is op.twin
    with torch.no_grad():
        assert op.choose(Call.of(x)).name == "a"
    assert op.choose(Call.of(x.detach(), x)).run is op.twin


def test_the_processor_is_asked_by_torchs_names():
    assert all(isinstance(name, str) for name in cpu_features())
