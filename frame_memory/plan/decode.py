"""Which latent frames are decoded together, so that a video of any length is decoded in bounded memory.

Source: framepack reference 3.1 and 3.2 (soft_append). A window [start, stop) of latent frames decodes to pixel frames
4*start to 4*(stop-1), 4n-3 of them, because its first latent frame counts as the first frame of a clip. Each window
overlaps the one before by what one window decodes to, 4*window-3 pixel frames (33), which are blended. Windows of a
video of clips (`frames.py`) lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SAMPLER, PlanError, refusal
from .frames import pixel_frames
from .sections import ORDERS


@dataclass(frozen=True)
class DecodeWindow:
    """Latent frames [start, stop) that are decoded together.

    begin: its first pixel frame where it is a clip of its own; None in a running video.
    """

    start: int
    stop: int
    begin: int | None = None

    @property
    def pixel_start(self) -> int:
        """First pixel frame of the video this window decodes to."""
        return 4 * self.start if self.begin is None else self.begin

    @property
    def pixel_stop(self) -> int:
        """One past the last pixel frame this window decodes to."""
        return self.pixel_start + pixel_frames(self.stop - self.start)

    def counted_from(self, start: int, pixel: int) -> DecodeWindow:
        """The same window of a part of the video that begins with this latent frame and this pixel frame."""
        begin = None if self.begin is None else self.begin - pixel
        return DecodeWindow(self.start - start, self.stop - start, begin)


def decode_windows(order: str, total: int, window: int = 9, clips: bool = False) -> tuple[DecodeWindow, ...]:
    """Windows of a video of `total` latent frames in video order, each at most 2*window+1 latent frames.

    Inverted: the last window is decoded alone, the others 2*window at a time (the first one with frame 0), as the
    reference does while it makes the video from its end. The other orders: the first window+1 latent frames, then
    2*window at a time. CHOICE: 'both ends first' is decoded like 'forward'; a total that is not a multiple of the
    window plus one (an existing video in front) makes the first window longer. clips: each section alone, whatever the
    order, and not the frame in front of them. Raises PlanError.
    """
    if order not in ORDERS:
        raise PlanError(refusal(f"order {order!r}", "one of " + ", ".join(ORDERS), "forward", SAMPLER))
    if window < 1 or total < 1:
        raise PlanError(refusal(f"{total} latent frames in windows of {window}", "at least 1 of both", "1", SAMPLER))
    if clips:
        return _clips(total, window)
    if total <= window + 1:
        return (DecodeWindow(0, total),)
    rest = (total - 1) % window
    # The end of the first window; every later one ends a window further on.
    first = window + 1 + rest
    if order == "inverted" and rest == 0:
        first = 2 * window + 1
    ends = range(first + window, total + 1, window)
    windows = [DecodeWindow(0, first), *(DecodeWindow(end - 2 * window, end) for end in ends)]
    if order == "inverted" and total > 2 * window:
        # The window that was made first; the reference decodes it alone and blends the one before into it.
        windows.append(DecodeWindow(total - window, total))
    return tuple(windows)


def _clips(total: int, window: int) -> tuple[DecodeWindow, ...]:
    if total <= window or (total - 1) % window:
        nearest = 1 + max(round((total - 1) / window), 1) * window
        expected = f"1 and a multiple of {window}: the frame in front, and whole clips, each of which is decoded alone"
        raise PlanError(refusal(f"a video of {total} latent frames", expected, f"{nearest}, uncut", SAMPLER))
    return tuple(DecodeWindow(s, s + window, pixel_frames(s, window)) for s in range(1, total, window))
