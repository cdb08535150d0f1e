"""Ask a memory for one frame of a video, and show what comes beside the frame itself.

The frame is denoised from noise at its own time, behind nothing but the memory's tokens, as in stage 1 of the training
(frame query). The memory is what a run would hold: the whole video, encoded segment by segment, within its budget.

A number says little alone, so it is told beside that of the mean of other frames in the frame's place: that knows the
video and not the moment, and is near where little moves. It is decoded behind the same frames as the answer, since a
causal VAE lets them shine through, most in the first of the four pictures.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels (VAE space).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.samplers
import torch
from torch import Tensor

from ..model.context import PackedContext
from ..model.families import carried_context, window_of
from ..model.framepack import token_conditions
from ..model.packing import ContextLayout
from ..model.preserved_history import Remembered
from ..model.preserved_memory import PreservedMemory, check_preserved
from ..model.provenance import without_their_lora
from ..plan import PlanError, pixel_frames, sigma_schedule
from ..plan.mark import KEY, LatentMark, read_mark
from ..plan.preservation import within_reach
from ..video.decode import decode_window
from ..video.fidelity import psnr, ssim
from ..video.vae import check_vae
from .long_video import check_base, frame_rate, latent_of
from .preservation import PreservationRun, check_tokens_taken
from .section_loop import with_carried

RETRIEVE = "Retrieve Frame"
# Latent frames decoded before the one that is asked for, since a causal VAE begins each clip with a still.
BEFORE = 2
# Where training's noise levels lie (forcing/preserving.py).
SHIFT = 5.0
# So many other frames, evenly over the video, make the mean.
OTHERS = 8
OF_STAGE_TWO = (
    "Warning: this memory is of training's stage 2, which makes videos and was never asked for single frames. Load the "
    "memory of stage 1, with its LoRA on the MODEL."
)


@dataclass(frozen=True)
class Retrieved:
    """picture `[1, height, 2 x width, 3]`: the frame itself, then what the memory made of it; psnr in dB."""

    picture: Tensor
    psnr: float
    ssim: float
    report: str


def retrieve_frame(
    *, model, memory: PreservedMemory, positive: list, latent: Mapping, vae, seconds: float, steps: int, seed: int
) -> Retrieved:
    """Of a batch the first video counts. Raises PlanError for a video of another family or rate than the MODEL's, a
    time past the end, a memory that holds nothing yet, or one that comes from no encoder node; MemoryMismatch for one
    of another base, VAEError for another VAE."""
    check_tokens_taken(memory, model, RETRIEVE)
    fits = check_preserved(memory, model, RETRIEVE)
    base = check_base(model, {"samples": latent}, RETRIEVE)
    fps = frame_rate(model, {"samples": latent}, RETRIEVE)
    video = latent_of("samples", latent, RETRIEVE)
    assert video is not None
    check_vae(vae, video, LatentMark(base=base))
    which, video = _which(latent, len(video)), video[:1]
    picture = round(seconds * fps)
    place = -(-picture // 4)
    if place >= video.shape[2]:
        last = (pixel_frames(video.shape[2]) - 1) / fps
        raise PlanError(
            f"'seconds' of '{RETRIEVE}' is {seconds:g}, and the video ends at {last:.2f} s. Nearest valid: {last:.2f}."
        )
    window = (latent.get(KEY) or {}).get("window", window_of(model))
    run = PreservationRun(memory, model, video, window)
    remembered = run.shown()
    if remembered is None:
        raise PlanError(
            f"The memory at {' + '.join(memory.rates)} holds nothing of a video of {video.shape[2]} latent frames yet: "
            f"no block is full. Feed a longer video into 'samples' of '{RETRIEVE}'."
        )
    layout = ContextLayout(positions=(place,), groups=())
    remembered = remembered._replace(places=within_reach(remembered.places, place))
    made = _denoised(model, positive, layout, remembered, video[:, :, :1], steps, seed)
    shown = -1 - (4 * place - picture)
    pair = [_picture(vae, video, place, shown), _picture(vae, video, place, shown, made)]
    near, like = psnr(*pair), ssim(*pair)
    held = any(chunk.start <= place < chunk.stop and chunk.tokens for chunk in run.chunks)
    lines = [
        *which,
        *([] if held else [_forgotten(place, video.shape[2])]),
        *([OF_STAGE_TWO] if memory.schedule else []),
        *(f"Warning: {said}" for said in without_their_lora(memory.label, memory.loras, model)),
        f"Frame at {picture / fps:.2f} s (picture {picture}, latent frame {place}): PSNR {near:.2f} dB, "
        f"SSIM {like:.3f}.",
        _beside(pair[0], (near, like), *_without_the_moment(vae, video, place, shown), held and memory.trained),
        f"Left the frame itself, right what the memory holds of it: {remembered.tokens.shape[1]} tokens for "
        f"{video.shape[2]} latent frames.",
        f"{memory.describe()}. {fits}",
    ]
    return Retrieved(torch.cat(pair, dim=1)[None], near, like, "\n".join(lines))


def _which(latent: Mapping, count: int) -> list[str]:
    """Which video it is, where something tells: of several in a list each has a report of its own."""
    mark = read_mark(latent)
    name = (mark.source or mark.project) if mark else ""
    many = f"Of {count} videos in one batch the first one is asked."
    return [*([f"{name}:"] if name else []), *([many] if count > 1 else [])]


def _picture(vae, video: Tensor, place: int, shown: int, frame: Tensor | None = None) -> Tensor:
    """A picture of a latent frame, by number from its end, `[height, width, 3]`. frame: another one in its place."""
    known = video[:, :, max(place - BEFORE, 0) : place]
    around = torch.cat((known, video[:, :, place : place + 1] if frame is None else frame), dim=2)
    return decode_window(vae.decode, around)[shown].cpu().clamp(0, 1)


def _others(frames: int, place: int) -> list[int]:
    """Latent frames that are not the one that is asked for, evenly over the video."""
    others = [frame for frame in range(frames) if frame != place]
    count = min(OTHERS, len(others))
    return [others[(2 * number + 1) * len(others) // (2 * count)] for number in range(count)]


def _without_the_moment(vae, video: Tensor, place: int, shown: int) -> tuple[int, Tensor | None]:
    """(how many other frames, the picture of their mean in the place of one); 0 and None where there are none."""
    others = _others(video.shape[2], place)
    if not others:
        return 0, None
    mean = video[:, :, others].double().mean(dim=2, keepdim=True)  # exact where nothing moves
    return len(others), _picture(vae, video, place, shown, mean.to(video))


def _beside(truth: Tensor, answer: tuple[float, float], count: int, mean: Tensor | None, speaks: bool) -> str:
    """What the mean of other frames would be worth as an answer. answer: PSNR in dB and SSIM of the memory's. speaks:
    whether it could be of the memory at all."""
    if mean is None:
        return "The video has no other frame to compare with."
    worth = psnr(truth, mean), ssim(truth, mean)
    told = f"To compare, the mean of {count} other frames of the video in its place: PSNR {worth[0]:.2f} dB, "
    told += f"SSIM {worth[1]:.3f}. "
    nearer, alike = (mine > its for mine, its in zip(answer, worth, strict=True))
    told += f"The memory is {answer[0] - worth[0]:.2f} dB nearer" if nearer else "The memory is no nearer"
    told += " than the mean."
    if not speaks or nearer != alike:
        return told
    if nearer:
        return told + " Its SSIM is higher too: it knows of this moment."
    return told + " Its SSIM is no higher either: it knows nothing of this moment, or nothing moves here."


def _forgotten(place: int, frames: int) -> str:
    why = "its block is not full yet" if place > frames // 2 else "the budget of tokens has let it go"
    return f"Warning: the memory holds no token of latent frame {place}: {why}. The picture is a guess from the rest."


def _denoised(
    model, positive: list, layout: ContextLayout, seen: Remembered, like: Tensor, steps: int, seed: int
) -> Tensor:
    """One latent frame `[1, C, 1, H, W]` made from noise behind the memory alone."""
    alone = carried_context(model.model, PackedContext([], layout))
    carried = with_carried(alone, {"model_conds": token_conditions(*seen)})
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    guider.original_conds = {k: [with_carried(c, carried) for c in v] for k, v in guider.original_conds.items()}
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.tensor(sigma_schedule(steps, SHIFT))
    sampler = comfy.samplers.sampler_object("euler")
    made = guider.sample(noise, torch.zeros_like(like), sampler, sigmas, disable_pbar=True, seed=seed)
    return made.float().cpu()
