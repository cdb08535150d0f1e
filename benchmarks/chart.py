"""The README's picture of speed, drawn from benchmarks/results.csv: `python scripts/run.py -m benchmarks.chart`.

Bars of how many times as fast as diffusers each side of `benchmarks.speed` is, for every case the newest row that was
recorded on a machine, but for rows that are for their numbers only. SVG, so that the same rows make the same bytes on
every machine; a test holds the committed picture to the committed rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .record import RESULTS

PICTURE = RESULTS.parent.parent / "assets" / "speed.svg"
COMMAND, FASTER = "benchmarks.speed", "times as fast as diffusers"
SECONDS, ROOF = "seconds a step", "share of the roof"
NO_SPEED = "(numbers only)"

WIDTH, LABEL, RIGHT = 900, 200, 300  # pixels: of all, before the bars, behind the longest one
ROW, BAR, HEAD, GAP, TOP = 26, 18, 24, 14, 52
INK, FAINT = "#282828", "#777777"
COLOURS = {"diffusers": "#b4b4b4", "ours": "#1f69b4"}
OTHER = "#14825a"


@dataclass(frozen=True)
class Bar:
    """One side of a case."""

    side: str
    faster: float
    seconds: float
    roof: float

    @property
    def words(self) -> str:
        return f"{self.faster:.2f} · {self.seconds:.3g} s a step, {100 * self.roof:.0f} % of the roof"


Groups = dict[tuple[str, str], dict[str, Bar]]


def bars_of(rows: Iterable[dict[str, str]]) -> Groups:
    """The newest bars by (machine, case) and side, in the order in which they first appear. rows: of results.csv."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["command"].split()[0] == COMMAND:
            case, _, side = row["case"].rpartition(", ")
            found.setdefault((row["machine"], case, side), {})[row["measure"]] = float(row["value"])
    groups: Groups = {}
    for (machine, case, side), values in found.items():
        if FASTER in values and NO_SPEED not in case:
            groups.setdefault((machine, case), {})[side] = Bar(side, values[FASTER], values[SECONDS], values[ROOF])
    return groups


def read(path: Path = RESULTS) -> Groups:
    """The bars of a results file."""
    with path.open(encoding="utf-8", newline="") as file:
        return bars_of(csv.DictReader(file))


def draw(groups: Groups) -> str:
    """The picture as SVG."""
    longest = max((bar.faster for bars in groups.values() for bar in bars.values()), default=1.0)
    unit = (WIDTH - LABEL - RIGHT) / longest
    lines, top, machine = [_text(16, 24, "A sampling step beside diffusers' FramePack transformer", 17)], TOP, ""
    for (on, case), bars in groups.items():
        if on != machine:
            machine = on
            lines.append(_text(16, top, machine, 13, FAINT))
            top += HEAD
        lines.append(_text(16, top, case, 14))
        top += HEAD / 2
        begin = top
        for bar in bars.values():
            place = f'x="{LABEL}" y="{top:g}" width="{bar.faster * unit:.1f}" height="{BAR}"'
            lines.append(f'<rect {place} fill="{COLOURS.get(bar.side, OTHER)}"/>')
            lines.append(_text(LABEL - 8, top + BAR - 4, bar.side, 13, anchor="end"))
            lines.append(_text(LABEL + bar.faster * unit + 8, top + BAR - 4, bar.words, 13))
            top += ROW
        at = LABEL + unit
        lines.append(f'<path d="M{at:.1f} {begin - 3:g}V{top - 4:g}" stroke="{INK}" stroke-dasharray="3 3"/>')
        top += GAP + HEAD / 2
    size = f'width="{WIDTH}" height="{top:g}" viewBox="0 0 {WIDTH} {top:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{top:g}" fill="white"/>', *lines, "</svg>", ""])


def _text(x: float, y: float, words: str, size: int, colour: str = INK, anchor: str = "start") -> str:
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def main() -> None:
    PICTURE.write_text(draw(read()), encoding="utf-8", newline="\n")
    print(PICTURE)


if __name__ == "__main__":
    main()
