"""What is tried when a window does not fit into memory while it is decoded (fault 02).

Four rungs, each with less memory and more time: in one piece, in core's tiles, in smaller tiles with every other model
unloaded, on the CPU. Tiles are crossfaded by core and change pixels slightly near their borders; the CPU computes in
fp32 with a copy of the weights. The rung that worked is kept for the windows that follow, so a video does not run out
of memory again and again, nor changes its look from window to window more than once.

Shape suffixes: B batch, C latent or colour channels, T time, H height, W width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import comfy.model_management
import comfy.sd
import torch

from .decode import TEMPORAL_RATIO, DecodeError, check_pixels

# Side of a tile in core's own retry.
TILE_PIXELS = 256
# A quarter of the memory of core's tiles; still 16 latent pixels with 4 shared on each side.
SMALL_TILE_PIXELS = 128
GIGABYTE = 2**30

log = logging.getLogger(__name__)


class DecodeMemoryError(DecodeError):
    """A window fits nowhere. The message says what was tried, how much memory it needs, and what to change."""


class _NoRoom(Exception):
    """Stands for an out-of-memory error that core answered with a retry of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the GPU (core's own test) or on the CPU."""
    if isinstance(error, (_NoRoom, MemoryError)) or comfy.model_management.is_oom(error):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)


class DecodeLadder:
    """A decode function for `StreamDecoder` and `decode_stream`: `ladder(latents [1,C,t,H,W]) -> [1,4t-3,h,w,3]`.

    `vae` is a core VAE (any object with its `decode`; the rungs it cannot do are left out). It is not changed.
    `announce(text)` is called with a sentence before every retry. Errors that are not about memory pass through.
    Raises DecodeMemoryError after the last rung, DecodeError for pixels of a wrong shape. Lives for one execution:
    it holds the CPU copy of the weights once that is made.
    """

    def __init__(self, vae, announce: Callable[[str], None] = log.warning) -> None:
        self._vae, self._announce = vae, announce
        self._cpu_vae = None
        self._rungs: list[tuple[str, Callable]] = [("in one piece", self._plain)]
        if hasattr(vae, "decode_tiled"):
            self._rungs.append((f"in tiles of {TILE_PIXELS} pixels", self._tiled))
            self._rungs.append((f"in tiles of {SMALL_TILE_PIXELS} pixels, other models unloaded", self._small_tiles))
        if hasattr(vae, "get_sd") and torch.device(getattr(vae, "device", "cpu")).type != "cpu":
            self._rungs.append(("on the CPU", self._on_cpu))
        self._at = 0

    @property
    def rung(self) -> str:
        """How the latest window was decoded, in words."""
        return self._rungs[self._at][0]

    def __call__(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        tried: list[str] = []
        at = self._at
        while True:
            name, decode = self._rungs[at]
            failure = None
            try:
                pixels_BTHWC = decode(latents_BCTHW)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Kept as text only: the error holds the tensors of the frames it came through.
                failure = "" if isinstance(error, _NoRoom) else str(error).strip().split("\n")[0][:200]
            if failure is None:
                self._check(pixels_BTHWC, latents_BCTHW, name)
                self._at = at
                return pixels_BTHWC
            tried.append(name + (f" ({failure})" if failure else ""))
            at += 1
            comfy.model_management.soft_empty_cache()
            if at == len(self._rungs):
                raise self._nowhere(latents_BCTHW, tried)
            self._announce(
                f"Out of memory while {latents_BCTHW.shape[2]} latent frames were decoded {name}. The latents are "
                f"kept; decoding again {self._rungs[at][0]}, as the rest of the video will be."
            )

    def _plain(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Core's decode without its silent retry in tiles, which is the next rung here and is announced."""
        plain = copy.copy(self._vae)
        if hasattr(plain, "decode_tiled_3d"):
            plain.decode_tiled_3d = _refuse
            plain._decode_tiled_owned = _refuse
        return plain.decode(latents_BCTHW)

    def _tiled(self, latents_BCTHW: torch.Tensor, pixels: int = TILE_PIXELS) -> torch.Tensor:
        tile = pixels // int(self._vae.spacial_compression_decode())
        return self._vae.decode_tiled(latents_BCTHW, tile_x=tile, tile_y=tile, overlap=tile // 4)

    def _small_tiles(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        return self._tiled(latents_BCTHW, SMALL_TILE_PIXELS)

    def _on_cpu(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        if self._cpu_vae is None:
            self._cpu_vae = cpu_copy(self._vae)
        return self._cpu_vae.decode(latents_BCTHW.to("cpu"))

    def _expected_frames(self, latent_frames: int) -> int:
        """Pixel frames of a clip of so many latent frames."""
        return TEMPORAL_RATIO * latent_frames - (TEMPORAL_RATIO - 1)

    def _check(self, pixels_BTHWC: torch.Tensor, latents_BCTHW: torch.Tensor, name: str) -> None:
        latent_frames = latents_BCTHW.shape[2]
        check_pixels(pixels_BTHWC, latent_frames, self._expected_frames(latent_frames))
        if not hasattr(self._vae, "spacial_compression_decode"):
            return
        ratio = int(self._vae.spacial_compression_decode())
        expected = tuple(side * ratio for side in latents_BCTHW.shape[3:])
        if tuple(pixels_BTHWC.shape[2:4]) != expected:
            raise DecodeError(
                f"Decoded {name}, a latent of {latents_BCTHW.shape[4]}x{latents_BCTHW.shape[3]} became "
                f"{pixels_BTHWC.shape[3]}x{pixels_BTHWC.shape[2]} pixels, expected {expected[1]}x{expected[0]}. "
                "Change the file in the node 'Load VAE'."
            )

    def _nowhere(self, latents_BCTHW: torch.Tensor, tried: list[str]) -> DecodeMemoryError:
        need = ""
        try:
            bytes_needed = self._vae.memory_used_decode(latents_BCTHW.shape, self._vae.vae_dtype)
            free = comfy.model_management.get_free_memory(self._vae.device)
            need = f" In one piece it needs about {bytes_needed / GIGABYTE:.1f} GB; {free / GIGABYTE:.1f} GB are free."
        except Exception as error:  # the estimate is a courtesy, and VAEs of other packs may have none
            log.debug("no memory estimate: %s", error)
        return DecodeMemoryError(
            f"{latents_BCTHW.shape[2]} latent frames could not be decoded: out of memory {'; then '.join(tried)}."
            f"{need} All sampled sections are kept; nothing is sampled again. Close other programs that use the GPU, "
            "start ComfyUI with --reserve-vram or --lowvram, or use a tiny VAE (TAEHV) in 'Load VAE', then queue again."
        )


def _refuse(*_args, **_options):
    raise _NoRoom


def cpu_copy(vae):
    """The same VAE on the CPU in fp32, built by core from a copy of the weights."""
    weights = {
        key: value.detach().to(device="cpu", dtype=torch.float32 if value.is_floating_point() else None, copy=True)
        for key, value in vae.get_sd().items()
    }
    made = comfy.sd.VAE(sd=weights, device=torch.device("cpu"), dtype=torch.float32)
    if type(made.first_stage_model) is not type(vae.first_stage_model):
        raise DecodeMemoryError(
            "A window does not fit into the GPU's memory even in small tiles, and this VAE "
            f"({type(vae.first_stage_model).__name__}) cannot be rebuilt on the CPU from its weights. All sampled "
            "sections are kept. Start ComfyUI with --cpu-vae and queue again."
        )
    return made
