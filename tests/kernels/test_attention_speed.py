"""The benchmark of attention: what it tells, and that it notices a wrong backend and a wrong order."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules import attention as host

from benchmarks import attention as benchmark
from benchmarks.attention import MARGIN, Took
from frame_memory.kernels.attention import CANDIDATES, Candidate
from frame_memory.kernels.op import Needs, cpu_features
from frame_memory.sampling.attention_check import TOKENS

SMALL = ["--shapes", "2x130x24", "3x65x24", "--dtypes", "fp32", "--repeats", "3", "--device", "cpu"]


def wrong_at_length(q, k, v, heads, **kwargs):
    """As a kernel whose last tile is wrong at some lengths: not at that of the self-test."""
    made = host.attention_basic(q, k, v, heads, **kwargs)
    return made if q.shape[-2] == TOKENS else made * float("nan")


def slow(q, k, v, heads, **kwargs):
    for _ in range(4):
        made = host.attention_basic(q, k, v, heads, **kwargs)
    return made


def black(q, k, v, heads, **kwargs):
    return torch.zeros_like(host.attention_basic(q, k, v, heads, **kwargs))


def ranked(monkeypatch, *functions):
    """In the order of rank, with PyTorch behind them; the benchmark's choice."""
    for function in functions:
        monkeypatch.setitem(host.REGISTERED_ATTENTION_FUNCTIONS, function.__name__, function)
    made = (*(Candidate(f.__name__, f.__name__, Needs()) for f in functions), CANDIDATES[-1])
    monkeypatch.setattr(benchmark, "CANDIDATES", made)


def rows_of(name, said):
    return [line.split(" | ") for line in said.splitlines() if f" | {name} | " in line]


def test_every_figure_is_told_and_a_backend_that_fails_the_self_test_is_no_side(monkeypatch, capsys):
    ranked(monkeypatch, black)
    assert benchmark.main(SMALL) == 0
    said = capsys.readouterr().out
    assert "Not used on cpu for heads of 24 in torch.float32: black: it is off by 100%" in said
    assert "| black |" not in said
    for size, cells in zip((2 * 130**2, 3 * 65**2), rows_of("PyTorch", said), strict=True):
        seconds, rate, share, faster, error = cells[3:8]
        assert float(rate) == pytest.approx(4 * 24 * size / float(seconds) / 1e9, rel=1e-2)
        assert float(share) > 0 and float(faster) == 1 and float(error) < 1e-5


def test_of_one_backend_there_is_no_order(monkeypatch, capsys):
    ranked(monkeypatch)
    assert benchmark.main(SMALL) == 0
    assert "NOT DECIDED: one backend only, nothing to compare" in capsys.readouterr().out.splitlines()
    ranked(monkeypatch, host.attention_basic)
    benchmark.main(SMALL)
    assert "NOT DECIDED" not in capsys.readouterr().out


def test_a_backend_that_is_wrong_where_the_self_test_does_not_look_fails(monkeypatch, capsys):
    ranked(monkeypatch, wrong_at_length)
    assert benchmark.main(SMALL) == 1
    assert "wrong_at_length is off by nan%" in capsys.readouterr().out


def test_a_backend_that_is_slower_than_one_behind_it_fails(monkeypatch, capsys):
    ranked(monkeypatch, slow)
    assert benchmark.main(SMALL) == 1
    assert "which is ranked behind it" in capsys.readouterr().out


def test_the_order_is_judged_by_the_margin_on_both_sides():
    edge = {"a": Took(MARGIN, 0.0), "b": Took(1.0, 0.1), "c": Took(1.0, 0.0, "a width of 24")}
    assert not list(benchmark.misses(edge))
    assert [word in line for line, word in zip(
        benchmark.misses({**edge, "a": Took(1.01 * MARGIN, 0.0), "b": Took(1.0, 0.11)}),
        ("b is off by 11%", "c is left out and 1.16 times as fast as a", "a takes 1.16 times as long as b"),
        strict=True,
    )] == 3 * [True]  # fmt: skip


@pytest.mark.skipif(not cpu_features().get("amx_bf16"), reason="this processor does no bf16 by itself")
def test_bf16_is_measured_below_the_length_from_which_it_is_taken_and_its_own_error_is_told(capsys):
    shapes = ["--shapes", "2x16x128", "2x300x128"]
    benchmark.main([*shapes, "--dtypes", "fp32", "--repeats", "1", "--device", "cpu"])
    rows = rows_of("bf16 on the CPU", capsys.readouterr().out)
    assert ["16 tokens" in cells[8] for cells in rows] == [True, False]
    assert all(1e-3 < float(cells[7]) < 1e-2 for cells in rows)
