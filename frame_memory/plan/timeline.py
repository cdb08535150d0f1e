"""Prompts with times. One prompt a line; times are seconds of the finished video.

    a cat in a kitchen        no time: the base, used wherever no other prompt is
    0-3.6: a cat walks        from 0 to 3.6 s
    3.6s- : it sits           from 3.6 s to the end, or to the next prompt
    3.6: it sits              the same
    [0s-2s: text] [3s: text]  brackets, several on a line (as FramePack-Studio writes them)

A gap between two times is filled by the base, without one by the prompt before it (before the first: by the first). A
base of several lines is one prompt. Lines may stand in any order.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from .describe import align
from .errors import TIMELINE, PlanError, refusal

_T = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_RANGE = re.compile(rf"({_T})\s*s?\s*[-\u2013]\s*(?:({_T})\s*s?\s*)?:\s*(.*)", re.DOTALL | re.IGNORECASE)
# "16:9 film still" is a prompt: a bare number counts as a time only when no digit follows the colon.
_FROM = re.compile(rf"({_T})\s*(?:s\s*:|:(?![0-9]))\s*(.*)", re.DOTALL | re.IGNORECASE)
_BRACKET = re.compile(rf"\[\s*{_T}\s*s?\s*[-:\u2013]", re.IGNORECASE)
_SUSPECT = (
    (re.compile(rf"[-\u2013]\s*{_T}\s*s?\s*[-:\u2013]", re.IGNORECASE), "a time below 0; the first time is 0"),
    (re.compile(r"[0-9]+,[0-9]+\s*s?\s*[-:\u2013]", re.IGNORECASE), "a time is written with a point, such as 3.6"),
    (
        re.compile(rf"{_T}\s*s?\s*[-\u2013]\s*(?:{_T}\s*s?)?(?:\s|$)|{_T}\s*s(?:\s|$)", re.IGNORECASE),
        "a time needs a colon after it; a prompt that begins with a number needs a word in front",
    ),
)
# Two times closer than this are the same.
_SAME = 1e-6
# How far past the end of the video a prompt may end: rounding of typed times.
_ROUNDING = 0.05


class TimelineError(ValueError):
    """A timeline that cannot be used. line and column: 1-based place. table: what was understood so far."""

    def __init__(self, line: int, column: int, reason: str, table: str):
        self.line, self.column, self.reason, self.table = line, column, reason, table
        understood = table or "nothing"
        super().__init__(
            f"The timeline cannot be used: line {line}, column {column}: {reason}. "
            f'Change it in the node "{TIMELINE}".\nWhat was understood:\n{understood}'
        )


@dataclass(frozen=True)
class TimelineEntry:
    """A prompt from start_s to end_s seconds; end_s None is the end of the video.

    origin: 'written', 'base' (the base prompt) or 'filled' (a gap; the prompt of a neighbour). line: 1-based line of
    the text a written entry stands in, 0 for the others.
    """

    start_s: float
    end_s: float | None
    text: str
    origin: str = "written"
    line: int = 0


@dataclass(frozen=True)
class Timeline:
    """Entries in time order without gap or overlap, from 0 to the end of the video.

    blend_sections: over how many sections a new prompt is blended in. unused_base: the prompt without a time where the
    timed ones leave no gap for it, else empty.
    """

    entries: tuple[TimelineEntry, ...]
    blend_sections: int = 0
    unused_base: str = ""


@dataclass(frozen=True)
class _Written:
    start: float
    end: float | None
    text: str
    line: int
    column: int


def parse_timeline(text: str, blend_sections: int = 0) -> Timeline:
    """Read a timeline. An empty text is one empty prompt. Raises TimelineError; PlanError for blend_sections."""
    if isinstance(blend_sections, bool) or not isinstance(blend_sections, int) or blend_sections < 0:
        raise PlanError(refusal(f"blend over {blend_sections!r} sections", "a whole number from 0", "0", TIMELINE))
    base: list[str] = []
    written: list[_Written] = []
    for number, line in enumerate(text.split("\n"), 1):
        _read_line(line, number, base, written)
    written.sort(key=lambda w: w.start)
    _refuse_overlaps(written)
    whole = " ".join(base) if base or not written else None
    entries = tuple(_fill(written, whole))
    unused = "" if any(entry.origin == "base" for entry in entries) else whole or ""
    return Timeline(entries, blend_sections, unused)


def table(timeline: Timeline, seconds: float | None = None) -> str:
    """What was understood, one aligned row a prompt, with the gaps and what fills them.

    seconds: length of the video; gaps past it are left out and open ends are shown as it.
    """
    if not timeline.entries:
        return ""
    rows = [["from", "to", "prompt", "because"]]
    last = "end" if seconds is None else f"{seconds:.2f} s"
    for entry in timeline.entries:
        if seconds is not None and entry.origin != "written" and entry.start_s >= seconds - _SAME:
            continue
        end = last if entry.end_s is None else f"{entry.end_s:g} s"
        why = {"written": f"line {entry.line}", "base": "the base prompt", "filled": "gap: a neighbour goes on"}
        rows.append([f"{entry.start_s:g} s", end, _short(entry.text) or "(empty)", why[entry.origin]])
    lines = align(rows)
    if timeline.unused_base:
        lines.append(
            f"Warning: the line without a time is never used, since the timed ones leave no gap: "
            f"{_short(timeline.unused_base)!r}. Repeat in each timed line who and where."
        )
    return "\n".join(lines)


def validate(timeline: Timeline, seconds: float, *, asked_seconds: float | None = None) -> None:
    """Refuse times past the end of a video of this length.

    asked_seconds: what the artist typed, when the video was rounded to whole sections; a prompt may end there. Raises
    TimelineError with the table, PlanError for a length that is none.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise PlanError(refusal(f"{seconds!r} seconds", "a length above 0 s", "1.2 s (one section)", TIMELINE))
    limit = max(seconds, asked_seconds or 0.0)
    for entry in timeline.entries:
        if entry.origin != "written":
            continue
        if entry.start_s >= seconds - _SAME:
            reason = f"it starts at {entry.start_s:g} s, past the end of the video at {seconds:.2f} s"
            nearest = f"start it before {seconds:.2f} s, or make the video longer"
            raise TimelineError(entry.line, 1, f"{reason}; {nearest}", table(timeline, seconds))
        if entry.end_s is not None and entry.end_s > limit + _ROUNDING:
            reason = f"it ends at {entry.end_s:g} s, past the end of the video at {seconds:.2f} s"
            raise TimelineError(entry.line, 1, f"{reason}; nearest valid: {seconds:.2f}", table(timeline, seconds))


def weights_for(timeline: Timeline, time_s: float, section_seconds: float) -> tuple[tuple[int, float], ...]:
    """Which entries prompt a section that begins at time_s, with weights that add up to 1.

    After a change of text the n = blend_sections sections that follow mix old and new: the k-th of them (from 1) takes
    k/(n+1) of the new. Entries with the same text count as one.
    """
    entries = timeline.entries
    index = max((i for i, entry in enumerate(entries) if entry.start_s <= time_s + _SAME), default=0)
    first = index
    while first > 0 and entries[first - 1].text == entries[index].text:
        first -= 1
    if first == 0 or timeline.blend_sections == 0:
        return ((index, 1.0),)
    since = math.floor((time_s - entries[first].start_s) / section_seconds + _SAME)
    weight = (max(since, 0) + 1) / (timeline.blend_sections + 1)
    if weight >= 1:
        return ((index, 1.0),)
    return ((first - 1, 1 - weight), (index, weight))


def unused_entries(timeline: Timeline, section_starts: tuple[float, ...]) -> tuple[TimelineEntry, ...]:
    """Written entries that begin and end between two section starts, so that no section would show them."""
    used = {weights_for(timeline, start, 1.0)[-1][0] for start in section_starts}
    return tuple(e for i, e in enumerate(timeline.entries) if e.origin == "written" and i not in used)


def _read_line(line: str, number: int, base: list[str], written: list[_Written]) -> None:
    content = line.strip()
    if not content:
        return
    column = line.index(content[0]) + 1
    openings = [match.start() for match in _BRACKET.finditer(content)] if content[0] == "[" else []
    if openings and openings[0] == 0:
        for begin, stop in zip(openings, [*openings[1:], len(content)]):
            item = content[begin:stop].rstrip()
            if not item.endswith("]"):
                reason = "a bracket that is not closed before the next, or text after it"
                _refuse(number, column + begin, reason, written)
            inner = item[1:-1]
            offset = len(inner) - len(inner.lstrip())
            place = column + begin + 1 + offset
            found = _timed(inner.strip(), number, place, written)
            if found is None:
                _refuse(number, place, "a bracket needs a time and a colon, such as [0s-2s: text]", written)
            written.append(found)
        return
    found = _timed(content, number, column, written)
    if found is not None:
        written.append(found)
        return
    for pattern, reason in _SUSPECT:
        if pattern.match(content):
            _refuse(number, column, reason, written)
    base.append(content)


def _timed(content: str, line: int, column: int, written: list[_Written]) -> _Written | None:
    match = _RANGE.match(content)
    if match:
        start, stop, text = match.groups()
    else:
        match = _FROM.match(content)
        if not match:
            return None
        start, text = match.groups()
        stop = None
    begin, end = float(start), float(stop) if stop is not None else None
    if not math.isfinite(begin) or (end is not None and not math.isfinite(end)):
        _refuse(line, column, "a time without an end", written)
    if end is not None and end <= begin + _SAME:
        place = column + match.start(2)
        _refuse(line, place, f"the end {end:g} is not after the start {begin:g}; leave it out for an open end", written)
    return _Written(begin, end, text.strip(), line, column)


def _refuse_overlaps(written: list[_Written]) -> None:
    for i, (one, two) in enumerate(pairwise(written)):
        if two.start <= one.start + _SAME:
            _refuse(two.line, two.column, f"it starts at {two.start:g} s like line {one.line}", written[: i + 1])
        if one.end is not None and two.start < one.end - _SAME:
            reason = f"it starts at {two.start:g} s, before line {one.line} ends; nearest valid start: {one.end:g}"
            _refuse(two.line, two.column, reason, written[: i + 1])


def _fill(written: list[_Written], base: str | None) -> list[TimelineEntry]:
    entries: list[TimelineEntry] = []
    cursor: float | None = 0.0
    for i, item in enumerate(written):
        if cursor is not None and item.start > cursor + _SAME:
            entries.append(_gap(cursor, item.start, base, entries[-1].text if entries else item.text))
        following = written[i + 1].start if i + 1 < len(written) else None
        cursor = item.end if item.end is not None else following
        start = entries[-1].end_s if entries and entries[-1].end_s is not None else item.start
        entries.append(TimelineEntry(start, cursor, item.text, "written", item.line))
    if cursor is not None:
        entries.append(_gap(cursor, None, base, entries[-1].text if entries else ""))
    return entries


def _gap(start: float, end: float | None, base: str | None, neighbour: str) -> TimelineEntry:
    if base is not None:
        return TimelineEntry(start, end, base, "base")
    return TimelineEntry(start, end, neighbour, "filled")


def _refuse(line: int, column: int, reason: str, written: list[_Written]) -> None:
    understood = [TimelineEntry(w.start, w.end, w.text, "written", w.line) for w in written]
    raise TimelineError(line, column, reason, table(Timeline(tuple(understood))))


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
