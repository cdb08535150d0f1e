"""Video files as people really have them, made with PyAV, whose every frame says its own number.

The number is written as a row of eight black or white blocks at the top, most significant bit left, and the lower
half has a colour of its own: red left, blue right. So a test can tell which frame it got, and whether it is upright.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8


def numbered_frame(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """RGB [H,W,3] of frame `number` (0 to 255)."""
    image = np.full((height, width, 3), 110, dtype=np.uint8)
    image[height // 2 :, : width // 2] = (200, 30, 30)
    image[height // 2 :, width // 2 :] = (30, 30, 200)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[: height // 4, left:right] = 235 if number >> (BITS - 1 - bit) & 1 else 20
    return image


def number_of(image: np.ndarray) -> int:
    """The number in a frame that `numbered_frame` made, whatever its size is now."""
    height, width = image.shape[:2]
    row = image[height // 12 : max(height // 6, height // 12 + 1)].astype(float).mean(axis=(0, 2))
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return int("".join("1" if row[x] > 120 else "0" for x in centres), 2)


def is_upright(image: np.ndarray) -> bool:
    """Whether red is at the lower left and blue at the lower right."""
    height, width = image.shape[:2]
    left, right = image[height * 3 // 4, width // 4].astype(int), image[height * 3 // 4, width * 3 // 4].astype(int)
    return left[0] > 150 > left[2] and right[2] > 150 > right[0]


def write_video(
    path: Path,
    times_ms: list[int],
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    audio_seconds: float | None = None,
    options: dict | None = None,
    container_options: dict | None = None,
    frames: list[np.ndarray] | None = None,
) -> Path:
    """A file whose frame i is numbered i and shown at `times_ms[i]`; a last gap repeats the one before it."""
    with av.open(str(path), mode="w", options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream("aac", rate=44100, layout="mono") if audio_seconds else None
        for index, time in enumerate(times_ms):
            image = numbered_frame(index % 256, *size) if frames is None else frames[index]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            after = times_ms[index + 1] - time if index + 1 < len(times_ms) else time - times_ms[index - 1]
            frame.duration = after if len(times_ms) > 1 else 33
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
        if sound is not None:
            mux_tone(out, sound, audio_seconds)
    return path


def mux_tone(out, stream, seconds: float, rate: int = 44100) -> None:
    """A tone that is 440 Hz in the first half and 1000 Hz in the second."""
    samples = tone(seconds, rate)
    for start in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for packet in stream.encode(frame):
            out.mux(packet)
    for packet in stream.encode(None):
        out.mux(packet)


def tone(seconds: float, rate: int = 44100) -> np.ndarray:
    """Float samples [N] of the tone."""
    at = np.arange(round(seconds * rate)) / rate
    pitch = np.where(at < seconds / 2, 440.0, 1000.0)
    return (0.5 * np.sin(2 * np.pi * pitch * at)).astype(np.float32)


def read_sound(path: Path) -> tuple[np.ndarray, int, float]:
    """(samples [N] of the first channel, rate, time of the first sample) as a player hears them."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    return samples, frames[0].sample_rate, float(frames[0].time)


def pitch_of(samples: np.ndarray, rate: int) -> float:
    """Strongest frequency, Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))
