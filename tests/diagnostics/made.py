"""Clips whose brightness, colours, blur and motion are known, and what they must measure, written out with numpy."""

from __future__ import annotations

import numpy as np

HEIGHT, WIDTH = 32, 48
LUMA = np.array([0.2126, 0.7152, 0.0722])


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A coloured texture, floats 0.25..0.75 [H,W,3]."""
    coarse = np.random.default_rng(seed).random((height // 4, width // 4, 3))
    return 0.25 + 0.5 * np.kron(coarse, np.ones((4, 4, 1)))


def moving(frames: int, seed: int = 0, speed: float = 1.0) -> np.ndarray:
    """The texture runs round and round, `speed` pixels a frame: every frame holds the same pixels, elsewhere."""
    still = picture(seed)
    return np.stack([np.roll(still, int(t * speed), axis=1) for t in range(frames)]).astype(np.float32)


def brighter(video: np.ndarray, levels_a_second: float, fps: float) -> np.ndarray:
    """Adds a straight line to the brightness, in 8-bit levels."""
    added = levels_a_second / 255 * np.arange(len(video)) / fps
    return (video + added[:, None, None, None]).astype(np.float32)


def faded(video: np.ndarray, left_at_end: float) -> np.ndarray:
    """Takes the colours away, evenly, down to a share."""
    grey = (video @ LUMA)[..., None]
    keep = np.linspace(1, left_at_end, len(video))[:, None, None, None]
    return (grey + (video - grey) * keep).astype(np.float32)


def blurred(video: np.ndarray, most: int) -> np.ndarray:
    """Frame t is averaged with itself moved by 1 .. n pixels to the side, n growing from 0 to `most`."""
    made = []
    for t, frame in enumerate(video):
        reach = round(most * t / (len(video) - 1))
        made.append(np.mean([np.roll(frame, shift, axis=1) for shift in range(reach + 1)], axis=0))
    return np.stack(made).astype(np.float32)


def brightness_of(frames: np.ndarray) -> float:
    return float((frames.astype(np.float64) @ LUMA).mean() * 255)


def saturation_of(frames: np.ndarray) -> float:
    return float((frames.max(axis=-1).astype(np.float64) - frames.min(axis=-1)).mean() * 255)


def sharpness_of(frames: np.ndarray) -> float:
    grey = frames.astype(np.float64) @ LUMA * 255
    down, across = np.abs(grey[:, 2:] - grey[:, :-2]), np.abs(grey[:, :, 2:] - grey[:, :, :-2])
    return float(down.mean(axis=(1, 2)).mean() + across.mean(axis=(1, 2)).mean())


def motion_of(frames: np.ndarray) -> np.ndarray:
    """Change over 4 frames of the busiest half percent of pixels, after averaging over squares of two."""
    grey = frames.astype(np.float64) @ LUMA * 255
    t, h, w = grey.shape
    small = grey.reshape(t, h // 2, 2, w // 2, 2).mean(axis=(2, 4))
    change = np.sort(np.abs(small[4:] - small[:-4]).reshape(t - 4, -1), axis=1)
    return change[:, -max(round(change.shape[1] * 0.005), 1) :].mean(axis=1)


def slope_of(values, fps: float) -> float:
    """Least squares by the textbook: covariance over variance of the time in seconds."""
    x = np.arange(len(values)) / fps
    y = np.asarray(values, dtype=np.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
