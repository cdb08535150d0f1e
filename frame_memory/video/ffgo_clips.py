"""FFGo's few-shot clips in a folder: which there are, their captions, their canvases, their first frames.

Two ways to lay a folder out, both read:
- `NAME.mp4`, `NAME.txt` with the caption, and `NAME.png`, a ready canvas, or the folder `NAME` with `background.png`
  and cut-outs: `main_entity.png` first, then by name as people count (2 before 10);
- one .json file as published: a list of {"file_path", "text", "image_path", "type"}, paths relative to the folder.

Shape suffixes: T frames, H height, W width, C channels (3, values 0..1).
Source: reference/ffgo.md section 6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..plan import canvas
from ..plan.errors import PlanError
from ..plan.first_frame_prompt import with_trigger
from ..plan.frames import nearest_clip
from ..plan.mark import SELFTEST_WAN, MarkError, as_fps
from . import canvas as drawing
from .clip_folder import VIDEOS, DatasetError, caption_beside, counted, files_in, none_left, videos_of
from .history import read_video
from .images import ImageError
from .source import NODE as HISTORY
from .source import HistoryError, VideoFacts, probe_video
from .vae import EXPECTED_FILES, WAN, VAEError, identify_vae

NODE = "FFGo Dataset"
PICTURES = (".png", ".webp", ".jpg", ".jpeg")
FEWEST, MOST = 20, 50
# Of fewer frames no latent frame is free of the canvas.
FEWEST_FRAMES = 9
# What Wan 2.2 makes and FFGo was published for; other rates are played slower or faster.
WAN_FPS, NEAR_FPS = 16.0, 1.5
METADATA_BYTES = 16 * 2**20
SAME_ASPECT = 0.02


@dataclass(frozen=True)
class ClipFiles:
    """One clip as it lies in the folder. `canvas`: a ready one, else the canvas is composed of the other pictures."""

    name: str
    video: Path
    caption: str
    canvas: Path | None = None
    background: Path | None = None
    references: tuple[Path, ...] = ()


def check_request(vae, width: int, height: int, length: int) -> None:
    """Refuse a VAE that is not Wan 2.1's, sizes off the grid, and lengths Wan cannot make; the nearest are named."""
    found = identify_vae(vae)
    if found.family not in (WAN, SELFTEST_WAN):
        raise VAEError(
            f"'Load VAE' gave {found}, but Wan 2.2 I2V A14B reads the latents of {EXPECTED_FILES[WAN]}. Change the "
            "file in the node 'Load VAE'."
        )
    near, frames = canvas.nearest_canvas(width, height), nearest_clip(length, FEWEST_FRAMES)
    if (width, height) != near or length != frames:
        raise DatasetError(
            f"'{NODE}' was asked for {length} frames of {width}x{height}; expected 4n + 1 frames, at least "
            f"{FEWEST_FRAMES}, with sides that are multiples of 16. The nearest is {frames} frames of "
            f"{near[0]}x{near[1]}; FFGo was trained with 81."
        )


def find_clips(folder: Path) -> tuple[list[ClipFiles], dict[str, str]]:
    """(usable clips in the order of their names, or of the metadata; why the others are not, by name).

    Raises DatasetError where the folder is missing or holds neither videos nor metadata.
    """
    folder = Path(folder)
    inside = files_in(folder, NODE)
    lists = [path for path in inside if path.suffix.lower() == ".json"]
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists)
        raise DatasetError(f"{folder.name} holds several .json files ({names}); expected one list of clips, or none.")
    videos = videos_of(inside)
    if not lists and not videos:
        raise DatasetError(
            f"{folder.name} has no videos ({', '.join(VIDEOS)}) and no .json list of them. '{NODE}' expects NAME.mp4, "
            "NAME.txt with its caption, and NAME.png, its canvas, or a folder NAME with background.png and cut-outs."
        )
    found, why = [], {}
    wanted = _listed(lists[0]) if lists else {path.name: path for path in videos}
    for name, entry in wanted.items():
        try:
            found.append(_one(folder, entry) if lists else _beside(entry))
        except DatasetError as error:
            why[name] = str(error)
    return found, why


def _listed(path: Path) -> dict[str, object]:
    """The entries of a metadata file, by a name of their own."""
    try:
        if path.stat().st_size > METADATA_BYTES:
            raise DatasetError(f"{path.name} has more than {METADATA_BYTES // 2**20} MB; expected a list of clips.")
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path.name} cannot be read as a list of clips: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path.name} holds {type(entries).__name__}, expected a list with at least one clip.")
    named = {}
    for number, entry in enumerate(entries, 1):
        said = entry.get("file_path") if isinstance(entry, dict) else None
        named[f"entry {number} ({said})" if said else f"entry {number}"] = entry
    return named


def _one(folder: Path, values) -> ClipFiles:
    if not isinstance(values, dict):
        raise DatasetError(f"it is {type(values).__name__}; expected file_path, text and image_path")
    if values.get("type", "video") != "video":
        raise DatasetError(f"its type is {values['type']!r}; only 'video' can be trained on")
    video = _inside(folder, values.get("file_path"), "file_path", VIDEOS)
    ready = _inside(folder, values.get("image_path"), "image_path", PICTURES)
    return ClipFiles(video.relative_to(folder).as_posix(), video, _with_words(values.get("text")), canvas=ready)


def _inside(folder: Path, said: object, what: str, kinds: tuple[str, ...]) -> Path:
    """A file of the folder named in a metadata list; never one outside of it."""
    if not isinstance(said, str) or not said.strip():
        raise DatasetError(f"it has no {what}")
    path = PurePosixPath(said.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in said:
        raise DatasetError(f"its {what} lies outside the folder; write it relative to the folder of the .json file")
    if path.suffix.lower() not in kinds:
        raise DatasetError(f"its {what} is {said!r}; expected a file that ends in {', '.join(kinds)}")
    if not (folder / path).is_file():
        raise DatasetError(f"there is no file {path}")
    return folder / path


def _beside(video: Path) -> ClipFiles:
    """A clip with its caption and pictures beside it."""
    caption = _with_words(caption_beside(video))
    ready = next((path for kind in PICTURES if (path := video.with_suffix(kind)).is_file()), None)
    parts = video.with_suffix("")
    if ready is None and not parts.is_dir():
        raise DatasetError(f"there is neither a canvas {video.stem}.png nor a folder {video.stem} with its pictures")
    if ready is not None:
        return ClipFiles(video.name, video, caption, canvas=ready)
    pictures = sorted(
        (p for p in parts.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")), key=counted
    )
    background = next((p for p in pictures if p.stem.lower() == canvas.BACKGROUND), None)
    things = [p for p in pictures if p != background]
    things.sort(key=lambda p: p.stem.lower() != "main_entity")
    if not things:
        raise DatasetError(f"the folder {video.stem} holds no pictures of things ({', '.join(PICTURES)})")
    return ClipFiles(video.name, video, caption, background=background, references=tuple(things))


def _with_words(text: object) -> str:
    """The caption with the trigger in front, once."""
    made = with_trigger(text if isinstance(text, str) else "")
    if made == with_trigger(""):
        raise DatasetError("its caption is empty")
    return made


def look_at(files: ClipFiles, length: int, start: int) -> VideoFacts:
    """What a clip's video is. Raises DatasetError where it is damaged or has fewer than start + length frames."""
    try:
        facts = probe_video(files.video)
        as_fps(facts.fps)
    except (HistoryError, MarkError) as error:
        raise DatasetError(_ours(error)) from error
    if facts.frames < start + length:
        after = f" after the first {start}" if start else ""
        raise DatasetError(f"it has {facts.frames} frames, and {length}{after} are needed")
    return facts


def read_frames(
    facts: VideoFacts, length: int, start: int, width: int, height: int, interrupt: Callable[[], None] | None = None
) -> torch.Tensor:
    """`length` frames from number `start` on, [T,H,W,C] floats; filled and cut in the middle to width x height.

    Every frame of the file's own rate, as FFGo was trained. Raises DatasetError where the file is damaged.
    """
    frames = range(start, start + length)
    try:
        chunks = list(
            read_video(facts, frames, fps=as_fps(facts.fps), size=(width, height), interrupt=interrupt, on_grid=False)
        )
    except HistoryError as error:
        raise DatasetError(_ours(error)) from error
    made_THWC = torch.from_numpy(np.concatenate(chunks)).float().div_(255.0)
    if len(made_THWC) != length:
        raise DatasetError(f"only {len(made_THWC)} of {length} frames could be decoded")
    return made_THWC


def canvas_of(files: ClipFiles, width: int, height: int, look: drawing.CanvasLook) -> tuple[torch.Tensor, list[str]]:
    """(canvas [H,W,C], what an artist should know) of a clip. Raises DatasetError for pictures that cannot be used.

    A ready canvas of another shape is scaled to fit, and the rest gets the canvas colour: nothing of it is cut off.
    """
    try:
        if files.canvas is None:
            return _composed(files, width, height, look)
        ready = drawing.flatten(_picture(files.canvas), drawing.parse_colour(look.canvas_colour))
    except (PlanError, ImageError) as error:
        raise DatasetError(_ours(error)) from error
    if ready.size == (width, height):
        return _tensor(ready)[..., :3], []
    aspect = (ready.width / ready.height) / (width / height)
    if abs(aspect - 1) <= SAME_ASPECT:
        return _tensor(ready.resize((width, height), Image.Resampling.LANCZOS))[..., :3], []
    made = ImageOps.pad(ready, (width, height), Image.Resampling.LANCZOS, drawing.parse_colour(look.canvas_colour))
    return _tensor(made)[..., :3], [f"its canvas of {ready.width}x{ready.height} got borders to fit {width}x{height}"]


def _composed(files: ClipFiles, width: int, height: int, look: drawing.CanvasLook) -> tuple[torch.Tensor, list[str]]:
    references = {i: _tensor(_picture(path))[None] for i, path in enumerate(files.references, 1)}
    background = None if files.background is None else _tensor(_picture(files.background))[None]
    pictures = drawing.named_pictures(references, {}, background, crop=look.crop_to_content)

    made, layouts = drawing.compose_batch(pictures, (width, height), look)
    return made[0], list(layouts[0].notes)


def _picture(path: Path) -> Image.Image:
    """RGB, or RGBA where the file has transparency; turned as its camera says."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            clear = "A" in upright.getbands() or "transparency" in upright.info
            return upright.convert("RGBA" if clear else "RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path.name} cannot be read as a picture ({error})") from error


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0)


def _ours(error: Exception) -> str:
    """A message of the libraries behind other nodes, for this one."""
    return str(error).replace(f"'{HISTORY}'", f"'{NODE}'").replace(f"'{canvas.NODE}'", f"'{NODE}'")


@dataclass(frozen=True)
class ReadyClip:
    """A clip that can be used, its canvas made, its frames not yet read."""

    files: ClipFiles
    facts: VideoFacts
    canvas_HWC: torch.Tensor

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def caption(self) -> str:
        return self.files.caption


class Reader:
    """All clips of a folder: what can be used is known before any frame is read, and frames are read clip by clip.

    size: (width, height). interrupt: called between clips. Raises DatasetError where nothing can be used, with every
    reason.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], length: int, start: int, look: drawing.CanvasLook,
        interrupt: Callable[[], None],
    ):  # fmt: skip
        self.size, self.length, self.start, self.interrupt = size, length, start, interrupt
        found, self.why = find_clips(folder)
        self.notes: list[str] = []
        self.clips: list[ReadyClip] = []
        self.used: list[ReadyClip] = []
        for files in found:
            interrupt()
            try:
                facts = look_at(files, length, start)
                made_HWC, notes = canvas_of(files, *size, look)
            except DatasetError as error:
                self.why[files.name] = str(error)
                continue
            self.clips.append(ReadyClip(files, facts, made_HWC))
            self.notes += [f"{files.name}: {note}" for note in notes]
        self._check(self.clips)

    def frames(self) -> Iterator[tuple[ReadyClip, torch.Tensor]]:
        """Each clip with its frames [T,H,W,C]; damaged ones are left out and named in the report."""
        for clip in self.clips:
            self.interrupt()
            try:
                frames_THWC = read_frames(clip.facts, self.length, self.start, *self.size, self.interrupt)
            except DatasetError as error:
                self.why[clip.name] = str(error)
                continue
            yield clip, frames_THWC
            self.used.append(clip)
        self._check(self.used)

    def _check(self, clips: list[ReadyClip]) -> None:
        if not clips:
            raise none_left(self.why, NODE)

    def report(self) -> str:
        """What became of every clip, and what the number and the rates of clips mean."""
        used, (width, height) = self.used, self.size
        lines = [
            f"{len(used)} of {len(used) + len(self.why)} clips used: {self.length} frames of {width}x{height}, the "
            "canvas over the first 4."
        ]
        if not FEWEST <= len(used) <= MOST:
            lines.append(
                f"Note: {len(used)} clips; FFGo was trained on 50, and {FEWEST} to {MOST} is the size it is meant for. "
                + ("Fewer teach the clips rather than the cut." if len(used) < FEWEST else "More were not tried.")
            )
        odd = [f"{c.name} ({c.facts.fps:.4g})" for c in used if abs(c.facts.fps - WAN_FPS) > NEAR_FPS]
        if odd:
            lines.append(
                f"Note: Wan plays {WAN_FPS:g} frames a second, and every frame of a clip is used, as FFGo was trained. "
                f"Clips of another rate teach slower or faster motion: {', '.join(odd)}."
            )
        lines += [f"Skipped {name}: {reason.rstrip('.')}." for name, reason in self.why.items()]
        return "\n".join([*lines, *(f"Note: {note.rstrip('.')}." for note in self.notes)])
