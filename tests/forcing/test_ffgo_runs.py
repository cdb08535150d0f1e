"""benchmarks.ffgo's runs, one after the other and side by side. Nothing is trained here."""

from __future__ import annotations

import operator
import sys

import numpy as np
import pytest
import torch

from benchmarks import ffgo
from benchmarks.ffgo_measure import Shown


def made_up(job: ffgo.Job) -> ffgo.Done:
    """A run that took no time: its videos show their references where a LoRA was trained."""
    shown = Shown(job.recipe is not None, (1.0,), (1.0,), True)
    drawn = [np.zeros((1, 2, 2, 3), np.float32)]
    return ffgo.Done({count: [shown] * job.videos for count in range(1, ffgo.MOST + 1)}, None, 0.0, drawn)


def test_one_after_the_other_the_table_has_a_row_for_each_arm_and_count(monkeypatch, capsys):
    monkeypatch.setattr(ffgo, "work", made_up)
    monkeypatch.setattr(sys, "argv", ["ffgo", "--videos", "3", "--loras", "2"])
    ffgo.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| without", "| LoRA"))]
    assert len(rows) == 2 * ffgo.MOST
    assert all(("| 6 | 0% |" if "without" in line else "| 6 | 100% |") in line for line in rows), rows


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_keep_their_order_and_workers_have_one_thread_each(workers):
    assert list(ffgo.all_done(operator.neg, range(5), workers)) == [0, -1, -2, -3, -4]
    threads = 1 if workers > 1 else torch.get_num_threads()
    asked = [torch.get_num_threads] * 3
    assert list(ffgo.all_done(operator.methodcaller("__call__"), asked, workers)) == [threads] * 3
