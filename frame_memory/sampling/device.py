"""A device that is lost in the middle of a run: said as what it is, never taken for a lack of memory, never retried."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import comfy.model_management
import torch

# What CUDA, ROCm, Intel and Apple drivers say once a context is broken; every later call on the device fails too.
_LOST = re.compile(
    r"(CUDA|HIP|XPU|Metal|MPS)\w* (driver )?error|device-side assert|device (lost|removed)|unspecified launch failure|"
    r"illegal memory access|CU(BLAS|DNN|SPARSE|SOLVER)_STATUS|DEVICE_LOST|DXGI_ERROR_DEVICE",
    re.IGNORECASE,
)
_ACCELERATOR_ERROR: type = getattr(torch, "AcceleratorError", RuntimeError)


class DeviceLost(RuntimeError):
    """The GPU or its driver gave up; only a restart of ComfyUI brings it back."""


def device_lost(error: BaseException) -> bool:
    """Whether an error says that the device is broken for this process, as opposed to full."""
    if not isinstance(error, RuntimeError) or isinstance(error, DeviceLost) or comfy.model_management.is_oom(error):
        return False
    typed = isinstance(error, _ACCELERATOR_ERROR) and _ACCELERATOR_ERROR is not RuntimeError
    return typed or _LOST.search(str(error)) is not None


@contextlib.contextmanager
def named_if_lost(number: int, done: int, sections: int, kept: bool) -> Iterator[None]:
    """Around the work on one of `sections` sections: a lost device raises DeviceLost, with what is kept and to do.

    number: the section's place in the video; done: how many are finished; kept: whether they are in a project.
    """
    try:
        yield
    except RuntimeError as error:
        if not device_lost(error):
            raise
        there = (
            f"The {done} sections finished before it are safe on the disk: restart ComfyUI, then queue the "
            "same graph again, and it resumes there."
            if kept
            else "Restart ComfyUI, then queue again. A 'project' in 'Anti-Drift Sampler' would have kept what was done."
        )
        raise DeviceLost(
            f"The GPU or its driver failed while section {number} of {sections} was made, and nothing more "
            f"can run on it in this process. {there} If it happens again: update the driver, take back overclocking, "
            f"and take out the last node or LoRA that was added. Its words: {error}"
        ) from error
