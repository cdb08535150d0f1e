"""A procedural world with ground truth: coloured sprites that move, leave and come back over a panning ground.

Everything a video of it shows follows from a `Scene`, so what a model generates can be measured against the
truth: where the sprite should be, which colour and shape it has, what the background looks like.

Shape legend: T frames, H W pixels, 3 colour channels. Images are float32, 0..1. Positions are pixels (x right,
y down), speeds are pixels a frame at 30 frames a second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SIZE = 64
SPRITE_COLOURS = {
    "red": (0.90, 0.15, 0.12),
    "green": (0.15, 0.80, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "pink": (0.95, 0.40, 0.75),
    "white": (0.95, 0.95, 0.95),
}
GROUND_COLOURS = {
    "navy": ((0.08, 0.10, 0.26), (0.16, 0.20, 0.42)),
    "teal": ((0.05, 0.22, 0.24), (0.10, 0.38, 0.38)),
    "brown": ((0.22, 0.13, 0.08), (0.38, 0.25, 0.15)),
    "grey": ((0.22, 0.22, 0.23), (0.42, 0.42, 0.43)),
    "plum": ((0.20, 0.08, 0.22), (0.34, 0.17, 0.36)),
}
SHAPES = ("circle", "square", "triangle", "diamond")
GROUNDS = ("hills", "stripes", "plain")
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "down": (0.0, 1.0),
    "up": (0.0, -1.0),
}
SPEEDS = {"slowly": 0.35, "quickly": 0.8}
TIDY_SPEEDS = {"slowly": 0.25, "quickly": 0.5}
TIDY_RADIUS, TIDY_STEP = 12.0, 4
GROUND_PERIOD = 128


@dataclass(frozen=True)
class Scene:
    """One video's whole truth. `away` is how far beyond the edge the sprite travels before it turns (0 bounces)."""

    colour: str = "red"
    shape: str = "circle"
    direction: str = "right"
    speed: str = "slowly"
    ground: str = "hills"
    ground_colour: str = "navy"
    pan: float = 0.0
    radius: float = 9.0
    x: float = 20.0
    y: float = 32.0
    phase: float = 0.0
    away: float = 0.0
    tidy: bool = False

    @property
    def pace(self) -> float:
        """Pixels a frame."""
        return (TIDY_SPEEDS if self.tidy else SPEEDS)[self.speed]

    @property
    def caption(self) -> str:
        """The prompt this scene is trained and asked for with."""
        camera = "" if self.pan == 0 else " while the camera pans " + ("right" if self.pan > 0 else "left")
        leaves = " and leaves and comes back" if self.away else ""
        ground = f"{self.ground_colour} {self.ground}" if self.ground != "plain" else f"plain {self.ground_colour}"
        return f"a {self.colour} {self.shape} moves {self.direction} {self.speed}{leaves} over {ground} ground{camera}"


def tidied(scene: Scene) -> Scene:
    """The nearest scene on a grid: one size, places 4 pixels apart, whole pixels a latent frame, a still camera.

    A small network learns this world in an hour on a CPU: a sprite meets a codec block in few ways only, and is
    large enough for its shape to survive the autoencoder.
    """
    low = TIDY_RADIUS + 1
    spots = int((SIZE - 2 * low) // TIDY_STEP)

    def snap(value: float) -> float:
        return low + TIDY_STEP * min(max(round((value - low) / TIDY_STEP), 0), spots)

    return replace(
        scene,
        tidy=True,
        radius=TIDY_RADIUS,
        x=snap(scene.x),
        y=snap(scene.y),
        phase=float(round(scene.phase / 8) * 8 % GROUND_PERIOD),
        pan=0.0,
        away=float(round(scene.away / TIDY_STEP) * TIDY_STEP),
    )


def random_scene(rng: np.random.Generator, *, away: bool = False, tidy: bool = False) -> Scene:
    """Draw a scene. away: the sprite leaves the picture and comes back. tidy: see `tidied`."""
    radius = float(rng.uniform(8.0, 10.0))
    direction = str(rng.choice(list(DIRECTIONS)))
    ground = str(rng.choice(GROUNDS))
    low, high = radius + 1, SIZE - radius - 1
    scene = Scene(
        colour=str(rng.choice(list(SPRITE_COLOURS))),
        shape=str(rng.choice(SHAPES)),
        direction=direction,
        speed=str(rng.choice(list(SPEEDS))),
        ground=ground,
        ground_colour=str(rng.choice(list(GROUND_COLOURS))),
        pan=0.0 if ground == "plain" or rng.random() < 0.7 else float(rng.choice((-0.3, 0.3))),
        radius=radius,
        x=float(rng.uniform(low, high)),
        y=float(rng.uniform(low, high)),
        phase=float(rng.uniform(0, GROUND_PERIOD)),
        away=float(rng.uniform(20, 60)) if away else 0.0,
    )
    return tidied(scene) if tidy else scene


def turning(start: float, travelled: np.ndarray, low: float, high: float) -> np.ndarray:
    """A point that runs between `low` and `high` and turns at both ends."""
    span = high - low
    folded = np.mod(start - low + travelled, 2 * span)
    return low + np.where(folded > span, 2 * span - folded, folded)


def positions(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """Sprite centres `[T, 2]` (x, y) at the given frame numbers; outside the picture while it is away."""
    frames = np.asarray(frames, dtype=np.float64)
    dx, dy = DIRECTIONS[scene.direction]
    speed = scene.pace
    low, high = scene.radius + 1 - scene.away, SIZE - scene.radius - 1 + scene.away
    x = turning(scene.x, dx * speed * frames, low, high) if dx else np.full_like(frames, scene.x)
    y = turning(scene.y, dy * speed * frames, low, high) if dy else np.full_like(frames, scene.y)
    return np.stack([x, y], axis=-1)


def shape_mask(shape: str, radius: float, centres: np.ndarray, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """Coverage `[T, H, W]` in 0..1 of a sprite at `centres [T, 2]`, edges one pixel soft."""
    columns, rows = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5
    dx = columns[None, None, :] - centres[:, 0].astype(np.float32)[:, None, None]
    dy = rows[None, :, None] - centres[:, 1].astype(np.float32)[:, None, None]
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.88
    elif shape == "diamond":
        distance = (np.abs(dx) + np.abs(dy) - radius * 1.25) * np.float32(0.7071)
    elif shape == "cross":
        long, short = np.maximum(np.abs(dx), np.abs(dy)), np.minimum(np.abs(dx), np.abs(dy))
        distance = np.maximum(long - radius, short - radius * 0.38)
    else:
        distance = np.maximum(dy - radius * 0.75, (np.abs(dx) * 1.732 - dy - radius * 1.15) * np.float32(0.5))
    return np.clip(0.5 - distance, 0, 1)


def background(scene: Scene, frames: np.ndarray, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """The ground alone, `[T, H, W, 3]`; it repeats every `GROUND_PERIOD` pixels."""
    frames = np.asarray(frames, dtype=np.float32)
    dark, light = (np.array(c, dtype=np.float32) for c in GROUND_COLOURS[scene.ground_colour])
    columns, rows = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5
    x = columns[None, None, :] + np.float32(scene.phase) + np.float32(scene.pan) * frames[:, None, None]
    y = rows[None, :, None]
    turn = np.float32(2 * np.pi / GROUND_PERIOD)
    if scene.ground == "hills":
        horizon = height / 2 + 2 + 9 * np.sin(2 * turn * x) + 5 * np.sin(3 * turn * x + 1)
        mix = np.clip((y - horizon) / 4 + 0.5, 0, 1)
    elif scene.ground == "stripes":
        mix = 0.5 + 0.5 * np.sin(4 * turn * x) * np.ones_like(y)
    else:
        mix = y / height
    mix = np.broadcast_to(mix, (len(frames), height, width))[..., None]
    return dark + (light - dark) * mix


def render(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """The video at the given frame numbers, `[T, H, W, 3]` float32 0..1."""
    mask = shape_mask(scene.shape, scene.radius, positions(scene, frames))[..., None]
    colour = np.array(SPRITE_COLOURS[scene.colour], dtype=np.float32)
    return (background(scene, frames) * (1 - mask) + colour * mask).astype(np.float32)
