"""Memory in the network: nothing of it when the gate is closed, and exactly one more part of the context otherwise."""

from __future__ import annotations

import comfy.ops
import pytest
import torch

from benchmarks import parity_models
from frame_memory.forcing.flow import Conditioning, add_noise, predict_velocity
from frame_memory.forcing.gradients import differentiable, training_options
from frame_memory.model.context import gather_context
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise
from frame_memory.plan import PRESETS, plan_sections
from frame_memory.plan.memory import with_true_image

TEXT = 64


@pytest.fixture(scope="module")
def weights():
    return parity_models.make_reference(seed=0, heads=1, double=1, single=2, text_features=TEXT).state_dict()


@pytest.fixture(scope="module")
def network(weights):
    return parity_models.make_ours(weights)


def drawn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(section, batch=1, height=6, width=10, dtype=torch.float32):
    """One call's arguments for a section whose past is drawn."""
    video = drawn(batch, 16, 28, height, width, seed=2, dtype=dtype)
    context = gather_context(section, video, video[:, :, :1], None, 0.0)
    return {
        "x": drawn(batch, 16, 9, height, width, seed=3, dtype=dtype),
        "timestep": torch.full((batch,), 700.0, dtype=dtype),
        "context": drawn(batch, 7, TEXT, seed=4, dtype=dtype),
        "y": drawn(batch, 768, seed=5, dtype=dtype),
        "clip_fea": drawn(batch, 4, 1152, seed=6, dtype=dtype),
        "guidance": torch.full((batch,), 10.0, dtype=dtype),
        "context_latents": context.latents,
        "context_layout": context.layout,
        "transformer_options": {},
    }


def section_of(index: int):
    return plan_sections(PRESETS["F1 forward"], sections=3).sections[index]


def pack_for(network, dtype=torch.float32):
    made = SemanticPack(PackSpec.of(network), dtype=dtype, operations=comfy.ops.manual_cast)
    return initialise(made, network).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 6, 10), (2, 5, 7)])
@torch.inference_mode()
def test_gate_zero_and_distance_20_are_f1_bit_for_bit(weights, dtype, batch, height, width):
    network = parity_models.make_ours(weights, dtype)
    pack = pack_for(network, dtype)
    psi = pack.update(pack.anchor(drawn(1, 7, TEXT)), drawn(batch, 16, 9, height, width), first=True)
    for index in range(3):  # the image's true distances 1, 10 and 19 are all held at 20
        f1 = network(**inputs(section_of(index), batch, height, width, dtype))
        ours = inputs(with_true_image(section_of(index)), batch, height, width, dtype)
        assert torch.equal(network(**ours, memory_tokens=pack.tokens(psi)), f1)


@torch.inference_mode()
def test_memory_tokens_are_one_more_part_of_the_context_stream(network):
    """More tokens of vision features do the same as their projections given as memory: nothing else is added, and
    nothing marks where memory stands, since that side has no rotary position."""
    given = inputs(section_of(1))
    more = drawn(1, 5, 1152, seed=8)
    memory = network.image_projection(more)
    together = network(**{**given, "clip_fea": torch.cat((given["clip_fea"], more), dim=1)})
    assert torch.allclose(network(**given, memory_tokens=memory), together, atol=1e-5)
    assert not torch.allclose(network(**given), together, atol=1e-3)


@torch.inference_mode()
def test_each_video_of_a_batch_sees_its_own_memory_whatever_its_prompt_s_length(network):
    given, memory = inputs(section_of(1), batch=2), drawn(2, 6, 128, seed=9)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    got = network(**given, attention_mask=mask, memory_tokens=memory)
    for i, length in enumerate((7, 4)):
        row = {k: v[i : i + 1] for k, v in given.items() if isinstance(v, torch.Tensor)}
        row["context"] = row["context"][:, :length]
        row["context_latents"] = [c[i : i + 1] for c in given["context_latents"]]
        alone = network(**{**given, **row}, memory_tokens=memory[i : i + 1])
        assert torch.allclose(got[i : i + 1], alone, atol=1e-5), i


def velocity_loss(network, pack, options=None):
    given = inputs(section_of(1))
    x, noise, sigma = drawn(1, 16, 9, 6, 10, seed=12), drawn(1, 16, 9, 6, 10, seed=13), torch.tensor([0.6])
    cond = Conditioning(given["context"], given["y"], given["clip_fea"])
    section = with_true_image(section_of(1))
    video = drawn(1, 16, 28, 6, 10, seed=2)
    context = gather_context(section, video, video[:, :, :1], None, 0.0)
    psi = pack.update(pack.anchor(cond.text, cond.vision), video[:, :, 1:10], first=True)
    out = predict_velocity(
        network, add_noise(x, noise, sigma), sigma, cond, context, options or {}, memory_tokens=pack.tokens(psi)
    )
    return (out - (noise - x)).square().mean()


def test_training_moves_the_gate_first_and_then_the_whole_memory(network):
    """At gate 0 psi has no say yet, but the gate's slope is there, and steep: the network's first norm divides by the
    tokens' own size (SemanticPack.tokens). Once the gate is open everything else gets a gradient too."""
    pack = pack_for(network).requires_grad_(True)
    network.requires_grad_(False)
    with differentiable(network):
        velocity_loss(network, pack, training_options()).backward()
        at_zero = float(pack.gate.grad)
        assert at_zero and not pack.embed.weight.grad.any()
        pack.zero_grad()
        pack.gate.data.fill_(0.1)
        velocity_loss(network, pack, training_options()).backward()
    assert abs(at_zero) > 10 * abs(float(pack.gate.grad)) > 0
    # Behind the last layers of the fresh branches, which are zero, nothing moves before those have moved.
    for name in ("embed.weight", "memorize.0.attention.out.weight", "memorize.1.mlp.2.weight", "squeeze.mlp.2.weight"):
        assert pack.get_parameter(name).grad.any(), name


def test_the_gate_s_gradient_is_the_loss_s_slope(network):
    pack = pack_for(network)
    pack.gate.data.fill_(0.01)
    pack.gate.requires_grad_(True)
    network.requires_grad_(False)
    with differentiable(network):
        velocity_loss(network, pack, training_options()).backward()
    with torch.no_grad():
        step = 2e-3
        pack.gate.data.fill_(0.01 + step)
        above = velocity_loss(network, pack).item()
        pack.gate.data.fill_(0.01 - step)
        below = velocity_loss(network, pack).item()
    assert float(pack.gate.grad) == pytest.approx((above - below) / (2 * step), rel=0.1, abs=1e-3)
