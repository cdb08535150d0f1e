"""StreamDecoder: pieces as latents come, bit-equal to one pass over the whole latent, in every order of making."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan.decode import DecodeWindow, decode_windows
from frame_memory.plan.sections import ORDERS
from frame_memory.video.decode import DecodeError, decode_stream
from frame_memory.video.stream import StreamDecoder, plan_pieces

from .test_video_decode import causal_decode, latents


def made_in(order: str, total: int, window: int, given_frames: int = 1) -> list[tuple[int, int]]:
    """Latent ranges in the order in which the sampler finishes them, by hand from the words of design.md."""
    starts = list(range(given_frames, total, window))
    if order == "inverted":
        starts = starts[::-1]
    elif order == "both ends first":
        starts = [starts[-1], *starts[:-1]]
    return [(0, given_frames), *((start, start + window) for start in starts)]


def whole(x, order, window, decode=causal_decode):
    return torch.cat(list(decode_stream(decode, x, decode_windows(order, x.shape[2], window))))


def assembled(pieces: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """The video out of its pieces in any order; fails where they overlap or leave a gap."""
    pieces = sorted(pieces, key=lambda piece: piece[0])
    for before, after in zip(pieces, pieces[1:]):
        assert before[1] == after[0]
    assert all(stop - start == len(frames) > 0 for start, stop, frames in pieces)
    return torch.cat([frames for _, _, frames in pieces])


def taken(iterator) -> list[tuple[int, int, torch.Tensor]]:
    return [(piece.start_frame, piece.stop_frame, piece.frames_THWC.clone()) for piece in iterator]


def decoder(x, order, window=9, decode=causal_decode, **options) -> StreamDecoder:
    return StreamDecoder(decode, order, x.shape[2], window, lambda a, b: x[:, :, a:b], **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sections", range(1, 8))
def test_equals_the_decode_of_the_whole_latent(order, sections):
    x = latents(9 * sections + 1)
    before, stream, got = x.clone(), decoder(x, order), []
    for start, stop in made_in(order, x.shape[2], 9):
        got += taken(stream.finished(start, stop))
    assert stream.done and list(stream.finished(0, x.shape[2])) == []
    assert torch.equal(assembled(got), whole(x, order, 9))
    assert torch.equal(x, before)
    assert sorted((a, b) for a, b, _ in got) == [(p.start_frame, p.stop_frame) for p in plan_pieces(order, x.shape[2])]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(ORDERS), st.integers(1, 7), st.integers(1, 7), st.integers(1, 20))
def test_any_length_window_history_and_order_of_arrival(data, order, window, sections, given_frames):
    total = given_frames + window * sections
    x = latents(total, channels=3, height=1, width=2)
    arrivals = data.draw(st.permutations(made_in(order, total, window, given_frames)))
    stream, got = decoder(x, order, window), []
    for start, stop in arrivals:
        got += taken(stream.finished(start, stop))
    assert stream.done and stream.frames == 4 * total - 3
    assert torch.equal(assembled(got), whole(x, order, window))


@pytest.mark.parametrize("order", ["forward", "inverted"])
def test_every_section_shows_something_new_at_once(order):
    """The first pixels come with the first section that can have any, then 36 frames a section."""
    x = latents(9 * 5 + 1)
    stream = decoder(x, order)
    new = [sum(b - a for a, b, _ in taken(stream.finished(*span))) for span in made_in(order, 46, 9)]
    # Forward: the start frame alone decodes nothing; section 1 makes 37 frames, 33 of which wait for the next blend.
    assert new == ([0, 4, 36, 36, 36, 69] if order == "forward" else [0, 0, 36, 36, 36, 73])


@pytest.mark.parametrize("order", ["forward", "inverted"])
def test_fault_05_pieces_and_edge_are_the_video_of_what_exists(order):
    """After a cancel the finished part shows all frames that were made, as if the video were only that long."""
    x = latents(9 * 5 + 1)
    stream, got = decoder(x, order), []
    assert stream.edge() is None
    for done, (start, stop) in enumerate(made_in(order, 46, 9)):
        got += taken(stream.finished(start, stop))
        edge = stream.edge()
        if done in (1, 2, 3, 4):
            low, high = (0, stop) if order == "forward" else (start, 46)
            windows = [w for w in decode_windows(order, 46) if low <= w.start and w.stop <= high]
            windows = [DecodeWindow(w.start - low, w.stop - low) for w in windows]
            now = assembled([*got, (edge.start_frame, edge.stop_frame, edge.frames_THWC)])
            assert torch.equal(now, torch.cat(list(decode_stream(causal_decode, x[:, :, low:high], windows))))
            assert len(now) == 4 * (high - low) - 3
    assert stream.done and stream.edge() is None
    assert torch.equal(assembled(got), whole(x, order, 9))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", range(6))
def test_fault_03_rebuilt_after_a_kill_it_makes_only_what_is_missing(order, kept):
    """The first `kept` pieces are on disk. The rest is equal, and one window more is decoded for its overlap."""
    x, decoded = latents(9 * 6 + 1), []

    def decode(part):
        decoded.append(part.shape[2])
        return causal_decode(part)

    pieces = list(plan_pieces(order, 55))
    pieces = pieces[::-1] if order == "inverted" else pieces
    expected = whole(x, order, 9)
    have = [(p.start_frame, p.stop_frame) for p in pieces[:kept]]
    stream = decoder(x, order, decode=decode, have=have)
    got = taken(stream.finished(0, 55))
    assert [(a, b) for a, b, _ in got] == [(p.start_frame, p.stop_frame) for p in pieces[kept:]]
    assert torch.equal(assembled(got + [(a, b, expected[a:b]) for a, b in have]), expected)
    missing = len(pieces) - kept
    # Inverted: the window made first has no piece of its own, so there is always one whose overlap is wanted.
    assert len(decoded) == (missing + bool(kept or order == "inverted") if missing else 0)


def test_a_torn_piece_in_the_middle_is_made_again():
    x = latents(9 * 6 + 1)
    pieces, expected = plan_pieces("forward", 55), whole(x, "forward", 9)
    have = [(p.start_frame, p.stop_frame) for i, p in enumerate(pieces) if i not in (2, 4)]
    got = taken(decoder(x, "forward", have=have).finished(0, 55))
    assert len(got) == 2 and all(torch.equal(frames, expected[a:b]) for a, b, frames in got)


@pytest.mark.parametrize("order", ORDERS)
def test_a_piece_is_decided_by_the_latents_it_names(order):
    """Other latents outside leave it bit-equal, so a re-rolled section spoils only the pieces that name it."""
    x = latents(9 * 4 + 1)
    expected = whole(x, order, 9)
    for piece in plan_pieces(order, 37):
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(99))
        other[:, :, piece.latent_start : piece.latent_stop] = x[:, :, piece.latent_start : piece.latent_stop]
        got = whole(other, order, 9)
        span = slice(piece.start_frame, piece.stop_frame)
        assert torch.equal(got[span], expected[span])


@pytest.mark.parametrize("order", ORDERS)
def test_fault_46_at_most_two_windows_of_pixels_are_alive(order):
    """Counted in frames over every storage of the decoder's, while all 12 sections arrive in one call."""
    alive: list[tuple[weakref.ref, int]] = []

    def decode(part):
        assert sum(frames for ref, frames in alive if ref() is not None) == 0, "an earlier window is still held"
        pixels = causal_decode(part)
        alive.append((weakref.ref(pixels.untyped_storage()), pixels.shape[1]))
        return pixels

    x = latents(109)
    stream, frames = decoder(x, order, decode=decode), 0
    for piece in stream.finished(0, 109):
        assert stream._kept is None or len(stream._kept[1]) <= 33
        if stream._kept is not None:
            assert stream._kept[1].untyped_storage().nbytes() == stream._kept[1].numel() * 4, "a view of a window"
        frames += len(piece.frames_THWC)
        del piece
    assert frames == 433


def test_fault_05_interruption_loses_no_piece():
    class Cancelled(BaseException):
        pass

    x, calls = latents(37), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    stream, got = decoder(x, "forward", interrupt=interrupt), []
    with pytest.raises(Cancelled):
        for piece in stream.finished(0, 37):
            got.append((piece.start_frame, piece.stop_frame, piece.frames_THWC.clone()))
    assert len(got) == 2
    got += taken(stream.finished(0, 0))
    assert torch.equal(assembled(got), whole(x, "forward", 9))


def test_a_decode_that_fails_can_be_tried_again():
    x, calls = latents(28), []

    def decode(part):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return causal_decode(part)

    for order in ORDERS:
        calls.clear()
        stream, got = decoder(x, order, decode=decode), []
        with pytest.raises(RuntimeError):
            for piece in stream.finished(0, 28):
                got.append((piece.start_frame, piece.stop_frame, piece.frames_THWC.clone()))
        got += taken(stream.finished(0, 0))
        assert torch.equal(assembled(got), whole(x, order, 9))


@pytest.mark.parametrize("order", ORDERS)
def test_the_shipped_vae_under_the_hosts_inference_mode(selftest_vae, order):
    x = latents(19, height=1, width=2)
    with torch.inference_mode():
        stream, got = decoder(x, order, decode=selftest_vae.decode), []
        for start, stop in made_in(order, 19, 9):
            got += taken(stream.finished(start, stop))
        expected = whole(x, order, 9, selftest_vae.decode)
    assert torch.equal(assembled(got), expected) and expected.std() > 0.02

    def decode(part):
        with torch.inference_mode():
            return selftest_vae.decode(part)

    assert torch.equal(assembled(taken(decoder(x, order, decode=decode).finished(0, 19))), expected)


def test_wrong_reports_and_shapes_are_refused():
    x = latents(19)
    with pytest.raises(DecodeError, match="0 to 20 were reported"):
        decoder(x, "forward").finished(0, 20)
    wrong = StreamDecoder(causal_decode, "forward", 19, 9, lambda a, b: x)
    with pytest.raises(DecodeError, match="0 to 10 came as"):
        list(wrong.finished(0, 19))
    with pytest.raises(DecodeError, match="Load VAE"):
        list(decoder(x, "forward", decode=lambda part: torch.zeros(1, 73, 8, 8, 3)).finished(0, 19))


@pytest.mark.parametrize("order", ["forward", "inverted"])
def test_a_clip_is_a_piece_of_its_own_whatever_the_order_of_arrival(order):
    """Each nine latent frames alone, none of the frame in front; after a restart nothing is decoded twice."""
    x, decoded = latents(9 * 4 + 1), []

    def decode(part):
        decoded.append(part.shape[2])
        return causal_decode(part)

    expected = torch.cat([causal_decode(part)[0] for part in x[:, :, 1:].split(9, dim=2)])
    have = [(33, 66)]
    stream, got = decoder(x, order, decode=decode, clips=True, have=have), []
    for start, stop in made_in(order, 37, 9):
        got += taken(stream.finished(start, stop))
        assert stream.edge() is None
    assert stream.done and stream.frames == 132 and decoded == [9, 9, 9]
    assert torch.equal(assembled([*got, (33, 66, expected[33:66])]), expected)
    pieces = [(p.latent_start, p.latent_stop) for p in plan_pieces(order, 37, clips=True)]
    assert pieces == made_in("forward", 37, 9)[1:]
    whole_once = torch.cat(list(decode_stream(causal_decode, x, decode_windows(order, 37, clips=True))))
    assert torch.equal(whole_once, expected)
