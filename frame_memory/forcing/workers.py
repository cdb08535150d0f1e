"""Several processes that train one model, one GPU each: started by `accelerate launch` or `torchrun`.

Both say to each process by environment variables who it is and where the first one listens; nothing else of them is
needed. Without these variables a process works alone, and nothing here opens a connection.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among `count`: rank 0..count-1, and the number of its GPU on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def summed(self, numbers: Sequence[float]) -> list[float]:
        """Each number's sum over all processes."""
        if self.count == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, number: int) -> bool:
        """Whether all processes say the same number; all of them get the same answer."""
        total, squares = self.summed([number, number**2])
        return total**2 == self.count * squares

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the connection."""
        if self.count > 1:
            dist.destroy_process_group()


ALONE = Workers()


def join(device_type: str) -> Workers:
    """Meet the other processes. device_type: "cpu", or the name of the accelerator that the model runs on.

    Raises ValueError where the launcher's variables are not complete.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set. Start it by `accelerate launch` or "
            "`torchrun`, which set all of them."
        )
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_cpu = device_type == "cpu"
    device = "cpu" if on_cpu else f"{device_type}:{local}"
    if not on_cpu:
        torch.accelerator.set_device_index(local)
    dist.init_process_group("gloo" if on_cpu else None, rank=rank, world_size=count)
    return Workers(rank, count, local, device)
