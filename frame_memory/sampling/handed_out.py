"""Files that a node's cached outputs point to: whether they are still there when ComfyUI asks for its cache."""

from __future__ import annotations

from pathlib import Path


class HandedOut:
    """What a node has handed out, by whose it is; `turn` is another number once a file of it is gone or another one.

    ComfyUI keeps a node's outputs as long as its inputs and its fingerprint stay, but a VIDEO is only a path, and the
    artist may delete it while ComfyUI runs. Only files that no other node writes belong here.
    """

    def __init__(self) -> None:
        self._files: dict[str, dict[Path, tuple]] = {}
        self._turns: dict[str, int] = {}

    def note(self, whose: str, *files: Path | None) -> None:
        """Remember files that were just written; None is passed over."""
        self._files[whose] = {path: _state(path) for path in files if path is not None}

    def turn(self, whose: str) -> int:
        """The fingerprint: changes once when a file has changed, and stays until the next one does."""
        files = self._files.get(whose, {})
        if any(_state(path) != state for path, state in files.items()):
            self._turns[whose] = self._turns.get(whose, 0) + 1
            del self._files[whose]
        return self._turns.get(whose, 0)


def _state(path: Path) -> tuple:
    """Size and time of a file; empty where there is none."""
    try:
        info = path.stat()
    except OSError:
        return ()
    return info.st_size, info.st_mtime_ns
