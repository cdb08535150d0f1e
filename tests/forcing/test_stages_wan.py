"""What learns on core's Wan: gradients against plain sums in float64 and differences, however the host holds the base.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, D width.
"""

from __future__ import annotations

import sys
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from frame_memory.forcing.gradients import plain_attention
from frame_memory.forcing.stages import ALL, HEAD_PART, LORA, MEMORY, Trained, _as_it_is
from frame_memory.model import wan
from frame_memory.model.framepack import FRAME_FEATURES
from frame_memory.model.packing import ContextLayout
from frame_memory.model.preserved_memory import new_memory

from .test_stages import Budgeted, same

CONTEXT = ContextLayout((6, 7), ((2, (3, 4)), (1, (0, 5))))
PLACES = ((0, 1, 1), (3, 0, 2))
PATCHIFIERS = "patchifiers"


def given(family: str, batch: int = 1, size=(2, 3, 4)) -> dict:
    """A call with history and memory tokens, as the sampler's."""
    channels, out, vision = reference.FAMILIES[family]
    groups = [reference.drawn(batch, out, len(t), *size[1:], seed=10 + i) for i, (_, t) in enumerate(CONTEXT.groups)]
    return {
        "x": reference.drawn(batch, channels, *size, seed=2),
        "timestep": torch.tensor([700.0, 350.0])[:batch],
        "context": reference.drawn(batch, 3, 24, seed=3),
        "clip_fea": reference.drawn(batch, 3, 1280, seed=4) if vision else None,
        wan.CONTEXT: groups,
        wan.LAYOUT: CONTEXT,
        wan.TOKENS: reference.drawn(batch, len(PLACES), 128, seed=9),
        wan.POSITIONS: torch.tensor(PLACES),
    }


def patchifiers_of(patcher):
    made = wan.patchifiers_of(patcher)
    with torch.no_grad():
        for index, value in enumerate(made.parameters()):
            value += 0.1 * reference.drawn(*value.shape, seed=index) / value[0].numel() ** 0.5
    return made


def trained_of(patcher, parts, patchifiers=None, **options) -> Trained:
    patchifiers = patchifiers or patchifiers_of(patcher)
    network = patcher.model.diffusion_model.requires_grad_(False)
    around = wan.options(patchifiers)
    return Trained(network, None, parts, rank=2, options=around, beside={PATCHIFIERS: patchifiers}, **options)


def loss_of(trained: Trained, inputs: dict) -> torch.Tensor:
    made = trained(**inputs, transformer_options=trained.forced.options).float()
    return (made * reference.drawn(*made.shape, seed=7)).mean()


def gradients(trained: Trained, inputs: dict) -> dict[str, torch.Tensor]:
    """By name; only those that are not all zero."""
    with trained.ready():
        loss_of(trained, inputs).backward()
    return {n: p.grad for n, p in trained.parameters.items() if p.grad is not None and bool(p.grad.any())}


def opened(trained: Trained) -> Trained:
    """LoRAs that do something, so that all of their numbers have gradients."""
    with torch.no_grad():
        for index, pair in enumerate(trained.pairs.values()):
            pair.up.copy_(0.05 * reference.drawn(*pair.up.shape, seed=index))
    return trained


def test_gradients_of_every_weight_equal_those_of_plain_sums():
    family = "2.1 T2V"
    patcher = reference.load(family)
    patchifiers, inputs = patchifiers_of(patcher), given(family)
    found = gradients(trained_of(patcher, (ALL,), patchifiers), inputs)

    sd = {n: p.detach().double().requires_grad_(True) for n, p in reference.checkpoint(family).items()}
    own = {n: p.detach().double().requires_grad_(True) for n, p in patchifiers.named_parameters()}
    names = {2: "proj_2x", 1: "proj"}
    groups = [
        (rate, times, own[f"{names[rate]}.weight"], own[f"{names[rate]}.bias"], latent[0])
        for (rate, times), latent in zip(CONTEXT.groups, inputs[wan.CONTEXT], strict=True)
    ]
    memory = (inputs[wan.TOKENS][0], PLACES)
    made = reference.forward(
        sd, inputs["x"][0], [700.0, 700.0], inputs["context"][0], None, groups, memory, CONTEXT.positions
    )
    (made * reference.drawn(1, *made.shape, seed=7)[0]).mean().backward()
    expected = {f"model.{n}": p.grad for n, p in sd.items()} | {f"{PATCHIFIERS}.{n}": p.grad for n, p in own.items()}
    expected = {n: g.float() for n, g in expected.items() if g is not None and bool(g.any())}
    assert found.keys() == expected.keys() and len(found) > 60
    for name in found:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 2e-4, (name, float(error))


def test_gradients_of_loras_equal_finite_differences():
    """The image's attention and a timestep a frame are in no other test."""
    for family in ("2.1 I2V", "2.2 TI2V 5B"):
        inputs = given(family)
        if family == "2.2 TI2V 5B":
            inputs["timestep"] = torch.tensor([[0.0, 700.0]])
        trained = opened(trained_of(reference.load(family), (LORA,)))
        found = gradients(trained, inputs)
        layer = "cross_attn.k_img" if family == "2.1 I2V" else "ffn.2"
        for name in ("lora.blocks.0.self_attn.q.down", "lora.blocks.1.self_attn.k.up", f"lora.blocks.0.{layer}.up"):
            direction, step, values = found[name] / found[name].norm(), 2e-2, []
            for sign in (1, -1):
                with torch.no_grad(), trained.ready(), torch.no_grad():
                    trained.parameters[name].add_(sign * step * direction)
                    values.append(float(loss_of(trained, inputs)))
                    trained.parameters[name].sub_(sign * step * direction)
            numeric = (values[0] - values[1]) / (2 * step)
            assert numeric == pytest.approx(float(found[name].norm()), rel=2e-2), (family, name)


def test_a_lora_beside_a_layer_is_the_lora_in_its_weight_and_every_linear_of_the_blocks_has_one():
    family, name = "2.2 A14B I2V", "blocks.1.self_attn.v"
    patcher = reference.load(family)
    trained = opened(trained_of(patcher, (LORA,)))
    found = gradients(trained, given(family, batch=2))
    network = patcher.model.diffusion_model
    linears = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")}
    assert {n.removeprefix("lora.").rsplit(".", 1)[0] for n in found if n.startswith("lora.")} == linears
    assert set(trained.pairs) == linears

    pairs = {n: (pair.up.detach(), pair.down.detach()) for n, pair in trained.pairs.items()}
    whole = reference.load(family)
    with torch.no_grad():
        for layer, (up, down) in pairs.items():
            whole.model.diffusion_model.get_parameter(f"{layer}.weight").add_(up @ down)
    weight = gradients(trained_of(whole, (ALL,)), given(family, batch=2))[f"model.{name}.weight"]
    up, down = pairs[name]
    assert torch.allclose(found[f"lora.{name}.up"], weight @ down.T, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found[f"lora.{name}.down"], up.T @ weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("parts", [(), (LORA,), (ALL,)], ids=["patchifiers", "LoRA", "all"])
def test_gradient_checkpointing_changes_no_gradient(parts):
    """By the time of the backward pass core's loop over the blocks has gone on to its last one."""
    inputs, found = given("2.1 T2V", batch=2), []
    for on in (False, True):
        found.append(gradients(opened(trained_of(reference.load("2.1 T2V"), parts, checkpointing=on)), inputs))
    assert len(found[0]) >= 4
    same(*found, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_no_gradient_of_a_memory_with_cross_attention():
    """Then core's block, which its loop names by a variable, is called from within another function."""
    inputs, found = given("2.1 T2V", batch=2) | {FRAME_FEATURES: reference.drawn(2, 5, 8, seed=11)}, []
    for on in (False, True):
        patcher = reference.load("2.1 T2V")
        pack = new_memory(patcher, "2x2x2", channels=(4, 6, 8, 8), heads=2, cross_attention=True).history
        with torch.no_grad():
            for index, (_, value) in enumerate(sorted(pack.cross_attention.named_parameters())):
                value += 0.1 * reference.drawn(*value.shape, seed=index)
        network, around = patcher.model.diffusion_model.requires_grad_(False), wan.options(patchifiers_of(patcher))
        trained = Trained(network, pack, (LORA, MEMORY), rank=2, options=around, checkpointing=on)
        found.append(gradients(opened(trained), inputs))
    assert {n for n in found[0] if n.endswith("value.weight")} == {
        f"pack.cross_attention.blocks.{i}.value.weight" for i in (0, 1)
    }  # fmt: skip
    same(*({n: g for n, g in made.items() if not n.endswith("key.bias")} for made in found), rtol=1e-4, atol=1e-7)


def test_what_is_run_again_is_kept_with_its_variables_its_defaults_and_its_own_name():
    kept = []
    for block in (2, 3):

        def scaled(x):
            return x * block  # noqa: B023 (as core's loop)

        def often(x, *, times=2):
            return often(scaled(x), times=times - 1) if times else x

        kept.append(_as_it_is(often))
    assert [run(1) for run in kept] == [4, 9]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_hosts_inference_mode_is_switched_off_locally(checkpointing):
    inputs = given("2.1 T2V")
    expected = gradients(opened(trained_of(reference.load("2.1 T2V"), (LORA,))), inputs)
    with torch.inference_mode():
        patcher = reference.load("2.1 T2V")
        assert next(patcher.model.diffusion_model.parameters()).is_inference()
        with torch.inference_mode(False):
            patchifiers = patchifiers_of(reference.load("2.1 T2V"))
        found = gradients(opened(trained_of(patcher, (LORA,), patchifiers, checkpointing=checkpointing)), inputs)
        assert torch.is_inference_mode_enabled()
    same(found, expected, rtol=1e-5, atol=1e-8)


def test_offloaded_weights_give_the_same_gradients():
    """A patch lies on one weight, so that the offloaded layers have work to do on the fly."""
    key, cpu = "diffusion_model.blocks.0.ffn.0.weight", torch.device("cpu")
    found, offloaded = [], []
    for kind in (comfy.model_patcher.ModelPatcher, Budgeted):
        patcher = kind(reference.load("2.1 T2V").model, cpu, cpu)
        patcher.add_patches({key: ("diff", (torch.full((256, 128), 0.01),))}, 0.7)
        patchifiers = patchifiers_of(patcher)
        patcher.patch_model(cpu)
        offloaded.append(any(m.weight_function for m in patcher.model.modules() if hasattr(m, "weight_function")))
        found.append(gradients(opened(trained_of(patcher, (LORA,), patchifiers)), given("2.1 T2V")))
    assert offloaded == [False, True]
    same(*found, rtol=1e-5, atol=1e-8)


def test_bf16_weights_learn_in_fp32_and_the_base_is_never_written_to():
    patcher = reference.load("2.1 T2V", torch.bfloat16)
    network = patcher.model.diffusion_model
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    trained = trained_of(patcher, (ALL, LORA), dtype=torch.bfloat16)
    found = gradients(trained, given("2.1 T2V"))
    exact = gradients(trained_of(reference.load("2.1 T2V"), (ALL, LORA)), given("2.1 T2V"))
    name = "model.blocks.0.ffn.0.weight"
    assert torch.cosine_similarity(found[name].flatten(), exact[name].flatten(), 0) > 0.99
    assert all(p.dtype == torch.float32 for p in trained.parameters.values())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in network.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules()), "hooks stay behind"


def test_the_training_forward_is_the_hosts_bit_for_bit():
    """The rotation stays core's, and its result is taken as it is."""
    patcher, inputs = reference.load("2.1 I2V"), given("2.1 I2V", batch=2, size=(2, 5, 6))
    patchifiers = patchifiers_of(patcher)
    trained = trained_of(patcher, (LORA,), patchifiers)
    with trained.ready():
        ours = trained(**inputs, transformer_options=trained.forced.options)
    options = {**wan.options(patchifiers), "optimized_attention_override": plain_attention}
    with torch.no_grad():
        hosts = patcher.model.diffusion_model(**inputs, transformer_options=options)
    assert torch.equal(ours, hosts) and ours.requires_grad


def test_the_lora_file_is_read_by_core_onto_its_layers():
    patcher, inputs = reference.load("2.1 T2V"), given("2.1 T2V")
    patchifiers = patchifiers_of(patcher)
    trained = opened(trained_of(patcher, (LORA,), patchifiers))
    with trained.ready():
        expected = trained(**inputs, transformer_options=trained.forced.options)
    file = trained.lora({n: p.detach() for n, p in trained.parameters.items()})
    with torch.inference_mode():
        loaded, _ = comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 0.0)
        loaded.patch_model(torch.device("cpu"))
        found = loaded.model.diffusion_model(**inputs, transformer_options=wan.options(patchifiers))
    assert len(loaded.patches) == len(trained.pairs)
    assert torch.allclose(found, expected, atol=2e-5)


def test_framepacks_head_is_refused():
    with pytest.raises(ValueError, match="'head' is FramePack's"):
        trained_of(reference.load("2.1 T2V"), (HEAD_PART,))
