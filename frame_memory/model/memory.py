"""FRAME_MEMORY: a SemanticPack in a ModelPatcher of its own, and what it has been told of prompt and picture.

The encoder is loaded by ComfyUI beside the MODEL that it is attached to, and goes when that goes. The socket's other
kind is frame preservation (preserved_memory.py); what both kinds need is here.

Shape legend: B batch, L text tokens, N vision tokens, C features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ..plan.preservation import PRESERVATION
from .base_signature import MODEL_PREFIX, Base
from .cross_attention import CROSS
from .families import is_wan, loader_of, makes_clips, name_of
from .framepack import CONTRADICTED, MODEL_OPTION, is_framepack
from .memory_file import LOAD_DIRECT_FORCING, LOAD_MEMORY, SEMANTIC_PACK, MemoryFile
from .provenance import NamedLora, fingerprint_of, loras_of
from .semantic_pack import PackSpec, SemanticPack, initialise
from .sources import LOAD_MODEL
from .transformer import without_padding

# Under this name the encoder hangs on a MODEL: a second one takes the place of the first.
ATTACHED = "frame_memory"
MEMORY_PACK = "MemoryPack Encoder"


class MemoryMismatch(ValueError):
    """A memory that does not belong to a MODEL, or cannot be made."""


@dataclass(frozen=True)
class FrameMemory:
    """What the socket carries.

    encoder: ModelPatcher around a SemanticPack. label: where it is from, for people. trained: False for fresh weights.
    base: what it was made or trained for, None where nobody says. text: `[1, L, C]` without padding, vision:
    `[1, N, C]`; both None until 'MemoryPack Encoder' gives them. loras: that it was trained with.
    """

    kind: ClassVar[str] = SEMANTIC_PACK
    encoder: Any
    spec: PackSpec
    label: str
    trained: bool
    base: Base | None = None
    text: Tensor | None = field(default=None, repr=False)
    vision: Tensor | None = field(default=None, repr=False)
    loras: tuple[NamedLora, ...] = ()

    @property
    def pack(self) -> SemanticPack:
        """The network."""
        return self.encoder.model

    @property
    def fingerprint(self) -> str:
        """A few hex digits that change with the weights, for people."""
        return fingerprint_of(self.pack.state_dict())

    def to_spec(self) -> dict:
        """What the encoder is made of, as plain data for a file."""
        return self.spec.to_dict()

    def with_features(self, text_BLC: Tensor, vision_BNC: Tensor | None) -> FrameMemory:
        """The same encoder with what it is anchored to."""
        return replace(self, text=text_BLC, vision=vision_BNC)

    def describe(self) -> str:
        """A line for people."""
        spec, size = self.spec, sum(p.numel() for p in self.pack.parameters())
        closed = "its gate is closed, so it changes nothing until it is trained"
        if bool(self.pack.gate):
            state = "" if self.trained else ", UNTRAINED: it shows noise"
        else:
            state = f", UNTRAINED: {closed}"
        more = ", psi_0 = 0" if spec.zero_psi else ""
        return (
            f"{self.label}: SemanticPack {spec.squeeze}{more}, width {spec.hidden}, {spec.blocks} blocks, "
            f"{size / 1e6:.1f} M numbers, gate {gate_of(self.pack):.4g} ({self.fingerprint}){state}"
        )


def gate_of(pack: SemanticPack) -> float:
    """How far the gate is open: tanh of its number, -1 to 1; 0 is closed."""
    return float(torch.tanh(pack.gate.detach().float()))


def new_encoder(model_patcher, *, seed: int = 0, **options) -> FrameMemory:
    """A fresh encoder for a FramePack-F1 MODEL: embedders as the MODEL's own without its LoRAs, all else untrained.

    options: of PackSpec, as `squeeze`. Raises MemoryMismatch for another MODEL.
    """
    check_model(model_patcher, LOAD_MEMORY)
    network = model_patcher.model.diffusion_model
    spec = PackSpec.of(network, **options)
    originals = {k.removeprefix(MODEL_PREFIX): v.weight for k, v in model_patcher.backup.items()}
    pack = initialise(_build(spec, compute_dtype(model_patcher)), network, seed, originals)
    encoder = patcher_of(pack, model_patcher.load_device)
    return FrameMemory(encoder, spec, "new", False, Base.of(model_patcher))


def encoder_from_tensors(
    tensors: Mapping[str, Tensor], spec: PackSpec, *, label: str, trained: bool = True, base: Base | None = None,
    dtype: torch.dtype | None = None, load_device=None,
) -> FrameMemory:  # fmt: skip
    """An encoder from SemanticPack's state dict. dtype: None for that of the tensors.

    Raises MemoryMismatch where names or shapes are not those of `spec`.
    """
    pack = _build(spec, dtype or dtype_of(tensors))
    load_weights(pack, tensors, label)
    return FrameMemory(patcher_of(pack, load_device), spec, label, trained, base)


def encoder_of(file: MemoryFile, node: str, model_patcher=None) -> FrameMemory:
    """The memory that a file holds, in the numbers and for the device of a MODEL where there is one.

    node: display name of the node that the file was chosen in. Raises MemoryMismatch for a file without a memory, or
    with one that this version cannot read.
    """
    if not file.pack or file.spec is None:
        holds = f"a Direct Forcing head and no memory. Load it with '{LOAD_DIRECT_FORCING}'"
        if file.frames:
            holds = f"a memory of frame preservation and no SemanticPack. Load it with '{LOAD_MEMORY}'"
        raise MemoryMismatch(f"{file.name} holds {holds}, or choose another file in '{node}'.")
    try:
        spec = PackSpec.from_dict(file.spec)
    except ValueError as error:
        raise MemoryMismatch(f"{file.name}: {error} Choose another file in '{node}'.") from error
    made = encoder_from_tensors(file.pack, spec, label=file.name, base=file.base, **place_of(model_patcher))
    return replace(made, loras=loras_of(file.recipe))


def place_of(model_patcher) -> dict:
    """Numbers and device of an encoder for a MODEL, as `dtype` and `load_device`; empty without one."""
    if model_patcher is None:
        return {}
    return {"dtype": compute_dtype(model_patcher), "load_device": model_patcher.load_device}


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The numbers that an encoder of a file works in where no MODEL says: the file's own if they suit."""
    stored = next(iter(tensors.values())).dtype if tensors else torch.float32
    return stored if stored in (torch.float32, torch.bfloat16) else torch.float32


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], label: str) -> None:
    """Put a file's tensors into an encoder. Raises MemoryMismatch where names or shapes are not the encoder's."""
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise MemoryMismatch(
            f"{label}: the tensor {name} has shape {given.get(name, 'none')}, expected {wanted.get(name, 'none')} "
            f"({len(wrong)} tensors differ). Choose another file in '{LOAD_MEMORY}'."
        )
    network.load_state_dict(dict(tensors))


def patcher_of(network: nn.Module, load_device=None):
    """A ModelPatcher of an encoder's own."""
    return comfy.model_patcher.CoreModelPatcher(
        network.eval(),
        load_device=load_device or comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def of_kind(memory, kind: str, node: str, other: str) -> Any:
    """A FRAME_MEMORY of the kind that a node works with. Raises MemoryMismatch for the other one.

    kind: as in a file. other: the node that the other kind belongs into.
    """
    if memory.kind != kind:
        raise MemoryMismatch(
            f"'memory' of '{node}' is {memory.describe()}, which this node does not work with. It belongs into "
            f"'{other}'; connect another memory here, or choose another file in '{LOAD_MEMORY}'."
        )
    return memory


def attach(model_patcher, memory):
    """A clone of a MODEL that brings the encoder with it when it is loaded; the MODEL stays as it is."""
    clone = detach(model_patcher)
    clone.set_additional_models(ATTACHED, [memory.encoder])
    return clone


def detach(model_patcher):
    """A clone of a MODEL without an encoder; nothing of it is left."""
    clone = model_patcher.clone()
    clone.remove_additional_models(ATTACHED)
    clone.model_options.get("transformer_options", {}).pop(CROSS, None)
    return clone


def is_attached(model_patcher) -> bool:
    """Whether a MODEL brings an encoder with it."""
    return bool(model_patcher.get_additional_models_with_key(ATTACHED))


def check_model(model_patcher, node: str) -> None:
    """Raise MemoryMismatch unless a MODEL is FramePack-F1, which alone makes a video from its start on."""
    if not is_framepack(model_patcher):
        raise MemoryMismatch(
            f"The MODEL of '{node}' is {name_of(model_patcher)}, and SemanticPack and Direct Forcing are for "
            f"FramePack-F1. Expected FramePack-F1 from '{LOAD_MODEL}'.{_memory_for(model_patcher)}"
        )
    if model_patcher.model_options.get(MODEL_OPTION, {}).get("kind") == "F0":
        raise MemoryMismatch(
            f"The MODEL of '{node}' is FramePack F0, which makes the end of a video first: there is no past to "
            f"remember. Expected FramePack-F1 (FramePack_F1_I2V_HY) in '{LOAD_MODEL}'."
        )
    contradicted = model_patcher.model_options.get(MODEL_OPTION, {}).get(CONTRADICTED)
    if contradicted:
        raise MemoryMismatch(
            f"The MODEL of '{node}' is taken for FramePack F1, and {contradicted}. A memory or a head made for the "
            f"wrong kind is of no use. Set 'kind' in '{LOAD_MODEL}' to 'from the file', and choose an F1 file there; "
            "if it is one and its name is wrong, rename it."
        )


def _memory_for(model_patcher) -> str:
    """Which memory fits a MODEL that is no FramePack, or nothing where none does."""
    if not is_wan(model_patcher) or makes_clips(model_patcher):
        return ""
    return (
        f" The memory for {name_of(model_patcher)} is frame preservation: choose a file of that kind, or a new one, in "
        f"'{LOAD_MEMORY}' and connect it to '{PRESERVATION}', or to 'Train Frame Preservation'."
    )


def check_fits(memory: FrameMemory, model_patcher, node: str) -> str:
    """Raise MemoryMismatch, naming both fingerprints, unless a memory belongs to a MODEL; else how it was told."""
    check_model(model_patcher, node)
    its = PackSpec.of(model_patcher.model.diffusion_model)
    names = ("hidden", "heads", "in_channels", "text", "vision")
    sizes = {name: (getattr(memory.spec, name), getattr(its, name)) for name in names}
    return fits_base(memory, model_patcher, node, sizes)


def fits_base(memory, model_patcher, node: str, sizes: Mapping[str, tuple[int, int]]) -> str:
    """`check_fits` of either kind of memory. sizes: by name, the memory's and the MODEL's."""
    base = Base.of(model_patcher)
    wrong = "" if memory.base is None else memory.base.difference(base)
    for name, (mine, models) in sizes.items():
        if mine != models:
            wrong = wrong or f"its {name} is {mine}, not {models}"
    if wrong:
        raise MemoryMismatch(
            f"The memory of '{node}' ({memory.label}) was made for another base than this MODEL: {wrong}. The memory's "
            f"base is {memory.base or 'not named'}; this MODEL is {base}. Load the base that it was made for in "
            f"'{loader_of(model_patcher)}', or choose another file in '{LOAD_MEMORY}'."
        )
    if memory.base is None:
        return "Nobody says which base the memory was made for; only its sizes could be compared."
    return memory.base.certainty(base) if memory.trained else f"Made for this base ({base.signature.short})."


def with_features_of(memory: FrameMemory, conditioning: list, vision=None) -> tuple[FrameMemory, str]:
    """A memory anchored to a prompt and a picture, and a line that says so.

    conditioning: CONDITIONING, of which the first entry counts. vision: CLIP_VISION_OUTPUT; None for the one that the
    conditioning carries, if any. Raises MemoryMismatch for features of other encoders than the memory's.
    """
    if not conditioning:
        raise MemoryMismatch(f"'conditioning' of '{MEMORY_PACK}' is empty. Feed it from 'CLIP Text Encode'.")
    text, extra = conditioning[0]
    text = without_padding(text, extra.get("attention_mask"))
    vision = extra.get("clip_vision_output") if vision is None else vision
    tokens = None if vision is None else vision.last_hidden_state
    wrong = _wrong_width("conditioning", text, memory.spec.text, "DualCLIPLoader, type hunyuan_video")
    if tokens is not None:
        wrong = wrong or _wrong_width("clip_vision_output", tokens, memory.spec.vision, "sigclip_vision_patch14_384")
    if wrong:
        raise MemoryMismatch(wrong)
    seen = "no picture (connect 'positive' of 'FramePack Image', or clip_vision_output)" if tokens is None else (
        f"{tokens.shape[1]} tokens of the picture"
    )  # fmt: skip
    line = f"It begins with {text.shape[1]} tokens of the prompt and {seen}."
    if len(conditioning) > 1:
        line += f" Of {len(conditioning)} prompts the first counts."
    return memory.with_features(text.detach().cpu(), None if tokens is None else tokens.detach().cpu()), line


def _wrong_width(socket: str, features: Tensor, wanted: int, node: str) -> str:
    if features.shape[-1] == wanted and features.shape[1]:
        return ""
    return (
        f"'{socket}' of '{MEMORY_PACK}' holds {features.shape[1]} tokens of {features.shape[-1]} numbers, the memory "
        f"reads {wanted}. Expected those of the encoder that belongs to the model ({node})."
    )


def compute_dtype(model_patcher) -> torch.dtype:
    """The numbers an encoder of a MODEL works in: the MODEL's own, or ones that do not overflow in the place of fp16
    and fp8."""
    dtype = model_patcher.model.get_dtype_inference()
    if dtype in (torch.float32, torch.bfloat16):
        return dtype
    bf16 = comfy.model_management.should_use_bf16(model_patcher.load_device)
    return torch.bfloat16 if bf16 else torch.float32


def _build(spec: PackSpec, dtype: torch.dtype) -> SemanticPack:
    device = comfy.model_management.unet_offload_device()
    return SemanticPack(spec, dtype=dtype, device=device, operations=comfy.ops.manual_cast).requires_grad_(False)
