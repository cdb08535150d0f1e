"""What lies on a VIDEO socket, as a file and the part of it that counts, on a constant rate.

Shape suffixes: none; no pixels here.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from comfy_api.latest import Input, InputImpl

from .audio import AudioTrack, SoundLine
from .source import HistoryError, VideoFacts, grid_frames, probe_video

# Quality at which pictures that other nodes hand over as VIDEO are put into a file first: below what the eye sees.
SPOOL_CRF = 10
# A share of the picture whose loss at the edges an artist would not expect.
MUCH_CUT = 0.25


@dataclass(frozen=True)
class Clip:
    """A stretch of a video file: its frame numbers at `fps`, where frame k is what a player shows after k / fps s.

    trimmed: a node before has cut the video, so `frames` are not all of the file's.
    """

    facts: VideoFacts
    fps: Fraction
    frames: range
    trimmed: bool = False

    @property
    def seconds(self) -> float:
        return float(len(self.frames) / self.fps)

    def last(self, count: int) -> range:
        """Its last frames; all of them where it has fewer."""
        return self.frames[-min(count, len(self.frames)) :]

    def sound(self, frames: range) -> list[AudioTrack | float]:
        """What is heard under some of its frames, exactly as long as they are: sound, and silence after its end."""
        seconds = float(len(frames) / self.fps)
        track = self.facts.sound(float(frames.start / self.fps), float(frames.stop / self.fps))
        heard = 0.0 if track is None else track.seconds
        return [part for part in (track, seconds - heard) if part is not None and part != 0.0]

    def sound_line(self, frames: range) -> SoundLine | None:
        """The same as one sound; None for a video without."""
        return SoundLine.of(self.sound(frames))


def open_clip(video: Input.Video, fps: Fraction, folder: Path, node: str) -> Clip:
    """The file behind a VIDEO, and the part of it that a Trim Video before has left.

    folder: for videos that are no file yet. Raises HistoryError for files without video and for an empty part.
    """
    start, length = video.get_active_trim_window()
    facts = probe_video(file_of(video, folder))
    every = range(grid_frames(facts, fps))
    first = round(start * fps)
    frames = every[first : first + max(round(length * fps), 1)] if length > 0 else every[first:]
    if not frames:
        raise HistoryError(
            f"'{node}' got a part of {facts.path.name} from {start:.2f} s on, but the video has {facts.seconds:.2f} s. "
            "Change the node that trims it, 'Trim Video'."
        )
    return Clip(facts, fps, frames, trimmed=len(frames) < len(every))


def file_of(video: Input.Video, folder: Path) -> Path:
    """The file of a VIDEO; where it lies in memory, a copy of it in `folder`."""
    if not isinstance(video, InputImpl.VideoFromFile):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="frame_memory_", suffix=".mp4", dir=folder)
        os.close(handle)
        video.save_to(name, crf=SPOOL_CRF)
        return Path(name)
    source = video.get_stream_source()
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    data = source.getbuffer()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"frame_memory_{hashlib.sha256(data).hexdigest()[:16]}.video"
    if not path.exists() or path.stat().st_size != len(data):
        path.write_bytes(data)
    return path


def describe_clip(clip: Clip) -> list[str]:
    """What an artist must know of a source, plain sentences."""
    facts = clip.facts
    rate = f"{facts.fps:.3f}".rstrip("0").rstrip(".")
    lines = [
        f"{facts.path.name}: {facts.width}x{facts.height}, {facts.codec} {facts.bits} bit, {rate} fps, "
        f"{facts.seconds:.2f} s, {facts.frames} frames."
    ]
    if clip.trimmed:
        begin, end = float(clip.frames.start / clip.fps), float(clip.frames.stop / clip.fps)
        lines.append(f"Used from {begin:.2f} to {end:.2f} s, as it was trimmed.")
    lines += facts.notes
    lines.append(_mapping(clip))
    return lines


def _mapping(clip: Clip) -> str:
    """How the pictures of the file become those of the constant rate."""
    facts, rate = clip.facts, f"{float(clip.fps):g}"
    if not facts.variable and abs(facts.fps - clip.fps) < 0.02:
        return f"One picture a frame at {rate} fps."
    kind = "left out" if facts.fps > clip.fps else "shown twice"
    return (
        f"Put onto {rate} fps by time: frame k is what a player shows at k/{rate} s, so some pictures are {kind}. "
        "The speed stays."
    )


def describe_sound(clip: Clip) -> str:
    """What there is to hear in a source."""
    track = clip.facts.audio
    if track is not None:
        return f"{track.codec}, {track.rate} Hz, {track.channels} channel{'s' * (track.channels != 1)}"
    if any("sound" in note and "left out" in note for note in clip.facts.notes):
        return "there, but dropped: it cannot be decoded"
    return "none in the file"


def fitting(clip: Clip, width: int, height: int) -> str:
    """What scaling to a size does to a picture of this clip, in words; a warning where much of it is lost."""
    facts = clip.facts
    if (facts.width, facts.height) == (width, height):
        return f"Size {width}x{height} kept."
    scale = max(width / facts.width, height / facts.height)
    cut = 1 - width * height / (scale * facts.width * scale * facts.height)
    words = f"Scaled from {facts.width}x{facts.height} to {width}x{height}"
    if cut > MUCH_CUT:
        return f"Warning: {words} loses {cut:.0%} of the picture at its edges: crop it yourself before."
    return f"{words}, {cut:.1%} cut off at the edge." if cut > 0.001 else f"{words}, nothing cut off."
