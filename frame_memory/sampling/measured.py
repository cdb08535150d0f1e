"""A LATENT or a project as pictures to be measured, decoded a few at a time, with what its mark says of its making.

Shape suffixes: T time, H height, W width, C colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..journal.files import JournalError
from ..plan import pixel_frames
from ..plan.errors import PlanError
from ..plan.mark import MarkError
from ..video.decode import DecodeError
from ..video.drift import Timing
from ..video.footage import Footage, FootageError
from ..video.save import CARRIED, SavePlan, pixels_of, plan_save
from ..video.vae import VAEError
from ..video.writer import NODE as SAVER
from .judged import marked_sections, pixel_spans
from .stored import StoredVideo, open_stored


def decoded(
    root: Path, samples: Mapping | None, project: str, vae, order: str, node: str,
    interrupt: Callable[[], None], announce: Callable[[str], None],
) -> tuple[Footage, Timing]:  # fmt: skip
    """The video of a LATENT, or of the project of that name in `root`; of a batch the first one.

    order: for a LATENT that does not say. Raises, in this node's name, FootageError for what cannot be decoded and
    JournalError for a project that cannot be read.
    """
    if vae is None:
        raise FootageError(
            f"'{node}' needs the VAE of the model to see a latent or a project. Connect 'Load VAE' to 'vae'."
        )
    try:
        stored = open_stored(root, project) if samples is None else None
        if stored is not None:
            plan = plan_save(vae, stored.samples(), 0, CARRIED, None if stored.whole else stored.windows)
        else:
            plan = plan_save(vae, samples or {}, 0, CARRIED)
    except JournalError as error:
        raise JournalError(str(error).replace(f"'{SAVER}'", f"'{node}'")) from error
    except (DecodeError, VAEError, MarkError, PlanError) as error:
        raise FootageError(str(error).replace(f"'{SAVER}'", f"'{node}'")) from error

    def between(start: int, stop: int) -> Iterator:
        first = 0
        for chunk_THWC in pixels_of(plan, vae, 0, interrupt, None, announce):
            part_THWC = chunk_THWC[max(start - first, 0) : max(stop - first, 0)]
            first += len(chunk_THWC)
            if len(part_THWC):
                yield part_THWC
            if first >= stop:
                return

    latent = f"A latent of {plan.width}x{plan.height}"
    words = latent if stored is None else stored.describe("Measured", "measure")
    if plan.videos > 1:
        words += f", the first of {plan.videos} videos"
    notes = [] if stored is None else stored.notes
    words = "\n".join([f"{words}.", *(f"Warning: {note}" for note in notes)])
    footage = Footage(plan.frames, float(plan.fps), plan.width, plan.height, words, between)
    return footage, _timing(plan, stored, order)


def _timing(plan: SavePlan, stored: StoredVideo | None, order: str) -> Timing:
    """What the mark says; sections by 1.2 s where it does not say where they begin."""
    mark, rate = plan.mark, float(plan.fps)
    if mark is None:
        return Timing.guessed(plan.frames, rate, order)
    sections = stored.sections if stored is not None else marked_sections(mark, plan.latents_BCTHW.shape[2])
    if not sections:
        return Timing.guessed(plan.frames, rate, mark.order)
    begin = stored.first_frame if stored is not None else 0
    spans = [(n, max(a - begin, 0), min(b - begin, plan.frames)) for n, a, b in pixel_spans(sections, mark.clip)]
    given = max(pixel_frames(mark.given, mark.clip) - begin, 0)
    order = mark.order
    if order == "both ends first" and stored is not None and stored.stop < stored.total:
        order = "forward"  # of such a video only the last section is made before its time, and it is not in this part
    return Timing(plan.frames, rate, order, given, tuple(span for span in spans if span[2] > span[1]))
