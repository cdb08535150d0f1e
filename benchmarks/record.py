"""Appends measurements to benchmarks/results.csv: one figure a row, with machine, commit and command."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results.csv"
COLUMNS = ("date", "commit", "machine", "command", "case", "measure", "value")


def machine() -> str:
    """Processor, cores and accelerator of this computer, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit() -> str:
    """Short hash of the checkout, with a plus where files are changed; 'unknown' outside git."""
    folder = RESULTS.parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def append(command: str, rows: list[tuple[str, str, float]]) -> None:
    """Add `(case, measure, value)` rows, all of one command."""
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        shared = (datetime.date.today().isoformat(), commit(), machine(), command)
        writer.writerows([*shared, case, measure, f"{value:.6g}"] for case, measure, value in rows)
