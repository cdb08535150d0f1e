"""Saving what is readable of an mp4 whose writing was cut short.

While a file is written it is a fragmented mp4: header boxes, then pairs of `moof` (index) and `mdat` (frames). A
full disk leaves the last pair incomplete, and players stop with an error there. Everything before it is good.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path


def finished_bytes(path: Path) -> int:
    """Length of the part of a fragmented mp4 that ends with its last complete `moof` and `mdat` pair; 0 without one.

    Reads box headers only (ISO 14496-12 section 4.2: 32-bit size and type, size 1 means a 64-bit size follows).
    """
    size = path.stat().st_size
    end, previous, position = 0, b"", 0
    with path.open("rb") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1:
                wide = file.read(8)
                length = struct.unpack(">Q", wide)[0] if len(wide) == 8 else 0
            if length < 8 or position + length > size:
                break
            position += length
            if kind == b"mdat" and previous == b"moof":
                end = position
            previous = kind
    return end


def cut_to_finished(path: Path) -> bool:
    """Cut a torn fragmented mp4 after its last complete fragment, in place. False if it holds no complete fragment."""
    end = finished_bytes(path)
    if end == 0:
        return False
    with path.open("rb+") as file:
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
    return True
