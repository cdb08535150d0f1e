"""The section loop on core's Wan: every family, against a plain loop over plain sums; projects, refusals, warnings."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch

from frame_memory.model import families, wan
from frame_memory.model.framepack import MODEL_OPTION
from frame_memory.model.memory import detach
from frame_memory.model.preserved_memory import attach_preserved, new_memory, with_tokens
from frame_memory.model.provenance import LORAS, NamedLora
from frame_memory.plan import BLANK, START, PlanError, parse_timeline
from frame_memory.sampling import long_video
from frame_memory.sampling.changes import SectionChange
from frame_memory.sampling.guards import SectionError
from frame_memory.sampling.identity import model_fields
from frame_memory.sampling.long_video import describe_needs
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.prompts import EncodedTimeline

from .conftest import guider_for
from .wan_runs import SCHEDULE, SIGMAS, TEXT, attached, made, prompt, reference, sections, start

T2V, I2V, A14B, TI2V = reference.FAMILIES
RATE = {T2V: 16, I2V: 16, A14B: 16, TI2V: 24}


def plainly(models, family: str, count: int, cfgs=(2.0, 2.0), boundary: float = 2.0, seed: int = 7):
    """The video `[C, T, H, W]` by sums in float64: Euler on sigma, CFG, history gathered frame by frame.

    models: of high noise and of low noise. boundary: above 1 the second one makes every step.
    """
    channels, out, _ = reference.FAMILIES[family]
    latent, first = models[0].model.latent_format, start(family)["samples"].double()
    video, generator = {0: first[:, :, :1]}, torch.Generator().manual_seed(seed)
    texts = [reference.drawn(1, 4, TEXT, seed=s)[0] for s in (3, 4)]
    for section in sections(count):
        shape = (1, out, section.stop - section.start, *first.shape[-2:])
        x = torch.randn(shape, generator=generator).double()

        seen = {
            group: torch.cat([
                torch.zeros_like(first) if ref == BLANK else latent.process_in(video[0 if ref == START else ref])
                for ref in group.frames
            ], 2)[0]
            for group in section.groups
        }  # fmt: skip
        for sigma, then in zip(SIGMAS, SIGMAS[1:]):
            which = 0 if sigma >= boundary else 1
            sd = models[which].model.diffusion_model.state_dict()
            own = models[which].get_additional_models_with_key(wan.KEY)[0].model
            convs = {1: own.proj, 2: own.proj_2x, 4: own.proj_4x}
            context = [
                (g.kernel, g.positions, convs[g.kernel].weight, convs[g.kernel].bias, seen[g]) for g in section.groups
            ]
            shown = torch.cat([x[0], torch.zeros(channels - out, *x.shape[2:])])
            velocity = [
                reference.forward(sd, shown, [1000 * sigma] * x.shape[2], text, None, context, None,
                                  section.positions, out)
                for text in texts
            ]  # fmt: skip
            x = x + (then - sigma) * (velocity[1] + cfgs[which] * (velocity[0] - velocity[1]))
        window = latent.process_out(x)
        video |= {section.start + i: window[:, :, i : i + 1] for i in range(window.shape[2])}
    return torch.cat([video[i] for i in range(len(video))], 2)


@pytest.mark.parametrize("family", [T2V, A14B, TI2V])
def test_three_sections_equal_a_plain_loop_at_an_odd_size(family):
    model = attached(family)
    latent, report = made(model, family, seconds=3 * 8 / RATE[family])
    with torch.no_grad():
        expected = plainly((model, model), family, 3)
    assert latent["samples"].shape == (1, reference.FAMILIES[family][1], 7, 5, 6)
    # fp32 against float64 through three sections of four steps.
    assert torch.allclose(latent["samples"].double(), expected, atol=2e-3, rtol=2e-3)
    assert latent["frame_memory"]["fps"] == RATE[family] and f"at {RATE[family]} fps" in report
    pixels = 16 if family == TI2V else 8
    assert f"multiples of {2 * pixels}" in report and f"{6 * pixels}x{5 * pixels}" in report


@pytest.mark.parametrize("family", [I2V, A14B])
def test_the_window_of_an_image_to_video_model_holds_no_given_frame(family):
    """Core's own mask and image for a window in the middle of a video: zeros, whatever the prompt brings."""
    model, seen = attached(family), []

    def watch(executor, x, *args, **kwargs):
        seen.append(x[:, 16:].clone())
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", watch)
    vision = None if family == A14B else clip_vision()
    bare, _ = made(model, family, guider=guider_for(model, prompt(3, clip_vision_output=vision)))
    given = {"concat_latent_image": reference.drawn(1, 16, 2, 5, 6), "concat_mask": torch.zeros(1, 1, 2, 5, 6)}
    guider = guider_for(model, prompt(3, clip_vision_output=vision, **given))
    latent, report = made(model, family, guider=guider)
    assert torch.equal(bare["samples"], latent["samples"]) and "'Wan Image To Video'" in report
    assert "clip_vision_h" not in report
    assert seen and all(not extra.any() and extra.shape[1] == 20 for extra in seen)
    assert guider.original_conds["positive"][0]["concat_mask"] is given["concat_mask"]


def clip_vision():
    import comfy.clip_vision

    seen = comfy.clip_vision.Output()
    seen["penultimate_hidden_states"] = reference.drawn(1, 5, 1280, seed=8)
    return seen


def test_clip_vision_of_the_picture_reaches_the_model():
    model = attached(I2V)
    shown = made(model, I2V, guider=guider_for(model, prompt(3, clip_vision_output=clip_vision())))
    without = made(model, I2V, guider=guider_for(model, prompt(3)))
    assert not torch.allclose(shown[0]["samples"], without[0]["samples"], atol=1e-3)
    assert "clip_vision_h" in without[1] and "clip_vision_h" not in shown[1]


def test_each_video_of_a_batch_in_bf16_is_finite_and_its_own():
    model = attached(T2V, dtype=torch.bfloat16)
    latent, _ = made(model, T2V, start=start(T2V, batch=2))
    assert latent["samples"].shape == (2, 16, 5, 5, 6) and torch.isfinite(latent["samples"]).all()
    assert torch.equal(latent["samples"][:, :, :1], start(T2V, batch=2)["samples"])
    assert not torch.allclose(latent["samples"][0], latent["samples"][1], atol=1e-2)


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_a_memory_that_is_taken_out_leaves_no_trace(family):
    model = attached(family)
    plain, _ = made(model, family)
    memory = with_tokens(new_memory(model, "2x2x2", channels=(4, 6, 8, 8), heads=2), 1000)
    remembering = attach_preserved(model, memory)
    shown, _ = made(remembering, family, memory=memory)
    assert torch.equal(shown["samples"][:, :, :3], plain["samples"][:, :, :3])  # section 1 has nothing to remember
    assert not torch.allclose(shown["samples"][:, :, 3:], plain["samples"][:, :, 3:], atol=1e-3)
    for again in (model, remembering, detach(remembering)):
        assert torch.equal(made(again, family)[0]["samples"], plain["samples"])


# --- projects -------------------------------------------------------------------------------------------------------


def project(tmp_path) -> ProjectRequest:
    return ProjectRequest(tmp_path / "frame_memory", "p")


def test_resume_reroll_and_branch_are_exact(tmp_path):
    """A run that is cut off goes on to the same bits; a re-rolled section leaves the ones before; and back again."""
    model = attached(T2V)
    expected, _ = made(model, T2V, seconds=2.0)
    stopped = attached(T2V)

    def stop(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * 2 * 4 + 3:
            raise RuntimeError("the machine broke")
        return executor(*args, **kwargs)

    calls: list = []
    stopped.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", stop)
    with pytest.raises(RuntimeError, match="machine broke"):
        made(stopped, T2V, seconds=2.0, project=project(tmp_path))
    done = made(model, T2V, seconds=2.0, project=project(tmp_path))
    assert "2 of 4 sections were finished before" in done.report
    assert torch.equal(done.latent["samples"], expected["samples"])
    other = made(model, T2V, seconds=2.0, project=project(tmp_path), changes=(SectionChange(3, seed=99),))
    assert torch.equal(other.latent["samples"][:, :, :5], expected["samples"][:, :, :5])
    assert not torch.allclose(other.latent["samples"][:, :, 5:7], expected["samples"][:, :, 5:7])
    back = made(model, T2V, seconds=2.0, project=project(tmp_path))
    assert torch.equal(back.latent["samples"], expected["samples"])
    assert "4 of 4 sections were finished before" in back.report


def test_other_patchifiers_make_other_sections(tmp_path):
    made(attached(T2V), T2V, project=project(tmp_path))
    model = attached(T2V)
    beside = model.get_additional_models_with_key(wan.KEY)[0].model
    with torch.no_grad():
        beside.proj.weight.mul_(1.01)
    done = made(model, T2V, project=project(tmp_path))
    assert "All 2 sections were made now" in done.report and "patchifiers" in done.report


def test_which_lora_patchifiers_name_decides_no_section():
    """It is only said; the LoRA itself counts where it lies on the MODEL. Files from before named none."""
    found = []
    for notes in ({}, {LORAS: ()}, {LORAS: (NamedLora("a.safetensors", "1f"),)}, {families.SCHEDULE: "td_f2k1_g2"}):
        model = attached(T2V)
        said = {families.PATCHIFIERS: "x.safetensors", **notes}
        model.model_options = {**model.model_options, MODEL_OPTION: said}
        found.append(model_fields(model))
    assert found[0] == found[1] == found[2] != found[3]


def test_a_timeline_and_an_existing_video_work():
    timeline = parse_timeline("0-1.8: a\n1.8-: b", 0)  # the sections begin at 1.3 and 1.8 s
    encoded = EncodedTimeline(timeline, (prompt(3), prompt(9, tokens=7)))
    model, history = attached(T2V), {**start(T2V, frames=6), "frame_memory": {"base": "Wan21", "fps": 16.0}}
    latent, _ = made(model, T2V, timeline=encoded, history=history)
    assert latent["samples"].shape[2] == 10 and torch.equal(latent["samples"][:, :, :6], history["samples"])
    plain, _ = made(model, T2V, history=history)
    assert torch.equal(plain["samples"][:, :, :8], latent["samples"][:, :, :8])
    assert not torch.allclose(plain["samples"][:, :, 8:], latent["samples"][:, :, 8:])


# --- what is refused or said ----------------------------------------------------------------------------------------


def test_a_model_without_patchifiers_is_refused_with_the_node_to_put_in():
    bare = reference.load(T2V, layers=1)
    for model in (bare, wan.attach(bare)):
        with pytest.raises(PlanError, match="no patchifiers.*'Wan Frame Context' between 'Load Diffusion Model'"):
            made(model, T2V)


def test_latents_of_another_family_or_rate_are_refused():
    model = attached(T2V)
    with pytest.raises(PlanError, match="was made with the HunyuanVideo VAE.*Load VAE.*to the Wan 2.1 VAE"):
        made(model, T2V, start={**start(T2V), "frame_memory": {"base": "HunyuanVideo"}})
    history = {**start(T2V, frames=5), "frame_memory": {"base": "Wan21", "fps": 30.0}}
    with pytest.raises(PlanError, match="'history'.*30 frames a second.*makes 16"):
        made(model, T2V, history=history)
    with pytest.raises(PlanError, match="nor can Wan"):
        made(model, T2V, end=start(T2V))


@pytest.mark.parametrize("trouble", [float("nan"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_helps_is_to_be_set_in_the_node_that_loads_wan(trouble):
    model = attached(T2V)

    def broken(executor, x, *args, **kwargs):
        if isinstance(trouble, Exception):
            raise trouble
        return executor(x, *args, **kwargs) * trouble

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", broken)
    error = SectionError if trouble != trouble else comfy.model_management.OOM_EXCEPTION
    with pytest.raises(error, match="weight_dtype.* in 'Load Diffusion Model'") as raised:
        made(model, T2V)
    assert "'Load FramePack Model'" not in str(raised.value)


def test_more_ram_is_to_be_saved_in_the_node_that_loads_wan(monkeypatch):
    def scarce(needs, free, *args):
        return describe_needs({**needs, "latents": free + 2**30}, 0, *args)

    monkeypatch.setattr(long_video, "describe_needs", scarce)
    _, report = made(attached(T2V), T2V)
    assert "GiB of RAM more than is free" in report and "fp8_e4m3fn in 'Load Diffusion Model'" in report


def test_what_a_loader_noted_is_said_and_counts():
    model = attached(T2V)
    said = {families.TRAINED: False, families.PATCHIFIERS: "x.safetensors", families.SCHEDULE: "td_f2k1_g2"}
    model.model_options = {**model.model_options, MODEL_OPTION: {**said, families.FPS_SAID: 24.0}}
    latent, report = made(model, T2V, seconds=1 / 3)
    assert "are untrained" in report and "x.safetensors was trained on the schedule td_f2k1_g2" in report
    assert SCHEDULE in report and latent["frame_memory"]["fps"] == 24
    assert "untrained" not in made(attached(T2V), T2V)[1]


def test_a_memory_that_was_trained_behind_these_patchifiers_speaks_for_them_and_not_for_others():
    model = attached(T2V)
    said = {families.TRAINED: False, families.PATCHIFIERS: "x.safetensors", families.SCHEDULE: "td_f2k1_g2"}
    model.model_options = {**model.model_options, MODEL_OPTION: said}
    memory = with_tokens(new_memory(model, "2x2x2", channels=(4, 6, 8, 8), heads=2), 1000)
    its, other = wan.fingerprint(model), wan.fingerprint(reference.load(T2V, layers=1))
    for schedule, through in ((SCHEDULE, its), ("td_f3k1_g2", its), (SCHEDULE, other), (SCHEDULE, "")):
        taught = replace(memory, trained=True, label="m.safetensors", schedule=schedule, patchifiers=through)
        _, report = made(attach_preserved(model, taught), T2V, memory=taught, seconds=0.5)
        theirs = "others than those that m.safetensors was trained behind" in report
        assert theirs is (through == other)
        assert ("are untrained" in report and "x.safetensors was trained on" in report) is (through != its)
        assert ("m.safetensors was trained on the schedule td_f3k1_g2" in report) is (schedule != SCHEDULE)
