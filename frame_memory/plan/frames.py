"""Latent frames and pixel frames, and the names of frames that are not in the video.

Latent frame 0 is pixel frame 0; latent frame f > 0 is pixel frames 4f-3 to 4f (a causal video autoencoder with
temporal factor 4).
"""

from __future__ import annotations

START, END, BLANK = -1, -2, -3


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip of latent frames: 4n-3, and 0 for 0."""
    return 4 * latent_frames - 3 if latent_frames > 0 else 0


def nearest_clip(frames: int, least: int = 5) -> int:
    """The number of pixel frames nearest to this one that a causal video autoencoder can hold: 4n + 1, n > 0."""
    return max(4 * round((frames - 1) / 4) + 1, least)


def pixel_span(start: int, stop: int) -> tuple[int, int]:
    """First and last pixel frame, both inclusive, of the latent frames [start, stop) of a video."""
    return max(4 * start - 3, 0), 4 * (stop - 1)


def runs(frames: tuple[int, ...]) -> list[tuple[int, int]]:
    """Contiguous runs of ascending frame numbers as [start, stop) pairs; sentinels stand alone as (s, s)."""
    found: list[tuple[int, int]] = []
    for frame in frames:
        if frame < 0:
            if not found or found[-1] != (frame, frame):
                found.append((frame, frame))
        elif found and found[-1][0] >= 0 and found[-1][1] == frame:
            found[-1] = (found[-1][0], frame + 1)
        else:
            found.append((frame, frame + 1))
    return found
