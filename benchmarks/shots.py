"""Shots of several sprites, hard cuts between shots, and first frames composed of cut-outs: the world FFGo is measured
on.

A `Shot` has a cast of up to five sprites, each of another colour and another shape, each in a lane of its own, all
moving the same way over one ground. A film's cut keeps the cast and its order from top to bottom; where in their lanes
the sprites are, how large they are, and the ground, change.

Shape legend: T frames, H W pixels (96 x 96), 3 colour channels. Images are float32, 0..1. Positions are pixels (x
right, y down), speeds are pixels a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from frame_memory.plan.canvas import lay_out
from frame_memory.video.canvas import compose

from . import world

WIDTH, HEIGHT = 96, 96
RADIUS, PACE = 9.0, 0.5
MOST = 5
SHAPES = (*world.SHAPES, "cross")
# White is left out: a white cut-out cannot be seen on FFGo's white canvas.
COLOURS = {**{k: v for k, v in world.SPRITE_COLOURS.items() if k != "white"}, "cyan": (0.15, 0.85, 0.90)}
STUDIO = "studio"
WHITE = (255, 255, 255)
DIRECTIONS = ("left", "right")
GRID = 4


@dataclass(frozen=True)
class Sprite:
    colour: str
    shape: str


@dataclass(frozen=True)
class Shot:
    """One shot's whole truth. cast: from top to bottom; starts: where each starts, pixels from the left."""

    cast: tuple[Sprite, ...]
    starts: tuple[float, ...]
    direction: str
    ground: str
    ground_colour: str
    phase: float
    radius: float = RADIUS

    def caption(self, *, ground: bool = True, ground_colour: bool = True) -> str:
        """What is seen, without the sprites' colours: those are only in the picture."""
        words = [*(s.shape for s in self.cast), "move", self.direction]
        if ground:
            words += ["over", *([self.ground_colour] if ground_colour and self.ground != STUDIO else []), self.ground]
        return " ".join(words)


def random_cast(rng: np.random.Generator, count: int) -> tuple[Sprite, ...]:
    """Sprites that differ in colour and in shape."""
    colours, shapes = rng.permutation(list(COLOURS))[:count], rng.permutation(SHAPES)[:count]
    return tuple(Sprite(str(c), str(s)) for c, s in zip(colours, shapes, strict=True))


def random_shot(rng: np.random.Generator, cast: tuple[Sprite, ...], *, studio: bool = False) -> Shot:
    """A shot of this cast. studio: on white, at any size from 6 to 9 pixels of radius."""
    places = np.arange(GRID * 3, WIDTH - GRID * 2, GRID)
    return Shot(
        cast=cast,
        starts=tuple(float(rng.choice(places)) for _ in cast),
        direction=str(rng.choice(DIRECTIONS)),
        ground=STUDIO if studio else str(rng.choice(world.GROUNDS)),
        ground_colour="white" if studio else str(rng.choice(list(world.GROUND_COLOURS))),
        phase=float(8 * rng.integers(world.GROUND_PERIOD // 8)),
        radius=float(rng.integers(6, 10)) if studio else RADIUS,
    )


def next_shot(rng: np.random.Generator, shot: Shot, *, studio: bool = False) -> Shot:
    """What a cut leads to: the same cast in the same order, moving the same way, elsewhere in the picture."""
    new = random_shot(rng, shot.cast, studio=studio)
    new = replace(new, direction=shot.direction)
    if not studio and rng.random() < 0.3 and shot.ground != STUDIO:
        new = replace(new, ground=shot.ground, ground_colour=shot.ground_colour)
    return new


def centres(shot: Shot, frames: np.ndarray) -> np.ndarray:
    """Where each sprite is, `[N, T, 2]` (x, y)."""
    frames = np.asarray(frames, dtype=np.float64)
    travelled = world.DIRECTIONS[shot.direction][0] * PACE * frames
    low, high = RADIUS + 1, WIDTH - RADIUS - 1
    made = []
    for i, start in enumerate(shot.starts):
        lane = np.full_like(frames, HEIGHT * (i + 0.5) / len(shot.cast))
        made.append(np.stack([world.turning(start, travelled, low, high), lane], axis=-1))
    return np.stack(made)


def ground(shot: Shot, frames: np.ndarray) -> np.ndarray:
    """The ground alone, `[T, 96, 96, 3]`."""
    if shot.ground == STUDIO:
        return np.full((len(frames), HEIGHT, WIDTH, 3), 1.0, dtype=np.float32)
    scene = world.Scene(ground=shot.ground, ground_colour=shot.ground_colour, phase=shot.phase)
    return world.background(scene, frames, WIDTH, HEIGHT).astype(np.float32)


def render(shot: Shot, frames: np.ndarray) -> np.ndarray:
    """The shot at the given frame numbers, `[T, 96, 96, 3]`."""
    video = ground(shot, frames)
    for sprite, centre_T2 in zip(shot.cast, centres(shot, frames), strict=True):
        mask = world.shape_mask(sprite.shape, shot.radius, centre_T2, WIDTH, HEIGHT)[..., None]
        video = video * (1 - mask) + np.array(COLOURS[sprite.colour], dtype=np.float32) * mask
    return video.astype(np.float32)


def render_with_cut(first: Shot, second: Shot, cut: int, count: int) -> np.ndarray:
    """`count` frames; frame `cut` is the first of the second shot."""
    return np.concatenate([render(first, np.arange(cut)), render(second, np.arange(count - cut))])


def cut_out(sprite: Sprite, radius: float = RADIUS) -> Image.Image:
    """The sprite alone with transparency, cropped to what is seen."""
    side = 2 * int(radius) + 8
    mask = world.shape_mask(sprite.shape, radius, np.array([[side / 2, side / 2]]), side, side)[0]
    colour = np.broadcast_to(np.array(COLOURS[sprite.colour], dtype=np.float32), (side, side, 3))
    pixels = np.concatenate([colour, mask[..., None]], axis=-1)
    picture = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    return picture.crop(picture.getchannel("A").getbbox())


def canvas(shot: Shot) -> np.ndarray:
    """FFGo's first frame of a shot by the official rules: cut-outs on the left, its ground on the right."""
    pictures = {str(i): cut_out(sprite) for i, sprite in enumerate(shot.cast, 1)}
    scene = Image.fromarray((ground(shot, np.arange(1))[0] * 255 + 0.5).astype(np.uint8))
    layout = lay_out(WIDTH, HEIGHT, [p.size for p in pictures.values()], scene.size)
    return np.asarray(compose(layout, {"background": scene, **pictures}, WHITE), dtype=np.float32) / 255
