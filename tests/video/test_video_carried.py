"""CarriedDecoder with core's real WanVAE against core's own decode of the whole video."""

import copy
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import pytest
import torch

from frame_memory.plan.decode import decode_windows
from frame_memory.video.carried import REACH, CarriedDecoder, can_carry, steps
from frame_memory.video.decode import DecodeError, decode_stream
from frame_memory.video.ladder import DecodeMemoryError

from .reference import wan_state_dict
from .test_video_ladder import OOM, WORDS


def tight_decoder(vae, limit, device=None):
    """A VAE of the same weights in a small memory, whose decoder fails above a number of latent pixels, near its end.

    By then half of the state has been replaced. `device` makes it say that it is not on the CPU already.
    """
    small = copy.copy(vae)
    model = copy.copy(vae.first_stage_model)
    model._modules = dict(model._modules)
    decoder = copy.copy(model.decoder)
    run = decoder.run_up

    def run_up(layer, x, cache, index, out):
        if layer == len(decoder.upsamples) and x[0].shape[3] * x[0].shape[4] > 64 * limit:
            raise OOM(WORDS)
        return run(layer, x, cache, index, out)

    decoder.run_up = run_up
    model._modules["decoder"] = decoder
    small.first_stage_model = model
    if device is not None:
        small.device = torch.device(device)
    return small


def latent(frames, height=4, width=6, seed=1):
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def vae(request):
    return comfy.sd.VAE(sd=wan_state_dict(4), dtype=request.param)


@pytest.mark.parametrize("frames", [1, 2, 3, 12, 21])
def test_the_pixels_are_those_of_one_pass_bit_for_bit(vae, frames):
    x = latent(frames)
    before = x.clone()
    chunks = list(CarriedDecoder(vae).stream(x))
    assert [len(c) for c in chunks[:2]] == [1, *([8] if frames > 2 else [4] * (frames - 1))][:2]
    assert len(chunks) == steps(frames) and all(c.dtype == torch.float32 for c in chunks)
    assert torch.equal(torch.cat(chunks), vae.decode(x)[0].float()) and torch.equal(x, before)


def test_the_shipped_vae_agrees_with_one_pass_where_windows_do_not(selftest_vae):
    x = latent(28, 3, 3)
    whole = selftest_vae.decode(x)[0]
    carried = torch.cat(list(CarriedDecoder(selftest_vae).stream(x)))
    windowed = torch.cat(list(decode_stream(selftest_vae.decode, x, decode_windows("forward", 28))))
    assert (carried - whole).abs().max() < 1e-5, "at some sizes the CPU rounds two frames and many in another way"
    assert (windowed - whole).abs().max() > 1 / 255, "the crossfade is what carried state does without"


@pytest.mark.parametrize("cuts", [(0, 10, 19, 28), (0, 1, 2, 3, 4, 5, 28), (0, 3, 3, 6, 28)])
def test_the_state_survives_between_calls(tiny_vae, cuts):
    """As sections come from a sampler, and one latent frame at a time, which core itself never does."""
    x, decoder = latent(28), CarriedDecoder(tiny_vae)
    chunks = [c for a, b in zip(cuts, cuts[1:]) for c in decoder.stream(x[:, :, a:b])]
    assert decoder.frames == 28
    assert torch.allclose(torch.cat(chunks), tiny_vae.decode(x)[0], atol=1e-5)


def test_another_decoder_may_take_over_after_the_reach(tiny_vae):
    x = latent(REACH + 4, 2, 2)
    tail = torch.cat(list(CarriedDecoder(tiny_vae).stream(x[:, :, 1:])))
    assert torch.allclose(tail[-12:], tiny_vae.decode(x)[0, -12:], atol=1e-5)
    assert not torch.allclose(tail[:12], tiny_vae.decode(x)[0, 4:16], atol=1e-2), "the state does matter"


def test_a_source_is_read_a_few_frames_at_a_time(tiny_vae):
    x, asked = torch.cat([latent(9, seed=2), latent(9, seed=3)]), []

    def frames(item, start, stop):
        asked.append((item, start, stop))
        return x[item : item + 1, :, start:stop]

    source = SimpleNamespace(shape=tuple(x.shape), frames=frames)
    chunks = list(CarriedDecoder(tiny_vae).stream(source, item=1))
    assert torch.equal(torch.cat(chunks), tiny_vae.decode(x[1:])[0])
    assert asked == [(1, 0, 1), *((1, a, a + 2) for a in range(1, 9, 2))]


def test_fault_02_out_of_memory_goes_down_the_ladder_without_losing_the_state(tiny_vae):
    """The first three latent frames fit in one piece, then memory is gone: tiles go on from the same state."""
    x, said = latent(7, 34, 6), []
    decoder = CarriedDecoder(tiny_vae, said.append)
    chunks = list(decoder.stream(x[:, :, :3]))
    small = tight_decoder(tiny_vae, 16 * 6)
    decoder._vae = small
    chunks += decoder.stream(x[:, :, 3:])
    assert [text.split("decoding again ")[1].split(",")[0] for text in said] == [
        "in tiles of 256 pixels",
        "in tiles of 128 pixels",
    ]
    whole, got = tiny_vae.decode(x)[0], torch.cat(chunks)
    assert torch.equal(got[:9], whole[:9])
    # Tiles see neither beyond their border nor, in the attention, the whole picture: near, not equal. Without the
    # carried state they would be as far off as another video.
    fresh = torch.cat(list(CarriedDecoder(tiny_vae).stream(x[:, :, 3:])))
    off = (got[9:] - whole[9:]).abs().mean()
    assert off < 0.1 and off < 0.5 * (fresh[-12:] - whole[-12:]).abs().mean()


def test_fault_02_large_enough_tiles_are_the_whole_picture(tiny_vae):
    """A picture smaller than a tile: every rung makes the same pixels, the CPU's too."""
    x, said = latent(6), []
    gone = tight_decoder(tiny_vae, 0, device="mps")

    def out_of_memory(shape, dtype):
        raise OOM(WORDS)

    gone.memory_used_decode = out_of_memory  # before anything goes to the device that this machine does not have
    decoder = CarriedDecoder(gone, said.append)
    assert torch.allclose(torch.cat(list(decoder.stream(x))), tiny_vae.decode(x)[0], atol=1e-5)
    assert len(said) == 3 and decoder.rung == "in tiles of 128 pixels on the CPU"


def test_fault_02_a_step_that_fits_nowhere_leaves_the_state(tiny_vae):
    x = latent(9)
    decoder = CarriedDecoder(tiny_vae, lambda _: None)
    chunks = list(decoder.stream(x[:, :, :5]))
    decoder._vae = tight_decoder(tiny_vae, 0)
    with pytest.raises(DecodeMemoryError, match="in one piece.*in tiles of 128"):
        list(decoder.stream(x[:, :, 5:]))
    decoder._vae = tiny_vae
    chunks += decoder.stream(x[:, :, 5:])
    assert torch.equal(torch.cat(chunks), tiny_vae.decode(x)[0])


def test_cancel_stops_before_the_next_step(tiny_vae):
    stop, calls = comfy.model_management.InterruptProcessingException(), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise stop

    made = []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        made.extend(len(c) for c in CarriedDecoder(tiny_vae).stream(latent(9), interrupt=interrupt))
    assert len(calls) == 3


def test_only_a_causal_vae_whose_pixels_are_pixels_is_taken(tiny_vae, selftest_vae):
    assert can_carry(tiny_vae) and can_carry(selftest_vae) and not can_carry(None)
    doubled = copy.copy(tiny_vae)
    doubled.output_channels = 12
    assert not can_carry(doubled)


def test_pixels_of_a_wrong_count_are_refused(tiny_vae):
    wrong = copy.copy(tiny_vae)
    wrong.process_output = lambda pixels: pixels[:, :, :-1]
    with pytest.raises(DecodeError, match=r"expected \[1, 1,"):
        list(CarriedDecoder(wrong).stream(latent(2)))
