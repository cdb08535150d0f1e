"""Nothing but the host reads a weight: what it streams from RAM, pins, patches or unpacks reaches every network here.

The weights of every layer are put where no operation reaches them, and the function that core calls on a weight when
it casts one brings them back. So a pass ends, with the same numbers, only if each of them goes through core's cast.
"""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from torch import Tensor, nn

from benchmarks import parity_models as pm
from frame_memory.model import helios, wan
from frame_memory.model.cross_attention import CROSS, CrossAttention, spec_of
from frame_memory.model.packing import ContextLayout
from frame_memory.model.preservation import PreservationSpec
from frame_memory.model.preserved_history import PreservedHistory
from frame_memory.model.semantic_pack import PackSpec, SemanticPack

from . import checkpoint_files as cf
from . import preserved
from . import wan_reference as reference

# Numbers that are in no layer: SemanticPack's gate, and the modulation of core's own Wan.
BARE = {"gate", "modulation"}
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default)
LAYOUT = ContextLayout((9, 10), ((4, (1, 2, 3, 4, 5)), (2, (6, 7, 8)), (1, (0, 8))))


class Elsewhere(Tensor):
    """A weight that may be moved, and otherwise not be read."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor):
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device=numbers.device)
        made.numbers = numbers
        return made

    def __init__(self, *args):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in MOVES:
            raise RuntimeError(f"{func} reads a weight that is elsewhere")
        return cls(func(args[0].numbers, *args[1:], **(kwargs or {})))


def put_elsewhere(network: nn.Module) -> int:
    """Put the weights of all layers elsewhere; returns how many."""
    count = 0
    for module in network.modules():
        held = [name for name, value in module.named_parameters(recurse=False)]
        if not isinstance(module, comfy.ops.CastWeightBiasOp):
            assert set(held) <= BARE, f"{type(module).__name__} has numbers of its own: {held}"
            continue
        for name in held:
            module._parameters[name] = Elsewhere(module._parameters[name].detach())  # pyright: ignore[reportArgumentType]
            setattr(module, f"{name}_function", [lambda weight: weight.numbers])
            count += 1
    return count


def filled(network: nn.Module) -> nn.Module:
    pm.randomise(network.eval(), 5)
    return network.requires_grad_(False)


def framepack(_):
    """With everything that it can be given."""
    network = pm.make_ours(cf.tiny_reference())
    cross = filled(CrossAttention(spec_of(network, 8), operations=comfy.ops.manual_cast))
    given = pm.make_inputs(9, 11, (9, 10), LAYOUT.groups, batch=2, text_lengths=(7, 4), image_tokens=5,
                           text_features=64)  # fmt: skip
    shown = {
        "memory_tokens": preserved.drawn(2, 3, network.hidden_size),
        "frame_memory_tokens": preserved.drawn(2, 2, network.hidden_size),
        "frame_memory_positions": torch.tensor([[0, 1, 2], [3, 0, 0]]),
        "frame_memory_features": preserved.drawn(2, 4, 8),
        "transformer_options": {CROSS: cross},
    }
    return (network, cross), lambda: pm.run_ours(network, given, torch.float32, **shown)


def semantic_pack(_):
    spec = PackSpec(hidden=32, heads=2, axes_dim=(4, 6, 6), theta=256, in_channels=4, text=10, vision=12)
    pack = filled(SemanticPack(spec, operations=comfy.ops.manual_cast))

    def run():
        psi = pack.anchor(preserved.drawn(1, 3, 10), preserved.drawn(2, 5, 12))
        return pack.tokens(pack.update(psi, preserved.drawn(2, 4, 5, 9, 11), first=True))

    return (pack,), run


def preservation(_):
    specs = tuple(PreservationSpec(rate=rate, **preserved.TINY) for rate in ("4x4x2", "2x2x1"))
    large = PreservationSpec(rate="2x2x2", branches="patchifier", **preserved.TINY)
    history = filled(PreservedHistory((*specs, large), operations=comfy.ops.manual_cast))
    return (history,), lambda: history(preserved.drawn(2, 3, 6, 9, 11), (4, 6)).tokens


def wan_context(_):
    network = reference.load("2.1 I2V", layers=2).model.diffusion_model
    patchifiers = filled(wan.Patchifiers(16, network.dim))
    cross = filled(CrossAttention(spec_of(network, 8), operations=comfy.ops.manual_cast))
    options = {**wan.options(patchifiers), CROSS: cross}
    past = {
        wan.CONTEXT: [preserved.drawn(2, 16, len(places), 5, 6) for _, places in LAYOUT.groups], wan.LAYOUT: LAYOUT,
        wan.TOKENS: preserved.drawn(2, 2, network.dim), wan.POSITIONS: torch.tensor([[0, 1, 2], [3, 0, 0]]),
        "frame_memory_features": preserved.drawn(2, 4, 8),
    }  # fmt: skip
    window, text = preserved.drawn(2, 36, 2, 5, 6), preserved.drawn(2, 5, 24)
    times, seen = torch.tensor([731.3, 42.0]), preserved.drawn(2, 257, 1280)
    return (network, patchifiers, cross), lambda: network(
        window, times, text, clip_fea=seen, transformer_options=options, **past
    )


def helios_model(folder):
    from diffusers import HeliosTransformer3DModel

    made = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 192, "text_dim": 24}
    theirs = HeliosTransformer3DModel(**made)
    pm.randomise(theirs, 0)
    theirs.save_pretrained(folder)
    patcher = helios.load_helios(str(folder), {"dtype": torch.float32})
    network, beside = patcher.model.diffusion_model, patcher.get_additional_models_with_key(wan.KEY)[0].model
    past = {wan.CONTEXT: [preserved.drawn(2, 16, len(p), 5, 6) for _, p in LAYOUT.groups], wan.LAYOUT: LAYOUT}
    window, text = preserved.drawn(2, 16, 2, 5, 6), preserved.drawn(2, 5, 24)
    return (network, beside), lambda: network(
        window, torch.tensor([731.3, 42.0]), text, transformer_options=wan.options(beside), **past
    )


@pytest.mark.parametrize("made", [framepack, semantic_pack, preservation, wan_context, helios_model])
@torch.no_grad()
def test_every_weight_goes_through_the_hosts_cast(made, tmp_path):
    networks, run = made(tmp_path)
    expected = run()
    for network in networks:
        assert put_elsewhere(network) > 5
    assert torch.equal(run(), expected)
    layer = next(module for network in networks for module in network.modules() if type(module).__name__ == "Linear")
    with pytest.raises(RuntimeError, match="reads a weight that is elsewhere"):
        layer.weight.sum()
    layer.weight_function = []
    with pytest.raises(RuntimeError, match="reads a weight that is elsewhere"):
        run()
