"""Socket types of ours: frozen dataclasses, no tensors that a node does not own."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..frame_memory.plan import Schedule

FrameContextSocket = io.Custom("FRAME_CONTEXT")
TimelineSocket = io.Custom("TIMELINE")
SectionChangesSocket = io.Custom("SECTION_CHANGES")
FrameMemorySocket = io.Custom("FRAME_MEMORY")


@dataclass(frozen=True)
class FrameContext:
    """FRAME_CONTEXT: how the history is packed for each window."""

    schedule: Schedule
