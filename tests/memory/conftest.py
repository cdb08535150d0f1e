"""A tiny real FramePack-F1 MODEL whose transformer is that of tests/sampling, and a memory for it."""

from __future__ import annotations

import pytest
import torch

from frame_memory.model import checkpoint
from frame_memory.model.memory import FrameMemory, new_encoder, with_features_of

from .runs import TEXT, conditioning, of_kind, tiny_file  # noqa: F401 (a fixture)


def opened(memory: FrameMemory, gate: float = 0.5, seed: int = 11) -> FrameMemory:
    """Random numbers where a fresh encoder has zeros, and the gate open: as if it were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(memory.pack.named_parameters()):
            if name == "gate":
                value.fill_(gate)
            elif not value.any():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return memory


def anchored(memory: FrameMemory, seed: int = 1, picture: bool = True) -> FrameMemory:
    """With the features that 'MemoryPack Encoder' would read off the prompt."""
    return with_features_of(memory, prompt(seed, picture))[0]


class Seen:
    """What a CLIP vision node gives."""

    def __init__(self, seed: int, features: int = 1152):
        generator = torch.Generator().manual_seed(seed)
        self.last_hidden_state = torch.randn(1, 4, features, generator=generator)


def prompt(seed: int = 1, picture: bool = True, features: int = TEXT) -> list:
    made = conditioning(seed, features=features)
    if picture:
        made[0][1]["clip_vision_output"] = Seen(seed)
    return made


@pytest.fixture
def model(tiny_file):  # noqa: F811 (the fixture of that name)
    """FramePack F1."""
    return of_kind(checkpoint.load_framepack(str(tiny_file)), "F1", "HunyuanVideo")


@pytest.fixture
def memory(model):
    """An encoder with an open gate, anchored."""
    return anchored(opened(new_encoder(model)))
