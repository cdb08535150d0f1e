"""Whether a scene or a subject comes back as it was: its pictures at its return against those at its first appearance.

A number alone says little (two pictures of one video are never unlike), so it stands on a scale: how alike the first
appearance's own pictures are among themselves, and how like them the pictures between are, where it is away.

Shape suffixes: B pictures, H height, W width, C colours, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .contact import BACKGROUND, GAP, TEXT, to_bytes
from .footage import Footage
from .likeness import (
    as_picture,
    colours_of,
    features_of,
    mask_for,
    shared_colours,
    shared_structure,
    structure_of,
    subject_of,
)

NODE = "Memory Recall"
# Pictures looked at of each stretch.
LOOKS = 8
# Frames of a stretch up to which all are read; of longer ones only those that are looked at, each sought.
READ_THROUGH = 240
# Longest side at which pictures are kept for comparison, pixels: more than any vision model looks at.
KEPT_SIDE = 512
PAIR_HEIGHT, CAPTION = 384, 28
# Below this distance between the two ends of the scale there is no scale.
NO_SCALE = 0.02


class RecallError(ValueError):
    """Stretches or boxes that cannot be compared. The message says given, expected, nearest, and what to change."""


@dataclass(frozen=True)
class Appearance:
    """Where something is seen: seconds [start, stop), and its area: box (x, y, width, height) in pixels, or mask.

    name: of the sockets, "first" or "return". mask_BHW: one, one a frame of the stretch, or one a frame of the video.
    """

    name: str
    start: float
    stop: float
    box: tuple[int, int, int, int] | None = None
    mask_BHW: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Recall:
    """similarity: 0 to 1, by `by`. among: of the first appearance's pictures among themselves; between: of those
    between to them; both None where there are none. colour, structure: the plain measures. picture: the pair, an IMAGE.
    notes: what to know of the areas.
    """

    similarity: float
    by: str
    among: float | None
    between: float | None
    colour: float
    structure: float
    times: tuple[float, float]
    picture_BHWC: Tensor
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """Where the return stands between the pictures between (0) and the first appearance itself (1)."""
        if self.among is None or self.between is None or self.among - self.between < NO_SCALE:
            return None
        return (self.similarity - self.between) / (self.among - self.between)

    def describe(self) -> str:
        """For the node: warnings, the similarity and its place on the scale first, as the pair leaves little room."""
        lines = [*self.notes, f"Similarity at the return: {self.similarity:.3f} ({self.by})."]
        if self.share is not None:
            lines.append(f"From 0 (forgotten) to 1 (as it was): {_place(self.share)}.")
        if self.among is not None:
            ends = "The ends of that scale" if self.share is not None else "For comparison"
            lines.append(f"{ends}: pictures of the first appearance among themselves {self.among:.3f}")
            lines[-1] += "." if self.between is None else f", pictures between the two {self.between:.3f}."
        lines.append(f"Colours {self.colour:.3f}, structure {self.structure:.3f} (0 to 1, without a model).")
        lines.append(f"The pair that is most alike: {self.times[0]:.2f} s and {self.times[1]:.2f} s.")
        return "\n".join(lines)


def _place(share: float) -> str:
    """Where a return stands on the scale; outside of it in words, as a number there says nothing."""
    if share <= -0.005:
        return (
            "below 0, less alike than the pictures between. Either what is compared was never away between the two, or "
            "the return shows something else"
        )
    return f"{abs(share):.2f}" if share < 1.005 else "above 1, more alike than the first appearance's own pictures"


def parse_box(text: str, width: int, height: int, name: str) -> tuple[int, int, int, int] | None:
    """'x,y,w,h' in pixels of the video; None for an empty text. Raises RecallError with what fits."""
    if not text.strip():
        return None
    try:
        x, y, w, h = (round(float(part)) for part in text.replace(";", ",").split(","))
    except (ValueError, OverflowError):
        raise RecallError(
            f"'{name}' of '{NODE}' is {text.strip()!r}; expected four numbers x,y,width,height in pixels, such as "
            f"'0,0,{width},{height}' for the whole picture."
        ) from None
    given = f"'{name}' of '{NODE}' is {text.strip()!r}"
    if w < 1 or h < 1:
        raise RecallError(
            f"{given}, a box without {'width' if w < 1 else 'height'}; expected x,y,width,height in pixels, such as "
            f"'0,0,{width},{height}' for the whole picture."
        )
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if left >= right or top >= bottom:  # of its size, moved as far as it takes
        left, top = max(min(left, width - w), 0), max(min(top, height - h), 0)
        raise RecallError(
            f"{given}, which lies outside of the picture of {width}x{height}. The nearest box of that size is "
            f"'{left},{top},{min(w, width)},{min(h, height)}'."
        )
    inside = left, top, right - left, bottom - top
    if (x, y, w, h) != inside:
        raise RecallError(
            f"{given}, which goes beyond the picture of {width}x{height}. Its part inside is "
            f"'{','.join(map(str, inside))}'."
        )
    return inside


def frames_of(seen: Appearance, footage: Footage) -> range:
    """The frames of an appearance. Raises RecallError for times outside of the video."""
    length, frame = footage.frames / footage.fps, 1 / footage.fps
    if 0 <= seen.stop <= seen.start < length:
        nearest = (seen.stop, seen.start) if seen.stop < seen.start else (seen.start, min(seen.start + frame, length))
        raise RecallError(
            f"'{seen.name}_start' and '{seen.name}_stop' of '{NODE}' are {seen.start:g} and {seen.stop:g} s, so the "
            f"stretch ends before it has begun; expected the stop after the start, within 0 to {length:.2f} s. The "
            f"nearest is {nearest[0]:.2f} to {nearest[1]:.2f}."
        )
    if not 0 <= seen.start < seen.stop or seen.start >= length:
        start = min(max(seen.start, 0.0), max(length - frame, 0.0))
        raise RecallError(
            f"'{seen.name}_start' and '{seen.name}_stop' of '{NODE}' are {seen.start:g} and {seen.stop:g} s; expected "
            f"a stretch of the video, 0 to {length:.2f} s. The nearest is {start:.2f} to "
            f"{min(max(seen.stop, start + frame), length):.2f}."
        )
    first = min(round(seen.start * footage.fps), footage.frames - 1)
    return range(first, max(min(round(seen.stop * footage.fps), footage.frames), first + 1))


def evenly(frames: range, count: int = LOOKS) -> list[int]:
    """At most `count` of them, from the first to the last."""
    count = min(count, len(frames))
    return sorted({frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)})


def compare(
    footage: Footage, first: Appearance, back: Appearance, clip_vision=None,
    interrupt: Callable[[], None] = lambda: None,
) -> Recall:  # fmt: skip
    """Look at both appearances, and at what lies between them. Raises RecallError, LikenessError and what reading does.

    Each picture of the return is compared with the one of the first appearance that it is most like; the mean counts.
    """
    if footage.frames < 2:
        raise RecallError(
            f"'{NODE}' got one picture; expected a video, or images, in which something is seen, is away, and comes "
            "back: in one picture there is no return. Connect more pictures."
        )
    spans = frames_of(first, footage), frames_of(back, footage)
    if spans[1].start < spans[0].stop:
        raise RecallError(
            f"The return begins at {back.start:g} s, before the first appearance ends at {first.stop:g} s; expected it "
            f"after. Change 'return_start' of '{NODE}' to {spans[0].stop / footage.fps:.2f} or later."
        )
    early, late = (_pictures(footage, a, span, interrupt) for a, span in zip((first, back), spans))
    gap = range(spans[0].stop, spans[1].start)
    away = {}
    if first.mask_BHW is None and len(gap) > 0:
        away = _pictures(footage, Appearance("first", 0, 0, first.box), gap, interrupt)
    pictures = {**early, **away, **late}
    colours, structures = _each(colours_of, pictures, interrupt), _each(structure_of, pictures, interrupt)

    def colour_pairs(a, b):
        return np.array([[shared_colours(colours[i], colours[j]) for j in b] for i in a])

    def structure_pairs(a, b):
        return np.array([[shared_structure(structures[i], structures[j]) for j in b] for i in a])

    if clip_vision is None:
        by, score = "colours and structure, no model connected", lambda a, b: (
            (colour_pairs(a, b) + structure_pairs(a, b)) / 2
        )  # fmt: skip
    else:
        by = "cosine of what clip_vision sees"
        seen = _each(lambda picture_BHWC: features_of(clip_vision, picture_BHWC, NODE)[0], pictures, interrupt)

        def score(a, b):
            return (torch.stack([seen[i] for i in a]) @ torch.stack([seen[j] for j in b]).T).numpy()

    found = score(late, early)
    among = score(early, early) if len(early) > 1 else None
    row, column = np.unravel_index(int(found.argmax()), found.shape)
    pair = list(early)[column], list(late)[row]
    similarity = _clip(float(found.max(axis=1).mean()))
    times = pair[0] / footage.fps, pair[1] / footage.fps
    return Recall(
        similarity, by, None if among is None else _clip(_best_other(among)),
        _clip(float(score(away, early).max(axis=1).mean())) if away else None,
        float(colour_pairs(late, early).max(axis=1).mean()), float(structure_pairs(late, early).max(axis=1).mean()),
        times, _draw_pair((early[pair[0]], late[pair[1]]), times, similarity),
        (*_cut_short(footage, first, back), *_one_sided(first, back)),
    )  # fmt: skip


def _each(measure, pictures: dict[int, Tensor], interrupt) -> dict[int, Tensor]:
    """What a measure keeps of every picture, by frame number; each is looked at once, however often it is compared."""
    found = {}
    for number, picture_BHWC in pictures.items():
        interrupt()
        found[number] = measure(picture_BHWC)
    return found


def _cut_short(footage: Footage, *stretches: Appearance) -> tuple[str, ...]:
    """A warning for each stretch that goes on behind the video's end: less of it counts than was asked for."""
    length = footage.frames / footage.fps
    return tuple(
        f"Warning: '{seen.name}_stop' is {seen.stop:g} s, and the video ends at {length:.2f} s; only "
        f"{seen.start:g} to {length:.2f} s is looked at."
        for seen in stretches
        if seen.stop > length + 1 / footage.fps
    )


def _one_sided(first: Appearance, back: Appearance) -> tuple[str, ...]:
    """A note where a subject on grey is compared with whole pictures, which is hardly ever meant."""
    if (first.mask_BHW is None) == (back.mask_BHW is None):
        return ()
    has, lacks = (back, first) if first.mask_BHW is None else (first, back)
    return (
        f"Warning: '{has.name}_mask' is connected and '{lacks.name}_mask' is not, so a subject on grey is compared "
        "with pictures that have a background. Connect both or neither.",
    )


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _best_other(square: np.ndarray) -> float:
    """Mean of the best match of each picture among the others of its stretch."""
    others = square.astype(float).copy()
    np.fill_diagonal(others, -np.inf)
    return float(others.max(axis=1).mean())


def _pictures(footage: Footage, seen: Appearance, frames: range, interrupt) -> dict[int, Tensor]:
    """Some pictures of a stretch, cut to the area and made small, by frame number."""
    wanted, found = evenly(frames), {}
    parts = [frames] if len(frames) <= READ_THROUGH else [range(number, number + 1) for number in wanted]
    for part in parts:
        number = part.start
        for chunk_THWC in footage.between(part.start, part.stop):
            interrupt()
            for frame_HWC in chunk_THWC:
                if number in wanted:
                    shown = _area(as_picture(frame_HWC), seen, number, frames, footage.frames)
                    if shown is not None:
                        found[number] = _small(shown)
                number += 1
    if not found:
        raise RecallError(
            f"'{seen.name}_mask' of '{NODE}' shows nothing from {frames.start / footage.fps:.2f} to "
            f"{frames.stop / footage.fps:.2f} s; expected white where the subject is. Change the mask or the times."
        )
    return found


def _area(picture_BHWC: Tensor, seen: Appearance, number: int, frames: range, total: int) -> Tensor | None:
    if seen.mask_BHW is not None:
        count = 1 if seen.mask_BHW.ndim == 2 else seen.mask_BHW.shape[0]
        index, of = (number, total) if count == total else (number - frames.start, len(frames))
        size = (picture_BHWC.shape[1], picture_BHWC.shape[2])
        return subject_of(picture_BHWC, mask_for(seen.mask_BHW, index, of, size, f"{seen.name}_mask", NODE))
    if seen.box is None:
        return picture_BHWC
    x, y, w, h = seen.box
    return picture_BHWC[:, y : y + h, x : x + w]


def _small(picture_BHWC: Tensor) -> Tensor:
    height, width = picture_BHWC.shape[1:3]
    scale = KEPT_SIDE / max(height, width)
    if scale >= 1:
        return picture_BHWC.clone()
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return torch.nn.functional.interpolate(picture_BHWC.movedim(-1, 1), size, mode="area").movedim(1, -1)


def _draw_pair(pair: Sequence[Tensor], times: Sequence[float], similarity: float) -> Tensor:
    """Two pictures beside each other with their times, IMAGE [1,H,W,3]."""
    pictures = [Image.fromarray(to_bytes(picture_BHWC[0])) for picture_BHWC in pair]
    sized = [p.resize((max(round(PAIR_HEIGHT * p.width / p.height), 1), PAIR_HEIGHT)) for p in pictures]
    font = ImageFont.load_default(16)
    captions = [f"first, {times[0]:.2f} s", f"return, {times[1]:.2f} s   {similarity:.3f}"]
    widths = [max(p.width, round(font.getlength(text))) for p, text in zip(sized, captions)]
    sheet = Image.new("RGB", (sum(widths) + 3 * GAP, PAIR_HEIGHT + CAPTION + 2 * GAP), BACKGROUND)
    pen, left = ImageDraw.Draw(sheet), GAP
    for picture, text, width in zip(sized, captions, widths):
        sheet.paste(picture, (left, GAP))
        pen.text((left, PAIR_HEIGHT + 2 * GAP), text, fill=TEXT, font=font)
        left += width + GAP
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
