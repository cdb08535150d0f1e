"""An existing video, the new part and what follows as one file: every frame says its number, every sound its pitch."""

import io
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types

from frame_memory.plan import PRESETS, plan_sections
from frame_memory.plan.frames import END
from frame_memory.video.audio import AudioTrack, SoundLine, samples_of
from frame_memory.video.clips import describe_clip, open_clip
from frame_memory.video.extend import latents_for, prepare
from frame_memory.video.history import encode_stream
from frame_memory.video.join import JOIN_NODE, crossfade, join_videos, plan_join
from frame_memory.video.source import HistoryError

from .odd_videos import number_of, numbered_frame, pitch_of, read_sound, tone, write_video
from .probe import probe
from .test_video_history import CausalEncoder, chunks_of, numbers

RATE = Fraction(30)
FAST = {"preset": "ultrafast"}


def steady(count: int, fps: float = 30) -> list[int]:
    return [round(1000 * i / fps) for i in range(count)]


def numbered(first: int, count: int, size=(96, 64)) -> list[np.ndarray]:
    return [numbered_frame(n % 256, *size) for n in range(first, first + count)]


def clip_of(path, folder, **trim):
    return open_clip(InputImpl.VideoFromFile(str(path), **trim), RATE, folder, "Video History")


@pytest.fixture
def three(tmp_path):
    """A: 48 pictures at 24 fps with sound, 2 s. Made: 17 repeated and 36 new frames. B: 30 frames with other sound."""
    a = write_video(tmp_path / "a.mp4", steady(48, 24), audio_seconds=2.0, options=FAST)
    b = write_video(tmp_path / "b.mp4", steady(30), frames=numbered(200, 30), audio_seconds=1.0, options=FAST)
    made = write_video(tmp_path / "made.mp4", steady(53), frames=numbered(100, 53), options=FAST)
    return [clip_of(path, tmp_path) for path in (a, made, b)]


def test_fault_26_and_32_three_videos_follow_each_other_by_time_with_their_sound(tmp_path, three):
    first, made, then = three
    plan = plan_join(first, made, 17, then)
    assert (plan.frames, plan.fade, plan.width, plan.height) == (60 + 36 + 30, 15, 96, 64)
    joined = join_videos(plan, tmp_path / "out.mp4")
    got = [number_of(f) for f in np.concatenate(list(numbers_of(joined.written.path, tmp_path)))]
    own = [number for number in numbers(first.facts) if number < 48]
    assert len(own) == 60 and got[:45] == own[:45], "24 pictures a second are shown at their times at 30"
    assert got[60:96] == list(range(117, 153)) and got[96:] == list(range(200, 230))
    facts = probe(joined.written.path)
    assert facts.frames == 126 and facts.fps == 30
    samples, rate, begin = read_sound(joined.written.path)
    assert rate == 44100 and begin == pytest.approx(0, abs=0.03)
    heard = {at: samples[round(at * rate) : round((at + 0.3) * rate)] for at in (0.3, 1.5, 2.4, 3.35, 3.8)}
    assert [pitch_of(heard[at], rate) for at in (0.3, 1.5, 3.35, 3.8)] == pytest.approx([440, 1000, 440, 1000], abs=8)
    assert np.abs(heard[2.4]).max() < 0.01, "silence under the new part"
    assert "silent" not in {p.suffixes[0].strip(".") for p in tmp_path.glob("out*")}
    for words in ("0.00 to 2.00 s: video, a.mp4", "2.00 to 3.20 s: new", "3.20 to 4.20 s: then", "AAC, 44100 Hz, mono"):
        assert words in joined.report


def numbers_of(path, folder):
    from frame_memory.video.history import read_video

    return read_video(clip_of(path, folder).facts, size=(96, 64))


def test_without_sound_there_is_no_sound_track_and_without_overlap_no_fade(tmp_path, three):
    _, made, _ = three
    plan = plan_join(made, made, 0)
    joined = join_videos(plan, tmp_path / "out.mp4")
    assert plan.fade == 0 and "No sound" in joined.report
    assert [number_of(f) for c in numbers_of(joined.written.path, tmp_path) for f in c] == [*range(100, 153)] * 2
    assert probe(joined.written.path).frames == 106


def test_an_overlap_that_cannot_be_names_the_node(three):
    first, made, _ = three
    for wrong in (-1, 53, 400):
        with pytest.raises(
            HistoryError, match=f"'overlap' of '{JOIN_NODE}' is {wrong}.*Expected 0 to 52.*Video History"
        ):
            plan_join(first, made, wrong)


def test_a_crossfade_leaves_the_one_for_the_other_in_equal_steps():
    black, white = np.zeros((4, 2, 2, 3), np.uint8), np.full((4, 2, 2, 3), 250, np.uint8)
    assert crossfade(black, white)[:, 0, 0, 0].tolist() == [50, 100, 150, 200]


def test_a_step_of_brightness_at_a_join_is_warned_of(tmp_path):
    dark = write_video(tmp_path / "d.mp4", steady(8), frames=[np.full((64, 96, 3), 60, np.uint8)] * 8)
    light = write_video(tmp_path / "l.mp4", steady(8), frames=[np.full((64, 96, 3), 120, np.uint8)] * 8)
    clips = [clip_of(path, tmp_path) for path in (dark, light)]
    report = join_videos(plan_join(*clips, 0), tmp_path / "o.mp4").report
    assert re.search(r"Warning: Brightness changes by \+(59|60|61)\.\d of 255 at the join at 0\.27 s", report)


def test_trimmed_videos_and_videos_in_memory_are_read(tmp_path):
    path = write_video(tmp_path / "a.mp4", steady(60), audio_seconds=2)
    trimmed = clip_of(path, tmp_path, start_time=0.5, duration=1.0)
    assert trimmed.frames == range(15, 45) and numbers(trimmed.facts, trimmed.frames) == list(range(15, 45))
    assert any("0.50 to 1.50 s" in line for line in describe_clip(trimmed))
    assert clip_of(path, tmp_path, start_time=-0.5).frames == range(45, 60)
    with pytest.raises(HistoryError, match="Trim Video"):
        clip_of(path, tmp_path, start_time=9.0)
    memory = open_clip(InputImpl.VideoFromFile(io.BytesIO(path.read_bytes())), RATE, tmp_path / "spool", "x")
    assert numbers(memory.facts) == list(range(60))
    pictures = torch.from_numpy(np.stack(numbered(0, 9))).float() / 255
    parts = Types.VideoComponents(images=pictures, audio=None, frame_rate=Fraction(15))
    made = open_clip(InputImpl.VideoFromComponents(parts), RATE, tmp_path / "spool", "x")
    assert numbers(made.facts, made.frames) == [n // 2 for n in range(18)]


def test_sounds_in_a_row_are_exact_to_the_sample(tmp_path):
    write_video(tmp_path / "a.mp4", steady(60), audio_seconds=2)
    track = clip_of(tmp_path / "a.mp4", tmp_path).facts.audio
    third = track.between(0.1, 0.1 + 1 / 3)
    line = SoundLine.of([1 / 3, third, 1 / 3, third, 1 / 3, third])
    made = samples_of(line)
    assert made.shape == (1, 2 * 44100) and line.seconds == pytest.approx(2)
    assert isinstance(line.first, AudioTrack) and SoundLine.of([1.0, 2.0]) is None
    assert not made[0, :14000].any() and np.abs(made[0, 15000:29000]).max() > 0.3
    assert np.allclose(made[0, 14700:29000], made[0, 14700 + 29400 : 29000 + 29400], atol=0.01)
    cut = line.between(1 / 3, 2 / 3)
    assert cut.seconds == pytest.approx(1 / 3) and pitch_of(samples_of(cut)[0], 44100) == pytest.approx(440, abs=5)


def test_a_history_is_encoded_as_it_comes():
    pixels, chunks = chunks_of(4 * 50 - 3)
    made = encode_stream(CausalEncoder(), iter(chunks), 50)
    assert torch.allclose(made, CausalEncoder().encode(torch.from_numpy(pixels).float() / 255), atol=1e-5)
    with pytest.raises(HistoryError, match="ended after 197 frames, 201 were expected"):
        encode_stream(CausalEncoder(), iter(chunks), 51)


@pytest.mark.parametrize(("seconds", "available", "frames"), [(2.4, 90, 19), (1.2, 90, 10), (0, 90, 90), (9, 16, 16)])
def test_seconds_of_history_in_latent_frames(seconds, available, frames):
    assert latents_for(seconds, available) == frames


def test_fault_26_and_32_what_the_sampler_gets(tmp_path, selftest_vae):
    """Variable rate, turned, 10 bit, with sound: size, counts, exact sound, and everything said."""
    times = [0, 40, 90, 120, 200, 260, 300, 380, 400, 470, 500]
    path = write_video(
        tmp_path / "odd.mp4", times, size=(64, 96), pix_fmt="yuv420p10le", rotation=90, audio_seconds=0.6
    )
    made = prepare(selftest_vae, InputImpl.VideoFromFile(str(path)), 0.4, 64, tmp_path)
    assert made.overlap == 13 and made.history["samples"].shape == (1, 16, 4, 6, 10)
    assert made.start["samples"].shape == (1, 16, 1, 6, 10) and made.end is made.end_picture_BHWC is None
    assert made.audio["waveform"].shape == (1, 1, round(13 / 30 * 44100)) and made.audio["sample_rate"] == 44100
    assert made.history["frame_memory"]["base"] == made.start["frame_memory"]["base"]
    assert float(made.audio["waveform"].std()) == pytest.approx(float(tone(1)[:20000].std()), rel=0.15)
    for words in (
        "Variable frame rate",
        "Turned upright",
        "10 bits",
        "13 frames = 4 latent frames",
        "Sound: aac, 44100",
    ):
        assert words in made.report, made.report


def test_a_bridge_with_f0_sees_both_ends():
    plan = plan_sections(PRESETS["F0 inverted"], sections=3, history_frames=16, has_end=True)
    read = [{f for group in s.groups for f in group.frames} for s in plan.sections]
    assert [END in frames for frames in read] == [True, False, False], "the section made first, the last in time"
    assert all(15 in frames for frames in read), "all see the last frame of the history"
    assert plan.sections[-1].start == 16 and plan.sections[0].stop == plan.total_frames == 16 + 27
    nearest = next(g for g in plan.sections[0].groups if END in g.frames)
    assert nearest.kernel == 1 and nearest.positions[0] == plan.sections[0].positions[-1] + 1
    assert set(range(25, 43)) <= read[-1], "the section that follows the history sees all that comes after it"
