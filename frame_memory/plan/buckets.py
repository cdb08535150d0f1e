"""Picture sizes FramePack was trained on, and the nearest valid size to any other.

Source: framepack reference 6. Sizes of buckets are (height, width) as in the source; everything that faces an artist is
width x height.
"""

from __future__ import annotations

from .errors import IMAGE, PlanError, refusal

BASE = 640
# Sides must be multiples of this: the autoencoder halves a side three times, the patches once more. Wan 2.2 5B's
# autoencoder halves it four times, so its sides are multiples of 32; those of the buckets are that too.
MULTIPLE = 16

# (height, width) at base 640, in the published order, which decides ties.
BUCKETS: tuple[tuple[int, int], ...] = (
    (416, 960),
    (448, 864),
    (480, 832),
    (512, 768),
    (544, 704),
    (576, 672),
    (608, 640),
    (640, 608),
    (672, 576),
    (704, 544),
    (768, 512),
    (832, 480),
    (864, 448),
    (960, 416),
)


def nearest_bucket(height: int, width: int, base: int = BASE, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The (height, width) of the bucket whose shape is nearest: min |h*bw - w*bh|, the later of equals.

    base other than 640 scales the bucket and rounds its sides to multiples of `multiple`. Raises PlanError for empty
    pictures.
    """
    if height < 1 or width < 1:
        raise PlanError(refusal(f"a picture of {width}x{height}", "at least 1x1 pixels", "a loaded image", IMAGE))
    if base < multiple:
        raise PlanError(refusal(f"size {base}", f"at least {multiple}", str(BASE), IMAGE))
    chosen = min(reversed(BUCKETS), key=lambda bucket: abs(height * bucket[1] - width * bucket[0]))
    if base == BASE:
        return chosen
    tall, wide = (max(round(side * base / BASE / multiple), 1) * multiple for side in chosen)
    return tall, wide


def nearest_valid(width: int, height: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The (width, height) on the grid nearest to this one; halves round up, nothing below one grid step."""
    wide, tall = (max((2 * side + multiple) // (2 * multiple), 1) * multiple for side in (width, height))
    return wide, tall


def off_grid(width: int, height: int, node: str = IMAGE, multiple: int = MULTIPLE) -> str | None:
    """What is wrong with a size, with the nearest valid pair; None where both sides are positive multiples."""
    nearest = nearest_valid(width, height, multiple)
    if (width, height) == nearest:
        return None
    expected = f"both sides multiples of {multiple}"
    return refusal(f"width x height {width}x{height}", expected, f"{nearest[0]}x{nearest[1]}", node)


def check_size(width: int, height: int, node: str = IMAGE, multiple: int = MULTIPLE) -> None:
    """Raise PlanError with the nearest valid pair unless both sides are positive multiples (fault 23)."""
    wrong = off_grid(width, height, node, multiple)
    if wrong is not None:
        raise PlanError(wrong)
