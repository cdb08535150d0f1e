"""Windowed decode that keeps pace with the sampler: a stretch of video as soon as its latents exist.

The same windows and the same crossfade as `decode_stream`, so the same pixels, bit for bit. The video is walked in one
direction: from its end for order 'inverted', whose sections are made from the end, from its start for the others. The
overlap that the next window will be blended into is all that is kept between two calls.

Shape suffixes: B batch, C latent or colour channels, T time, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..plan.decode import DecodeWindow, decode_windows
from .decode import DecodeError, DecodeFn, check_windows, crossfade_weights, decode_window, overlap_frames

INVERTED = "inverted"


@dataclass(frozen=True)
class PieceRange:
    """Pixel frames [start_frame, stop_frame) that become final together, and the latent frames that decide them."""

    start_frame: int
    stop_frame: int
    latent_start: int
    latent_stop: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Pixel frames [start_frame, stop_frame) of the video, float32 [T,H,W,C] in 0..1. Never changed afterwards."""

    start_frame: int
    stop_frame: int
    frames_THWC: torch.Tensor


def plan_pieces(order: str, total_latent_frames: int, window: int = 9, clips: bool = False) -> tuple[PieceRange, ...]:
    """How a video is cut into pieces: in video order, without gaps. Depends on nothing but its arguments.

    Cut where a blend begins in the direction of the walk, so that every piece but the outermost has 4 * window frames.
    clips: each section is a clip and a piece of its own.
    """
    windows = decode_windows(order, total_latent_frames, window, clips)
    return tuple(piece for piece in _pieces_of(windows, order == INVERTED) if piece is not None)


def _pieces_of(windows: tuple[DecodeWindow, ...], backward: bool) -> list[PieceRange | None]:
    """The piece that becomes final with each window; None where a window only lends its overlap."""
    found: list[PieceRange | None] = []
    for i, window in enumerate(windows):
        first, last = windows[max(i - 1, 0)], windows[min(i + 1, len(windows) - 1)]
        if window.begin is not None:
            found.append(PieceRange(window.pixel_start, window.pixel_stop, window.start, window.stop))
            continue
        if backward:
            start, stop = (first.pixel_stop if i else 0), window.pixel_stop
            decides = window.start, last.stop
        else:
            start, stop = window.pixel_start, (window.pixel_stop if last is window else last.pixel_start)
            decides = first.start, window.stop
        found.append(PieceRange(start, stop, *decides) if stop > start else None)
    return found


class StreamDecoder:
    """Incremental twin of `decode_stream`, fed by the latent frames that exist.

    `decode_fn(latents [1,C,t,H,W]) -> [1,4t-3,H,W,C]` gives its result away: it is blended in place. `latents(start,
    stop)` returns latent frames of the video as [1,C,t,H,W] and is only asked for frames that were reported.
    `have` are pixel ranges that need not be made again (after a restart): pieces wholly inside one are skipped, and
    windows that only they need are not decoded. `interrupt()` is called before every window; `on_window()` after it.
    `clips`: each section is a clip of its own, and nothing is blended.

    At most two windows of float pixels are alive: the one being decoded, and one overlap (33 frames at window 9).
    Raises PlanError for an order or length that has no windows, DecodeError for wrong shapes.
    """

    def __init__(
        self,
        decode_fn: DecodeFn,
        order: str,
        total_latent_frames: int,
        window: int,
        latents: Callable[[int, int], torch.Tensor],
        *,
        clips: bool = False,
        have: Iterable[tuple[int, int]] = (),
        interrupt: Callable[[], None] | None = None,
        on_window: Callable[[], None] | None = None,
    ) -> None:
        self.total = total_latent_frames
        self.windows = decode_windows(order, total_latent_frames, window, clips)
        check_windows(self.windows, total_latent_frames)
        self._decode_fn, self._latents = decode_fn, latents
        self._interrupt, self._on_window = interrupt, on_window
        self._backward = order == INVERTED
        self._pieces = _pieces_of(self.windows, self._backward)
        ranges = [(int(start), int(stop)) for start, stop in have]
        self._skip = [
            piece is None or any(start <= piece.start_frame and piece.stop_frame <= stop for start, stop in ranges)
            for piece in self._pieces
        ]
        count = len(self.windows)
        self._walk = range(count - 1, -1, -1) if self._backward else range(count)
        self._at = 0
        self._exists = bytearray(total_latent_frames)
        self._kept: tuple[int, torch.Tensor] | None = None

    @property
    def pieces(self) -> tuple[PieceRange, ...]:
        """All pieces of the video in video order, those of `have` too."""
        return tuple(piece for piece in self._pieces if piece is not None)

    @property
    def frames(self) -> int:
        """Pixel frames of the whole video."""
        return self.windows[-1].pixel_stop

    @property
    def done(self) -> bool:
        """Whether every piece has been handed out, or was there before."""
        return self._at == len(self._walk)

    def finished(self, start: int, stop: int) -> Iterator[Piece]:
        """Say that latent frames [start, stop) exist; the pieces that become final, one at a time.

        In walking order: ascending, for 'inverted' descending. The frames are noted at once, the decoding happens as
        the iterator is advanced; what is not taken now comes with a later call. Drop each piece before the next.
        """
        if not 0 <= start <= stop <= self.total:
            raise DecodeError(
                f"Latent frames {start} to {stop} were reported finished, but the video has 0 to {self.total}."
            )
        self._exists[start:stop] = b"\1" * (stop - start)
        return self._advance()

    def edge(self) -> Piece | None:
        """The kept overlap as it stands: what follows the last piece as long as nothing more exists.

        Not final: the next window will be blended over it. Pieces and edge together are what `decode_stream` makes of
        the latents that exist so far. None before the first window, and once the video is complete.
        """
        if self._at == 0 or self.done:
            return None
        index = self._walk[self._at - 1]
        if not self._shared(index, self._following(index)):
            return None
        overlap_THWC = self._overlap_of(index)
        start = self.windows[index if self._backward else index + 1].pixel_start
        return Piece(start, start + overlap_THWC.shape[0], overlap_THWC)

    def _advance(self) -> Iterator[Piece]:
        while not self.done:
            index = self._walk[self._at]
            window = self.windows[index]
            if not all(self._exists[window.start : window.stop]):
                return
            made = self._pieces[index]
            if self._skip[index] or made is None:
                self._at += 1
                continue
            frames_THWC = self._final_pixels(index)
            self._at += 1
            yield Piece(made.start_frame, made.stop_frame, frames_THWC)
            del frames_THWC

    def _final_pixels(self, index: int) -> torch.Tensor:
        """Decode a window, blend the neighbour's overlap into it, keep the overlap for the next one."""
        neighbour = index + 1 if self._backward else index - 1
        kept_THWC = self._overlap_of(neighbour) if self._shared(index, neighbour) else None
        pixels_THWC = self._decode(index)
        with torch.inference_mode():  # what core decodes is an inference tensor, which may be changed in here only
            if kept_THWC is not None:
                self._kept = None
                _blend_in(pixels_THWC, kept_THWC, self._backward)
            del kept_THWC
            self._keep(index, pixels_THWC)
        made = self._pieces[index]
        assert made is not None
        begin = made.start_frame - self.windows[index].pixel_start
        return pixels_THWC[begin : begin + made.stop_frame - made.start_frame]

    def _overlap_of(self, index: int) -> torch.Tensor:
        """The overlap that window `index` lends to the next one of the walk; decoded again after a restart."""
        if self._kept is None or self._kept[0] != index:
            self._kept = None
            self._keep(index, self._decode(index))
        assert self._kept is not None
        return self._kept[1]

    def _keep(self, index: int, pixels_THWC: torch.Tensor) -> None:
        shared = self._shared(index, self._following(index))
        if not shared:
            self._kept = None
            return
        part_THWC = pixels_THWC[:shared] if self._backward else pixels_THWC[-shared:]
        # A view would keep the whole window alive while the next one is decoded.
        self._kept = index, part_THWC.clone()

    def _following(self, index: int) -> int:
        return index - 1 if self._backward else index + 1

    def _shared(self, index: int, other: int) -> int:
        """Pixel frames that a window shares with a neighbour; 0 where there is none."""
        if not 0 <= other < len(self.windows):
            return 0
        return overlap_frames(self.windows[min(index, other)], self.windows[max(index, other)])

    def _decode(self, index: int) -> torch.Tensor:
        if self._interrupt is not None:
            self._interrupt()
        window = self.windows[index]
        latents_BCTHW = self._latents(window.start, window.stop)
        length = window.stop - window.start
        if latents_BCTHW.ndim != 5 or latents_BCTHW.shape[0] != 1 or latents_BCTHW.shape[2] != length:
            raise DecodeError(
                f"Latent frames {window.start} to {window.stop} came as {tuple(latents_BCTHW.shape)}, "
                f"expected [1, channels, {length}, height, width]."
            )
        pixels_THWC = decode_window(self._decode_fn, latents_BCTHW)
        if self._on_window is not None:
            self._on_window()
        return pixels_THWC


def _blend_in(pixels_THWC: torch.Tensor, kept_THWC: torch.Tensor, backward: bool) -> None:
    """Crossfade `kept` into the end of `pixels` it overlaps, in place and without further memory. Spends `kept`."""
    shared = kept_THWC.shape[0]
    w_T111 = crossfade_weights(shared, device=pixels_THWC.device).view(-1, 1, 1, 1)
    if backward:
        pixels_THWC[-shared:].mul_(w_T111)
        pixels_THWC[-shared:].add_(kept_THWC.mul_(1 - w_T111))
    else:
        pixels_THWC[:shared].mul_(1 - w_T111)
        pixels_THWC[:shared].add_(kept_THWC.mul_(w_T111))
