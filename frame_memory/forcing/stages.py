"""What is trained: the weights that learn, kept apart from the base model, and the network as it runs with them.

The base model stays the host's, moved and cast as the host likes, and is never written to. What learns are fp32 copies
of our own, which take the place of the base's weights for the length of a forward pass; LoRAs join in beside frozen
layers; a SemanticPack is a network of ours anyway.

Stage 1 of the paper trains the memory (and the base) behind the truth; stage 2 trains nothing but the last modulation
and the output layer, so no other layer builds a graph and the memory needed is that of inference and a head.
Source: reference/memorypack.md section 3.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from comfy.ldm.wan.model import WanModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..model.memory_file import HEAD
from ..model.preserved_history import PreservedHistory
from .forcings import Forced
from .frozen import LoraPair, frozen_linears, is_linear
from .gradients import differentiable, plain_attention, training_options

MEMORY, LORA, HEAD_PART, ALL = "memory", "LoRA", "head", "all"
PARTS = (MEMORY, LORA, HEAD_PART, ALL)
MODEL_NAME, PACK_NAME, LORA_NAME = "model.", "pack.", "lora."
# Wan's, among the networks beside.
PATCHIFIERS = "patchifiers"
# Core's names of the kinds of block, and where a network keeps them.
HUNYUAN_BLOCKS = {"double_block": "double_blocks", "single_block": "single_blocks"}
WAN_BLOCKS = {"double_block": "blocks"}


class Trained:
    """A FramePackTransformer and its memory, or core's WanModel, with the weights that learn.

    pack: a SemanticPack or PreservedHistory, or None. parts: which of PARTS learn. `parameters` holds these by name:
    `pack.*`, `model.*` (fp32 copies of the base's weights), `lora.<layer>.down` and `.up`. Call it as the transformer;
    inputs are cast to `dtype`, and the result is in it. originals: base weights by name that the host has patched over,
    in their unpatched state. beside: other networks of ours, in fp32, by the word that their parameters' names begin
    with; all of them learns. They are called by what `options` put around the transformer, such as
    `model.wan.options`. Raises ValueError for a part that this network has not.
    """

    def __init__(
        self, model: nn.Module, pack: nn.Module | None, parts: tuple[str, ...], *, dtype=torch.float32, device=None,
        rank: int = 16, seed: int = 0, checkpointing: bool = False, options: Mapping | None = None,
        originals: Mapping[str, Tensor] | None = None, beside: Mapping[str, nn.Module] | None = None,
    ):  # fmt: skip
        self.wan = isinstance(model, WanModel)
        self.blocks = WAN_BLOCKS if self.wan else HUNYUAN_BLOCKS
        if self.wan and HEAD_PART in parts:
            raise ValueError(f"The part '{HEAD_PART}' is FramePack's; of Wan these can learn: '{LORA}' and '{ALL}'.")
        self.model, self.pack, self.parts, self.dtype = model, pack, parts, dtype
        self.device = device or next(model.parameters()).device
        self.checkpointing = checkpointing
        self.base_options = dict(options or {})
        with torch.inference_mode(False):
            self.pairs = self._make_pairs(rank, seed) if LORA in parts else {}
            names = [n for n, _ in model.named_parameters()] if ALL in parts else HEAD if HEAD_PART in parts else ()
            self.masters = {name: self._copy(name, originals or {}) for name in names}
            self.vectors = self._plain_vectors()
        self.current: dict[str, Tensor] = {}  # what takes the place of the base's weights while the network runs
        self.parameters: dict[str, nn.Parameter] = {MODEL_NAME + n: p for n, p in self.masters.items()}
        for layer, pair in self.pairs.items():
            self.parameters |= {f"{LORA_NAME}{layer}.{n}": p for n, p in pair.named_parameters()}
        if pack is not None:
            pack.requires_grad_(MEMORY in parts)
            self.parameters |= {PACK_NAME + n: p for n, p in pack.named_parameters() if p.requires_grad}
        for word, network in (beside or {}).items():
            network.requires_grad_(True)
            self.parameters |= {f"{word}.{n}": p for n, p in network.named_parameters()}

    @property
    def through_blocks(self) -> bool:
        """Whether gradients pass through the blocks of the transformer."""
        return self.parts != (HEAD_PART,)

    def _copy(self, name: str, originals: Mapping[str, Tensor]) -> nn.Parameter:
        value = originals.get(name, self.model.get_parameter(name)).detach()
        value = value.dequantize() if hasattr(value, "_qdata") else value
        return nn.Parameter(value.to(self.device, torch.float32).clone())

    def _make_pairs(self, rank: int, seed: int) -> dict[str, LoraPair]:
        generator = torch.Generator().manual_seed(seed)
        inside = tuple(f"{name}." for name in self.blocks.values())
        layers = {n: m for n, m in self.model.named_modules() if n.startswith(inside) and is_linear(m)}
        return {
            n: LoraPair(m.in_features, m.out_features, rank, generator, self.device)  # pyright: ignore
            for n, m in sorted(layers.items())
        }

    def _plain_vectors(self) -> dict[str, Tensor]:
        """Norm weights that the host loaded in its inference mode, which autograd would refuse to keep."""
        if not self.through_blocks:
            return {}
        linears = {n for n, m in self.model.named_modules() if is_linear(m)}
        return {
            n: p.detach().to(self.device).clone()
            for n, p in self.model.named_parameters()
            if p.is_inference() and p.ndim == 1 and n.rsplit(".", 1)[0] not in linears and n not in self.masters
        }

    def __call__(self, x: Tensor, timestep: Tensor, **inputs) -> Tensor:
        cast = {k: self._cast(v) if k != "guidance" else v for k, v in inputs.items()}
        self.current = self.vectors | {name: master.to(self._dtype(name)) for name, master in self.masters.items()}
        try:
            return functional_call(self.model, self.current, (self._cast(x), timestep), cast)
        finally:
            self.current = {}

    def _dtype(self, name: str) -> torch.dtype:
        # Core computes Wan's patches in fp32 whatever the rest is in.
        return torch.float32 if self.wan and name.startswith("patch_embedding.") else self.dtype

    def _cast(self, value):
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.is_floating_point() else value
        return [self._cast(v) for v in value] if isinstance(value, list) else value

    @property
    def forced(self) -> Forced:
        """The same for `forcings`."""
        options = self.base_options
        if self.through_blocks:
            turning = {} if self.wan else training_options()
            options = merged(options, {**turning, "optimized_attention_override": plain_attention})
        if self.checkpointing and self.through_blocks:
            options = merged(options, {"patches_replace": {"dit": self._checkpointed_blocks()}})
        if isinstance(self.pack, PreservedHistory):
            options = merged(options, self.pack.options)
        return Forced(self, self.pack, MEMORY in self.parts, options)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Gradients are right within this block, whatever mode the host is in; nothing stays behind on leaving it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            frozen = [p for p in self.model.parameters() if p.requires_grad]
            for p in frozen:
                p.requires_grad_(False)
                stack.callback(p.requires_grad_, True)
            if self.through_blocks:
                stack.enter_context(differentiable(self.model))
                stack.enter_context(frozen_linears(self.model, self.pairs))
            yield

    def hold_lora(self, held: bool) -> None:
        """Whether a LoRA that has not learned yet waits while the rest learns."""
        waits = held and not any(bool(pair.up.any()) for pair in self.pairs.values())
        for pair in self.pairs.values():
            pair.requires_grad_(not waits)

    def _checkpointed_blocks(self) -> dict:
        """Core's `patches_replace["dit"]` that runs each block again in the backward pass, and keeps nothing of it."""
        made: dict[tuple[str, int], Callable] = {}
        for kind, name in self.blocks.items():
            for i, block in enumerate(getattr(self.model, name)):
                made[(kind, i)] = partial(self._run_block, f"{name}.{i}.", block)
        return made

    def _run_block(self, prefix: str, block: nn.Module, args: dict, more: dict) -> dict:
        if not torch.is_grad_enabled():
            return more["original_block"](args)
        # Wan's blocks read the text and give back the picture alone.
        streams = [name for name in ("img", "txt") if name in args and not (self.wan and name == "txt")]
        # What holds now holds no more in the backward pass: the block index in the options, the block that core's loop
        # is at, and the weights put in.
        options = dict(args["transformer_options"])
        original = _as_it_is(more["original_block"])
        weights = {"block." + n.removeprefix(prefix): w for n, w in self.current.items() if n.startswith(prefix)}

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            # Core's blocks add in place, also to what they were given, which the second run needs as it was.
            changed = {name: tensor.clone() for name, tensor in zip(streams, tensors, strict=True)}
            call = _Call(block, partial(original, {**args, **changed, "transformer_options": options}))
            out = functional_call(call, weights, ())
            return tuple(out[name] for name in streams)

        made: Any = checkpoint(run, *(args[name] for name in streams), use_reentrant=False)
        return dict(zip(streams, made, strict=True))

    def head(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's tensors by core's names, of weights by the names of `parameters`; empty where it did not learn."""
        return {n: weights[MODEL_NAME + n] for n in HEAD if MODEL_NAME + n in weights}

    def lora(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA file's tensors by the names that core and other loaders read, with alpha = rank."""
        made: dict[str, Tensor] = {}
        for layer in self.pairs:
            down = weights[f"{LORA_NAME}{layer}.down"]
            made |= {
                f"diffusion_model.{layer}.lora_A.weight": down,
                f"diffusion_model.{layer}.lora_B.weight": weights[f"{LORA_NAME}{layer}.up"],
                f"diffusion_model.{layer}.alpha": torch.tensor(float(down.shape[0])),
            }
        return made

    def patchifiers(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of Wan's patchifiers by their own names; empty where they did not learn."""
        word = f"{PATCHIFIERS}."
        return {n.removeprefix(word): value for n, value in weights.items() if n.startswith(word)}

    def memory(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The memory's tensors, trained or as they were given; empty without one."""
        if self.pack is None:
            return {}
        given = {n: p.detach() for n, p in self.pack.named_parameters()}
        return given | {n: weights[PACK_NAME + n] for n in given if PACK_NAME + n in weights}


def _as_it_is(function: Any, made: dict[Any, Callable] | None = None) -> Callable:
    """The same function with the variables around it as they are now, and so functions among these; core's names its
    block by a loop's variable. made: copies so far, since functions may name themselves or each other."""
    made = {} if made is None else made
    held = function.__closure__ or ()
    cells = tuple(CellType() for _ in held)
    copied = made[function] = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    for cell, theirs in zip(cells, held, strict=True):
        value = theirs.cell_contents
        if isinstance(value, FunctionType):
            value = made.get(value) or _as_it_is(value, made)
        cell.cell_contents = value
    return copied


class _Call(nn.Module):
    """A block and how to call it, for `functional_call`."""

    def __init__(self, block: nn.Module, call: Callable[[], dict]):
        super().__init__()
        self.block, self.call = block, call

    def forward(self) -> dict:
        return self.call()


def merged(options: Mapping, more: Mapping) -> dict:
    """Two `transformer_options` as one; neither is changed. Lists are joined, single values come from `more`."""
    made = dict(options)
    for key, value in more.items():
        held = made.get(key)
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            made[key] = merged(held, value)
        else:
            made[key] = [*held, *value] if isinstance(held, list) and isinstance(value, list) else value
    return made
