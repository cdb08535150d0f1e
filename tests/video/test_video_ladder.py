"""DecodeLadder with core's real VAE class and real weights; what is injected is the error of a full memory."""

import copy

import comfy.model_management
import pytest
import torch

from frame_memory.plan.decode import decode_windows
from frame_memory.video.decode import DecodeError, decode_stream
from frame_memory.video.ladder import DecodeLadder, DecodeMemoryError, is_out_of_memory

OOM = comfy.model_management.OOM_EXCEPTION
WORDS = "CUDA out of memory. Tried to allocate 20.00 GiB."


class Tight(torch.nn.Module):
    """A decoder that runs out of memory above a number of latent pixels, as a GPU of that size would."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit, self.asked = model, limit, []

    def decode(self, z, **options):
        self.asked.append(tuple(z.shape[3:]))
        if z.shape[3] * z.shape[4] > self.limit:
            raise OOM(WORDS)
        return self.model.decode(z, **options)


def tight(vae, limit, device=None):
    """A VAE of the same weights in a small memory. `device` makes it say that it is not on the CPU already."""
    small = copy.copy(vae)
    if device is None:
        small.first_stage_model = Tight(vae.first_stage_model, limit)
    else:
        small.device = torch.device(device)

        def out_of_memory(shape, dtype):
            raise OOM(WORDS)

        # Asked for before anything is put on the device that this machine does not have.
        small.memory_used_decode = out_of_memory
    return small


def latent(frames=2, height=34, width=8):
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_with_enough_memory_nothing_is_said_and_nothing_changes(tiny_vae):
    said, x = [], latent()
    ladder = DecodeLadder(tiny_vae, said.append)
    before, attributes = x.clone(), set(vars(tiny_vae))
    assert torch.equal(ladder(x), tiny_vae.decode(x))
    assert said == [] and ladder.rung == "in one piece"
    assert torch.equal(x, before) and set(vars(tiny_vae)) == attributes


def test_fault_02_core_tiles_come_second_and_are_announced(tiny_vae):
    said, x = [], latent()
    small = tight(tiny_vae, 32 * 8)
    ladder = DecodeLadder(small, said.append)
    pixels = ladder(x)
    expected = tiny_vae.decode_tiled(x, tile_x=32, tile_y=32, overlap=8)
    assert torch.equal(pixels, expected) and pixels.shape == (1, 5, 272, 64, 3)
    assert len(said) == 1 and "Out of memory while 2 latent frames were decoded in one piece" in said[0]
    assert "in tiles of 256 pixels" in said[0] and ladder.rung == "in tiles of 256 pixels"


def test_fault_02_then_smaller_tiles(tiny_vae):
    said = []
    small = tight(tiny_vae, 16 * 8)
    pixels = DecodeLadder(small, said.append)(latent())
    assert pixels.shape == (1, 5, 272, 64, 3) and bool(torch.isfinite(pixels).all())
    assert [text.split("decoding again ")[1].split(",")[0] for text in said] == [
        "in tiles of 256 pixels",
        "in tiles of 128 pixels",
    ]
    # A VAE looks beyond a tile's border, so tiles are near, not equal.
    assert (pixels - tiny_vae.decode(latent())).abs().mean() < 0.1


def test_fault_02_then_the_cpu_with_the_same_pixels(tiny_vae):
    said, x = [], latent(height=4, width=6)
    ladder = DecodeLadder(tight(tiny_vae, 0, device="mps"), said.append)
    pixels = ladder(x)
    assert len(said) == 3 and "decoding again on the CPU" in said[-1] and ladder.rung == "on the CPU"
    assert torch.allclose(pixels, tiny_vae.decode(x), atol=1e-5)


def test_fault_02_the_shipped_vae_on_the_cpu(selftest_vae):
    x = latent(height=2, width=2)
    pixels = DecodeLadder(tight(selftest_vae, 0, device="mps"), lambda text: None)(x)
    assert torch.allclose(pixels, selftest_vae.decode(x), atol=1e-5)


def test_fault_02_the_rung_that_worked_is_kept(tiny_vae):
    """Six windows run out of memory once, not six times, and only change their look once."""
    said, x = [], latent(28, 5, 5)
    small = tight(tiny_vae, 0, device="mps")
    ladder = DecodeLadder(small, said.append)
    video = torch.cat(list(decode_stream(ladder, x, decode_windows("forward", 28))))
    assert len(said) == 3 and video.shape == (109, 40, 40, 3)


def test_fault_02_when_nothing_fits_the_error_says_what_was_tried(tiny_vae):
    small = tight(tiny_vae, 0)
    with pytest.raises(DecodeMemoryError) as error:
        DecodeLadder(small, lambda text: None)(latent())
    text = str(error.value)
    for words in ("in one piece", "in tiles of 256 pixels", "in tiles of 128 pixels", WORDS, "GB are free"):
        assert words in text
    assert "on the CPU" not in text, "it is there already"
    assert "nothing is sampled again" in text and "Load VAE" in text
    assert error.value.__cause__ is None and small.first_stage_model.asked[0] == (34, 8)


def test_other_errors_pass_through_at_once(tiny_vae):
    class Broken(Tight):
        def decode(self, z, **options):
            raise ValueError("a bug")

    broken = copy.copy(tiny_vae)
    broken.first_stage_model = Broken(tiny_vae.first_stage_model, 0)
    with pytest.raises(ValueError, match="a bug"):
        DecodeLadder(broken, lambda text: pytest.fail(text))(latent())


def test_the_pixels_of_every_rung_are_checked(tiny_vae):
    class Short(Tight):
        def decode(self, z, **options):
            return super().decode(z, **options)[:, :, :, : 8 * z.shape[3] - 8]

    short = copy.copy(tiny_vae)
    short.first_stage_model = Short(tiny_vae.first_stage_model, 10**9)
    with pytest.raises(DecodeError, match="in one piece, a latent of 8x34 became 64x264 pixels, expected 64x272"):
        DecodeLadder(short, lambda text: None)(latent())
    for shape, words in (((1, 4, 272, 64, 3), r"expected \[1, 5"), ((1, 5, 264, 64, 3), "in tiles of 256 pixels")):
        small = tight(tiny_vae, 0)
        small.decode_tiled = lambda *args, shape=shape, **options: torch.zeros(shape)
        with pytest.raises(DecodeError, match=words):
            DecodeLadder(small, lambda text: None)(latent())


def test_a_vae_of_another_kind_has_fewer_rungs():
    class Other:
        def decode(self, latents):
            raise OOM(WORDS)

    with pytest.raises(DecodeMemoryError, match="out of memory in one piece"):
        DecodeLadder(Other(), lambda text: pytest.fail(text))(latent())


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (OOM(WORDS), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, memory):
    assert is_out_of_memory(error) is memory
