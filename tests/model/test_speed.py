"""The benchmark of speed: what it measures at toy size, and that it notices a side that computes something else."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from benchmarks import parity_models as pm
from benchmarks import speed, step_profile
from frame_memory.kernels.attention import Candidate
from frame_memory.kernels.op import Needs, cpu_features

TOY = speed.Size(1, 1, 1, 4, 6, goals="")


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


@pytest.mark.parametrize(("kind", "device", "expected"), [("bf16", "cuda", 2), ("fp8", "cuda", 16), ("fp8", "cpu", 2)])
def test_operations_of_kernels_that_nobody_counts_are_those_of_the_peer(kind, device, expected):
    small, large = torch.eye(1), torch.eye(2)
    made = {speed.OURS: lambda: small @ small, speed.DIFFUSERS: lambda: large @ large}
    assert speed.counted(made, kind, device) == expected


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


# ---- goals ---------------------------------------------------------------------------------------------------------


def measured(device: str, error: float = 0.0, work: float = 1.0, **seconds: float) -> speed.Measured:
    """Sides by name (of speed's constants) with their seconds on the clock that counts; a roof of 1 operation a second.
    work: of a step. error: of ours."""
    took = {}
    for name, took_s in seconds.items():
        clocks = (took_s, 99.0) if device == "cuda" else (99.0, took_s)
        took[getattr(speed, name)] = speed.Took(*clocks, peak=1.0, error=error if name == "OURS" else 0.0)
    return speed.Measured(took, work, 1.0, device)


BELOW, ABOVE = 0.999, 1.001
GOALS = {
    "on a CPU": ("cpu", "fp32", 1.25, {"DIFFUSERS": 1.25}, {"OURS": 1.0}),
    "the best peer, of two": ("cuda", "bf16", 1.15, {"DIFFUSERS": 9.0, "PUBLISHED": 1.15}, {"OURS": 1.0}),
    "the best peer, of two others": ("cuda", "bf16", 1.15, {"DIFFUSERS": 1.15, "PUBLISHED": 9.0}, {"OURS": 1.0}),
    "fp8 to bf16 peers": ("cuda", "fp8", 1.6, {"DIFFUSERS": 9.0, "PUBLISHED": 1.6}, {"OURS": 1.0}),
    "attention in as many bits": ("cuda", "bf16", 1.15, {"DIFFUSERS": 1.15}, {"OURS": 9.0, "SAME": 1.0, "FASTER": 0.1}),
    "the same on a CPU": ("cpu", "fp32", 1.25, {"DIFFUSERS": 1.25}, {"OURS": 9.0, "SAME": 1.0, "FASTER": 0.1}),
    "fp8 with attention in as many bits": ("cuda", "fp8", 1.6, {"DIFFUSERS": 1.6}, {"OURS": 9.0, "SAME": 1.0}),
    "fp8 with attention in fewer bits": ("cuda", "fp8", 1.6, {"DIFFUSERS": 1.6}, {"OURS": 9.0, "FASTER": 1.0}),
}


@pytest.mark.parametrize("name", GOALS)
def test_each_goal_has_two_sides(name):
    device, kind, goal, peers, ours = GOALS[name]
    size = speed.SIZES["full" if device == "cuda" else "mid"]
    for pace, expected in ((ABOVE, 0), (BELOW, 1)):
        found = measured(device, work=1.0, **{n: s * pace for n, s in peers.items()}, **ours)
        missed = [line for line in speed.misses(found, kind, size) if "times as fast" in line]
        assert len(missed) == expected, (name, pace, missed)
        assert all(f"at least {goal:g} is asked for" in line for line in missed)
        other = "tiny" if device == "cuda" else "full"
        assert not list(speed.misses(found, kind, speed.SIZES[other]))  # has its goals on the other device


def test_the_roof_counts_in_bf16_on_a_gpu():
    size, sides = speed.SIZES["full"], {"DIFFUSERS": 9.0, "OURS": 1.0}
    for share, kind, expected in ((0.801, "bf16", 0), (0.799, "bf16", 1), (0.799, "fp8", 0)):
        missed = list(speed.misses(measured("cuda", work=share, **sides), kind, size))
        assert len(missed) == expected and all("ours misses a goal: share of the roof" in line for line in missed)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
def test_weights_in_ram_may_cost_a_twentieth(kind):
    size = speed.SIZES["full"]
    for slower, expected in ((1.049, 0), (1.051, 1)):
        found = measured("cuda", DIFFUSERS=9.0, OURS=1.0, OFFLOADED=slower)
        missed = list(speed.misses(found, kind, size))
        assert len(missed) == expected and all(speed.OFFLOADED in line and "at most 1.05" in line for line in missed)


@pytest.mark.parametrize("name", ["mid", "full"])
@pytest.mark.parametrize("kind", speed.DTYPES)
def test_what_is_no_number_is_within_no_bound(kind, name):
    size = speed.SIZES[name]
    bound = speed.DEEP_BF16 if (kind, name) == ("bf16", "full") else speed.BOUNDS[kind]
    for error, expected in ((0.99 * bound, 0), (1.01 * bound, 1), (math.nan, 1), (math.inf, 1)):
        found = measured("cpu", error, DIFFUSERS=9.0, OURS=1.0)
        missed = list(speed.misses(found, kind, size))
        assert len(missed) == expected and all("ours computes something else" in line for line in missed)


def test_the_published_network_is_made_where_and_as_it_runs():
    """On no other device and in no wider numbers first, even for a moment; torch's own defaults stay."""
    with torch.device("meta"):
        reference = HunyuanVideoFramepackTransformer3DModel(**pm.reference_config(heads=1, double=1, single=1))
    published = Published()
    made = speed.published_network(published, reference.to(torch.float16), "meta", torch.float16)
    assert published.made == {("meta", torch.float16)} == {(p.device.type, p.dtype) for p in made.parameters()}
    assert torch.get_default_dtype() == torch.float32 and torch.zeros(1).device.type == "cpu"


def test_seconds_of_a_frame_are_recorded():
    """25 steps make 36 frames."""
    found = measured("cuda", DIFFUSERS=7.2, OURS=0.72)
    told = {side: value for side, measure, value in speed.figures_of(found) if measure == "seconds a frame"}
    assert told == pytest.approx({speed.DIFFUSERS: 5.0, speed.OURS: 0.5})


def test_a_gpus_time_counts_once_in_a_profile():
    """As torch tells it: of an op on the CPU's line, and of its kernel on the GPU's own."""
    told = (("aten::addmm", DeviceType.CPU, 30), ("aten::gelu", DeviceType.CPU, 10),
            ("sm90_xmma_gemm_bf16", DeviceType.CUDA, 30), ("gelu_kernel", DeviceType.CUDA, 10))  # fmt: skip
    events = []
    for key, kind, device_us in told:
        event = FunctionEventAvg()
        event.key, event.device_type, event.self_device_time_total, event.self_cpu_time_total = key, kind, device_us, 1
        events.append(event)
    assert step_profile.spent_in(events, "cuda") == {"matrix products": 30, "GELU": 10}
    assert step_profile.spent_in(events, "cpu") == {"matrix products": 1, "GELU": 1}


def test_attention_in_fewer_bits_is_told_beside_the_goal_of_the_same_numbers():
    size = speed.SIZES["mid"]
    found = measured("cpu", DIFFUSERS=1.3, OURS=1.2, FASTER=1.0)
    assert len(list(speed.misses(found, "fp32", size))) == 1
    (line,) = speed.beside_goals(found, "fp32", size, "")
    assert "1.3 times as fast as diffusers, meets 1.25" in line
    (line,) = speed.beside_goals(measured("cpu", DIFFUSERS=1.2, OURS=1.0, FASTER=1.0), "fp32", size, "")
    assert "does not meet" in line


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (("own", "PyTorch"), {"SAME": "own"}),
        (("narrow", "own", "PyTorch"), {"FASTER": "narrow", "SAME": "own"}),
        (("narrow", "PyTorch", "own"), {"FASTER": "narrow"}),
        (("PyTorch", "narrow", "own"), {}),
    ],
)
def test_attention_in_as_many_bits_is_a_side_of_its_own(order, expected):
    """By what the candidates say of themselves; the host's own attention is no further side."""
    known = {
        "own": Candidate("own", "sub_quad", Needs()),
        "narrow": Candidate("narrow", "split", Needs(), fewer_bits=True),
        "PyTorch": Candidate("PyTorch", "pytorch", Needs()),
    }
    place = speed.Place(128, torch.float32, torch.device("cpu"))
    made = speed.attentions(place, [known[label] for label in order])
    assert {side: backend.label for side, backend in made.items()} == {
        getattr(speed, side): label for side, label in expected.items()
    }


def test_targets_with_step_caching_are_told_and_fail_nothing():
    size = speed.SIZES["full"]
    found = measured("cuda", work=0.9, DIFFUSERS=9.0, OURS=0.72, OFFLOADED=0.73)
    told = " ".join(speed.beside_goals(found, "bf16", size, "NVIDIA H200"))
    assert "0.5 s a frame, 0.222 if" in told and "with it is 0.15" in told and "6144 MB" in told
    assert not list(speed.misses(found, "bf16", size))


class Published:
    """Stands for a checkout: a network of diffusers' class of its own, and what it was made and run in."""

    def __init__(self):
        self.seen: list[torch.dtype] = []
        self.made: set[tuple[str, torch.dtype]] = set()

    def make(self, reference):
        network = type(reference)(**pm.reference_config(heads=1, double=1, single=1)).eval()
        self.made = {(p.device.type, p.dtype) for p in network.parameters()}
        network.load_state_dict(reference.state_dict())
        return network

    def run(self, network, inputs, dtype):
        self.seen += [dtype, *{p.dtype for p in network.parameters()}]
        return pm.run_reference(network, inputs, dtype)


@pytest.mark.parametrize("kind", speed.ROUND_TO)
def test_peers_of_rounded_numbers_run_in_bf16(kind):
    published = Published()
    made = speed.sides(TOY, kind, "cpu", published)
    assert made[speed.DIFFUSERS]().dtype == made[speed.PUBLISHED]().dtype == torch.bfloat16
    assert published.made == {("cpu", torch.bfloat16)} and published.seen == [torch.bfloat16] * 2
    assert not torch.equal(made[speed.OURS](), made[speed.DIFFUSERS]())
