"""What an existing video file is: its real timing, how it must be turned, its sound. Read, never decoded as a whole.

Shape suffixes: none; no pixels here.
"""

from __future__ import annotations

import statistics
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import av
import av.error
import av.stream

from .audio import AudioTrack

NODE = "Video History"
# ITU-T H.273 code for "not said", for matrix, primaries and transfer curve.
UNSPECIFIED = 2
HDR_CURVES = {16: "PQ", 18: "HLG"}
# Gaps that differ by less are a constant rate whose times were rounded (Matroska rounds to 1 ms).
STEADY_SECONDS = 0.002


class HistoryError(ValueError):
    """A video file that cannot be used. The message names the file, the cause in libav's words, and the node."""


@dataclass(frozen=True)
class VideoFacts:
    """A video file as a player would show it.

    `width`, `height`: upright and with square pixels. `rotation`: degrees counterclockwise that make it upright.
    `pixel_aspect`: width of a stored pixel by its height. `origin`: time of the first picture in the file, seconds;
    `seconds`: from there to the end of the last one. `timed` is False where the file has no times and `fps` counts.
    `variable`: the frame rate is not constant. `fps`: the average. `audio`: the whole sound, None without one that can
    be decoded. `notes`: what an artist should know, plain sentences.
    """

    path: Path
    stream: int
    codec: str
    pixel_format: str
    bits: int
    width: int
    height: int
    rotation: int
    pixel_aspect: float
    frames: int
    origin: float
    seconds: float
    fps: float
    variable: bool
    timed: bool
    audio: AudioTrack | None
    notes: tuple[str, ...]

    def sound(self, start: float, stop: float) -> AudioTrack | None:
        """The sound of seconds [start, stop) of the video, for `join_segments`; None where there is none."""
        if self.audio is None or stop <= start:
            return None
        return replace(self.audio, start=start, stop=min(stop, self.seconds))


def open_video(path: Path):
    """`av.open` for reading, with HistoryError for files that are missing or not video."""
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise HistoryError(
            f"{path} cannot be opened as a video. libav's words: {error}. Choose another file in '{NODE}'."
        ) from error


def video_stream(container, path: Path):
    """The stream with the moving pictures: the largest, and no cover picture."""
    attached = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise HistoryError(f"{path} holds {kinds}, but no video. Choose another file in '{NODE}'.")
    return max(streams, key=lambda stream: (stream.codec_context.width or 0) * (stream.codec_context.height or 0))


def probe_video(path: Path) -> VideoFacts:
    """Read the times of all packets and decode the first picture. Raises HistoryError."""
    path = Path(path)
    with open_video(path) as container:
        stream = video_stream(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        # Where the file says how long the stream is, that ends the last picture.
        declared = float(((stream.start_time or 0) + stream.duration) * stream.time_base) if stream.duration else None
        times, lengths = array("d"), array("d")
        untimed = 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None:
                    untimed += 1
                else:
                    times.append(float(packet.pts * packet.time_base))
                    lengths.append(float((packet.duration or 0) * packet.time_base))
        except av.error.FFmpegError as error:
            raise HistoryError(damaged_words(path, max(times, default=0.0), error)) from error
    facts = _look(path)
    timed = bool(times) and untimed == 0
    if timed:
        return _with_audio(_timing(facts, times, lengths, declared))
    count = len(times) + untimed
    fps = rate if 1 <= rate <= 1000 else 30.0
    note = f"The file has no times for its pictures; {fps:g} a second are assumed."
    return _with_audio(
        replace(facts, frames=count, fps=fps, seconds=count / fps, timed=False, notes=(*facts.notes, note))
    )


def damaged_words(path: Path, seconds: float, error: Exception) -> str:
    """The message for a file whose pictures cannot be read on from some point."""
    return (
        f"{path.name} is damaged near {seconds:.2f} s. libav's words: {error}. Choose another file in '{NODE}', or a "
        "part of this one that ends before."
    )


def _look(path: Path) -> VideoFacts:
    """What the first picture says; timing is filled in later."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        try:
            frame = next(container.decode(stream), None)
        except av.error.FFmpegError as error:
            raise HistoryError(damaged_words(path, 0.0, error)) from error
        if frame is None:
            raise HistoryError(f"{path} holds no picture that can be decoded. Choose another file in '{NODE}'.")
        rotation = round(getattr(frame, "rotation", 0) / 90) * 90 % 360
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        width, height = max(round(frame.width * aspect), 1), frame.height
        if rotation % 180:
            width, height = height, width
        bits = max(component.bits for component in frame.format.components)
        notes = []
        if rotation:
            notes.append(f"Turned upright as the file says ({rotation} degrees counterclockwise).")
        if bits > 8:
            notes.append(f"{bits} bits a colour are rounded to 8.")
        curve = HDR_CURVES.get(int(frame.color_trc or UNSPECIFIED))
        if curve:
            notes.append(f"The video is HDR ({curve}); it is not tone mapped, so colours may look flat.")
        return VideoFacts(
            path=path,
            stream=stream.index,
            codec=stream.codec_context.name,
            pixel_format=frame.format.name,
            bits=bits,
            width=width,
            height=height,
            rotation=rotation,
            pixel_aspect=aspect,
            frames=0,
            origin=float(frame.time or 0.0),
            seconds=0.0,
            fps=0.0,
            variable=False,
            timed=True,
            audio=None,
            notes=tuple(notes),
        )


def _timing(facts: VideoFacts, times: array, lengths: array, declared: float | None) -> VideoFacts:
    ordered = sorted(times)
    gaps = [after - before for before, after in zip(ordered, ordered[1:])]
    usual = statistics.median(gaps) if gaps else (lengths[0] or 1 / 30)
    last = declared - ordered[-1] if declared is not None else 0.0
    if last < usual / 2:
        # A packet's own length runs to the next one in decoding order, so it counts only where nothing is reordered.
        last = lengths[-1] if list(times) == ordered else 0.0
    if last < usual / 2:
        last = usual
    seconds = ordered[-1] - ordered[0] + last
    variable = bool(gaps) and max(gaps) - min(gaps) > STEADY_SECONDS
    fps = len(ordered) / seconds if seconds > 0 else 30.0
    notes = facts.notes
    if variable:
        notes += (
            f"Variable frame rate: pictures are shown for {min(gaps) * 1000:.0f} to {max(gaps) * 1000:.0f} ms; they "
            "are put onto a constant rate by their times.",
        )
    return replace(
        facts, frames=len(ordered), origin=ordered[0], seconds=seconds, fps=fps, variable=variable, notes=notes
    )


def _with_audio(facts: VideoFacts) -> VideoFacts:
    """Add the sound if its first packet can be decoded; say so if not."""
    with open_video(facts.path) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            return facts
        name = getattr(stream.codec_context, "name", None) or "unknown"
        try:
            frame = next(container.decode(stream), None)
        except (av.error.FFmpegError, ValueError) as error:
            return replace(facts, notes=(*facts.notes, f"The sound ({name}) is left out: {error}."))
        if frame is None:
            return replace(facts, notes=(*facts.notes, "The sound is left out: the file names it, but holds none."))
        track = AudioTrack(
            path=facts.path,
            stream=stream.index,
            start=0.0,
            stop=facts.seconds,
            origin=facts.origin,
            codec=name,
            rate=frame.sample_rate,
            channels=frame.layout.nb_channels,
        )
        more = len(container.streams.audio) - 1
        notes = (f"Only the first of {more + 1} sound streams is used.",) if more else ()
        return replace(facts, audio=track, notes=facts.notes + notes)


def grid_frames(facts: VideoFacts, fps: float) -> int:
    """Frames the whole video has at a constant rate: its length times the rate, rounded, at least 1."""
    return max(1, round(facts.seconds * float(fps)))
