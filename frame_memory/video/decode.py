"""Windowed VAE decode with a crossfade, one window at a time, in video order.

FramePack decodes a long video in overlapping windows, because a causal video VAE treats the first latent frame of
whatever it is given as the first frame of a video (reference framepack.md 3.1 and 3.2). Neighbouring windows share
9 latent frames, whose 33 pixel frames are crossfaded. The published code does this in the order in which sections
are made, by prepending (F0) or appending (F1) to one growing tensor. No pixel frame ever lies in more than two
windows, so the same pixels come out of one pass in video order that holds two windows at most.

Shape suffixes: B batch, C latent or colour channels, T time, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

# Pixel frames per latent frame, after the first latent frame which is one pixel frame.
TEMPORAL_RATIO = 4


class DecodeError(ValueError):
    """A latent, a list of windows or a VAE result that cannot become a video. The message names the node to change."""


class Window(Protocol):
    """Latent frames [start, stop) decoded together; `frame_memory.plan.decode.DecodeWindow` is one.

    begin: its first pixel frame where it is a clip of its own, beside which others lie; None in a running video.
    """

    start: int
    stop: int
    begin: int | None


DecodeFn = Callable[[torch.Tensor], torch.Tensor]


class LatentSource(Protocol):
    """A video latent that does not lie in memory: read from files, a few frames at a time."""

    # [B,C,T,H,W]
    shape: tuple[int, ...]

    def frames(self, item: int, start: int, stop: int) -> torch.Tensor:
        """Latent frames [start, stop) of one video of the batch, [1,C,t,H,W]."""
        ...


def latent_reader(latents: torch.Tensor | LatentSource, item: int) -> Callable[[int, int], torch.Tensor]:
    """`read(start, stop)` for one video's latent frames [1,C,t,H,W]; of a tensor it gives views."""
    if isinstance(latents, torch.Tensor):
        return lambda start, stop: latents[item : item + 1, :, start:stop]
    return lambda start, stop: latents.frames(item, start, stop)


def crossfade_weights(frames: int, *, device: torch.device | None = None) -> torch.Tensor:
    """Weights of the earlier window over `frames` shared pixel frames: 1 to 0, both ends included. Shape [frames]."""
    return torch.linspace(1.0, 0.0, frames, device=device)


def overlap_frames(earlier: Window, later: Window) -> int:
    """Pixel frames that two neighbouring windows share: 33 for the 9 latent frames of the reference, none of clips."""
    shared = earlier.stop - later.start
    return TEMPORAL_RATIO * shared - (TEMPORAL_RATIO - 1) if shared else 0


def check_windows(windows: Sequence[Window], total: int) -> None:
    """Raise DecodeError unless `windows` cover latent frames [0, total) in video order with crossfades that are apart.

    Every window must share at least one latent frame with its neighbour (a causal VAE makes 3 pixel frames too few
    otherwise), and none with the window after its neighbour (a frame would be blended twice, and order would matter).
    Clips lie side by side instead; a frame in front of them is not decoded.
    """
    if not windows:
        raise DecodeError("No decode windows were given; expected at least one.")
    clips = all(window.begin is not None for window in windows)
    if windows[0].start > clips or windows[-1].stop != total:
        raise DecodeError(
            f"The decode windows cover latent frames {windows[0].start} to {windows[-1].stop}, "
            f"expected 0 to {total}, the length of the latent."
        )
    for i, window in enumerate(windows):
        if window.stop <= window.start:
            raise DecodeError(f"Decode window {i} is empty: {window.start} to {window.stop}.")
        if clips and (not i or window.start == windows[i - 1].stop):
            continue
        # The last window may end where the one before it does: F0 makes it first and blends over all of it.
        if i and not windows[i - 1].start < window.start < windows[i - 1].stop <= window.stop:
            raise DecodeError(
                f"Decode window {i} ({window.start} to {window.stop}) must begin inside window {i - 1} "
                f"({windows[i - 1].start} to {windows[i - 1].stop}) and not end before it."
            )
        if i > 1 and window.start < windows[i - 2].stop:
            raise DecodeError(
                f"Decode windows {i - 2} and {i} share latent frames; only neighbouring windows may overlap."
            )


def decode_window(decode_fn: DecodeFn, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Pixels of one window `latents [1,C,t,H,W]` as float32 [4t-3,H,W,C]; DecodeError for any other frame count."""
    pixels_BTHWC = decode_fn(latents_BCTHW)
    check_pixels(pixels_BTHWC, latents_BCTHW.shape[2])
    return pixels_BTHWC[0].float()


def check_pixels(pixels_BTHWC: torch.Tensor, latent_frames: int, expected: int | None = None) -> None:
    """Raise DecodeError unless a decode has the frame count of a 4x causal VAE: [1, 4t-3, height, width, colours].

    `expected` pixel frames instead where the latent frames do not begin a clip.
    """
    if expected is None:
        expected = TEMPORAL_RATIO * latent_frames - (TEMPORAL_RATIO - 1)
    if pixels_BTHWC.ndim != 5 or tuple(pixels_BTHWC.shape[:2]) != (1, expected):
        raise DecodeError(
            f"The VAE made a tensor of shape {tuple(pixels_BTHWC.shape)} from {latent_frames} latent frames; "
            f"expected [1, {expected}, height, width, colours], as a video VAE with 4 pixel frames per latent frame "
            "makes. Change the file in the node 'Load VAE'."
        )


def decode_stream(
    decode_fn: DecodeFn,
    latents_BCTHW: torch.Tensor | LatentSource,
    windows: Sequence[Window],
    *,
    item: int | None = None,
    interrupt: Callable[[], None] | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield one video's pixels as finished float32 chunks [T,H,W,C], 0..1, in video order.

    Each window is decoded once, by `decode_fn(latents [1,C,t,H,W]) -> [1,4t-3,H,W,C]` (core's `VAE.decode` is one).
    Shared frames are `w * earlier + (1 - w) * later` with `w` from `crossfade_weights`. Chunk borders mean nothing.
    At most two windows of pixels are alive at a time, provided the caller drops each chunk before the next.

    `item` picks a video of a batch and may be left out for a batch of one. `interrupt()` is called before every
    window and stops the decode by raising. `on_window(done, count)` is called after every decoded window.
    Raises DecodeError at once, before anything is decoded, for bad shapes or windows.
    """
    if len(latents_BCTHW.shape) != 5:
        raise DecodeError(
            f"Expected a video latent with 5 dimensions [batch, channels, frames, height, width], "
            f"got {len(latents_BCTHW.shape)}: {tuple(latents_BCTHW.shape)}."
        )
    batch, _, total = latents_BCTHW.shape[:3]
    if item is None:
        if batch != 1:
            raise DecodeError(f"The latent holds {batch} videos; say which one to decode with `item`.")
        item = 0
    if not 0 <= item < batch:
        raise DecodeError(f"Video {item} was asked for, but the latent holds {batch} (counted from 0).")
    check_windows(windows, total)
    return _blend(decode_fn, latent_reader(latents_BCTHW, item), tuple(windows), interrupt, on_window)


def _blend(
    decode_fn: DecodeFn,
    read: Callable[[int, int], torch.Tensor],
    windows: tuple[Window, ...],
    interrupt: Callable[[], None] | None,
    on_window: Callable[[int, int], None] | None,
) -> Iterator[torch.Tensor]:
    tail_THWC: torch.Tensor | None = None
    for i, window in enumerate(windows):
        if interrupt is not None:
            interrupt()
        pixels_THWC = decode_window(decode_fn, read(window.start, window.stop))
        if on_window is not None:
            on_window(i + 1, len(windows))
        head = 0
        if tail_THWC is not None:
            head = tail_THWC.shape[0]
            w_T111 = crossfade_weights(head, device=pixels_THWC.device).view(-1, 1, 1, 1)
            with torch.inference_mode():  # the tail may be an inference tensor, which is changed in here only
                blended_THWC = tail_THWC.mul_(w_T111).add_((1 - w_T111) * pixels_THWC[:head])
            tail_THWC = None
            yield blended_THWC
            del blended_THWC
        held = overlap_frames(window, windows[i + 1]) if i + 1 < len(windows) else 0
        stop = pixels_THWC.shape[0] - held
        # A view would keep the whole window alive while the next one is decoded.
        if stop > head:
            yield pixels_THWC[head:stop].clone() if held else pixels_THWC[head:]
        tail_THWC = pixels_THWC[stop:].clone() if held else None
        del pixels_THWC
