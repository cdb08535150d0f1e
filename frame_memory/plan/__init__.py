"""Plans: schedule grammar, section plans, decode windows, token counts, buckets, timelines, layout. Pure Python."""

from .buckets import BUCKETS, check_size, nearest_bucket, nearest_valid, off_grid
from .decode import DecodeWindow, decode_windows
from .errors import PlanError, refusal
from .frames import BLANK, END, START, pixel_frames, pixel_span
from .kinds import KINDS, check_kind
from .layout import Label, PackingPicture, Rect, packing_picture
from .schedule import PRESETS, TEXT_BESIDE, Group, Schedule, ScheduleError, in_words, parse_schedule
from .sections import (
    ORDERS,
    ContextGroup,
    LongVideoPlan,
    Section,
    Tail,
    clip_window,
    natural_order,
    paddings,
    plan_sections,
    section_count,
)
from .timeline import (
    Timeline,
    TimelineEntry,
    TimelineError,
    parse_timeline,
    unused_entries,
    weights_for,
)
from .timeline import table as timeline_table
from .timeline import validate as validate_timeline
from .tokens import (
    TokenCount,
    flow_shift,
    group_tokens,
    latent_bytes,
    mu,
    schedule_tokens,
    section_tokens,
    sigma_schedule,
)

__all__ = [
    "BLANK",
    "BUCKETS",
    "END",
    "KINDS",
    "ORDERS",
    "PRESETS",
    "START",
    "TEXT_BESIDE",
    "ContextGroup",
    "DecodeWindow",
    "Group",
    "Label",
    "LongVideoPlan",
    "PackingPicture",
    "PlanError",
    "Rect",
    "Schedule",
    "ScheduleError",
    "Section",
    "Tail",
    "Timeline",
    "TimelineEntry",
    "TimelineError",
    "TokenCount",
    "check_kind",
    "check_size",
    "clip_window",
    "decode_windows",
    "flow_shift",
    "group_tokens",
    "in_words",
    "latent_bytes",
    "mu",
    "natural_order",
    "nearest_bucket",
    "nearest_valid",
    "off_grid",
    "packing_picture",
    "paddings",
    "parse_schedule",
    "parse_timeline",
    "pixel_frames",
    "pixel_span",
    "plan_sections",
    "refusal",
    "schedule_tokens",
    "section_count",
    "section_tokens",
    "sigma_schedule",
    "timeline_table",
    "unused_entries",
    "validate_timeline",
    "weights_for",
]
