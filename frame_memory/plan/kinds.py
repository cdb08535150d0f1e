"""Does a schedule fit the kind of checkpoint? The files do not say which kind they are, so this is a warning."""

from __future__ import annotations

from .errors import PACKER
from .schedule import PRESETS, Schedule, parse_schedule
from .sections import natural_order

KINDS = ("F0 inverted", "F1 forward")
TRAINED_WINDOW = 9


def check_kind(kind: str, schedule: Schedule | str) -> str | None:
    """Text of a warning when weights of this kind were not trained on this schedule, None when they fit.

    kind: one of KINDS, or any text that begins with F0 or F1; another kind is not judged. schedule: parsed or its text.
    """
    if isinstance(schedule, str):
        schedule = parse_schedule(schedule)
    known = next((name for name in KINDS if kind.strip().upper().startswith(name[:2])), None)
    if known is None:
        return None
    notes = _notes(known, schedule)
    if not notes:
        return None
    return (
        f"The model is set to {known}, the schedule is {schedule.text}: " + "; ".join(notes) + ". The video will look "
        f'plausible and be wrong. Nearest valid: {PRESETS[known]}. Change the schedule in the node "{PACKER}", '
        'or the kind in the node "Load FramePack Model".'
    )


def _notes(kind: str, schedule: Schedule) -> list[str]:
    notes = []
    order = natural_order(schedule)
    if kind == "F0 inverted" and order != "inverted":
        notes.append(f"F0 weights make the end of the video first and see what comes after; this order is {order}")
    elif kind == "F1 forward" and order == "inverted":
        notes.append("F1 weights only learned to see what came before; this schedule shows what comes after")
    elif kind == "F1 forward" and schedule.anchor_after:
        notes.append("F1 weights never saw an end anchor")
    if not schedule.anchor_before:
        notes.append(f"{kind[:2]} weights were trained with the start frame pinned in every section")
    if 8 in schedule.kernels:
        notes.append("published checkpoints have no 8x embedder")
    if schedule.window != TRAINED_WINDOW:
        notes.append(f"the window is {schedule.window}, the trained one {TRAINED_WINDOW}")
    kept = [f"t{tail}" for tail in (schedule.tail_before, schedule.tail_after) if tail in ("a", "c")]
    if kept:
        notes.append(f"published checkpoints drop the tail (td), this schedule keeps it ({kept[0]})")
    return notes
