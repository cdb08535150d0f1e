"""Which autoencoder a VAE is, and whether a latent belongs to it (fault 22).

HunyuanVideo, Wan 2.1 and the self-test models all use 16 channels at 8x8x4, so shapes cannot tell them apart and
the wrong pair makes a plausible-looking but wrong video. What core keeps after loading a file does tell them:

- HunyuanVideo: `AutoencoderKL` with 3-D convolutions, or the tiny TAEHV with HunyuanVideo's latent format;
- Wan 2.1: core's `WanVAE` at its published widths, 96 and LightVAE's 24, or the tiny TAEHV without a latent format;
- Wan 2.2 5B: core's other `WanVAE`, with 48 channels at 16x16x4, or the tiny TAEHV with as many;
- self-test: core's `WanVAE`, narrower than that (core reads the width from the file). Which of the two, FramePack's or
  Wan's, the file's metadata says; its width where a VAE was made without them.

Shape suffix: B batch, C channels, T time, H height, W width, all of the latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan.vae import WanVAE
from comfy.ldm.wan.vae2_2 import WanVAE as Wan22VAE
from comfy.taesd.taehv import TAEHV

from ..plan.mark import EXPECTED_FILES, SELFTEST, SELFTEST_WAN, LatentMark, expected_files
from .decode import LatentSource

HUNYUAN = "HunyuanVideo"
WAN = "Wan21"
WAN_5B = "Wan22"
# `WanVAE.dim` of the narrowest published file for Wan 2.1, LightX2V's lightvaew2_1.
WAN_WIDTH = 24
# The same of the small VAE that ships for Wan; that for FramePack has 6.
SELFTEST_WAN_WIDTH = 8
SPATIAL_RATIO = 8
TEMPORAL_RATIO = 4
CHANNELS, CHANNELS_5B = 16, 48
# (channels, pixels per latent pixel) of the autoencoders whose latents a model here can read.
READABLE = ((CHANNELS, SPATIAL_RATIO), (CHANNELS_5B, 16))
# safetensors metadata key by which a VAE file may say what it belongs to: SELFTEST or SELFTEST_WAN of ours.
METADATA_BASE = "frame_memory.base"


class VAEError(ValueError):
    """A VAE that cannot decode a latent, or must not. The message names the node "Load VAE" and the expected file."""


@dataclass(frozen=True)
class VAEIdentity:
    """What a loaded VAE is. `family` is one of EXPECTED_FILES, or "" for any other."""

    family: str
    name: str
    channels: int
    spatial: int
    temporal: int | None
    is_video: bool

    def __str__(self) -> str:
        return self.name


def _file_metadata(vae) -> Mapping:
    """safetensors metadata of the file behind a VAE from core's loader; empty for a VAE made in another way."""
    init = getattr(getattr(vae, "patcher", None), "cached_patcher_init", None)
    if init is None or len(init) < 2:
        return {}
    return next((value for value in init[1] if isinstance(value, Mapping)), {})


def _family(vae) -> tuple[str, str]:
    """(family, words for a message) of a VAE, from its class, width and file."""
    model = vae.first_stage_model
    three_d = vae.latent_dim == 3
    if isinstance(model, WanVAE):
        said = str(_file_metadata(vae).get(METADATA_BASE, ""))
        if model.dim >= WAN_WIDTH and not said:
            return WAN, "a Wan 2.1 VAE"
        said = said or (SELFTEST_WAN if model.dim == SELFTEST_WAN_WIDTH else SELFTEST)
        if said in (SELFTEST, SELFTEST_WAN):
            of = "Wan" if said == SELFTEST_WAN else "FramePack"
            return said, f"a self-test VAE for {of} (WanVAE of width {model.dim})"
        return "", f'a VAE that belongs to "{said}"'
    if isinstance(model, Wan22VAE):
        return WAN_5B, "a Wan 2.2 VAE"
    if isinstance(model, TAEHV) and vae.latent_channels == CHANNELS_5B:
        return WAN_5B, "a tiny Wan 2.2 VAE (TAEHV)"
    if isinstance(model, TAEHV) and vae.latent_channels == CHANNELS:
        if model.latent_format is None:
            return WAN, "a tiny Wan 2.1 VAE (TAEHV)"
        name = model.latent_format.__name__
        return (HUNYUAN if name == HUNYUAN else ""), f"a tiny {name} VAE (TAEHV)"
    # Core builds a 3-D AutoencoderKL for HunyuanVideo only; its 2-D ones (Flux, SD3) have latent_dim 2.
    if isinstance(model, AutoencoderKL) and three_d and vae.latent_channels == CHANNELS:
        return HUNYUAN, "a HunyuanVideo VAE"
    return "", f"{'a video' if three_d else 'an image'} VAE ({type(model).__name__})"


def identify_vae(vae) -> VAEIdentity:
    """What core loaded. Raises VAEError for a VAE without weights."""
    if getattr(vae, "first_stage_model", None) is None:
        raise VAEError("The VAE has no weights. Choose a VAE file in the node 'Load VAE'.")
    family, name = _family(vae)
    temporal = vae.temporal_compression_decode()
    return VAEIdentity(
        family=family,
        name=name,
        channels=int(vae.latent_channels),
        spatial=int(vae.spacial_compression_decode()),
        temporal=temporal,
        is_video=vae.latent_dim == 3,
    )


def _wanted_family(mark: LatentMark | None) -> str:
    """Family a marked LATENT belongs to. The base decides: the self-test models use published ones' formats."""
    if mark is None:
        return ""
    return mark.base if mark.base in (SELFTEST, SELFTEST_WAN) else (mark.latent_format or mark.base)


def _check_time(found: VAEIdentity, change: str) -> None:
    if not found.is_video or found.temporal is None:
        raise VAEError(f"'Load VAE' gave {found}, expected a video VAE. {change}")


def _check_ratio(found: VAEIdentity, of: str, ratio: int | None, wanted: int, change: str) -> None:
    if ratio != wanted:
        raise VAEError(f"'Load VAE' gave {found} with {ratio} {of}, expected {wanted}. {change}")


def check_video_vae(vae) -> VAEIdentity:
    """Refuse a VAE whose latents neither FramePack nor Wan can read, whatever is encoded; return what it is.

    Whether it belongs to this very model is known only where both meet (`check_vae`). Raises VAEError.
    """
    found = identify_vae(vae)
    change = f"Change the file in the node 'Load VAE' to {EXPECTED_FILES[HUNYUAN]}, or with Wan to its own."
    _check_time(found, change)
    wide, pixels = next((pair for pair in READABLE if pair[0] == found.channels), READABLE[0])
    _check_ratio(found, "channels", found.channels, wide, change)
    _check_ratio(found, "pixel frames per latent frame", found.temporal, TEMPORAL_RATIO, change)
    _check_ratio(found, "pixels per latent pixel", found.spatial, pixels, change)
    return found


def check_vae(vae, latents_BCTHW: torch.Tensor | LatentSource, mark: LatentMark | None = None) -> VAEIdentity:
    """Refuse a VAE that does not belong to a latent; return what it is.

    Without a mark only the shape can be checked: a video VAE with this many channels and 4 pixel frames per latent
    frame. With one, the family must agree too (same shape is not enough). Raises VAEError.
    """
    found = identify_vae(vae)
    wanted = _wanted_family(mark)
    expected = expected_files((wanted,)) if wanted else "the video VAE of the model used"
    change = f"Change the file in the node 'Load VAE' to {expected}."
    channels = latents_BCTHW.shape[1]
    _check_time(found, change)
    if found.channels != channels:
        raise VAEError(f"'Load VAE' gave {found} with {found.channels} channels, the latent has {channels}. {change}")
    _check_ratio(found, "pixel frames per latent frame", found.temporal, TEMPORAL_RATIO, change)
    if not wanted:
        return found
    pixels = dict(READABLE).get(channels, SPATIAL_RATIO)
    _check_ratio(found, "pixels per latent pixel", found.spatial, pixels, change)
    if found.family != wanted:
        raise VAEError(
            f"'Load VAE' gave {found}, but this latent was made with {expected}. Both have {channels} channels at "
            f"{pixels}x{pixels}x{TEMPORAL_RATIO}, yet the numbers mean other pictures. {change}"
        )
    return found


def vae_fingerprint(vae) -> str:
    """16 hex digits that differ for other weights, class or number format: latents kept on disk name it.

    Of the weights the 1-D ones are read (biases and norms), which any training changes.
    """
    model = vae.first_stage_model
    digest = hashlib.sha256(f"{type(model).__name__} {vae.vae_dtype}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        if value.ndim <= 1:
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
