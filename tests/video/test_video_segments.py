"""Segments and their join with the real encoder and muxer: what a player reads back, and what stays when it fails."""

import errno
import json
import os
import re
import shutil
import textwrap
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from frame_memory.video import files
from frame_memory.video.audio import AudioTrack
from frame_memory.video.segments import (
    Segment,
    SegmentError,
    join_segments,
    read_segment,
    segment_problem,
    write_segment,
)
from frame_memory.video.stream import Piece, StreamDecoder
from frame_memory.video.writer import VideoWriteError

from . import small_disk
from .odd_videos import number_of, numbered_frame, pitch_of, read_sound, write_video
from .probe import check_video
from .test_video_decode import causal_decode, latents
from .test_video_writer import HEIGHT, WIDTH, moving_frames, probe, run_child

CUTS = ((0, 4), (4, 40), (40, 41), (41, 43), (43, 79), (79, 100))


def segments_of(folder, frames, cuts=CUTS, fps=30, **options) -> list[Segment]:
    return [write_segment(folder, Piece(a, b, frames[a:b]), fps, **options) for a, b in cuts]


def planes(path) -> list[np.ndarray]:
    """Decoded frames as they are coded, without a colour conversion in between."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("fps", [30, 23.976, 29.97, 12.5, 16])
def test_the_join_has_exact_times_tags_and_the_segments_pixels(tmp_path, fps):
    frames, folder = moving_frames(100), tmp_path / "segments"
    made = segments_of(folder, frames, fps=fps)
    written = join_segments(folder, made[::-1], tmp_path / "a.mp4", fps, {"workflow": {"a": "Kätzchen"}})
    rate = {23.976: Fraction(24000, 1001), 29.97: Fraction(30000, 1001), 12.5: Fraction(25, 2)}.get(fps, Fraction(fps))
    seen = probe(tmp_path / "a.mp4")
    assert seen["frames"] == seen["listed"] == 100 == written.frames
    assert seen["rate"] == rate == written.fps and seen["start"] == 0
    assert seen["seconds"] == pytest.approx(float(100 / rate), abs=1e-9)
    assert (seen["codec"], seen["pix_fmt"], seen["size"]) == ("h264", "yuv420p", (WIDTH, HEIGHT))
    assert seen["colour"] == (1, 1, 1, 1)
    assert json.loads(seen["metadata"]["workflow"]) == {"a": "Kätzchen"}
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert times == [k / rate for k in range(100)]
    alone = [plane for segment in made for plane in planes(folder / segment.name)]
    joined = planes(tmp_path / "a.mp4")
    assert len(alone) == len(joined) and all((a == b).all() for a, b in zip(alone, joined))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "segments"]
    assert sorted(p.name for p in folder.iterdir()) == [segment.name for segment in made]


def test_ffprobe_agrees_and_decodes_without_a_word(tmp_path):
    made = segments_of(tmp_path / "s", moving_frames(100))
    source = write_video(tmp_path / "in.mp4", [33 * i for i in range(60)], audio_seconds=2)
    track = AudioTrack(source, 1, 0.0, 2.0, 0.0, "aac", 44100, 1)
    join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30, audio=track)
    seen = check_video(tmp_path / "a.mp4", 100, 30, (WIDTH, HEIGHT))
    codec, rate, channels, seconds = seen.audio
    assert (codec, rate, channels) == ("aac", 44100, 1) and seconds == pytest.approx(2, abs=1e-3)
    for segment in made:
        # libav finds the decode time of one packet odd in a piece of 4 frames alone; in the join it is right.
        check_video(tmp_path / "s" / segment.name, segment.frames, 30, (WIDTH, HEIGHT), silent=segment.frames > 4)


@pytest.mark.parametrize("order", ["forward", "inverted", "both ends first"])
def test_from_latents_to_the_joined_file(tmp_path, order):
    x = latents(28, height=32, width=32)
    stream = StreamDecoder(causal_decode, order, 28, 9, lambda a, b: x[:, :, a:b])
    made = [write_segment(tmp_path / "s", piece, 30, crf=0) for piece in stream.finished(0, 28)]
    join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30)
    assert probe(tmp_path / "a.mp4")["frames"] == 109


def test_fault_05_a_part_of_the_video_joins_to_a_playable_file(tmp_path):
    """After a cancel of an inverted render only the end exists; it begins at time 0 and shows the right frames."""
    numbered = torch.from_numpy(np.stack([numbered_frame(i) for i in range(100)]))
    made = segments_of(tmp_path / "s", numbered)
    written = join_segments(tmp_path / "s", made[4:], tmp_path / "end.mp4", 30)
    assert written.frames == 57 and probe(tmp_path / "end.mp4")["start"] == 0
    with av.open(str(tmp_path / "end.mp4")) as container:
        assert [number_of(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)] == list(range(43, 100))
    join_segments(tmp_path / "s", made[:1], tmp_path / "start.mp4", 30)
    assert probe(tmp_path / "start.mp4")["frames"] == 4


def test_a_long_join_can_be_sought(tmp_path):
    """A player that jumps lands on the frame it asked for: key frames and decode times are what they say."""
    numbered = torch.from_numpy(np.stack([numbered_frame(i) for i in range(216)]))
    made = segments_of(tmp_path / "s", numbered, [(a, a + 36) for a in range(0, 216, 36)])
    join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.pts is not None]
        assert [p.dts for p in packets] == sorted({p.dts for p in packets}) and all(p.dts <= p.pts for p in packets)
        assert sum(p.is_keyframe for p in packets) >= 6
        for wanted in (200, 36, 107, 0):
            container.seek(int(wanted / 30 / stream.time_base), stream=stream)
            frame = next(f for f in container.decode(stream) if f.time >= wanted / 30 - 1e-6)
            assert number_of(frame.to_ndarray(format="rgb24")) == wanted


def test_a_segment_is_recorded_with_length_and_hash(tmp_path):
    piece = Piece(36, 72, moving_frames(36))
    segment = write_segment(tmp_path, piece, 23.976, crf=20, key="abc")
    assert segment.name == "0000036-0000072.mp4" and segment.fps == "24000/1001" and segment.key == "abc"
    assert segment_problem(tmp_path, segment) is None
    assert Segment(**json.loads(json.dumps(segment.as_dict()))) == segment
    again = write_segment(tmp_path, piece, 23.976, crf=20, key="abc")
    assert again == segment, "the same piece makes the same bytes"
    numbers = [(first, len(frames), frames.dtype) for first, frames in read_segment(tmp_path, segment, 10)]
    assert numbers == [(36, 10, np.uint8), (46, 10, np.uint8), (56, 10, np.uint8), (66, 6, np.uint8)]


def test_fault_03_a_torn_segment_is_recognised(tmp_path):
    segment = write_segment(tmp_path, Piece(0, 9, moving_frames(9)), 30)
    file = tmp_path / segment.name
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert f"has {len(whole) - 10} bytes, expected {len(whole)}" in segment_problem(tmp_path, segment)
    file.write_bytes(whole[:-10] + b"0123456789")
    assert "hash differs" in segment_problem(tmp_path, segment)
    file.unlink()
    assert "cannot be read" in segment_problem(tmp_path, segment)


def test_fault_12_a_join_that_fails_keeps_the_segments_and_says_why(tmp_path):
    folder = tmp_path / "s"
    made = segments_of(folder, moving_frames(100))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / made[2].name).write_bytes(b"this is no video")
    with pytest.raises(SegmentError) as error:
        join_segments(folder, made, tmp_path / "a.mp4", 30)
    assert "Invalid data found when processing input" in str(error.value), "libav's own words"
    assert str(folder) in str(error.value) and "Queue again" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    (folder / made[2].name).write_bytes(before[made[2].name])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert join_segments(folder, made, tmp_path / "a.mkv", 30).frames == 100
    assert len(planes(tmp_path / "a.mkv")) == 100


def test_fault_12_a_container_that_refuses_the_stream_is_replaced_by_mkv(tmp_path):
    """VP8 has no place in mp4, so libav itself refuses; Matroska takes it."""
    folder, said = tmp_path / "s", []
    folder.mkdir()
    made = write_video(tmp_path / "in.mkv", [round(1000 * i / 30) for i in range(9)], codec="libvpx")
    shutil.move(made, folder / "0000000-0000009.mp4")
    segment = Segment("0000000-0000009.mp4", 0, 9, 0, "", 96, 64, "30", 18)
    with pytest.raises(SegmentError, match="Joining a.mp4 failed.*The segments stay in"):
        join_segments(folder, [segment], tmp_path / "a.mp4", 30)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    written = join_segments(folder, [segment], tmp_path / "a.mp4", 30, announce=said.append)
    assert written.path == tmp_path / "a.mkv" and written.frames == 9 == len(planes(written.path))
    assert len(said) == 1 and "a.mp4 could not be joined" in said[0] and str(written.path) in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mkv", "s"]
    (folder / segment.name).write_bytes(b"this is no video")
    with pytest.raises(SegmentError, match="Joining a.mp4 failed"):
        join_segments(folder, [segment], tmp_path / "a.mp4", 30, announce=said.append)
    assert len(said) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["a.mkv", "s"]


@pytest.fixture
def locked(monkeypatch):
    """Files that a player has open, as Windows shows them: replacing them is refused so many times."""
    replace_file, left = os.replace, {"times": 0, "asked": 0}

    def refuse(source, target):
        left["asked"] += 1
        if left["times"]:
            left["times"] -= 1
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(source), 32, str(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "LOCKED_WAIT", 0.001)
    return left


def test_fault_47_a_file_that_is_in_use_is_replaced_as_soon_as_it_is_free(tmp_path, locked):
    part, path = tmp_path / "a.part.mp4", tmp_path / "a.mp4"
    path.write_bytes(b"old")
    part.write_bytes(b"new")
    locked["times"] = files.LOCKED_TRIES - 1
    files.put_in_place(part, path)
    assert path.read_bytes() == b"new" and not part.exists() and locked["asked"] == files.LOCKED_TRIES
    part.write_bytes(b"newer")
    locked["times"] = 10**6
    with pytest.raises(PermissionError):
        files.put_in_place(part, path)
    assert (path.read_bytes(), part.read_bytes()) == (b"new", b"newer"), "neither is lost"


def test_fault_47_a_join_over_a_file_in_use_says_so_and_keeps_both(tmp_path, locked):
    made = segments_of(tmp_path / "s", moving_frames(9), [(0, 9)])
    (tmp_path / "a.mp4").write_bytes(b"the earlier video")
    locked["times"], said = 10**6, []
    with pytest.raises(
        SegmentError, match=r"a\.mp4 may not be replaced: a player has it open.*Close the player"
    ) as error:
        join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30, announce=said.append)
    assert "muxer" not in str(error.value) and str(tmp_path / "s") in str(error.value) and said == []
    assert (tmp_path / "a.mp4").read_bytes() == b"the earlier video"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "s"]
    locked["times"] = 2
    assert join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30).frames == 9


def test_fault_12_an_existing_join_survives_a_failed_one(tmp_path):
    made = segments_of(tmp_path / "s", moving_frames(100))
    (tmp_path / "a.mp4").write_bytes(b"the earlier video")
    with pytest.raises(SegmentError, match="No such file or directory"):
        join_segments(tmp_path / "s", [replace(made[0], name="gone.mp4")], tmp_path / "a.mp4", 30)
    assert (tmp_path / "a.mp4").read_bytes() == b"the earlier video"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "s"]


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_fault_06_a_disk_that_fills_while_joining_leaves_the_segments(tmp_path):
    body = """
        from frame_memory.video.segments import join_segments, write_segment, SegmentError
        from frame_memory.video.stream import Piece
        made = [write_segment(folder / "s", Piece(a, a + 36, noise), 30) for a in range(0, 180, 36)]
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
        try:
            join_segments(folder / "s", made, folder / "a.mp4", 30)
        except SegmentError as error:
            print(error)
    """
    result = run_child(textwrap.dedent(body), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stdout and str(tmp_path / "s") in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and len(list((tmp_path / "s").iterdir())) == 5


def test_fault_06_room_is_looked_for_before_a_join(tmp_path, monkeypatch):
    made = segments_of(tmp_path / "s", moving_frames(100))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=5000))
    with pytest.raises(SegmentError, match=r"a\.mp4 needs .* bytes\) more and has .*5000 bytes.*The segments stay in"):
        join_segments(tmp_path / "s", made, tmp_path / "a.mp4", 30)
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and len(list((tmp_path / "s").iterdir())) == len(made)


def test_fault_06_a_full_disk_leaves_no_torn_segment(tmp_path):
    mount = small_disk.command_on(tmp_path, 900)
    body = """
        import frame_memory.video.writer as writer
        writer.DISK_MARGIN = -10**9  # so that the check before writing lets it through
        from frame_memory.video.segments import write_segment, segment_problem
        from frame_memory.video.stream import Piece
        made = []
        try:
            for a in range(0, 720, 36):
                made.append(write_segment(folder, Piece(a, a + 36, noise), 30))
        except VideoWriteError as error:
            print(error)
        print(len(made), [segment_problem(folder, m) for m in made if segment_problem(folder, m)])
        print(sorted(p.name for p in folder.iterdir()) == [m.name for m in made])
        from frame_memory.video.segments import SegmentError, join_segments
        try:
            join_segments(folder, made, folder / "a.mp4", 30)
        except SegmentError as error:
            print("JOIN", error)
        print(sorted(p.name for p in folder.iterdir()) == [m.name for m in made])
    """
    result = run_child(textwrap.dedent(body), tmp_path, prefix=mount)
    assert result.returncode == 0, result.stderr
    segments, _, joined = result.stdout.partition("JOIN ")
    assert "No space left on device" in segments and segments.endswith("[]\nTrue\n")
    # libav's own error, through nobody's file object: this is what tests/sampling/test_disk_full.py stands on.
    words = rf"The disk of {tmp_path} is full \(No space left on device; \d+ bytes are free\), so a\.mp4, of about \d+ "
    assert re.match(words, joined) and "nothing is sampled or decoded again" in joined and joined.endswith("True\n")


def test_fault_13_nan_writes_no_segment_and_black_is_only_refused_as_a_whole(tmp_path):
    frames = moving_frames(20)
    frames[7, 3, 3, 1] = float("nan")
    with pytest.raises(VideoWriteError, match="Frame 7 holds NaN"):
        write_segment(tmp_path / "s", Piece(0, 20, frames), 30)
    assert list((tmp_path / "s").iterdir()) == []
    dark = write_segment(tmp_path / "s", Piece(0, 5, torch.zeros(5, HEIGHT, WIDTH, 3)), 30)
    with pytest.raises(SegmentError, match="All frames are black"):
        join_segments(tmp_path / "s", [dark], tmp_path / "a.mp4", 30)
    light = write_segment(tmp_path / "s", Piece(5, 9, moving_frames(4)), 30)
    written = join_segments(tmp_path / "s", [dark, light], tmp_path / "a.mp4", 30)
    assert written.black_frames == (0, 1, 2, 3, 4)


def test_segments_that_do_not_fit_are_named(tmp_path):
    made = segments_of(tmp_path, moving_frames(100))
    with pytest.raises(SegmentError, match="no finished segments"):
        join_segments(tmp_path, [], tmp_path / "a.mp4", 30)
    with pytest.raises(SegmentError, match=r"0000004-0000040.mp4 ends before frame 40 and .* begins at 41"):
        join_segments(tmp_path, [*made[:2], *made[3:]], tmp_path / "a.mp4", 30)
    with pytest.raises(SegmentError, match="is 96x64 at 30 fps, expected 96x64 at 25 fps"):
        join_segments(tmp_path, made, tmp_path / "a.mp4", 25)
    with pytest.raises(SegmentError, match="ends in .mp4"):
        join_segments(tmp_path, made, tmp_path / "a.gif", 30)
    other = write_segment(tmp_path, Piece(100, 136, moving_frames(36)), 30)
    with VideoWriterOfAnotherKind(tmp_path / other.name) as frames:
        frames.write(36)
    with pytest.raises(SegmentError, match="another encoder or with other settings"):
        join_segments(tmp_path, [*made, other], tmp_path / "a.mp4", 30)


class VideoWriterOfAnotherKind:
    """A segment as another version of the encoder might have left it: same size and rate, other stream settings."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def write(self, count):
        write_video(self.path, [33 * i for i in range(count)], options={"profile": "baseline"})

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("begin", [0, 40])
def test_fault_32_sound_has_the_exact_length_and_stays_in_step(tmp_path, begin):
    """Tone of 3 s that changes pitch at 1.5 s, taken from 0.5 s to 2.5 s of its file."""
    source = write_video(tmp_path / "in.mp4", [33 * i for i in range(92)], audio_seconds=3)
    track = AudioTrack(source, 1, 0.5, 2.5, 0.0, "aac", 44100, 1)
    made = segments_of(tmp_path / "s", moving_frames(100))
    stretch = [segment for segment in made if segment.start_frame >= begin]
    join_segments(tmp_path / "s", stretch, tmp_path / "a.mp4", 30, audio=track)
    samples, rate, start = read_sound(tmp_path / "a.mp4")
    offset = begin / 30
    assert rate == 44100 and start == pytest.approx(0, abs=1e-4)
    # The track says its exact length; a decoder may hand out the rest of the last AAC frame too, which is silent.
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.duration * stream.time_base == pytest.approx(2 - offset, abs=1e-4)
    wanted = round((2 - offset) * rate)
    assert wanted <= len(samples) < wanted + 1024 and np.abs(samples[wanted + 200 :]).max(initial=0) < 0.05
    samples = samples[:wanted]
    change = round((1 - offset) * rate)
    if begin == 0:
        assert pitch_of(samples[4000 : change - 1000], rate) == pytest.approx(440, abs=5)
    assert pitch_of(samples[max(change, 0) + 1000 : -2000], rate) == pytest.approx(1000, abs=5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].duration * container.streams.video[0].time_base) == pytest.approx(
            (100 - begin) / 30, abs=1e-6
        )


def test_fault_32_sound_that_ended_before_the_stretch_is_left_out(tmp_path):
    source = write_video(tmp_path / "in.mp4", [33 * i for i in range(30)], audio_seconds=1)
    made = segments_of(tmp_path / "s", moving_frames(100))
    track = AudioTrack(source, 1, 0.0, 1.0, 0.0, "aac", 44100, 1)
    join_segments(tmp_path / "s", made[4:], tmp_path / "a.mp4", 30, audio=track)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert not container.streams.audio
