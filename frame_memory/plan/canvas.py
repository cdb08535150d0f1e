"""Where everything lies on FFGo's first frame: one background on the right, references on the left.

Pixels, origin at the top left, boxes as x, y, width, height. Only numbers: what is drawn where, never how.
Source: reference/ffgo.md section 2 (official geometry), section 9 (small references lose their identity).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .buckets import nearest_valid
from .errors import PlanError

NODE = "First Frame Composer"
OFFICIAL_SIZE = (1280, 720)
STACK, TWO_COLUMNS, FREE = "official stack", "two columns", "free boxes"
LAYOUTS = (STACK, TWO_COLUMNS, FREE)
BACKGROUND = "background"
# Four subjects beside the scene are what the paper validated; smaller sides than this lost their detail.
MOST_SUBJECTS, LEAST_SIDE = 4, 128
# Sides of a canvas, in pixels.
LEAST_CANVAS, MOST_SIDE = 64, 8192
# A background is said to be squeezed from this change of its aspect on: 4:3 is, 3:2 is not.
SQUEEZED = 1.25
# Boxes that fill less than this much of the canvas, both ways, were probably drawn for a smaller one.
FILLED = 0.75


class CanvasError(PlanError):
    """A layout that cannot be. `line` is the line of the typed boxes, from 1, or 0."""

    def __init__(self, text: str, line: int = 0):
        super().__init__(text)
        self.line = line


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the canvas; parts of it may lie outside."""

    x: int
    y: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.x}, {self.y}, {self.width} x {self.height}"


@dataclass(frozen=True)
class Region:
    """One picture's place. name: 'background' or the reference's number. cell: the room it was given."""

    name: str
    cell: Box
    box: Box

    @property
    def label(self) -> str:
        return self.name if self.name == BACKGROUND else f"reference {self.name}"


@dataclass(frozen=True)
class CanvasLayout:
    """Regions in the order they are drawn: later ones cover earlier ones. notes: what an artist should know."""

    width: int
    height: int
    regions: tuple[Region, ...]
    notes: tuple[str, ...] = ()


def fit(size: tuple[int, int], room: tuple[int, int], *, enlarge: bool) -> tuple[int, int]:
    """The largest (width, height) of the aspect of `size` inside `room`, rounded as Pillow's thumbnail rounds.

    Without `enlarge` a picture that is smaller than the room keeps its size.
    """
    (width, height), (most_width, most_height) = size, room
    if not enlarge and most_width >= width and most_height >= height:
        return size
    aspect = width / height
    if most_width / most_height >= aspect:
        return _nearest(most_height * aspect, lambda n: abs(aspect - n / most_height)), most_height
    return most_width, _nearest(most_width / aspect, lambda n: 0 if n == 0 else abs(aspect - most_width / n))


def _nearest(number: float, off: Callable[[int], float]) -> int:
    return max(min(math.floor(number), math.ceil(number), key=off), 1)


def _middle(size: tuple[int, int], cell: Box) -> Box:
    return Box(cell.x + (cell.width - size[0]) // 2, cell.y + (cell.height - size[1]) // 2, *size)


def nearest_canvas(width: int, height: int) -> tuple[int, int]:
    """The nearest (width, height) that `check_canvas` takes."""
    wide, tall = (min(max(side, LEAST_CANVAS), MOST_SIDE) for side in nearest_valid(width, height))
    return wide, tall


def check_canvas(width: int, height: int) -> None:
    """Refuse sizes that Wan cannot make: multiples of 16, 64 to 8192. Names the nearest pair."""
    near = nearest_canvas(width, height)
    if (width, height) != near:
        raise CanvasError(
            f"The canvas of '{NODE}' is {width}x{height}; width and height must be multiples of 16 from "
            f"{LEAST_CANVAS} to {MOST_SIDE}. The nearest is {near[0]}x{near[1]}. Use the size the video is made at."
        )


def lay_out(
    width: int, height: int, references: Sequence[tuple[int, int]], background: tuple[int, int] | None = None, *,
    names: Sequence[str] = (), layout: str = STACK, boxes: str = "", keep_background_aspect: bool = False,
    enlarge: bool = False,
) -> CanvasLayout:  # fmt: skip
    """Place pictures of the given (width, height) on a canvas.

    Official: the background on the right half, brought to 1280x720 first unless keep_background_aspect, and never
    enlarged; n references on the left half in slots of height // n, top to bottom, shrunk to fit, and enlarged only
    with `enlarge`. 'two columns' puts the references in a grid of two columns there. 'free boxes' takes `boxes`
    (`parse_boxes`); what has no box there keeps its official place, and a note says so. Without a background the
    references have the whole canvas. names: of the references, where they are not 1, 2, 3 and so on.
    Raises CanvasError for sizes off the grid, an unknown layout, nothing to place, or boxes that cannot be read.
    """
    check_canvas(width, height)
    if layout not in LAYOUTS:
        raise CanvasError(f"layout of '{NODE}' is {layout!r}; expected one of: {', '.join(LAYOUTS)}.")
    if not references and background is None:
        raise CanvasError(f"'{NODE}' has nothing to place: connect at least one reference or a background.")
    left = width // 2 if background is not None else width
    cells = _cells(len(references), left, height, 2 if layout == TWO_COLUMNS else 1)
    regions = []
    if background is not None:
        cell = Box(left, 0, width // 2, height)
        # The official script squeezes every background to 16:9 before it shrinks it.
        source = background if keep_background_aspect else OFFICIAL_SIZE
        regions.append(Region(BACKGROUND, cell, _middle(fit(source, (cell.width, cell.height), enlarge=enlarge), cell)))
    sizes = dict(zip(names or map(str, range(1, len(references) + 1)), references, strict=True))
    for (name, size), cell in zip(sizes.items(), cells, strict=True):
        regions.append(Region(name, cell, _middle(fit(size, (cell.width, cell.height), enlarge=enlarge), cell)))
    notes = []
    if layout != FREE and any(line.split("#")[0].strip() for line in boxes.splitlines()):
        notes.append(f"'boxes' is not used, because layout is '{layout}': choose '{FREE}'.")
    if background is not None:
        sizes[BACKGROUND] = background
    made = tuple(regions)
    if layout == FREE:
        made = _freely(width, height, regions, sizes, parse_boxes(boxes), keep_background_aspect, notes)
    if background is not None and not keep_background_aspect:
        notes += _squeezed(next(region for region in made if region.name == BACKGROUND), background)
    return _with_notes(width, height, made, notes, layout)


def _cells(count: int, width: int, height: int, columns: int) -> list[Box]:
    """Slots row by row. An odd last picture of two columns has the whole width of its row."""
    if count == 0:
        return []
    columns = min(columns, count)
    rows = -(-count // columns)
    slot, column = height // rows, width // columns
    cells = []
    for i in range(count):
        row, at = divmod(i, columns)
        alone = columns > 1 and i == count - 1 and at == 0
        cells.append(Box(0 if alone else at * column, row * slot, width if alone else column, slot))
    return cells


_LINE = re.compile(
    r"(?P<name>background|reference[\s_]*\d+|\d+)\s*:\s*(?P<x>-?\d+)\s*,\s*(?P<y>-?\d+)\s*,\s*(?P<w>\d+)\s*[x×,]\s*(?P<h>\d+)",
    re.IGNORECASE,
)


def parse_boxes(text: str) -> dict[str, Box]:
    """Typed boxes by name, in the order they are drawn: one a line, `2: x, y, width x height`.

    The name is a reference's number from 1, or its socket's ('reference_2'), or 'background'. Empty lines and what
    follows # are passed over.
    Raises CanvasError with the line's number, what was read, and an example.
    """
    boxes: dict[str, Box] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise CanvasError(
                f"Line {number} of 'boxes' of '{NODE}' is {line!r}; expected a name and four whole numbers in pixels, "
                "such as '1: 40, 60, 320 x 480' or 'background: 640, 180, 640 x 360'.",
                number,
            )
        name = re.sub(r"(?i)reference[\s_]*", "", found["name"]).lower()
        name = name if name == BACKGROUND else str(int(name))
        box = Box(*(int(found[k]) for k in ("x", "y", "w", "h")))
        if name == "0" or name in boxes:
            why = "references count from 1" if name == "0" else f"{name} has a box already"
            raise CanvasError(f"Line {number} of 'boxes' of '{NODE}' is {line!r}, but {why}.", number)
        sides, places = (box.width, box.height), (abs(box.x), abs(box.y))
        if min(sides) < 1 or max(*sides, *places) > MOST_SIDE:
            raise CanvasError(
                f"Line {number} of 'boxes' of '{NODE}' is {line!r}; expected sides of 1 to {MOST_SIDE} pixels, and "
                f"places from -{MOST_SIDE} to {MOST_SIDE}.",
                number,
            )
        boxes[name] = box
    return boxes


def _freely(
    width: int, height: int, regions: list[Region], sizes: Mapping[str, tuple[int, int]], boxes: Mapping[str, Box],
    keep_background_aspect: bool, notes: list[str],
) -> tuple[Region, ...]:  # fmt: skip
    """Regions in the order they are drawn: what has no box, then the boxes as written.

    A background whose box comes first lies under everything, also under references without a box. Adds to `notes`.
    """
    usual = {region.name: region for region in regions}
    placed, spare = [], [name for name in boxes if name not in sizes]
    written = [name for name in boxes if name in sizes]
    order = [*(name for name in usual if name not in boxes), *written]
    if written and written[0] == BACKGROUND:
        order.sort(key=lambda name: name != BACKGROUND)
    for name in order:
        if name not in boxes:
            placed.append(usual[name])
            notes.append(f"{usual[name].label} has no box and keeps its usual place.")
            continue
        cell = boxes[name]
        if cell.x >= width or cell.y >= height or cell.x + cell.width <= 0 or cell.y + cell.height <= 0:
            raise CanvasError(
                f"The box of {usual[name].label} ({cell}) lies outside the canvas of {width}x{height}. Nearest inside: "
                f"{_inside(cell, width, height)}. Boxes are pixels, perhaps of another width and height. Change "
                f"'boxes' in '{NODE}'."
            )
        stretched = name == BACKGROUND and not keep_background_aspect
        size = (cell.width, cell.height) if stretched else fit(sizes[name], (cell.width, cell.height), enlarge=True)
        placed.append(Region(name, cell, _middle(size, cell)))
    if spare:
        notes.append(f"There are boxes for {', '.join(spare)}, but no such pictures are connected.")
    used = [boxes[name] for name in written]
    far = max((b.x + b.width for b in used), default=0), max((b.y + b.height for b in used), default=0)
    if len(used) == len(sizes) and far[0] <= FILLED * width and far[1] <= FILLED * height:
        notes.append(
            f"All boxes lie within {far[0]}x{far[1]} of the canvas of {width}x{height}: boxes are pixels, and these "
            "were probably drawn for a smaller canvas."
        )
    return tuple(placed)


def _squeezed(region: Region, source: tuple[int, int]) -> list[str]:
    aspect, was = region.box.width / region.box.height, source[0] / source[1]
    if max(aspect / was, was / aspect) < SQUEEZED:
        return []
    return [
        f"The background of {source[0]}x{source[1]} is squeezed to {region.box.width}x{region.box.height}. Switch on "
        "'keep_background_aspect' to keep its shape, or crop it to the shape of its place."
    ]


def _inside(box: Box, width: int, height: int) -> Box:
    w, h = min(box.width, width), min(box.height, height)
    return Box(min(max(box.x, 0), width - w), min(max(box.y, 0), height - h), w, h)


def _visible(box: Box, width: int, height: int) -> Box:
    x, y = max(box.x, 0), max(box.y, 0)
    return Box(x, y, min(box.x + box.width, width) - x, min(box.y + box.height, height) - y)


def _too_small(regions: Sequence[Region], width: int, height: int, layout: str) -> list[str]:
    """One note for all regions that need the same remedy."""
    alike: dict[str, list[str]] = {}
    for region in regions:
        seen = _visible(region.box, width, height)
        if min(seen.width, seen.height) < LEAST_SIDE:
            told = f"{region.label} is only {seen.width}x{seen.height} pixels"
            alike.setdefault(_remedy(region, seen, len(regions), layout), []).append(told)
    ending = f"on the canvas (under {LEAST_SIDE}): details will be lost."
    return [f"{', '.join(told)} {ending} {remedy}" for remedy, told in alike.items()]


def _remedy(region: Region, seen: Box, count: int, layout: str) -> str:
    box, cell = region.box, region.cell
    if min(box.width, box.height) >= LEAST_SIDE:
        return "Move it further onto the canvas."
    if layout == FREE:
        return f"Make its box {'wider' if box.width == cell.width and box.height < cell.height else 'larger'}."
    if box.width < cell.width and box.height < cell.height and min(cell.width, cell.height) >= LEAST_SIDE:
        return "The picture itself is that small: switch on 'enlarge_small', or use a larger picture."
    if box.width == cell.width and box.height < cell.height:
        return f"It fills the width of its room: use a larger canvas, or a wider box ('{FREE}')."
    columns = f"'{TWO_COLUMNS}', " if layout == STACK and count > 3 else ""
    return f"Use {columns}fewer references, a larger canvas, or '{FREE}'."


def _with_notes(
    width: int, height: int, regions: tuple[Region, ...], notes: list[str], layout: str
) -> CanvasLayout:  # fmt: skip
    """Add what the paper and its users warn of."""
    subjects = [region for region in regions if region.name != BACKGROUND]
    if not subjects:
        notes.append("There are no references: connect what is to appear in the video to reference_1 and on.")
    if len(subjects) > MOST_SUBJECTS:
        notes.append(
            f"{len(subjects)} references: FFGo was validated with up to {MOST_SUBJECTS} beside the scene; identities "
            "may get lost or mixed."
        )
    notes += _too_small(regions, width, height, layout)
    for region in regions:
        seen = _visible(region.box, width, height)
        if seen != region.box:
            notes.append(f"{region.label} is cut off by the edge of the canvas: {seen} of {region.box} is seen.")
    for i, region in enumerate(regions):
        for above in regions[i + 1 :]:
            share = _overlap(region.box, above.box) / (region.box.width * region.box.height)
            if share > 0:
                notes.append(f"{above.label} covers {share:.0%} of {region.label}.")
    return CanvasLayout(width, height, regions, tuple(notes))


def _overlap(a: Box, b: Box) -> int:
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(width, 0) * max(height, 0)


def describe_all(layouts: Sequence[CanvasLayout], more: Sequence[str] = ()) -> str:
    """The report of a batch: notes of all canvases and `more` notes, then the regions of the first canvas."""
    notes = list(more)
    if len(layouts) > 1:
        notes.append(
            f"{len(layouts)} canvases, one for each picture of the batch; the places below are those of the first. "
            "'Wan Image To Video' takes them as the first frames of one video: put 'Get Image from Batch' behind "
            "'image' and make a video of one canvas at a time."
        )
    known = set(layouts[0].notes)
    for number, layout in enumerate(layouts[1:], 2):
        notes += [f"canvas {number}: {note}" for note in layout.notes if note not in known]
        known.update(layout.notes)
    return describe(replace(layouts[0], notes=(*layouts[0].notes, *notes)))


def describe(layout: CanvasLayout) -> str:
    """The report of a node: the notes, because a node shows few lines, and each picture's region."""
    lines = [*(f"Note: {note}" for note in layout.notes), f"Canvas {layout.width}x{layout.height}"]
    for region in layout.regions:
        share = region.box.width * region.box.height / (layout.width * layout.height)
        lines.append(f"{region.label}: {region.box} ({share:.0%} of the canvas)")
    return "\n".join(lines)
