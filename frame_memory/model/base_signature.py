"""Which base a memory or a head belongs to: family, kind, sizes, and numbers that copies of one checkpoint share.

The numbers come from the base's vectors (biases and norms): files in bf16, fp16, fp8 and GGUF keep those, and LoRAs
that are merged into a file leave them as they are. The head's own are left out, since Direct Forcing changes them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .key_map import is_quant_key
from .provenance import MODEL_OPTION

MODEL_PREFIX = "diffusion_model."
HEAD_MODULE = "final_layer."
# Numbers taken from each vector, evenly spread: about 2,000 of the full-size network, 5 KiB of metadata.
NUMBERS = 4
# bf16 keeps 8 binary digits, so two files that rounded one number differ by at most this share of it.
ROUNDING, SMALLEST = 2.0**-7, 1e-6
# The share of numbers that must agree. A copy in another number format agrees in all; a few may be stored coarser.
AGREEING = 0.995
SHOWN = 8
TOPOLOGY = {
    "hidden": "hidden_size", "heads": "num_heads", "depth": "depth", "single_depth": "depth_single_blocks",
    "channels": "in_channels", "text": "context_in_dim",
}  # fmt: skip
WAN_TOPOLOGY = {
    "hidden": "dim", "heads": "num_heads", "depth": "num_layers", "channels": "in_dim", "text": "text_dim"
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """Evenly spread numbers of a network's vectors, rounded to bf16, in the order of their names."""

    numbers: tuple[float, ...] = ()

    @classmethod
    def of(cls, network: torch.nn.Module, originals: Mapping[str, Tensor]) -> Signature:
        """Read a network's numbers. originals: the weights, by name in the network, that patches have replaced."""
        picked = []
        for name, parameter in sorted(network.named_parameters(), key=lambda item: item[0]):
            if parameter.ndim != 1 or name.startswith(HEAD_MODULE) or is_quant_key(name):
                continue
            value = originals.get(name, parameter).detach()
            picked.append(value[torch.arange(NUMBERS, device=value.device) * len(value) // NUMBERS].float().cpu())
        numbers = torch.cat(picked).bfloat16().float() if picked else torch.zeros(0)
        return cls(tuple(numbers.tolist()))

    @property
    def short(self) -> str:
        """A few hex digits for people."""
        return hashlib.sha256(_bytes(self.numbers)).hexdigest()[:SHOWN]

    def agreement(self, other: Signature) -> float:
        """The share of numbers, 0..1, that are one number stored in two formats; 0 for another count of them."""
        if len(self.numbers) != len(other.numbers):
            return 0.0
        if not self.numbers:
            return 1.0
        a, b = torch.tensor(self.numbers), torch.tensor(other.numbers)
        near = (a - b).abs() <= ROUNDING * torch.maximum(a.abs(), b.abs()) + SMALLEST
        return float(near.float().mean())

    def to_text(self) -> str:
        """base64 of the numbers as bf16, little-endian."""
        return base64.b64encode(_bytes(self.numbers)).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> Signature:
        """The signature that `to_text` wrote. Raises ValueError for other text."""
        data = base64.b64decode(text, validate=True)
        if len(data) % 2:
            raise ValueError("an odd count of bytes")
        raw = torch.frombuffer(bytearray(data), dtype=torch.bfloat16) if data else torch.zeros(0)
        return cls(tuple(raw.float().tolist()))


def _bytes(numbers: tuple[float, ...]) -> bytes:
    return torch.tensor(numbers, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes() if numbers else b""


@dataclass(frozen=True)
class Base:
    """A base model as far as its memories and heads depend on it. family, kind: empty where nobody says.

    family: of its latents, as 'Load FramePack Model' notes it, of Wan their format. kind: "F0" or "F1" of FramePack.
    topology: sizes by TOPOLOGY's names.
    """

    family: str
    kind: str
    topology: Mapping[str, int]
    signature: Signature = field(repr=False, default_factory=Signature)

    @classmethod
    def of(cls, patcher) -> Base:
        """The base of a MODEL (core's ModelPatcher, not changed), whatever LoRAs or heads are patched onto it."""
        known, network = patcher.model_options.get(MODEL_OPTION, {}), patcher.model.diffusion_model
        originals = {k.removeprefix(MODEL_PREFIX): v.weight for k, v in patcher.backup.items()}
        wan = "" if hasattr(network, "params") else type(patcher.model.latent_format).__name__
        return cls.of_network(network, known.get("base", wan), known.get("kind", ""), originals)

    @classmethod
    def of_network(
        cls, network: torch.nn.Module, family: str, kind: str, originals: Mapping[str, Tensor] | None = None
    ) -> Base:
        """The base that a FramePack or Wan network is. originals: weights by name, where patches have replaced them."""
        named, table = (network.params, TOPOLOGY) if hasattr(network, "params") else (network, WAN_TOPOLOGY)
        sizes = {ours: getattr(named, core, None) for ours, core in table.items()}
        topology = {name: int(size) for name, size in sizes.items() if size is not None}
        return cls(family, kind, topology, Signature.of(network, originals or {}))

    def __str__(self) -> str:
        sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in self.topology.items())
        network = "FramePack" if self._is_framepack else "network"
        what = " ".join(filter(None, (self.family, network, self.kind)))
        return f"{what} ({sizes}; fingerprint {self.signature.short})"

    def difference(self, other: Base) -> str:
        """Why weights for this base do not belong to `other`, or nothing. What either does not say is passed over."""
        for what, mine, its in (("family", self.family, other.family), ("kind", self.kind, other.kind)):
            if mine and its and mine != its:
                return f"its {what} is {mine}, not {its}"
        for name in TOPOLOGY:
            mine, its = self.topology.get(name), other.topology.get(name)
            if mine != its and mine is not None and its is not None:
                return f"its {name.replace('_', ' ')} is {mine}, not {its}"
        share = self.signature.agreement(other.signature)
        if share < AGREEING:
            return f"of the numbers that copies of one base share, {share:.0%} agree"
        return ""

    def certainty(self, other: Base) -> str:
        """A sentence on what could be compared with `other`, which `difference` found to be the same."""
        compared = [("which VAE it works with", self.family, other.family)]
        if self._is_framepack:
            compared.append(("whether it is F0 or F1", self.kind, other.kind))
        unsaid = " and ".join(what for what, mine, its in compared if not (mine and its))
        left = f" Not compared, since the MODEL or the file does not say: {unsaid}." if unsaid else ""
        return f"Trained on this base ({self.signature.short}).{left}"

    @property
    def _is_framepack(self) -> bool:
        """Blocks of a single kind are Wan's."""
        return "single_depth" in self.topology

    def to_metadata(self) -> dict[str, str]:
        """Strings for a file's metadata, without prefix."""
        return {
            "base": self.family,
            "framepack_kind": self.kind,
            "topology": json.dumps(dict(self.topology)),
            "base_signature": self.signature.to_text(),
        }

    @classmethod
    def from_metadata(cls, said: Mapping[str, str]) -> Base | None:
        """The base that a file's metadata names; None where it names none, or in words that cannot be read."""
        if "topology" not in said or "base_signature" not in said:
            return None
        try:
            topology = {str(k): int(v) for k, v in json.loads(said["topology"]).items()}
            signature = Signature.from_text(said["base_signature"])
        except (ValueError, TypeError, AttributeError):
            return None
        return cls(said.get("base", ""), said.get("framepack_kind", ""), topology, signature)
