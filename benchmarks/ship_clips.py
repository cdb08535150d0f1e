"""Draw the videos that example graphs start from: `python scripts/run.py -m benchmarks.ship_clips`.

For workflows/extend_and_bridge.json two short ones of one scene of the world, with a hole of two sections that the
graph fills. The first has a tone for sound. For workflows/frame_preservation_selftest.json two folders of long ones
with their captions: some to learn from, and others to ask for; who comes there is told by neither caption nor first
picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .long_world import random_long_scene
from .long_world import render as render_long
from .quality import MODELS
from .ship_selftest import START
from .world import render

# From the left edge on, so that the circle does not turn before the second video begins.
SCENE = replace(START, x=13.0)
FPS = 30
BEFORE, AFTER = range(61), range(133, 182)
FILES = {"frame_memory_before.mp4": BEFORE, "frame_memory_after.mp4": AFTER}
SOUND_RATE, SOUND_BITS = 22050, 24_000
VIDEOS = MODELS.parent / "selftest_videos"
# Folders of captioned videos: how many, the seed of their scenes, and what is sure of them.
FOLDERS = {
    "frame_memory_videos": (8, 0, {}),
    "frame_memory_other_videos": (2, 1, {"shown": False, "named": False}),
}
# The first picture and 8 sections: the visitor comes, leaves, and comes back.
LONG = range(1 + 8 * 36)


def pictures(frames: range) -> np.ndarray:
    """uint8 [T,H,W,3] of the scene."""
    return (render(SCENE, np.array(frames)) * 255).round().astype(np.uint8)


def tone(seconds: float) -> np.ndarray:
    """Float samples [1,N] of a tone that rises from 220 to 440 Hz."""
    at = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    pitch = 220 * (1 + at / seconds / 2)
    return (0.25 * np.sin(2 * np.pi * pitch * at)).astype(np.float32)[None]


def write(path: Path, images_THWC: np.ndarray, sound: bool = False, crf: int = 12) -> None:
    """One video, H.264, with AAC."""
    with av.open(str(path), mode="w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "veryslow"})
        stream.height, stream.width = images_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        heard = out.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound else None
        if heard is not None:
            heard.bit_rate = SOUND_BITS
        for number, image in enumerate(images_THWC):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if heard is not None:
            frame = av.AudioFrame.from_ndarray(tone(len(images_THWC) / FPS), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
            out.mux(heard.encode(frame))
            out.mux(heard.encode(None))


def write_folder(folder: Path, count: int, seed: int, sure: Mapping[str, bool]) -> None:
    """Videos of so many long scenes, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(1, count + 1):
        scene = random_long_scene(rng, **sure)
        path = folder / f"{number}.mp4"
        write(path, (render_long(scene, np.array(LONG)) * 255).round().astype(np.uint8), crf=18)
        path.with_suffix(".txt").write_text(f"{scene.caption}\n", encoding="utf-8")
        print(f"{folder.name}/{path.name}: {len(LONG)} frames, {path.stat().st_size} bytes. {scene.caption}")


def main() -> None:
    for name, frames in FILES.items():
        write(MODELS / name, pictures(frames), sound=frames is BEFORE)
        print(f"{name}: {len(frames)} frames, {(MODELS / name).stat().st_size} bytes. {SCENE.caption}")
    for name, (count, seed, sure) in FOLDERS.items():
        write_folder(VIDEOS / name, count, seed, sure)


if __name__ == "__main__":
    main()
