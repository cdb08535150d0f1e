"""The paper's schedule grammar: one string that says what the model sees of a video while it makes a window.

Source: arXiv 2504.12626, naming of section 4.1. Left to right is time.

    fAkB  A latent frames embedded with kernel B: 1 = (1,2,2), 2 = (2,4,4), 4 = (4,8,8), 8 = (8,16,16)
    gN    the window of N latent frames that is made; exactly one in a schedule
    x     skip any number of frames
    td    history farther away than the groups is dropped
    ta    ... is appended, about one token a frame
    tc    ... is compressed into one average

Groups joined to g are history. Groups beyond an x or a tail marker are anchors: start frames before g, end frames
after it. From g outwards a side reads: history groups, tail marker, x, anchor groups; each may be left out.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from .errors import PACKER

KERNELS = (1, 2, 4, 8)
# CHOICE: more frames than this in one group or window is a typing mistake, not a schedule.
MAX_FRAMES = 1024

# What Wan learns where nobody says another one: to look back, and to see beside a memory of frame preservation.
WAN_PRESET, BESIDE_MEMORY = "Wan, 81 frames", "Wan, 3 clean frames"

PRESETS: dict[str, str] = {
    "F0 inverted": "f1k1_x_g9_f1k1f2k2f16k4_td",
    "F1 forward": "f1k1_td_f16k4f2k2f1k1_g9",
    "Vanilla": "td_f16k4f2k2f1k1_g9",
    "Anti-drifting, both ends first": "td_f16k4f2k2f1k1_g9_x_f1k1",
    # Its own rules (arXiv 2603.04379; history sizes 16, 2, 1 and the first frame) are those of F1.
    "Helios": "f1k1_td_f16k4f2k2f1k1_g9",
    # Wan makes 81 frames at once: the first one, which is given, and a window of 20 latent frames.
    WAN_PRESET: "f1k1_td_f16k4f2k2f1k1_g20",
    # For memories of frame preservation, which hold all that came before (arXiv 2512.23851).
    BESIDE_MEMORY: "td_f3k1_g20",
}
# Of them, those of Wan, whose blocks read text and picture beside the sequence.
TEXT_BESIDE = ("Helios", WAN_PRESET, BESIDE_MEMORY)

_FLAGS = re.IGNORECASE | re.ASCII
_GROUP = re.compile(r"f([0-9]*)(k?)([0-9]*)", _FLAGS)
_WINDOW = re.compile(r"g([0-9]*)", _FLAGS)
_TAIL = re.compile(r"t([dac]?)", _FLAGS)


class ScheduleError(ValueError):
    """A schedule that does not parse.

    text: what was given. position: 0-based character, 0 <= position <= len(text). reason: one sentence.
    """

    def __init__(self, text: str, position: int, reason: str):
        self.text, self.position, self.reason = text, position, reason
        shown = "".join(c if c.isprintable() else " " for c in text)
        super().__init__(
            f"The schedule does not parse at character {position + 1}: {reason}.\n"
            f"  {shown}\n  {' ' * position}^\n"
            f'Nearest valid: {_nearest_preset(text)}. Change it in the node "{PACKER}".'
        )


@dataclass(frozen=True)
class Group:
    """`frames` contiguous latent frames embedded with one kernel (1, 2, 4 or 8)."""

    frames: int
    kernel: int

    def __str__(self) -> str:
        return f"f{self.frames}k{self.kernel}"


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule. Groups are in time order, left to right; tails are None, 'd', 'a' or 'c'."""

    text: str
    anchor_before: tuple[Group, ...]
    skip_before: bool
    tail_before: str | None
    history_before: tuple[Group, ...]
    window: int
    history_after: tuple[Group, ...]
    tail_after: str | None
    skip_after: bool
    anchor_after: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups of the context in time order."""
        return self.anchor_before + self.history_before + self.history_after + self.anchor_after

    @property
    def kernels(self) -> tuple[int, ...]:
        """The kernels in use, largest first: the model needs an embedder for each."""
        return tuple(sorted({group.kernel for group in self.groups}, reverse=True))

    @property
    def context_frames(self) -> int:
        """Latent frames of the context, without the window and without a kept tail."""
        return frame_count(self.groups)


def frame_count(groups: tuple[Group, ...]) -> int:
    """Latent frames of some groups together."""
    return sum(group.frames for group in groups)


@dataclass(frozen=True)
class _Element:
    kind: str  # 'f', 'g', 'x' or 't'
    position: int
    group: Group | None = None
    number: int = 0
    letter: str = ""


def parse_schedule(text: str) -> Schedule:
    """Read a schedule string; case and outer white space do not matter.

    Raises ScheduleError with the position and the reason.
    """
    if not isinstance(text, str):
        raise ScheduleError(repr(text), 0, "a schedule is a text")
    elements = _scan(text)
    windows = [i for i, element in enumerate(elements) if element.kind == "g"]
    if not windows:
        raise ScheduleError(text, len(text), "no window: one gN, such as g9, says how many latent frames are made")
    if len(windows) > 1:
        raise ScheduleError(text, elements[windows[1]].position, "a second window; a schedule has exactly one gN")
    middle = windows[0]
    before = _side(text, elements[:middle][::-1])
    after = _side(text, elements[middle + 1 :])
    kept = [side.tail for side in (before, after) if side.tail and side.tail.letter != "d"]
    if len(kept) > 1:
        raise ScheduleError(text, kept[1].position, "a second tail that is kept; only one side may use ta or tc")
    window = elements[middle].number
    return Schedule(
        text=_canonical(before, window, after),
        anchor_before=before.anchor[::-1],
        skip_before=before.skip,
        tail_before=before.tail.letter if before.tail else None,
        history_before=before.history[::-1],
        window=window,
        history_after=after.history,
        tail_after=after.tail.letter if after.tail else None,
        skip_after=after.skip,
        anchor_after=after.anchor,
    )


def _scan(text: str) -> list[_Element]:
    position, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    if position >= stop:
        raise ScheduleError(text, 0, "the schedule is empty")
    elements: list[_Element] = []
    while True:
        element, position = _element(text, position, stop)
        elements.append(element)
        if position == stop:
            return elements
        if text[position] == "_":
            position += 1
            if position == stop:
                raise ScheduleError(text, position - 1, "nothing follows this underscore")
        elif text[position : position + 2].lower() == "+d":
            raise ScheduleError(text, position, "+D needs a checkpoint trained on discretised history; none is known")
        elif element.kind != "f" or text[position] not in "fF":
            raise ScheduleError(text, position, f"{text[position]!r} cannot stand here; parts are joined by _")


def _element(text: str, position: int, stop: int) -> tuple[_Element, int]:
    letter = text[position].lower() if text[position].isascii() else ""
    if letter == "f":
        return _group(text, position, stop)
    if letter == "g":
        match = _WINDOW.match(text, position, stop)
        number = _number(text, match, 1, "gN needs a number of latent frames, such as g9")
        return _Element("g", position, number=number), match.end()
    if letter == "x":
        return _Element("x", position), position + 1
    if letter == "t":
        match = _TAIL.match(text, position, stop)
        if not match.group(1):
            raise ScheduleError(text, position, "a tail is td (dropped), ta (appended) or tc (compressed)")
        return _Element("t", position, letter=match.group(1).lower()), match.end()
    raise ScheduleError(text, position, f"expected fAkB, gN, x, td, ta or tc, not {text[position]!r}")


def _group(text: str, position: int, stop: int) -> tuple[_Element, int]:
    match = _GROUP.match(text, position, stop)
    frames = _number(text, match, 1, "fAkB needs a number of frames after f, such as f1k1")
    if not match.group(2):
        raise ScheduleError(text, match.end(), "fAkB needs a kernel after the frames, such as f1k1")
    kernel = _number(text, match, 3, "fAkB needs a kernel after k: 1, 2, 4 or 8")
    if kernel not in KERNELS:
        nearest = min(KERNELS, key=lambda k: abs(k - kernel))
        raise ScheduleError(text, match.start(3), f"kernel {kernel} is not 1, 2, 4 or 8; the nearest is k{nearest}")
    return _Element("f", position, group=Group(frames, kernel)), match.end()


def _number(text: str, match: re.Match[str], part: int, missing: str) -> int:
    digits = match.group(part)
    if not digits:
        raise ScheduleError(text, match.start(part), missing)
    # Long digit strings are refused before int(), which has a limit of its own.
    if len(digits.lstrip("0")) > 6 or int(digits) > MAX_FRAMES:
        raise ScheduleError(text, match.start(part), f"more than {MAX_FRAMES}")
    if int(digits) == 0:
        raise ScheduleError(text, match.start(part), "zero; the smallest number is 1")
    return int(digits)


@dataclass(frozen=True)
class _Side:
    history: tuple[Group, ...]
    tail: _Element | None
    skip: bool
    anchor: tuple[Group, ...]


def _side(text: str, outward: list[_Element]) -> _Side:
    """Sort one side of g, read from g outwards, into its four parts."""
    parts: dict[str, list[_Element]] = {"history": [], "t": [], "x": [], "anchor": []}
    stage = "history"
    for element in outward:
        if element.kind == "f":
            if stage != "history":
                stage = "anchor"
            parts[stage].append(element)
            continue
        if element.kind == "t" and (stage != "history" or not parts["history"]):
            raise ScheduleError(
                text, element.position, "a tail marker stands at the far end of the history groups of its side"
            )
        if element.kind == "x" and stage not in ("history", "t"):
            raise ScheduleError(
                text, element.position, "x stands once on a side, between the history or its tail and the anchors"
            )
        parts[element.kind].append(element)
        stage = element.kind
    if parts["x"] and not parts["anchor"]:
        raise ScheduleError(text, parts["x"][0].position, "x skips to nothing: no frames stand beyond it")
    return _Side(
        history=tuple(e.group for e in parts["history"] if e.group),
        tail=parts["t"][0] if parts["t"] else None,
        skip=bool(parts["x"]),
        anchor=tuple(e.group for e in parts["anchor"] if e.group),
    )


def _canonical(before: _Side, window: int, after: _Side) -> str:
    parts = [f"g{window}"]
    for side, outward in ((before, -1), (after, 1)):
        words = [
            "".join(map(str, side.history[::outward])),
            f"t{side.tail.letter}" if side.tail else "",
            "x" if side.skip else "",
            "".join(map(str, side.anchor[::outward])),
        ]
        parts = [*words[::-1], *parts] if outward < 0 else [*parts, *words]
    return "_".join(part for part in parts if part)


def in_words(text: str) -> str:
    """A schedule as an artist chooses it: a preset that has it, with its text and others that are the same."""
    names = [f"'{name}'" for name, own in PRESETS.items() if own == text]
    same = f"; {' and '.join(names[1:])} is the same" if names[1:] else ""
    return f"{names[0]} ({text}{same})" if names else text


def trained_on(text: str) -> str:
    """What an artist is told of the schedule that a file was trained on."""
    return f"Trained on the schedule {in_words(text)}: choose it in '{PACKER}'."


def another_schedule(what: str, trained: str, given: str) -> str:
    """The warning for a run on another schedule than that of a file. what: the file's name."""
    return (
        f"{what} was trained on the schedule {in_words(trained)}, and this one is {in_words(given)}. Choose that one "
        f"in '{PACKER}'."
    )


def _nearest_preset(text: str) -> str:
    # Nothing alike, as with an empty text: a schedule that a published checkpoint was trained with.
    close = difflib.get_close_matches(text.strip().lower()[:200], PRESETS.values(), n=1, cutoff=0.1)
    return close[0] if close else PRESETS["F1 forward"]
