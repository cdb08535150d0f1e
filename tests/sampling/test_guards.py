"""Nothing silently wrong: broken numbers, other packs' patches, models without a context, RAM, cancel."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_hunyuan import HunyuanImageToVideo

from frame_memory.model import checkpoint
from frame_memory.model.framepack import MODEL_OPTION
from frame_memory.plan import PlanError, plan_sections
from frame_memory.sampling.guards import SectionError, attention_name, with_safe_numbers
from frame_memory.sampling.long_video import describe_needs, memory_needs

from .conftest import conditioning, guider_for, of_kind, run, start_latent

REPO = Path(__file__).resolve().parents[2]


def with_attention(model, override):
    clone = of_kind(model, "F1")
    clone.model_options["transformer_options"] = {
        **clone.model_options.get("transformer_options", {}),
        "optimized_attention_override": override,
    }
    return clone


def test_fault_13_nan_section_is_made_again_with_safe_attention(model):
    calls = []

    def broken(func, *args, **kwargs):
        calls.append(None)  # the check before the run is passed: as a backend that overflows on real numbers does
        return func(*args, **kwargs) * (1.0 if len(calls) == 1 else float("nan"))

    plain, _ = run(model, seconds=1.2)
    latent, report = run(model, guider=guider_for(with_attention(model, broken)), seconds=1.2)
    assert torch.isfinite(latent["samples"]).all()
    assert "plain PyTorch attention" in report and "Section 1" in report
    assert torch.allclose(latent["samples"], plain["samples"], atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_fault_13_an_overflow_of_float16_is_made_again_in_numbers_that_reach_further(model, monkeypatch, bf16):
    """The attention is not to blame here: only another format helps, and the MODEL keeps its own."""
    plain, _ = run(model, seconds=2.4)
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device=None, **_: bf16)
    safe = torch.bfloat16 if bf16 else torch.float32
    seen = []

    def overflow(executor, x, *args, **kwargs):
        seen.append(x.dtype)
        return executor(x, *args, **kwargs) * (float("nan") if x.dtype == torch.float16 else 1.0)

    clone = of_kind(model, "F1")
    clone.set_model_compute_dtype(torch.float16)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "overflow", overflow)
    guider = guider_for(clone)
    latent, report = run(model, guider=guider, seconds=2.4)
    assert torch.isfinite(latent["samples"]).all()
    assert seen == ([torch.float16] * 3 + [safe] * 3) * 2, "each section begins as the artist asked for"
    name = str(safe).removeprefix("torch.")
    for number in (1, 2):
        assert re.search(f"Section {number} came out .* plain PyTorch attention, computed in {name} in the", report)
    assert guider.model_patcher is clone and clone.object_patches == {"manual_cast_dtype": torch.float16}
    assert not clone.weight_wrapper_patches
    again, _ = run(model, seconds=2.4)
    assert torch.equal(plain["samples"], again["samples"]) and model.model.manual_cast_dtype is None
    if not bf16:
        assert torch.allclose(latent["samples"], plain["samples"], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_reach_far_stay_as_they_are(model, dtype):
    clone = of_kind(model, "F1")
    clone.set_model_compute_dtype(dtype)
    assert with_safe_numbers(clone) == (clone, "")


def test_fault_13_the_second_try_multiplies_without_fp8(tiny_file, monkeypatch):
    calls = []  # core's own answer where fp8 does not fit, None, is what this gives

    def fp8(layer, input):
        calls.append(1)

    def overflow(executor, *args, **kwargs):
        before = len(calls)
        made = executor(*args, **kwargs)
        return made * (float("nan") if len(calls) > before else 1.0)

    monkeypatch.setattr(comfy.ops, "fp8_linear", fp8)
    options = {"dtype": torch.float8_e4m3fn, "custom_operations": comfy.ops.fp8_ops}
    clone = of_kind(checkpoint.load_framepack(str(tiny_file), options), "F1")
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "overflow", overflow)
    latent, report = run(clone, guider=guider_for(clone), seconds=1.2)
    assert calls and torch.isfinite(latent["samples"]).all()
    assert "plain PyTorch attention, without quantised matrix products" in report
    assert not clone.weight_wrapper_patches and with_safe_numbers(clone)[0] is not clone


def poisoned_from(model, step: int):
    """A model whose network gives NaN from its `step`-th call of a section on."""
    calls = []

    def poison(executor, x, timestep, *args, **kwargs):
        calls.append(float(timestep[0]))
        seen = set(calls)
        return executor(x, timestep, *args, **kwargs) * (float("nan") if len(seen) >= step else 1.0)

    clone = of_kind(model, "F1")
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "poison", poison)
    return clone


@pytest.mark.parametrize("step", [1, 2, 3])
def test_fault_13_section_that_stays_nan_is_an_error_with_step_backend_and_dtype(model, step):
    with pytest.raises(SectionError) as error:
        run(model, guider=guider_for(poisoned_from(model, step)), seconds=1.2, steps=3)
    text = str(error.value)
    assert "Section 1" in text and f"first at step {step} of 3 with attention {attention_name()}" in text
    assert "with plain PyTorch attention" in text and "weights: torch" in text
    assert "was only in memory" in text and "Load FramePack Model" in text


def test_fault_13_a_section_is_named_by_its_place_in_time(model):
    """F0 makes the end first."""
    clone = poisoned_from(model, 1)
    clone.model_options[MODEL_OPTION] = {"kind": "F0", "base": ""}
    with pytest.raises(SectionError, match="^Section 2 holds NaN"):
        run(model, guider=guider_for(clone), preset="F0 inverted", seconds=2.4, steps=1)


def test_fault_48_other_packs_patches_and_ours_leave_no_trace(model):
    """A block patch of another pack acts during our run, and the model is bit for bit as before after both."""
    before, _ = run(model, seconds=1.2)
    weights = {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}
    clone = of_kind(model, "F1")
    clone.set_model_attn1_patch(lambda q, k, v, **_: {"q": q * 0, "k": k, "v": v})
    clone.add_patches(
        {"diffusion_model.img_in.proj.weight": ("diff", (torch.ones_like(weights["img_in.proj.weight"]),))}
    )
    patched, _ = run(model, guider=guider_for(clone), seconds=1.2)
    assert not torch.allclose(before["samples"], patched["samples"])
    after, _ = run(model, seconds=1.2)
    assert torch.equal(before["samples"], after["samples"])
    assert all(torch.equal(v, weights[k]) for k, v in model.model.diffusion_model.state_dict().items())


def test_fault_48_block_replacement_sees_and_keeps_the_packed_sequence(model):
    seen = []

    def replacement(args, extra):
        seen.append(args["img"].shape[1])
        return extra["original_block"](args)

    clone = of_kind(model, "F1")
    clone.set_model_patch_replace(replacement, "dit", "double_block", 0)
    same, _ = run(model, guider=guider_for(clone), seconds=1.2)
    plain, _ = run(model, seconds=1.2)
    assert torch.equal(same["samples"], plain["samples"])
    # window 9 x 15, clean 2 x 15, 2x: 2 x 3, 4x: 4 x 1 x 2 at a grid of 3 x 5
    assert set(seen) == {9 * 15 + 2 * 15 + 2 * 3 + 4 * 2}


def test_fault_48_two_samplers_on_one_guider_do_not_stack(model):
    """The second run with a guider is bit for bit that with a fresh one, and nothing is left on the MODEL."""
    clone = of_kind(model, "F1")
    shared = guider_for(clone)
    first, _ = run(model, guider=shared, seconds=2.4)
    options, conds = str(shared.model_options), [set(c) for c in shared.original_conds["positive"]]
    again, _ = run(model, guider=shared, seconds=2.4)
    fresh, _ = run(model, guider=guider_for(of_kind(model, "F1")), seconds=2.4)
    assert torch.equal(first["samples"], again["samples"]) and torch.equal(again["samples"], fresh["samples"])
    assert str(shared.model_options) == options and [set(c) for c in shared.original_conds["positive"]] == conds
    assert not clone.patches and not any(clone.wrappers.values()) and not clone.additional_models


def test_fault_48_loading_twice_does_not_stack(tiny_file):
    """Two loaders of one file in a graph: two models of one network, each as the first alone."""
    known = list(comfy.supported_models.models)
    first = checkpoint.load_framepack(str(tiny_file))
    alone, _ = run(first, seconds=1.2)
    second = checkpoint.load_framepack(str(tiny_file))
    for model in (second, first):
        latent, _ = run(model, seconds=1.2)
        assert torch.equal(latent["samples"], alone["samples"])
        assert not model.patches and not any(model.wrappers.values())
    assert first.model is not second.model
    names = [m.__name__ for m in comfy.supported_models.models]
    assert names.count("FramePackConfig") == 1 and len(names) <= len(known) + 1


def test_plain_sampling_without_a_context_is_refused(model):
    guider = guider_for(model)
    latent = torch.zeros(1, 16, 9, 6, 10)
    import comfy.samplers

    with pytest.raises(ValueError, match="Anti-Drift Sampler"), torch.inference_mode():
        guider.sample(
            latent, latent, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), disable_pbar=True
        )


@pytest.fixture(scope="module")
def small_vae():
    file = REPO / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))


@pytest.mark.parametrize("guidance_type", ["v1 (concat)", "v2 (replace)", "custom"])
def test_a_stock_start_image_node_is_refused_by_name(model, small_vae, guidance_type):
    """FramePack has no input for what core's own node adds; it would vanish without a word."""
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1, "guidance_type": guidance_type}
    with torch.inference_mode():
        made = HunyuanImageToVideo.execute(conditioning(), small_vae, **size, start_image=torch.rand(1, 64, 64, 3))
        empty = HunyuanImageToVideo.execute(conditioning(), small_vae, **size)
    clone = of_kind(model, "F1")
    with pytest.raises(ValueError, match="'HunyuanImageToVideo'.*FramePack Image"):
        run(model, guider=guider_for(clone, positive=made.args[0]), seconds=1.2)
    latent, _ = run(model, guider=guider_for(clone, positive=empty.args[0]), seconds=1.2)
    assert torch.isfinite(latent["samples"]).all()


def test_glyph_features_of_another_model_are_refused_by_name(model):
    clone = of_kind(model, "F1")
    with_glyphs = [[conditioning()[0][0], {**conditioning()[0][1], "conditioning_byt5small": torch.zeros(1, 4, 1472)}]]
    with pytest.raises(ValueError, match="DualCLIPLoader.*hunyuan_video"):
        run(model, guider=guider_for(clone, positive=with_glyphs), seconds=1.2)
    absent = dict.fromkeys(("conditioning_byt5small", "ref_latent", "guiding_frame_index", "concat_latent_image"))
    without = [[conditioning()[0][0], {**conditioning()[0][1], **absent}]]
    run(model, guider=guider_for(clone, positive=without), seconds=1.2)


@pytest.mark.parametrize("name", ["txt_byt5", "guiding_frame_index", "ref_latent"])
def test_the_network_refuses_what_it_has_no_input_for(model, name):
    x = torch.zeros(1, 16, 9, 6, 10)
    with pytest.raises(ValueError, match="Take out|DualCLIPLoader"):
        model.model.diffusion_model(x, torch.ones(1), torch.zeros(1, 3, 64), **{name: torch.zeros(1)})


def test_a_model_of_another_family_is_refused_by_name(model):
    guider = guider_for(of_kind(model, "F1"))
    guider.model_patcher = comfy.model_patcher.ModelPatcher(
        torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu")
    )
    with pytest.raises(PlanError, match="another kind of model .Linear.: .*no packed-context weights.*Load FramePack"):
        run(model, guider=guider)


def test_cancel_acts_within_one_model_call(model):
    calls = []
    clone = of_kind(model, "F1")

    def count(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, guider=guider_for(clone), seconds=6.0, steps=5)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == 4


def test_fault_46_needs_are_shown_and_a_shortage_is_a_warning(model):
    plan = plan_sections("f1k1_td_f16k4f2k2f1k1_g9", sections=50)
    needs = memory_needs(plan, (1, 16, 1, 76, 80), weights=12 * 2**30)
    assert needs["latents"] == 2 * 451 * 16 * 76 * 80 * 4
    assert needs["decode"] < 1 * 2**30
    line, shortage = describe_needs(needs, free=64 * 2**30, to_come=12 * 2**30)
    assert shortage is None and "weights 12.00 GiB" in line
    _, shortage = describe_needs(needs, free=8 * 2**30, to_come=12 * 2**30)
    assert "fp8" in shortage and "Load FramePack Model" in shortage
    _, report = run(model, seconds=1.2, start=start_latent())
    assert "RAM: weights" in report


def test_safe_attention_is_core_s_own():
    from frame_memory.sampling.guards import with_safe_attention

    options = {"transformer_options": {"patches": {"attn1_patch": [print]}}, "kept": 1}
    safe = with_safe_attention(options)
    assert safe["kept"] == 1 and safe["transformer_options"]["patches"] == {"attn1_patch": [print]}
    assert "optimized_attention_override" not in options["transformer_options"]
    q = torch.randn(1, 2, 5, 8)
    override = safe["transformer_options"]["optimized_attention_override"]
    made = override(attention.attention_basic, q, q, q, 2, skip_reshape=True)
    assert torch.allclose(made, attention.attention_basic(q, q, q, 2, skip_reshape=True), atol=1e-5)
