"""The plan of a long video: every section with every frame and every rotary position resolved, before anything runs.

Source: framepack reference sections 3.1 to 3.3 (the published F0 and F1 demos) and arXiv 2504.12626 for the rest.

Frames are latent frames of the finished video. Latent frame 0 is one pixel frame, every other one is four: latent
frame f > 0 holds pixel frames 4f-3 to 4f. Positions are rotary time positions of one section; each section has its own
line of positions: anchors, skip, tail, history, window, history, tail, skip, anchors.

Choices of ours, where the sources are silent:
- the skip of an order that is not inverted is the real distance, at most three windows; an inverted one is F0's
  padding, less the history groups that stand inside it;
- the end frame stands for the latent frame after the last;
- a kept tail (ta, tc) takes one position beyond its farthest history group, a dropped one none;
- a second and later start anchor without a given video is the frame after the start once it is made;
- with more than one end anchor the end frame is the last of them;
- without a start frame (text to video) the first frame that is made anchors the sections behind its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from .describe import describe_plan
from .errors import IMAGE, PACKER, SAMPLER, PlanError, refusal
from .frames import BLANK, END, START, pixel_frames, section_frames
from .mark import FPS, SELFTEST_WAN
from .schedule import PRESETS, WAN_PRESET, Group, Schedule, frame_count, parse_schedule

ORDERS = ("inverted", "forward", "both ends first")
# A skip is never longer than this many windows: F0 never saw more (paddings are at most 3).
MAX_SKIP_WINDOWS = 3
# CHOICE: an hour at 30 fps; more is a typing mistake and would only fill the memory with indices.
MAX_SECTIONS = 3000


@dataclass(frozen=True)
class ContextGroup:
    """Frames embedded with one kernel, in ascending time. positions and frames have the same length.

    frames: latent frames of the video, or START (the start frame), END (the end frame), BLANK (zeros, still fed).
    """

    kernel: int
    positions: tuple[int, ...]
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Tail:
    """History that no group holds: kind 'a' (appended) or 'c' (compressed), at one position. Never empty."""

    kind: str
    position: int
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """One pass of the sampler over one window.

    index: place in the order of making. [start, stop): the latent frames it makes. groups: sorted by kernel (largest
    first), then position: the model's token order. padding: the reference's P in latent frames, 0 unless inverted.
    depends_on: indices of the sections whose frames it reads.
    """

    index: int
    start: int
    stop: int
    positions: tuple[int, ...]
    groups: tuple[ContextGroup, ...]
    tail: Tail | None
    padding: int
    depends_on: tuple[int, ...]


@dataclass(frozen=True)
class LongVideoPlan:
    """Sections in the order they are made. given_frames: latent frames of an existing video, frames 0..given-1.

    clips: each section is decoded alone, as a clip of its own, and the frame in front of them is not shown.
    """

    order: str
    schedule: Schedule
    sections: tuple[Section, ...]
    given_frames: int
    total_frames: int
    fps: float
    clips: bool = False

    @property
    def clip(self) -> int:
        """Latent frames of each clip of a video of clips, 0 of a running video."""
        return self.schedule.window if self.clips else 0

    @property
    def pixel_frames(self) -> int:
        """Frames of the finished video, the given ones counted."""
        return pixel_frames(self.total_frames, self.clip)

    @property
    def section_seconds(self) -> float:
        """What each section adds to the video."""
        return section_frames(self.schedule.window, self.clips) / self.fps

    @property
    def seconds(self) -> float:
        """Length of the finished video."""
        return self.pixel_frames / self.fps

    def span_seconds(self, section: Section) -> tuple[float, float]:
        """When the frames of a section begin and end in the finished video, in seconds."""
        begin, end = pixel_frames(section.start, self.clip), pixel_frames(section.stop, self.clip)
        return begin / self.fps, end / self.fps

    def describe(self) -> str:
        """The table an artist reads before the run."""
        return describe_plan(self)


def clip_window(family: str = "") -> int:
    """Latent frames of a section that models of a family of latents are trained on; the shipped Wan on FramePack's."""
    published = family in FPS and family != SELFTEST_WAN
    return parse_schedule(PRESETS[WAN_PRESET if published else "F1 forward"]).window


def section_count(seconds: float, window: int = 9, fps: float = 30, clips: bool = False) -> int:
    """How many sections make a video of about this length: round(seconds*fps / (4*window)), at least 1.

    clips: each section is a clip of its own, of 4*window-3 frames. Python's rounding (half to even), as published.
    Raises PlanError for zero, negative, NaN or endless lengths.
    """
    _check_fps(fps)
    frames = section_frames(window, clips)
    shortest = frames / fps
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds <= 0:
        raise PlanError(refusal(f"{seconds!r} seconds", "a length above 0 s", f"{shortest:g} s (one section)", SAMPLER))
    count = max(round(seconds * fps / frames), 1)
    _check_count(count, shortest)
    return count


def paddings(sections: int) -> tuple[int, ...]:
    """F0's skip of each section in windows: n-1..0 up to four sections, else 3, 2, 2, ..., 1, 0."""
    if sections <= 4:
        return tuple(range(sections - 1, -1, -1))
    return (3, *[2] * (sections - 3), 1, 0)


def natural_order(schedule: Schedule) -> str:
    """The order of making a schedule was written for."""
    if schedule.anchor_after and schedule.history_before:
        return "both ends first"
    if frame_count(schedule.history_after) > frame_count(schedule.history_before):
        return "inverted"
    if schedule.anchor_after and schedule.anchor_before:
        return "both ends first"
    return "forward"


def plan_sections(
    schedule: Schedule | str,
    *,
    sections: int,
    order: str | None = None,
    fps: float = 30.0,
    history_frames: int = 0,
    has_end: bool = False,
    clips: bool = False,
    has_start: bool = True,
) -> LongVideoPlan:
    """Resolve every section of a video.

    schedule: parsed, or its text. sections: how many windows are made. order: one of ORDERS, None for the schedule's
    own. history_frames: latent frames of an existing video put in front; 0 = a start frame alone. has_end: an end frame
    is given. clips: each section is decoded alone, and the frame in front of the first is not shown. has_start: there
    is a start frame; without one nothing is seen before the first section is made. Raises PlanError (or ScheduleError
    for a text).
    """
    if isinstance(schedule, str):
        schedule = parse_schedule(schedule)
    order = natural_order(schedule) if order is None else order
    _check_fps(fps)
    _check_count(sections, section_frames(schedule.window, clips) / fps)
    if isinstance(history_frames, bool) or not isinstance(history_frames, int) or history_frames < 0:
        raise PlanError(refusal(f"{history_frames!r} frames of an existing video", "a whole number", "0", SAMPLER))
    _check_order(schedule, order)
    if has_end:
        _check_end(schedule, order)
    made = _Builder(schedule, order, sections, history_frames, has_end, has_start).build()
    total = (history_frames or 1) + sections * schedule.window
    return LongVideoPlan(order, schedule, made, history_frames, total, fps, clips)


class _Builder:
    """Makes the sections of one plan. `owner[f]` is the section that made frame f, -1 for given ones, None for none."""

    def __init__(
        self, schedule: Schedule, order: str, count: int, given: int, has_end: bool, has_start: bool
    ):  # fmt: skip
        self.schedule, self.order, self.count, self.given, self.has_end = schedule, order, count, given, has_end
        self.has_start = bool(given) or has_start
        self.first = given or 1
        self.total = self.first + count * schedule.window
        in_front = -1 if self.has_start else None
        self.owner: list[int | None] = [in_front] * self.first + [None] * (self.total - self.first)
        self.before = frame_count(schedule.history_before)
        self.after = frame_count(schedule.history_after)
        self.anchors_before = frame_count(schedule.anchor_before)
        self.anchors_after = frame_count(schedule.anchor_after)

    def build(self) -> tuple[Section, ...]:
        window, made = self.schedule.window, []
        pads = paddings(self.count) if self.order == "inverted" else (0,) * self.count
        for index, start in enumerate(self._starts()):
            section = self._section(index, start, window * pads[index])
            made.append(section)
            self.owner[start : start + window] = [index] * window
        if self.has_start and not any(_sees_given(section, self.first) for section in made):
            text = f"f1k1_x_{self.schedule.text}"
            raise PlanError(
                refusal(f"{self.schedule.text}, which never shows the start frame", "a group before g", text, PACKER)
            )
        return tuple(made)

    def _starts(self) -> list[int]:
        starts = list(range(self.first, self.total, self.schedule.window))
        if self.order == "inverted":
            return starts[::-1]
        if self.order == "both ends first":
            return [starts[-1], *starts[:-1]]
        return starts

    def _section(self, index: int, start: int, padding: int) -> Section:
        schedule, stop = self.schedule, start + self.schedule.window
        # Both ends first: the last window is made as if it followed the start directly.
        origin = self.first if self.order == "both ends first" and index == 0 else start
        frames_before = [self._made(origin - self.before + i) for i in range(self.before)]
        frames_after = [self._made(stop + i) for i in range(self.after)]
        if self.has_end and self.order == "inverted" and index == 0 and not schedule.anchor_after:
            frames_after[_nearest_full_slot(schedule.history_after)] = END
        anchors_before, anchors_after = self._start_anchors(), self._end_anchors(index)
        kept_before = schedule.tail_before in ("a", "c")
        lengths = [
            self.anchors_before,
            self._skip_before(origin, padding),
            int(kept_before),
            self.before,
            schedule.window,
            self.after,
            int(schedule.tail_after in ("a", "c")),
            self._skip_after(index, stop),
            self.anchors_after,
        ]
        ends = list(accumulate(lengths))
        begin = [end - length for end, length in zip(ends, lengths)]
        groups = [
            *_cut(schedule.anchor_before, anchors_before, begin[0]),
            *_cut(schedule.history_before, frames_before, begin[3]),
            *_cut(schedule.history_after, frames_after, begin[5]),
            *_cut(schedule.anchor_after, anchors_after, begin[8]),
        ]
        groups.sort(key=lambda group: (-group.kernel, group.positions))
        used = {frame for group in groups for frame in group.frames}
        if START in used:
            used.add(0)
        tail = self._tail(origin - self.before, stop + self.after, used, begin[2] if kept_before else begin[6])
        read = used.union(tail.frames if tail else ())
        owners = {self.owner[frame] for frame in read if frame >= 0}
        return Section(
            index=index,
            start=start,
            stop=stop,
            positions=tuple(range(begin[4], ends[4])),
            groups=tuple(groups),
            tail=tail,
            padding=padding,
            depends_on=tuple(sorted(owner for owner in owners if owner is not None and owner >= 0)),
        )

    def _made(self, frame: int) -> int:
        return frame if 0 <= frame < self.total and self.owner[frame] is not None else BLANK

    def _start_anchors(self) -> list[int]:
        if self.given:
            return [self._made(self.given - self.anchors_before + i) for i in range(self.anchors_before)]
        if not self.has_start:
            return [self._made(self.first + i) for i in range(self.anchors_before)]
        return [START if i == 0 else self._made(i) for i in range(self.anchors_before)]

    def _end_anchors(self, index: int) -> list[int]:
        if self.order == "both ends first" and index > 0:
            last = self.total - self.schedule.window
            return [self._made(last + i) for i in range(self.anchors_after)]
        end = [END if self.has_end else BLANK] * bool(self.anchors_after)
        return [self._made(self.total - self.anchors_after + 1 + i) for i in range(self.anchors_after - 1)] + end

    def _skip_before(self, origin: int, padding: int) -> int:
        if not self.schedule.skip_before:
            return 0
        if self.order == "inverted":
            return max(padding - self.before, 0)
        return self._capped(origin - self.before - max(self.given, self.anchors_before))

    def _skip_after(self, index: int, stop: int) -> int:
        if not self.schedule.skip_after:
            return 0
        if self.order == "both ends first" and index > 0:
            return self._capped(self.total - self.schedule.window - (stop + self.after))
        return self._capped(self.total - self.anchors_after + 1 - (stop + self.after))

    def _capped(self, distance: int) -> int:
        return min(max(distance, 0), MAX_SKIP_WINDOWS * self.schedule.window)

    def _tail(self, before: int, after: int, used: set[int], position: int) -> Tail | None:
        schedule = self.schedule
        if schedule.tail_before in ("a", "c"):
            kind, span = schedule.tail_before, range(max(before, 0))
        elif schedule.tail_after in ("a", "c"):
            kind, span = schedule.tail_after, range(after, self.total)
        else:
            return None
        frames = tuple(f for f in span if self.owner[f] is not None and f not in used)
        return Tail(kind, position, frames) if frames else None


def _cut(groups: tuple[Group, ...], frames: list[int], begin: int) -> list[ContextGroup]:
    """Hand out frames and the positions from `begin` on to contiguous groups."""
    ends = list(accumulate(group.frames for group in groups))
    return [
        ContextGroup(
            group.kernel,
            tuple(range(begin + end - group.frames, begin + end)),
            tuple(frames[end - group.frames : end]),
        )
        for group, end in zip(groups, ends)
    ]


def _nearest_full_slot(groups: tuple[Group, ...]) -> int:
    """Index of the first full-rate slot after the window (groups are near to far)."""
    offset = 0
    for group in groups:
        if group.kernel == 1:
            return offset
        offset += group.frames
    raise AssertionError("_check_end lets no schedule without a k1 group through")


def _sees_given(section: Section, first: int) -> bool:
    read = [frame for group in section.groups for frame in group.frames]
    read += section.tail.frames if section.tail else ()
    return any(frame == START or 0 <= frame < first for frame in read)


def _check_fps(fps: float) -> None:
    if not isinstance(fps, (int, float)) or not math.isfinite(fps) or fps <= 0:
        raise PlanError(refusal(f"{fps!r} frames a second", "a rate above 0", "30", SAMPLER))


def _check_count(sections: int, section_s: float) -> None:
    one = f"1 section ({section_s:g} s)"
    if isinstance(sections, bool) or not isinstance(sections, int) or sections < 1:
        raise PlanError(refusal(f"{sections!r} sections", "a whole number from 1", one, SAMPLER))
    if sections > MAX_SECTIONS:
        longest = MAX_SECTIONS * section_s
        raise PlanError(refusal(f"{sections} sections", f"at most {MAX_SECTIONS} sections", f"{longest:g} s", SAMPLER))


def _check_order(schedule: Schedule, order: str) -> None:
    if order not in ORDERS:
        raise PlanError(refusal(f"order {order!r}", "one of " + ", ".join(ORDERS), natural_order(schedule), SAMPLER))
    natural = natural_order(schedule)
    before = schedule.history_before or schedule.anchor_before
    missing = None
    if order == "inverted" and not (schedule.history_after or schedule.anchor_after):
        missing, preset = "a group after g, since later sections are made first", "F0 inverted"
    elif order == "forward" and not before:
        missing, preset = "a group before g, since earlier sections are made first", "F1 forward"
    elif order == "forward" and not schedule.history_before and schedule.history_after:
        missing, preset = "history before g; this schedule only sees frames that are not made yet", "F1 forward"
    elif order == "both ends first" and not (schedule.anchor_after and before):
        missing, preset = "an end anchor and a group before g", "Anti-drifting, both ends first"
    if missing:
        nearest = f'order {natural}, or schedule {PRESETS[preset]} ({preset}) in the node "{PACKER}"'
        raise PlanError(refusal(f"order {order} with {schedule.text}", missing, nearest, SAMPLER))


def _check_end(schedule: Schedule, order: str) -> None:
    if schedule.anchor_after:
        return
    given = f"an end frame with order {order} and {schedule.text}"
    if order != "inverted":
        raise PlanError(
            f"F1 cannot aim at an end picture, nor can Wan. Take the end picture out of '{IMAGE}' (or bypass its "
            "Load Image), 'bridge_to' out of 'Video History', or load an F0 model with the preset 'F0 inverted'. "
            f"Given: {given}. Nearest valid: {PRESETS['F0 inverted']}, or {schedule.text}_x_f1k1 with a model "
            f'trained for an end anchor. Change it in the node "{IMAGE}".'
        )
    if not any(group.kernel == 1 for group in schedule.history_after):
        raise PlanError(refusal(given, "a full-rate group (k1) after g to put it in", PRESETS["F0 inverted"], PACKER))
