"""Fault 36: weights and schedule that do not belong together are named before anything runs."""

import pytest

from frame_memory.plan import KINDS, PRESETS, check_kind, parse_schedule


def test_fault_36_each_kind_fits_its_own_schedule_alone():
    for kind in KINDS:
        for text in PRESETS.values():
            assert (check_kind(kind, text) is None) == (text == PRESETS[kind])


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("F1 forward", PRESETS["F0 inverted"], "only learned to see what came before"),
        ("F0 inverted", PRESETS["F1 forward"], "make the end of the video first"),
        ("F1 forward", f"{PRESETS['F1 forward']}_x_f1k1", "never saw an end anchor"),
        ("F1 forward", PRESETS["Vanilla"], "start frame pinned"),
        ("F0 inverted", "f1k1_x_g9_f1k1f2k2f4k4f8k8_td", "no 8x embedder"),
        ("F0 inverted", "f1k1_x_g5_f1k1f2k2f16k4_td", "the window is 5"),
        ("F0 inverted", "f1k1_x_g9_f1k1f2k2f16k4_tc", "this schedule keeps it (tc)"),
    ],
)
def test_fault_36_the_text_says_what_does_not_fit_and_what_would(kind, text, words):
    note = check_kind(kind, parse_schedule(text))
    assert words in note
    assert f"Nearest valid: {PRESETS[kind]}" in note
    assert "Frame Context Packer" in note
    assert "Load FramePack Model" in note


def test_fault_36_kinds_are_read_by_their_beginning_and_unknown_ones_are_not_judged():
    assert check_kind("f1", PRESETS["F0 inverted"])
    assert check_kind("F0", PRESETS["F0 inverted"]) is None
    assert check_kind("SemanticPack", PRESETS["F0 inverted"]) is None
