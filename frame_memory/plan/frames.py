"""Latent frames and pixel frames, and the names of frames that are not in the video.

Latent frame 0 is pixel frame 0; latent frame f > 0 is pixel frames 4f-3 to 4f (a causal video autoencoder with
temporal factor 4). A video of clips is another thing: every `clip` latent frames are decoded alone, as a clip of their
own (4*clip-3 pixel frames), and latent frame 0 in front of them is not shown (Helios: diffusers 0.39,
pipelines/helios).
"""

from __future__ import annotations

START, END, BLANK = -1, -2, -3


def pixel_frames(latent_frames: int, clip: int = 0) -> int:
    """Pixel frames of the first latent frames of a video: 4n-3, and 0 for 0.

    clip: latent frames of each clip of a video of clips, 0 for a running video.
    """
    if clip and latent_frames > 0:
        clips, rest = divmod(latent_frames - 1, clip)
        return clips * pixel_frames(clip) + pixel_frames(rest)
    return 4 * latent_frames - 3 if latent_frames > 0 else 0


def section_frames(window: int, clips: bool = False) -> int:
    """Pixel frames that a section adds to a video: 4 for each latent frame, of a clip 3 fewer."""
    return pixel_frames(window) if clips else 4 * window


def nearest_clip(frames: int, least: int = 5) -> int:
    """The number of pixel frames nearest to this one that a causal video autoencoder can hold: 4n + 1, n > 0."""
    return max(4 * round((frames - 1) / 4) + 1, least)


def pixel_span(start: int, stop: int, clip: int = 0) -> tuple[int, int]:
    """First and last pixel frame, both inclusive, of the latent frames [start, stop) of a video (of clips)."""
    return pixel_frames(start, clip), pixel_frames(stop, clip) - 1


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
