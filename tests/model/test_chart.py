"""The picture of speed in the README shows the rows of results.csv and no others."""

from __future__ import annotations

import csv
import re

from benchmarks import chart
from benchmarks.record import COLUMNS, RESULTS


def rows(*told: str) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, line.split("|"), strict=True)) for line in told]


def test_the_committed_picture_is_drawn_from_the_committed_rows():
    drawn = chart.draw(chart.read())
    assert chart.PICTURE.read_bytes() == drawn.encode(), "run: python scripts/run.py -m benchmarks.chart"
    with RESULTS.open(encoding="utf-8", newline="") as file:
        faster = [row for row in csv.DictReader(file) if row["measure"] == chart.FASTER]
    recorded = [row for row in faster if chart.NO_SPEED not in row["case"]]
    assert recorded
    newest = {(row["machine"], row["case"]): float(row["value"]) for row in recorded}
    shown = [float(value) for value in re.findall(r">([\d.]+) · ", drawn)]
    assert sorted(shown) == sorted(round(value, 2) for value in newest.values())


def test_the_newest_row_of_a_machine_counts():
    start = "d|c|M|benchmarks.speed --repeats 1|tiny, fp32, "
    told = ("times as fast as diffusers|1.5", "seconds a step|2", "share of the roof|.5")
    old = [f"{start}ours|{measure}" for measure in told]
    new = [line.replace("|1.5", "|3").replace("|2", "|1") for line in old]
    other = [line.replace("|M|", "|<N>|") for line in old]
    rest = ["d|c|M|benchmarks.memory|tiny, fp32, ours|times as fast as diffusers|9", start[:-2] + "|roof, 1e9|7"]
    groups = chart.bars_of(rows(*old, *new, *other, *rest))
    assert groups == {
        ("M", "tiny, fp32"): {"ours": chart.Bar("ours", 3.0, 1.0, 0.5)},
        ("<N>", "tiny, fp32"): {"ours": chart.Bar("ours", 1.5, 2.0, 0.5)},
    }
    drawn = chart.draw(groups)
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="18"', drawn)]
    assert widths[0] == 2 * widths[1] and "&lt;N&gt;" in drawn and "3.00 · 1 s a step, 50 % of the roof" in drawn
