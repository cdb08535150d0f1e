"""How long a resume takes before the first new model call, with many finished sections of real size.

    python scripts/run.py -m benchmarks.resume [--record]

The sections are 640x608 with prompts and vision features of FramePack's sizes; the network itself is a tiny one that
is never called: what is measured is everything around it, from the queue to the first call, with the model loaded.
The target is 2 s. `--profile` prints where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from safetensors.torch import save_file

from frame_memory.model import checkpoint, framepack
from frame_memory.plan import PRESETS, flow_shift, parse_schedule, sigma_schedule
from frame_memory.sampling.long_video import sample_long_video
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.unipc import framepack_unipc

from . import parity_models, record

HEIGHT, WIDTH = 76, 80  # latent pixels of 640x608
TOKENS, TEXT, POOLED, VISION = 512, 4096, 768, (729, 1152)
SECTION_SECONDS = 1.2
TARGET_SECONDS = 2.0
LABEL = "640x608, {} finished sections"


class Reached(Exception):
    """The first model call of a resumed run."""


class Probe:
    """Stands before the network: gives something back without calling it, or stops there."""

    stop = False

    @staticmethod
    def call(executor, x, *args, **kwargs):
        if Probe.stop:
            raise Reached
        return x * 0.5


def tiny_model(folder: Path):
    """A real FramePack MODEL of the smallest network, with prompts of the real width."""
    path = folder / "FramePack_F1_tiny.safetensors"
    tensors = parity_models.make_reference(seed=0, heads=1, double=1, single=2, text_features=TEXT).state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path))
    model = checkpoint.load_framepack(str(path))
    model.model_options = {**model.model_options, framepack.MODEL_OPTION: {"kind": "F1"}}
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "probe", Probe.call)
    comfy.model_management.load_models_gpu([model])
    return model


def guider_of(model):
    """A guider with one prompt and vision features, as large as real ones."""
    generator = torch.Generator().manual_seed(1)
    vision = comfy.clip_vision.Output()
    vision["last_hidden_state"] = torch.randn(1, *VISION, generator=generator)
    values = {"pooled_output": torch.randn(1, POOLED, generator=generator), "guidance": 10.0}
    text = torch.randn(1, TOKENS, TEXT, generator=generator)
    guider = comfy.samplers.CFGGuider(model)
    prompt = [[text, {**values, "clip_vision_output": vision}]]
    guider.set_conds(prompt, prompt)
    guider.set_cfg(1.0)
    return guider


def queue(guider, root: Path, sections: int) -> None:
    """What the Anti-Drift Sampler does with a graph."""
    start = torch.randn(1, 16, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    tokens = 9 * HEIGHT * WIDTH // 4
    with torch.inference_mode():
        sample_long_video(
            noise=Noise_RandomNoise(7), guider=guider, sampler=framepack_unipc(),
            sigmas=torch.tensor(sigma_schedule(1, flow_shift(tokens))), schedule=parse_schedule(PRESETS["F1 forward"]),
            start={"samples": start}, seconds=sections * SECTION_SECONDS, project=ProjectRequest(root, "long"),
            say=lambda _: None,
        )  # fmt: skip


def resume_seconds(guider, root: Path, sections: int, profile: bool) -> tuple[float, float]:
    """Seconds, and those of them on a processor, from the queue of a video one section longer than what is finished to
    its first model call."""
    Probe.stop = True
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    start, busy = time.monotonic(), time.process_time()
    try:
        queue(guider, root, sections + 1)
    except Reached:
        pass
    else:
        raise AssertionError("the resumed run called no model")
    finally:
        took = time.monotonic() - start, time.process_time() - busy
        profiler.disable()
        Probe.stop = False
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, nargs="+", default=[20, 100], help="finished sections, ascending")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.csv")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; not with --record")
    asked = parser.parse_args()
    if asked.record and asked.profile:
        parser.error("--profile slows the run down: its figures are not recorded")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        guider = guider_of(tiny_model(root))
        for sections in asked.sections:
            start = time.monotonic()
            queue(guider, root / "projects", sections)
            made = time.monotonic() - start
            took, busy = min(resume_seconds(guider, root / "projects", sections, asked.profile) for _ in range(3))
            print(
                f"{sections} finished sections of 640x608: {took:.2f} s from the queue to the first new model call "
                f"({busy:.2f} s of processor time), target {TARGET_SECONDS:g} s; making them without a network took "
                f"{made:.1f} s"
            )
            rows.append((LABEL.format(sections), "resume seconds", took))
            rows.append((LABEL.format(sections), "resume processor seconds", busy))
    if asked.record:
        record.append("benchmarks.resume", rows)


if __name__ == "__main__":
    main()
