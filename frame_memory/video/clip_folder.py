"""Folders of clips with captions, as people lay them out for training: NAME.mp4 beside NAME.txt, in ComfyUI's input.

What FFGo Dataset and Video Clips have in common: which folders may be read, which files are videos, in what order, what
a caption is, and when a folder has changed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
# A caption has some 200 words; a file much larger than that is something else.
CAPTION_BYTES = 65_536


class DatasetError(ValueError):
    """A folder of clips, or one clip of it, that cannot be used. The message says what to change."""


def check_folder(folder: object, known: Sequence[str], node: str) -> None:
    """Refuse what is not one of the folders in ComfyUI's input folder: a link can bring any text, a path among them."""
    if folder not in known:
        near = difflib.get_close_matches(str(folder), known, 1, 0.0) or ["a folder made there"]
        raise DatasetError(
            f"'{node}' was given the folder {folder!r}; expected one inside ComfyUI's input folder, such as "
            f"{near[0]!r}."
        )


def state_of_folder(root: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files in a folder and those below: other numbers where anything has changed."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [(path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def files_in(folder: Path, node: str) -> list[Path]:
    """What lies in a folder, in the order in which people count. Raises DatasetError where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder.name!r} in ComfyUI's input folder. Choose another in '{node}'.")
    # macOS puts a file ._NAME beside each NAME on other disks; it is no video.
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=counted)


def videos_of(files: Sequence[Path]) -> list[Path]:
    """Those of them that are videos by their names."""
    return [path for path in files if path.suffix.lower() in VIDEOS]


def counted(path: Path) -> list:
    """Sorts file names as people count: 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", path.name)]


def caption_beside(video: Path) -> str:
    """The text of NAME.txt beside NAME.mp4, as it was written. Raises DatasetError where it is not there or no text."""
    text = video.with_suffix(".txt")
    if not text.is_file():
        raise DatasetError(f"there is no caption '{text.name}' beside it")
    try:
        if text.stat().st_size > CAPTION_BYTES:
            raise DatasetError(f"{text.name} has more than {CAPTION_BYTES // 1024} kB; expected one caption")
        caption = text.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{text.name} cannot be read as UTF-8 text ({error})") from error
    if not caption:
        raise DatasetError("its caption is empty")
    return caption


def none_left(why: dict[str, str], node: str, what: str = "clips") -> DatasetError:
    """The refusal where no clip of a folder can be used, with every reason. why: by clip. what: they are."""
    reasons = "\n".join(f"- {name}: {reason.rstrip('.')}." for name, reason in why.items())
    return DatasetError(f"'{node}' can use none of {len(why)} {what}:\n{reasons}")
