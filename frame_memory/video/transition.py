"""Where FFGo's video begins: the frames of the canvas at its start, and the cut after them.

Wan's VAE puts pixel frame 0 into latent frame 0, frames 1 to 4 into latent frame 1. Training covers frames 0 to 3 with
the canvas, so the cut falls inside latent frame 1 and frame 4 may still carry a ghost of it.

Shape suffixes: T time, H height, W width, C channels.
Source: reference/ffgo.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F

from ..plan.errors import PlanError

NODE = "Drop Transition Frames"
OFFICIAL, SAFE = 4, 5
NO_SOUND = "The sound ended before the first frame that is left, so the video has none."
NO_VIDEO = (
    f"'{NODE}' was given images, which have no frame rate, so there is no VIDEO. Connect its 'images' output to "
    "'Create Video' (16 fps for Wan 2.2)."
)
# How far into a clip the cut is looked for: far past the 4 frames it is trained to come after, and not so far that a
# cut of the film itself is taken for it. LATER: how far a cut is looked for that is only told.
SEARCHED, LATER = 12, 24
SMALL_SIDE = 64
# A cut changes the picture by at least this much (mean of 0..1), by this many times its usual change, and by this many
# times what the canvas before it does, which stands still.
LEAST_JUMP, TIMES_USUAL, TIMES_BEFORE = 0.03, 2.5, 4.0
# A frame is clean when at most this share of the jump is still to come.
STILL_TO_COME = 0.15
# A ghost cannot outlast its latent frame: of the four frames in it the first shows the canvas, or there is no cut.
GHOST = 4


class TransitionError(PlanError):
    """Frames that cannot be dropped. The message names the node and what to do."""


@dataclass(frozen=True)
class Cut:
    """first_clean: the first frame of the video proper; None where no cut was found. jump: its size, 0..1.

    later: the first frame after a cut that comes too late to be that of the canvas.
    """

    first_clean: int | None
    jump: float
    usual: float
    later: int | None = None

    def describe(self) -> str:
        """For the node."""
        if self.first_clean is None:
            later = f" The cut before frame {self.later} comes too late for it." if self.later is not None else ""
            return (
                f"No cut was found in the first {SEARCHED} frames, so nothing was dropped: right for a clip whose "
                f"canvas is gone already.{later} If the video does show the canvas, check the LoRAs and that the "
                f"prompt begins with the trigger ('FFGo Prompt'). Largest change {self.jump:.3f}, usual "
                f"{self.usual:.3f}."
            )
        return f"The cut is before frame {self.first_clean} (change {self.jump:.3f}, usual {self.usual:.3f})."


def find_cut(frames_THWC: torch.Tensor, searched: int = SEARCHED) -> Cut:
    """Find the cut from the canvas into the video by the change from frame to frame, on small copies.

    A ghost of the canvas after the cut counts as canvas: the first clean frame is the one after which the picture
    moves away from it no further, three frames after the cut at most. A cut after `searched` frames is the film's own:
    it is told as `later`, and nothing is to be dropped for it.
    """
    found = _cut_within(frames_THWC, searched)
    if found.first_clean is not None or searched >= LATER:
        return found
    return replace(found, later=_cut_within(frames_THWC, LATER).first_clean)


def _cut_within(frames_THWC: torch.Tensor, searched: int) -> Cut:
    count = min(frames_THWC.shape[0], searched + 4)
    if count < 3:
        return Cut(None, 0.0, 0.0)
    small_TCHW = _small(frames_THWC[:count])
    change_T = (small_TCHW[1:] - small_TCHW[:-1]).abs().mean(dim=(1, 2, 3))
    at = int(change_T[: max(searched, 1)].argmax())
    jump = float(change_T[at])
    near = {at - 1, at, at + 1}
    others = [float(c) for i, c in enumerate(change_T) if i not in near]
    usual = sorted(others)[len(others) // 2] if others else 0.0
    before = max((float(c) for c in change_T[: max(at - 1, 0)]), default=0.0)
    if jump < max(LEAST_JUMP, TIMES_USUAL * usual, TIMES_BEFORE * before):
        return Cut(None, jump, usual)
    first = at + 1
    # With a ghost the change is spread: go on while the next frame still moves away from the canvas, which is frame 0,
    # by a good part of the jump. Motion of the scene itself does not, however fast it is.
    away_T = (small_TCHW - small_TCHW[0]).abs().mean(dim=(1, 2, 3))
    while first < min(count - 1, at + GHOST) and float(away_T[first + 1] - away_T[first]) > STILL_TO_COME * jump:
        first += 1
    return Cut(first, jump, usual)


def _small(frames_THWC: torch.Tensor) -> torch.Tensor:
    frames_TCHW = frames_THWC[..., :3].detach().float().cpu().movedim(-1, 1)
    height, width = frames_TCHW.shape[-2:]
    scale = min(SMALL_SIDE / max(height, width), 1.0)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return F.interpolate(frames_TCHW, size, mode="area")


def check_drop(drop: int, frames: int) -> None:
    """Refuse to drop what would leave nothing. Raises TransitionError."""
    if drop < 0 or drop >= frames:
        raise TransitionError(
            f"'{NODE}' was asked to drop {drop} of {frames} frames; expected 0 to {frames - 1}. The official number is "
            f"{OFFICIAL}, of a clip of 81. Connect the whole clip."
        )


def refuse_latent() -> TransitionError:
    """Why latents cannot be cut: said where one is connected."""
    return TransitionError(
        f"'{NODE}' got a latent. The cut lies inside latent frame 1, which holds three frames of the canvas and one of "
        "the video, so no latent frame can be dropped for it. Decode first ('VAE Decode'), then connect the images; or "
        "connect the VIDEO."
    )


def later_sound(audio: dict | None, start: Fraction, seconds: Fraction) -> dict | None:
    """The stretch of an AUDIO that belongs to the frames that are left, to the sample; None where there is none.

    start, seconds: of the stretch. Sound that is shorter than the video stays shorter. A new tensor.
    """
    if audio is None:
        return None
    rate = int(audio["sample_rate"])
    first, last = round(start * rate), round((start + seconds) * rate)
    left = audio["waveform"][..., first:last]
    return {**audio, "waveform": left.clone()} if left.shape[-1] else None  # a file cannot be saved with empty sound
