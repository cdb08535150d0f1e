"""How alike two pictures are: through any CLIP vision model, and by colours and structure where there is none.

A subject is cut out by its mask and shown on grey, at the size of its box, so that where it stands and what is behind
it do not count; a background is the picture with the subject greyed out.

Shape suffixes: B pictures, D features, N tokens, H height, W width, C colours (3, values 0..1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What stands in the place of everything that is not to be looked at.
GREY = 0.5
# Steps of each colour in a histogram: 512 colours in all. Finer ones tell noise apart, coarser ones lose the hue.
BINS = 8
# Side of the small grey copy whose structure is compared: shapes and places, not texture.
STRUCTURE = 24
# A mask counts as the subject from here on.
SOLID = 0.5
# Below this spread of grey values, of 0..1, a picture has no structure that could be compared.
FLAT = 1e-3


class LikenessError(ValueError):
    """Masks or a model that pictures cannot be compared with. The message says what to connect."""


def features_of(clip_vision, picture_BHWC: Tensor, node: str) -> Tensor:
    """Unit vectors [B,D] of pictures: the model's embedding, or the mean of its tokens. Raises LikenessError."""
    seen = clip_vision.encode_image(picture_BHWC, crop=False)
    embedded = getattr(seen, "image_embeds", None)
    if not isinstance(embedded, Tensor) or embedded.ndim != 2:
        tokens_BND = getattr(seen, "last_hidden_state", None)
        if not isinstance(tokens_BND, Tensor) or tokens_BND.ndim != 3:
            raise LikenessError(
                f"The model at 'clip_vision' of '{node}' gives no embedding of a picture. Load a CLIP, SigLIP or DINO "
                "model with 'Load CLIP Vision'."
            )
        embedded = tokens_BND.mean(dim=1)
    return F.normalize(embedded.detach().float().cpu(), dim=-1)


def as_picture(frame_HWC) -> Tensor:
    """One frame, uint8 or floats 0..1, as an IMAGE [1,H,W,3] on the CPU; grey is repeated, alpha left out."""
    frame_HWC = torch.as_tensor(frame_HWC).detach().cpu()
    frame_HWC = frame_HWC.float().div(255) if frame_HWC.dtype == torch.uint8 else frame_HWC.float()
    frame_HWC = frame_HWC.nan_to_num(0.0).clamp(0, 1)
    return (frame_HWC if frame_HWC.shape[-1] >= 3 else frame_HWC[..., :1].expand(-1, -1, 3))[None, ..., :3]


def mask_for(mask_BHW: Tensor, index: int, count: int, size: tuple[int, int], socket: str, node: str) -> Tensor:
    """The mask [H,W] of picture `index` of `count`, scaled to (height, width). Raises LikenessError."""
    mask_BHW = mask_BHW.unsqueeze(0) if mask_BHW.ndim == 2 else mask_BHW
    if mask_BHW.ndim != 3 or mask_BHW.shape[0] not in (1, count):
        raise LikenessError(
            f"'{socket}' of '{node}' got masks of shape {tuple(mask_BHW.shape)} for {count} frames; expected 1 mask "
            f"or {count} of them, one a frame."
        )
    mask_HW = mask_BHW[index if mask_BHW.shape[0] > 1 else 0].detach().float().cpu().clamp(0, 1)
    if mask_HW.shape != size:
        mask_HW = F.interpolate(mask_HW[None, None], size, mode="bilinear")[0, 0]
    return mask_HW


def subject_of(picture_BHWC: Tensor, mask_HW: Tensor) -> Tensor | None:
    """What the mask shows, on grey, cut to its box [1,h,w,3]; None where the mask shows nothing."""
    solid_HW = mask_HW >= SOLID
    if not bool(solid_HW.any()):
        return None
    rows, columns = solid_HW.any(dim=1).nonzero().flatten(), solid_HW.any(dim=0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    alpha_HW1 = mask_HW[top:bottom, left:right, None]
    return picture_BHWC[:, top:bottom, left:right] * alpha_HW1 + GREY * (1 - alpha_HW1)


def background_of(picture_BHWC: Tensor, mask_HW: Tensor) -> Tensor:
    """The picture with the subject greyed out."""
    alpha_HW1 = mask_HW[..., None]
    return picture_BHWC * (1 - alpha_HW1) + GREY * alpha_HW1


def colour_likeness(a_BHWC: Tensor, b_BHWC: Tensor) -> float:
    """Share of two pictures' pixels with the same colours, 0 to 1: the intersection of their histograms."""
    return shared_colours(colours_of(a_BHWC), colours_of(b_BHWC))


def shared_colours(a: Tensor, b: Tensor) -> float:
    """The same for what `colours_of` found."""
    return float(torch.minimum(a, b).sum())


def colours_of(picture_BHWC: Tensor) -> Tensor:
    """Share of the pixels that each of 512 colours has, [512].

    Pixels that are exactly the grey of `subject_of` are nobody's and do not count.
    """
    pixels = picture_BHWC[..., :3].reshape(-1, 3)
    shown = pixels[(pixels != GREY).any(dim=-1)]
    pixels = shown if len(shown) else pixels
    # Each colour's share is dealt to the two nearest steps, so that a small shift is a small difference.
    place = pixels.clamp(0, 1) * (BINS - 1)
    low = place.floor().clamp(0, BINS - 2)
    part = place - low
    counts = torch.zeros(BINS**3, dtype=torch.float64)
    for corner in range(8):
        up = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        weight = torch.where(up.bool(), part, 1 - part).prod(dim=-1)
        index = ((low + up) @ torch.tensor([BINS**2, BINS, 1.0])).long()
        counts.index_add_(0, index, weight.double())
    return counts / counts.sum()


def structure_likeness(a_BHWC: Tensor, b_BHWC: Tensor) -> float:
    """Correlation of small grey copies, 0 (none, or the opposite) to 1; 1 for two pictures without structure."""
    return shared_structure(structure_of(a_BHWC), structure_of(b_BHWC))


def shared_structure(a: Tensor, b: Tensor) -> float:
    """The same for what `structure_of` found."""
    return 1.0 if not a.any() and not b.any() else float((a @ b).clamp(0, 1))


def structure_of(picture_BHWC: Tensor) -> Tensor:
    """A small grey copy with mean 0 and length 1, [24 * 24]; zeros for a picture without structure."""
    grey_B1HW = picture_BHWC[..., :3].mean(dim=-1)[:, None]
    small = F.interpolate(grey_B1HW, (STRUCTURE, STRUCTURE), mode="bilinear", antialias=True)[0, 0].flatten().double()
    return torch.zeros_like(small) if float(small.std()) < FLAT else F.normalize(small - small.mean(), dim=0)
