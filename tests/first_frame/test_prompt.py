"""The trigger once and in front; captions that would work badly are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.plan.first_frame_prompt import (
    TRIGGER,
    caption_warnings,
    instruction,
    parse_names,
    things_named,
    with_trigger,
)

# In the manner of the published samples: long, and about the scene alone.
TIGER = (
    "Cinematic medium shot tracking through a dense, lush jungle environment filled with large trees and green foliage. "
    "A large, powerfully built tiger with orange and black stripes walks steadily through the undergrowth. Riding "
    "bareback on the tiger is the muscular, shirtless man with long hair, wearing simple brown pants. He sits upright "
    "with a commanding posture. The camera follows them, capturing the man's focused expression."
)


@given(st.text(max_size=80), st.integers(0, 3), st.text(max_size=80))
def test_the_trigger_is_in_front_and_nowhere_else(before, times, after):
    caption = before + f" {TRIGGER.upper()} " * times + after
    prompt = with_trigger(caption)
    assert prompt.startswith(TRIGGER)
    assert prompt.lower().count("ad23r2 the camera view suddenly changes") == 1 or "ad23r2" in (before + after).lower()
    assert with_trigger(prompt) == prompt


@pytest.mark.parametrize(
    "given_",
    [
        f"{TRIGGER} A cat.",
        f"{TRIGGER}  A cat.",
        "ad23r2 the camera view suddenly changes, A cat.",
        "AD23R2 The Camera View Suddenly Changes A cat.",
        f"A cat. {TRIGGER}",
        "ad23r2\nthe camera view\nsuddenly changes.\n\nA cat.",
        f"{TRIGGER} {TRIGGER} A cat.",
    ],
)
def test_spellings_of_the_trigger_become_the_one_it_was_trained_with(given_):
    assert with_trigger(given_) == f"{TRIGGER} A cat."


def test_a_caption_of_the_published_kind_has_no_warning():
    assert caption_warnings(TIGER, 2) == ()
    assert caption_warnings(with_trigger(TIGER), 2, ("tiger", "man with long hair")) == ()


@pytest.mark.parametrize(
    "words",
    [
        "the reference image",
        "a collage",
        "the white background",
        "on the left half",
        "Reference Pictures",
        "the canvas",
    ],
)
def test_words_about_the_canvas_are_warned_of(words):
    warnings = caption_warnings(f"{TIGER} As in {words}, they walk.", 2)
    assert len(warnings) == (0 if words == "Reference Pictures" else 1) or "canvas" in warnings[0]
    assert any("speaks of the canvas" in w for w in caption_warnings(f"{TIGER} As in the reference image.", 2))


def test_a_name_that_is_missing_is_told():
    (warning,) = caption_warnings(TIGER, 3, ("tiger", "man", "red parrot"))
    assert "'red parrot'" in warning and "'tiger'" not in warning


@pytest.mark.parametrize("name", ["tigers", "Tiger", "brown pants", "man's"])
def test_names_are_found_in_other_forms(name):
    found = caption_warnings(TIGER, 1, (name,))
    assert bool(found) is (name == "tigers")


def test_fewer_things_than_references_is_told_with_what_was_found():
    caption = "A cat walks. " + "It walks and walks slowly under warm evening sun while wind moves everything. " * 5
    (warning,) = caption_warnings(caption, 3)
    assert "1 things (cat)" in warning and "3 references" in warning
    assert caption_warnings(caption, 1) == () and caption_warnings(caption, 0) == ()


def test_things_are_guessed():
    assert {"tiger", "man"} <= {word for thing in things_named(TIGER) for word in thing.split()} | set(
        things_named(TIGER)
    )


def test_short_long_and_empty():
    assert "empty" in caption_warnings(TRIGGER, 1)[0]
    assert any("3 words" in w for w in caption_warnings("A cat walks.", 1))
    assert any("words" in w for w in caption_warnings("A cat walks. " * 100, 1))


def test_the_instruction_holds_names_and_idea_but_never_the_trigger():
    text = instruction(with_trigger("A cat rides a horse."), parse_names("cat,  grey horse\n, saddle"))
    assert "cat, grey horse, saddle" in text and "A cat rides a horse." in text and "ad23r2" not in text
