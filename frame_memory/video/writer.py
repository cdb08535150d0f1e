"""Writing a video file as its frames come, with PyAV.

H.264, yuv420p, BT.709 limited range, mp4. The file has a temporary name until it is complete. While it is written it
is a fragmented mp4, so even a killed process leaves what was finished playable; closing turns it into a plain mp4.

Shape suffixes: T time, H height, W width, C colour channels (3, RGB).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.logging
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ..model.sources import LOADERS
from ..plan.mark import as_fps
from .files import full_words, put_in_place, reserve_part
from .fragments import cut_to_finished

NODE = "Save Long Video"
# ITU-T H.273 code for BT.709, the same number for primaries, transfer curve and matrix.
BT709 = 1
DEFAULT_CRF = 18
# A frame is called black when no 8-bit value in it is above this.
BLACK_LEVEL = 2
# A key frame, and so a playable fragment, at least this often: one FramePack section.
GOP_SECONDS = 1.2
DISK_MARGIN = 16 * 2**20
# Frames converted to 8 bits together: each takes its size in floats once more.
CONVERTED_FRAMES = 4

log = logging.getLogger(__name__)


class VideoWriteError(RuntimeError):
    """A video that could not be written. The message names the cause, what was kept and where, and what to change."""


@dataclass(frozen=True)
class WrittenVideo:
    """A finished file: `seconds` is exact (`frames / fps`), `black_frames` are frame numbers from 0."""

    path: Path
    width: int
    height: int
    frames: int
    fps: Fraction
    black_frames: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return float(self.frames / self.fps)


def estimate_bytes(width: int, height: int, frames: int, crf: float = DEFAULT_CRF) -> int:
    """Generous size of an H.264 file: 0.15 bytes a pixel at crf 18 (grainy video), halved for every 6 steps of crf."""
    return int(0.15 * width * height * frames * 2 ** ((DEFAULT_CRF - crf) / 6))


def check_size(width: int, height: int) -> None:
    """Raise VideoWriteError, with the nearest even size, for sizes that yuv420p cannot hold."""
    if width < 2 or height < 2 or width % 2 or height % 2:
        even = tuple(max(2, side + side % 2) for side in (width, height))
        raise VideoWriteError(
            f"The video is {width}x{height}; H.264 needs even sides. Nearest: {even[0]}x{even[1]}. "
            "Change the size in the node that made the latent or image."
        )


def check_disk(path: Path, width: int, height: int, frames: int, crf: float = DEFAULT_CRF) -> None:
    """Raise VideoWriteError if the disk of `path` has less room than `frames` frames are likely to need."""
    needed = estimate_bytes(width, height, frames, crf) + DISK_MARGIN
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise VideoWriteError(
            f"The disk of {path.parent} has {in_bytes(free)} free, and {frames} frames of {width}x{height} may need "
            f"{in_bytes(needed)}. Nothing was written. Free some space, or raise crf in '{NODE}' (6 more halves it)."
        )


def lacking(folder: Path, needed: int) -> str | None:
    """Words for a disk with less than `needed` bytes and a margin free; None where there is room, or nobody knows."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        log.debug("free space of %s is not known: %s", folder, error)
        return None
    if free >= needed + DISK_MARGIN:
        return None
    return f"needs {in_bytes(needed + DISK_MARGIN)} more and has {in_bytes(free)} free"


def in_bytes(count: int) -> str:
    """A size for people and for programs."""
    return f"{count / 2**20:.1f} MB ({count} bytes)"


def to_uint8(frames_THWC: torch.Tensor | np.ndarray, first: int) -> np.ndarray:
    """Frames as contiguous uint8 [T,H,W,C]. Floats are 0..1, rounded; NaN and Inf raise, with the frame's number."""
    if isinstance(frames_THWC, np.ndarray):
        frames_THWC = torch.from_numpy(frames_THWC)
    if frames_THWC.is_floating_point():
        # One NaN or Inf makes the sum one, and a sum takes a tenth of the time of looking at every value.
        if not bool(frames_THWC.sum(dtype=torch.float32).isfinite()):
            _refuse_broken(frames_THWC, first)
        frames_THWC = frames_THWC.float().mul(255.0).round_().clamp_(0, 255)
    return frames_THWC.to(device="cpu", dtype=torch.uint8).contiguous().numpy()


def _refuse_broken(frames_THWC: torch.Tensor, first: int) -> None:
    """Raise VideoWriteError with the number of the first frame that holds NaN or Inf."""
    bad_T = (~torch.isfinite(frames_THWC)).flatten(1).any(dim=1)
    if bool(bad_T.any()):
        raise VideoWriteError(
            f"Frame {first + int(bad_T.nonzero()[0])} holds NaN or Inf: sampling or decoding broke, and it would be "
            "saved as black. Try the VAE in fp32 (--fp32-vae), another attention backend, or another weight dtype in "
            f"{LOADERS}."
        )


class VideoWriter:
    """Context manager that writes one mp4: `with VideoWriter(path, w, h, fps) as out: out.write(frames_THWC)`.

    The file is written as `<stem>.part.mp4` beside `path`, flushed to disk and renamed to `path` (replacing what is
    there) when the block ends well. When it ends with an exception the finished frames stay in the `.part.mp4`, which
    is playable and named in `kept_path` and in the log; without a finished frame nothing stays.

    `fps` is kept exactly. `crf` is x264's quality (0 lossless, 18 visually lossless, 51 worst). `metadata` goes into
    the container as core's Save Video writes it (JSON values). `expected_frames` allows the disk to be checked.
    `allow_black` permits a video of black frames only, which is otherwise refused (fault 13).
    Raises VideoWriteError; after the block `result` is the WrittenVideo.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        width: int,
        height: int,
        fps: Fraction | float | int,
        *,
        crf: float = DEFAULT_CRF,
        metadata: Mapping | None = None,
        expected_frames: int | None = None,
        allow_black: bool = False,
    ) -> None:
        check_size(width, height)
        if not 0 <= crf <= 51:
            raise VideoWriteError(f"crf is {crf:g}, expected 0 (best) to 51. Change it in '{NODE}'.")
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise VideoWriteError(f"The file name is {self.path.name}, expected one that ends in .mp4.")
        self.width, self.height, self.fps, self.crf = width, height, as_fps(fps), crf
        self.metadata = dict(metadata or {})
        self.expected_frames = expected_frames
        self.allow_black = allow_black
        self.frames = 0
        self.black_frames: list[int] = []
        self.kept_path: Path | None = None
        self.result: WrittenVideo | None = None
        self._failed = False
        self._reformatter = VideoReformatter()  # a frame's own sets up its conversion, and its threads, anew

    def __enter__(self) -> VideoWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.expected_frames is not None:
                check_disk(self.path, self.width, self.height, self.expected_frames, self.crf)
            self._part = reserve_part(self.path)
        except OSError as error:
            raise VideoWriteError(
                f"Cannot write into {self.path.parent}: {error.strerror or error}. Nothing was written. Choose another "
                f"filename_prefix in '{NODE}', or another output folder."
            ) from error
        try:
            self._open()
        except (av.error.FFmpegError, ValueError) as error:
            if hasattr(self, "_container"):
                self._container.close()
            self._part.unlink(missing_ok=True)
            raise VideoWriteError(
                f"The H.264 encoder does not take {self.width}x{self.height} at {self.fps} fps with crf {self.crf:g}. "
                f"The encoder's words: {error}"
            ) from error
        return self

    def _open(self) -> None:
        # negative_cts_offsets: B-frames would otherwise shift the start by two frames, since this kind of file has no
        # edit list. (delay_moov would give it one, but FFmpeg 8.0 then tears the file.)
        flags = "use_metadata_tags+hybrid_fragmented+negative_cts_offsets"
        options = {"movflags": flags, "flush_packets": "1"}
        self._container = av.open(str(self._part), mode="w", format="mp4", options=options)
        for key, value in self.metadata.items():
            self._container.metadata[key] = value if isinstance(value, str) else json.dumps(value)
        gop = max(1, round(float(self.fps) * GOP_SECONDS))
        # Without its macroblock tree: that reads beyond rows of frames whose width is no multiple of 128, on CPUs with
        # AVX-512, and the same frames become another file each time. Costs a third of a file more, at a better picture.
        options = {"crf": f"{self.crf:g}", "g": str(gop), "preset": "medium", "mbtree": "0"}
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = ColorRange.MPEG
        self._stream = stream
        # Opened here, so that a bad setting fails before anything is decoded. PyAV is silent unless its log is on,
        # and it stays off while encoding, because libav's threads and Python's lock can block each other.
        level = av.logging.get_level()
        av.logging.set_level(av.logging.ERROR)
        try:
            with av.logging.Capture():
                context.open()
        finally:
            av.logging.set_level(level)

    def write(self, frames_THWC: torch.Tensor | np.ndarray) -> None:
        """Encode frames [T,H,W,3]: uint8, or floats 0..1 on any device. Copied a few at a time. Not mutated.

        Stops before the disk is full, with VideoWriteError, so that what is finished can be closed properly.
        """
        if tuple(frames_THWC.shape[1:]) != (self.height, self.width, 3):
            raise VideoWriteError(
                f"Frames of shape {tuple(frames_THWC.shape)} came, expected [frames, {self.height}, {self.width}, 3]."
            )
        self._check_room(len(frames_THWC))
        try:
            for start in range(0, len(frames_THWC), CONVERTED_FRAMES):
                for image_HWC in to_uint8(frames_THWC[start : start + CONVERTED_FRAMES], self.frames):
                    self._encode(image_HWC)
        except av.error.FFmpegError as error:
            self._failed = True
            raise self._write_error(error) from error

    def planes(self, image_HWC: np.ndarray) -> av.VideoFrame:
        """A uint8 image as the encoder takes it."""
        # AREA averages the 2x2 pixels of a chroma sample and rounds to the nearest code; the default drifts by one.
        return self._reformatter.reformat(
            av.VideoFrame.from_ndarray(image_HWC, format="rgb24"),
            format="yuv420p",
            interpolation=Interpolation.AREA,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )

    def _encode(self, image_HWC: np.ndarray) -> None:
        for packet in self._stream.encode(self.planes(image_HWC)):
            self._container.mux(packet)
        if int(image_HWC.max()) <= BLACK_LEVEL:
            self.black_frames.append(self.frames)
        self.frames += 1

    def _check_room(self, frames: int) -> None:
        lack = lacking(self.path.parent, estimate_bytes(self.width, self.height, frames, self.crf))
        if lack is not None:
            self._keep()
            self._failed = True
            raise VideoWriteError(
                f"The disk of {self.path.parent} is nearly full: {self.path.name} {lack}, after {self.frames} frames. "
                f"{self._kept_words()} Free some space and queue again."
            )

    def _write_error(self, error: OSError) -> VideoWriteError:
        """Close what is there, keep it, and say so with the cause."""
        self._keep()
        if error.errno == errno.ENOSPC:
            cause = f"{full_words(self.path.parent)} after {self.frames} frames."
            remedy = "Free some space and queue again."
        else:
            cause = f"Writing {self.path.name} failed after {self.frames} frames. The encoder's words: {error}."
            remedy = f"Check the disk of {self.path.parent}, then queue again."
        return VideoWriteError(f"{cause} {self._kept_words()} {remedy}")

    def _kept_words(self) -> str:
        if self.kept_path is None:
            return "No frame was finished, so no file was kept."
        return f"The finished part is kept in {self.kept_path}."

    def _finish_container(self) -> None:
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()

    def _keep(self) -> None:
        """End the temporary file so that it plays, if it holds a frame; set `kept_path`, or remove the file."""
        complete = False
        if self.frames and not self._failed:
            try:
                self._finish_container()
                complete = True
            except av.error.FFmpegError as error:
                log.warning("%s could not be closed: %s", self._part, error)
        if not complete:
            try:
                self._container.close()
            except av.error.FFmpegError:
                log.debug("closing %s failed again", self._part)
        try:
            if complete or cut_to_finished(self._part):
                self.kept_path = self._part
            else:
                self._part.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be tidied: %s", self._part, error)
            self.kept_path = self._part

    def __exit__(self, kind, error, traceback) -> bool:
        if kind is None:
            self._complete()
        elif not self._failed:
            self._keep()
            log.warning("Saving %s stopped after %d frames. %s", self.path.name, self.frames, self._kept_words())
        return False

    def _complete(self) -> None:
        if self.frames == 0:
            self._keep()
            raise VideoWriteError("No frames came, so there is no video to save.")
        all_black = len(self.black_frames) == self.frames
        try:
            self._finish_container()
        except av.error.FFmpegError as error:
            self._failed = True
            raise self._write_error(error) from error
        if all_black and not self.allow_black:
            self.kept_path = self._part
            raise VideoWriteError(
                f"All {self.frames} frames are black, so this is not saved as a finished video. Usual causes: an "
                "attention backend or fp16 that overflowed, or a VAE that does not belong to the model. "
                f"{self._kept_words()}"
            )
        try:
            put_in_place(self._part, self.path)
        except OSError as error:
            self.kept_path = self._part if self._part.exists() else self.path
            raise VideoWriteError(
                f"The video is complete, but could not be given its name {self.path.name}: {error}. "
                f"{self._kept_words()}"
            ) from error
        self.result = WrittenVideo(self.path, self.width, self.height, self.frames, self.fps, tuple(self.black_frames))
