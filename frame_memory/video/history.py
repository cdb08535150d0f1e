"""An existing video as the history of a new one: a constant rate by timestamp, upright, fitted, in small uint8 chunks.

Frame k of the result is what a player shows at k / fps. Nothing of the video is held but one chunk and one frame of
the decoder, whatever its length.

Shape suffixes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import islice

import av
import av.error
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image

from ..plan.buckets import BASE, check_size, nearest_bucket
from ..plan.frames import pixel_frames
from .images import fit_frame
from .source import NODE, UNSPECIFIED, HistoryError, VideoFacts, damaged_words, grid_frames, open_video, video_stream

CHUNK_FRAMES = 12
# Beginnings later than this are sought; nearer ones are reached as fast by decoding.
SEEK_SECONDS = 1.0
# Looked at a quarter of a frame after its beginning: rounded times of a 30 fps file never fall into the frame before,
# and of two pictures of a 60 fps file it is always the first.
EARLY = Fraction(1, 4)
# A video that does not name its colour matrix is taken as BT.709 from this height on, as players do, else BT.601.
HD_LINES = 720
ENCODE_LATENTS = 19
# Latent frames of one encode, and how many of them the next one makes again and drops. The shipped VAE's first latent
# frames remember the beginning of the clip: off by 0.03 after 9, by 0.001 after 12, of a standard deviation of 3.9.
ENCODE_SHARED = 12

MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601}
MATRICES |= {7: Colorspace.SMPTE240M, **({9: Colorspace.BT2020} if hasattr(Colorspace, "BT2020") else {})}
# libav's default for YUV with halved colour gives pictures that are 1.2 levels too dark; this rounds to the nearest.
EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


def bucket_size(facts: VideoFacts, base: int = BASE) -> tuple[int, int]:
    """(width, height) of the FramePack bucket nearest to a video."""
    height, width = nearest_bucket(facts.height, facts.width, base)
    return width, height


def read_video(
    facts: VideoFacts,
    wanted: range | None = None,
    *,
    fps: float | Fraction = 30,
    size: tuple[int, int] | None = None,
    chunk_frames: int = CHUNK_FRAMES,
    interrupt: Callable[[], None] | None = None,
    on_grid: bool = True,
) -> Iterator[np.ndarray]:
    """Yield frames `wanted` (None for all) of a video at a constant rate, as uint8 [T,H,W,3] chunks.

    `size` is (width, height), None for the nearest bucket; filled and cut as `to_bucket` does. Both sides must be
    multiples of 16, as the model needs them, unless `on_grid` is False.
    `interrupt()` is called before every chunk. Raises HistoryError, with libav's words, where the file is damaged, and
    PlanError for a size off the grid.
    """
    rate = Fraction(fps).limit_denominator(100_000)
    wanted = range(grid_frames(facts, rate)) if wanted is None else wanted
    if not wanted or wanted.step != 1 or wanted.start < 0:
        raise HistoryError(f"Frames {wanted} of {facts.path.name} were asked for, expected at least one. ({NODE})")
    width, height = bucket_size(facts) if size is None else size
    if on_grid:
        check_size(width, height, NODE)
    return _chunks(facts, wanted, rate, width, height, chunk_frames, interrupt)


def _chunks(facts, wanted, rate, width, height, chunk_frames, interrupt) -> Iterator[np.ndarray]:
    chunk_THWC, filled, left = None, 0, len(wanted)
    source, made_HWC = None, None
    for frame in _on_grid(_timed_frames(facts, wanted.start / rate), wanted, rate):
        if chunk_THWC is None:
            if interrupt is not None:
                interrupt()
            chunk_THWC, filled = np.empty((min(chunk_frames, left), height, width, 3), dtype=np.uint8), 0
        if frame is not source:
            source, made_HWC = frame, fit_frame(_upright(frame, facts), width, height)
        chunk_THWC[filled] = made_HWC  # pyright: ignore[reportCallIssue, reportArgumentType]
        filled, left = filled + 1, left - 1
        if filled == len(chunk_THWC):
            yield chunk_THWC
            chunk_THWC = None


def _on_grid(frames: Iterator[tuple[Fraction, av.VideoFrame]], wanted: range, rate: Fraction) -> Iterator:
    """The picture shown at each wanted frame; the first one stands for a beginning without, the last for the end."""
    shown, k = None, wanted.start
    for time, frame in frames:
        if shown is not None:
            while k < wanted.stop and time > (k + EARLY) / rate:
                yield shown
                k += 1
            if k >= wanted.stop:
                return
        shown = frame
    if shown is None:
        raise HistoryError(f"No picture was found where frames {wanted} should be. Choose another part in '{NODE}'.")
    for _ in range(k, wanted.stop):
        yield shown


def _timed_frames(facts: VideoFacts, begin: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(seconds after the first picture, picture) from the last one at or before `begin` on, or earlier."""
    origin = Fraction(facts.origin).limit_denominator(10**9)
    seeking = facts.timed and begin > SEEK_SECONDS
    with open_video(facts.path) as container:
        stream = video_stream(container, facts.path)
        stream.thread_type = "AUTO"
        if seeking:
            try:
                container.seek(int((origin + begin) / stream.time_base), stream=stream)
            except av.error.FFmpegError:
                seeking = False
        if seeking:
            frames = _decoded(facts, container, stream, origin)
            first = next(frames, None)
            if first is not None and first[0] <= begin:
                yield first
                yield from frames
                return
    # Not every container can be sought, and some land behind the place; from the start it always works.
    with open_video(facts.path) as container:
        stream = video_stream(container, facts.path)
        stream.thread_type = "AUTO"
        yield from _decoded(facts, container, stream, origin)


def _decoded(facts: VideoFacts, container, stream, origin: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    latest, index = Fraction(-1), 0
    try:
        for frame in container.decode(stream):
            if not facts.timed or frame.pts is None:
                time = Fraction(index) / Fraction(facts.fps).limit_denominator(100_000)
            else:
                time = frame.pts * frame.time_base - origin
            index += 1
            if time > latest:
                latest = time
                yield time, frame
    except av.error.FFmpegError as error:
        raise HistoryError(damaged_words(facts.path, float(max(latest, 0)), error)) from error


def _upright(frame: av.VideoFrame, facts: VideoFacts) -> np.ndarray:
    """A decoded picture as RGB uint8 [H,W,3]: right colours, square pixels, turned."""
    options = {}
    if not frame.format.is_rgb:
        matrix = int(frame.colorspace or UNSPECIFIED)
        usual = Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
        options["src_colorspace"] = MATRICES.get(matrix, usual)
    image_HWC = frame.reformat(format="rgb24", interpolation=EXACT, **options).to_ndarray()
    if facts.pixel_aspect != 1:
        width = max(round(frame.width * facts.pixel_aspect), 1)
        stretched = Image.fromarray(image_HWC).resize((width, frame.height), Image.Resampling.LANCZOS)
        image_HWC = np.asarray(stretched)
    return np.ascontiguousarray(np.rot90(image_HWC, facts.rotation // 90))


def latent_frames_of(frames: int) -> int:
    """Latent frames that `frames` pixel frames fill: the n of the largest 4n-3 that fits."""
    return (frames + 3) // 4


def encode_stream(
    vae,
    chunks: Iterable[np.ndarray],
    latent_frames: int,
    *,
    interrupt: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Latents [1,C,n,h,w] of exactly 4n-3 pixel frames that come as uint8 [T,H,W,3] chunks.

    The first latent frame is one picture, every later one four. More than 19 are encoded in groups of 4m-3 pixel frames
    (a causal VAE takes no other count), 19 latent frames each, of which each later group makes 12 again as a run-up and
    drops them. Holds the latents once and the pixel frames of one group, whatever the length. Raises HistoryError where
    fewer come.
    """
    source = (frame_HWC for chunk_THWC in chunks for frame_HWC in chunk_THWC)
    made_BCTHW, held, first, done = None, deque(), 0, 0
    while done < latent_frames:
        if interrupt is not None:
            interrupt()
        start = max(done - ENCODE_SHARED, 0)
        stop = min(start + ENCODE_LATENTS, latent_frames)
        while first < 4 * start:
            held.popleft()
            first += 1
        wanted = pixel_frames(stop - start)
        held.extend(frame_HWC.copy() for frame_HWC in islice(source, wanted - len(held)))
        if len(held) < wanted:
            raise HistoryError(
                f"The video ended after {first + len(held)} frames, {pixel_frames(latent_frames)} were expected. "
                f"Choose another part of it in '{NODE}'."
            )
        group_BCTHW = _encode(vae, list(held))
        if made_BCTHW is None:
            one, channels, _, height, width = group_BCTHW.shape
            made_BCTHW = group_BCTHW.new_empty(one, channels, latent_frames, height, width)
        made_BCTHW[:, :, done:stop] = group_BCTHW[:, :, done - start :]
        done = stop
    assert made_BCTHW is not None
    return made_BCTHW


def _encode(vae, frames: list[np.ndarray]) -> torch.Tensor:
    """One causal group of 4m-3 frames through core's `VAE.encode`, which reads a batch of pictures as time."""
    pixels_THWC = torch.from_numpy(np.stack(frames)).float().div_(255)
    latents_BCTHW = vae.encode(pixels_THWC)
    expected = latent_frames_of(len(frames))
    if latents_BCTHW.ndim != 5 or tuple(latents_BCTHW.shape[:3:2]) != (1, expected):
        raise HistoryError(
            f"The VAE made {tuple(latents_BCTHW.shape)} of {len(frames)} frames, expected [1, channels, {expected}, "
            "height, width]. Use the video VAE of the model in 'Load VAE'."
        )
    return latents_BCTHW
