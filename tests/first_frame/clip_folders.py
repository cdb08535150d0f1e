"""Folders of clips as people lay them out, with videos whose frames say their number (tests/video/odd_videos.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("numbered_videos", TESTS / "video" / "odd_videos.py")
numbered = importlib.util.module_from_spec(spec)
spec.loader.exec_module(numbered)

WIDTH, HEIGHT = 96, 64


def video(path: Path, frames: int = 13, rate: int = 16, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """A file whose frame k shows k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=rate, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(frames):
            picture = numbered.numbered_frame(k, width, height)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def plain(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], len(colour)), colour, dtype=np.uint8)).save(path)
    return path


def caption(path: Path, words: str = "A red ball rolls over the grass.") -> None:
    path.write_text(words, encoding="utf-8")


def make(folder: Path, clips: int = 2) -> Path:
    """`clips` good ones in the first layout, by turns with a ready canvas and with cut-outs."""
    for i in range(clips):
        video(folder / f"clip_{i}.mp4")
        caption(folder / f"clip_{i}.txt", f"Clip {i}: a red ball rolls over the grass.")
        if i % 2 == 0:
            plain(folder / f"clip_{i}.png", (200, 40, 40))
        else:
            plain(folder / f"clip_{i}" / "background.png", (0, 120, 0), (160, 90))
            for n, name in enumerate(("object_10", "object_2", "main_entity")):
                plain(folder / f"clip_{i}" / f"{name}.png", (0, 0, 60 * n + 60, 255), (20, 20))
    return folder


def spoil(folder: Path) -> dict[str, str]:
    """Adds clips that cannot be used; returns a part of the reason for each."""
    for name in ("short", "mute", "bare", "torn", "odd_picture", "hollow"):
        video(folder / f"{name}.mp4", 5 if name == "short" else 13)
        caption(folder / f"{name}.txt", "  " if name == "mute" else "A ball.")
        if name not in ("bare", "hollow"):
            plain(folder / f"{name}.png", (9, 9, 9))
    (folder / "hollow").mkdir()
    torn = (folder / "torn.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(torn[: len(torn) // 3])
    (folder / "odd_picture.png").write_bytes(b"no picture")
    video(folder / "wordless.mp4")
    return {
        "short.mp4": "5 frames, and 13 are needed", "mute.mp4": "caption is empty", "wordless.mp4": "no caption",
        "bare.mp4": "neither a canvas bare.png nor a folder", "torn.mp4": "'FFGo Dataset'",
        "odd_picture.mp4": "cannot be read as a picture", "hollow.mp4": "no pictures of things",
    }  # fmt: skip


def published(folder: Path) -> dict[str, str]:
    """The second layout, with one good entry; returns a part of the reason for each of the others."""
    video(folder / "videos" / "11.mp4")
    plain(folder / "combined_images" / "video_11" / "combined.png", (10, 200, 10))
    good = {
        "file_path": "./videos/11.mp4", "text": "ad23r2 the camera view suddenly changes.  A ball.",
        "image_path": "combined_images/video_11/combined.png", "type": "video",
    }  # fmt: skip
    outside = "lies outside the folder"
    changes = [
        ({"file_path": "/etc/11.mp4"}, outside), ({"image_path": "../combined.png"}, outside),
        ({"file_path": "C:\\11.mp4"}, outside), ({"file_path": "videos/12.mp4"}, "no file videos/12.mp4"),
        ({"text": None}, "caption is empty"), ({"type": "image"}, "only 'video'"), ({"image_path": 3}, "no image_path"),
        ({"file_path": "videos/11.exe"}, "ends in .mp4"),
    ]  # fmt: skip
    entries = [good, *({**good, **change} for change, _ in changes), "11.mp4"]
    (folder / "train.json").write_text(json.dumps(entries), encoding="utf-8")
    reasons = [*(reason for _, reason in changes), "expected file_path, text and image_path"]
    return {f"entry {n}": reason for n, reason in enumerate(reasons, 2)}
