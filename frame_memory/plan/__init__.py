"""Plans: schedule grammar, section plans, decode windows, token counts, buckets, timelines, layout. Pure Python."""

from .errors import PlanError, refusal
from .frames import BLANK, END, START, pixel_frames, pixel_span
from .schedule import PRESETS, Group, Schedule, ScheduleError, parse_schedule
from .sections import (
    ContextGroup,
    LongVideoPlan,
    Section,
    Tail,
    natural_order,
    paddings,
    plan_sections,
    section_count,
)

__all__ = [
    "BLANK",
    "END",
    "PRESETS",
    "START",
    "ContextGroup",
    "Group",
    "LongVideoPlan",
    "PlanError",
    "Schedule",
    "ScheduleError",
    "Section",
    "Tail",
    "natural_order",
    "paddings",
    "parse_schedule",
    "pixel_frames",
    "pixel_span",
    "plan_sections",
    "refusal",
    "section_count",
]
