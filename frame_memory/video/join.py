"""An existing video, what was made after it, and where a bridge leads, as one file: streamed, with the sound of each.

Everything is put onto the rate and the size of the made video. Where the made one repeats the end of the first, the
first one's own pictures are kept; the last half second of them is crossfaded into the repeated ones, which a VAE has
made a little softer, so that no step is seen.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from .audio import SoundLine
from .clips import Clip, describe_sound, fitting
from .guards import LUMA_STEP
from .history import read_video
from .segments import Segment, join_segments
from .source import HistoryError
from .writer import DEFAULT_CRF, VideoWriter, WrittenVideo

JOIN_NODE = "Join Videos"
# Half a second at 30 fps: long enough that a change of sharpness or brightness is no step.
FADE_FRAMES = 15


@dataclass(frozen=True)
class Stretch:
    """Frames of one of the videos that go into the file. place: the frame of the file at which they begin."""

    name: str
    clip: Clip
    frames: range
    place: int

    @property
    def stop(self) -> int:
        return self.place + len(self.frames)


@dataclass(frozen=True)
class JoinPlan:
    """What the file will be. fade: the last frames of the first stretch that are crossfaded into the made video."""

    stretches: tuple[Stretch, ...]
    width: int
    height: int
    fps: Fraction
    overlap: int
    fade: int

    @property
    def frames(self) -> int:
        return self.stretches[-1].stop

    @property
    def made(self) -> Stretch:
        return self.stretches[1]

    def sound(self) -> SoundLine | None:
        """The sound of every stretch in its place; None where none has any."""
        return SoundLine.of([part for s in self.stretches for part in s.clip.sound(s.frames)])


def plan_join(first: Clip, made: Clip, overlap: int, after: Clip | None = None) -> JoinPlan:
    """Decide every frame. overlap: frames at the beginning of `made` that repeat the end of `first`.

    All clips have the rate of the made one. Raises HistoryError for an overlap that cannot be.
    """
    longest = min(len(made.frames) - 1, len(first.frames))
    if not 0 <= overlap <= longest:
        raise HistoryError(
            f"'overlap' of '{JOIN_NODE}' is {overlap} frames, but 'made' has {len(made.frames)} and 'video' "
            f"{len(first.frames)}. Expected 0 to {longest}: connect 'overlap' of 'Video History', and to 'made' the "
            "video that was sampled with its 'history'."
        )
    rest = made.frames[overlap:]
    stretches = [Stretch("video", first, first.frames, 0)]
    stretches.append(Stretch("new", made, rest, stretches[-1].stop))
    if after is not None:
        stretches.append(Stretch("then", after, after.frames, stretches[-1].stop))
    width, height = made.facts.width, made.facts.height
    return JoinPlan(tuple(stretches), width, height, made.fps, overlap, min(overlap, FADE_FRAMES))


@dataclass
class Brightness:
    """Mean level of the frames on both sides of every join, 8-bit. steps: by the frame number of the join."""

    joins: tuple[int, ...]
    levels: dict[int, float] = field(default_factory=dict)

    def add(self, first: int, frames_THWC: np.ndarray) -> None:
        """Look at frames of the file from number `first` on."""
        for join in self.joins:
            for frame in (join - 1, join):
                if first <= frame < first + len(frames_THWC):
                    self.levels[frame] = float(frames_THWC[frame - first].mean())

    def steps(self) -> dict[int, float]:
        return {join: self.levels[join] - self.levels[join - 1] for join in self.joins}


@dataclass(frozen=True)
class Joined:
    """The file, and what an artist should know of it."""

    written: WrittenVideo
    report: str


def join_videos(
    plan: JoinPlan, path: Path, *, crf: float = DEFAULT_CRF, metadata: Mapping | None = None,
    interrupt: Callable[[], None] | None = None, on_frames: Callable[[int], None] | None = None,
) -> Joined:  # fmt: skip
    """Write the file. Memory does not grow with the length: chunks of 12 frames are alive, and the 15 of the crossfade.

    on_frames: gets the count of frames written so far. Raises HistoryError where a source is damaged, VideoWriteError
    and SegmentError where it cannot be written; finished frames are then kept (see VideoWriter).
    """
    sound = plan.sound()
    pictures = path if sound is None else path.with_name(f"{path.stem}.silent.mp4")
    light = Brightness(tuple(s.place for s in plan.stretches[1:]))
    writer = VideoWriter(
        pictures, plan.width, plan.height, plan.fps, crf=crf, metadata=metadata, expected_frames=plan.frames
    )
    done = 0
    with writer:
        for chunk_THWC in _pictures(plan, interrupt):
            writer.write(chunk_THWC)
            light.add(done, chunk_THWC)
            done += len(chunk_THWC)
            if on_frames is not None:
                on_frames(done)
    written, said = writer.result, []
    assert written is not None
    if sound is not None:
        segment = Segment(
            pictures.name, 0, written.frames, 0, "", plan.width, plan.height, str(writer.fps), crf,
            written.black_frames,
        )  # fmt: skip
        written = join_segments(path.parent, [segment], path, plan.fps, metadata, sound, announce=said.append)
        pictures.unlink(missing_ok=True)
    return Joined(written, "\n".join([*(f"Warning: {s}" for s in said), _report(plan, written, light, sound)]))


def _pictures(plan: JoinPlan, interrupt) -> Iterator[np.ndarray]:
    """All frames of the file, uint8 [T,H,W,3], a few at a time."""
    first, made = plan.stretches[0], plan.made
    plain = first.frames[: len(first.frames) - plan.fade]
    yield from _read(plan, first.clip, plain, interrupt)
    if plan.fade:
        own = np.concatenate(list(_read(plan, first.clip, first.frames[len(plain) :], interrupt)))
        begin = made.frames.start - plan.fade
        again = np.concatenate(list(_read(plan, made.clip, range(begin, made.frames.start), interrupt)))
        yield crossfade(own, again)
    for stretch in plan.stretches[1:]:
        yield from _read(plan, stretch.clip, stretch.frames, interrupt)


def _read(plan: JoinPlan, clip: Clip, frames: range, interrupt) -> Iterable[np.ndarray]:
    if not frames:
        return ()
    size = (plan.width, plan.height)
    return read_video(clip.facts, frames, fps=plan.fps, size=size, interrupt=interrupt, on_grid=False)


def crossfade(before_THWC: np.ndarray, after_THWC: np.ndarray) -> np.ndarray:
    """uint8 frames that go from the one to the other in equal steps; neither end is wholly one of them."""
    count = len(before_THWC)
    w_T111 = (np.arange(1, count + 1, dtype=np.float32) / (count + 1)).reshape(-1, 1, 1, 1)
    return (before_THWC * (1 - w_T111) + after_THWC * w_T111).round().astype(np.uint8)


def _report(plan: JoinPlan, written: WrittenVideo, light: Brightness, sound: SoundLine | None) -> str:
    rate = float(plan.fps)
    lines = [
        str(written.path),
        f"{written.frames} frames, {written.seconds:.2f} s at {rate:g} fps, {written.width}x{written.height}",
    ]
    for s in plan.stretches:
        lines.append(
            f"{s.place / rate:.2f} to {s.stop / rate:.2f} s: {s.name}, {s.clip.facts.path.name}, {len(s.frames)} "
            f"frames. {fitting(s.clip, plan.width, plan.height)} Sound: {_heard(s)}."
        )
    if plan.fade:
        begin = (plan.made.place - plan.fade) / rate
        lines.append(
            f"The {plan.overlap} frames that 'made' repeats are left out; from {begin:.2f} s on it is faded in over "
            f"{plan.fade} frames."
        )
    if sound is None:
        lines.append("No sound: none of the videos has any that can be read.")
    else:
        lines.append(f"Sound: AAC, {sound.out_rate} Hz, {sound.out_layout}, {written.seconds:.3f} s.")
    for join, step in light.steps().items():
        warned = "Warning: " if abs(step) > LUMA_STEP else ""
        lines.append(f"{warned}Brightness changes by {step:+.1f} of 255 at the join at {join / rate:.2f} s.")
    if written.black_frames:
        lines.append(f"Warning: {len(written.black_frames)} frames are black.")
    # The editor shows the first lines of a long text.
    return "\n".join(sorted(lines, key=lambda line: not line.startswith("Warning")))


def _heard(stretch: Stretch) -> str:
    words = describe_sound(stretch.clip)
    return "silence, none in the file" if words.startswith("none") else words
