"""What the claims share: what a claim is, and rows trained to the end over several calls, their weights on disk."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from frame_memory.forcing.stages import Trained
from frame_memory.forcing.training_state import TrainingFolder
from frame_memory.forcing.video_trainer import VideoLosses, VideoSettings, VideoTrainer
from frame_memory.model import tensor_file

from .long_clips import LongClips
from .long_world import LongScene

SAVE_SECONDS = 120
# Of a table: what is measured, with the head of its column and how its numbers are written.
Measures = Mapping[str, tuple[str, str]]


class OutOfTime(Exception):
    """The minutes given are over; what was finished is on disk."""


@dataclass
class Workshop(ABC):
    """Where rows are trained and measured: the folder, the videos, and until when.

    budget: how much is trained. say: gets lines for people. scenes: what is measured on; steps: of a sampler.
    """

    folder: Path
    clips: LongClips
    budget: Any
    device: str = "cpu"
    deadline: float = math.inf
    say: Callable[[str], None] = print
    scenes: Sequence[LongScene] = ()
    sample_steps: int = 12

    @abstractmethod
    def figures(self, variant: Any, seed: int, cases: Sequence[str]) -> dict[str, dict[str, float]]:
        """A row's figures by case, trained here where that is not done yet. Raises OutOfTime."""

    def alive(self) -> None:
        """Raise OutOfTime when the time is over."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def train(
        self, name: str, trained: Trained, losses_at: Callable[[int], VideoLosses], settings: VideoSettings, steps: int,
        identity: Mapping, tensors: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> None:  # fmt: skip
        """Train to the end, from the last state on disk where there is one, and write the weights.

        losses_at: a step's losses by its number. tensors: what is written, of the weights that learned by name.
        """
        trainer = VideoTrainer(trained.parameters, settings)
        states = TrainingFolder(self.folder / "states" / name, identity, self.say, keep=1)
        if states.resume(trainer):
            self.say(f"{name}: goes on from step {trainer.done} of {steps}")
        began, first, saved = time.monotonic(), trainer.done, time.monotonic()
        try:
            with trained.ready():
                while trainer.done < steps:
                    self.alive()
                    trainer.step(losses_at(trainer.done))
                    if trainer.done % 50 == 0:
                        pace = (time.monotonic() - began) / (trainer.done - first)
                        loss, left = sum(trainer.losses[-50:]) / 50, (steps - trainer.done) * pace / 60
                        done = f"step {trainer.done}/{steps}, loss {loss:.4f}"
                        self.say(f"{name}: {done}, {pace:.2f} s a step, {left:.1f} min left")
                    if time.monotonic() - saved > SAVE_SECONDS:
                        states.save(trainer)
                        saved = time.monotonic()
        except OutOfTime:
            states.save(trainer)
            raise
        made = {k: v.detach().cpu().contiguous() for k, v in tensors(trainer.weights()).items()}
        tensor_file.write(str(self.folder / f"{name}.safetensors"), made, {"identity": json.dumps(dict(identity))})
        for state in states.states():
            os.remove(state)


class Claim(ABC):
    """A claim of a paper: the rows of its tables, how much each is trained, and what is measured of it.

    variants: rows by name; tables: names of rows by title, all of one table measured alike. budget: a dataclass of
    plain numbers. settings: of its fields, those that the command line has, with what they are the steps of. seconds:
    lengths of the videos that are made.
    """

    folder: Path
    variants: Mapping[str, Any]
    tables: Mapping[str, Sequence[str]]
    budget: type
    settings: Mapping[str, str]
    seconds: Sequence[float]
    workshop: type[Workshop]

    @abstractmethod
    def toy(self, budget: Any) -> Any:
        """The smallest budget that runs everything, for a test."""

    @abstractmethod
    def measures(self, variant: Any) -> Measures:
        """What is measured of a row."""

    @abstractmethod
    def cases(self, variant: Any, seconds: Sequence[float]) -> dict[str, str]:
        """The cases that a row is measured in, with their names for people. Those of videos are their seconds."""

    @abstractmethod
    def identity(self, variant: Any, budget: Any, scenes: int, sample_steps: int) -> dict:
        """The settings that a row depends on."""


def slug(name: str) -> str:
    """A variant's name as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def read_weights(path: Path, identity: Mapping) -> dict[str, Tensor]:
    """Weights trained before. Raises SystemExit for another budget, whose figures would not be what they are called."""
    its = json.loads(tensor_file.read_header(str(path))[1]["identity"])
    other = sorted(k for k in its.keys() | identity.keys() if its.get(k) != identity.get(k))
    if other:
        raise SystemExit(
            f"{path} was trained with other settings ({', '.join(other)}). Give the same ones, or another --work."
        )
    return tensor_file.read(str(path))
