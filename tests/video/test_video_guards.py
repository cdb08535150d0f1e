"""The guards on videos with known faults: each fault is named, and a healthy video is left in peace."""

import numpy as np
import pytest
import torch

from benchmarks.world import random_scene, render
from frame_memory.video.guards import FROZEN_LEVELS, GuardSection, VideoGuards, warnings_of

SECTIONS = [GuardSection(i + 1, 0 if i == 0 else 1 + 36 * i, 37 + 36 * i) for i in range(8)]
FRAMES = 36 * 8 + 1


def scene(frames=FRAMES, height=48, width=64, speed=0.5, seed=0) -> torch.Tensor:
    """A textured picture that pans slowly, a figure that walks, and grain: float [T,H,W,3]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 12, 80, generator=generator) * 0.6 + 0.2
    wide = torch.nn.functional.interpolate(small, size=(height, 320), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)
    video = torch.stack([wide[:, int(t * speed) : int(t * speed) + width] for t in range(frames)]).clone()
    for t in range(frames):
        x = int(t * 2 * speed) % (width - 8)
        video[t, 20:32, x : x + 6] = torch.tensor([0.9, 0.2, 0.1])
    return (video + torch.randn(video.shape, generator=generator) * 0.01).clamp(0, 1)


def guarded(video, cuts=None, backward=False, sections=SECTIONS) -> VideoGuards:
    guards = VideoGuards(sections)
    cuts = cuts or [0, 4, 40, 41, 43, *range(76, len(video), 36), len(video)]
    spans = list(zip(cuts, cuts[1:]))
    for a, b in reversed(spans) if backward else spans:
        guards.add(a, video[a:b])
    return guards


def all_warnings(guards) -> list[str]:
    return [text for section in guards.sections for text in guards.warnings(section)]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_video_is_left_in_peace(seed):
    video = scene(seed=seed)
    before = video.clone()
    assert all_warnings(guarded(video)) == []
    assert torch.equal(video, before)


@pytest.mark.parametrize("backward", [False, True])
def test_pieces_in_any_order_and_size_give_the_same_numbers(backward):
    video = scene()
    whole = guarded(video, [0, FRAMES])
    parts = guarded(video, backward=backward)
    parts.add(40, video[40:76])
    shuffled = VideoGuards(SECTIONS)
    for a in np.random.default_rng(0).permutation(FRAMES):
        shuffled.add(int(a), (video[a : a + 1] * 255).round().to(torch.uint8).numpy())
    assert len(parts.series.stretches) == len(shuffled.series.stretches) == 1
    for section in SECTIONS:
        expected = whole.measures(section)
        assert parts.measures(section) == pytest.approx(expected, rel=1e-5)
        assert shuffled.measures(section) == pytest.approx(expected, rel=0.02, abs=0.05)


def test_the_numbers_against_a_plain_computation():
    video = scene(74)
    guards = guarded(video, [0, 74], sections=SECTIONS[:2])
    luma = (video.double() * 255) @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    found = guards.measures(SECTIONS[1])
    assert found["luma"] == pytest.approx(float(luma[37:73].mean()), rel=1e-4)
    assert found["saturation"] == pytest.approx(
        float((video.amax(-1) - video.amin(-1))[40:73:4].mean() * 255), rel=1e-4
    )
    assert found["luma_step"] == pytest.approx(float(luma[37:73].mean() - luma[:37].mean()), abs=1e-3)
    small = luma.view(74, 24, 2, 32, 2).mean(dim=(2, 4))
    change = (small[1:] - small[:-1]).abs().mean(dim=(1, 2))
    assert found["change"] == pytest.approx(float(change[36:72].mean()), rel=1e-3)
    near = [float(change[f - 1]) for f in range(25, 50) if abs(f - 37) > 1]
    assert found["seam"] == pytest.approx(float(change[35:38].max()) / (np.quantile(near, 0.9) + 0.25), rel=1e-3)


def test_fault_16_a_frozen_section_is_named_with_causes():
    video = scene()
    grain = torch.randn(36, 48, 64, 3, generator=torch.Generator().manual_seed(5)) * 0.001
    # What a VAE makes of a still latent: four frames that differ a little, again and again.
    pattern = torch.tensor([0.0, 0.01, -0.01, 0.005]).repeat(9).view(-1, 1, 1, 1)
    video[109:145] = (video[108] + grain + pattern).clamp(0, 1)
    texts = guarded(video).warnings(SECTIONS[3])
    assert any("Section 4 is frozen" in text and "LoRA" in text for text in texts)
    assert not any("frozen" in text for s in (*SECTIONS[:3], *SECTIONS[4:]) for text in guarded(video).warnings(s))


def test_fault_16_a_small_figure_in_a_still_room_is_not_frozen():
    room = scene(1, 480, 832, speed=0).expand(37, -1, -1, -1).clone()
    for t in range(37):
        room[t, 200:240, 100 + 2 * t : 130 + 2 * t] = 0.95
    guards = guarded(room, [0, 37], sections=SECTIONS[:1])
    assert guards.measures(SECTIONS[0])["motion"] > 3 * FROZEN_LEVELS and guards.warnings(SECTIONS[0]) == ()


def test_fault_16_the_shipped_vae_shows_still_latents_as_frozen(selftest_vae):
    """A sprite moves for one section; in the next all latents are its last one, and this VAE takes time to rest."""
    scene_of = random_scene(np.random.default_rng(1))
    clip = torch.from_numpy(np.ascontiguousarray(render(scene_of, np.arange(37))[:, 16:48, 16:48])).float()
    with torch.inference_mode():
        latent = selftest_vae.encode(clip)
        latent = torch.cat([latent, latent[:, :, -1:].expand(-1, -1, 9, -1, -1)], dim=2)
        video = selftest_vae.decode(latent)[0]
    guards = guarded(video, [0, 37, 73], sections=SECTIONS[:2])
    lively, frozen = (guards.measures(section)["motion"] for section in SECTIONS[:2])
    assert frozen < FROZEN_LEVELS < 5 * FROZEN_LEVELS < lively
    assert "is frozen" in guards.warnings(SECTIONS[1])[0]
    assert not any("frozen" in text for text in guards.warnings(SECTIONS[0]))


def test_fault_17_a_jump_at_a_join_is_scored_against_the_motion_near_it():
    video = scene()
    other = scene(seed=9)
    video[145:] = other[145:]
    guards = guarded(video)
    texts = guards.warnings(SECTIONS[4])
    assert any("Section 5 begins with a jump" in text and "blend_sections" in text for text in texts)
    assert guards.measures(SECTIONS[4])["seam"] > 3
    for section in (*SECTIONS[1:4], *SECTIONS[5:]):
        assert guards.measures(section)["seam"] < 2 and not any("jump" in text for text in guards.warnings(section))
    assert "seam" not in guards.measures(SECTIONS[0])


def test_fault_17_fast_motion_is_no_seam():
    fast = scene(speed=0.8) + torch.randn(FRAMES, 48, 64, 3, generator=torch.Generator().manual_seed(1)) * 0.08
    assert not any("jump" in text for text in all_warnings(guarded(fast.clamp(0, 1))))


def drifting(kind: str) -> torch.Tensor:
    video = scene(speed=0.2)
    amount = (torch.arange(FRAMES) / 36).view(-1, 1, 1, 1)
    if kind == "brightness":
        return (video + amount * 0.012).clamp(0, 1)
    if kind == "saturation":
        grey = video.mean(dim=-1, keepdim=True)
        return (grey + (video - grey) * (1 + amount * 0.08)).clamp(0, 1)
    sharp = video.movedim(-1, 1)
    blurred = torch.nn.functional.avg_pool2d(sharp, 9, 1, 4)
    return (sharp + (blurred - sharp) * amount / 9).movedim(1, -1)


@pytest.mark.parametrize("kind", ["brightness", "saturation", "sharpness"])
def test_fault_15_drift_is_named_with_the_section(kind):
    guards = guarded(drifting(kind))
    texts = guards.warnings(SECTIONS[-1])
    assert any(f"Section 8: {kind} drifts by" in text and "This is drift" in text for text in texts)
    assert not any(kind in text for text in guards.warnings(SECTIONS[1])), "two sections are no slope"


def test_fault_15_a_step_in_brightness_is_named():
    video = scene()
    video[181:] = (video[181:] + 0.06).clamp(0, 1)
    guards = guarded(video)
    assert any("Section 6: brightness steps by +1" in text for text in guards.warnings(SECTIONS[5]))
    assert not any("steps" in text for s in (*SECTIONS[:5], *SECTIONS[6:]) for text in guards.warnings(s))


def test_sections_that_have_not_come_are_left_out():
    video = scene()
    guards = VideoGuards(SECTIONS)
    assert guards.measures(SECTIONS[2]) == {} and guards.warnings(SECTIONS[2]) == ()
    guards.add(200, video[200:])
    found = guards.measures(SECTIONS[7])
    assert guards.complete(SECTIONS[7]) and not guards.complete(SECTIONS[5])
    assert "luma_step" in found and "luma_slope" not in found and "seam" in found


def test_measures_read_from_a_manifest_warn_the_same():
    guards = guarded(drifting("brightness"))
    found = guards.measures(SECTIONS[-1])
    assert all(isinstance(value, float) for value in found.values())
    assert warnings_of(8, dict(found)) == guards.warnings(SECTIONS[-1])


def test_ten_minutes_take_little_memory():
    sections = [GuardSection(i, 36 * i, 36 * i + 36) for i in range(500)]
    guards = VideoGuards(sections)
    piece = scene(36, 16, 16)
    for section in sections:
        guards.add(section.start_frame, piece)
    kept = sum(array.nbytes for stretch in guards.series.stretches for array in (*stretch.head, *stretch.tail))
    assert len(guards.series.stretches) == 1 and kept < 100_000 and len(guards.series.luma) == 18_000


def test_nan_frames_are_measured_as_black():
    video = scene(37)
    video[5] = float("nan")
    assert np.isfinite(list(guarded(video, [0, 37], sections=SECTIONS[:1]).measures(SECTIONS[0]).values())).all()
