"""From a LATENT to a file: the checks, then decode and encode hand in hand.

Shape suffixes: B batch, C channels, T time, H height, W width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from ..model.sources import LOADERS
from ..plan.decode import DecodeWindow, decode_windows
from ..plan.mark import LatentMark, read_mark, resolve_fps
from .beside import Beside
from .carried import CarriedDecoder, can_carry, steps
from .decode import DecodeError, LatentSource, decode_stream
from .ladder import DecodeLadder
from .vae import VAEIdentity, check_vae
from .writer import DEFAULT_CRF, NODE, VideoWriter, WrittenVideo

log = logging.getLogger(__name__)

CARRIED = "carried"
WINDOWED = "windowed"
WHOLE = "whole"
MODES = (CARRIED, WINDOWED, WHOLE)


@dataclass(frozen=True, eq=False)
class LookedAt:
    """A latent tensor as a LatentSource that refuses NaN and Inf in the frames that are asked for."""

    latents_BCTHW: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[B,C,T,H,W]"""
        return tuple(self.latents_BCTHW.shape)

    def frames(self, item: int, start: int, stop: int) -> torch.Tensor:
        """Latent frames [start, stop) of one video as a view [1,C,t,H,W]. Raises DecodeError."""
        frames_BCTHW = self.latents_BCTHW[item : item + 1, :, start:stop]
        if not bool(torch.isfinite(frames_BCTHW).all()):
            raise DecodeError(
                f"The latent at the socket 'samples' of '{NODE}' holds NaN or Inf in latent frames {start} to {stop}, "
                "which would be saved as black. The sampling broke: try another attention backend or weight dtype in "
                f"{LOADERS}."
            )
        return frames_BCTHW


@dataclass(frozen=True)
class SavePlan:
    """Everything that is known before the first frame is decoded. Owns no copy of the latents.

    `mode` is how it will be decoded: CARRIED only where the VAE allows it. `windows` are those of the other modes.
    """

    latents_BCTHW: LatentSource
    mark: LatentMark | None
    vae: VAEIdentity
    mode: str
    windows: tuple[DecodeWindow, ...]
    fps: Fraction
    width: int
    height: int

    @property
    def videos(self) -> int:
        return self.latents_BCTHW.shape[0]

    @property
    def frames(self) -> int:
        """Pixel frames of each video: 4n-3 of n latent frames, those of all clips of a video of clips."""
        return self.windows[-1].pixel_stop - self.windows[0].pixel_start

    @property
    def steps(self) -> int:
        """Decode steps of each video, after which `on_window` is called."""
        return steps(self.latents_BCTHW.shape[2]) if self.mode == CARRIED else len(self.windows)


def video_latents(samples: Mapping) -> torch.Tensor | LatentSource:
    """The latents [B,C,T,H,W] of a LATENT dict; of a LATENT with sound, the pictures. Raises DecodeError.

    Looks at none of the numbers: ten minutes of them may lie on disk. A source in the place of the tensor is passed on.
    """
    latents = samples["samples"]
    if getattr(latents, "is_nested", False):
        latents = latents.unbind()[0]
    if not isinstance(latents, torch.Tensor):
        return latents
    if latents.ndim != 5:
        raise DecodeError(
            f"The socket 'samples' of '{NODE}' got a latent of shape {tuple(latents.shape)}, expected a video latent "
            "[videos, channels, frames, height, width]. For pictures use the node 'VAE Decode'."
        )
    if 0 in latents.shape:
        raise DecodeError(f"The socket 'samples' of '{NODE}' got an empty latent of shape {tuple(latents.shape)}.")
    return latents


def plan_save(
    vae,
    samples: Mapping,
    fps: float | Fraction = 0,
    mode: str = CARRIED,
    windows: tuple[DecodeWindow, ...] | None = None,
) -> SavePlan:
    """Check a LATENT against a VAE and a frame rate, and choose how to decode it. Decodes nothing.

    `mode` "carried" goes from front to back with carried state, and is "windowed" for a VAE that cannot. "windowed"
    follows the order in which the latent was made (its mark says so; without one: forward), "whole" decodes all of it
    in one pass; a video of clips goes clip by clip in all of them. windows: those of mode "windowed" where the latent
    is a part of a longer video. Raises DecodeError, MarkError, VAEError or PlanError.
    """
    if mode not in MODES:
        raise DecodeError(f"decode in '{NODE}' is \"{mode}\", expected one of: {', '.join(MODES)}.")
    mark = read_mark(samples)
    rate = resolve_fps(mark, fps)
    latents_BCTHW = video_latents(samples)
    found = check_vae(vae, latents_BCTHW, mark)
    total = latents_BCTHW.shape[2]
    clips = mark is not None and mark.clips
    if clips or (mode == CARRIED and not can_carry(vae)):
        mode = WINDOWED
    if mode != WINDOWED:
        windows = (DecodeWindow(0, total),)
    elif windows is None:
        order, window = ("forward", 9) if mark is None else (mark.order, mark.window)
        windows = decode_windows(order, total, window, clips)
    return SavePlan(
        latents_BCTHW=LookedAt(latents_BCTHW) if isinstance(latents_BCTHW, torch.Tensor) else latents_BCTHW,
        mark=mark,
        vae=found,
        mode=mode,
        windows=windows,
        fps=rate,
        width=latents_BCTHW.shape[4] * found.spatial,
        height=latents_BCTHW.shape[3] * found.spatial,
    )


def save_video(
    plan: SavePlan,
    vae,
    path: str | os.PathLike,
    *,
    item: int = 0,
    crf: float = DEFAULT_CRF,
    metadata: Mapping | None = None,
    interrupt: Callable[[], None] | None = None,
    on_window: Callable[[int, int], None] | None = None,
    look: Callable[[int, torch.Tensor], None] = lambda *_: None,
    announce: Callable[[str], None] = log.warning,
) -> WrittenVideo:
    """Decode one video of a plan step by step and write it as it comes; at most three windows are held as floats.

    What is decoded is encoded beside the decode of what follows, on a thread of its own: a CPU's work hides behind a
    GPU's. look: gets (first frame number, float pixels [T,H,W,C]) of everything that is written, in order, on that
    thread; it keeps none of it. on_window: gets (done, count) after each of the plan's steps. announce: gets a
    sentence for every rung of the ladder that an out-of-memory decode goes down (see DecodeLadder). NaN is looked for
    in each piece before its decode. Raises VideoWriteError, DecodeError, and whatever the VAE, `look` or `interrupt`
    raises; decoded frames are then kept (see VideoWriter).
    """
    stream = pixels_of(plan, vae, item, interrupt, on_window, announce)
    writer = VideoWriter(
        path, plan.width, plan.height, plan.fps, crf=crf, metadata=metadata, expected_frames=plan.frames
    )

    def encode(first: int, chunk_THWC: torch.Tensor) -> None:
        writer.write(chunk_THWC)
        look(first, chunk_THWC)

    with writer, Beside("encoding") as beside:
        first = 0
        for chunk_THWC in stream:
            # With --gpu-only each look at pixels on the GPU would wait for what is decoded meanwhile.
            beside.give(partial(encode, first, chunk_THWC.cpu()))
            first += len(chunk_THWC)
            del chunk_THWC
    assert writer.result is not None
    for warning in warnings(writer.result):
        log.warning("%s: %s", writer.result.path.name, warning)
    return writer.result


def pixels_of(
    plan: SavePlan, vae, item: int, interrupt, on_window, announce: Callable[[str], None] = log.warning
) -> Iterator[torch.Tensor]:
    """One video's pixels as `save_video` writes them, [T,H,W,3] floats a few at a time, in order of time."""
    if plan.mode == CARRIED:
        carried = CarriedDecoder(vae, announce)
        return carried.stream(plan.latents_BCTHW, item=item, interrupt=interrupt, on_step=on_window)
    decode = DecodeLadder(vae, announce)
    return decode_stream(decode, plan.latents_BCTHW, plan.windows, item=item, interrupt=interrupt, on_window=on_window)


def warnings(written: WrittenVideo) -> tuple[str, ...]:
    """What is wrong with a finished file, in plain sentences."""
    if not written.black_frames:
        return ()
    first = written.black_frames[0]
    return (
        f"{len(written.black_frames)} of {written.frames} frames are black, the first one at "
        f"{float(first / written.fps):.2f} s.",
    )


def describe(plan: SavePlan, written: WrittenVideo, announced: Sequence[str] = ()) -> str:
    """What was saved and how, for the artist. `announced` are the sentences of the ladder."""
    order = f", order {plan.mark.order}" if plan.mark is not None else ""
    if plan.mode == CARRIED:
        how = "frame after frame with carried state"
    else:
        how = ("in one pass" if len(plan.windows) == 1 else f"in {len(plan.windows)} windows") + order
    lines = [
        str(written.path),
        f"{written.frames} frames, {written.seconds:.2f} s at {float(written.fps):g} fps, "
        f"{written.width}x{written.height}",
        f"decoded {how} with {plan.vae}",
        *announced,
        *(f"Warning: {text}" for text in warnings(written)),
    ]
    return "\n".join(lines)
