"""Rollouts of whole videos: our section loop inside core's sampling against the plain loops of `parity_oracle.py`.

Our side is what an artist's graph runs: a core MODEL, a stock CFGGuider and RandomNoise, FramePack UniPC and sigmas,
`SectionSampler` over a plan. The other side is diffusers' network in fp64 (or the published code in fp32) inside loops
that know nothing of this pack. Both draw their noise from a CPU generator with one seed.
"""

from __future__ import annotations

import comfy.samplers
import comfy.sd
import torch
from comfy.clip_vision import Output
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

from benchmarks import parity_models as pm
from benchmarks import parity_oracle as oracle
from frame_memory.model import framepack
from frame_memory.model.key_map import convert_diffusers
from frame_memory.plan import flow_shift, parse_schedule, plan_sections, sigma_schedule
from frame_memory.plan.schedule import PRESETS
from frame_memory.sampling.section_loop import Inputs as LoopInputs
from frame_memory.sampling.section_loop import SectionSampler
from frame_memory.sampling.unipc import framepack_unipc

CONFIG = {"heads": 1, "double": 1, "single": 1, "text_features": 64}
SECTIONS, HEIGHT, WIDTH, SEED, GUIDANCE = 3, 12, 18, 11, 10.0
ORACLES = {"F0": oracle.inverted, "F1": oracle.forward}


def compare(
    kind: str, schedule: str, *, steps: int, published=None, sections: int = SECTIONS, arithmetic=torch.float64
) -> list[float]:
    """Relative RMS of every section in the order of making, in model space.

    kind: "F0" or "F1". schedule: a preset's name. published: a loaded checkout in place of diffusers in fp64;
    arithmetic: what its sampler computes in.
    """
    reference = pm.make_reference(seed=5, **CONFIG)
    # One forward pass's worth of conditioning; the loops bring their own windows and positions.
    given = pm.make_inputs(HEIGHT, WIDTH, (0,), ((1, (0,)),), text_lengths=(13,), image_tokens=25, text_features=64)
    start_scaled = given.context[0]
    ours = run_ours(reference, given, start_scaled, schedule, steps, sections)
    theirs = run_theirs(reference, given, start_scaled, kind, steps, sections, published, arithmetic)
    return [pm.relative_rms(a, b) for a, b in zip(ours, theirs, strict=True)]


def run_ours(reference, given: pm.Inputs, start_scaled: torch.Tensor, schedule: str, steps: int, sections: int):
    """Windows in the order of making, by this pack inside core."""
    framepack.register()
    patcher = comfy.sd.load_diffusion_model_state_dict(convert_diffusers(reference.state_dict()))
    vision = Output()
    vision["last_hidden_state"] = given.image_BND
    carried = {"pooled_output": given.pooled_BD, "guidance": GUIDANCE, "clip_vision_output": vision}
    guider = comfy.samplers.CFGGuider(patcher)
    text = given.text_BLD[:, : given.text_lengths[0]]
    guider.set_conds([[text, carried]], [[torch.zeros_like(text), carried]])
    guider.set_cfg(1.0)

    tokens = oracle.WINDOW * ((HEIGHT + 1) // 2) * ((WIDTH + 1) // 2)
    sigmas = torch.tensor(sigma_schedule(steps, flow_shift(tokens)), dtype=torch.float32)
    plan = plan_sections(parse_schedule(PRESETS[schedule]), sections=sections)
    start = patcher.model.process_latent_out(start_scaled)
    with torch.inference_mode():
        loop = SectionSampler(guider, Noise_RandomNoise(SEED), framepack_unipc(), sigmas)
        video = patcher.model.process_latent_in(loop.run(plan, LoopInputs(start=start)).whole())
    return [video[:, :, s.start : s.stop].clone() for s in plan.sections]


def run_theirs(
    reference, given: pm.Inputs, start: torch.Tensor, kind: str, steps: int, sections: int, published=None,
    arithmetic=torch.float64,
):  # fmt: skip
    """Windows in the order of making, by the plain loops around diffusers in fp64, or the published code in fp32."""
    if published is None:
        network, dtype, sampler = reference.double(), torch.float64, oracle.unipc
        run = pm.run_reference
    else:
        network, dtype, run = published.make(reference), torch.float32, published.run

        def sampler(x0_of, noise, sigma):
            return published.sample(x0_of, noise, len(sigma) - 1, arithmetic)

    def velocity(x, sigma, window_index, clean, clean_index, two, two_index, four, four_index):
        inputs = pm.Inputs(
            window_BCTHW=x, timestep_B=torch.tensor([sigma * 1000.0], dtype=dtype), text_BLD=given.text_BLD,
            text_lengths=given.text_lengths, pooled_BD=given.pooled_BD, image_BND=given.image_BND, guidance=GUIDANCE,
            positions=tuple(window_index),
            groups=((4, tuple(four_index)), (2, tuple(two_index)), (1, tuple(clean_index))),
            context=(four, two, clean),
        )  # fmt: skip
        return run(network, inputs, dtype)

    generator = torch.Generator("cpu").manual_seed(SEED)
    return ORACLES[kind](velocity, start.to(dtype), sections, steps, generator, sampler)
