"""Draw the two short videos of workflows/extend_and_bridge.json: `python scripts/run.py -m benchmarks.ship_clips`.

One scene of the world, with a hole of two sections that the graph fills. The first video has a tone for sound.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .quality import MODELS
from .ship_selftest import START
from .world import render

# From the left edge on, so that the circle does not turn before the second video begins.
SCENE = replace(START, x=13.0)
FPS = 30
BEFORE, AFTER = range(61), range(133, 182)
FILES = {"frame_memory_before.mp4": BEFORE, "frame_memory_after.mp4": AFTER}
SOUND_RATE, SOUND_BITS = 22050, 24_000


def pictures(frames: range) -> np.ndarray:
    """uint8 [T,H,W,3] of the scene."""
    return (render(SCENE, np.array(frames)) * 255).round().astype(np.uint8)


def tone(seconds: float) -> np.ndarray:
    """Float samples [1,N] of a tone that rises from 220 to 440 Hz."""
    at = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    pitch = 220 * (1 + at / seconds / 2)
    return (0.25 * np.sin(2 * np.pi * pitch * at)).astype(np.float32)[None]


def write(path: Path, frames: range, sound: bool) -> None:
    """One video, H.264, with AAC."""
    with av.open(str(path), mode="w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "veryslow"})
        stream.height, stream.width = pictures(frames[:1]).shape[1:3]
        stream.pix_fmt = "yuv420p"
        heard = out.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound else None
        if heard is not None:
            heard.bit_rate = SOUND_BITS
        for number, image in enumerate(pictures(frames)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if heard is not None:
            frame = av.AudioFrame.from_ndarray(tone(len(frames) / FPS), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
            out.mux(heard.encode(frame))
            out.mux(heard.encode(None))


def main() -> None:
    for name, frames in FILES.items():
        write(MODELS / name, frames, sound=frames is BEFORE)
        print(f"{name}: {len(frames)} frames, {(MODELS / name).stat().st_size} bytes. {SCENE.caption}")


if __name__ == "__main__":
    main()
