"""The preset 'Helios' against diffusers' own pipeline: which frame stands in which slot of every chunk, and where."""

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

from frame_memory.plan import BLANK, PRESETS, START, plan_sections

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
