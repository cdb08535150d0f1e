"""Drift Meter on clips whose drift is known: numbers against numpy written out, words, order, plot, JSON, memory."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch

from frame_memory.model.selftest import SelfTestVision
from frame_memory.video.drift import DriftMeter, Timing
from frame_memory.video.drift_report import as_json, plot, words_of
from frame_memory.video.likeness import LikenessError

from .made import (
    blurred,
    brighter,
    brightness_of,
    faded,
    motion_of,
    moving,
    picture,
    saturation_of,
    sharpness_of,
    slope_of,
)

FPS = 10.0
FRAMES = 200
ENDS = 30  # 15 % of 200


def metered(video: np.ndarray, order: str = "forward", fps: float = FPS, timing: Timing | None = None, piece=7, **more):
    """What is found of a clip that comes in pieces of odd sizes."""
    meter = DriftMeter(timing or Timing.guessed(len(video), fps, order), **more)
    for first in range(0, len(video), piece):
        meter.look(first, video[first : first + piece])
    return meter.result()


def ends(found, name: str) -> tuple[float, float]:
    curve = found.curves[name]
    return curve.first, curve.last


def test_a_healthy_clip_has_no_drift_and_no_warning():
    video = moving(FRAMES)
    before = video.copy()
    found = metered(video)
    assert not found.warnings and (video == before).all()
    assert all(abs(found.curves[name].slope) < 0.05 for name in ("brightness", "saturation", "sharpness"))
    words = words_of(found, "A clip.")
    assert words.splitlines()[0].startswith("Nothing drifts") and "Brightness: " in words and "steady" in words
    assert words.splitlines()[1] == "Shapes and faces are not judged: for that, connect 'clip_vision'."
    assert "not judged" not in words_of(metered(moving(40), clip_vision=SelfTestVision()), "A clip.")
    assert "made from its first frame to its last. The first 15 % as made, 30 frames" in words


def test_a_still_picture_has_no_slope_of_rounding_noise():
    words = words_of(metered(np.repeat(picture()[None].astype(np.float32), 20, axis=0)), "")
    assert "(0.0, 0 %, slope 0.00 a second): steady." in words and "e-1" not in words


def test_a_known_brightness_slope_is_measured():
    video = brighter(moving(FRAMES), 2.0, FPS)
    found = metered(video)
    assert found.curves["brightness"].slope == pytest.approx(2.0, abs=1e-3)
    assert ends(found, "brightness") == pytest.approx(
        (brightness_of(video[:ENDS]), brightness_of(video[-ENDS:])), abs=1e-3
    )
    # The ends' middles are 170 frames, 17 s, apart.
    assert found.curves["brightness"].difference == pytest.approx(2.0 * 17, abs=1e-3)
    per_second = [brightness_of(video[i : i + 10]) for i in range(0, FRAMES, 10)]
    assert [value for _, value in found.per_second["brightness"]] == pytest.approx(per_second, abs=1e-3)
    assert [at for at, _ in found.per_second["brightness"]] == pytest.approx([0.45 + s for s in range(20)])


def test_a_known_fade_of_colours_is_measured():
    video = faded(moving(FRAMES), 0.2)
    found = metered(video)
    expected = saturation_of(video[:ENDS]), saturation_of(video[-ENDS:])
    assert ends(found, "saturation") == pytest.approx(expected, abs=1e-3)
    values = [saturation_of(frame[None]) for frame in video]
    assert found.curves["saturation"].slope == pytest.approx(slope_of(values, FPS), abs=1e-3)
    assert abs(found.curves["brightness"].difference) < 0.01, "grey by luma keeps the brightness"


def test_a_known_blur_is_measured():
    video = blurred(moving(FRAMES, speed=0.5), 12)
    found = metered(video)
    expected = sharpness_of(video[:ENDS]), sharpness_of(video[-ENDS:])
    assert ends(found, "sharpness") == pytest.approx(expected, abs=1e-2) and expected[1] < 0.6 * expected[0]
    assert "Sharpness: " in words_of(found, "") and "gets softer" in words_of(found, "")


def test_a_known_motion_is_measured_and_its_end_told():
    """A slope of 2 levels a pixel that moves v pixels a frame changes by 8 v levels in 4 frames; v goes from 3 to 0."""
    speeds = np.linspace(3, 0, FRAMES)
    at = np.cumsum(speeds)
    x = np.arange(48)
    video = np.stack([((x[None] * 2 - 2 * a) % 256).repeat(32, 0) for a in at])[..., None] / 255
    ramp = np.clip(video, 0, 1).repeat(3, -1).astype(np.float32)
    smooth = np.stack([(100 + 2 * x[None] - 0.02 * a).repeat(32, 0) for a in at])[..., None].repeat(3, -1) / 255
    found = metered(smooth.astype(np.float32))
    moved = 0.02 * (at[4:] - at[:-4])
    assert found.curves["motion"].values == pytest.approx(moved, abs=1e-3)
    assert metered(ramp).curves["motion"].values == pytest.approx(motion_of(ramp), abs=1e-2)
    slower = metered(moving(FRAMES, speed=0.7)[np.minimum(np.arange(FRAMES), 120)])
    assert "moves less and less" in words_of(slower, "")


@pytest.mark.parametrize("kind", ["brightness", "saturation", "sharpness"])
def test_fault_15_drift_beyond_its_bound_is_warned_of_with_the_section(kind):
    clip = moving(500, speed=0.3)
    video = {
        "brightness": lambda: brighter(clip, 3.0, 30),
        "saturation": lambda: faded(clip, 0.4),
        "sharpness": lambda: blurred(clip, 10),
    }[kind]()
    found = metered(video, fps=30.0)
    assert len(found.sections) == 14 and [row["number"] for row in found.sections] == list(range(1, 15))
    warning = next(text for text in found.warnings if f"{kind} drifts by" in text)
    assert warning.startswith("Section 6: ") and "This is drift" in warning, "the first that ends six sections"
    assert "Seen in sections 6 to 14." in warning
    assert f"Warning: {warning}" in words_of(found, "")


def test_fault_15_a_short_clip_that_ends_far_from_its_beginning_names_the_section():
    video = moving(145, speed=0.3)
    video[73:] *= 1.2
    warning = metered(video, fps=30.0).warnings[0]
    assert warning.startswith(
        "Section 3 is the first whose brightness is far from the beginning's; the video gets bright"
    )


def test_fault_16_frozen_sections_are_named_with_the_usual_causes():
    video = moving(289, speed=0.4)
    video[145:217] = video[145]
    found = metered(video, fps=30.0)
    assert [text for text in found.warnings if text.startswith("Sections 5 to 6 are frozen") and "LoRA" in text]
    pictures = np.repeat(picture()[None].astype(np.float32), 120, axis=0)
    still = metered(pictures, fps=30.0).warnings[0]
    assert still.startswith("All 3 sections are frozen") and "If a model made it" in still and "re-roll" not in still
    ours = metered(pictures, timing=Timing(120, 30.0, sections=((1, 1, 37), (2, 37, 73), (3, 73, 120)))).warnings[0]
    assert "Name a movement in the prompt of this section, or re-roll it" in ours


def test_inverted_order_is_judged_from_the_end():
    """A video that was made backwards and got brighter on the way looks, when it is played, as if it got darker."""
    made = faded(brighter(moving(FRAMES), 2.0, FPS), 0.5)
    forward, inverted = metered(made), metered(made[::-1], "inverted")
    for name in ("brightness", "saturation", "sharpness"):
        assert ends(inverted, name) == pytest.approx(ends(forward, name), abs=1e-3)
        assert inverted.curves[name].slope == pytest.approx(forward.curves[name].slope, abs=1e-3)
    assert inverted.curves["brightness"].difference > 30 > -30 > metered(made[::-1]).curves["brightness"].difference
    assert "made from its end to its beginning" in words_of(inverted, "")
    numbers = [row["number"] for row in inverted.sections]
    assert numbers == sorted(numbers, reverse=True)


def test_fault_15_of_an_inverted_video_slopes_count_in_the_order_of_making():
    made = brighter(moving(433, speed=0.3), 3.0, 30)
    (warning,) = metered(made[::-1], "inverted", fps=30.0).warnings
    assert "brightness drifts by +3." in warning, "3 levels a second, 1.2 s a section"
    assert "Use a schedule with a pinned start" in warning and "order 'inverted'" not in warning
    (wrong,) = metered(made[::-1], fps=30.0).warnings
    assert "brightness drifts by -3." in wrong and "Use order 'inverted' (F0) or a schedule" in wrong


def test_both_ends_first_and_given_frames():
    sections = ((1, 1, 37), (2, 37, 73), (3, 73, 109))
    timing = Timing(109, 30.0, "both ends first", 1, sections)
    assert timing.making() == [*range(73, 109), *range(1, 73)]
    video = moving(109)
    video[0] = 0  # the given picture is black and must not count
    video[73:] = video[73:] * 0.8
    found = metered(video, timing=timing)
    assert found.ends == 16 and found.curves["brightness"].first == pytest.approx(brightness_of(video[73:89]), abs=1e-2)
    assert [row["number"] for row in found.sections] == [3, 1, 2]
    assert "1 frame in front was given, not made; it does not count (108 do)." in words_of(found, "")


def test_likeness_through_a_vision_model_with_subject_and_background_apart():
    """A red square that turns blue on a background that stays: only the subject is lost."""
    video = np.repeat(picture(3)[None].astype(np.float32), 120, axis=0)
    masks = torch.zeros(120, 32, 48)
    for t in range(120):
        x = t % 30
        share = t / 119
        video[t, 8:20, x : x + 12] = (1 - share, 0.1, share)
        masks[t, 8:20, x : x + 12] = 1
    found = metered(video, clip_vision=SelfTestVision(), mask_BHW=masks)
    identity, background = found.curves["identity"], found.curves["background"]
    assert identity.difference < -0.1 and identity.first > 0.99
    assert abs(background.difference) < 0.05
    assert any("subject is less and less like its beginning" in text for text in found.warnings)
    whole = metered(video, clip_vision=SelfTestVision())
    assert "picture" in whole.curves and "identity" not in whole.curves
    assert "Similarity of the whole picture: " in words_of(whole, "")


class EachAnother:
    """A vision model to which any two pictures have the same cosine, 0.7."""

    def __init__(self):
        self.count = 0

    def encode_image(self, picture_BHWC, crop=True):
        self.count += 1
        return type(
            "Seen", (), {"image_embeds": (0.7**0.5 * torch.eye(99)[0] + 0.3**0.5 * torch.eye(99)[self.count])[None]}
        )


def test_what_only_goes_on_changing_is_no_less_like_its_beginning_at_the_end():
    found = metered(moving(100), clip_vision=EachAnother())
    curve = found.curves["picture"]
    assert len(curve.values) > 6 and curve.values == pytest.approx(0.7, abs=1e-6) and not found.warnings
    assert (curve.first, curve.last) == pytest.approx((0.7, 0.7), abs=1e-6)


def test_a_mask_that_does_nothing_is_told():
    video = moving(40)
    unseen = words_of(metered(video, mask_BHW=torch.ones(1, 32, 48)), "")
    assert "Warning: 'mask' of 'Drift Meter' was not used" in unseen and "Load CLIP Vision" in unseen
    empty = words_of(metered(video, clip_vision=SelfTestVision(), mask_BHW=torch.zeros(40, 32, 48)), "")
    assert "Warning: 'mask' of 'Drift Meter' shows nothing" in empty and "of the background: " in empty
    masks = torch.zeros(40, 32, 48)
    masks[20:22] = 1
    middle = words_of(metered(video, clip_vision=SelfTestVision(), mask_BHW=masks), "")
    for words in (unseen, empty):
        assert words.splitlines()[0].startswith("Warning: 'mask'") and "Nothing drifts" not in words, "on top"
    assert "Similarity of the subject: 1.000; it is not seen at both ends." in middle and "Warning" not in middle


def test_a_real_clip_vision_model_of_core_is_taken():
    import comfy.clip_vision

    config = {
        "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "quick_gelu", "projection_dim": 16,
        "num_channels": 3, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    model = comfy.clip_vision.ClipVisionModel(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
    video = moving(40)
    with torch.inference_mode():
        found = metered(video, clip_vision=model)
        late = model.encode_image(torch.from_numpy(video[-1:]), crop=False).image_embeds.float()
    values = dict(zip(found.curves["picture"].at.tolist(), found.curves["picture"].values))
    assert 0.9 < values[0] <= 1 and 39 in values
    first = [0, 2, 4]  # every second frame of 6: three looks at each end
    with torch.inference_mode():
        early = [model.encode_image(torch.from_numpy(video[i : i + 1]), crop=False).image_embeds.float() for i in first]
    unit = [float((e / e.norm() * late / late.norm()).sum()) for e in early]
    assert values[39] == pytest.approx(sum(unit) / 3, abs=1e-4)
    unit = [float((e / e.norm() * early[0] / early[0].norm()).sum()) for e in early[1:]]
    assert values[0] == pytest.approx(sum(unit) / 2, abs=1e-4), "not to itself"


def test_masks_of_another_length_are_refused():
    with pytest.raises(LikenessError, match="'mask' of 'Drift Meter' got masks of shape .3, 8, 8. for 40 frames"):
        metered(moving(40), clip_vision=SelfTestVision(), mask_BHW=torch.ones(3, 8, 8))


def test_json_and_plot_say_the_same(tmp_path):
    found = metered(brighter(moving(FRAMES), 2.0, FPS))
    told = json.loads(as_json(found))
    assert told["order"] == "forward" and told["frames"] == FRAMES and told["end_frames"] == ENDS
    assert told["measures"]["brightness"]["slope"] == pytest.approx(2.0, abs=1e-3)
    assert len(told["measures"]["motion"]["per_second"]) == 20 and set(told["measures"]) == {
        "brightness", "saturation", "sharpness", "motion",
    }  # fmt: skip
    drawn = np.asarray(plot(found))
    assert drawn.shape == (4 * 300, 1200, 3)
    # The first panel's curve rises from the lower left to the upper right.
    line = np.argwhere((drawn[:300] == (31, 105, 180)).all(axis=-1))
    left, right = line[line[:, 1] < 300][:, 0].mean(), line[line[:, 1] > 1000][:, 0].mean()
    assert right < left - 100
    flat = np.argwhere((np.asarray(plot(metered(moving(FRAMES))))[:300] == (31, 105, 180)).all(axis=-1))
    assert np.ptp(flat[:, 0]) < 10


def test_a_short_clip_is_drawn_frame_by_frame_up_to_its_ends_and_one_point_as_a_dot():
    def drawn(frames: int) -> np.ndarray:
        return np.argwhere((np.asarray(plot(metered(moving(frames))))[:300] == (31, 105, 180)).all(axis=-1))[:, 1]

    left, right = 90, 1160  # the panel's sides
    assert drawn(20).min() < left + 10 and drawn(20).max() > right - (right - left) / 20 - 10
    assert np.ptp(drawn(1)) >= 8


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_very_short_clips_and_odd_pictures(frames):
    for video in (
        moving(frames),
        moving(frames)[..., :1],
        np.concatenate([moving(frames), moving(frames)[..., :1]], -1),
    ):
        found = metered(video)
        assert "The video is short" in words_of(found, "") and json.loads(as_json(found))["frames"] == frames
        words = words_of(found, "")
        assert ("there is nothing to compare" in words) == (frames == 1)
        assert frames > 1 or ("Nothing drifts" not in words and "steady" not in words)
        plot(found)
    assert json.loads(as_json(metered(np.full((frames, 9, 7, 3), np.nan, np.float32))))["frames"] == frames


def test_frames_are_not_kept_and_may_be_bytes():
    meter, alive = DriftMeter(Timing.guessed(120, 30.0, "forward")), []
    for first in range(0, 120, 12):
        chunk = (moving(12) * 255).round().astype(np.uint8)
        alive.append(weakref.ref(chunk))
        meter.look(first, chunk)
        del chunk
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    floats = metered(np.concatenate([moving(12)] * 10), fps=30.0)
    assert meter.result().curves["brightness"].first == pytest.approx(floats.curves["brightness"].first, abs=0.5)
