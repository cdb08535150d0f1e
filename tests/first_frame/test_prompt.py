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

# Of the published kind: long, and about the scene alone.
BOAT = (
    "Film quality, low evening sun. A red fishing boat with a torn sail lies on a pebble beach while small waves run "
    "up to its keel. Beside it, the old fisherman in a yellow raincoat kneels and mends a net with slow, old hands. "
    "He looks up and smiles as wind lifts his white hair. Gulls circle far behind him, and shallow focus keeps boat "
    "and fisherman sharp. The camera moves slowly around the bow, close to the wet planks, until the harbour wall "
    "comes into view."
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
    assert caption_warnings(BOAT, 2) == ()
    assert caption_warnings(with_trigger(BOAT), 2, ("red fishing boat", "fisherman in a yellow raincoat")) == ()


@pytest.mark.parametrize(
    "words",
    ["the reference image", "Reference Pictures", "a collage", "the white background", "the left half", "a canvas"],
)
def test_words_about_the_canvas_are_warned_of(words):
    (warning,) = caption_warnings(f"{BOAT} All as in {words}.", 2)
    assert "speaks of the canvas" in warning


def test_a_name_that_is_missing_is_told():
    (warning,) = caption_warnings(BOAT, 3, ("boat", "fisherman", "red parrot"))
    assert "'red parrot'" in warning and "'boat'" not in warning


@pytest.mark.parametrize("name", ["boats", "Boat", "yellow raincoat", "net mended"])
def test_names_are_found_in_other_forms(name):
    found = caption_warnings(BOAT, 1, (name,))
    assert bool(found) is (name == "net mended")


def test_irregular_plurals_and_singulars_are_found():
    caption = f"{BOAT} A woman and two children watch from the glass house."
    assert caption_warnings(caption, 4, ("Women", "child", "raincoats", "glass")) == ()
    (warning,) = caption_warnings(caption, 1, ("man",))
    assert "'man'" in warning, "a fisherman is not a man by his letters"


def test_a_chinese_caption_is_counted_and_its_names_are_found():
    sentence = "一位穿黄色雨衣的年轻女子推着红色自行车,走过雨夜的集市街道,小狗跟在她身旁。"
    assert caption_warnings(sentence * 5, 3, ("女子", "红色自行车", "小狗")) == () == caption_warnings(sentence * 5, 3)
    (warning,) = caption_warnings(sentence * 5, 1, ("老渔夫",))
    assert "'老渔夫'" in warning
    assert any("18 words" in warning for warning in caption_warnings(sentence))


def test_captions_that_are_shorter_than_asked_for_are_told():
    short = " ".join(BOAT.split()[:60])
    assert any("60 words" in warning and "80 to 200" in warning for warning in caption_warnings(short))


def test_fewer_things_than_references_is_told_with_what_was_found():
    caption = "A cat walks. " + "It walks and walks slowly under warm evening sun while wind moves everything. " * 7
    (warning,) = caption_warnings(caption, 3)
    assert "1 things (cat)" in warning and "3 references" in warning
    assert caption_warnings(caption, 1) == () and caption_warnings(caption, 0) == ()


def test_fewer_names_than_references_is_told_whatever_the_caption_names():
    (warning,) = caption_warnings(BOAT, 5, ("boat", "fisherman"))
    assert "has 2 (boat, fisherman)" in warning and "5 references" in warning
    assert caption_warnings(BOAT, 2, ("boat", "fisherman")) == () == caption_warnings(BOAT, 1, ("boat", "fisherman"))


@pytest.mark.parametrize("words", ["reference-image", "the input-image", "a cut-out", "the white-background"])
def test_hyphens_hide_no_words_about_the_canvas(words):
    (warning,) = caption_warnings(f"{BOAT} All as in {words}.", 2)
    assert "speaks of the canvas" in warning


@pytest.mark.parametrize("rest", ["ad23r2 the camera view changes.", "ad23r2", "The camera view suddenly changes."])
def test_a_part_of_the_trigger_in_the_caption_is_told(rest):
    (warning,) = caption_warnings(f"{rest} {BOAT}", 2)
    assert "part of the trigger" in warning and "Take it out" in warning
    assert with_trigger(f"{rest} {BOAT}") == f"{TRIGGER} {rest} {BOAT}", "it may be meant: nothing is taken away"


def test_things_are_guessed():
    assert {"boat", "fisherman", "beach", "net"} <= set(things_named(BOAT))


def test_short_long_and_empty():
    assert "empty" in caption_warnings(TRIGGER, 1)[0]
    assert any("3 words" in w for w in caption_warnings("A cat walks.", 1))
    assert any("words" in w for w in caption_warnings("A cat walks. " * 100, 1))


def test_the_instruction_holds_names_and_idea_but_never_the_trigger():
    text = instruction(with_trigger("A cat rides a horse."), parse_names("cat,  grey horse\n, saddle"))
    assert "cat, grey horse, saddle" in text and "A cat rides a horse." in text and "ad23r2" not in text
