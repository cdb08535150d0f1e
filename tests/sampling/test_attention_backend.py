"""A MODEL's attention is the fastest that is right on its device, and nobody else's."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention

from frame_memory.kernels.attention import CANDIDATES, Candidate
from frame_memory.kernels.op import Needs, cpu_features
from frame_memory.sampling.attention_backend import (
    AUTOMATIC,
    HOST,
    SAME,
    AttentionBackend,
    choose_attention,
    first_right,
)
from frame_memory.sampling.attention_check import Place, override_of
from frame_memory.sampling.identity import model_fields
from frame_memory.sampling.project_run import options_fields

from .conftest import guider_for, of_kind, run
from .test_guards import with_attention

PLAIN = Candidate("plain", "plain", Needs())


def black(q, k, v, heads, **kwargs):
    return torch.zeros_like(attention.attention_pytorch(q, k, v, heads, **kwargs))


def nan(q, k, v, heads, **kwargs):
    return black(q, k, v, heads, **kwargs) / 0


def garbage(q, k, v, heads, **kwargs):
    """Off by 30 %."""
    made = attention.attention_pytorch(q, k, v, heads, **kwargs)
    noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made)
    return made + 0.3 * noise * made.norm() / noise.norm()


def folded(q, k, v, heads, **kwargs):
    return attention.attention_pytorch(q, k, v, heads, **kwargs).flatten(1)


def raises(q, k, v, heads, **kwargs):
    raise RuntimeError("no kernel image is available")


def fell_back(q, k, v, heads, **kwargs):
    """As the host's wrappers do where a library raises."""
    return attention.attention_pytorch(q, k, v, heads, **kwargs)


WRONG = {
    black: "off by 100%",
    nan: "NaN",
    garbage: "off by 30%",
    folded: "the shape",
    raises: "no kernel image",
    fell_back: "falls back to PyTorch",
}


@pytest.fixture(autouse=True)
def _a_host_that_chose_itself(monkeypatch):
    """Started without an option; with a plain, right backend to choose."""
    monkeypatch.setattr(args, "use_pytorch_cross_attention", False)
    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "plain", attention.attention_basic)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_backend_is_rejected_and_the_next_is_taken(model, wrong, monkeypatch):
    name = wrong.__name__
    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, name, wrong)
    candidates = [Candidate("absent", "absent", Needs()), Candidate(name, name, Needs()), PLAIN]
    chosen, report = choose_attention(model, AUTOMATIC, candidates)
    assert override_of(chosen.model_options).label == "plain" and override_of(model.model_options) is None
    assert WRONG[wrong] in report and f"Not {name}:" in report and "ComfyUI has no 'absent'" in report
    if wrong is fell_back:  # a kernel may be PyTorch's own: nothing is wrong with it
        named, report = choose_attention(model, name, candidates)
        assert override_of(named.model_options).label == name and "Note: it gives PyTorch's very" in report
        return
    with pytest.raises(ValueError, match=f"'{name}' cannot be used on cpu .*{WRONG[wrong]}"):
        choose_attention(model, name, candidates)


def test_our_own_op_is_not_taken_where_it_is_pytorchs_kernel_after_all(model):
    """As where cuDNN cannot take the call and PyTorch goes on to the next in its order; in bf16 a CPU has no other."""
    place = dataclasses.replace(Place.of(model), dtype=torch.bfloat16)
    chosen, against = first_right(place, AUTOMATIC, [Candidate("own", "", Needs()), PLAIN])
    assert chosen is not None and chosen.label == "plain" and against == {"own": SAME}


def test_where_nothing_is_right_all_that_speaks_against_is_said(model, monkeypatch):
    for wrong in (black, nan):
        monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, f"only {wrong.__name__}", wrong)
    candidates = [Candidate(name, name, Needs()) for name in ("only black", "only nan")]
    with pytest.raises(ValueError, match="No attention works on cpu .*off by 100%.*NaN.*ComfyUI's own"):
        choose_attention(model, AUTOMATIC, candidates)


def test_no_room_for_the_test_is_not_remembered(model, monkeypatch):
    calls = []

    def crowded(q, k, v, heads, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return attention.attention_basic(q, k, v, heads, **kwargs)

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, "crowded", crowded)
    candidates = [Candidate("crowded", "crowded", Needs())]
    with pytest.raises(ValueError, match="no room in memory"):
        choose_attention(model, "crowded", candidates)
    assert override_of(choose_attention(model, "crowded", candidates)[0].model_options).label == "crowded"


def test_a_run_uses_it_and_agrees(model):
    """Whole video, of the model's own attention and of the one that automatic finds on this processor."""
    chosen, report = choose_attention(model, AUTOMATIC)
    override = override_of(chosen.model_options)
    amx = cpu_features().get("amx_bf16")
    assert override.label == ("bf16 on the CPU" if amx else "PyTorch")
    assert "Not SageAttention 2: it runs on cuda, not on cpu." in report
    calls, handed_back = [], []

    def counted(func, *call, **kwargs):
        def host(*call, **kwargs):
            handed_back.append(1)
            return func(*call, **kwargs)

        calls.append(1)
        return override(host, *call, **kwargs)

    plain, _ = run(model, seconds=1.2)
    made, said = run(model, guider=guider_for(with_attention(model, counted)), seconds=1.2)
    off = float((made["samples"] - plain["samples"]).norm() / plain["samples"].norm())
    assert len(handed_back) < len(calls) and off < 2e-2 and "attention backend" not in said
    assert override_of(of_kind(chosen, "F1").model_options) == override


@pytest.mark.parametrize(
    "odd",
    [{"mask": torch.zeros(9, 9)}, {"scale": 1.0}, {"low_precision_attention": False}, {"enable_gqa": True}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_odd_calls_stay_the_hosts(odd):
    backend = AttentionBackend("a", "no such", 8, torch.float32, "cpu")
    q = torch.randn(1, 9, 16)

    def host(q, k, v, heads, mask=None, **kwargs):
        return odd == ({"mask": mask} if mask is not None else kwargs)

    assert backend(host, q, q, q, 2, **odd)
    for other in (q[..., :8], q.bfloat16(), q.clone().requires_grad_()):
        assert backend(lambda *_: "host", other, other, other, 2) == "host"
    wanted = q.clone().requires_grad_()
    for k, v in ((wanted, q), (q, wanted)):
        assert backend(lambda *_: "host", q, k, v, 2) == "host"
    with pytest.raises(KeyError, match="no such"):
        backend(host, q, q, q, 2)


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_our_own_op_takes_every_layout_of_the_hosts_calls(skip_reshape, skip_output_reshape):
    ways = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    q = torch.randn(2, 3, 131, 8) if skip_reshape else torch.randn(2, 131, 24)
    made = AttentionBackend("a", "", 8, torch.float32, "cpu")(None, q, q, q, 3, **ways)
    expected = attention.attention_basic(q, q, q, 3, **ways)
    assert made.shape == expected.shape and float((made - expected).norm() / expected.norm()) < 1e-2


def test_what_comfyui_was_started_with_and_another_packs_override_go_first(model, monkeypatch):
    def sparse(func, *call, **kwargs):
        return func(*call, **kwargs)

    theirs = with_attention(model, sparse)
    chosen, report = choose_attention(theirs, AUTOMATIC)
    assert chosen is theirs and "sparse' of another" in report.replace(",", "")
    with pytest.raises(ValueError, match="'.*sparse' of another node already.*automatic"):
        choose_attention(theirs, "PyTorch")
    monkeypatch.setattr(args, "use_split_cross_attention", True)
    chosen, report = choose_attention(model, AUTOMATIC)
    assert chosen is model and "ComfyUI was started with --use-split-cross-attention" in report
    named, report = choose_attention(model, "plain", [*CANDIDATES, PLAIN])
    assert override_of(named.model_options).label == "plain" and "before this one" not in report
    back, report = choose_attention(named, HOST)
    assert override_of(back.model_options) is None and override_of(named.model_options) is not None
    assert model_fields(back) == model_fields(model) != model_fields(named), "a project goes on as without the nodes"
    assert options_fields(named) == {"attention": "plain", **options_fields(model)}
    assert "another 'Attention Backend' before this one had given the MODEL plain." in report
    assert choose_attention(model, "PyTorch")[1].startswith("Attention: PyTorch, as ComfyUI chose itself")


def test_a_network_of_another_kind_is_refused_in_words(model):
    other = model.clone()
    other.model = SimpleNamespace(diffusion_model=torch.nn.Identity())
    with pytest.raises(ValueError, match="'model' is a Identity, .*like FramePack .*'Attention Backend'"):
        choose_attention(other, AUTOMATIC)
