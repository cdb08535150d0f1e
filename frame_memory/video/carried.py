"""Decoding a causal video VAE with carried state: a few latent frames at a time, the pixels of the whole video at once.

Core's WanVAE (Wan 2.1 and the self-test VAE) is causal: what a convolution needs of earlier frames are its last two
inputs, and core itself decodes a long clip two latent frames at a time with a list of them. Here that list is kept
between calls. Each latent frame is decoded once, where windows decode it twice; nothing is crossfaded; the pixels are
those of one pass over everything, bit for bit in fp32 and bf16 (at some picture sizes to 1e-6, where a CPU sums up a
clip of two frames in another order), in memory that does not grow. Windows of 18 latent frames differ from one pass by
0.004 on average and up to 0.26 at their joins, of 0..1, for the shipped VAE and random latents.

HunyuanVideo's AutoencoderKL is causal only in its convolutions. Core computes its middle block over the whole clip,
where attention joins all frames and GroupNorm averages over them: a frame depends on later ones (changing the last of
18 latent frames of a random narrow instance changes the first 33 pixel frames by up to 0.10 on core's -1..1 scale), and
no state can be carried. Splitting that block into two halves, with every convolution carried, still changes pixels by
0.023 on average and by up to 0.24: 3 and 30 levels of 255. It is decoded in windows, as FramePack does.

Shape suffixes: B batch, C latent or colour channels, T time, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import comfy.model_management
import comfy.utils
import torch
from comfy.ldm.wan.vae import CACHE_T, WanVAE, count_cache_layers

from .decode import LatentSource, latent_reader
from .ladder import SMALL_TILE_PIXELS, TILE_PIXELS, DecodeLadder, cpu_copy

# Core's own step: after the first latent frame two at a time. Another step only changes how sums are rounded.
STEP = 2
# Latent frames over which core estimates the memory of a decode with its cache in use, as it is here from the start.
ESTIMATED_FRAMES = 5
# So many latent frames back every influence on a pixel ends: one decoder may take over from another after them.
REACH = 48

# One entry for each convolution: its latest inputs, None before the first frame, or core's mark for a skipped one.
State = list[torch.Tensor | str | None]
# Latent rows and columns [top, bottom, left, right) that a state belongs to.
Region = tuple[int, int, int, int]

log = logging.getLogger(__name__)


def can_carry(vae) -> bool:
    """Whether `CarriedDecoder` takes a core VAE: its class is WanVAE and it shows one pixel as one pixel."""
    model = getattr(vae, "first_stage_model", None)
    if type(model) is not WanVAE or [*model.temperal_upsample] != [True, True, False]:
        return False
    return model.decoder.head[-1].out_channels == vae.output_channels


def steps(frames: int, first: bool = True) -> int:
    """Decode steps of `frames` latent frames, of which the first begins a video or not."""
    alone = 1 if first and frames else 0
    return alone + -(-(frames - alone) // STEP)


class CarriedDecoder(DecodeLadder):
    """One video from front to back: `for frames_THWC in decoder.stream(latents [1,C,t,H,W]): ...`, again and again.

    The first call begins with the first latent frame (which makes 1 pixel frame, every other makes 4), each later one
    goes on where the last ended; how the frames are dealt out to calls does not matter beyond rounding. All frames
    handed out are final. `frames` counts the latent frames so far.

    Model loading, dtype and scaling are those of core's `VAE.decode`. Out of memory is answered as `DecodeLadder`
    does, each step announced, and without losing the state: in core's tiles, in small tiles with other models
    unloaded, the same on the CPU. A step that fails leaves the state as it was. `vae` is not changed.
    """

    def __init__(self, vae, announce: Callable[[str], None] = log.warning) -> None:
        super().__init__(vae, announce)
        on_cpu = self._rungs[-1][1] == self._on_cpu
        tiles = f"in tiles of {SMALL_TILE_PIXELS} pixels"
        self._rungs = [
            ("in one piece", self._plain),
            (f"in tiles of {TILE_PIXELS} pixels", self._tiled),
            (f"{tiles}, other models unloaded", self._small_tiles),
            *([(f"{tiles} on the CPU", self._on_cpu)] if on_cpu else []),
        ]
        self.frames = 0
        self._states: dict[Region, State] = {}

    def stream(
        self,
        latents_BCTHW: torch.Tensor | LatentSource,
        *,
        item: int = 0,
        interrupt: Callable[[], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Finished float32 frames [T,H,W,C] in 0..1 of the next latent frames, 8 at most at a time.

        `latents` [B,C,T,H,W] are a tensor or a source, of whose batch `item` is taken. `interrupt()` is called before
        every step and stops by raising, `on_step(done, count)` after it.
        """
        read, begin, total = latent_reader(latents_BCTHW, item), 0, latents_BCTHW.shape[2]
        done, count = 0, steps(total, first=self.frames == 0)
        while begin < total:
            if interrupt is not None:
                interrupt()
            stop = min(total, begin + (STEP if self.frames else 1))
            pixels_BTHWC = self(read(begin, stop))
            begin, done = stop, done + 1
            if on_step is not None:
                on_step(done, count)
            yield pixels_BTHWC[0].float()
            del pixels_BTHWC

    def __call__(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Pixels [1,T,H,W,C] of the next latent frames in one step; `stream` makes the usual steps of them."""
        pixels_BTHWC = super().__call__(latents_BCTHW)
        self.frames += latents_BCTHW.shape[2]
        return pixels_BTHWC

    def _plain(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        return self._tiles(self._vae, latents_BCTHW, None)

    def _tiled(self, latents_BCTHW: torch.Tensor, pixels: int = TILE_PIXELS) -> torch.Tensor:
        return self._tiles(self._vae, latents_BCTHW, pixels)

    def _on_cpu(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        if self._cpu_vae is None:
            self._cpu_vae = cpu_copy(self._vae)
        return self._tiles(self._cpu_vae, latents_BCTHW, SMALL_TILE_PIXELS)

    def _expected_frames(self, latent_frames: int) -> int:
        return 4 * latent_frames - (0 if self.frames else 3)

    @torch.inference_mode()
    def _tiles(self, vae, latents_BCTHW: torch.Tensor, pixels: int | None) -> torch.Tensor:
        """One step with `vae`, cut up and crossfaded by core where `pixels` is the side of a tile."""
        vae.throw_exception_if_invalid()
        _, channels, length, height, width = latents_BCTHW.shape
        side = max(height, width) if pixels is None else pixels // int(vae.spacial_compression_decode())
        shared = 0 if pixels is None else side // 4
        tile = (1, channels, max(length, ESTIMATED_FRAMES), min(side, height), min(side, width))
        need = vae.memory_used_decode(tile, vae.vae_dtype)
        made: dict[Region, State] = {}

        def decode(part_BCTHW: torch.Tensor) -> torch.Tensor:
            # Core's tiling does not say where a tile lies, so its place travels as two more channels.
            top, left = (int(part_BCTHW[0, channel, 0, 0, 0]) for channel in (-2, -1))
            region = top, top + part_BCTHW.shape[3], left, left + part_BCTHW.shape[4]
            z_BCTHW = part_BCTHW[:, :-2].to(device=vae.device, dtype=vae.vae_dtype)
            state = self._state_of(region, vae)
            out_BCTHW = _advance(vae.first_stage_model, z_BCTHW, state)
            made[region] = state
            return out_BCTHW.to(dtype=vae.vae_output_dtype())

        with comfy.model_management.cuda_device_context(vae.device):
            comfy.model_management.load_models_gpu(
                [vae.patcher], memory_required=need, force_full_load=vae.disable_offload
            )
            scale = int(vae.spacial_compression_decode())
            frames = self._expected_frames
            out_BCTHW = comfy.utils.tiled_scale_multidim(
                _with_places(latents_BCTHW),
                decode,
                tile=(length, side, side),
                overlap=(0, shared, shared),
                upscale_amount=(lambda count: frames(count) if count else 0, scale, scale),
                out_channels=vae.output_channels,
                output_device=vae.output_device,
                index_formulas=(4, scale, scale),
            )
        out_BCTHW = vae.process_output(out_BCTHW.to(vae.vae_output_dtype()))
        self._states = made
        return out_BCTHW.movedim(1, -1)

    def _state_of(self, region: Region, vae) -> State:
        """A state for a region, of the latest step: its own, or cut out of a larger one. May be changed."""
        if not self._states:
            return [None] * count_cache_layers(vae.first_stage_model.decoder)
        top, bottom, left, right = region
        for (t, b, l, r), state in self._states.items():
            if t <= top and bottom <= b and l <= left and right <= r:
                inside = top - t, bottom - t, left - l, right - l
                return [_cut(entry, inside, b - t, vae) for entry in state]
        raise AssertionError(f"no state covers {region}")  # core's small tiles lie inside its large ones


def _with_places(latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Latents with two more channels: the row and the column of every latent pixel."""
    batch, _, length, height, width = latents_BCTHW.shape
    rows = torch.arange(height, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(batch, 1, length, height, width)
    columns = torch.arange(width, dtype=torch.float32).view(1, 1, 1, 1, -1).expand(batch, 1, length, height, width)
    return torch.cat([latents_BCTHW.float().cpu(), rows, columns], dim=1)


def _cut(entry, inside: Region, height: int, vae):
    """The part of one cached input that belongs to a region; a cache has 1, 2, 4 or 8 values for a latent pixel."""
    if not isinstance(entry, torch.Tensor):
        return entry
    scale = entry.shape[3] // height
    top, bottom, left, right = (side * scale for side in inside)
    return entry[:, :, :, top:bottom, left:right].to(device=vae.device, dtype=vae.vae_dtype)


def _advance(model: WanVAE, z_BCTHW: torch.Tensor, state: State) -> torch.Tensor:
    """Decode the next latent frames with core's modules, as `WanVAE.decode` does; `state` is brought up to date."""
    before = list(state)
    out_BCTHW = torch.cat(model.decoder(model.conv2(z_BCTHW), feat_cache=state, feat_idx=[0]), dim=2)
    for index, (old, new) in enumerate(zip(before, state)):
        if not isinstance(new, torch.Tensor):
            continue
        if isinstance(old, torch.Tensor) and new.shape[2] < CACHE_T:
            # A step of one frame: core keeps that one only and would see zeros before it the next time.
            state[index] = torch.cat([old, new], dim=2)[:, :, -CACHE_T:]
        elif new.untyped_storage().nbytes() > new.nbytes:
            state[index] = new.clone()  # a view would keep all frames of the step alive
    return out_BCTHW
