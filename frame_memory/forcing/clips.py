"""Videos as training sees them: latents of whole clips behind a start frame, with their conditioning.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, L text tokens, D features.
Latents are in model space (scaled as the network reads them). Source: reference/memorypack.md sections 1 and 3.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..model.transformer import without_padding
from ..plan import PRESETS, Section, clip_window, plan_sections
from ..plan.mark import SELFTEST, SELFTEST_WAN, expected_files, read_mark
from .flow import Conditioning, WanConditioning

SCHEDULE = "F1 forward"
VIDEO_CLIPS = "Video Clips"
TRAIN, TRAIN_FRAMES = "Train Direct Forcing", "Train Frame Preservation"


class ForcingError(ValueError):
    """Videos, a model or settings that cannot be trained with. The message says what to change, and in which node."""


def clip_frames() -> int:
    """Latent frames of one clip: F1's window."""
    return clip_window()


@functools.lru_cache(maxsize=8)
def clip_sections(count: int, schedule: str = PRESETS[SCHEDULE]) -> tuple[Section, ...]:
    """The sections that make the first `count` clips, by F1's schedule or another one with its window."""
    return plan_sections(schedule, sections=count).sections


@dataclass(frozen=True)
class TrainingVideo:
    """latents `[B, C, 1 + window x k, H, W]`: the start frame, then k clips in order. name: for messages.

    window: latent frames of a clip.
    """

    latents: Tensor = field(repr=False)
    cond: Conditioning | WanConditioning = field(repr=False)
    name: str = ""
    window: int = field(default_factory=clip_frames)

    @property
    def clips(self) -> int:
        """How many whole clips follow the start frame."""
        return (self.latents.shape[2] - 1) // self.window

    def to(self, device) -> TrainingVideo:
        """The same video as fp32 tensors on another device; tensors of the host's inference mode become plain ones."""
        held = {part.name: getattr(self.cond, part.name) for part in fields(self.cond)}
        moved = {name: _plain(value, device) for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, latents=_plain(self.latents, device), cond=replace(self.cond, **moved))


def _plain(value: Tensor, device) -> Tensor:
    moved = value.to(device=device, dtype=torch.float32)
    return moved.clone() if moved.is_inference() else moved


def conditioning_of(
    entries: Sequence, name: str, node: str = TRAIN, wan: bool = False
) -> Conditioning | WanConditioning:
    """A CONDITIONING (core's list of `[text, more]`) as the network's inputs.

    node: display name of the one that trains. wan: core's Wan reads all tokens of the text, no pooled text and another
    layer's vision tokens; else padding tokens are left out. Raises ForcingError where it holds no prompt, or several.
    """
    if len(entries) != 1:
        raise ForcingError(
            f"{name} has {len(entries)} prompts; expected 1. Connect 'positive' of '{VIDEO_CLIPS}' to '{node}'."
        )
    text, more = entries[0]
    if wan:
        seen = more.get("clip_vision_output")
        return WanConditioning(text, None if seen is None else seen.penultimate_hidden_states)
    pooled = more.get("pooled_output")
    if pooled is None:
        raise ForcingError(
            f"The prompt of {name} has no pooled text, which HunyuanVideo's text encoders give. Set 'type' in "
            f"'DualCLIPLoader' to hunyuan_video, and connect it to '{VIDEO_CLIPS}'."
        )
    vision = more.get("clip_vision_output")
    text = without_padding(text, more.get("attention_mask"))
    return Conditioning(text, pooled, None if vision is None else vision.last_hidden_state)


@dataclass(frozen=True)
class StoredVideo:
    """A video as it is kept: samples `[1, C, T, H, W]` in VAE space, which may lie in a file until they are used.

    family: of the VAE's latents, empty where nobody says. fps: pictures a second, 0 where nobody says. window: latent
    frames of a clip.
    """

    samples: Tensor = field(repr=False)
    cond: Conditioning | WanConditioning = field(repr=False)
    name: str
    family: str = ""
    fps: float = 0.0
    window: int = field(default_factory=clip_frames)

    @property
    def clips(self) -> int:
        """How many whole clips follow the start frame."""
        return (self.samples.shape[2] - 1) // self.window

    def open(self, process_in: Callable[[Tensor], Tensor], device) -> TrainingVideo:
        """Its numbers up to the last whole clip, ready to train on. process_in: VAE space to model space."""
        frames = 1 + self.window * self.clips
        latents = process_in(self.samples[:, :, :frames].to(device=device, dtype=torch.float32))
        return TrainingVideo(latents, self.cond, self.name, self.window).to(device)


def stored_videos(
    latents: Sequence[dict], positive: Sequence, node: str = TRAIN, wan: bool = False
) -> list[StoredVideo]:
    """LATENT and CONDITIONING lists as videos, in their order. wan: for a Wan model.

    Tensors given are neither changed nor copied. node: display name of the one that trains. Raises ForcingError for no
    videos, another count of prompts, and several videos in one LATENT.
    """
    if not latents:
        raise ForcingError(f"There are no videos to train on. Connect 'latents' of '{VIDEO_CLIPS}' to '{node}'.")
    if len(positive) != len(latents):
        raise ForcingError(
            f"{len(latents)} videos came with {len(positive)} prompts; expected one prompt a video. Connect 'latents' "
            f"and 'positive' of the same '{VIDEO_CLIPS}' to '{node}'."
        )
    made = []
    for number, (latent, entries) in enumerate(zip(latents, positive, strict=True), 1):
        samples, mark = latent["samples"], read_mark(latent)
        name = f"video {number} of {len(latents)}" + (f" ({mark.source})" if mark and mark.source else "")
        if samples.ndim != 5 or samples.shape[0] != 1:
            raise ForcingError(
                f"{name} has the shape {tuple(samples.shape)}; expected one video [1, channels, frames, height, width]."
            )
        family = "" if mark is None else mark.base or mark.latent_format
        fps = 0.0 if mark is None or mark.fps is None else float(mark.fps)
        made.append(StoredVideo(samples, conditioning_of(entries, name, node, wan), name, family, fps))
    return made


def check_families(videos: Sequence[StoredVideo], families: Sequence[str], node: str) -> None:
    """Raise ForcingError for latents of another VAE than the model's (fault 22); the same shape is not enough.

    families: of latents that the MODEL can read (`latent_families`). A video that says none is passed over. node:
    display name of the one that trains.
    """
    for video in videos:
        if video.family == SELFTEST and SELFTEST_WAN in families:
            raise ForcingError(
                f"{video.name} was encoded with {expected_files((SELFTEST,))}, or with that of the small Wan before it "
                f"had a name of its own. Put {expected_files((SELFTEST_WAN,))} into the 'Load VAE' behind "
                f"'{VIDEO_CLIPS}' and run '{VIDEO_CLIPS}' again; for the command line also '{node}', which writes them."
            )
        if video.family and video.family not in families:
            raise ForcingError(
                f"{video.name} was encoded with {expected_files((video.family,))}, and the MODEL works with other "
                f"latents: same shape, other meaning. Change the file in the 'Load VAE' behind '{VIDEO_CLIPS}' to "
                f"{expected_files(families)}."
            )
