"""Long videos of the world with a visitor that is away for longer than FramePack looks back, and comes back.

FramePack shows a window the 19 latent frames before it (2.5 s) and the first picture. Here the visitor is out of sight
for 32 latent frames and more at a time, and what it looks like need not be in the first picture nor in the caption:
then nothing but a memory of the whole video can bring the same one back. It walks in and out, or the camera pans to it
and away. All of it repeats every 8 seconds, so when and where it must be is known for every frame. When it comes can
be seen: the ground is the darker the farther off the visitor is. Where is always the same: along the middle. So what a
video lacks without a memory is who comes, and nothing else; a video that stood still for 4 seconds could not know the
time, and small networks that cannot know the line draw pieces of a visitor on all of them.

Shape legend: T frames, H W pixels, 3 colour channels. Images are float32, 0..1. Positions are pixels (x right, y down),
times are frames at 30 a second. Moves are whole pixels a frame and 4 pixels a latent frame, so small networks meet few
cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import (
    GROUND_COLOURS,
    GROUND_PERIOD,
    GROUNDS,
    SHAPES,
    SIZE,
    SPRITE_COLOURS,
    TIDY_RADIUS,
    Scene,
    background,
    shape_mask,
    turning,
)  # fmt: skip

WALKS, CAMERA = "walks", "camera"
SIDES = ("left", "right", "top", "bottom")
# How far from its centre the widest shape (the diamond) reaches, and a pixel for its soft edge.
REACH = 1.25 * TIDY_RADIUS + 1
# Centre of the visitor at its farthest inside and outside, as distances from the edge that it comes by.
INSIDE, OUTSIDE = 40, -80
PERIOD = 2 * (INSIDE - OUTSIDE)  # frames from one visit to the next; the visitor moves a pixel a frame
# Frame of a visit in which it stands deepest in the picture, counted from where its centre is at -REACH.
EDGE = -int(REACH)
SHARE_SHOWN, SHARE_CAMERA, SHARE_NAMED = 0.25, 0.3, 0.5
# Light on the ground while the visitor is at its farthest, and at its nearest.
DUSK, DAY = 0.25, 1.0


@dataclass(frozen=True)
class LongScene:
    """One long video's whole truth.

    how: WALKS (the ground is still) or CAMERA (the ground moves along; sides left and right only). across: pixels on
    the axis it does not move on; random scenes have the middle. shown: it stands in the first picture, else it is out
    of sight there and comes in at once. named: the caption says its colour and shape.
    """

    colour: str = "red"
    shape: str = "circle"
    side: str = "left"
    how: str = WALKS
    ground: str = "hills"
    ground_colour: str = "navy"
    phase: float = 0.0
    across: float = SIZE / 2
    shown: bool = False
    named: bool = False

    def __post_init__(self):
        if self.how == CAMERA and self.side not in ("left", "right"):
            raise ValueError(f"The camera pans to the left or right, not to the {self.side}: the ground changes in x.")

    @property
    def caption(self) -> str:
        """The prompt this scene is trained and asked for with."""
        who = f"a {self.colour} {self.shape}" if self.named else "a visitor"
        what = f"the camera finds {who} on the" if self.how == CAMERA else f"{who} comes in from the"
        ground = f"{self.ground_colour} {self.ground}" if self.ground != "plain" else f"plain {self.ground_colour}"
        return f"{what} {self.side} and leaves and comes back over {ground} ground"


def random_long_scene(rng: np.random.Generator, *, shown: bool | None = None, named: bool | None = None) -> LongScene:
    """Draw a scene. shown: None for a quarter of the scenes with the visitor in their first picture. named: None for
    half of them with its colour and shape in their caption."""
    camera = rng.random() < SHARE_CAMERA
    in_picture, in_words = bool(rng.random() < SHARE_SHOWN), bool(rng.random() < SHARE_NAMED)
    return LongScene(
        colour=str(rng.choice(list(SPRITE_COLOURS))),
        shape=str(rng.choice(SHAPES)),
        side=str(rng.choice(SIDES[:2] if camera else SIDES)),
        how=CAMERA if camera else WALKS,
        ground=str(rng.choice(GROUNDS[:2] if camera else GROUNDS)),
        ground_colour=str(rng.choice(list(GROUND_COLOURS))),
        phase=float(8 * rng.integers(GROUND_PERIOD // 8)),
        shown=in_picture if shown is None else shown,
        named=in_words if named is None else named,
    )


def clock(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """Frames since the visit began that a video of this scene would have begun with, `[T]`."""
    return np.asarray(frames, dtype=np.float64) + ((INSIDE - EDGE) if scene.shown else 0)


def depth(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """How far inside the picture the visitor's centre is, `[T]`, from the edge it comes by; by -REACH it is gone."""
    return turning(EDGE, clock(scene, frames), OUTSIDE, INSIDE)


def centres(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """The visitor's centres `[T, 2]` (x, y), outside the picture while it is away."""
    inward = depth(scene, frames)
    along = inward if scene.side in ("left", "top") else SIZE - inward
    across = np.full_like(along, scene.across)
    return np.stack([along, across] if scene.side in ("left", "right") else [across, along], axis=-1)


def away(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """Whether no pixel of the visitor is in the picture, `[T]`."""
    return depth(scene, frames) <= -REACH


def wholly_there(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """Whether all of the visitor is in the picture, `[T]`."""
    return depth(scene, frames) >= REACH


def daylight(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """Light on the ground, `[T]`; it says how far off the visitor is."""
    return DUSK + (DAY - DUSK) * (depth(scene, frames) - OUTSIDE) / (INSIDE - OUTSIDE)


def visit(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """Number of the visit that each frame belongs to, from 0, `[T]`; an absence belongs to the visit before it."""
    return (clock(scene, frames) // PERIOD).astype(int)


def ground(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """The ground alone, in its light, `[T, H, W, 3]`. With CAMERA it moves with the visitor, which stands on it."""
    return _unlit(scene, np.asarray(frames)) * daylight(scene, frames).astype(np.float32)[:, None, None, None]


def _unlit(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    still = Scene(ground=scene.ground, ground_colour=scene.ground_colour, phase=scene.phase, tidy=True)
    if scene.how != CAMERA:
        return np.broadcast_to(background(still, frames[:1]), (len(frames), SIZE, SIZE, 3))
    moved = centres(scene, frames)[:, 0]
    panned = Scene(ground=scene.ground, ground_colour=scene.ground_colour, phase=scene.phase, pan=-1.0, tidy=True)
    return background(panned, moved)


def render(scene: LongScene, frames: np.ndarray) -> np.ndarray:
    """The video at the given frame numbers, `[T, H, W, 3]` float32 0..1."""
    mask = shape_mask(scene.shape, TIDY_RADIUS, centres(scene, frames))[..., None]
    colour = np.array(SPRITE_COLOURS[scene.colour], dtype=np.float32)
    return (ground(scene, frames) * (1 - mask) + colour * mask).astype(np.float32)
