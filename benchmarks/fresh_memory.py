"""What an untrained memory holds of a visitor that has left: `python scripts/run.py -m benchmarks.fresh_memory`.

A linear reading of psi is fitted on some scenes of the long world and asks the others for the visitor's colour, after
every section: once with Squeeze's output matrix at zero, as reference/memorypack.md section 2.2 has it, once as
`initialise` leaves it. What no reading finds there, no gradient finds either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from frame_memory.forcing.clips import clip_sections
from frame_memory.forcing.flow import Conditioning
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise

from . import record
from .claims_rows import fresh
from .long_clips import asked_for, codec_of, latents_of, one_turn
from .long_world import away, random_long_scene
from .world import SPRITE_COLOURS

SECTIONS = 14  # two rounds: the visitor comes, leaves, comes back and leaves
PENALTIES = (1.0, 10.0, 100.0, 1000.0)


def read_share(psi_NMD: Tensor, colours_N: Tensor, fitted: int) -> float:
    """Share of the scenes from `fitted` on whose colour ridge regression on the scenes before reads from psi.

    The best of a few penalties, so a share by chance is a little above 1 in 6.
    """
    x = psi_NMD.flatten(1)
    x = torch.cat([(x - x[:fitted].mean(0)) / (x[:fitted].std(0) + 1e-6), torch.ones(len(x), 1)], dim=1).double()
    wanted = nn.functional.one_hot(colours_N[:fitted], len(SPRITE_COLOURS)).double()
    shares = []
    for penalty in PENALTIES:
        square = x[:fitted].T @ x[:fitted] + penalty * torch.eye(x.shape[1], dtype=x.dtype)
        guess = (x[fitted:] @ torch.linalg.solve(square, x[:fitted].T @ wanted)).argmax(1)
        shares.append(float((guess == colours_N[fitted:]).double().mean()))
    return max(shares)


@torch.no_grad()
def shares_by_section(
    pack: SemanticPack, turns_NCTHW: Tensor, cond: Conditioning, colours_N: Tensor, fitted: int
) -> list[float]:
    """`read_share` after each section."""
    psi, shares = pack.anchor(cond.text, cond.vision), []
    for section in clip_sections(SECTIONS):
        clip = latents_of(turns_NCTHW, section.stop)[:, :, section.start :]
        psi = pack.update(psi, clip, first=section.index == 0)
        shares.append(read_share(psi, colours_N, fitted))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/claims"), help="folder for the scenes")
    parser.add_argument("--scenes", type=int, default=800, help="three quarters to fit on")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    args = parser.parse_args()
    codec = codec_of(args.work)
    rng = np.random.default_rng(1)
    scenes = [random_long_scene(rng, named=False) for _ in range(args.scenes)]
    turns, cond = torch.stack([one_turn(scene, codec) for scene in scenes]), asked_for(scenes)
    colours = torch.tensor([list(SPRITE_COLOURS).index(scene.colour) for scene in scenes])
    network = fresh("F1")
    figures = []
    ends = np.array([4 * section.stop - 4 for section in clip_sections(SECTIONS)])
    gone = np.mean([away(scene, ends) for scene in scenes], axis=0)
    print("| after section | visitor gone in | zero matrix | ours |\n|---|---|---|---|")
    columns = {}
    for label in ("zero matrix", "ours"):
        pack = initialise(SemanticPack(PackSpec.of(network), dtype=torch.float32, operations=nn), network)
        if label == "zero matrix":
            pack.squeeze.attention.out.weight.data.zero_()
        columns[label] = shares_by_section(pack, turns, cond, colours, args.scenes * 3 // 4)
        figures += [(f"{label}, after section {i}", "colour read", v) for i, v in enumerate(columns[label])]
    for i, (zero, ours) in enumerate(zip(*columns.values(), strict=True)):
        print(f"| {i} | {gone[i]:.0%} | {zero:.0%} | {ours:.0%} |")
    if args.record:
        record.append(f"benchmarks.fresh_memory --scenes {args.scenes}", figures)


if __name__ == "__main__":
    main()
