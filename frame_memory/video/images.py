"""Fitting pictures to a video size as FramePack does: fill by LANCZOS, then cut the middle out.

Shape suffixes: B batch, H height, W width, C channels (1 grey, 3 RGB, 4 RGBA).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..plan import check_size

BACKGROUNDS = {"white": 255, "black": 0}


class ImageError(ValueError):
    """A picture that cannot be used. The message names the socket."""


def check_image(image: torch.Tensor, socket: str = "image") -> None:
    """Raise ImageError unless `image` is a non-empty finite IMAGE [B,H,W,C] with 1, 3 or 4 channels (fault 28)."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ImageError(
            f"The socket '{socket}' got a tensor of shape {tuple(image.shape)}, "
            "expected an IMAGE [pictures, height, width, 3 or 4]."
        )
    if image.shape[0] == 0:
        raise ImageError(f"The socket '{socket}' got an empty batch of images, expected at least 1.")
    if image.shape[1] == 0 or image.shape[2] == 0:
        raise ImageError(f"The socket '{socket}' got an image of {image.shape[2]}x{image.shape[1]} pixels.")
    if not bool(torch.isfinite(image).all()):
        raise ImageError(f"The image at the socket '{socket}' holds NaN or Inf; look at the node that made it.")


def with_mask(image_BHWC: torch.Tensor, mask_BHW: torch.Tensor | None, socket: str = "mask") -> torch.Tensor:
    """`image` as RGBA that is transparent where `mask` is 1, as Load Image means it; neither input is changed.

    A mask of nothing but 0 leaves the image as it is: Load Image gives one of 64x64 for a picture without alpha. A mask
    of another size is scaled to the picture's. Raises ImageError naming `socket` for what is no mask of this batch.
    """
    if mask_BHW is None:
        return image_BHWC
    mask_BHW = mask_BHW.unsqueeze(0) if mask_BHW.ndim == 2 else mask_BHW
    if mask_BHW.ndim != 3 or 0 in mask_BHW.shape or not bool(torch.isfinite(mask_BHW).all()):
        raise ImageError(
            f"The socket '{socket}' got a tensor of shape {tuple(mask_BHW.shape)}, expected a MASK [pictures, height, "
            "width] of finite numbers, such as the one of Load Image."
        )
    if not bool(mask_BHW.any()):
        return image_BHWC
    count, height, width = image_BHWC.shape[:3]
    if mask_BHW.shape[0] not in (1, count):
        raise ImageError(
            f"The socket '{socket}' got {mask_BHW.shape[0]} masks for a batch of {count}; expected 1 or {count}."
        )
    mask_B1HW = mask_BHW.to(image_BHWC).unsqueeze(1)
    if mask_B1HW.shape[-2:] != (height, width):
        mask_B1HW = torch.nn.functional.interpolate(mask_B1HW, (height, width), mode="bilinear")
    alpha_BHW1 = (1.0 - mask_B1HW.clamp(0.0, 1.0)).movedim(1, -1).expand(count, -1, -1, -1)
    if image_BHWC.shape[-1] == 4:
        alpha_BHW1 = alpha_BHW1 * image_BHWC[..., 3:]
    return torch.cat([image_BHWC[..., :3].expand(-1, -1, -1, 3), alpha_BHW1], dim=-1)


def _composite(image_HWC: torch.Tensor, background: str) -> np.ndarray:
    """One picture as uint8 RGB [H,W,3]; alpha is laid over the background before anything is resized."""
    image_HWC = image_HWC.detach().float().cpu().clamp(0.0, 1.0)
    channels = image_HWC.shape[-1]
    if channels == 4:
        alpha_HW1 = image_HWC[..., 3:]
        image_HWC = image_HWC[..., :3] * alpha_HW1 + (BACKGROUNDS[background] / 255) * (1 - alpha_HW1)
    elif channels == 1:
        image_HWC = image_HWC.expand(-1, -1, 3)
    return np.ascontiguousarray(image_HWC.mul(255.0).round().to(torch.uint8).numpy())


def _fill_and_crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize so that the picture covers width x height, then cut the middle out."""
    scale = max(width / picture.width, height / picture.height)
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def fit_frame(frame_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    """One uint8 RGB frame [H,W,3] at width x height, by the rule of `to_bucket`; the frame itself where it fits."""
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    return np.asarray(_fill_and_crop(Image.fromarray(frame_HWC), width, height))


def _report(shape: torch.Size, width: int, height: int, background: str) -> str:
    count, source_height, source_width, channels = shape
    lines = []
    scale = max(width / source_width, height / source_height)
    filled_width, filled_height = round(source_width * scale), round(source_height * scale)
    plural = "Image" if count == 1 else f"{count} images"
    if (source_width, source_height) == (width, height):
        lines.append(f"{plural} of {width}x{height}: size kept.")
    else:
        lines.append(f"{plural} of {source_width}x{source_height} scaled to {filled_width}x{filled_height} (LANCZOS).")
        cut_x, cut_y = filled_width - width, filled_height - height
        cuts = [f"{cut_x} pixels of width"] * bool(cut_x) + [f"{cut_y} pixels of height"] * bool(cut_y)
        if cuts:
            share = 1 - (width * height) / (filled_width * filled_height)
            lines.append(f"Centre crop to {width}x{height}: {' and '.join(cuts)} cut, {share:.1%} of the picture.")
        else:
            lines.append(f"Nothing cropped: the result is {width}x{height}.")
    if channels == 4:
        lines.append(f"Transparency laid over {background}.")
    elif channels == 1:
        lines.append("Grey repeated to three colours.")
    return "\n".join(lines)


def to_bucket(
    image_BHWC: torch.Tensor,
    width: int,
    height: int,
    *,
    background: str = "white",
    socket: str = "image",
    node: str = "FramePack Image",
) -> tuple[torch.Tensor, str]:
    """Fit pictures to width x height; return (float [B,height,width,3] in 0..1, a report of what was done).

    As FramePack prepares its start image: 8-bit, scaled by max(width/w, height/h) with LANCZOS, centre crop
    (reference framepack.md section 5). RGBA is composited over `background` ("white" or "black"), never dropped
    (fault 27). Raises ImageError for an empty batch or wrong shape, naming `socket` (fault 28), and PlanError for sizes
    off the grid of 16 with the nearest pair, naming `node` (fault 23). The input is not changed.
    """
    check_image(image_BHWC, socket)
    check_size(width, height, node)
    if background not in BACKGROUNDS:
        raise ImageError(f'The background is "{background}", expected one of: {", ".join(BACKGROUNDS)}.')
    pictures = [
        np.asarray(_fill_and_crop(Image.fromarray(_composite(image_HWC, background)), width, height))
        for image_HWC in image_BHWC
    ]
    result_BHWC = torch.from_numpy(np.stack(pictures)).float() / 255.0
    return result_BHWC, _report(image_BHWC.shape, width, height, background)
