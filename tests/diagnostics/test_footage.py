"""What is measured comes a few frames at a time, from images and from files as people have them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl

from frame_memory.video.footage import of_images, of_video
from frame_memory.video.images import ImageError
from frame_memory.video.source import HistoryError
from scripts.host import REPO

from .made import moving

sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from video.odd_videos import number_of, write_video

NODE = "Memory Recall"


def test_images_come_a_few_at_a_time_and_are_not_copied():
    images = torch.from_numpy(moving(30))
    footage = of_images(images, 24.0, NODE, lambda: None)
    pieces = list(footage.chunks())
    assert [first for first, _ in pieces] == [0, 12, 24] and (footage.frames, footage.fps) == (30, 24.0)
    assert torch.equal(torch.cat([piece for _, piece in pieces]), images)
    assert pieces[1][1].untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    with pytest.raises(ImageError, match="socket 'images' of 'Memory Recall'.*at least one frame"):
        of_images(images[:0], 24.0, NODE, lambda: None)


@pytest.mark.parametrize("rate", [24, 30])
def test_a_file_is_read_at_its_own_rate_upright(tmp_path, rate):
    times = [round(1000 * i / rate) for i in range(40)]
    path = write_video(tmp_path / "Schöne Aufnahme '1' 画像.mp4", times, size=(96, 64), rotation=180, audio_seconds=1.0)
    footage = of_video(InputImpl.VideoFromFile(str(path)), tmp_path / "temp", NODE, lambda: None)
    assert (footage.frames, round(footage.fps), footage.width, footage.height) == (40, rate, 96, 64)
    upright = [np.rot90(frame, 2) for _, chunk in footage.chunks() for frame in chunk]
    assert [number_of(frame) for frame in upright] == list(range(40))
    part = [number_of(np.rot90(frame, 2)) for chunk in footage.between(17, 23) for frame in chunk]
    assert part == list(range(17, 23)) and path.name in footage.words
    trimmed = InputImpl.VideoFromFile(str(path)).as_trimmed(
        start_time=10 / rate, duration=20 / rate, strict_duration=False
    )
    short = of_video(trimmed, tmp_path / "temp", NODE, lambda: None)
    numbers = [number_of(np.rot90(frame, 2)) for _, chunk in short.chunks() for frame in chunk]
    assert numbers == list(range(10, 30)) and "the part that is left of it" in short.words


def test_a_damaged_file_is_told_in_the_nodes_name(tmp_path):
    path = write_video(tmp_path / "a.mkv", [33 * i for i in range(120)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b""
    path.write_bytes(data)
    with pytest.raises(HistoryError) as refused:
        footage = of_video(InputImpl.VideoFromFile(str(path)), tmp_path, NODE, lambda: None)
        path.write_bytes(b"nothing at all")
        list(footage.chunks())
    assert NODE in str(refused.value) and "Video History" not in str(refused.value)
