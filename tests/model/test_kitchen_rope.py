"""Both families turn queries and keys by comfy-kitchen's op, as core's blocks call it, and it takes phases that are
means of rotations: any 2x2 matrix, by every backend that this machine can run."""

from __future__ import annotations

from collections import Counter

import comfy.quant_ops
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import parity_models as pm
from frame_memory.model import wan
from frame_memory.model.packing import ContextLayout, packed_rope

from . import wan_reference as reference

GROUPS = ((4, (0, 1, 2, 3, 4)), (2, (16, 17)), (1, (18,)))
LAYOUT = ContextLayout((19, 20), GROUPS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kitchen = comfy.quant_ops.ck


class Calls(TorchDispatchMode):
    """How often each of kitchen's ops is called."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "comfy_kitchen":
            self.count.update([func.overloadpacket.__name__])
        return func(*args, **(kwargs or {}))


def test_every_block_of_either_family_calls_it():
    network = pm.make_ours(pm.make_reference(heads=1, double=2, single=3, text_features=64).state_dict())
    inputs = pm.make_inputs(9, 11, LAYOUT.positions, GROUPS, text_lengths=(7,), image_tokens=5, text_features=64)
    with Calls() as calls:
        pm.run_ours(network, inputs, torch.float32)
    assert calls.count == {"apply_rope": 5}

    patcher = reference.load("2.1 T2V", layers=2)
    past = [reference.drawn(1, 16, len(times), 9, 11) for _, times in GROUPS]
    given = (reference.drawn(1, 16, 2, 9, 11), torch.tensor([700.0]), reference.drawn(1, 4, 24))
    options = wan.options(wan.patchifiers_of(patcher))
    with torch.no_grad(), Calls() as calls:
        patcher.model.diffusion_model(*given, transformer_options=options, **{wan.CONTEXT: past, wan.LAYOUT: LAYOUT})
    assert calls.count == {"apply_rope1": 2 * 2}


def tables(network) -> dict[str, torch.Tensor]:
    """`[1, 1, N, F, 2, 2]`: a packed section's, whose pooled phases are shorter than rotations, and drawn numbers."""
    packed = packed_rope(network.rope_embedder, LAYOUT, (5, 2, 1), 5, 7, "cpu")
    return {"packed": packed, "drawn": reference.drawn(*packed.shape)}


def turned(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, 2F]` turned pair by pair, as plain sums in float64."""
    out, matrices = torch.empty_like(x, dtype=torch.float64), table[0, 0].double()
    for pair in range(table.shape[3]):
        first, second = x[..., 2 * pair].double(), x[..., 2 * pair + 1].double()
        for row in range(2):
            m = matrices[:, pair, row]
            out[..., 2 * pair + row] = m[:, 0] * first + m[:, 1] * second
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_any_matrix_turns_a_pair(backend, dtype):
    """Batch 2, three heads; the memory laid out as FramePack's blocks have it, and as Wan's."""
    made = tables(reference.load("2.1 T2V", layers=1).model.diffusion_model)
    lengths = made["packed"].det().abs().flatten()
    assert lengths.min() < 0.5 and lengths.max() > 0.99, "some phases must be no rotations"
    for table in made.values():
        x = reference.drawn(2, table.shape[2], 3, 3, 128).to(DEVICE, dtype)
        query, key, _ = x.permute(2, 0, 3, 1, 4)
        asked = {"xq": query, "xk": key, "freqs_cis": table.to(DEVICE)}
        missing = kitchen.registry.validate_backend_for_call(backend, "apply_rope", asked)
        if not missing.success:
            pytest.skip(f"{backend}: {missing.failure_reason}")
        with kitchen.use_backend(backend):
            both = kitchen.apply_rope(*asked.values())
            alone = kitchen.apply_rope1(key.transpose(1, 2), table.to(DEVICE).transpose(1, 2)).transpose(1, 2)
        for got, given in zip((*both, alone), (query, key, key), strict=True):
            wanted = turned(given.cpu(), table)
            bound = 1e-6 if dtype == torch.float32 else 2**-8
            assert (got.cpu().double() - wanted).abs().max() <= bound * wanted.abs().max()
