"""FFGo's first frame, drawn: pictures flattened, scaled and pasted as a layout says; and the layout with its labels.

Shape suffixes: B batch, H height, W width, C channels.
Source: reference/ffgo.md section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..plan.canvas import BACKGROUND, FREE, NODE, OFFICIAL_SIZE, STACK, CanvasError, CanvasLayout, Region, lay_out
from .images import check_image, with_mask

# A mask is content where it is at least this much; less is the haze that segmentation leaves around things.
CONTENT = 0.02
# Where a mask is at least this much, a pixel shows the thing and nothing of what is behind it.
SOLID = 0.99
# How far, in pixels, the colours of a thing are carried outwards under the soft edge of its mask.
EDGE = 8
LINE_COLOURS = ((232, 74, 39), (30, 136, 229), (67, 160, 71), (253, 167, 32), (142, 36, 170), (0, 151, 167))


@dataclass(frozen=True)
class CanvasLook:
    """How an artist wants canvases: the widgets of First Frame Composer, by their names there."""

    layout: str = STACK
    keep_background_aspect: bool = False
    enlarge_small: bool = False
    crop_to_content: bool = False
    canvas_colour: str = "#ffffff"
    boxes: str = ""


def parse_colour(text: str) -> tuple[int, int, int]:
    """'#rrggbb' as three numbers of 0 to 255. Raises CanvasError."""
    digits = text.strip().lstrip("#")
    try:
        if len(digits) == 3:
            digits = "".join(2 * digit for digit in digits)
        if len(digits) != 6:
            raise ValueError
        return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    except ValueError:
        raise CanvasError(
            f"canvas_colour of '{NODE}' is {text!r}; expected a colour such as #ffffff, the white FFGo was trained on."
        ) from None


def cut_out(image_BHWC: torch.Tensor, mask_BHW: torch.Tensor | None, socket: str, *, crop: bool) -> list[Image.Image]:
    """Pictures of a batch as RGB or RGBA. mask: 1 where the thing is, as SAM 3 and BiRefNet give it.

    crop: an RGBA picture is cut to its content, so that an empty border takes no room of the canvas. With a mask its
    edges are cleaned; without one it is taken as it is, as the official script does. Raises ImageError or CanvasError
    naming `socket` for what is no picture, no mask of it, or transparent throughout.
    """
    check_image(image_BHWC, socket)
    if mask_BHW is None:
        return [_picture(image_HWC, socket, crop) for image_HWC in image_BHWC]
    if not bool(mask_BHW.any()):
        raise CanvasError(
            f"The mask of '{socket}' of '{NODE}' is empty: nothing of the picture would be seen. Masks are 1 where "
            "the thing is; invert it with 'Invert Mask', or take it out to use the whole picture."
        )
    clear_BHW = 1.0 - _one_a_picture(mask_BHW, image_BHWC)
    made_BHWC = with_mask(image_BHWC[..., :3], clear_BHW, f"mask of {socket}")
    if image_BHWC.shape[-1] == 4:
        # The smaller of both, not their product: a picture cut out with this very mask keeps its edge.
        alpha_BHW1 = image_BHWC[..., 3:]
        alpha_BHW1 = torch.minimum(alpha_BHW1, made_BHWC[..., 3:]) if made_BHWC.shape[-1] == 4 else alpha_BHW1
        made_BHWC = torch.cat([image_BHWC[..., :3], alpha_BHW1], dim=-1)
    # One after the other: cleaning holds several copies of a picture.
    return [_picture(clean_edges(made_BHWC[i : i + 1])[0], socket, crop) for i in range(len(made_BHWC))]


def _one_a_picture(mask_BHW: torch.Tensor, image_BHWC: torch.Tensor) -> torch.Tensor:
    """Several masks of one picture, as SAM 3 gives them for several things, become their union."""
    mask_BHW = (mask_BHW.unsqueeze(0) if mask_BHW.ndim == 2 else mask_BHW).float().clamp(0.0, 1.0)
    return mask_BHW.amax(0, keepdim=True) if image_BHWC.shape[0] == 1 and mask_BHW.ndim == 3 else mask_BHW


def clean_edges(image_BHWC: torch.Tensor) -> torch.Tensor:
    """RGBA whose half transparent edge has the colours of the thing, not a mixture with what was behind it.

    Colours are carried outwards from where alpha is solid, at most EDGE pixels; alpha stays. Hair that never becomes
    solid keeps its own colours. Other pictures come back as they are.
    """
    if image_BHWC.shape[-1] != 4:
        return image_BHWC
    image_BCHW = image_BHWC.movedim(-1, 1)
    alpha_B1HW = image_BCHW[:, 3:]
    known_B1HW = (alpha_B1HW >= SOLID).to(image_BHWC)
    soft_B1HW = (alpha_B1HW > 0) & (alpha_B1HW < SOLID)
    colour_BCHW = image_BCHW[:, :3] * known_B1HW
    for _ in range(EDGE):
        if not bool((soft_B1HW & (known_B1HW == 0)).any()):
            break
        near_B1HW = torch.nn.functional.avg_pool2d(known_B1HW, 3, 1, 1)
        spread_BCHW = torch.nn.functional.avg_pool2d(colour_BCHW, 3, 1, 1) / near_B1HW.clamp_min(1e-6)
        new_B1HW = soft_B1HW & (known_B1HW == 0) & (near_B1HW > 0)
        colour_BCHW = torch.where(new_B1HW, spread_BCHW, colour_BCHW)
        known_B1HW = torch.where(new_B1HW, torch.ones_like(known_B1HW), known_B1HW)
    colour_BCHW = torch.where(known_B1HW > 0, colour_BCHW, image_BCHW[:, :3])
    return torch.cat([colour_BCHW, alpha_B1HW], dim=1).movedim(1, -1)


def mask_notes(references: dict[int, torch.Tensor], masks: dict[int, torch.Tensor]) -> list[str]:
    """What an artist should know of masks by the number of their socket: joined, stretched, or the wrong way round."""
    notes = []
    for number, mask in masks.items():
        if bool((mask >= SOLID).all()):
            continue  # Load Image's mask of a picture without transparency, inverted: the picture is used whole
        image, mask_BHW = references[number], mask.unsqueeze(0) if mask.ndim == 2 else mask
        (count, tall, wide), (height, width) = mask_BHW.shape, image.shape[1:3]
        if image.shape[0] == 1 and count > 1:
            notes.append(f"mask_{number} holds {count} masks for one picture: all of them together are cut out.")
        if abs(wide * height - tall * width) > max(wide * height, tall * width) / 50:
            notes.append(f"mask_{number} is {wide}x{tall} and was stretched over its picture of {width}x{height}.")
        corners = mask_BHW[:, :: max(tall - 1, 1), :: max(wide - 1, 1)]
        if bool((corners >= SOLID).all()) and bool((mask_BHW <= CONTENT).any()):
            notes.append(
                f"mask_{number} keeps all corners of its picture and cuts a hole: Load Image's mask is such. If the "
                "hole is the thing you want, put 'Invert Mask' between."
            )
    return notes


def _picture(image_HWC: torch.Tensor, socket: str, crop: bool) -> Image.Image:
    image_HWC = image_HWC.detach().float().cpu().clamp(0.0, 1.0)
    if image_HWC.shape[-1] == 1:
        image_HWC = image_HWC.expand(-1, -1, 3)
    picture = Image.fromarray(np.ascontiguousarray(image_HWC.mul(255.0).round().to(torch.uint8).numpy()))
    if picture.mode != "RGBA":
        return picture
    seen = np.asarray(picture.getchannel("A")) >= 255 * CONTENT
    box = Image.fromarray(seen).getbbox()
    if box is None:
        raise CanvasError(f"The picture at '{socket}' of '{NODE}' is transparent throughout; connect another one.")
    return picture.crop(box) if crop else picture


def flatten(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """RGB; what is transparent shows the canvas. Done at full size, before scaling, so that edges get no dark rim."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    flat = Image.new("RGB", picture.size, colour)
    flat.paste(picture, mask=picture.getchannel("A"))
    return flat


def compose(
    layout: CanvasLayout, pictures: dict[str, Image.Image], colour: tuple[int, int, int], *,
    keep_background_aspect: bool = False, free: bool = False,
) -> Image.Image:  # fmt: skip
    """The canvas. pictures: RGB or RGBA by region name.

    In free boxes a picture with transparency is laid over what is drawn already; else everything is flattened first,
    as the official script does it.
    """
    canvas = Image.new("RGB", (layout.width, layout.height), colour)
    for region in layout.regions:
        picture = pictures[region.name]
        squeezed = region.name == BACKGROUND and not keep_background_aspect
        # Through 1280x720 as the official script does it, so that moving a background changes none of its pixels; a box
        # that is larger would lose detail that way.
        box = region.box
        squeezed = squeezed and not (free and (box.width > OFFICIAL_SIZE[0] or box.height > OFFICIAL_SIZE[1]))
        if free and picture.mode == "RGBA":
            scaled = _scaled_with_alpha(picture, region)
            canvas.paste(scaled, (region.box.x, region.box.y), scaled.getchannel("A"))
        else:
            flat = flatten(picture, colour)
            if squeezed:
                flat = flat.resize(OFFICIAL_SIZE)
            canvas.paste(_scaled(flat, region), (region.box.x, region.box.y))
    return canvas


def _scaled(picture: Image.Image, region: Region) -> Image.Image:
    size = region.box.width, region.box.height
    if picture.size == size:
        return picture
    shrunk = size[0] <= picture.width and size[1] <= picture.height
    if shrunk:
        small = picture.copy()
        small.thumbnail((region.cell.width, region.cell.height), Image.Resampling.LANCZOS)
        if small.size == size:  # Pillow's own way of shrinking, which the published canvases were made with
            return small
    return picture.resize(size, Image.Resampling.LANCZOS)


def _scaled_with_alpha(picture: Image.Image, region: Region) -> Image.Image:
    """Scaled with colours weighted by alpha, so that colours of transparent pixels do not bleed into the edge."""
    size = region.box.width, region.box.height
    return picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def compose_batch(
    pictures: dict[str, list[Image.Image]], size: tuple[int, int], look: CanvasLook
) -> tuple[torch.Tensor, list[CanvasLayout]]:
    """Canvases of a batch as IMAGE [B,H,W,3], and their layouts. One picture serves every canvas of a larger batch.

    pictures: of `named_pictures`. size: (width, height). Raises CanvasError for batches that do not fit together, for a
    colour that is none, and as `lay_out`.
    """
    colour = parse_colour(look.canvas_colour)
    counts = {name: len(made) for name, made in pictures.items()}
    longest = max(counts, key=counts.__getitem__, default="")
    count = counts.get(longest, 1)
    called = {name: name if name == BACKGROUND else f"reference_{name}" for name in counts}
    odd = [f"{called[name]} has {n}" for name, n in counts.items() if n not in (1, count)]
    if odd:
        raise CanvasError(
            f"The pictures of '{NODE}' come in batches of different lengths: {called[longest]} has {count}, "
            f"{', '.join(odd)}. Expected 1 or {count} of each."
        )
    canvases, layouts = [], []
    for i in range(count):
        chosen = {name: made[i if len(made) > 1 else 0] for name, made in pictures.items()}
        sizes = {name: picture.size for name, picture in chosen.items()}
        background = sizes.pop(BACKGROUND, None)
        layout = lay_out(
            *size, list(sizes.values()), background, names=list(sizes), layout=look.layout, boxes=look.boxes,
            keep_background_aspect=look.keep_background_aspect, enlarge=look.enlarge_small,
        )  # fmt: skip
        canvas = compose(
            layout, chosen, colour, keep_background_aspect=look.keep_background_aspect, free=look.layout == FREE
        )
        canvases.append(np.asarray(canvas))
        layouts.append(layout)
    return torch.from_numpy(np.stack(canvases)).float() / 255.0, layouts


def labelled(canvas_HWC: torch.Tensor, layout: CanvasLayout) -> torch.Tensor:
    """The canvas with each region framed and named, IMAGE [1,H,W,3]; the canvas itself is not changed."""
    picture = Image.fromarray(canvas_HWC.mul(255.0).round().to(torch.uint8).numpy())
    drawing = ImageDraw.Draw(picture)
    line = max(min(layout.width, layout.height) // 240, 1)
    font = ImageFont.load_default(size=max(min(layout.width, layout.height) // 28, 10))
    for region in layout.regions:
        # By number, so that a picture keeps its colour whatever it lies on.
        colour = LINE_COLOURS[(0 if region.name == BACKGROUND else int(region.name)) % len(LINE_COLOURS)]
        box = region.box
        drawing.rectangle((box.x, box.y, box.x + box.width - 1, box.y + box.height - 1), outline=colour, width=line)
        text = f"{region.label} {box.width}x{box.height}"
        right, bottom = drawing.textbbox((0, 0), text, font=font)[2:]
        at = (max(min(box.x, layout.width - right), 0), max(min(box.y, layout.height - bottom), 0))
        drawing.rectangle(drawing.textbbox(at, text, font=font), fill=colour)
        drawing.text(at, text, fill=(255, 255, 255), font=font)
    return torch.from_numpy(np.array(picture)).float().unsqueeze(0) / 255.0


def named_pictures(
    references: dict[int, torch.Tensor], masks: dict[int, torch.Tensor], background: torch.Tensor | None, *, crop: bool
) -> dict[str, list[Image.Image]]:
    """Every picture of a canvas by region name: 'background', and the number of each reference's socket.

    references, masks: by the number of their socket. crop: references with a mask are cut to their content always,
    those with transparency of their own where this is on. Raises CanvasError for a mask without its reference.
    """
    lone = [number for number in masks if number not in references]
    if lone:
        raise CanvasError(
            f"mask_{lone[0]} of '{NODE}' has no reference_{lone[0]}. Connect the picture it belongs to, or take it out."
        )
    made: dict[str, list[Image.Image]] = {}
    if background is not None:
        made[BACKGROUND] = cut_out(background, None, BACKGROUND, crop=False)
    for number, image in references.items():
        made[str(number)] = cut_out(image, masks.get(number), f"reference_{number}", crop=crop or number in masks)
    return made
