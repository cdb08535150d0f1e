"""Context finetuning as a run on a Wan MODEL of the host: it learns, resumes exactly, and leaves the MODEL alone."""

from __future__ import annotations

import sys
from pathlib import Path

import comfy.sd
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import wan_reference as reference

from frame_memory.forcing.clips import ForcingError, StoredVideo, stored_videos
from frame_memory.forcing.context_run import ContextRequest, ContextRun
from frame_memory.forcing.flow import Conditioning, WanConditioning
from frame_memory.forcing.prepared import read_videos, write_videos
from frame_memory.forcing.results import write_result
from frame_memory.forcing.sections import Disturbance, Sample, section_loss
from frame_memory.forcing.stages import PATCHIFIERS
from frame_memory.forcing.training_run import STAGE_HEAD, Faces, Request, TrainingRun
from frame_memory.forcing.video_trainer import VideoSettings
from frame_memory.model import families, tensor_file, wan, wan_file
from frame_memory.plan import plan_sections

T2V, I2V = "2.1 T2V", "2.1 I2V"
SCHEDULE = "f1k1_td_f4k2f1k1_g3"
QUIET = Faces(say=lambda text: None)


def videos(family: str = T2V, frames: int = 11) -> list[StoredVideo]:
    vision = reference.drawn(1, 3, 1280, seed=4) if reference.FAMILIES[family][2] else None
    cond = WanConditioning(reference.drawn(1, 3, 24, seed=3), vision)
    samples = [reference.drawn(1, 16, frames + i, 3, 4, seed=20 + i) for i in range(2)]
    return [StoredVideo(s, cond, f"video {i}", "Wan21") for i, s in enumerate(samples)]


def request(steps: int, **more) -> ContextRequest:
    settings = VideoSettings(rate=1e-3, warmup=1, average=0.5)
    return ContextRequest("", steps, rank=2, save_every=1, settings=settings, schedule=SCHEDULE, **more)


def behind(patcher, patchifiers: wan.Patchifiers):
    """A MODEL as 'Wan Frame Context' gives it."""
    return wan.attach(patcher, wan.patcher_of(patchifiers))


def weights(patcher) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in patcher.model.diffusion_model.state_dict().items()}


@pytest.mark.parametrize("family", [T2V, I2V])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(family, tmp_path):
    patcher = reference.load(family)
    before = weights(patcher)
    whole = ContextRun(patcher, None, videos(family), request(4), tmp_path / "whole", QUIET).run()
    ContextRun(patcher, None, videos(family), request(2), tmp_path / "halves", QUIET).run()
    halves = ContextRun(patcher, None, videos(family), request(4), tmp_path / "halves", QUIET).run()
    assert halves.resumed == 2 and halves.losses == whole.losses and len(whole.losses) == 4
    assert whole.weights.keys() == halves.weights.keys()
    assert all(torch.equal(whole.weights[name], halves.weights[name]) for name in whole.weights)
    assert all(torch.equal(value, before[name]) for name, value in weights(patcher).items())
    assert {name.split(".")[0] for name in whole.weights} == {"lora", PATCHIFIERS}


def test_its_files_load_in_wan_frame_context_and_in_cores_lora_loader(tmp_path):
    patcher = reference.load(I2V)
    run = ContextRun(patcher, None, videos(I2V), request(2), tmp_path / "run", QUIET)
    with torch.inference_mode():  # as core runs a node
        outcome = run.run()
        result = write_result(run, outcome, "mine", tmp_path / "models", tmp_path / "loras", pytest.fail)
        made, lines = wan_file.with_file(patcher, wan_file.read(str(result.checkpoint)))
    assert families.schedule_of(made) == SCHEDULE and f"Trained on the schedule {SCHEDULE}" in "".join(lines)
    for name, value in wan.copied_patchifiers(made).state_dict().items():
        assert torch.equal(value, outcome.weights[f"{PATCHIFIERS}.{name}"])
    patched, _ = comfy.sd.load_lora_for_models(made, None, tensor_file.read(str(result.lora)), 1.0, 0.0)
    assert len(patched.patches) == len(outcome.trained.pairs) > 0
    # The result begins another run, which is not the one that made it.
    with pytest.raises(ForcingError, match=r"other settings \(patchifiers: None"):
        ContextRun(made, None, videos(I2V), request(3), tmp_path / "run", QUIET).run()


def test_one_step_is_the_loss_of_one_section(tmp_path):
    """The same numbers by hand: the video and the section are drawn, then what section_loss draws."""
    patcher, disturbance = reference.load(T2V), Disturbance(0.5, 1.0)
    run = ContextRun(patcher, None, videos(), request(1, disturbance=disturbance), tmp_path, QUIET)
    outcome = run.run()
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(seed)
    chosen = videos()[int(torch.randint(2, (), generator=generator))]
    latents = patcher.model.process_latent_in(chosen.samples[:, :, :10])
    sections = plan_sections(SCHEDULE, sections=3).sections
    first = float(torch.rand((), generator=generator)) < 0.15
    i = 0 if first else int(torch.randint(3, (), generator=generator))
    sample = Sample(latents, chosen.cond, sections[i], sections[i - 1] if i else None)
    options = wan.options(wan.patchifiers_of(patcher))
    with torch.no_grad():
        expected, _ = section_loss(patcher.model.diffusion_model, sample, disturbance, 5.0, generator, options)
    assert outcome.losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert run.moment is not None and run.moment.estimate.shape == (1, 16, 3, 3, 4)


def test_training_goes_on_from_given_patchifiers_which_are_not_changed(tmp_path):
    patcher = reference.load(T2V)
    given = wan.patchifiers_of(patcher)
    with torch.no_grad():
        for value in given.parameters():
            value.mul_(0.5)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    settings = VideoSettings(rate=1e-12, warmup=1, average=0.0)
    frozen = ContextRequest("", 1, rank=2, settings=settings, schedule=SCHEDULE)
    made = ContextRun(behind(patcher, given), None, videos(frames=11), frozen, tmp_path, QUIET).run().weights
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert all(torch.allclose(made[f"{PATCHIFIERS}.{name}"], value) for name, value in before.items())


def test_a_run_goes_on_only_from_the_patchifiers_that_it_began_with(tmp_path):
    patcher = reference.load(T2V, layers=1)

    def run(patchifiers, steps: int):
        model = patcher if patchifiers is None else behind(patcher, patchifiers)
        return ContextRun(model, None, videos(), request(steps), tmp_path, QUIET).run()

    def scaled(factor: float) -> wan.Patchifiers:
        made = wan.patchifiers_of(patcher)
        with torch.no_grad():
            for value in made.parameters():
                value.mul_(factor)
        return made

    run(scaled(0.5), 1)
    assert run(scaled(0.5), 2).resumed == 1
    for other in (None, scaled(0.25)):
        with pytest.raises(ForcingError, match=r"other settings \(patchifiers: .*another name for the run"):
            run(other, 3)


def test_videos_are_kept_in_files_with_what_wan_reads(tmp_path):
    """All tokens of the text, though some are padding, no pooled text, and CLIP's layer before the last."""
    import comfy.clip_vision

    seen = comfy.clip_vision.Output()
    seen["penultimate_hidden_states"], seen["last_hidden_state"] = torch.ones(1, 3, 1280), torch.zeros(1, 3, 1280)
    text = reference.drawn(1, 6, 24)
    more = {"pooled_output": None, "attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0]]), "clip_vision_output": seen}
    made = stored_videos([{"samples": reference.drawn(1, 16, 11, 3, 4)}], [[[text, more]]], wan=True)
    write_videos(tmp_path, made, "Wan21")
    (video,), family = read_videos(tmp_path, pytest.fail)
    assert family == "Wan21" and isinstance(video.cond, WanConditioning)
    assert torch.equal(video.cond.text, text) and torch.equal(video.cond.vision, torch.ones(1, 3, 1280))
    assert torch.equal(video.samples, made[0].samples)


def test_what_cannot_be_trained_is_refused_in_words(tmp_path):
    patcher = reference.load(T2V)

    def run(given: list[StoredVideo], model=patcher):
        return ContextRun(model, None, given, request(1), tmp_path, QUIET)

    with pytest.raises(ForcingError, match="has 3 latent frames; expected at least 4"):
        run(videos(frames=3))
    packed = StoredVideo(reference.drawn(1, 16, 11, 3, 4), Conditioning(torch.zeros(1), torch.zeros(1)), "clip")
    with pytest.raises(ForcingError, match="clip was prepared for a FramePack model"):
        run([packed])
    with pytest.raises(ForcingError, match="48"):
        run([StoredVideo(reference.drawn(1, 48, 11, 3, 4), videos()[0].cond, "clip")])
    with pytest.raises(ForcingError, match="HunyuanVideo VAE"):
        run([StoredVideo(packed.samples, videos()[0].cond, "clip", "HunyuanVideo")])
    other = reference.load(T2V)
    other.model.diffusion_model.patch_size = (2, 2, 2)
    with pytest.raises(ValueError, match="Wan model reads"):
        run(videos(), other)


def test_framepacks_run_refuses_videos_that_were_prepared_for_wan(tmp_path):
    from safetensors.torch import save_file

    from benchmarks import parity_models

    from .test_train_run import load

    sd = parity_models.make_reference(seed=0, heads=1, double=1, single=1, text_features=64).state_dict()
    path = tmp_path / "FramePack_F1_tiny.safetensors"
    save_file({k: v.contiguous() for k, v in sd.items()}, str(path))
    with pytest.raises(ForcingError, match="was prepared for a Wan model"):
        TrainingRun(load(path), None, videos(), Request(STAGE_HEAD, 1), tmp_path)
