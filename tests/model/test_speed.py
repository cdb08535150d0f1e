"""The benchmark of speed: what it measures at toy size, and that it notices a side that computes something else."""

from __future__ import annotations

import torch

from benchmarks import speed, step_profile
from frame_memory.kernels.op import cpu_features

TOY = speed.Size(1, 1, 1, 4, 6, goal=None)


def test_both_sides_compute_the_same_and_every_figure_is_told(monkeypatch, capsys):
    monkeypatch.setitem(speed.SIZES, "tiny", TOY)
    assert speed.main(["--sizes", "tiny", "--dtypes", "fp32", "--repeats", "1"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| ours", "| diff"))]
    assert [row[0] for row in rows[:2]] == ["| diffusers", "| ours"]
    assert [row[0] for row in rows[2:]] == ["| ours with automatic attention"] * bool(cpu_features().get("amx_bf16"))
    for row in rows:
        wall, busy, faster, share, peak = (float(cell) for cell in row[1:6])
        assert wall > 0 and busy > 0 and faster > 0 and 0 < share < 1500 and peak > 0
    errors = [float(row[7].rstrip(" |")) for row in rows]
    assert errors[1] < 1e-6 and all(1e-6 < error < 2e-2 for error in errors[2:])


def test_operations_are_those_of_the_network_by_hand():
    """A block's matrices and attention by their sizes; the text's first layers and the output are left over."""
    step = speed.sides(TOY, "fp32", "cpu")[speed.OURS]
    step()  # what is computed once does not count
    context = 2 * 6 + 1 * 2 + 4 * 1  # two frames at 1x, two at 2x in cells of 2x4x4, sixteen at 4x in cells of 4x8x8
    every, hidden = 9 * 6 + context + 120 + 729, 128
    blocks = 2 * every * (12 + 12) * hidden**2 + 2 * 4 * every**2 * hidden
    refiner = 2 * 120 * (4096 * hidden + 2 * 12 * hidden**2)
    assert blocks + refiner < speed.operations(step) < 1.02 * (blocks + refiner)


def test_a_side_that_computes_something_else_fails(monkeypatch, capsys):
    plain = speed.sides

    def wrong(*args):
        made = plain(*args)
        return {**made, speed.OURS: lambda: 1.001 * made[speed.OURS]()}

    monkeypatch.setattr(speed, "sides", wrong)
    monkeypatch.setitem(speed.SIZES, "tiny", TOY)
    assert speed.main(["--sizes", "tiny", "--dtypes", "fp32", "--repeats", "1"]) == 1
    assert "FAILED: ours computes something else" in capsys.readouterr().out


def test_rounded_and_offloaded_sides_run_and_say_what_a_cpu_lacks(monkeypatch, capsys):
    monkeypatch.setitem(speed.SIZES, "tiny", TOY)
    asked = ["--sizes", "tiny", "--dtypes", "fp8", "int8", "--repeats", "1", "--offloaded"]
    assert speed.main(asked) == 0
    said = capsys.readouterr().out.splitlines()
    for kind in ("fp8", "int8"):
        at = next(i for i, line in enumerate(said) if f", {kind} (numbers only), cpu:" in line)
        rows = [line.split(" | ") for line in said[at + 4 : at + 7]]
        assert [row[0] for row in rows] == ["| diffusers", "| ours", "| ours with weights in RAM"]
        first, second = (float(row[7].rstrip(" |")) for row in rows[1:])
        assert 1e-3 < first == second < speed.BOUNDS[kind]


def test_a_profile_knows_each_part_by_its_ops_and_tells_both_sides(monkeypatch, capsys):
    x = torch.randn(1, 2, 256, 256, generator=torch.Generator().manual_seed(0))
    steps = {
        "attention": lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        "matrix products": lambda: torch.nn.functional.linear(x, x[0, 0], x[0, 0, 0]),
        "GELU": lambda: torch.nn.functional.gelu(x, approximate="tanh"),
        "joining tensors": lambda: torch.cat([x] * 9),
        step_profile.REST: lambda: x * x,
    }
    found = step_profile.shares(steps, "cpu", 3)
    assert all(found[name][name] > 0 for name in steps)
    assert all(parts[other] == 0 for name, parts in found.items() for other in step_profile.PARTS if other != name)
    monkeypatch.setitem(speed.SIZES, "tiny", TOY)
    step_profile.main(["--size", "tiny", "--dtype", "fp32", "--device", "cpu", "--repeats", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == [*step_profile.PARTS, step_profile.REST]
    assert all(98 <= sum(float(row[side]) for row in rows) <= 102 for side in (1, 2))
