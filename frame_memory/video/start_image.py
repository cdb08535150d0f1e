"""A picture to what FramePack starts from: bucket size, start latent, vision features.

Shape legend: B batch, H W pixels, C channels, h w latent pixels, N vision tokens, D features.
Source: reference/framepack.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.clip_vision
import torch
from torch import Tensor

from ..plan import nearest_bucket
from ..plan.errors import IMAGE
from ..plan.frames import STILL_FRAMES, pixel_frames
from ..plan.mark import KEY, SELFTEST_WAN
from .images import ImageError, check_image, to_bucket, with_mask
from .vae import EXPECTED_FILES, WAN, WAN_5B, VAEError, check_video_vae, identify_vae

# What it means that there is no CLIP vision, by the family of the VAE; empty where no model looks through it.
_UNSEEN = {WAN: "of Wan only 2.1 image to video looks through one", WAN_5B: "", SELFTEST_WAN: ""}


@dataclass(frozen=True)
class StartImage:
    """start and end as LATENT dicts (end None without an end image), vision output or None, the fitted picture."""

    start: dict
    end: dict | None
    vision: comfy.clip_vision.Output | None
    picture_BHWC: Tensor
    report: str


def encode_pictures(vae, picture_BHWC: Tensor, pictures: int = 1) -> dict:
    """Each picture alone through a video VAE: LATENT of `[B, C, 1, h, w]` (core would read a batch as time).

    pictures: how long each is held, as a clip of `1 + (pictures - 1) / 4` latent frames.
    """
    each = [picture_BHWC[i : i + 1, :, :, :3].expand(pictures, -1, -1, -1) for i in range(picture_BHWC.shape[0])]
    latents = [vae.encode(clip_THWC) for clip_THWC in each]
    return {"samples": torch.cat(latents), KEY: {"base": identify_vae(vae).family}}


def mean_vision(a: comfy.clip_vision.Output, b: comfy.clip_vision.Output) -> comfy.clip_vision.Output:
    """Average of two vision outputs, as FramePack's end-frame variants feed them (framepack.md 3.3)."""
    out = comfy.clip_vision.Output()
    for name in ("last_hidden_state", "penultimate_hidden_states"):  # FramePack reads the first, Wan the second
        one, other = getattr(a, name, None), getattr(b, name, None)
        if one is not None and other is not None:
            out[name] = (one + other) / 2
    return out


def prepare(
    vae, clip_vision, image: Tensor, end_image: Tensor | None, base: int, background: str,
    mask: Tensor | None = None, end_mask: Tensor | None = None, still_clip: bool = False,
) -> StartImage:  # fmt: skip
    """Fit, encode and look at the start image, and the end image where there is one.

    base: side of the square the bucket is taken from, pixels. mask, end_mask: 1 where their picture is transparent.
    still_clip: start is the picture held still, `[B, C, 9, h, w]`, whose first latent frame is the picture alone.
    Raises ImageError (empty batch, wrong shape, a mask without its picture), VAEError (no VAE of such a model).
    """
    found = check_video_vae(vae)
    if still_clip and found.family not in (WAN, SELFTEST_WAN):
        raise VAEError(
            f"'still_clip' of '{IMAGE}' is for Helios, which reads {EXPECTED_FILES[WAN]}, and 'Load VAE' gave {found}. "
            "Change the file there, or switch 'still_clip' off."
        )
    multiple = 2 * found.spatial
    check_image(image, "image")
    if end_mask is not None and end_image is None:
        raise ImageError("The socket 'end_mask' is connected and 'end_image' is not; connect both or neither.")
    height, width = nearest_bucket(image.shape[1], image.shape[2], base, multiple)
    start_picture, report = to_bucket(with_mask(image, mask, "mask"), width, height, background=background)
    vision = clip_vision.encode_image(start_picture, crop=False) if clip_vision is not None else None
    start, end = encode_pictures(vae, start_picture, pixel_frames(STILL_FRAMES) if still_clip else 1), None
    if end_image is not None:
        check_image(end_image, "end_image")
        end_image = with_mask(end_image, end_mask, "end_mask")
        end_picture, end_report = to_bucket(end_image, width, height, background=background, socket="end_image")
        report = f"Start: {report}\nEnd: {end_report}\nThis node's 'end' is for the socket 'end' of Anti-Drift Sampler."
        end = encode_pictures(vae, end_picture)
        if vision is not None:
            vision = mean_vision(vision, clip_vision.encode_image(end_picture, crop=False))
    unseen = _UNSEEN.get(start[KEY]["base"], "the picture is seen through the start latent alone")
    if clip_vision is None and unseen:
        report += f"\nNo CLIP vision model is connected: {unseen}."
    return StartImage(start, end, vision, start_picture, report)
