"""From an existing video to what the sampler goes on from: history, start, and the end of a bridge.

Shape legend: B batch, C latent channels, T time, H W pixels, h w latent pixels; sound: C channels, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import Input
from torch import Tensor

from ..plan.buckets import MULTIPLE, nearest_bucket, nearest_valid
from ..plan.frames import pixel_frames
from ..plan.mark import DEFAULT_FPS, KEY, fps_of
from .audio import samples_of
from .clips import Clip, describe_clip, describe_sound, fitting, open_clip
from .history import encode_stream, latent_frames_of, read_video
from .source import NODE
from .start_image import encode_pictures
from .vae import check_video_vae

# Latent frames that the published schedules look back at most (framepack reference 3.1, 3.2).
SEEN_LATENTS = 19


@dataclass(frozen=True)
class Continuation:
    """What `Video History` gives. history, start, end: LATENT dicts, end and end_picture None without a bridge.

    audio: an AUDIO dict exactly as long as the history's pictures, None without sound. overlap: those pictures.
    """

    history: dict
    start: dict
    end: dict | None
    picture_BHWC: Tensor
    end_picture_BHWC: Tensor | None
    audio: dict | None
    overlap: int
    report: str


def latents_for(seconds: float, available: int, fps: float = DEFAULT_FPS) -> int:
    """Latent frames of history for a wish in seconds: one, and one more for every 4 frames; 0 s means all there are."""
    wanted = available if seconds == 0 else 1 + round(seconds * fps / 4)
    return min(wanted, available)


def size_for(clip: Clip, base: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """(width, height): the bucket of side `base` nearest to the clip's shape; 0 for its own size on the grid."""
    if base == 0:
        return nearest_valid(clip.facts.width, clip.facts.height, multiple)
    height, width = nearest_bucket(clip.facts.height, clip.facts.width, base, multiple)
    return width, height


def prepare(
    vae, video: Input.Video, seconds: float, base: int, folder: Path, *, bridge_to: Input.Video | None = None,
    interrupt: Callable[[], None] | None = None,
) -> Continuation:  # fmt: skip
    """Read the end of `video` and the first picture of `bridge_to`; encode both at one size.

    Raises HistoryError for files that cannot be read, VAEError for a VAE of pictures. Only 73 frames are held as
    pixels, whatever the length.
    """
    found = check_video_vae(vae)
    fps = fps_of(found.family)
    clip = open_clip(video, Fraction(fps), folder, NODE)
    target = None if bridge_to is None else open_clip(bridge_to, clip.fps, folder, NODE)
    width, height = size_for(clip, base, 2 * found.spatial)
    count = latents_for(seconds, latent_frames_of(len(clip.frames)), fps)
    used = clip.last(pixel_frames(count))
    last = _Last(read_video(clip.facts, used, fps=clip.fps, size=(width, height), interrupt=interrupt))
    history = encode_stream(vae, last, count, interrupt=interrupt)
    assert last.frame_HWC is not None  # encode_stream raises where no frame comes
    picture_BHWC = _as_image(last.frame_HWC)
    start = encode_pictures(vae, picture_BHWC)
    end = end_picture_BHWC = None
    if target is not None:
        first = range(target.frames.start, target.frames.start + 1)
        end_picture_BHWC = _as_image(next(read_video(target.facts, first, fps=clip.fps, size=(width, height)))[0])
        end = encode_pictures(vae, end_picture_BHWC)
    line = clip.sound_line(used)
    audio = None
    if line is not None:
        audio = {"waveform": torch.from_numpy(samples_of(line))[None], "sample_rate": line.out_rate}
    mark = {**start[KEY], "fps": float(clip.fps)}
    report = _report(clip, target, used, count, (width, height), line is not None)
    return Continuation(
        {"samples": history, KEY: mark}, start, end, picture_BHWC, end_picture_BHWC, audio, len(used), report
    )


class _Last:
    """Passes chunks [T,H,W,C] on and remembers the last frame."""

    def __init__(self, chunks: Iterable[np.ndarray]):
        self.chunks = chunks
        self.frame_HWC: np.ndarray | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        for chunk_THWC in self.chunks:
            self.frame_HWC = chunk_THWC[-1].copy()
            yield chunk_THWC


def _as_image(frame_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(frame_HWC.copy()).float().div_(255)[None]


def _report(clip: Clip, target: Clip | None, used: range, count: int, size: tuple[int, int], heard: bool) -> str:
    """Few lines: the editor shows about ten of them."""
    begin, end = float(used.start / clip.fps), float(used.stop / clip.fps)
    left = len(clip.frames) - len(used)
    lines = [
        f"History: {begin:.2f} to {end:.2f} s, {len(used)} frames = {count} latent frames."
        + (f" The {left} frames before are kept by 'Join Videos'." if left else ""),
        *_mapped(clip, size),
    ]
    sound = f"Sound: {describe_sound(clip)}."
    if heard:
        sound += f" 'audio' is the history's, {end - begin:.3f} s; 'Join Videos' carries all."
    lines.append(sound)
    if target is not None:
        at = float(target.frames.start / target.fps)
        lines.append(f"Bridge: the new part ends with the picture at {at:.2f} s of the second video (F0 only).")
        lines += _mapped(target, size)
        lines.append(f"Sound: {describe_sound(target)}.")
    if count < SEEN_LATENTS:
        lines.append(f"F1 looks back at {SEEN_LATENTS} latent frames: the missing ones are blank to it.")
    return "\n".join(sorted(lines, key=lambda line: not line.startswith("Warning")))


def _mapped(clip: Clip, size: tuple[int, int]) -> list[str]:
    """One line on a clip and what becomes of its pictures; a warning about them stands alone."""
    fits = fitting(clip, *size)
    if fits.startswith("Warning"):
        return [" ".join(describe_clip(clip)), f"{fits} ({clip.facts.path.name})"]
    return [" ".join([*describe_clip(clip), fits])]
