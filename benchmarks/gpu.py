"""Everything that needs a GPU, in one call: `python scripts/run.py -m benchmarks.gpu [--out DIR] [--published PATH]
[--minutes N]`.

Correctness first (`benchmarks.gpu_checks`), then the roof, then times, in the order of what they are worth. Each part
is a process of its own with a limit of its own, so that one that fails or hangs costs no other. DIR gets what is there
so far at any moment: results.csv, rows in the form of benchmarks/results.csv; log.txt, all that the parts say; and
goals.md, the goals of issue F with what was measured: met, MISSED or not run. Exits with 1 unless every goal was met.

Without a GPU it says so, and runs every part at the smallest shapes, as --tiny does: that shows that they run, nothing
else.

On a machine that reaches no network ComfyUI and the packages that the machine lacks have to travel along:
`scripts/carry.py` packs them and says which calls to make. --minutes is for one that ends a command after some time.
Rows come home by `tail -n +2 DIR/results.csv >> benchmarks/results.csv`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import record

# As `benchmarks.decode` and `benchmarks.speed` have them, whose imports would cost this process seconds.
DECODE, STEP, OURS, STEPS = "seconds of a decode", "seconds a step", "ours", 25
PIXELS = {"tiny": "160x160", "mid": "320x320", "full": "608x640"}  # of a step, by how its case begins
TAIL = 900  # characters that each part says at its end, so that all of them and the goals fit on a few screens
LEAST = 10.0  # seconds that a part is begun with at all
TINY = "; the smallest shapes, whose times mean nothing"
MET, MISSED, NOT_RUN = "met", "MISSED", "not run"


@dataclass(frozen=True)
class Part:
    """A part of the call. line: module and arguments; tiny: instead of the arguments, the smallest shapes; seconds: its
    limit; decides: what its goals are about."""

    name: str
    line: tuple[str, ...]
    tiny: tuple[str, ...]
    seconds: float
    decides: str

    def command(self, tiny: bool, published: str | None) -> list[str]:
        """What is run in this Python."""
        module, *arguments = self.line
        more = ["--published", published] if published and module == "benchmarks.speed" else []
        return [sys.executable, "-m", module, *(self.tiny if tiny else arguments), *more, "--record"]


def _speed(kind: str, seconds: float, decides: str) -> Part:
    tiny = ("--sizes", "tiny", "--dtypes", kind, "--repeats", "1", "--offloaded")
    return Part(f"speed in {kind}", ("benchmarks.speed", *_FULL, "--dtypes", kind), tiny, seconds, decides)


_FULL = ("--sizes", "full", "--repeats", "5", "--offloaded")
PARTS = (
    Part("checks", ("benchmarks.gpu_checks",), ("--tiny",), 150, "right numbers on this device"),
    Part("roof", ("benchmarks.roof",), ("--size", "tiny", "--bytes", "1000000", "--repeats", "1"), 60, ""),
    _speed("bf16", 120, "80 % of the roof; 1.15 times the best peer; weights in RAM at most 1.05 times as slow"),
    _speed("fp8", 120, "1.6 times the best bf16 peer; weights in RAM at most 1.05 times as slow"),
    Part("decode", ("benchmarks.decode",), ("--tiny", "--repeats", "1"), 60, "pixels are numbers"),
    Part("attention", ("benchmarks.attention",), ("--shapes", "2x16x64", "--repeats", "1"), 90, "the backends' order"),
    _speed("int8", 120, "weights in RAM at most 1.05 times as slow"),
    Part(
        "step cache", ("benchmarks.step_cache", "--kinds", "F1", "--steps", "25", "--seeds", "1"),
        ("--kinds", "F1", "--steps", "4", "--seeds", "1", "--seconds", "1.2"), 120,
        "self-test model: 2.2 times fewer evaluations at 26 dB",
    ),
    Part("stage two", ("benchmarks.stage_two",), (), 60, "1.1 times the memory of inference"),
    Part("memory", ("benchmarks.memory_cost",), ("--hidden", "128", "--size", "8", "8", "--repeats", "1"), 120,
         "60 s of history over 10 s; a step with memory"),
)  # fmt: skip
VERDICT = re.compile(r"^\| (.*) \| (.*) \| (.*) \| (.*) \| (passed|FAILED) \|$", re.MULTILINE)


BROKEN, FAILED = "Traceback (most recent call last)", "FAILED"


@dataclass(frozen=True)
class Ran:
    """A part that was run. open: why it did not come to its end, in words. said: all of its output. good: by its exit
    code, whether its goals were met."""

    part: Part
    open: str
    said: str = ""
    seconds: float = 0.0
    good: bool = False

    def goals(self, tiny: bool = False) -> list[tuple[str, ...]]:
        """(case, measure, value, bound, verdict) of each goal that it told; of a part that tells none one by one, that
        of its exit code, which says nothing of the smallest shapes."""
        told = [(*found[:4], MET if found[4] == "passed" else MISSED) for found in VERDICT.findall(self.said)]
        if told or self.open or tiny or not self.part.decides:
            return told
        if self.good and self.line_of(record.UNDECIDED):
            return []
        return [(self.part.decides, self.line_of(FAILED), "", "", MET if self.good else MISSED)]

    def line_of(self, start: str) -> str:
        """The first line said that begins so; "" for none."""
        return next((line for line in self.said.splitlines() if line.startswith(start)), "")


def run(part: Part, command: Sequence[str], limit: float, log: Path, more: dict[str, str] | None = None) -> Ran:
    """Run a command to its end or limit, its output appended to the log as it comes. more: for its environment."""
    begun, quoted = time.monotonic(), " ".join(command[1:])
    with log.open("ab") as out:
        out.write(f"\n=== {part.name}: {quoted}\n".encode())
        out.flush()
        start = out.tell()
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp if os.name == "posix" else None,
            env={**os.environ, **(more or {})},
        )  # fmt: skip
        try:
            code, stopped = child.wait(limit), ""
        except subprocess.TimeoutExpired:
            code, stopped = 1, f"it was stopped after {limit:.0f} s"
        finally:
            _end(child)
    with log.open("rb") as told:
        told.seek(start)
        said = told.read().decode("utf-8", "replace")
    # Python's own code for an error is that of a missed goal.
    broken = code and BROKEN in said and FAILED not in said.rpartition(BROKEN)[2]
    if broken or code not in (0, 1):
        stopped = stopped or f"it broke off with code {code}: {said.strip().rpartition(chr(10))[2]}"
    return Ran(part, stopped, said, time.monotonic() - begun, code == 0)


def _end(child: subprocess.Popen) -> None:
    """A process and what it started, which is its group; a session of its own would outlive a call that is cut off."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    elif child.poll() is None:
        child.kill()
    child.wait()


def goals_table(ran: Sequence[Ran], tiny: bool = False) -> list[str]:
    """Every goal with its verdict; a part that told none, or not all, says what is open."""
    lines = ["| part | case | measure | measured | asked for | verdict |", "|" + "---|" * 6]
    for one in ran:
        goals = one.goals(tiny)
        lines += [f"| {one.part.name} | " + " | ".join(goal) + " |" for goal in goals]
        if one.open or (one.part.decides and not goals):
            told = one.line_of(record.UNDECIDED).removeprefix(record.UNDECIDED)
            why = one.open or told or "these shapes decide nothing"
            lines.append(f"| {one.part.name} | {one.part.decides} |  |  | {why} | {NOT_RUN} |")
    return lines


def shares(results: Path) -> list[str]:
    """A section's decode beside its steps, of the seconds that this call measured, each with its size in pixels."""
    with results.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    decodes = [row for row in rows if row["measure"] == DECODE]
    steps = [row for row in rows if row["measure"] == STEP and row["case"].endswith(f", {OURS}")]
    return [
        f"A decode ({decode['case']}): {float(decode['value']) / (STEPS * float(row['value'])):.1%} of the seconds of "
        f"{STEPS} steps at {PIXELS[row['case'].partition(',')[0]]} ({row['case']})."
        for decode in decodes for row in steps
    ]  # fmt: skip


def main(arguments: list[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    args = parse(arguments, parts)
    args.out.mkdir(parents=True, exist_ok=True)
    results, log = args.out / "results.csv", args.out / "log.txt"
    # Unbuffered, so that a part which is stopped has said what it knew.
    paths = os.pathsep.join(path for path in sys.path if path)
    more = {record.ELSEWHERE: str(results.resolve()), "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    tiny = args.tiny or not torch.cuda.is_available()
    if not torch.cuda.is_available():
        print("There is no GPU here: every part runs at the smallest shapes, which measures nothing.", flush=True)
    until, ran, lines = time.monotonic() + 60 * args.minutes, [], []
    for part in parts:
        if args.parts and part.name not in args.parts:
            continue
        left = until - time.monotonic()
        if importlib.util.find_spec(part.line[0]) is None:
            ran.append(Ran(part, f"there is no {part.line[0]}"))
        elif left < LEAST:
            ran.append(Ran(part, "no time was left"))
        else:
            ran.append(run(part, part.command(tiny, args.published), min(part.seconds, left), log, more))
        print(f"\n=== {part.name}: {ran[-1].seconds:.0f} s. {ran[-1].open}\n{ran[-1].said[-TAIL:]}", flush=True)
        lines = [record.machine() + (TINY if tiny else ""), "", *goals_table(ran, tiny)]
        lines += shares(results) if results.exists() else []
        (args.out / "goals.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))
    return 0 if all(f"| {verdict} |" not in line for line in lines for verdict in (MISSED, NOT_RUN)) else 1


def parse(arguments: list[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"), help="a folder for what comes out")
    parser.add_argument("--published", metavar="PATH", help="a checkout of the published FramePack code")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no part goes on")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in parts], help="not all of them")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
