"""FRAME_MEMORY's other kind: encoders of frame preservation in a ModelPatcher of their own, for FramePack-F1 or Wan.

Unlike a SemanticPack it has no gate and is told nothing of prompt or picture: its tokens stand in the visual sequence,
clean, at their places in time. A fresh one already shows something, since its low branch is the base's own embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..plan.cross_attention import CrossAttentionSpec
from ..plan.preservation import PRESERVATION, STAGE_FOLLOW, THIN, Budget
from . import cross_attention, wan
from .base_signature import Base
from .families import check_running_wan
from .framepack import is_framepack
from .memory import (
    FrameMemory,
    MemoryMismatch,
    attach,
    check_fits,
    check_model,
    dtype_of,
    encoder_of,
    fits_base,
    load_weights,
    patcher_of,
    place_of,
)
from .memory_file import FRAME_PRESERVATION, LOAD_MEMORY, MemoryFile
from .preservation import PreservationSpec
from .preserved_history import PreservedHistory, initialise_all
from .provenance import NamedLora, fingerprint_of, loras_of
from .specs import from_plain
from .stored_weights import original


@dataclass(frozen=True)
class PreservedMemory:
    """What the socket carries.

    encoder: ModelPatcher around a PreservedHistory. label: where it is from, for people. trained: False for fresh
    weights. base: what it was made or trained for, None where nobody says. tokens: how many a run keeps at most; None
    until 'Frame Preservation Encoder' says it. loras: that it was trained with. Of the clean frames that the MODEL saw
    beside it in stage 2 of its training, schedule: in text, patchifiers: the fingerprint (`wan.fingerprint`) of those
    that they were seen through; empty where nobody says.
    """

    kind: ClassVar[str] = FRAME_PRESERVATION
    encoder: Any
    specs: tuple[PreservationSpec, ...]
    label: str
    trained: bool
    base: Base | None = None
    tokens: int | None = None
    loras: tuple[NamedLora, ...] = ()
    schedule: str = ""
    patchifiers: str = ""

    @property
    def history(self) -> PreservedHistory:
        """The network."""
        return self.encoder.model

    @property
    def cross(self) -> CrossAttentionSpec | None:
        """What lets the MODEL read the encoders' features, None where they hand out none."""
        made = self.history.cross_attention
        return None if made is None else made.spec

    @property
    def rates(self) -> tuple[str, ...]:
        """The rates of the encoders, as text."""
        return tuple(spec.rate for spec in self.specs)

    @property
    def fingerprint(self) -> str:
        """A few hex digits that change with the weights, for people."""
        return fingerprint_of(self.history.state_dict())

    @property
    def budget(self) -> Budget:
        """What a run keeps. Past it the oldest go; of an encoder at 2x2x8 beside others the others' tokens go first."""
        first, *beside = sorted(self.rates, key=lambda rate: rate == THIN)
        past = "thin" if beside and THIN in self.rates else "drop"
        return Budget(self.tokens or 1, first, past, beside=tuple(beside))

    def to_spec(self) -> dict:
        """What the encoders are made of, as plain data for a file."""
        read = {} if self.cross is None else {"cross_attention": asdict(self.cross)}
        return {"encoders": [spec.to_dict() for spec in self.specs], **read}

    def describe(self) -> str:
        """A line for people."""
        size = sum(p.numel() for p in self.history.parameters())
        branches = {spec.branches for spec in self.specs} - {"both"}
        only = f", {' and '.join(sorted(branches))} only" if branches else ""
        read = ""
        if self.cross is not None:
            read = f", {self.cross.numbers / 1e6:.1f} M of them cross-attention in {len(self.cross.blocks)} blocks"
        state = "" if self.trained else ", UNTRAINED: it shows the history coarsely, as the base embeds it"
        return (
            f"{self.label}: frame preservation {' + '.join(self.rates)}{only}, width {self.specs[0].hidden}, "
            f"{size / 1e6:.1f} M numbers{read} ({self.fingerprint}){state}"
        )


def new_memory(model_patcher, *rates: str, seed: int = 0, **options) -> PreservedMemory:
    """Fresh encoders for a MODEL: the low branch as the MODEL's own patch embedding without LoRAs, all else untrained.

    rates: one or several. options: of PreservationSpec, as `branches` or `cross_attention`. Raises MemoryMismatch for
    another MODEL.
    """
    check_base_model(model_patcher, LOAD_MEMORY)
    weight, bias = _patch_embedding(model_patcher)
    hidden, channels, *patch = weight.shape
    made = {"hidden": hidden, "in_channels": channels, "patch": tuple(patch), **options}
    specs = tuple(PreservationSpec(rate=rate, **made) for rate in rates)
    place = place_of(model_patcher)
    history = initialise_all(_build(specs, place["dtype"], _cross_of(specs, model_patcher)), weight, bias, seed)
    encoder = patcher_of(history, place["load_device"])
    return PreservedMemory(encoder, specs, "new", False, Base.of(model_patcher))


def memory_from_tensors(
    tensors: Mapping[str, Tensor], specs: tuple[PreservationSpec, ...], *, label: str, trained: bool = True,
    base: Base | None = None, dtype: torch.dtype | None = None, load_device=None,
    cross: CrossAttentionSpec | None = None, recipe: Mapping | None = None,
) -> PreservedMemory:  # fmt: skip
    """A memory from PreservedHistory's state dict. dtype: None for that of the tensors that are not the base's. cross:
    as PreservedHistory's. recipe: how it was trained, plain data.

    Raises MemoryMismatch where names or shapes are not those of `specs`.
    """
    own = {name: value for name, value in tensors.items() if ".embed." not in name}
    history = _build(specs, dtype or dtype_of(own), cross)
    load_weights(history, tensors, label)
    made = PreservedMemory(patcher_of(history, load_device), specs, label, trained, base)
    return replace(made, loras=loras_of(recipe or {}), **_seen_beside(recipe or {}))


def memory_of(file: MemoryFile, node: str, model_patcher=None) -> FrameMemory | PreservedMemory:
    """The memory that a file holds, of either kind, in the numbers and for the device of a MODEL where there is one.

    node: display name of the node that the file was chosen in. Raises MemoryMismatch for a file without a memory, or
    with one that this version cannot read.
    """
    if not file.frames or file.spec is None:
        return encoder_of(file, node, model_patcher)
    try:
        specs = tuple(PreservationSpec.from_dict(spec) for spec in file.spec["encoders"])
        read = file.spec.get("cross_attention")
        cross = None if read is None else from_plain(CrossAttentionSpec, read)
        made = {"label": file.name, "base": file.base, "cross": cross, **place_of(model_patcher)}
        return memory_from_tensors(file.frames, specs, recipe=file.recipe, **made)
    except MemoryMismatch:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise MemoryMismatch(f"{file.name}: {error} Choose another file in '{node}'.") from error


def check_base_model(model_patcher, node: str) -> None:
    """Raise MemoryMismatch unless a MODEL is one that frame preservation is for: FramePack-F1 or Wan."""
    if is_framepack(model_patcher):
        return check_model(model_patcher, node)
    try:
        check_running_wan(model_patcher)
    except ValueError as error:
        raise MemoryMismatch(
            f"The MODEL of '{node}' takes no memory tokens. Expected FramePack-F1 or Wan. {error}"
        ) from error
    return None


def check_preserved(memory: PreservedMemory, model_patcher, node: str) -> str:
    """Raise MemoryMismatch, naming both fingerprints, unless a memory belongs to a MODEL; else how it was told."""
    check_base_model(model_patcher, node)
    spec, (hidden, channels, *_) = memory.specs[0], _patch_embedding(model_patcher)[0].shape
    sizes = {"hidden": (spec.hidden, hidden), "in_channels": (spec.in_channels, channels)}
    if memory.cross is not None:
        mine, its = (asdict(cross) for cross in (memory.cross, _cross_of(memory.specs, model_patcher)))
        sizes |= {f"cross-attention's {name}": (mine[name], its[name]) for name in ("heads", "double", "single")}
    return fits_base(memory, model_patcher, node, sizes)


def check_memory(memory: FrameMemory | PreservedMemory, model_patcher, node: str) -> str:
    """`check_fits` or `check_preserved`, by kind."""
    check = check_preserved if memory.kind == FRAME_PRESERVATION else check_fits
    return check(memory, model_patcher, node)  # pyright: ignore[reportArgumentType]


def with_tokens(memory: PreservedMemory, tokens: int) -> PreservedMemory:
    """The same encoders with a limit on what a run keeps. Raises PlanError for less than one token."""
    made = replace(memory, tokens=tokens)
    Budget(tokens, memory.rates[0])
    return made


def with_cross_attention(memory: PreservedMemory, model_patcher, seed: int = 0) -> PreservedMemory:
    """The same encoders with cross-attention into a MODEL's blocks, which changes nothing until it is trained.

    A memory that has it already is returned as it is. Raises ValueError for encoders without a branch for it.
    """
    if memory.cross is not None:
        return memory
    specs = tuple(replace(spec, cross_attention=True) for spec in memory.specs)
    history = _build(specs, memory.history.dtype, _cross_of(specs, model_patcher))
    cross_attention.initialise(history.cross_attention, seed)
    history.encoders.load_state_dict(memory.history.encoders.state_dict())
    return replace(memory, encoder=patcher_of(history, memory.encoder.load_device), specs=specs)


def attach_preserved(model_patcher, memory: PreservedMemory):
    """A clone of a MODEL that brings the encoders with it, reads their features and, on Wan, takes their tokens; the
    MODEL stays as it is. Raises MemoryMismatch for a MODEL that it is not for."""
    check_base_model(model_patcher, PRESERVATION)
    clone = attach(model_patcher, memory)
    clone.model_options.setdefault("transformer_options", {}).update(memory.history.options)
    return clone if is_framepack(clone) or wan.is_attached(clone) else wan.attach(clone)


def _seen_beside(recipe: Mapping) -> dict[str, str]:
    """What a recipe says of the clean frames. In stage 1 there are none; files from before name a schedule still."""
    if recipe.get("stage") != STAGE_FOLLOW:
        return {}
    identity = recipe.get("identity")
    through = identity.get("patchifiers") if isinstance(identity, Mapping) else None
    return {"schedule": str(recipe.get("schedule") or ""), "patchifiers": str(through or "")}


def _patch_embedding(model_patcher) -> tuple[Tensor, Tensor]:
    """Weight and bias of the base's first convolution for finished frames, unpacked and without patches."""
    if is_framepack(model_patcher):
        return original(model_patcher, "img_in.proj")
    return wan.given_embedding(model_patcher)


def _cross_of(specs: tuple[PreservationSpec, ...], model_patcher) -> CrossAttentionSpec | None:
    if not specs[0].cross_attention:
        return None
    return cross_attention.spec_of(model_patcher.model.diffusion_model, specs[0].features)


def _build(
    specs: tuple[PreservationSpec, ...], dtype: torch.dtype, cross: CrossAttentionSpec | None
) -> PreservedHistory:
    device = comfy.model_management.unet_offload_device()
    return PreservedHistory(specs, dtype, device, comfy.ops.manual_cast, cross).requires_grad_(False)
