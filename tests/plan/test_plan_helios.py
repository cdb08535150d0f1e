"""The preset 'Helios' against diffusers' own pipeline: which frame stands in which slot of every chunk, and where."""

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

from frame_memory.plan import BLANK, PRESETS, START, plan_sections, section_count

CHUNKS = 4
SLOTS = {4: "long", 2: "mid", 1: "short"}


@pytest.fixture(scope="module")
def run():
    """What the pipeline hands its transformer in each chunk of an image-to-video run, and the latents it makes."""
    torch.manual_seed(0)
    transformer = HeliosTransformer3DModel(num_attention_heads=1, num_layers=1, ffn_dim=64, text_dim=8).eval()
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = HeliosPipeline(None, None, vae, HeliosScheduler(stages=1), transformer)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    start, first = torch.randn(2, 1, 16, 1, 4, 4).unbind()
    made = pipeline(
        prompt_embeds=torch.randn(1, 3, 8), image_latents=start, fake_image_latents=first, guidance_scale=1.0,
        add_noise_to_image_latents=False, height=32, width=32, num_frames=CHUNKS * 33, num_inference_steps=1,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    return calls, start, made


def test_every_slot_of_every_chunk_shows_the_planned_frame(run):
    calls, start, made_BCTHW = run
    plan = plan_sections(PRESETS["Helios"], sections=CHUNKS)
    assert len(calls) == CHUNKS and made_BCTHW.shape[2] == plan.total_frames
    for section, given in zip(plan.sections, calls, strict=True):
        assert given["indices_hidden_states"].tolist() == [list(section.positions)]
        for rate, word in SLOTS.items():
            groups = [group for group in section.groups if group.kernel == rate]
            positions = [position for group in groups for position in group.positions]
            assert given[f"indices_latents_history_{word}"].tolist() == [positions]
            latents = given[f"latents_history_{word}"]
            frames = [frame for group in groups for frame in group.frames]
            assert latents.shape[2] == len(frames)
            for slot, frame in zip(latents.unbind(2), frames, strict=True):
                shown = torch.zeros_like(slot) if frame == BLANK else made_BCTHW[:, :, frame]
                assert torch.equal(slot, start[:, :, 0] if frame == START else shown)


def test_the_frames_are_told_apart(run):
    calls, start, made_BCTHW = run
    frames = [start[:, :, 0], *made_BCTHW.unbind(2)]
    assert not [i for i in range(len(frames)) for j in range(i) if torch.equal(frames[i], frames[j])]


def test_text_to_video_begins_from_nothing_and_keeps_its_own_first_frame_as_anchor():
    """Against the pipeline's words: zeros in every slot, then the first frame of the first chunk as the prefix."""
    plan = plan_sections(PRESETS["Helios"], sections=3, fps=24.0, clips=True, has_start=False)
    seen = [[frame for group in section.groups for frame in group.frames] for section in plan.sections]
    assert set(seen[0]) == {BLANK} and not plan.sections[0].depends_on
    for section, frames in zip(plan.sections[1:], seen[1:], strict=True):
        before = range(section.start - 19, section.start)
        history = [frame if frame > 0 else BLANK for frame in before]
        assert sorted(frames) == sorted([1, *history]) and 0 in section.depends_on
    assert (plan.pixel_frames, plan.seconds) == (99, 99 / 24)
    assert [plan.span_seconds(s) for s in plan.sections] == [(33 * i / 24, 33 * (i + 1) / 24) for i in range(3)]
    assert "33-65" in plan.describe() and "decoded alone" in plan.describe()
    assert [section_count(s, 9, 24, clips=True) for s in (0.1, 1.375, 4.8, 60)] == [1, 1, 3, 44]
