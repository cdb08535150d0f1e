"""Appends measurements to benchmarks/results.csv: one figure a row, with machine, commit and command.

FRAME_MEMORY_RESULTS names another file for them, FRAME_MEMORY_COMMIT the commit of a copy that is outside git: so
`benchmarks.gpu` brings rows home from another machine.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results.csv"
ELSEWHERE, COPY_OF = "FRAME_MEMORY_RESULTS", "FRAME_MEMORY_COMMIT"
UNDECIDED = "NOT DECIDED: "  # begins the line in which a benchmark says why its exit code is no verdict
COLUMNS = ("date", "commit", "machine", "command", "case", "measure", "value")


def machine() -> str:
    """Processor, cores and accelerator of this computer, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit() -> str:
    """Short hash of the checkout, with a plus where files are changed; outside git what was said, or 'unknown'."""
    folder = RESULTS.parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COPY_OF, "unknown")
    return found.stdout.strip()


def add_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """What timings of parts of a network have in common on the command line."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")


def append(command: str, rows: list[tuple[str, str, float]]) -> None:
    """Add `(case, measure, value)` rows, all of one command."""
    results = Path(os.environ.get(ELSEWHERE, RESULTS))
    new = not results.exists()
    with open(results, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        shared = (datetime.date.today().isoformat(), commit(), machine(), command)
        writer.writerows([*shared, case, measure, f"{value:.6g}"] for case, measure, value in rows)
