"""What an op is here: its plain twin, its backends with what each needs, and the choice of one.

Needs are data and are looked at before a call: no backend is tried and caught. What a backend needs of others (Triton,
comfy-kitchen) is looked for without importing it; its `run` imports it.

A new op has a module with the twin, an `Op`, and a function registered with `torch.library.custom_op` and a fake, so
that torch.compile takes it as one op; its test holds every backend that this machine can run against the twin.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

EAGER = "eager"


@dataclass(frozen=True)
class Call:
    """What a choice looks at. width: numbers of the last dimension; rows: tokens; gradient: whether it is wanted."""

    device: torch.device
    dtype: torch.dtype
    width: int
    rows: int
    gradient: bool = False

    @classmethod
    def of(cls, x: Tensor, *others: Tensor) -> Call:
        """The call on a tensor `[..., rows, width]`. others: inputs that a gradient may be wanted of as well."""
        gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))
        return cls(x.device, x.dtype, x.shape[-1], x.shape[-2], gradient)


@dataclass(frozen=True)
class Needs:
    """What a backend needs of a call and of the machine; what is empty is not asked for.

    capability: (least, below) of an NVIDIA GPU, as (major, minor). features: of a CPU, torch's names. rows, widths:
    (from, to), both inside. multiple: what divides the width. modules: others' that must be there; major: the versions
    of the first of them, (from, to). cudnn: its least version, as torch tells it.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    features: tuple[str, ...] = ()
    rows: tuple[int, int] | None = None
    widths: tuple[int, int] | None = None
    multiple: int = 1
    modules: tuple[str, ...] = ()
    major: tuple[int, int] | None = None
    cudnn: int = 0
    gradient: bool = False

    def missing(self, call: Call) -> str:
        """The first thing that is not as needed, in words; "" where nothing is missing."""
        kind = call.device.type
        if self.devices and kind not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, not on {kind}"
        if self.dtypes and call.dtype not in self.dtypes:
            return f"it knows {' and '.join(map(_short, self.dtypes))}, not {_short(call.dtype)}"
        for module in self.modules:
            if not _there(module):
                return f"{module} is not installed"
        if self.major and not self.major[0] <= (found := _major(self.modules[0])) <= self.major[1]:
            return f"{self.modules[0]} is of version {found}; it is for {self.major[0]} to {self.major[1]}"
        if self.capability and kind == "cuda":
            least, below = self.capability
            own = capability(call.device)
            if torch.version.hip or not least <= own < below:
                made = "AMD" if torch.version.hip else f"compute capability {_dotted(own)}"
                return f"a GPU of {made}; it is for NVIDIA's {_dotted(least)} to below {_dotted(below)}"
        if self.cudnn and kind == "cuda" and (own := torch.backends.cudnn.version() or 0) < self.cudnn:
            return f"cuDNN is of version {own}; it is for {self.cudnn} on"
        lacking = [name for name in self.features if kind == "cpu" and not cpu_features().get(name)]
        if lacking:
            return f"the processor has no {' and no '.join(lacking)}"
        if self.widths and not self.widths[0] <= call.width <= self.widths[1] or call.width % self.multiple:
            step = f" in steps of {self.multiple}" if self.multiple > 1 else ""
            least, most = self.widths or (self.multiple, "any number")
            return f"a width of {call.width}; it knows {least} to {most}{step}"
        if self.rows and not self.rows[0] <= call.rows <= self.rows[1]:
            return f"{call.rows} tokens; it is for {self.rows[0]} to {self.rows[1]}"
        return "" if self.gradient or not call.gradient else "it gives no gradient"


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. run: takes what the twin takes."""

    name: str
    run: Callable[..., Tensor]
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True)
class Op:
    """An op. twin: in plain torch, for every device and number format; backends: the fastest first."""

    twin: Callable[..., Tensor]
    backends: tuple[Backend, ...] = ()

    def capable(self, call: Call) -> list[Backend]:
        """The backends that can take a call, the fastest first; the twin is always the last of them."""
        return [b for b in self.backends if not b.needs.missing(call)] + [Backend(EAGER, self.twin)]

    def choose(self, call: Call) -> Backend:
        """The fastest backend that can take a call."""
        return self.capable(call)[0]


def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA GPU."""
    return torch.get_device_module(device).get_device_capability(device)


@cache
def cpu_features() -> dict:
    """What torch knows of the processor, by its names; empty for a torch that does not say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return dict(ask()) if ask else {}


@cache
def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _major(module: str) -> int:
    try:
        return int(version(module).split(".")[0])
    except (PackageNotFoundError, ValueError):
        return 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
