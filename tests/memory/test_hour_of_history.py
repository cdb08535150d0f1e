"""A long history takes the memory of a short one: bytes of tensors, counted while real videos are made and read."""

from __future__ import annotations

import comfy.samplers
import numpy as np
import pytest
import torch

from benchmarks.memory_cost import Held
from frame_memory.model import tensor_file
from frame_memory.model.preserved_memory import attach_preserved, with_tokens
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.retrieve import retrieve_frame
from frame_memory.sampling.stored import open_stored
from frame_memory.sampling.unipc import sample_framepack_unipc
from frame_memory.video.history import encode_stream

from .runs import conditioning, run
from .small import Pixels, drawn
from .test_preserved_run import memory  # noqa: F401 (a fixture)

SECTION = 1.2  # seconds
FRAME = 16 * 6 * 10 * 4  # bytes of a latent frame
TOKENS = 1 * 2 * 128 * 4 // 2  # bytes of its tokens, of which 1x2 stand for two frames


def held(action, *given) -> int:
    """The most bytes of tensors that there were at once while `action` ran, mapped files apart."""
    with Held() as counted:
        action(*given)
    return counted.peak


def film(model, memory, sections: int, folder=None, **more):  # noqa: F811
    if folder is not None:
        more["project"] = ProjectRequest(folder, "p", "reuse what fits")
    sampler = comfy.samplers.KSAMPLER(sample_framepack_unipc)
    return run(attach_preserved(model, memory), sampler=sampler, memory=memory, seconds=SECTION * sections, steps=1,
               **more)  # fmt: skip


def test_a_long_video_is_made_and_found_again_in_the_memory_of_a_short_one(model, memory, tmp_path):  # noqa: F811
    """Past the budget nothing grows; before it only the tokens do. Without a project the LATENT itself is in memory."""

    def grown(tokens: int, kept: bool = True) -> list[int]:
        """Bytes that 10 sections take more than 8 when they are made, and when they are found in the project."""
        taken = []
        for sections in (8, 10):
            folder = tmp_path / f"{tokens}-{sections}" if kept else None
            taken.append([held(film, model, with_tokens(memory, tokens), sections, folder) for _ in "12"])
        return [long - less for less, long in zip(*taken, strict=True)]

    assert grown(60) == [0, 0]
    assert grown(10_000)[1] == 2 * 9 * TOKENS
    assert grown(60, kept=False) == [2 * 9 * FRAME] * 2


def mapped(path, frames: int, turned: bool) -> torch.Tensor:
    """An existing video `[1, 16, T, 6, 10]` in a file, as it lies there or with its axes turned."""
    if not path.exists():
        video = drawn(1, 16, frames, 6, 10)
        tensor_file.write(str(path), {"x": video.permute(2, 0, 1, 3, 4) if turned else video}, {})
        del video
    found = tensor_file.read_header(str(path))[0]["x"].mapped()
    return found.permute(1, 2, 0, 3, 4) if turned else found


@pytest.mark.parametrize("turned", [False, True])
def test_an_existing_video_in_a_file_is_never_held(model, memory, tmp_path, monkeypatch, turned):  # noqa: F811
    """Pieces as small against these videos as the true ones against an hour."""
    monkeypatch.setattr(tensor_file, "PIECE", 8 * FRAME)
    small = with_tokens(memory, 60)

    def ask(latents: dict, frames: int, root) -> None:
        with torch.inference_mode():
            retrieve_frame(
                model=attach_preserved(model, small), memory=small, positive=conditioning(), latent=latents,
                vae=Pixels(), seconds=frames * 4 / 30 - 1, steps=1, seed=0,
            )  # fmt: skip

    def go_on(latents: dict, frames: int, root) -> None:
        film(model, small, 2, root, history=latents)

    def taken(action, frames: int, root) -> int:
        path = tmp_path / f"{frames}.safetensors"
        mapped(path, frames, turned)
        return held(lambda: action({"samples": mapped(path, frames, turned)}, frames, root))

    def opened(latents: dict, frames: int, root) -> None:
        open_stored(root, "p")

    taken(ask, 94, None)  # what is fetched once
    for action in (ask, go_on, go_on, opened):  # a project is made, then found; both past the budget
        short, long = (taken(action, frames, tmp_path / str(frames)) for frames in (94, 202))
        assert short == long, action
    assert taken(lambda latents, frames, root: latents["samples"].clone(), 202, None) == 202 * FRAME


def test_latents_of_an_existing_video_are_held_once():
    """A LATENT is whole by its nature; a second one while it is put together is not."""

    class Wide:
        """The interface of core's VAE.encode, with more numbers than its pixels."""

        def encode(self, pixels):
            return torch.zeros(1, 16, (len(pixels) + 3) // 4, 6, 10)

    def read(frames: int) -> None:
        encode_stream(Wide(), (np.zeros((1, 1, 1, 3), np.uint8) for _ in range(4 * frames - 3)), frames)

    assert held(read, 300) - held(read, 100) == 200 * FRAME
