"""FFGo's prompt: the trigger in front, once, and what captions should not say.

Source: reference/ffgo.md section 3.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

NODE = "FFGo Prompt"
TRIGGER = "ad23r2 the camera view suddenly changes."
# Long captions of some 80 to 200 words are what the LoRA was trained with.
FEWEST_WORDS, MOST_WORDS = 80, 260
# Chinese and Japanese are written without spaces: two of their characters count as a word.
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_PLURALS = {"women": "woman", "men": "man", "children": "child", "people": "person", "mice": "mouse", "geese": "goose"}

# Captions describe the scene as it is there already; words about the canvas are not in any training caption.
_CANVAS_WORDS = (
    "reference image", "reference picture", "reference photo", "references", "input image", "first frame", "collage",
    "canvas", "white background", "pasted", "cut-out", "cutout", "left side of the image", "right side of the image",
    "left half", "right half", "the image shows", "the picture shows",
)  # fmt: skip
_TRIGGER = re.compile(r"\s*".join(map(re.escape, TRIGGER.rstrip(".").split())) + r"\s*[.,;:!]?", re.IGNORECASE)
# What is left of a trigger that was typed by hand and not to the end.
_PART = re.compile(r"\bad23r2\b|\bcamera\s+view\s+suddenly\s+changes?\b", re.IGNORECASE)
# A thing is named after one of these, and its noun comes before a word that joins (or after four words at most).
_NAMED = re.compile(
    r"\b(?:an?|the|his|her|their|its|this|that|two|three|four|five|six|several|some)\s+([\w'-]+(?:\s+[\w'-]+){0,3})",
    re.IGNORECASE,
)
_JOINS = """
    a an the of in on at with without and or to is are was as by from that which who while where beside near behind
    under over into onto through it its his her their has have wearing holding riding walks stands sits
"""
# Words that follow an article in nearly every caption and name no reference.
_FILM = {
    "camera", "scene", "video", "shot", "background", "foreground", "frame", "view", "medium", "wide", "close-up",
    "viewer", "moment", "light", "lighting", "way", "side", "left", "right", "center", "centre", "atmosphere", "focus",
}  # fmt: skip


def with_trigger(caption: str) -> str:
    """The caption with the trigger at its start and nowhere else; spaces and line ends become single spaces."""
    return f"{TRIGGER} {_body(caption)}".rstrip()


def _body(caption: str) -> str:
    return " ".join(_TRIGGER.sub(" ", caption).split())


def things_named(caption: str) -> tuple[str, ...]:
    """Different things a caption seems to name: capitalised names, and nouns after articles and the like.

    A guess without a language model: it counts too many rather than too few.
    """
    body, joins = _body(caption), frozenset(_JOINS.split())
    found: dict[str, None] = {}
    for match in _NAMED.finditer(body):
        words = list(itertools.takewhile(lambda word: word not in joins, match[1].lower().split()))
        if words and not _FILM.intersection(words):
            found.setdefault(words[-1].removesuffix("'s"))
    for match in re.finditer(r"(?<![.!?]\s)(?<!^)\b[A-Z][\w'-]+(?:\s+[A-Z][\w'-]+)*", body):
        found.setdefault(match[0].lower())
    return tuple(found)


def caption_warnings(caption: str, references: int = 0, names: Sequence[str] = ()) -> tuple[str, ...]:
    """What will make a caption work badly, in plain sentences.

    references: how many pictures are on the canvas, the background not counted; 0 where that is not known. names: what
    the references are called, if the artist says so; each has to be in the caption.
    """
    body = _body(caption)
    lower, warnings = body.lower(), []
    if not body:
        return ("The caption is empty. Describe the scene, each thing of the canvas, and what happens.",)
    part = _PART.search(body)
    if part:
        warnings.append(
            f"The caption holds {part[0]!r}, a part of the trigger. Take it out: the whole trigger is put in front."
        )
    said = [words for words in _CANVAS_WORDS if re.search(rf"\b{words.replace(' ', '[ -]')}s?\b", lower)]
    if said:
        warnings.append(
            f"The caption speaks of the canvas ({', '.join(repr(w) for w in said)}). Describe the scene as it is in "
            "the video instead: the model was never taught such words."
        )
    missing = [name for name in names if not _is_in(name, lower)]
    if missing:
        warnings.append(
            f"The caption does not name {', '.join(repr(n) for n in missing)}. What is not described is often left out "
            "of the video: add its look, its place and what it does."
        )
    if 0 < len(names) < references:
        warnings.append(
            f"'names' has {len(names)} ({', '.join(names)}), but there are {references} references. Give each one a "
            "name there and in the caption."
        )
    if not names and references and len(_CJK.findall(body)) < len(body) / 4:  # the guess is for English
        found = things_named(body)
        if len(found) < references:
            warnings.append(
                f"The caption seems to name {len(found)} things ({', '.join(found) or 'none'}), but there are "
                f"{references} references. Name each one with its look, its place and what it does."
            )
    count = count_words(body)
    if count < FEWEST_WORDS:
        warnings.append(
            f"The caption has {count} words; FFGo was trained with long ones (about 80 to 200). Add looks, places, "
            "light and camera, or let 'Generate Text' write it from the instruction."
        )
    if count > MOST_WORDS:
        warnings.append(f"The caption has {count} words; FFGo was trained with about 80 to 200.")
    return tuple(warnings)


def count_words(text: str) -> int:
    """Words, where two characters of Chinese or Japanese count as one."""
    spaced = [word for word in _CJK.sub(" ", text).split() if any(letter.isalnum() for letter in word)]
    return len(spaced) + -(-len(_CJK.findall(text)) // 2)


def _is_in(name: str, lower: str) -> bool:
    """Whether every word of a name is in the text, in any order, singular or plural."""
    said = {form for word in re.findall(r"[\w']+", lower) for form in _forms(word)}
    words = [
        word for part in name.lower().split() for word in ([part] if _CJK.search(part) else re.findall(r"[\w']+", part))
    ]
    return all(word in lower if _CJK.search(word) else not said.isdisjoint(_forms(word)) for word in words)


def _forms(word: str) -> set[str]:
    """A word and what may be its singular."""
    word = word.removesuffix("'s")
    singular = {word.removesuffix(ending) for ending in ("s", "es")} if len(word) > 3 else set()
    return {word, _PLURALS.get(word, word), *singular}


def parse_names(text: str) -> tuple[str, ...]:
    """Names of the references, separated by commas or lines."""
    return tuple(name for name in (" ".join(part.split()) for part in re.split(r"[,\n;]", text)) if name)


def instruction(caption: str, names: Sequence[str] = ()) -> str:
    """What to ask a language model that sees the canvas, so that it writes the caption; the trigger is not in it."""
    body = _body(caption)
    things = f" The things in it are: {', '.join(names)}." if names else ""
    idea = f" What happens: {body}" if body else ""
    return (
        "The picture is a board: things that must appear in a film on the left, the place on the right."
        f"{things} Write one paragraph of 80 to 200 words that describes that film as if it were already shot. Name "
        "every thing with its look (colour, material, clothes), where it is and what it does, then the place, the "
        "light and the camera. Begin with words like 'Film quality, rich details.' Never mention a board, a picture, a "
        f"reference, a collage or a white background.{idea} Answer with the paragraph alone."
    )
