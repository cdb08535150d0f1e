"""A written video as ffprobe sees it: another reader than the one that is used in the pack."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from scripts import ffprobe
from scripts.host import in_ci

BT709 = ("bt709", "bt709", "bt709", "tv")


@dataclass(frozen=True)
class Probed:
    """The streams of a file. `frames` were counted by decoding them all, `listed` is what the container says.

    `colour` is (primaries, transfer curve, matrix, range). Times in seconds. `audio` is (codec, sample rate, channels,
    seconds), None without sound. `words` is all that ffprobe had to say while it decoded.
    """

    frames: int
    listed: int
    fps: Fraction
    steady_fps: Fraction
    pixel_format: str
    colour: tuple[str | None, ...]
    size: tuple[int, int]
    codec: str
    start: float
    seconds: float
    audio: tuple[str, int, int, float] | None
    tags: dict[str, str]
    words: str


def probe(path: Path) -> Probed:
    """Ask ffprobe. Skips the test where there is none; never in CI."""
    program = ffprobe.find()
    if program is None:
        give_up = pytest.fail if in_ci() else pytest.skip
        give_up("There is no ffprobe here; install FFmpeg, or name one in FRAME_MEMORY_FFPROBE.")
    line = [program, "-v", "warning", "-count_frames", "-show_streams", "-show_format", "-of", "json", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, f"ffprobe cannot read {path.name}: {done.stderr}"
    told = json.loads(done.stdout)
    videos = [s for s in told["streams"] if s["codec_type"] == "video"]
    sounds = [s for s in told["streams"] if s["codec_type"] == "audio"]
    assert len(videos) == 1 and len(sounds) <= 1, "one stream of pictures, and one of sound at most"
    (video,) = videos
    audio = None
    if sounds:
        sound = sounds[0]
        audio = (sound["codec_name"], int(sound["sample_rate"]), sound["channels"], float(sound["duration"]))
    return Probed(
        frames=int(video["nb_read_frames"]),
        listed=int(video.get("nb_frames", 0)),
        fps=Fraction(video["avg_frame_rate"]),
        steady_fps=Fraction(video["r_frame_rate"]),
        pixel_format=video["pix_fmt"],
        colour=tuple(video.get(f"color_{k}") for k in ("primaries", "transfer", "space", "range")),
        size=(video["width"], video["height"]),
        codec=video["codec_name"],
        start=float(video["start_time"]),
        seconds=float(video.get("duration") or told["format"]["duration"]),
        audio=audio,
        tags=told["format"].get("tags", {}),
        words=done.stderr,
    )


def check_video(
    path: Path, frames: int, fps, size: tuple[int, int], *, silent: bool = True, within: float = 1e-5
) -> Probed:
    """What every mp4 of the pack promises: frames, exact rate, yuv420p, BT.709, H.264; silent: no complaint.

    within: seconds by which the length may be off; core's Save Video writes it in whole milliseconds.
    """
    seen = probe(path)
    rate = Fraction(fps)
    assert (seen.frames, seen.listed, seen.fps, seen.steady_fps) == (frames, frames, rate, rate)
    assert (seen.codec, seen.pixel_format, seen.colour, seen.size) == ("h264", "yuv420p", BT709, size)
    assert seen.start == 0 and seen.seconds == pytest.approx(float(frames / rate), abs=within)
    assert seen.words == "" or not silent
    return seen
