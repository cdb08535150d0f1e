"""Existing videos as people have them: read back frame by frame, with files that say which frame is which."""

import struct
import tracemalloc

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan.errors import PlanError
from frame_memory.video.history import bucket_size, encode_stream, latent_frames_of, read_video
from frame_memory.video.images import to_bucket
from frame_memory.video.segments import join_segments, write_segment
from frame_memory.video.source import HistoryError, grid_frames, probe_video
from frame_memory.video.stream import Piece

from .odd_videos import is_upright, number_of, numbered_frame, pitch_of, read_sound, write_video
from .test_video_writer import moving_frames

STEADY = [round(1000 * i / 30) for i in range(60)]
UNEVEN = [0, 33, 66, 150, 160, 400, 433, 466, 700, 1000, 1033]


def shown_at(times_ms: list[int], k: int, fps: float) -> int:
    """Which frame a player has on screen a quarter of a frame into output frame k."""
    now = (k + 0.25) / fps * 1000 + times_ms[0]
    return max(i for i, time in enumerate(times_ms) if time <= now or i == 0)


def numbers(facts, wanted=None, **options) -> list[int]:
    options.setdefault("size", (96, 64))
    return [number_of(frame) for chunk in read_video(facts, wanted, **options) for frame in chunk]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
@pytest.mark.parametrize("fps", [30, 24, 12.5, 60])
def test_fault_26_variable_frame_rate_is_put_on_a_constant_rate_by_its_times(tmp_path, name, fps):
    facts = probe_video(write_video(tmp_path / name, UNEVEN))
    assert facts.variable and facts.frames == len(UNEVEN) and any("Variable frame rate" in n for n in facts.notes)
    assert facts.seconds == pytest.approx(1.066, abs=0.02)
    total = grid_frames(facts, fps)
    assert total == round(facts.seconds * fps)
    assert numbers(facts, fps=fps) == [shown_at(UNEVEN, k, fps) for k in range(total)]


@settings(max_examples=25, deadline=None)
@given(gaps=st.lists(st.integers(5, 300), min_size=1, max_size=30), offset=st.integers(0, 500), fps=st.integers(8, 60))
def test_fault_26_any_times_any_rate(tmp_path_factory, gaps, offset, fps):
    times = [offset + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    path = tmp_path_factory.mktemp("vfr") / "a.mkv"
    facts = probe_video(write_video(path, times, options={"preset": "ultrafast"}))
    total = grid_frames(facts, fps)
    assert numbers(facts, fps=fps) == [shown_at(times, k, fps) for k in range(total)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_steady_file_is_read_one_to_one(tmp_path, name):
    """Matroska rounds 33.3 ms to 33 and 34; no frame may be doubled or lost by that."""
    facts = probe_video(write_video(tmp_path / name, STEADY))
    assert not facts.variable and facts.notes == () and facts.audio is None
    assert facts.fps == pytest.approx(30, abs=0.1) and facts.seconds == pytest.approx(2, abs=0.01)
    assert numbers(facts) == list(range(60))
    assert numbers(facts, fps=15) == list(range(0, 60, 2))


def matrix_of(path) -> tuple[int, int, int, int]:
    """a, b, c, d of the picture's transformation in the track header, as ISO 14496-12 section 8.3.2 stores it."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4
    values = struct.unpack(">9i", data[at + 40 : at + 76])
    return tuple(round(v / 65536) for v in (values[0], values[1], values[3], values[4]))


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_fault_26_rotation_is_applied(tmp_path, rotation, size):
    """What is stored is the upright picture turned back by the matrix of the file: x' = ax + cy, y' = bx + dy."""
    path = write_video(tmp_path / "probe.mp4", [0, 33], rotation=rotation, size=size)
    a, b, _, d = matrix_of(path)
    # y points down, so (0, 1, -1, 0) turns the stored picture clockwise, as a phone held upright writes it.
    clockwise = {(0, 1): 1, (-1, 0): 2, (0, -1): 3}[a, b]
    assert (d == 0) == (clockwise in (1, 3))
    upright = size if clockwise == 2 else size[::-1]
    stored = [np.ascontiguousarray(np.rot90(numbered_frame(i, *upright), clockwise)) for i in range(5)]
    times = [33 * i for i in range(5)]
    facts = probe_video(write_video(tmp_path / "a.mp4", times, rotation=rotation, size=size, frames=stored))
    assert (facts.width, facts.height) == upright and any("Turned upright" in note for note in facts.notes)
    frames = np.concatenate(list(read_video(facts, size=upright)))
    assert [number_of(frame) for frame in frames] == [0, 1, 2, 3, 4] and all(is_upright(frame) for frame in frames)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p10le"), ("ffv1", "yuv444p12le")])
def test_fault_26_ten_bit_is_read_and_said(tmp_path, codec, pix_fmt):
    path = tmp_path / "a.mkv"
    facts = probe_video(write_video(path, STEADY[:9], codec=codec, pix_fmt=pix_fmt))
    bits = 10 if "10" in pix_fmt else 12
    assert facts.bits == bits and f"{bits} bits a colour are rounded to 8." in facts.notes
    frames = np.concatenate(list(read_video(facts, size=(96, 64))))
    assert [number_of(frame) for frame in frames] == list(range(9)) and all(is_upright(frame) for frame in frames)
    assert np.abs(frames[3, 40:56, 8:40].astype(int) - (200, 30, 30)).mean() < 5


@pytest.mark.parametrize(
    ("size", "codec", "pix_fmt"),
    [((95, 63), "ffv1", "yuv420p"), ((97, 33), "libx264", "yuv444p"), ((31, 97), "ffv1", "bgr0")],
)
def test_fault_26_odd_sizes_fit_the_bucket(tmp_path, size, codec, pix_fmt):
    facts = probe_video(write_video(tmp_path / "a.mkv", STEADY[:5], size=size, codec=codec, pix_fmt=pix_fmt))
    assert (facts.width, facts.height) == size
    width, height = bucket_size(facts, 64)
    assert width % 16 == height % 16 == 0
    chunks = list(read_video(facts, size=(width, height)))
    assert chunks[0].shape == (5, height, width, 3) and chunks[0].dtype == np.uint8 and is_upright(chunks[0][0])


def test_the_resize_is_the_one_of_the_start_image(tmp_path):
    facts = probe_video(write_video(tmp_path / "a.mkv", STEADY[:2], size=(100, 90), codec="ffv1", pix_fmt="bgr0"))
    frame = next(read_video(facts, size=(64, 48)))[0]
    expected, _ = to_bucket(torch.from_numpy(numbered_frame(0, 100, 90)[None]).float() / 255, 64, 48)
    assert (expected[0].mul(255).round().to(torch.uint8).numpy() == frame).all()
    with pytest.raises(PlanError, match="96x64.*Video History"):
        read_video(facts, size=(97, 64))


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), mode="w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        frame = av.VideoFrame.from_ndarray(numbered_frame(5, 48, 64), format="rgb24").reformat(format="yuv420p")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    facts = probe_video(path)
    assert (facts.width, facts.height, facts.pixel_aspect) == (96, 64, 2)
    assert numbers(facts) == [5]


def test_fault_26_a_file_without_duration_or_times_is_read(tmp_path):
    live = write_video(tmp_path / "live.mkv", STEADY, container_options={"live": "1"})
    with av.open(str(live)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    facts = probe_video(live)
    assert facts.seconds == pytest.approx(2, abs=0.01)
    assert numbers(facts) == list(range(60))
    assert numbers(facts, range(45, 60)) == list(range(45, 60))
    raw = probe_video(write_video(tmp_path / "raw.h264", STEADY))
    assert not raw.timed and raw.frames == 60 and "no times" in raw.notes[0]
    assert numbers(raw, fps=raw.fps) == list(range(60))
    assert numbers(raw, range(55, 60), fps=raw.fps) == [55, 56, 57, 58, 59]


def test_a_file_that_begins_late_or_is_fragmented_begins_at_its_first_picture(tmp_path):
    late = probe_video(write_video(tmp_path / "a.mkv", [1500 + time for time in STEADY]))
    assert late.origin == pytest.approx(1.5, abs=0.01) and late.seconds == pytest.approx(2, abs=0.01)
    assert numbers(late) == list(range(60))
    parts = {"movflags": "frag_keyframe+empty_moov"}
    fragmented = probe_video(write_video(tmp_path / "b.mp4", STEADY, container_options=parts))
    assert numbers(fragmented) == list(range(60))


def test_a_part_of_the_video(tmp_path):
    times = [round(1000 * i / 30) for i in range(200)]
    facts = probe_video(write_video(tmp_path / "a.mp4", times, options={"g": "25"}))
    assert grid_frames(facts, 30) == 200 and grid_frames(facts, 15) == 100
    assert numbers(facts, range(15)) == list(range(15))
    assert numbers(facts, range(170, 200)) == list(range(170, 200))
    assert numbers(facts, range(77, 93)) == list(range(77, 93)), "sought to the middle of a group of pictures"
    assert numbers(facts, range(85, 100), fps=15) == list(range(170, 200, 2))


def test_colours_come_by_the_files_own_tags(tmp_path):
    """The same picture tagged BT.709 limited, BT.601 full and untagged; each read as it was meant."""
    from av.video.reformatter import ColorRange, Colorspace

    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    picture[:] = (200, 60, 30)
    for matrix, tag, full in (
        (Colorspace.ITU709, 1, False),
        (Colorspace.ITU601, 6, True),
        (Colorspace.ITU601, 2, False),
    ):
        path = tmp_path / f"{tag}.mkv"
        with av.open(str(path), mode="w") as out:
            stream = out.add_stream("ffv1", rate=30)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
            stream.codec_context.colorspace = tag
            span = ColorRange.JPEG if full else ColorRange.MPEG
            stream.codec_context.color_range = span
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv444p", dst_colorspace=matrix, dst_color_range=span, src_color_range=ColorRange.JPEG
            )
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                out.mux(packet)
        got = next(read_video(probe_video(path), size=(96, 64)))[0]
        assert np.abs(got.astype(int) - picture).max() <= 3, tag


def test_memory_does_not_grow_with_the_length(tmp_path):
    """Bytes that Python and numpy hold at most while 60 and while 600 frames are read."""
    peaks = {}
    for count in (60, 600):
        times = [round(1000 * i / 30) for i in range(count)]
        path = write_video(tmp_path / f"{count}.mp4", times, options={"preset": "ultrafast"})
        facts = probe_video(path)
        next(read_video(facts, range(2)))
        tracemalloc.start()
        frames = 0
        for chunk in read_video(facts, size=(96, 64)):
            frames += len(chunk)
            del chunk
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert frames == count
    assert peaks[600] < peaks[60] + 200_000 < 2_000_000


def test_fault_32_sound_of_the_source_is_offered_with_the_exact_length(tmp_path):
    source = write_video(tmp_path / "in.mp4", STEADY, audio_seconds=2)
    facts = probe_video(source)
    assert (facts.audio.codec, facts.audio.rate, facts.audio.channels) == ("aac", 44100, 1)
    track = facts.sound(15 / 30, 60 / 30)
    assert track.seconds == pytest.approx(1.5, abs=0.01)
    made = [write_segment(tmp_path / "s", Piece(0, 60, moving_frames(60)), 30)]
    join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30, audio=track)
    samples, rate, _ = read_sound(tmp_path / "a.mp4")
    # The pitch changes 1 s into the source, so half a second into what was taken.
    assert pitch_of(samples[3000 : rate // 2 - 500], rate) == pytest.approx(440, abs=5)
    assert pitch_of(samples[rate // 2 + 500 : rate], rate) == pytest.approx(1000, abs=5)
    assert facts.sound(1, 1) is None


def test_fault_32_sound_that_cannot_be_read_is_said_to_be_left_out(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, STEADY[:30], audio_seconds=1)
    # Another codec's name over the sound's sample entry: the packets are there, but nobody can decode them.
    path.write_bytes(path.read_bytes().replace(b"mp4a", b"zzzz").replace(b"esds", b"zzzz"))
    facts = probe_video(path)
    assert facts.audio is None and any("sound" in note and "left out" in note for note in facts.notes)
    assert numbers(facts) == list(range(30))


def test_bad_files_are_named_with_libavs_words(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(HistoryError, match="text.mp4 cannot be opened.*Invalid data.*Video History"):
        probe_video(tmp_path / "text.mp4")
    with pytest.raises(HistoryError, match="No such file"):
        probe_video(tmp_path / "none.mp4")
    with av.open(str(tmp_path / "sound.m4a"), mode="w", format="mp4") as out:
        from .odd_videos import mux_tone

        mux_tone(out, out.add_stream("aac", rate=44100, layout="mono"), 0.5)
    with pytest.raises(HistoryError, match="holds audio, but no video"):
        probe_video(tmp_path / "sound.m4a")


def test_a_file_cut_short_gives_what_is_there(tmp_path):
    """A recording that was killed: Matroska's clusters stay readable up to the cut."""
    whole = write_video(tmp_path / "a.mkv", STEADY, codec="ffv1", pix_fmt="yuv420p").read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole[: len(whole) // 2])
    facts = probe_video(tmp_path / "b.mkv")
    assert 10 < facts.frames < 60
    got = numbers(facts)
    assert got[: facts.frames - 2] == list(range(facts.frames - 2))


def test_fault_05_reading_can_be_interrupted(tmp_path):
    class Cancelled(BaseException):
        pass

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    facts = probe_video(write_video(tmp_path / "a.mp4", STEADY))
    got = 0
    with pytest.raises(Cancelled):
        for chunk in read_video(facts, size=(96, 64), interrupt=interrupt):
            got += len(chunk)
    assert got == 24


class CausalEncoder:
    """A stand-in with the interface of core's VAE.encode: latent k is the mean of its pixels plus what went before."""

    def __init__(self):
        self.asked = []

    def encode(self, pixels_THWC):
        self.asked.append(len(pixels_THWC))
        assert len(pixels_THWC) % 4 == 1 and pixels_THWC.dtype == torch.float32
        groups = [pixels_THWC[:1], *(pixels_THWC[i : i + 4] for i in range(1, len(pixels_THWC), 4))]
        carried, out = torch.zeros(1), []
        for group in groups:
            carried = 0.3 * carried + group.mean()
            out.append(carried.clone())
        return torch.stack(out).view(1, 1, -1, 1, 1).expand(1, 16, -1, 2, 2)


def chunks_of(count, size=7, seed=0):
    frames = np.random.default_rng(seed).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    return frames, [frames[i : i + size] for i in range(0, count, size)]


def test_long_histories_are_encoded_in_causal_groups():
    vae = CausalEncoder()
    pixels, chunks = chunks_of(4 * 50 - 3)
    latents = encode_stream(vae, iter(chunks), 50)
    assert vae.asked[0] == 73 and max(vae.asked) == 73 and all(count % 4 == 1 for count in vae.asked)
    assert torch.allclose(latents, CausalEncoder().encode(torch.from_numpy(pixels).float() / 255), atol=1e-5)


def test_the_shipped_vae_in_groups_is_near_to_one_pass(selftest_vae):
    """29 latent frames: 19 and then 10 more behind a run-up of 12."""
    small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    base = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")[0].permute(1, 2, 0)
    frames = torch.stack([base.roll((2 * i // 3, i), (0, 1)) for i in range(4 * 29 - 3)])
    pixels = frames.mul(255).round().to(torch.uint8).numpy()
    with torch.inference_mode():
        whole = selftest_vae.encode(torch.from_numpy(pixels).float() / 255)
        groups = encode_stream(selftest_vae, [pixels], 29)
    assert groups.shape == whole.shape == (1, 16, 29, 2, 2)
    assert torch.equal(groups[:, :, :19], whole[:, :, :19])
    assert (groups - whole).abs().max() < 0.002 * whole.std()


def test_a_vae_for_pictures_and_empty_videos_are_refused(tmp_path):
    class Pictures:
        def encode(self, pixels):
            return torch.zeros(len(pixels), 4, 2, 2)

    with pytest.raises(HistoryError, match="Load VAE"):
        encode_stream(Pictures(), chunks_of(9)[1], 2)
    with pytest.raises(HistoryError, match="ended after 0 frames, 5 were expected"):
        encode_stream(CausalEncoder(), [], 2)
    assert [latent_frames_of(frames) for frames in (0, 1, 4, 5, 16, 17)] == [0, 1, 1, 2, 4, 5]
