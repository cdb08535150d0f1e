"""Diagrams: what is written on them can be read."""

from __future__ import annotations

import numpy as np

from frame_memory.video.plots import Curve, Panel, draw_panels


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
