"""The one call for a GPU: its parts end, fail, hang and are left out without harm to one another, and what it says.

What the parts measure has tests of its own, or is a check that a GPU alone can fail; here they run at toy size.
"""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from benchmarks import decode, gpu, gpu_checks, record, roof, speed, stage_two
from benchmarks.record import COLUMNS

ROW = "| {} | seconds | 2 | 1 | {} |"
ENDINGS = {
    "good": (f"print('{ROW.format('a', 'passed')}')", [gpu.MET]),
    "poor": (f"print('{ROW.format('a', 'passed')}'); print('{ROW.format('b', 'FAILED')}'); exit(1)",
             [gpu.MET, gpu.MISSED]),
    "broken": (f"print('{ROW.format('a', 'passed')}'); 1 / 0", [gpu.MET, gpu.NOT_RUN]),
    "killed": ("import os; os.abort()", [gpu.NOT_RUN]),
    "hung": (f"print('{ROW.format('a', 'passed')}', flush=True); import time; time.sleep(60)",
             [gpu.MET, gpu.NOT_RUN]),
    "by its code": ("pass", [gpu.MET]),
    "by its code, missed": ("print('FAILED: x is slow'); exit(1)", [gpu.MISSED]),
    "of one side": (f"print('{record.UNDECIDED}nothing to compare')", [gpu.NOT_RUN]),
    "of one side, wrong": (f"print('{record.UNDECIDED}nothing'); print('FAILED: x'); exit(1)", [gpu.MISSED]),
    "after an error that it caught": (
        f"print({gpu.BROKEN!r}); print('{ROW.format('a', 'FAILED')}'); exit(1)", [gpu.MISSED]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_however_a_part_ends_its_verdicts_are_kept(name, tmp_path):
    code, expected = ENDINGS[name]
    part = gpu.Part(name, ("none",), (), 60, "the goal")
    ran = gpu.run(part, [sys.executable, "-c", code], 1.5 if name == "hung" else 30, tmp_path / "log.txt")
    lines = gpu.goals_table([ran])[2:]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == expected
    assert ran.seconds < 20 and (tmp_path / "log.txt").read_bytes().startswith(b"\n=== " + name.encode())
    if gpu.NOT_RUN in expected:
        assert "the goal" in lines[-1] and (ran.open or "nothing to compare") in lines[-1]
        assert bool(ran.open) == (name != "of one side")


def test_of_the_smallest_shapes_an_exit_code_decides_nothing(tmp_path):
    ran = gpu.run(gpu.Part("x", ("none",), (), 60, "the goal"), [sys.executable, "-c", ""], 30, tmp_path / "log.txt")
    assert gpu.MET in gpu.goals_table([ran])[-1] and gpu.NOT_RUN in gpu.goals_table([ran], tiny=True)[-1]


def test_without_a_gpu_it_says_so_and_brings_rows_home(tmp_path, capsys):
    absent = gpu.Part("none", ("benchmarks.none",), (), 9, "x")
    parts = (next(part for part in gpu.PARTS if part.name == "roof"), absent)
    assert gpu.main(["--out", str(tmp_path)], parts) == 1
    said = capsys.readouterr().out
    assert "There is no GPU here" in said and gpu.TINY in said and "there is no benchmarks.none | not run |" in said
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows and tuple(rows[0]) == COLUMNS and {row["command"] for row in rows} == {"benchmarks.roof --repeats 1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goals.md", "log.txt", "results.csv"]
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.1"], parts[:1]) == 1
    assert "no time was left" in (tmp_path / "goals.md").read_text(encoding="utf-8")


def test_every_part_is_a_command_that_its_benchmark_understands():
    for part in gpu.PARTS:
        for tiny in (False, True):
            _, _, module, *arguments = part.command(tiny, None)
            if module == "benchmarks.attention" and gpu.importlib.util.find_spec(module) is None:
                continue
            parse = getattr(gpu.importlib.import_module(module), "parse", None)
            assert parse is None or parse(arguments).record, part.name


def test_the_share_of_the_decode_is_of_the_steps_of_the_same_call(tmp_path):
    assert (gpu.DECODE, gpu.OURS, gpu.STEPS) == (decode.SECONDS, speed.OURS, speed.STEPS)
    assert {name: f"{8 * s.width}x{8 * s.height}" for name, s in speed.SIZES.items()} == gpu.PIXELS
    told = speed.figures_of(speed.Measured({speed.DIFFUSERS: speed.Took(1, 1, 1, 0)}, 1, 1, "cpu"))
    assert gpu.STEP in [measure for _, measure, _ in told]
    case, start = "full, bf16, cuda", "d,c,m,x,"
    rows = [f'{start}"{case}, ours",seconds a step,0.8', f'{start}"{case}, diffusers",seconds a step,8',
            f"{start}9 frames of 832x480,{decode.SECONDS},1"]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join([",".join(COLUMNS), *rows]), encoding="utf-8")
    assert gpu.shares(tmp_path / "rows.csv") == [
        f"A decode (9 frames of 832x480): 5.0% of the seconds of 25 steps at 608x640 ({case}, ours)."
    ]


def test_more_memory_than_the_bound_fails_stage_two_by_the_part_of_the_one_call(monkeypatch, capsys):
    (part,) = [part for part in gpu.PARTS if part.line[0] == "benchmarks.stage_two"]
    assert stage_two.main([]) == 0
    said = capsys.readouterr().out
    ran = gpu.Ran(part, "", said, good=True)
    assert (gpu.NOT_RUN in gpu.goals_table([ran])[-1]) == (record.UNDECIDED in said)
    monkeypatch.setattr(stage_two, "BOUND", 1.05)
    assert stage_two.main([]) == 1
    ran = gpu.Ran(part, "", capsys.readouterr().out)
    assert part.decides in gpu.goals_table([ran])[-1] and gpu.MISSED in gpu.goals_table([ran])[-1]
    assert "FAILED: stage 2, fp8 blocks: memory over inference, calculated 1.06" in ran.said
    for value, expected in ((1.049, 0), (1.051, 1), (float("nan"), 1)):
        figures = [("stage 2, bf16", "ratio, run", value), ("stage 2, bf16", "inference, run", 9.0)]
        assert len(list(stage_two.misses(figures))) == expected


# ---- checks and figures at toy size --------------------------------------------------------------------------------


def test_the_checks_pass_here_and_name_every_backend(capsys):
    assert gpu_checks.main(["--tiny", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("| passed |") == 10 + said.count("attention, bf16 on the CPU") and "FAILED" not in said
    for candidate in gpu_checks.CANDIDATES:
        assert f"not {candidate.label}:" in said or f"attention, {candidate.label}" in said
    # Of a double block 2 x 4, of a single one 2; int8 has the 3 modulations as well.
    for kind, count in (("fp8", 10), ("int8", 13)):
        assert f"{kind}, 1 + 1 blocks: cpu has no fast products in it for its {count} matrices" in said


def test_a_check_that_breaks_off_fails_and_the_others_are_made(monkeypatch, capsys):
    def broken(*_):
        yield "a", "b", 0.0, (0.0, 1.0)
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu_checks, "parity", broken)
    assert gpu_checks.main(["--tiny", "--device", "cpu", "--parts", "parity", "finite"]) == 1
    said = capsys.readouterr().out
    assert "| a | b | 0 | 1 | passed |" in said and "| parity | breaks off: RuntimeError | nan | 0 | FAILED |" in said
    assert "NaN or infinite numbers | 0 | 0 | passed |" in said


def test_a_backend_that_is_wrong_at_length_is_found():
    """Right on the few tokens of the self-test, wrong on as many as a step has."""
    place = gpu_checks.Place(speed.HEAD, torch.float32, torch.device("cpu"))
    backend, _ = gpu_checks.first_right(place, "PyTorch")
    seen = gpu_checks.Seen()
    assert gpu_checks.at_length(backend, 1, 40, torch.float32, "cpu", seen) < 1e-6 and not seen.broken

    def wrong(func, q, *args, **kwargs):
        out = backend(func, q, *args, **kwargs)
        return torch.where(torch.arange(q.shape[-2])[:, None] < 30, out, float("nan"))

    assert not gpu_checks.at_length(wrong, 1, 40, torch.float32, "cpu", seen) <= gpu_checks.ALLOWED
    assert seen.broken == 10 * speed.HEAD


def test_a_decode_is_timed_and_a_broken_pixel_fails(monkeypatch, capsys):
    assert decode.main(["--tiny", "--repeats", "1"]) == 0
    assert f"| {decode.SECONDS} |" in capsys.readouterr().out
    monkeypatch.setattr(decode, "decode_window", lambda *_: torch.full((1, 2, 2, 3), float("inf")))
    assert decode.main(["--tiny", "--repeats", "1"]) == 1


def test_the_roof_is_of_matrix_products_and_copies(capsys):
    assert roof.main(["--size", "tiny", "--device", "cpu", "--bytes", "1000", "--repeats", "1"]) == 0
    rates = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    names = ["fp32", "bf16", "on the device, read and written"]
    assert [row[0] for row in rates] == [f"| tiny, cpu, {name}" for name in names]
    assert all(float(row[2].removesuffix(" |")) > 0 for row in rates)
