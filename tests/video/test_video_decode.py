"""decode_stream against the published order of decoding and blending, on a small decoder and on core's WanVAE."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan.decode import DecodeWindow
from frame_memory.video.decode import DecodeError, check_windows, crossfade_weights, decode_stream

from .reference import generation_order_windows, reference_video


def causal_decode(latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """A small causal decoder: 4n-3 frames, and pixels that depend on every earlier latent of the window."""
    batch, _, frames, height, width = latents_BCTHW.shape
    carried = torch.zeros(batch, 3, height, width)
    pixels = []
    for t in range(frames):
        carried = torch.tanh(0.7 * carried + latents_BCTHW[:, :3, t])
        # As in a causal VAE, the first latent of a window makes one frame.
        pixels += [carried * (1 - 0.05 * j) for j in range(1 if t == 0 else 4)]
    return (torch.stack(pixels, dim=1) * 0.5 + 0.5).movedim(2, -1)


def video_order(order: str, sections: int) -> list[DecodeWindow]:
    ranges = sorted(generation_order_windows(order, sections))
    return [DecodeWindow(a, b) for a, b in ranges]


def latents(frames: int, *, batch: int = 1, channels: int = 16, height: int = 4, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, channels, frames, height, width, generator=generator)


@pytest.mark.parametrize("order", ["inverted", "forward"])
@pytest.mark.parametrize("sections", range(1, 7))
def test_equals_generation_order(order, sections):
    x = latents(9 * sections + 1)
    expected = reference_video(causal_decode, x, order, sections)
    got = torch.cat(list(decode_stream(causal_decode, x, video_order(order, sections))))
    assert got.shape[0] == 36 * sections + 1
    assert torch.equal(got, expected)


@pytest.mark.parametrize("order", ["inverted", "forward"])
@pytest.mark.parametrize("sections", range(1, 7))
def test_equals_generation_order_with_the_real_vae(tiny_vae, order, sections):
    x = latents(9 * sections + 1, height=2, width=4)
    with torch.inference_mode():
        expected = reference_video(tiny_vae.decode, x, order, sections)
        got = torch.cat(list(decode_stream(tiny_vae.decode, x, video_order(order, sections))))
    assert got.shape == (36 * sections + 1, 16, 32, 3)
    assert got.std() > 0.05, "the random VAE must show something for this to mean anything"
    assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("order", ["inverted", "forward"])
@pytest.mark.parametrize("sections", range(1, 9))
def test_plan_gives_the_published_windows(order, sections):
    from frame_memory.plan.decode import decode_windows

    planned = decode_windows(order, 9 * sections + 1)
    assert [(w.start, w.stop) for w in planned] == sorted(generation_order_windows(order, sections))


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 80),
    order=st.sampled_from(["inverted", "forward", "both ends first"]),
    window=st.integers(1, 12),
)
def test_every_planned_window_list_can_be_decoded(total, order, window):
    """Any length (an existing video in front, trimmed latents) gives 4n-3 frames and passes the checks."""
    from frame_memory.plan.decode import decode_windows

    windows = decode_windows(order, total, window)
    check_windows(windows, total)
    x = latents(total, channels=3, height=1, width=1)
    assert sum(len(chunk) for chunk in decode_stream(causal_decode, x, windows)) == 4 * total - 3


def test_crossfade_weights_are_inclusive():
    w = crossfade_weights(33)
    assert w[0] == 1 and w[-1] == 0 and torch.allclose(w[16], torch.tensor(0.5))


def test_each_window_is_decoded_once_and_reported():
    seen, reported = [], []

    def decode(part):
        seen.append(part.shape[2])
        return causal_decode(part)

    x = latents(37)
    list(decode_stream(decode, x, video_order("forward", 4), on_window=lambda i, n: reported.append((i, n))))
    assert seen == [10, 18, 18, 18]
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_batch_of_two_is_decoded_item_by_item():
    x = latents(19, batch=2)
    windows = video_order("inverted", 2)
    for item in (0, 1):
        alone = torch.cat(list(decode_stream(causal_decode, x[item : item + 1], windows)))
        assert torch.equal(torch.cat(list(decode_stream(causal_decode, x, windows, item=item))), alone)
    with pytest.raises(DecodeError, match="holds 2 videos"):
        decode_stream(causal_decode, x, windows)
    with pytest.raises(DecodeError, match="Video 2 was asked for"):
        decode_stream(causal_decode, x, windows, item=2)


def test_at_most_two_windows_are_alive():
    alive: list[weakref.ref] = []
    most = 0

    def decode(part):
        nonlocal most
        gc.collect()
        # Whole windows still alive when the next one is made; the crossfaded tail is a copy of its own.
        most = max(most, sum(ref() is not None for ref in alive))
        pixels = causal_decode(part)
        alive.append(weakref.ref(pixels.untyped_storage()))
        return pixels

    frames = 0
    for chunk in decode_stream(decode, latents(73), video_order("forward", 8)):
        frames += chunk.shape[0]
        del chunk
    assert frames == 36 * 8 + 1
    assert most <= 1


def test_fault_05_interruption_acts_between_windows():
    """Cancel stops before the next window; the chunks already handed out are complete."""

    class Cancelled(BaseException):
        pass

    x, windows, calls = latents(37), video_order("forward", 4), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    got = []
    with pytest.raises(Cancelled):
        for chunk in decode_stream(causal_decode, x, windows, interrupt=interrupt):
            got.append(chunk)
    expected = reference_video(causal_decode, x, "forward", 4)
    got = torch.cat(got)
    assert len(calls) == 3 and len(got) > 0
    assert torch.equal(got, expected[: len(got)])


def test_inputs_are_not_mutated():
    x = latents(28)
    before = x.clone()
    produced = []

    def decode(part):
        pixels = causal_decode(part)
        produced.append((pixels, pixels.clone()))
        return pixels

    list(decode_stream(decode, x, video_order("inverted", 3)))
    assert torch.equal(x, before)
    assert all(torch.equal(now, then) for now, then in produced)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([], "No decode windows"),
        ([(0, 10)], "expected 0 to 19"),
        ([(0, 10), (10, 19)], "must begin inside window 0"),
        ([(0, 10), (1, 10), (9, 19)], "share latent frames"),
        ([(0, 19), (5, 5)], "cover latent frames 0 to 5"),
    ],
)
def test_bad_windows_are_refused_before_decoding(ranges, words):
    windows = [DecodeWindow(a, b) for a, b in ranges]
    with pytest.raises(DecodeError, match=words):
        decode_stream(lambda part: pytest.fail("decoded"), latents(19), windows)


def test_wrong_shapes_name_the_node():
    windows = video_order("forward", 1)
    with pytest.raises(DecodeError, match="5 dimensions"):
        decode_stream(causal_decode, torch.zeros(1, 16, 8, 8), windows)
    with pytest.raises(DecodeError, match="Load VAE"):
        list(decode_stream(lambda part: torch.zeros(1, 73, 8, 8, 3), latents(10), windows))
