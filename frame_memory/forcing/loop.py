"""The trainer loop: optimisers, averaged weights, checkpoints that resume exactly.

Only safetensors and JSON are written. A run that is interrupted and resumed gives the same weights as one that is not.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .muon import Muon


@dataclass(frozen=True)
class TrainSettings:
    """One run. Rates are per step; `matrix_rate` is Muon's (AdamW-sized updates), `other_rate` AdamW's."""

    steps: int
    matrix_rate: float = 2e-3
    other_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998
    save_every: int = 500
    seed: int = 0


def rate_at(step: int, settings: TrainSettings) -> float:
    """Share of the full rate: linear warm-up, then a cosine to a twentieth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


class Trainer:
    """Holds a network, its two optimisers and its averaged weights; `step` does one update.

    Muon (orthogonalised momentum) trains the square-ish matrices inside the blocks, AdamW all else.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings):
        self.model = model.requires_grad_(True)
        self.settings = settings
        self.done = 0
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.names = [n for n, _ in model.named_parameters()]
        self.average = [p.detach().clone() for p in model.parameters()]
        named = list(model.named_parameters())
        matrices = [p for n, p in named if is_matrix(n, p)]
        others = [p for n, p in named if not is_matrix(n, p)]
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            muon = Muon(matrices, lr=settings.matrix_rate, weight_decay=settings.weight_decay)
            self.optimisers.append((muon, settings.matrix_rate))
        adamw = torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimisers.append((adamw, settings.other_rate))

    def step(self, loss_fn: Callable[[torch.Generator], Tensor]) -> float:
        """One update on `loss_fn(generator)`. A loss that is not finite changes nothing and is returned as it is."""
        loss = loss_fn(self.generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            self.done += 1
            return value
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        share = rate_at(self.done, self.settings)
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done += 1
        keep = min(self.settings.average, self.done / (self.done + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - keep)
        return value

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return dict(zip(self.names, self.average, strict=True))

    def averaged_model(self) -> nn.Module:
        """A frozen copy of the network with the averaged weights."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        model.load_state_dict(self.averaged(), strict=False)
        return model

    def save(self, path: Path) -> None:
        """Write everything a resume needs; the old file stays until the new one is whole."""
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"average.{n}": p for n, p in self.averaged().items()}
        tensors["generator"] = self.generator.get_state()
        for i, (optimiser, _) in enumerate(self.optimisers):
            for j, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
        temporary = path.with_suffix(".partial")
        metadata = {"done": str(self.done), "settings": json.dumps(asdict(self.settings))}
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continue from `save`'s file. Raises ValueError where it was made with other settings."""
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["settings"]) != asdict(self.settings):
                raise ValueError(
                    f"{path.name} was made with {metadata['settings']}, not {json.dumps(asdict(self.settings))}. "
                    "Use the same settings or another file."
                )
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        self.done = int(metadata["done"])
        self.generator.set_state(tensors["generator"])
        self.model.load_state_dict({n: tensors[f"model.{n}"] for n in self.names}, strict=False)
        self.average = [
            tensors[f"average.{n}"].to(p.device) for n, p in zip(self.names, self.model.parameters(), strict=True)
        ]
        for i, (optimiser, _) in enumerate(self.optimisers):
            saved = optimiser.state_dict()
            for key, value in tensors.items():
                if key.startswith(f"optimiser.{i}."):
                    _, _, j, name = key.split(".", 3)
                    saved["state"].setdefault(int(j), {})[name] = value
            optimiser.load_state_dict(saved)


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon trains a parameter: a matrix of the blocks or of the memory's layers that does not modulate."""
    inside = any(part in name for part in ("blocks.", "memorize.", "squeeze."))
    return inside and p.ndim == 2 and not any(part in name for part in ("_mod.", "modulation."))


def run(
    trainer: Trainer, loss_fn: Callable[[torch.Generator], Tensor], path: Path, say: Callable[[str], None] = print
) -> Iterator[tuple[int, float]]:
    """Train to the end, saving on the way; yields `(step, loss)` so that a caller can watch or stop."""
    if path.exists():
        trainer.load(path)
        say(f"resumed {path.name} at step {trainer.done}")
    began, first = time.monotonic(), trainer.done
    recent: list[float] = []
    while trainer.done < trainer.settings.steps:
        recent.append(trainer.step(loss_fn))
        if trainer.done % 50 == 0:
            pace = (time.monotonic() - began) / (trainer.done - first)
            left = (trainer.settings.steps - trainer.done) * pace
            say(
                f"step {trainer.done}/{trainer.settings.steps}  loss {sum(recent) / len(recent):.4f}  "
                f"{pace:.2f} s/step  {left / 60:.1f} min left"
            )
            recent.clear()
        if trainer.done % trainer.settings.save_every == 0:
            trainer.save(path)
        yield trainer.done, recent[-1] if recent else float("nan")
    trainer.save(path)
