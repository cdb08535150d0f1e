"""Memory in the plan: how many tokens it takes, and where the image stands when its true distance counts.

Source: memorypack reference 2.2 (tokens) and 2.4 (positions). Distances are in latent frames.
"""

from __future__ import annotations

from dataclasses import replace

from .frames import START
from .sections import ContextGroup, Section
from .tokens import group_tokens

# A token of the memory stands for so many latent frames, and for twice as many latent rows and columns.
MEMORY_RATE = 4
# FramePack-F1 was trained with the image this far before the window, and never nearer.
TRAINED_DISTANCE = 20
# CHOICE: one period of the slowest rotary frequency in time (theta 256, 16 numbers) is about 805 latent frames, and a
# farther image would look like a nearer one.
FARTHEST_DISTANCE = 800


def memory_tokens(frames: int, latent_height: int, latent_width: int) -> int:
    """Tokens that a clip of so many latent frames leaves in the memory: 312 for 9 frames of 60x104."""
    return group_tokens(frames, MEMORY_RATE, latent_height, latent_width)


def image_distance(frames: int) -> int:
    """How far before the window the image stands that is `frames` latent frames away: within both guards."""
    return min(max(TRAINED_DISTANCE, frames), FARTHEST_DISTANCE)


def with_true_image(section: Section, image: int = START) -> Section:
    """The section with its image as far from the window as it is in the video; all other positions stay.

    image: the latent frame that stands in the image's place, START for the start picture (frame 0). Frames of its group
    keep their distance to it. Rotary positions are relative, so they may be negative.
    """
    target = section.positions[0] - image_distance(section.start - max(image, 0))

    def moved(group: ContextGroup) -> ContextGroup:
        # The same frame may stand in the newest history too; the image's place is the first on the time axis.
        if image not in group.frames or group.positions[0] != 0:
            return group
        shift = target - group.positions[group.frames.index(image)]
        return replace(group, positions=tuple(position + shift for position in group.positions))

    return replace(section, groups=tuple(moved(group) for group in section.groups))


def given_clips(frames: int, window: int) -> tuple[tuple[int, int], ...]:
    """Clips `[start, stop)` of an existing video of `frames` latent frames, in order of time, without its first frame.

    All are as long as a window but the first, which takes what is left over: so the memory always ends with a clip of
    the length that it was trained on.
    """
    left = (frames - 1) % window
    starts = range(1 + left, frames, window)
    return (((1, 1 + left),) if left else ()) + tuple((start, start + window) for start in starts)
