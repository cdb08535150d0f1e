"""A training run on disk: the newest states of it, from which it goes on as if it had never stopped.

Each state is one safetensors file that appears only when it is whole; the last few are kept, and a state that cannot be
written or read leaves the one before it in use.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..model import tensor_file
from .clips import TRAIN, ForcingError
from .video_trainer import VideoTrainer

FORMAT = "1"
KEEP = 3
PARAMETER, AVERAGE, OPTIMISER = "parameter.", "average.", "optimiser."


class TrainingFolder:
    """`step-<number>.safetensors` files of one run.

    identity: what a state must have in common with the run that goes on from it (plain data). say: gets a sentence for
    people where something is not as it should be. node: display name of the one that trains.
    """

    def __init__(
        self, folder: Path, identity: Mapping, say: Callable[[str], None], keep: int = KEEP, node: str = TRAIN
    ):
        self.node = node
        self.folder, self.identity, self.say, self.keep = folder, json.loads(json.dumps(dict(identity))), say, keep

    def states(self) -> list[Path]:
        """Finished states, oldest first."""
        found = [p for p in self.folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", p.stem)]
        return sorted(found, key=lambda p: int(p.stem.split("-")[1]))

    def save(self, trainer: VideoTrainer) -> bool:
        """Write a state and let the oldest go; whether it was written. Where the disk refuses, all others stay."""
        path = self.folder / f"step-{trainer.done:08d}.safetensors"
        tensors, metadata = state_of(trainer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensor_file.write(str(path), tensors, {**metadata, "identity": json.dumps(self.identity)})
        except (tensor_file.FileError, OSError) as error:
            kept = self.states()
            last = f"The last checkpoint, {kept[-1].name}, is kept" if kept else "There is no checkpoint yet"
            self.say(f"The checkpoint of step {trainer.done} could not be written: {error} {last}.")
            return False
        for old in self.states()[: -self.keep]:
            with contextlib.suppress(OSError):
                old.unlink()
        return True

    def resume(self, trainer: VideoTrainer) -> Path | None:
        """Continue from the newest state that can be read; None where there is none.

        Raises ForcingError where it was made by another run, or where states are there and none can be read.
        """
        states = self.states()
        for path in reversed(states):
            try:
                entries, metadata = tensor_file.read_header(str(path), self.node)
                self._check(path, metadata)
                tensors = {name: entry.read() for name, entry in entries.items()}
            except tensor_file.FileError as error:
                self.say(f"{path.name} cannot be read and is passed over: {error}")
                continue
            restore(trainer, tensors, metadata, path.name, self.say, self.node)
            return path
        if states:
            raise ForcingError(
                f"None of the {len(states)} checkpoints in {self.folder} can be read. Choose another name for the run, "
                "or delete the folder to begin anew."
            )
        return None

    def _check(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != f"frame_memory training {FORMAT}":
            raise tensor_file.FileError(f"{path} is not a checkpoint of a training run of this version.")
        its = json.loads(metadata["identity"])
        now = self.identity
        other = [n for n in sorted(set(its) | set(now)) if its.get(n) != now.get(n)]
        if other:
            raise ForcingError(f"The run in {self.folder} {_what_changed(its, now, other, self.node)}")


def _what_changed(its: Mapping, now: Mapping, other: list[str], node: str) -> str:
    """Why a state cannot be gone on with, and what to do. its, now: identities; other: the names that differ."""
    if "stage" in other:
        return (
            f"trains stage '{its.get('stage')}', and stage '{now.get('stage')}' is asked for now. Each stage is a run "
            f"of its own: set 'stage' back, or give this stage another 'name' in '{node}'. For both stages in a graph "
            "take two of these nodes."
        )
    reasons = []
    if "memory" in other:
        was, given = its.get("memory"), now.get("memory")
        if was and given:
            reasons.append(
                "behind another memory: since then the memory was trained on, or another one was connected "
                f"({was}, now {given})"
            )
        else:
            reasons.append(f"{'with' if was else 'without'} a memory, and now {'none' if was else 'one'} is connected")
    plain = [n for n in other if n != "memory"]
    if plain:
        said = "; ".join(f"{n}: {its.get(n)!r}, now {now.get(n)!r}" for n in plain)
        reasons.append(f"with other settings ({said})")
    back = [*(["connect the memory that it began with, if its file is still there,"] if "memory" in other else []),
            *(["set them back"] if plain else [])]  # fmt: skip
    anew = " and begin anew with this memory" if "memory" in other and now.get("memory") else " to begin anew"
    return (
        f"was begun {' and '.join(reasons)}. Choose another name for the run ('name' in '{node}'){anew}; or "
        f"{' and '.join(back)} to go on with it."
    )


def state_of(trainer: VideoTrainer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that a resume needs, as tensors and metadata of a safetensors file."""
    tensors = {PARAMETER + n: p.detach() for n, p in trainer.parameters.items()}
    tensors |= {AVERAGE + n: p for n, p in trainer.average.items()}
    for i, (optimiser, _) in enumerate(trainer.optimisers):
        for j, state in optimiser.state_dict()["state"].items():
            tensors |= {f"{OPTIMISER}{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors["generator"] = trainer.generator.get_state()
    tensors["losses"] = torch.tensor(trainer.losses, dtype=torch.float64)
    metadata = {
        "format": f"frame_memory training {FORMAT}", "done": str(trainer.done), "bad": str(trainer.bad),
        "factor": repr(trainer.factor), "settings": json.dumps(asdict(trainer.settings)),
    }  # fmt: skip
    return tensors, metadata


def restore(
    trainer: VideoTrainer, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str,
    say: Callable[[str], None], node: str = TRAIN,
) -> None:  # fmt: skip
    """Put a state back. Raises ForcingError, with nothing changed, where weights are missing or of other sizes."""
    wrong = [
        n for n, p in trainer.parameters.items()
        if PARAMETER + n not in tensors or tensors[PARAMETER + n].shape != p.shape
    ]  # fmt: skip
    if wrong or "generator" not in tensors:
        what = "random numbers"
        if wrong:
            what = f"{len(wrong)} of {len(trainer.parameters)} weights ({', '.join(wrong[:3])})"
        raise ForcingError(
            f"{name} does not fit this run: {what} are missing or of another size. Choose another name for the run in "
            f"'{node}', or the model and the settings that it was begun with."
        )
    with torch.no_grad():
        for n, p in trainer.parameters.items():
            p.copy_(tensors[PARAMETER + n])
        for n, p in trainer.average.items():
            p.copy_(tensors.get(AVERAGE + n, tensors[PARAMETER + n]))
    trainer.done, trainer.bad = int(metadata["done"]), int(metadata.get("bad", "0"))
    trainer.factor = float(metadata.get("factor", "1"))
    trainer.losses = tensors["losses"].tolist() if "losses" in tensors else [float("nan")] * trainer.done
    trainer.generator.set_state(tensors["generator"])
    missing = [not _restore_optimiser(i, optimiser, tensors) for i, (optimiser, _) in enumerate(trainer.optimisers)]
    if any(missing) and trainer.done:
        say(
            f"{name} holds no state of the optimiser. The weights go on from step {trainer.done}; the optimiser begins "
            "anew, so the next steps differ from those of a run that was never stopped."
        )


def _restore_optimiser(i: int, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> bool:
    saved, states = optimiser.state_dict(), {}
    for key, value in tensors.items():
        if key.startswith(f"{OPTIMISER}{i}."):
            _, _, j, name = key.split(".", 3)
            states.setdefault(int(j), {})[name] = value
    expected = {j for group in saved["param_groups"] for j in group["params"]}
    if not states or not states.keys() <= expected:  # weights that have only waited have none
        return False
    optimiser.load_state_dict({**saved, "state": states})
    return True
