"""Writes golden_losses.json and golden_preserving.json with the plain loops of the references, never with the pack's.

From the repository: `python -m pytest tests/forcing -k golden` says whether it is needed; then import this module in a
session that has ComfyUI on its path (tests/conftest.py) and call `write` or `write_preserving`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from frame_memory.forcing.draws import FORCINGS, Recipe, draw_video

from . import reference_forcing, reference_preserving, small

GOLDEN = Path(__file__).with_name("golden_losses.json")
CONTEXT_GOLDEN = Path(__file__).with_name("golden_context.json")
PRESERVING = Path(__file__).with_name("golden_preserving.json")
TOLERANCE = 1e-5


@torch.no_grad()
def write() -> None:
    """Seeds and sizes as in test_golden_losses."""
    model = small.network()
    pack, video, losses = small.memory(model), small.video(3), {}
    for forcing in FORCINGS:
        draw = draw_video(video, 3, Recipe(forcing=forcing, drop_memory=0.0), torch.Generator().manual_seed(5))
        kind = forcing.split(" ")[0].lower()
        made = reference_forcing.losses(kind, model, pack, video, draw.sigmas, draw.noises, draw.rollout_noises)
        losses[kind] = [float(loss) for loss, _ in made]
    GOLDEN.write_text(json.dumps({"tolerance": TOLERANCE, "losses": losses}, indent=1) + "\n")


@torch.no_grad()
def write_context() -> None:
    """Of tests/forcing/test_sections.py, by the plain loop of reference_context.py."""
    from . import test_sections

    losses = {case: test_sections.plain_loss(case) for case in test_sections.CASES}
    CONTEXT_GOLDEN.write_text(json.dumps({"tolerance": TOLERANCE, "losses": losses}, indent=1) + "\n")


@torch.no_grad()
def write_preserving() -> None:
    """Seeds and sizes as in test_preserving.test_golden_losses."""
    from .test_preserving import FOLLOW, QUERY, drawn, encoders

    model, losses = small.network(), {}
    pack, video = encoders(model), small.video(3)
    for stage in (QUERY, FOLLOW):
        draws = [drawn(stage, video, pack, seed) for seed in range(3)]
        if stage == QUERY:
            losses[stage] = [reference_preserving.frame_query(model, pack, video, draw)[0] for draw in draws]
        else:
            losses[stage] = [reference_preserving.next_section(model, pack, video, draw) for draw in draws]
    from . import test_preserving_wan

    for case in test_preserving_wan.CASES:
        losses[" ".join(case)] = test_preserving_wan.plain_loss(*case)
    PRESERVING.write_text(json.dumps({"tolerance": TOLERANCE, "losses": losses}, indent=1) + "\n")
