"""The benchmark of what stands around the network: what it measures at toy size, and that it notices growth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import theilslopes

from benchmarks import section_overhead as overhead
from benchmarks import section_parts as parts
from frame_memory.journal import read_manifest

SIDE = (2, 2)


@pytest.mark.parametrize("light", [True, False], ids=["stand-in", "tiny network"])
def test_a_run_is_told_section_by_section(tmp_path, light):
    asked = replace(overhead.WALKS["small"], size=SIDE, sections=2, steps=1, light=light, live=light)
    told = overhead.walk(asked, tmp_path)
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(told, 2)
    assert all(value > 0 for name in ("network", "between", "steps", "memory") for value in told[name])
    # Only where a video is written there is work beside the sampler's thread.
    assert (sum(told["beside"]) > 0.005) == light
    assert len(list(tmp_path.glob("overhead/sections/*.safetensors"))) == 3


def test_growth_is_noticed_and_noise_is_not():
    noise = np.random.default_rng(0).normal(0.1, 0.01, 200)
    for grows, good in ((0.0, True), (0.02, False)):
        around = noise + np.linspace(0, grows, 200)
        # The machine is half as fast from the middle on, which slows the network as well.
        pace = np.repeat([1.0, 2.0], 100)
        told = dict.fromkeys(("between", "steps"), (around * pace / 2).tolist())
        told |= {"network": (0.05 * pace).tolist(), "beside": [0.0] * 200, "memory": [100.0] * 200}
        # Of three walks one is disturbed for a while.
        disturbed = told | {"steps": (around * pace / 2 + 5.0 * (np.arange(200) // 20 == 3)).tolist()}
        runs = [told, disturbed, told]
        assert overhead.table(overhead.length_rows(overhead.WALKS["small"], runs))[1] is good
        assert ("MORE than" in overhead.verdict(overhead.WALKS["small"], runs)) is not good
        expected = theilslopes(around[1:], np.linspace(0, 1, 199))
        found = overhead.line_through(around.tolist())
        assert found == pytest.approx((expected.slope, expected.low_slope, expected.high_slope), rel=1e-3)
        told = overhead.line_through(overhead.medians(runs, "between", "steps"))
        assert told == pytest.approx(tuple(1.5 * value for value in found)), "at the pace that is usual"


def test_a_growth_that_is_none_of_noise_is_allowed_up_to_a_share_of_the_fastest_section():
    """A 5000th of 25 steps of 0.49 s that are 2.25 times fewer: 1.09 ms."""
    for grows, good in ((1.0e-3, True), (1.2e-3, False)):
        told = dict.fromkeys(("between", "steps"), (0.1 + np.linspace(0, grows / 2, 200)).tolist())
        told |= {"network": [1.0] * 200, "beside": [0.0] * 200, "memory": [100.0] * 200}
        assert overhead.table(overhead.length_rows(overhead.WALKS["small"], [told]))[1] is good
        words = "a growth of no more than 0.02% of" if good else "a growth of MORE than"
        assert words in overhead.verdict(overhead.WALKS["small"], [told])


def test_shares_are_of_a_sections_time():
    """A 4090 in bf16: 83 s a section, and half of 165.2e12 operations a second."""
    told = {"between": [9.0, 0.83, 0.83], "steps": [9.0, 9.0, 9.0], "beside": [9.0, 8.3, 8.3]}
    work = {"packing": 0.0, "MemoryPack's update": 1.0, "frame preservation": 2.0, "decode": 165.2}
    rows = [row for row in overhead.share_rows(told, work) if row[0].startswith("RTX 4090, bf16, 83 s")]
    values = {measure: value for _, measure, value, _ in rows}
    assert values["share of loop, journal, report, measured here"] == pytest.approx(0.01)
    assert values["share of a memory"] == pytest.approx(2 / 82.6 / 83)
    assert values["share of the decode, which needs the same GPU"] == pytest.approx(2 / 83)
    assert values["share that goes on beside the sampling"] == pytest.approx(0.1)
    assert values["share with the decode"] == pytest.approx(0.01 + 2 / 82.6 / 83 + 2 / 83)
    assert overhead.table(rows)[1]


def test_single_parts_are_told_for_projects_of_each_length(tmp_path, monkeypatch):
    for name, value in {"SECTIONS": (1, 3), "REPEATS": 1, "HEIGHT": 4, "WIDTH": 4}.items():
        monkeypatch.setattr(parts, name, value)
    with torch.inference_mode():
        rows = [*parts.frame_rows(tmp_path), *parts.journal_rows(tmp_path)]
    assert all(value > 0 for _, _, value, _ in rows)
    assert [case for case, *_ in rows].count("project of 3 sections") == 6
    for sections in (1, 3):  # two more were saved, in the turn that does not count and in the one that does
        assert len(read_manifest(tmp_path / str(sections) / "overhead").finished) == sections + 2
