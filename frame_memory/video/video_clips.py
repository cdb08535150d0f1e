"""A folder of videos with captions as training clips: stretches without a cut, as latents in their order.

Each video is looked through once for cuts and for stretches in which nothing moves, then each stretch that is left is
encoded as one video of 1 + nk latent frames: the picture it begins with and k sections of n, 9 for FramePack and 20 for
Wan. Pixels are held a few at a time; latents lie in files (`clip_cache`) and are mapped into memory as they are used.

Shape suffixes: B batch, T time, H height, W width, C channels.
Source: reference/memorypack.md section 3.2 (data: shot cuts and static clips filtered, clips of a video in order).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..plan import clip_window
from ..plan.errors import PlanError, refusal
from ..plan.frames import pixel_frames
from ..plan.mark import DEFAULT_FPS, KEY, as_fps, expected_files, fps_of
from .clip_cache import ClipCache, content_of, is_finite, key_of
from .clip_folder import VIDEOS, DatasetError, caption_beside, files_in, none_left, videos_of
from .history import bucket_size, encode_stream, latent_frames_of, read_video
from .shots import Stretch, find_stretches
from .source import NODE as HISTORY
from .source import HistoryError, VideoFacts, probe_video
from .vae import check_video_vae, vae_fingerprint

NODE = "Video Clips"
# A minute, as the paper's clips had at most.
LONGEST_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """base: side of the square the size is taken from, pixels. shortest, longest: of a clip, in sections.

    fps: pictures a second that clips are put onto. window: latent frames of a section.
    """

    base: int = 640
    shortest: int = 1
    longest: int = 50
    fps: Fraction = Fraction(DEFAULT_FPS)
    window: int = 9

    @property
    def section(self) -> int:
        """Pixel frames of a section."""
        return 4 * self.window

    @property
    def least(self) -> int:
        """Pixel frames of the shortest clip."""
        return pixel_frames(1 + self.window * self.shortest)

    @staticmethod
    def of(base: int, shortest_seconds: float, longest_seconds: float, family: str = "", fps: float = 0.0) -> Request:
        """From what an artist types. family: of the VAE's latents; it says the section and the rate, which is fps where
        it says none.

        Raises PlanError where no clip can be that long, or no model of the family makes that rate; MarkError for a rate
        outside 1 to 240.
        """
        rate = as_fps(fps or fps_of(family))
        if family and rate != as_fps(fps_of(family)):
            known = f"{fps_of(family):g} frames a second, as models for {expected_files((family,))} make"
            nearest = f"{fps_of(family):g} (or 0)"
            raise PlanError(refusal(f"'fps' of {fps:g}", known, nearest, NODE))
        window = clip_window(family)
        lengths = (shortest_seconds, longest_seconds)
        sections = [max(round(seconds * float(rate) / (4 * window)), 1) for seconds in lengths]
        if sections[0] > sections[1]:
            given = f"clips of at least {shortest_seconds:g} s and at most {longest_seconds:g} s"
            raise PlanError(refusal(given, "shortest below longest", f"shortest {longest_seconds:g}", NODE))
        return Request(base, sections[0], sections[1], rate, window)


@dataclass(frozen=True)
class ClipPart:
    """One training clip of a video: `frames` pixel frames at `fps` from number `first` on, whole sections and one."""

    first: int
    frames: int
    fps: Fraction = Fraction(DEFAULT_FPS)

    @property
    def latent_frames(self) -> int:
        return latent_frames_of(self.frames)

    @property
    def seconds(self) -> float:
        return float(self.frames / self.fps)


@dataclass
class VideoEntry:
    """A video that can be used. parts: known once its cuts are."""

    path: Path
    caption: str
    facts: VideoFacts
    size: tuple[int, int]
    content: str
    parts: list[ClipPart] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True, eq=False)
class MadeClip:
    """A clip as a LATENT dict in the VAE's space, and where its pictures are."""

    video: VideoEntry
    part: ClipPart
    latent: dict

    def first_picture(self) -> Tensor:
        """Its picture 0 as an IMAGE [1,H,W,3], as it was encoded."""
        wanted = range(self.part.first, self.part.first + 1)
        (chunk_THWC,) = read_video(self.video.facts, wanted, fps=self.part.fps, size=self.video.size)
        return torch.from_numpy(chunk_THWC).float().div_(255)


def parts_of(stretch: Stretch, request: Request) -> list[ClipPart]:
    """The clips that a stretch holds, one behind the other, as long as can be; what is left at its end is dropped."""
    found, first = [], stretch.start
    while (sections := min((stretch.stop - first - 1) // request.section, request.longest)) >= request.shortest:
        found.append(ClipPart(first, pixel_frames(1 + request.window * sections), request.fps))
        first += found[-1].frames
    return found


class ClipMaker:
    """All clips of a folder. What each video is, is known at once; `clips()` makes them, one after the other.

    cache: folder for latents. interrupt: called between pieces of work and stops it by raising. say: gets a line that
    tells how far it is. Raises DatasetError where no video can be used, VAEError for a VAE of another kind, PlanError
    for sizes and lengths that cannot be.
    """

    def __init__(
        self, folder: Path, cache: Path, vae, request: Request, interrupt: Callable[[], None],
        say: Callable[[str], None] = lambda _: None,
    ):  # fmt: skip
        self.vae, self.request, self.interrupt, self.say = vae, request, interrupt, say
        self.base, self.cache = check_video_vae(vae).family, ClipCache(cache)
        self.fps = request.fps
        self.why: dict[str, str] = {}
        self.videos: list[VideoEntry] = []
        self.used: list[MadeClip] = []
        self.still: dict[str, int] = {}
        self.short: dict[str, int] = {}
        self.cuts: dict[str, int] = {}
        videos = videos_of(files_in(folder, NODE))
        if not videos:
            raise DatasetError(
                f"{Path(folder).name} has no videos ({', '.join(VIDEOS)}). '{NODE}' expects NAME.mp4 and NAME.txt with "
                "its caption."
            )
        for path in videos:
            interrupt()
            say(f"{path.name}: reading")
            try:
                self.videos.append(self._look_at(path))
            except (DatasetError, HistoryError, OSError) as error:
                self._skip(path, error)
        self._check(self.videos)

    @property
    def captions(self) -> list[str]:
        """All captions, each once."""
        return list(dict.fromkeys(video.caption for video in self.videos))

    def clips(self) -> Iterator[MadeClip]:
        """Every clip, video by video as people count, in order of time. Raises DatasetError where none is left."""
        fingerprint = vae_fingerprint(self.vae)
        for video in self.videos:
            self.interrupt()
            try:
                video.parts = self._parts(video)
                for part in video.parts:
                    clip = MadeClip(video, part, self._latent(video, part, fingerprint))
                    self.used.append(clip)
                    yield clip
            except (DatasetError, HistoryError, OSError) as error:
                self._skip(video.path, error)
        self._check(self.used)

    def _look_at(self, path: Path) -> VideoEntry:
        caption, facts = caption_beside(path), probe_video(path)
        least, request = self.request.least, self.request
        if round(facts.seconds * self.fps) < least:
            shortest = float(request.shortest * request.section / self.fps)
            raise DatasetError(
                f"it has {facts.seconds:.2f} s, and {float(least / self.fps):.2f} s are needed: the {shortest:g} s of "
                "'shortest' and one picture before"
            )
        return VideoEntry(path, caption, facts, bucket_size(facts, self.request.base), content_of(path, self.interrupt))

    def _parts(self, video: VideoEntry) -> list[ClipPart]:
        """The clips of a video: its stretches without a cut, but for those in which nothing moves or that are short."""
        key = key_of("stretches", video.content, video.size, *self._rate)
        found = self.cache.stretches(key)
        if found is None:
            self.say(f"{video.name}: looking for cuts")
            found = find_stretches(self._pictures(video))
            self.cache.keep_stretches(key, video.name, found)
        self.cuts[video.name] = len(found) - 1
        moving = [stretch for stretch in found if not stretch.is_still or stretch.frames <= self.request.section]
        self.still[video.name] = len(found) - len(moving)
        made = [parts_of(stretch, self.request) for stretch in moving]
        self.short[video.name] = sum(not parts for parts in made)
        if not any(made):
            self._skip(video.path, DatasetError(self._nothing_left(video.name)))
        return [part for parts in made for part in parts]

    def _nothing_left(self, name: str) -> str:
        cuts, still, short = self.cuts[name], self.still[name], self.short[name]
        if still and not short:
            return "nothing moves in it"
        least = float(self.request.least / self.fps)
        more = f", and in {still} of its stretches nothing moves" if still else ""
        return f"it has {_many(cuts, 'cut')}, and no stretch of {least:.2f} s is left{more}"

    @property
    def _rate(self) -> tuple[str, ...]:
        """What other rates than FramePack's add to the names of files."""
        return () if self.fps == DEFAULT_FPS else (str(self.fps),)

    def _pictures(self, video: VideoEntry, wanted: range | None = None) -> Iterator[np.ndarray]:
        return read_video(video.facts, wanted, fps=self.fps, size=video.size, interrupt=self.interrupt)

    def _latent(self, video: VideoEntry, part: ClipPart, fingerprint: str) -> dict:
        key = key_of("latents", video.content, video.size, fingerprint, *self._rate)
        path = self.cache.path(key, part.first, part.frames)
        samples_BCTHW = self.cache.latents(path, part.latent_frames)
        if samples_BCTHW is None:
            begin = float(part.first / self.fps)
            self.say(f"{video.name}: encoding {begin:.1f} to {begin + part.seconds:.1f} s")
            chunks = self._pictures(video, range(part.first, part.first + part.frames))
            made_BCTHW = encode_stream(self.vae, chunks, part.latent_frames, interrupt=self.interrupt)
            if not is_finite(made_BCTHW):
                raise DatasetError(
                    f"the VAE made NaN or infinite numbers of {begin:.1f} to {begin + part.seconds:.1f} s of it. Start "
                    "ComfyUI with --fp32-vae or --bf16-vae, or take the video out of the folder"
                )
            samples_BCTHW = self.cache.keep(path, made_BCTHW, {"video": video.name, "base": self.base})
        # A key of ours beside the tensor, as Anti-Drift Sampler's LATENTs have it; unknown names in it are ignored.
        mark = {"base": self.base, "fps": float(self.fps), "given": 1, "source": video.name}
        return {"samples": samples_BCTHW, KEY: mark}

    def _skip(self, path: Path, error: Exception) -> None:
        """Keep the reason in words for this node, which has a folder and no file to choose, and without the path."""
        words = re.sub(r"\[Errno \d+\] ", "", str(error))
        for whole in (repr(str(path))[1:-1], str(path)):
            words = words.replace(whole, path.name)
        words = re.sub(f" Choose another file in '{HISTORY}'.*", "", words, flags=re.DOTALL)
        if words != str(error):
            words = f"{words.rstrip('.')}. Replace it, or take it out of the folder"
        self.why[path.name] = words.replace(f"'{HISTORY}'", f"'{NODE}'")

    def _check(self, left: list) -> None:
        if not left:
            raise none_left(self.why, NODE, "videos")

    def report(self) -> str:
        """What became of every video: clips, seconds, sizes, cuts, what was left out and why, and the cache."""
        seconds = sum(clip.part.seconds for clip in self.used)
        names = list(dict.fromkeys(clip.video.name for clip in self.used))
        sizes = sorted({clip.video.size for clip in self.used})
        total = len({*names, *self.why})
        source = _many(total, "video") if len(names) == total else f"{len(names)} of the {total} videos in the folder"
        lines = [
            f"{_many(len(self.used), 'clip')} from {source}, "
            f"{seconds:.1f} s in all, {', '.join(f'{w}x{h}' for w, h in sizes)} at {float(self.fps):g} fps.",
        ]
        if self.why:
            lines.append(f"Warning: {_many(len(self.why), 'video')} skipped:")
            lines += [f"Skipped {name}: {reason.rstrip('.')}." for name, reason in self.why.items()]
        cuts, still, short = (sum(found[name] for name in names) for found in (self.cuts, self.still, self.short))
        lines.append(
            f"In {'the others' if self.why else 'them'}: {_many(cuts, 'cut')}; left out "
            f"{_many(still, 'stretch', 'es')} in which nothing moves, {short} too short."
        )
        shapes = [clip.latent["samples"] for clip in self.used]
        size = sum(shape.nelement() * shape.element_size() for shape in shapes) / 2**20
        cache = self.cache
        lines.append(
            f"Latents: {size:.1f} MB on disk, {cache.written} encoded now, {cache.read} found in {cache.folder}, which "
            "may be deleted."
        )
        if cache.damaged:
            lines.append(f"Damaged in there, and made anew: {len(cache.damaged)}.")
            lines += [f"- {name}: {reason.rstrip('.')}." for name, reason in cache.damaged.items()]
        if cache.trouble:
            lines.append(f"Warning: {cache.trouble}.")
        lines += [self._line(name) for name in names if self.cuts[name] or self.still[name]]
        return "\n".join(lines)

    def _line(self, name: str) -> str:
        count = sum(clip.video.name == name for clip in self.used)
        return (
            f"{name}: {_many(self.cuts[name], 'cut')}, {_many(count, 'clip')}, {self.still[name]} still, "
            f"{self.short[name]} too short."
        )


def _many(count: int, what: str, ending: str = "s") -> str:
    """1 cut, 2 cuts."""
    return f"{count} {what}{ending * (count != 1)}"
