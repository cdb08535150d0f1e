"""What learns in which stage, and that gradients do not depend on how the host holds the base model."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch

from frame_memory.forcing.draws import DIRECT, TEACHER, Recipe, draw_video
from frame_memory.forcing.forcings import LOSSES
from frame_memory.forcing.gradients import differentiable, training_options
from frame_memory.forcing.stages import ALL, HEAD, HEAD_PART, LORA, MEMORY, Trained, merged

from . import small


def gradients(trained: Trained, forcing: str = TEACHER, clips: int = 3, after=None) -> dict[str, torch.Tensor]:
    """Of the mean loss over the clips, by name; only those that are not all zero."""
    video, recipe = small.video(clips), Recipe(forcing=forcing, drop_memory=0.0)
    with trained.ready():
        video = video.to("cpu")
        draw = draw_video(video, clips, recipe, torch.Generator().manual_seed(2))
        for clip in LOSSES[forcing](trained.forced, video, draw, recipe):
            if clip.loss.requires_grad:
                (clip.loss / clips).backward()
            if after is not None:
                after(clip)
    found = {n: p.grad for n, p in trained.parameters.items() if p.grad is not None and bool(p.grad.any())}
    for parameter in trained.parameters.values():
        parameter.grad = None
    return found


def both(seed: int = 0, operations=comfy.ops.disable_weight_init, depth: int = 1):
    model = small.network(seed, operations, depth)
    return model, small.memory(model)


def same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], **tolerance), name


def test_stage_two_trains_the_four_head_tensors_and_nothing_else():
    model, pack = both()
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = Trained(model, pack, (HEAD_PART,))
    kept = []
    found = gradients(trained, DIRECT, after=lambda clip: kept.append(clip.estimate.requires_grad))
    assert set(found) == {"model." + name for name in HEAD} and len(HEAD) == 4
    assert not any(p.requires_grad or p.grad is not None for p in (*model.parameters(), *pack.parameters()))
    assert kept == [False] * 3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the base is never written to"


def test_stage_two_builds_a_graph_of_the_head_only():
    """What autograd keeps for the backward pass is what the head needs of the window's tokens: no trunk."""
    model, pack = both()
    trained, kept = Trained(model, pack, (HEAD_PART,)), []
    video, recipe = small.video(2), Recipe()
    draw = draw_video(video, 2, recipe, torch.Generator().manual_seed(2))

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with trained.ready(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        next(iter(LOSSES[DIRECT](trained.forced, video, draw, recipe))).loss.backward()
    packed = 9 * 6 + 2 * 6 + 2 + 4  # tokens of the window and the history; 9 more of text and image
    assert kept and not [shape for shape in kept if packed in shape or packed + 9 in shape], kept


def test_stage_one_trains_every_weight_of_the_memory_and_none_of_the_base():
    model, pack = both()
    found = gradients(Trained(model, pack, (MEMORY,)))
    missing = {"pack." + n for n, _ in pack.named_parameters()} - set(found)
    # A key's bias moves all logits alike, which a softmax does not see.
    assert all(n.startswith("pack.") for n in found) and all(n.endswith("key.bias") for n in missing), missing
    assert not any(p.requires_grad for p in model.parameters())


def test_stage_one_with_a_lora_trains_both_and_begins_as_the_base():
    model, pack = both()
    plain, trained = Trained(model, pack, (MEMORY,)), Trained(model, pack, (MEMORY, LORA), rank=2)
    same(gradients(plain), {n: g for n, g in gradients(trained).items() if n.startswith("pack.")}, atol=1e-6)
    with torch.no_grad():
        for pair in trained.pairs.values():
            pair.up.normal_(std=0.1)
    found = gradients(trained)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n}
    linears = {n for n in linears if n.startswith(("double", "single"))}
    assert {n.removeprefix("lora.").rsplit(".", 1)[0] for n in found if n.startswith("lora.")} == linears
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks stay behind"


def test_a_lora_beside_a_layer_is_the_lora_in_its_weight():
    """Gradients equal those of the weight's own, carried to the two factors by the chain rule."""
    model, pack = both()
    trained, name = Trained(model, pack, (MEMORY, LORA), rank=2), "double_blocks.0.img_mlp.0"
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        pair = trained.pairs[name]
        pair.up.copy_(torch.randn(pair.up.shape, generator=generator) * 0.1)
    found = gradients(trained)
    changed, _ = both()
    with torch.no_grad():
        changed.get_parameter(name + ".weight").add_(pair.up @ pair.down)
    whole = gradients(Trained(changed, pack, (MEMORY, ALL)))["model." + name + ".weight"]
    assert torch.allclose(found[f"lora.{name}.up"], whole @ pair.down.T, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found[f"lora.{name}.down"], pair.up.T @ whole, rtol=1e-3, atol=1e-6)


def test_training_everything_equals_plain_autograd():
    model, pack = both()
    found = gradients(Trained(model, pack, (MEMORY, ALL)))
    copy, learning = both()
    copy.requires_grad_(True)
    learning.requires_grad_(True)
    video, recipe = small.video(3), Recipe(forcing=TEACHER, drop_memory=0.0)
    draw = draw_video(video, 3, recipe, torch.Generator().manual_seed(2))
    from frame_memory.forcing.forcings import Forced

    with differentiable(copy):
        for clip in LOSSES[TEACHER](Forced(copy, learning, True, training_options()), video, draw, recipe):
            (clip.loss / 3).backward()
    expected = {"model." + n: p.grad for n, p in copy.named_parameters() if p.grad is not None and bool(p.grad.any())}
    expected |= {"pack." + n: p.grad for n, p in learning.named_parameters() if bool(p.grad.any())}
    same(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("parts", [(MEMORY,), (MEMORY, LORA), (MEMORY, ALL)], ids=["memory", "LoRA", "all"])
def test_gradient_checkpointing_changes_no_gradient(parts):
    """Of several blocks, each of which must be run again as itself."""
    found = [gradients(Trained(*both(depth=3), parts, checkpointing=on, rank=2)) for on in (False, True)]
    same(*found, rtol=1e-4, atol=1e-7)


class Budgeted(comfy.model_patcher.ModelPatcher):
    """Core's patcher, given no room for weights when it loads."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, 1.0, force_patch_weights, full_load=False)


@pytest.mark.parametrize("parts", [(HEAD_PART,), (MEMORY,), (MEMORY, LORA)], ids=["head", "memory", "LoRA"])
def test_fault_t7_offloaded_weights_give_the_same_gradients(parts):
    """A patch lies on one weight, so that the offloaded layers have work to do on the fly."""
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    found, lowvram = [], []
    for kind in (comfy.model_patcher.ModelPatcher, Budgeted):
        model, pack = both(operations=comfy.ops.manual_cast)
        holder = torch.nn.Module()
        holder.diffusion_model, holder.current_weight_patches_uuid = model, None
        holder.device = torch.device("cpu")
        patcher = kind(holder, torch.device("cpu"), torch.device("cpu"))
        patcher.add_patches({key: ("diff", (torch.full((64, 32), 0.01),))}, 0.7)
        patcher.patch_model(torch.device("cpu"))
        lowvram.append(any(m.weight_function for m in model.modules() if hasattr(m, "weight_function")))
        found.append(gradients(Trained(model, pack, parts, rank=2), DIRECT if parts == (HEAD_PART,) else TEACHER))
    assert lowvram == [False, True]
    same(*found, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("parts", [(HEAD_PART,), (MEMORY,), (MEMORY, LORA)], ids=["head", "memory", "LoRA"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_fault_t8_the_hosts_inference_mode_is_switched_off_locally(parts, checkpointing):
    """Core runs every node in it, and weights and latents made in it are tensors that autograd refuses."""
    forcing = DIRECT if parts == (HEAD_PART,) else TEACHER
    expected = gradients(Trained(*both(), parts, rank=2), forcing)
    with torch.inference_mode():
        model, pack = both()
        assert next(model.parameters()).is_inference()
        with torch.inference_mode(False):
            pack = small.memory(small.network())
        trained = Trained(model, pack, parts, rank=2, checkpointing=checkpointing)
        found = gradients(trained, forcing)
        assert torch.is_inference_mode_enabled()
    same(found, expected, rtol=1e-5, atol=1e-8)


def test_options_are_joined_and_neither_is_changed():
    a, b = {"patches": {"x": [1]}, "kept": 3}, {"patches": {"x": [2], "y": [4]}, "new": 5}
    assert merged(a, b) == {"patches": {"x": [1, 2], "y": [4]}, "kept": 3, "new": 5}
    assert a == {"patches": {"x": [1]}, "kept": 3} and b["patches"]["x"] == [2]
