"""Diagrams: what is written on them can be read."""

from __future__ import annotations

import numpy as np

from frame_memory.video.plots import BOTTOM, LINES, PANEL_HEIGHT, Curve, Panel, draw_panels


def test_a_title_and_the_name_of_its_axis_stand_apart():
    words = "processor ms a section, gjpqy"
    curves = (Curve("", [0, 1, 2], [1.0, 3.0, 2.0], ""),)

    def rows(title: str, axis: str) -> np.ndarray:
        """Numbers of the rows of pixels that differ from a panel without words, of the second of two panels."""
        said, bare = (
            np.asarray(draw_panels([Panel("", "", "", curves, (), 4.0), Panel(*texts, curves, (), 4.0)]), dtype=int)
            for texts in ((title, words, axis), ("", words, ""))
        )
        return np.nonzero((said != bare).any(axis=(1, 2)))[0]

    title, axis = rows(words, ""), rows("", words)
    assert len(title) and len(axis) and title.max() + 2 < axis.min()
    assert title.min() >= 420 and axis.max() < 420 + 60, "inside its panel, and above the diagram"


def test_what_stands_beside_a_curve_that_ends_low_stays_off_the_numbers_of_the_axis():
    low = Curve("loss", (0, 50, 100), (1.0, 0.1, 0.02), note="mean of 20: 0.0200")
    picture = np.asarray(draw_panels([Panel("Loss", "step", "", [low], (), 1.0)]), dtype=int)
    axis, drawn = PANEL_HEIGHT - BOTTOM, np.abs(picture - LINES[0]).sum(-1) < 30
    assert drawn[:axis].any() and not drawn[axis + 3 :].any()
