"""The section loop on a tiny real model: what goes in, what comes out, what stays untouched."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch

from frame_memory.model.transformer import FramePackTransformer
from frame_memory.plan import PlanError
from frame_memory.sampling.prompts import EncodedTimeline

from .conftest import conditioning, guider_for, of_kind, run, start_latent


def test_length_start_frame_and_mark(model):
    start = start_latent()
    latent, report = run(model, seconds=3.6, start=start)
    assert latent["samples"].shape == (1, 16, 28, 6, 10)
    assert torch.equal(latent["samples"][:, :, :1], start["samples"])
    assert latent["frame_memory"]["order"] == "forward" and latent["frame_memory"]["fps"] == 30
    assert "109" in report  # 4 * 28 - 3 frames


@pytest.mark.parametrize(("kind", "preset"), [("F0", "F0 inverted"), ("F1", "F1 forward")])
def test_same_seed_same_video_and_other_seed_another(model, kind, preset):
    first, _ = run(model, kind=kind, preset=preset)
    again, _ = run(model, kind=kind, preset=preset)
    other, _ = run(model, kind=kind, preset=preset, seed=8)
    assert torch.equal(first["samples"], again["samples"])
    assert not torch.allclose(first["samples"], other["samples"])


def test_both_ends_first_makes_every_frame(model):
    latent, _ = run(model, kind=None, preset="td_f16k4f2k2f1k1_g9_x_f1k1", seconds=3.6)
    assert torch.isfinite(latent["samples"]).all()
    assert (latent["samples"].abs().amax(dim=(0, 1, 3, 4)) > 0).all()


def test_noise_is_one_generator_carried_on(model):
    """Section k's noise is the k-th draw of one CPU generator, not seed + k (reference/framepack.md section 3)."""
    drawn = []

    class Spy(comfy.samplers.KSAMPLER):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            drawn.append(noise.clone())
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)

    from frame_memory.sampling.unipc import sample_framepack_unipc

    run(model, seconds=3.6, sampler=Spy(sample_framepack_unipc), seed=11)
    generator = torch.Generator().manual_seed(11)
    for noise in drawn:
        assert torch.equal(noise, torch.randn(noise.shape, generator=generator))
    assert len(drawn) == 3


class NoiseOfItsOwn:
    """A NOISE whose draw for each video of a batch depends on that video alone; `first` is the number of the first."""

    def __init__(self, seed: int, first: int = 0):
        self.seed, self.first = seed, first

    def generate_noise(self, latent):
        shape = latent["samples"].shape
        seeds = [1000 * self.seed + self.first + i for i in range(shape[0])]
        return torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])


@pytest.mark.parametrize(("kind", "preset"), [("F0", "F0 inverted"), ("F1", "F1 forward")])
def test_fault_19_each_video_of_a_batch_equals_its_single_run(model, kind, preset):
    """Batch 2, each with its own start and noise, at an odd latent size (padded and cropped)."""
    start = start_latent(batch=2, height=7, width=9)
    settings = {"kind": kind, "preset": preset, "seconds": 2.4}
    latent, _ = run(model, start=start, noise=NoiseOfItsOwn(3), **settings)
    assert latent["samples"].shape == (2, 16, 19, 7, 9)
    assert torch.equal(latent["samples"][:, :, :1], start["samples"])
    for i in range(2):
        alone, _ = run(model, start={"samples": start["samples"][i : i + 1]}, noise=NoiseOfItsOwn(3, i), **settings)
        assert torch.allclose(latent["samples"][i], alone["samples"][0], atol=1e-4), i
    assert not torch.allclose(latent["samples"][0], latent["samples"][1], atol=0.1)


def test_inputs_are_not_changed(model):
    start, history = start_latent(), start_latent(frames=5, seed=3)
    before = start["samples"].clone(), history["samples"].clone()
    guider = guider_for(of_kind(model, "F1"))
    conds = {k: [dict(c) for c in v] for k, v in guider.original_conds.items()}
    options = set(guider.model_options)
    run(model, guider=guider, start=start, history=history)
    assert torch.equal(start["samples"], before[0]) and torch.equal(history["samples"], before[1])
    assert set(guider.model_options) == options
    for key, entries in guider.original_conds.items():
        assert [set(e) for e in entries] == [set(e) for e in conds[key]]


def test_history_is_kept_and_continued(model):
    history = start_latent(frames=12, seed=3)
    latent, _ = run(model, history=history, seconds=1.2)
    assert latent["samples"].shape[2] == 21
    assert torch.equal(latent["samples"][:, :, :12], history["samples"])
    alone, _ = run(model, seconds=1.2)
    assert not torch.allclose(latent["samples"][:, :, 12:], alone["samples"][:, :, 1:])


def test_end_frame_acts_on_f0_and_is_refused_for_f1(model):
    end = start_latent(seed=4)
    plain, _ = run(model, kind="F0", preset="F0 inverted")
    aimed, _ = run(model, kind="F0", preset="F0 inverted", end=end)
    assert not torch.allclose(plain["samples"], aimed["samples"])
    with pytest.raises(PlanError, match="F1 cannot aim.*FramePack Image"):
        run(model, end=end)


def test_negative_prompt_acts_with_cfg(model):
    negative = conditioning(seed=5, tokens=4)
    low, _ = run(model, guider=guider_for(of_kind(model, "F1"), negative=negative, cfg=1.0))
    high, _ = run(model, guider=guider_for(of_kind(model, "F1"), negative=negative, cfg=3.0))
    assert not torch.allclose(low["samples"], high["samples"])


def test_initial_latents_at_low_strength_stay_close(model):
    initial = start_latent(frames=19, seed=6)
    from frame_memory.plan import sigma_schedule

    sigmas = torch.tensor(sigma_schedule(3, 1.5)) * 0.02
    latent, _ = run(model, initial=initial, sigmas=sigmas)
    moved = (latent["samples"][:, :, 1:] - initial["samples"][:, :, 1:]).abs().mean()
    assert moved < 0.1
    with pytest.raises(PlanError, match="initial"):
        run(model, initial=start_latent(frames=3))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_any_stock_sampler_and_scheduler(model, name):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    given = sigmas.clone()
    latent, _ = run(model, sampler=comfy.samplers.sampler_object(name), sigmas=sigmas, seconds=1.2)
    assert torch.isfinite(latent["samples"]).all()
    assert torch.equal(sigmas, given)  # they are ComfyUI's, kept for the next run; core's uni_pc writes into its own


def test_timeline_changes_only_its_own_sections(model):
    from frame_memory.plan import parse_timeline

    def encoded(text):
        timeline = parse_timeline(text, 0)
        seeds = {"a": 1, "b": 9}
        return EncodedTimeline(timeline, tuple(conditioning(seeds[e.text]) for e in timeline.entries))

    same, _ = run(model, seconds=3.6, timeline=encoded("a"))
    changed, _ = run(model, seconds=3.6, timeline=encoded("0-2.4: a\n2.4-: b"))
    assert torch.equal(same["samples"][:, :, :19], changed["samples"][:, :, :19])
    assert not torch.allclose(same["samples"][:, :, 19:], changed["samples"][:, :, 19:])


# Of the first section made of two: frames of each group, which groups are blank, places of the window.
BLANK_SLOTS = {
    ("F1", "F1 forward"): ([16, 2, 1, 1], [True, True, False, False], tuple(range(20, 29))),
    ("F0", "F0 inverted"): ([16, 2, 1, 1], [True, True, False, True], tuple(range(10, 19))),
}


@pytest.mark.parametrize(("kind", "preset"), list(BLANK_SLOTS))
def test_fault_20_first_section_sees_blank_history_as_trained(model, kind, preset, monkeypatch):
    """What is not made yet is still fed, as zeros in model space; the other places hold the start frame."""
    seen = []

    def spy(network, *args, **kwargs):
        seen.append((kwargs["context_latents"], kwargs["context_layout"]))
        return real(network, *args, **kwargs)

    real = FramePackTransformer.pack
    monkeypatch.setattr(FramePackTransformer, "pack", spy)
    start = start_latent()
    run(model, guider=guider_for(of_kind(model, kind)), preset=preset, start=start, seconds=2.4, steps=1)
    latents, layout = seen[0]
    frames, blank, positions = BLANK_SLOTS[kind, preset]
    assert [c.shape[2] for c in latents] == frames
    scaled = start["samples"] * 0.476986
    for group, is_blank in zip(latents, blank, strict=True):
        assert (group == 0).all() if is_blank else torch.allclose(group, scaled, atol=1e-6)
    assert layout.positions == positions


def test_sizes_that_do_not_belong_together_name_both_inputs(model):
    with pytest.raises(PlanError, match="'end'.*'start'"):
        run(model, kind="F0", preset="F0 inverted", end=start_latent(height=8))
    with pytest.raises(PlanError, match="video latent"):
        run(model, start={"samples": torch.zeros(1, 4, 8, 8)})
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(PlanError, match="1.2 s"):
            run(model, seconds=seconds)


def test_fault_36_wrong_kind_is_refused(model):
    with pytest.raises(PlanError, match="F1 weights.*Frame Context Packer"):
        run(model, kind="F1", preset="F0 inverted")
    with pytest.raises(PlanError, match="F0 weights.*Frame Context Packer"):
        run(model, kind="F0", preset="F1 forward")
    _, report = run(model, kind=None, seconds=1.2)
    assert "nobody knows whether it is F0 or F1" in report


def test_fault_22_start_of_another_vae_family_is_refused(model):
    start = {**start_latent(), "frame_memory": {"base": "Wan21"}}
    guider = guider_for(of_kind(model, "F1", base="HunyuanVideo"))
    with pytest.raises(PlanError, match="Load VAE"):
        run(model, guider=guider, start=start)
