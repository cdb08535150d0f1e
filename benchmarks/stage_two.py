"""What Direct Forcing's stage 2 needs at full size: `python scripts/run.py -m benchmarks.stage_two [--record]`.

Only the last modulation and the output layer learn, so the trunk runs as in inference and leaves nothing behind; what
is added is the graph of the head and the numbers that learn. First by calculation on the published topology, then,
where there is a GPU that holds it, by one update with random weights. Exits with 1 where either takes more
than 1.1 times the memory of inference.
Source: reference/memorypack.md sections 1.1, 3.2 and 3.3.

Shape legend: N tokens of the noisy window, D hidden size, P numbers of an output token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import comfy.ops
import torch

from frame_memory.forcing.clips import TrainingVideo
from frame_memory.forcing.draws import DIRECT, Recipe, draw_video
from frame_memory.forcing.flow import Conditioning, predict_velocity
from frame_memory.forcing.forcings import LOSSES
from frame_memory.forcing.stages import HEAD, HEAD_PART, Trained
from frame_memory.forcing.video_trainer import VideoSettings, VideoTrainer
from frame_memory.model.context import gather_context
from frame_memory.model.transformer import FramePackTransformer
from frame_memory.plan import PRESETS, plan_sections
from frame_memory.plan.memory import memory_tokens

from . import record
from .train_selftest import TOPOLOGY

FULL = {
    **TOPOLOGY,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "context_in_dim": 4096,
}
FRAMES, HEIGHT, WIDTH = 9, 60, 104  # latent, of a window of 480x832
TEXT, VISION, VISION_FEATURES, POOLED = 256, 729, 1152, 768
CONTEXT_TOKENS = 3120 + 390 + 416  # of F1's context at this size: 1x, 2x, 4x
BOUND = 1.1
CALCULATED = "memory over inference, calculated"
RATIOS = (CALCULATED, "ratio, run")
GIB = 2**30
# Bytes of a number that learns: itself, its gradient, AdamW's two and the average in fp32, and the copy it runs with.
LEARNING = 5 * 4 + 2
# Tensors [N, D] that the head's graph keeps (the normed tokens, for the scale; the modulated ones, for the matrix), and
# those that its backward pass makes meanwhile.
KEPT, MADE = 2, 3


@dataclass(frozen=True)
class Needs:
    """Bytes. stream: what a block cannot do without, so that inference is rather counted too small than too large."""

    weights: int
    stream: int
    learning: int
    graph: int
    memory: int

    @property
    def inference(self) -> int:
        """What inference takes at least."""
        return self.weights + self.stream + self.memory

    @property
    def stage_two(self) -> int:
        """What stage 2 takes at most. The head's graph grows when the trunk has let go of its tensors; both count."""
        return self.inference + self.learning + self.graph

    @property
    def ratio(self) -> float:
        """Stage 2 over inference."""
        return self.stage_two / self.inference

    @property
    def hardest_ratio(self) -> float:
        """The same if inference took nothing but its weights."""
        return (self.weights + self.learning + self.graph) / self.weights


def network(device="meta", dtype=torch.bfloat16, **topology) -> FramePackTransformer:
    """The transformer at full size, without memory on the device "meta"."""
    return FramePackTransformer(
        dtype=dtype, device=device, operations=comfy.ops.disable_weight_init, **{**FULL, **topology}
    )


def graph_bytes(tokens: int, hidden: int, out: int, itemsize: int = 2) -> int:
    """Bytes that the head's graph keeps and makes: [N, D] in the network's numbers, [N, P] of the loss in fp32."""
    return (KEPT + MADE) * tokens * hidden * itemsize + 3 * tokens * out * 4


def needs(weight_bytes: float = 2.0) -> Needs:
    """By calculation. weight_bytes: of a number of the blocks' matrices (bf16 2, fp8 1); all else stays bf16."""
    model = network()
    hidden, params = model.hidden_size, dict(model.named_parameters())
    in_blocks = sum(p.numel() for n, p in params.items() if "blocks." in n and p.ndim == 2)
    rest = sum(p.numel() for p in params.values()) - in_blocks
    window = FRAMES * HEIGHT // 2 * WIDTH // 2
    memory = memory_tokens(FRAMES, HEIGHT, WIDTH)
    everything = window + CONTEXT_TOKENS + memory + VISION + TEXT
    widest = 3 * hidden + int(hidden * model.params.mlp_ratio)  # a single block's first layer
    return Needs(
        weights=int(in_blocks * weight_bytes + rest * 2),
        stream=everything * (hidden + widest) * 2,
        learning=LEARNING * sum(params[name].numel() for name in HEAD),
        graph=graph_bytes(window, hidden, model.out_channels * 4),
        memory=memory * hidden * 2,
    )


def table() -> tuple[list[str], list[tuple[str, str, float]]]:
    """(lines to print, figures to record)."""
    lines, figures = [], []
    lines += ["| GiB | weights | stream of a block | learning numbers | head's graph | inference | stage 2 | ratio | "
              "ratio to the weights alone |", "|" + "---|" * 9]  # fmt: skip
    for name, size in (("bf16", 2.0), ("fp8 blocks", 1.0)):
        n = needs(size)
        parts = (n.weights, n.stream, n.learning, n.graph, n.inference, n.stage_two)
        lines.append(
            f"| {name} | " + " | ".join(f"{v / GIB:.2f}" for v in parts) + f" | {n.ratio:.3f} | {n.hardest_ratio:.3f} |"
        )
        figures += [(f"stage 2, {name}", CALCULATED, n.ratio)]
        figures += [(f"stage 2, {name}", "memory over weights alone, calculated", n.hardest_ratio)]
    return lines, figures


def run_on_gpu(clips: int = 2, **topology) -> dict[str, float]:
    """Peak GPU bytes of inference and of one update with random weights, and their ratio. topology: a smaller one."""
    torch.manual_seed(0)
    model = network("cuda", **topology).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    features = model.params.context_in_dim
    cond = Conditioning(*(torch.randn(s, device="cuda") for s in (
        (1, TEXT, features), (1, POOLED), (1, VISION, VISION_FEATURES)
    )))  # fmt: skip
    video = TrainingVideo(torch.randn(1, 16, 1 + FRAMES * clips, HEIGHT, WIDTH, device="cuda"), cond, "random")
    trained = Trained(model, None, (HEAD_PART,), dtype=torch.bfloat16, device="cuda")
    peaks = {"inference": gpu_peak(lambda: _infer(trained, video))}
    trainer = VideoTrainer(trained.parameters, VideoSettings(warmup=1))
    recipe = Recipe(DIRECT)

    def losses(generator: torch.Generator):
        draw = draw_video(video, clips, recipe, generator)
        for clip in LOSSES[DIRECT](trained.forced, video, draw, recipe):
            yield clip.loss, 1 / draw.count

    def update() -> None:
        with trained.ready():
            trainer.step(losses)

    update()  # the optimiser's numbers appear in the first one
    peaks["stage 2"] = gpu_peak(update)
    # The fp32 copies of the head lie in the GPU already; they are no part of inference.
    peaks["inference"] -= 4 * sum(p.numel() for p in trained.parameters.values())
    return {**peaks, "ratio": peaks["stage 2"] / peaks["inference"]}


def _infer(trained: Trained, video: TrainingVideo) -> None:
    section = plan_sections(PRESETS["F1 forward"], sections=2).sections[1]
    context = gather_context(section, video.latents, video.latents[:, :, :1], None, 0.0)
    with torch.no_grad():
        x = video.latents[:, :, section.start : section.stop]
        predict_velocity(trained, x, x.new_ones(1), video.cond, context, {})


def gpu_peak(action) -> int:
    """Bytes that torch held on the GPU at most during a call."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    args = parser.parse_args(arguments)
    lines, figures = table()
    print("\n".join(lines))
    if not torch.cuda.is_available():
        print(f"{record.UNDECIDED}there is no GPU here, calculated only")
    elif torch.cuda.get_device_properties(0).total_memory < 1.2 * needs().inference:
        print(f"{record.UNDECIDED}the GPU here holds less than the network, calculated only")
    else:
        got = run_on_gpu()
        print(f"Run: inference {got['inference'] / GIB:.2f} GiB, stage 2 {got['stage 2'] / GIB:.2f} GiB, "
              f"ratio {got['ratio']:.3f} (bound {BOUND})")  # fmt: skip
        figures += [("stage 2, bf16", f"{k}, run", v if k == "ratio" else v / GIB) for k, v in got.items()]
    if args.record:
        record.append("benchmarks.stage_two", figures)
    missed = list(misses(figures))
    for problem in missed:
        print(f"FAILED: {problem}")
    return int(bool(missed))


def misses(figures: Iterable[tuple[str, str, float]]) -> Iterator[str]:
    """What a run fails by, of what it records: a ratio to inference that is not within the bound."""
    for case, measure, value in figures:
        if measure in RATIOS and not value <= BOUND:
            yield f"{case}: {measure} {value:.3f}, at most {BOUND} is asked for"


if __name__ == "__main__":
    sys.exit(main())
