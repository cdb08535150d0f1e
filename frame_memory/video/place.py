"""Where a written file lies, as the editor asks for it."""

from __future__ import annotations

import os

LONG, LONG_SHARE = "\\\\?\\", "\\\\?\\UNC\\"


def inside(path: str, output: str, paths=os.path) -> tuple[str, str]:
    r"""(folder with `/`, name) of a file seen from the output folder, as both are written.

    A folder on the way may be a link to another disk, so nothing is resolved; Windows may have `\\?\` before a long
    path. paths: the rules of the system, os.path or another one's.
    """
    folder, name = paths.split(paths.relpath(_plain(path), _plain(output)))
    return folder.replace(paths.sep, "/"), name


def _plain(text: str) -> str:
    """A path without the mark of Windows' long form."""
    if text.startswith(LONG_SHARE):
        return "\\\\" + text[len(LONG_SHARE) :]
    return text.removeprefix(LONG)
