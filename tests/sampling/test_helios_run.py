"""Helios through the section loop against diffusers' own pipeline; its videos of clips from latents to files."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

from benchmarks.parity_models import randomise, relative_rms
from frame_memory.forcing.context_run import STAGE_CONTEXT, ContextRequest, ContextRun
from frame_memory.forcing.preserving_run import STAGE_QUERY, PreservingRequest, PreservingRun
from frame_memory.model import helios, wan, wan_file
from frame_memory.model.base_signature import Base
from frame_memory.model.preserved_memory import PreservedMemory, attach_preserved, check_preserved, new_memory
from frame_memory.plan import PlanError
from frame_memory.sampling.changes import SectionChange
from frame_memory.sampling.long_video import Live
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.stored import open_stored
from frame_memory.video.save import pixels_of, plan_save

from .conftest import guider_for, run
from .wan_runs import euler, reference, shipped_vae

TEXT, SEED, CFG = 24, 11, 2.0
SIGMAS = [1.0, 0.9, 0.6]
CLIPS = 3
SECONDS = CLIPS * 33 / 24
BOUND = 1e-4


@pytest.fixture(scope="module")
def theirs():
    config = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1, "ffn_dim": 64, "text_dim": TEXT}
    model = HeliosTransformer3DModel(**config).eval()
    randomise(model, 0)
    return model


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("helios")
    theirs.save_pretrained(path)
    return helios.load_helios(str(path), {"dtype": torch.float32})


@pytest.fixture(scope="module")
def vae():
    return shipped_vae("frame_memory_selftest_wan_vae")


def text(seed: int) -> torch.Tensor:
    return reference.drawn(1, 5, TEXT, seed=seed)


def picture(batch: int = 1, height: int = 6, width: int = 10) -> torch.Tensor:
    """A start as 'FramePack Image' makes it: 9 latent frames in VAE space, the first and the last count."""
    return reference.drawn(batch, 16, 9, height, width, seed=2)


def ours(model, start: torch.Tensor, **more):
    settings = {
        "guider": guider_for(model, [[text(3), {}]], [[text(4), {}]], cfg=CFG), "preset": "Helios", "kind": None,
        "start": {"samples": start, "frame_memory": {"base": "selftest Wan"}}, "seed": SEED, "sampler": euler(),
        "sigmas": torch.tensor([*SIGMAS, 0.0]), "seconds": SECONDS,
    }  # fmt: skip
    return run(model, **{**settings, **more})


def pipeline(theirs, start: torch.Tensor, latent, **more):
    """diffusers' latents in model space, and the frames of each of its decodes."""
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = HeliosPipeline(None, None, vae, HeliosScheduler(stages=1, scheduler_type="euler"), theirs)
    pipe.set_progress_bar_config(disable=True)
    decoded, decode = [], vae.decode
    vae.decode = lambda z, **options: decoded.append(z.shape[2]) or decode(z, **options)
    if start.any():
        scaled = latent.process_in(start)
        more = {**more, "image_latents": scaled[:, :, :1], "fake_image_latents": scaled[:, :, -1:]}
    words, others = (text(seed).expand(start.shape[0], -1, -1) for seed in (3, 4))
    made = pipe(
        prompt_embeds=words, negative_prompt_embeds=others, guidance_scale=CFG, height=8 * start.shape[3],
        width=8 * start.shape[4], num_frames=CLIPS * 33, num_inference_steps=len(SIGMAS), sigmas=np.array(SIGMAS),
        generator=torch.Generator().manual_seed(SEED), output_type="latent", return_dict=False, **more,
    )[0]  # fmt: skip
    return made, decoded


STARTS = {"picture": picture(batch=2), "text": torch.zeros(1, 16, 1, 6, 10)}


@pytest.mark.parametrize("kind", STARTS)
def test_three_sections_equal_diffusers_pipeline_from_the_same_seed(theirs, model, kind):
    """Its noise of the start, its history and its anchor; every section at fp32."""
    latent = model.model.latent_format
    made, report = ours(model, STARTS[kind])
    expected, decoded = pipeline(theirs, STARTS[kind], latent)
    got = latent.process_in(made["samples"])[:, :, 1:]
    assert decoded == [9] * CLIPS and got.shape[2] == 9 * CLIPS
    for clip in range(CLIPS):
        part = slice(9 * clip, 9 * clip + 9)
        assert relative_rms(got[:, :, part], expected[:, :, -9 * CLIPS :][:, :, part]) <= BOUND
    assert f"make {33 * CLIPS} frames = {SECONDS:.2f} s at 24 fps" in report
    assert ("Text to video" in report) == (kind == "text")


def test_the_bound_notices_a_start_without_its_noise(theirs, model):
    latent = model.model.latent_format
    made = latent.process_in(ours(model, STARTS["picture"], seconds=33 / 24)[0]["samples"])
    expected, _ = pipeline(theirs, STARTS["picture"], latent, add_noise_to_image_latents=False)
    assert relative_rms(made[:, :, 1:], expected[:, :, 1:10]) > 100 * BOUND


# ---- from latents to pictures --------------------------------------------------------------------------------------


class CountedEuler(type(euler())):
    """Euler that counts sections and fails at one of them if told so; what it counts with is the class's."""

    fail_at, count = None, 0

    def sample(self, *args, **kwargs):
        type(self).count += 1
        if type(self).count == type(self).fail_at:
            raise RuntimeError("power cut")
        return super().sample(*args, **kwargs)


def made_with(model, folder, fail_at=None, **more):
    """A run into a project; what it made (None where it failed as told) and how many sections it sampled."""
    CountedEuler.fail_at, CountedEuler.count = fail_at, 0
    sampler, made = CountedEuler(euler().sampler_function), None
    with pytest.raises(RuntimeError, match="power cut") if fail_at else contextlib.nullcontext():
        made = ours(model, SMALL, sampler=sampler, project=ProjectRequest(folder, "p"), **more)
    return made, CountedEuler.count


SMALL = picture(height=2, width=4)


def alone(vae, samples: torch.Tensor) -> torch.Tensor:
    """Pixels [T,H,W,C] of core's own decode of each nine latent frames, side by side."""
    parts = samples[:, :, 1:].split(9, dim=2)
    return torch.cat([vae.decode(part)[0].float() for part in parts])


def saved(vae, source, windows=None) -> torch.Tensor:
    plan = plan_save(vae, source, windows=windows)
    chunks = list(pixels_of(plan, vae, 0, None, None))
    assert plan.fps == 24 and sum(map(len, chunks)) == plan.frames
    return torch.cat(chunks)


@torch.inference_mode()
def test_a_run_that_breaks_goes_on_bit_identical_and_every_clip_is_decoded_alone(model, vae, tmp_path, written):
    whole, _ = ours(model, SMALL)
    expected = alone(vae, whole["samples"])
    assert len(expected) == 33 * CLIPS and torch.equal(saved(vae, whole), expected)

    shown = []

    def show(path):
        frames = written.probe(path).frames
        shown.append((path.name, frames))
        written.check_video(path, frames, 24, (32, 16))

    made_with(model, tmp_path, fail_at=3, live=Live(vae, show=show))
    stored = open_stored(tmp_path, "p")
    assert "0.0 to 2.8 s of 4.1 s" in stored.describe()
    assert torch.equal(saved(vae, stored.samples(), stored.windows), expected[:66])

    done, count = made_with(model, tmp_path, live=Live(vae, show=show))
    assert count == 1 and torch.equal(done.latent["samples"], whole["samples"])
    assert "Finished: 99 frames = 4.12 s" in done.report
    # A preview that still waited when the run broke off is not made any more.
    before, after = shown[:-2], shown[-2:]
    assert after == [("p-unfinished.mp4", 66), ("preview.mp4", 99)]
    assert before in ([("preview.mp4", 33), ("preview.mp4", 66)], [("preview.mp4", 33)], [("preview.mp4", 66)], [])
    written.check_video(done.video, 99, 24, (32, 16))


def test_a_section_made_anew_keeps_those_before_it_and_a_longer_video_keeps_all(model, tmp_path):
    first, count = made_with(model, tmp_path)
    longer, more = made_with(model, tmp_path, seconds=SECONDS + 33 / 24)
    assert (count, more) == (3, 1)
    assert torch.equal(longer.latent["samples"][:, :, :28], first.latent["samples"])
    anew, again = made_with(model, tmp_path, changes=[SectionChange(number=2, seed=5)])
    same = (anew.latent["samples"] == first.latent["samples"]).flatten(3).all(3).all((0, 1))
    assert again == 2 and same[:10].all() and not same[10:].any()


def test_what_it_was_not_trained_on_is_warned_of(model, caplog):
    schedule = "f1k1_td_f16k4f2k2f1k1_g20"
    _, report = ours(model, SMALL, preset=schedule, seconds=1)
    assert "was trained on the schedule 'F1 forward' (f1k1_td_f16k4f2k2f1k1_g9; 'Helios' is the same)" in report
    assert "makes 77 frames" in report
    assert "was trained on" not in ours(model, SMALL, seconds=1)[1]


MARKED = {"frame_memory": {"base": "selftest Wan", "fps": 24.0, "order": "forward", "window": 9}}
MEMORY = PreservedMemory(encoder=None, specs=(), label="", trained=True)
REFUSED = {
    "memory": ({"memory": MEMORY}, "'memory' .* is trained on running videos"),
    "one frame": ({"start": SMALL[:, :, :1]}, "holds 1 latent frame, and this MODEL begins from 9"),
    "history": ({"history": {"samples": SMALL, **MARKED}}, "'history' .* feed 'image' of 'Video History'"),
    "a running video": ({"initial": {"samples": picture(height=2, width=4), **MARKED}}, "holds one running video"),
    "other clips": (
        {"initial": {"samples": SMALL, "frame_memory": {**MARKED["frame_memory"], "clips": True, "window": 20}}},
        "holds clips of 20 latent frames, and each section of this MODEL is a clip of 9",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_take_is_refused_before_the_first_step(model, what):
    given, said = REFUSED[what]
    with pytest.raises(PlanError, match=said):
        ours(model, **{"start": SMALL, **given})


TAUGHT = {
    "Train Frame Preservation": lambda model, file, path: PreservingRun(
        model, None, [], PreservingRequest(STAGE_QUERY, 1), path
    ),
    "Train Wan Frame Context": lambda model, file, path: ContextRun(
        model, None, [], ContextRequest(STAGE_CONTEXT, 1), path
    ),
    "Wan Frame Context, new": lambda model, file, path: wan_file.with_new(model),
    "Wan Frame Context, a file": lambda model, file, path: wan_file.with_file(model, file),
    "Frame Preservation Encoder": lambda model, file, path: check_preserved(MEMORY, model, "the node"),
    "attached": lambda model, file, path: attach_preserved(model, MEMORY),
    "new encoders": lambda model, file, path: new_memory(model, "4x4x2"),
}


@pytest.mark.parametrize("what", TAUGHT)
def test_nothing_is_taught_or_attached_that_its_videos_cannot_use(model, tmp_path, what):
    file = wan_file.PatchifierFile("a.safetensors", Base.of(model), wan.patchifiers_of(model).state_dict())
    with pytest.raises(ValueError, match=r"\(Helios\) is a clip of its own.*Expected .*'Load Diffusion Model'"):
        TAUGHT[what](model, file, tmp_path)


def test_its_own_video_can_be_made_over(model):
    made = ours(model, SMALL)[0]
    over = ours(model, SMALL, initial=made, sigmas=torch.tensor([0.3, 0.0]))[0]
    assert over["samples"].shape == made["samples"].shape and not torch.equal(over["samples"], made["samples"])
