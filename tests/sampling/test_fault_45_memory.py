"""Memory after many sections: the benchmark's own measurement at a small size, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory

REPO = Path(__file__).resolve().parents[2]
# 32x32 pixels: the float pixels of one section are 0.42 MB, and 14 sections lie between the two looks.
SIDE, SECTIONS = 32, 24
SECTION_PIXELS = memory.SECTION_FRAMES * SIDE * SIDE * 3 * 4 / memory.MEGABYTE
# Half of what one section's pixels a section would come to.
BOUND = 0.5 * SECTION_PIXELS * (SECTIONS - memory.SETTLED)


@pytest.mark.skipif(memory.in_use() == 0, reason="only glibc tells what its heap has handed out")
def test_fault_45_memory_stays_flat_over_many_sections(tmp_path):
    result = tmp_path / "sampling.json"
    size = ["--sections", str(SECTIONS), "--side", str(SIDE), "--steps", "1"]
    line = [sys.executable, "-m", "benchmarks.memory", "--child", "sampling", "--result", str(result), *size]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p] + [str(REPO)])}
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([*line, "--folder", str(tmp_path)], check=True, env=environment, timeout=900)
    found = json.loads(result.read_text(encoding="utf-8"))
    assert len(found["heap"]) == len(found["rss"]) == SECTIONS
    # Of so short a run RSS goes up and down by more than the leak looked for; what the heap has handed out does not.
    growth = min(found["heap"][-3:]) - found["heap"][memory.SETTLED - 1]
    assert growth < BOUND, f"{growth:.1f} MB since section {memory.SETTLED}, expected below {BOUND:.1f}: {found}"
    assert found["rss"][-1] - found["rss"][memory.SETTLED - 1] < memory.SECTION_BOUND


def test_a_bound_that_fails_is_named_and_ends_with_an_error():
    flat = {"rss": [100.0] * 200, "vram": [0.0] * 200}
    rising = {"rss": [100.0 + i for i in range(200)], "vram": [0.0] * 200}
    decoded = {"rss": [900.0 + i for i in range(500)], "before": 600.0, "frames": 18001}

    def failed(*parts):
        return [measure for _, measure, value, bound, _ in memory.verdicts(*parts) if bound and value > bound]

    assert failed(flat, None) == [] and failed(rising, None) == ["RSS growth since section 10"]
    assert failed(None, decoded) == []
    steep = {**decoded, "rss": [900.0 + 2 * i for i in range(500)]}
    assert failed(None, steep) == ["RSS growth"] and memory.slope(steep["rss"], 10.0) == pytest.approx(100, rel=0.01)
    assert failed(None, {**decoded, "rss": [2100.0] * 500}) == ["RSS peak"]


def test_the_curves_are_drawn(tmp_path):
    from PIL import Image

    sampled = {"rss": [800.0 + i / 10 for i in range(200)], "vram": [0.0] * 200}
    memory.draw(tmp_path / "a.png", sampled, {"rss": [1700.0, 1750.0] * 250, "before": 700.0, "frames": 18001})
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1200, 840) and len(image.getcolors(100_000)) > 5
