"""The sound of a source video under a joined one: cut to the sample, kept in step by timestamps, encoded as AAC.

It is encoded again because packets of AAC hold 1024 samples and cannot be cut to an exact length.

Shape suffixes: C channels, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
BIT_RATE_PER_CHANNEL = 96_000
# Samples of one AAC frame.
FRAME = 1024
# Timestamps of sound jitter by a packet; only a longer hole is a hole and is filled with silence.
GAP_SECONDS = 0.05


@dataclass(frozen=True)
class AudioTrack:
    """The sound of `path` from `start` to `stop`, seconds after the first picture of that file (`origin`, its time).

    `stream` is the index of the sound stream among all streams, `codec`, `rate` and `channels` what the file has.
    """

    path: Path
    stream: int
    start: float
    stop: float
    origin: float
    codec: str
    rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return max(self.stop - self.start, 0.0)

    @property
    def out_rate(self) -> int:
        """Samples a second of the AAC stream: the file's, or 48000 where AAC has no such rate."""
        return self.rate if self.rate in AAC_RATES else 48000

    @property
    def out_layout(self) -> str:
        return AAC_LAYOUTS.get(self.channels, "stereo")

    @property
    def samples(self) -> int:
        """Samples per channel of the AAC stream."""
        return round(self.seconds * self.out_rate)

    def between(self, begin: float, end: float) -> AudioTrack | None:
        """The part under [begin, end) seconds of a video that this sound lies under from its start; None without."""
        start, stop = self.start + begin, min(self.stop, self.start + end)
        return replace(self, start=start, stop=stop) if stop > start else None

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples [C,N], `samples` of them."""
        return _exact(self)


@dataclass(frozen=True)
class SoundLine:
    """Sounds one after another under one video, in the format of the first of them; numbers are seconds of silence."""

    parts: tuple[AudioTrack | float, ...]

    @classmethod
    def of(cls, parts: Sequence[AudioTrack | float]) -> SoundLine | None:
        """None where there is nothing but silence."""
        first = next((part for part in parts if isinstance(part, AudioTrack)), None)
        if first is None:
            return None
        alike = [
            replace(part, rate=first.rate, channels=first.channels) if isinstance(part, AudioTrack) else part
            for part in parts
        ]
        return cls(tuple(alike))

    @property
    def seconds(self) -> float:
        """Length with its silences."""
        return sum(part.seconds if isinstance(part, AudioTrack) else part for part in self.parts)

    @property
    def first(self) -> AudioTrack:
        """The first sound; its format is that of all."""
        return next(part for part in self.parts if isinstance(part, AudioTrack))

    @property
    def out_rate(self) -> int:
        """As of AudioTrack."""
        return self.first.out_rate

    @property
    def out_layout(self) -> str:
        """As of AudioTrack."""
        return self.first.out_layout

    def between(self, begin: float, end: float) -> SoundLine | None:
        """As of AudioTrack."""
        at, kept = 0.0, []
        for part in self.parts:
            length = part.seconds if isinstance(part, AudioTrack) else part
            low, high = max(begin - at, 0.0), min(end - at, length)
            if high > low:
                kept.append(part.between(low, high) if isinstance(part, AudioTrack) else high - low)
            at += length
        return SoundLine.of([part for part in kept if part is not None])

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples [C,N] of all parts. Every part begins at the sample nearest to its time, so errors do not add up."""
        silence_C1, given, time = _no_sound(self.out_layout), 0, 0.0
        for part in self.parts:
            time += part.seconds if isinstance(part, AudioTrack) else part
            due = round(time * self.out_rate)
            blocks = part.blocks() if isinstance(part, AudioTrack) else iter(())
            for block_CN in blocks:
                block_CN = block_CN[:, : max(due - given, 0)]
                given += block_CN.shape[1]
                yield block_CN
            yield from _silence(silence_C1, due - given)
            given = max(due, given)


def samples_of(track: AudioTrack | SoundLine) -> np.ndarray:
    """The whole sound as floats [C,N], at `out_rate`."""
    return np.concatenate([np.zeros((len(_no_sound(track.out_layout)), 0), np.float32), *track.blocks()], axis=1)


def add_audio_stream(container, track: AudioTrack | SoundLine):
    """An AAC stream in an output container, as `track` needs it."""
    stream = container.add_stream("aac", rate=track.out_rate, layout=track.out_layout)
    stream.bit_rate = BIT_RATE_PER_CHANNEL * stream.layout.nb_channels
    return stream


def audio_packets(track: AudioTrack | SoundLine, stream) -> Iterator:
    """Encoded packets of exactly the samples of `track`. Memory does not grow with the length."""
    position = 0
    for block_CN in _blocks(track.blocks()):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block_CN), format="fltp", layout=track.out_layout)
        frame.sample_rate, frame.pts, frame.time_base = track.out_rate, position, Fraction(1, track.out_rate)
        position += block_CN.shape[1]
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _exact(track: AudioTrack) -> Iterator[np.ndarray]:
    """Samples [C,N] from sample 0 to `track.samples`: cut at both ends, holes and a short end filled with silence."""
    given, total = 0, track.samples
    silence_C1 = _no_sound(track.out_layout)
    for begin, part_CN in _decoded(track):
        if given >= total:
            break
        if begin - given > GAP_SECONDS * track.out_rate:
            yield from _silence(silence_C1, min(begin, total) - given)
            given = min(begin, total)
        elif given - begin > GAP_SECONDS * track.out_rate or given == 0:
            part_CN = part_CN[:, max(given - begin, 0) :]
        part_CN = part_CN[:, : total - given]
        if part_CN.shape[1]:
            given += part_CN.shape[1]
            yield part_CN
    yield from _silence(silence_C1, total - given)


def _no_sound(layout: str) -> np.ndarray:
    """One silent sample [C,1]."""
    return np.zeros((av.AudioLayout(layout).nb_channels, 1), dtype=np.float32)


def _silence(silence_C1: np.ndarray, samples: int) -> Iterator[np.ndarray]:
    while samples > 0:
        count = min(samples, FRAME)
        yield np.repeat(silence_C1, count, axis=1)
        samples -= count


def _decoded(track: AudioTrack) -> Iterator[tuple[int, np.ndarray]]:
    """(sample number by timestamp, samples [C,N]) of everything near the wanted stretch; resampled."""
    with av.open(str(track.path)) as container:
        stream = container.streams[track.stream]
        resampler = av.AudioResampler(format="fltp", layout=track.out_layout, rate=track.out_rate)
        begin = track.origin + track.start
        if track.start > 1 and stream.time_base:
            container.seek(int((begin - 1) / stream.time_base), stream=stream)
        following = None
        for frame in container.decode(stream):
            time = frame.time  # pyright: ignore[reportAttributeAccessIssue]
            if time is not None and time - begin > track.seconds:
                break
            for part in resampler.resample(frame):
                # A frame without a time follows the one before it.
                at = following if time is None else round((time - begin) * track.out_rate)
                at = 0 if at is None else at
                part_CN = part.to_ndarray()
                following, time = at + part_CN.shape[1], None
                yield at, part_CN
        for part in resampler.resample(None):
            yield following or 0, part.to_ndarray()


def _blocks(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples in blocks of FRAME, the last one shorter."""
    waiting: list[np.ndarray] = []
    count = 0
    for part_CN in parts:
        waiting.append(part_CN)
        count += part_CN.shape[1]
        if count >= FRAME:
            joined_CN = np.concatenate(waiting, axis=1)
            whole = count // FRAME * FRAME
            for start in range(0, whole, FRAME):
                yield joined_CN[:, start : start + FRAME]
            waiting, count = [joined_CN[:, whole:]], count - whole
    if count:
        yield np.concatenate(waiting, axis=1)
