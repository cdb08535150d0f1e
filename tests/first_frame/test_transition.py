"""The cut after the canvas, found on clips whose cut is known; frames and sound dropped in step."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from frame_memory.video.transition import TransitionError, check_drop, find_cut, later_sound, refuse_latent


def scene(seed: int, frames: int, speed: float, noise: float) -> torch.Tensor:
    """A clip [T,48,64,3]: smooth colours that pan, with grain."""
    generator = torch.Generator().manual_seed(seed)
    wide = F.interpolate(torch.rand(1, 3, 5, 9, generator=generator), (48, 128), mode="bicubic")[0].clamp(0, 1)
    clip = torch.stack([torch.roll(wide, round(speed * i), 2)[:, :, :64] for i in range(frames)]).movedim(1, -1)
    return (clip + noise * torch.randn(clip.shape, generator=generator)).clamp(0, 1)


def canvas_clip(cut: int, seed: int, speed: float, noise: float, ghost: float) -> torch.Tensor:
    canvas = torch.ones(48, 64, 3)
    canvas[5:25, 4:28] = torch.rand(3, generator=torch.Generator().manual_seed(seed + 50))
    canvas[12:36, 34:62] = scene(seed + 7, 1, 0, 0)[0, 12:36, 34:62]
    clip = scene(seed, 81, speed, noise)
    clip[:cut] = canvas
    if ghost:
        clip[cut] = (1 - ghost) * clip[cut] + ghost * canvas
    return clip


@pytest.mark.parametrize("cut", [3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(("speed", "noise", "ghost"), [(0, 0, 0), (1, 0.02, 0), (2.5, 0.01, 0.4), (1, 0.03, 0.6)])
def test_the_cut_is_found_within_one_frame(cut, speed, noise, ghost):
    for seed in range(4):
        found = find_cut(canvas_clip(cut, seed, speed, noise, ghost))
        assert found.first_clean is not None, found.describe()
        assert abs(found.first_clean - cut - bool(ghost)) <= 1


@pytest.mark.parametrize(("speed", "noise"), [(0, 0), (1, 0.02), (3, 0.04), (6, 0)])
def test_a_clip_without_a_cut_is_said_to_have_none(speed, noise):
    for seed in range(4):
        found = find_cut(scene(seed, 81, speed, noise))
        assert found.first_clean is None and "No cut was found" in found.describe()


def moves_fast_at_first(seed: int) -> torch.Tensor:
    """The canvas, ten frames of a fast pan, then a still scene."""
    clip, pan = canvas_clip(4, seed, 0.5, 0.005, 0), scene(seed, 81, 6, 0.005)
    clip[4:14] = pan[4:14]
    return clip


def test_good_frames_of_a_fast_beginning_are_kept():
    for seed in range(6):
        found = find_cut(moves_fast_at_first(seed))
        assert found.first_clean is not None and 4 <= found.first_clean <= 6, found.describe()


def test_a_slow_fade_is_no_cut():
    a, b = scene(1, 40, 0, 0), scene(2, 40, 0, 0)
    weight = torch.linspace(0, 1, 40).view(-1, 1, 1, 1)
    assert find_cut(a * (1 - weight) + b * weight).first_clean is None


def test_a_later_cut_of_the_film_itself_is_left_alone():
    clip = torch.cat([scene(1, 40, 1, 0.01), scene(2, 41, 1, 0.01)])
    assert find_cut(clip).first_clean is None


@pytest.mark.parametrize("cut", [13, 15, 20])
def test_a_finished_clip_with_a_cut_of_its_own_loses_nothing_and_is_told(cut):
    found = find_cut(torch.cat([scene(1, cut, 0.5, 0.005), scene(2, 77 - cut, 0.5, 0.005)]))
    assert found.first_clean is None and found.later == cut
    assert f"cut before frame {cut} comes too late" in found.describe() and "nothing was dropped" in found.describe()


def test_a_clip_without_a_canvas_is_no_reason_for_alarm():
    told = find_cut(scene(3, 77, 1, 0.01)).describe()
    assert "right for a clip whose canvas is gone already" in told
    assert told.index("right") < told.index("check the LoRAs")


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_clips_do_no_harm(frames):
    find_cut(scene(0, frames, 1, 0))


def test_the_frames_are_not_changed():
    clip = canvas_clip(4, 0, 1, 0.02, 0)
    before = clip.clone()
    find_cut(clip)
    assert torch.equal(clip, before)


@pytest.mark.parametrize(("drop", "frames"), [(4, 4), (5, 1), (-1, 9)])
def test_what_would_leave_nothing_is_refused(drop, frames):
    with pytest.raises(TransitionError, match=f"drop {drop} of {frames} frames.*official number is 4"):
        check_drop(drop, frames)


def test_latents_are_refused_with_the_reason():
    assert "inside latent frame 1" in str(refuse_latent()) and "VAE Decode" in str(refuse_latent())


@pytest.mark.parametrize("rate", [Fraction(16), Fraction(30000, 1001), Fraction(24)])
@pytest.mark.parametrize("hertz", [44100, 48000, 16000])
def test_fault_32_sound_is_cut_by_the_same_time(rate, hertz):
    wave = torch.arange(int(6 * hertz)).float().view(1, 1, -1).expand(1, 2, -1)
    audio = {"waveform": wave, "sample_rate": hertz}
    kept = later_sound(audio, 4 / rate, 77 / rate)
    assert abs(float(kept["waveform"][0, 0, 0]) / hertz - float(4 / rate)) <= 0.5 / hertz + 1e-6
    assert abs(kept["waveform"].shape[-1] / hertz - float(77 / rate)) <= 1 / hertz
    assert audio["waveform"].shape[-1] == 6 * hertz and later_sound(None, 4 / rate, 77 / rate) is None


@pytest.mark.parametrize("samples", [0, 1000, 4000])
def test_sound_shorter_than_what_is_dropped_is_none_and_not_empty(samples):
    audio = {"waveform": torch.zeros(1, 2, samples), "sample_rate": 16000}
    assert later_sound(audio, Fraction(4, 16), Fraction(5, 16)) is None
