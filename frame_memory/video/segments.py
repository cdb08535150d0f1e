"""Finished stretches of video as files of their own, and one mp4 of them without encoding again.

Every segment starts with a key frame and refers to nothing outside itself, and all are made by the same encoder with
the same settings, so their packets can follow each other in one stream.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np

from ..plan.mark import as_fps
from .audio import AudioTrack, SoundLine, add_audio_stream, audio_packets
from .files import full_words, put_in_place, reserve_part
from .stream import Piece
from .writer import DEFAULT_CRF, VideoWriteError, VideoWriter, WrittenVideo, lacking

# How far x264 moves a frame forward in decoding order with its reference B-frames; decode times begin this early.
REORDER_FRAMES = 2
# Bytes of a second of sound at 512 kbit/s.
SOUND_BYTES = 64_000
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
MOV_FLAGS = "use_metadata_tags+negative_cts_offsets"
# Takes nearly every stream: tried where another container refuses the join.
LAST_RESORT = ".mkv"
FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class SegmentError(VideoWriteError):
    """Segments that cannot be joined. They stay; the message names their folder, the cause, and what to change."""


@dataclass(frozen=True)
class Segment:
    """One segment file: pixel frames [start_frame, stop_frame) of the video. Plain values, so that JSON holds it.

    `fps` is an exact fraction as text. `black_frames` are frame numbers of the video. `key` is the maker's own: what
    decided the pixels.
    """

    name: str
    start_frame: int
    stop_frame: int
    bytes: int
    sha256: str
    width: int
    height: int
    fps: str
    crf: float
    black_frames: tuple[int, ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "black_frames", tuple(self.black_frames))  # JSON gives a list

    @property
    def frames(self) -> int:
        return self.stop_frame - self.start_frame

    def as_dict(self) -> dict:
        """For the manifest; `Segment(**values)` reads it back."""
        return asdict(self)


def segment_name(start_frame: int, stop_frame: int) -> str:
    """File name of the segment of pixel frames [start_frame, stop_frame); names sort in video order."""
    return f"{start_frame:07d}-{stop_frame:07d}.mp4"


def write_segment(
    folder: Path, piece: Piece, fps: Fraction | float | int, *, crf: float = DEFAULT_CRF, key: str = ""
) -> Segment:
    """Encode a piece as a file of its own in `folder`, whole or not at all, with the settings of VideoWriter.

    Replaces a segment of the same range. Raises VideoWriteError for NaN and failed writes; black is let through here,
    since one dark stretch is no fault; `join_segments` refuses a video that is black throughout.
    """
    frames_THWC = piece.frames_THWC
    height, width = frames_THWC.shape[1:3]
    path = Path(folder) / segment_name(piece.start_frame, piece.stop_frame)
    writer = VideoWriter(path, width, height, fps, crf=crf, allow_black=True, expected_frames=len(frames_THWC))
    try:
        with writer:
            writer.write(frames_THWC)
    except BaseException:
        # What is torn can be decoded again from its latents; a leftover would only take room on a full disk.
        if writer.kept_path is not None:
            writer.kept_path.unlink(missing_ok=True)
        raise
    length, digest = _length_and_hash(path)
    black = tuple(piece.start_frame + frame for frame in writer.black_frames)
    return Segment(
        path.name, piece.start_frame, piece.stop_frame, length, digest, width, height, str(writer.fps), crf, black, key
    )


def _length_and_hash(path: Path) -> tuple[int, str]:
    digest, length = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            length += len(block)
    return length, digest.hexdigest()


def segment_problem(folder: Path, segment: Segment) -> str | None:
    """None if the file is there with the recorded length and hash, else the reason in words."""
    path = Path(folder) / segment.name
    try:
        if path.stat().st_size != segment.bytes:
            return f"{segment.name} has {path.stat().st_size} bytes, expected {segment.bytes}"
        if _length_and_hash(path)[1] != segment.sha256:
            return f"{segment.name} was changed since it was written (its hash differs)"
    except OSError as error:
        return f"{segment.name} cannot be read: {error.strerror or error}"
    return None


def read_segment(folder: Path, segment: Segment, chunk_frames: int = 12) -> Iterator[tuple[int, np.ndarray]]:
    """(first frame number, uint8 [T,H,W,3]) of a segment's frames, a few at a time."""
    first, waiting = segment.start_frame, []
    with av.open(str(Path(folder) / segment.name)) as container:
        for frame in container.decode(video=0):
            waiting.append(frame.to_ndarray(format="rgb24"))
            if len(waiting) == chunk_frames:
                yield first, np.stack(waiting)
                first, waiting = first + chunk_frames, []
    if waiting:
        yield first, np.stack(waiting)


def join_segments(
    folder: Path,
    segments: Sequence[Segment],
    path: Path,
    fps: Fraction | float | int,
    metadata: Mapping | None = None,
    audio: AudioTrack | SoundLine | None = None,
    *,
    allow_black: bool = False,
    announce: Callable[[str], None] | None = None,
) -> WrittenVideo:
    """Put segments of `folder` into one file at `path`, in video order, packet by packet, without encoding again.

    The segments may be any gapless stretch of the video; its first frame gets time 0, every frame the exact duration
    1/fps. `path` ends in .mp4, .mov or .mkv (which rounds times to 1 ms). The file appears under its name when it is
    complete. `audio` is laid under it in video time: sound of frame 0 is its start, and a stretch that begins later
    takes what belongs to it. `metadata` as VideoWriter takes it. Memory does not grow with the length.
    `announce`: where it is given, a join that the muxer refuses is tried once more as .mkv beside `path`, and it gets
    a sentence about that; the path of the result is the one that was written.
    Raises SegmentError; the segments stay, nothing else is left behind.
    """
    folder, path, rate = Path(folder), Path(path), as_fps(fps)
    ordered = sorted(segments, key=lambda segment: segment.start_frame)
    _check_joinable(folder, ordered, rate, path, allow_black)
    if audio is not None:
        audio = audio.between(float(ordered[0].start_frame / rate), float(ordered[-1].stop_frame / rate))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(folder, ordered, path, audio)
        _join(folder, ordered, path, rate, metadata or {}, audio)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        other = None if announce is None else _other_container(folder, ordered, path, rate, metadata, audio, error)
        if announce is None or other is None:
            raise _join_error(folder, path, error, _needed(ordered, audio)) from error
        announce(f"{path.name} could not be joined ({error}), so the same video was written as {other}.")
        path = other
    first = ordered[0]
    black = tuple(frame - first.start_frame for segment in ordered for frame in segment.black_frames)
    return WrittenVideo(path, first.width, first.height, ordered[-1].stop_frame - first.start_frame, rate, black)


def _join(folder: Path, ordered: list[Segment], path: Path, rate: Fraction, metadata: Mapping, audio) -> None:
    """The file whole, or not at all."""
    part = reserve_part(path)
    try:
        _mux(folder, ordered, part, rate, metadata, audio)
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def _other_container(folder, ordered, path: Path, rate, metadata, audio, error: Exception) -> Path | None:
    """Where the join was written as .mkv instead; None where that does not help, or fails too."""
    other = path.with_suffix(LAST_RESORT)
    if other == path or _cause(error) is not None:
        return None
    try:
        _join(folder, ordered, other, rate, metadata or {}, audio)
    except (av.error.FFmpegError, OSError, ValueError) as again:
        log.warning("%s could not be joined either: %s", other.name, again)
        return None
    return other


def _needed(ordered: list[Segment], audio: AudioTrack | SoundLine | None) -> int:
    """Bytes of a joined file: its segments, and its sound at a rate that none will have."""
    sound = audio.seconds * SOUND_BYTES if audio is not None else 0
    return sum(segment.bytes for segment in ordered) + int(sound)


def _check_room(folder: Path, ordered: list[Segment], path: Path, audio: AudioTrack | None) -> None:
    lack = lacking(path.parent, _needed(ordered, audio))
    if lack is not None:
        raise SegmentError(
            f"The disk of {path.parent} is nearly full: {path.name} {lack}. Nothing was written. The segments stay in "
            f"{folder}, and each of them plays. Free some space and queue again: nothing is sampled or decoded again."
        )


def _check_joinable(folder: Path, ordered: list[Segment], rate: Fraction, path: Path, allow_black: bool) -> None:
    stays = f"The segments stay in {folder}."
    if not ordered:
        raise SegmentError(f"There are no finished segments in {folder}, so there is no video to join yet.")
    if path.suffix.lower() not in CONTAINERS:
        raise SegmentError(f"The file name is {path.name}, expected one that ends in {', '.join(CONTAINERS)}. {stays}")
    for before, after in zip(ordered, ordered[1:]):
        if before.stop_frame != after.start_frame:
            raise SegmentError(
                f"{before.name} ends before frame {before.stop_frame} and {after.name} begins at {after.start_frame}; "
                f"segments must follow each other. {stays} Queue again to make what is missing."
            )
    first = ordered[0]
    for segment in ordered:
        if (segment.width, segment.height, Fraction(segment.fps)) != (first.width, first.height, rate):
            raise SegmentError(
                f"{segment.name} is {segment.width}x{segment.height} at {segment.fps} fps, expected "
                f"{first.width}x{first.height} at {rate} fps. {stays} Choose another project name for other settings."
            )
    if not allow_black and all(len(segment.black_frames) == segment.frames for segment in ordered):
        raise SegmentError(
            "All frames are black, so this is not saved as a finished video. Usual causes: an attention backend or "
            f"fp16 that overflowed, or a VAE that does not belong to the model. {stays}"
        )


def _mux(
    folder: Path,
    ordered: list[Segment],
    part: Path,
    rate: Fraction,
    metadata: Mapping,
    audio: AudioTrack | SoundLine | None,
) -> None:
    kind = CONTAINERS[part.suffix.lower()]
    options = {} if kind == "matroska" else {"movflags": MOV_FLAGS, "movie_timescale": "90000"}
    with av.open(str(part), mode="w", format=kind, options=options) as out:
        for key, value in metadata.items():
            out.metadata[key] = value if isinstance(value, str) else json.dumps(value)
        with av.open(str(folder / ordered[0].name)) as source:
            template = source.streams.video[0]
            stream = out.add_stream_from_template(template)
            stream.time_base = template.time_base
            settings = bytes(template.codec_context.extradata or b"")
        sound = add_audio_stream(out, audio) if audio is not None else None
        packets = iter(()) if sound is None else audio_packets(audio, sound)
        waiting = next(packets, None)
        for packet in _joined_packets(folder, ordered, rate, settings):
            # libav holds back what is ahead of the other stream, so both must advance together.
            while waiting is not None and waiting.dts * waiting.time_base <= packet.dts * packet.time_base:
                out.mux(waiting)
                waiting = next(packets, None)
            packet.stream = stream
            out.mux(packet)
        while waiting is not None:
            out.mux(waiting)
            waiting = next(packets, None)


def _joined_packets(folder: Path, ordered: list[Segment], rate: Fraction, settings: bytes) -> Iterator:
    """Video packets of all segments in decoding order, timed in whole frames from the first one on."""
    index, origin = 0, ordered[0].start_frame
    for segment in ordered:
        with av.open(str(folder / segment.name)) as source:
            stream = source.streams.video[0]
            if bytes(stream.codec_context.extradata or b"") != settings:
                raise ValueError(f"{segment.name} was made by another encoder or with other settings")
            count = 0
            for packet in source.demux(stream):
                if packet.pts is None:
                    continue
                frame = round(packet.pts * packet.time_base * rate)
                packet.time_base = 1 / rate
                packet.pts, packet.dts = segment.start_frame - origin + frame, index - REORDER_FRAMES
                packet.duration = 1
                index, count = index + 1, count + 1
                yield packet
        if count != segment.frames:
            raise ValueError(f"{segment.name} holds {count} frames, expected {segment.frames}")


def _cause(error: BaseException) -> int | None:
    """ENOSPC for a full disk, EACCES for a file that is in use or protected; None for other causes.

    Closing a file after a failed write fails as well, so what came first is looked at too.
    """
    step: BaseException | None = error
    while step is not None:
        if getattr(step, "errno", None) in FULL:
            return errno.ENOSPC
        if isinstance(step, PermissionError):
            return errno.EACCES
        step = step.__context__
    return None


def _join_error(folder: Path, path: Path, error: Exception, needed: int) -> SegmentError:
    again = "queue again: nothing is sampled or decoded again."
    kind = _cause(error)
    if kind == errno.ENOSPC:
        cause = f"{full_words(path.parent)}, so {path.name}, of about {needed} bytes, could not be joined."
        remedy = f"Free some space and {again}"
    elif kind == errno.EACCES:
        cause = f"{path} may not be replaced: a player has it open, or its folder is protected ({error})."
        remedy = f"Close the player, or choose a folder that may be written to, and {again}"
    else:
        cause = f"Joining {path.name} failed. The muxer's words: {error}."
        remedy = "Queue again: a damaged segment is made anew, the others are reused."
    return SegmentError(f"{cause} The segments stay in {folder}, and each of them plays. {remedy}")
