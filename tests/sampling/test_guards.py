"""Nothing silently wrong: broken numbers, other packs' patches, models without a context, RAM, cancel."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP

from frame_memory.plan import PlanError, plan_sections
from frame_memory.sampling.guards import SectionError
from frame_memory.sampling.long_video import describe_needs, memory_needs

from .conftest import guider_for, of_kind, run, start_latent


def with_attention(model, override):
    clone = of_kind(model, "F1")
    clone.model_options["transformer_options"] = {
        **clone.model_options.get("transformer_options", {}),
        "optimized_attention_override": override,
    }
    return clone


def test_fault_13_nan_section_is_made_again_with_safe_attention(model):
    def broken(func, *args, **kwargs):
        return func(*args, **kwargs) * float("nan")

    plain, _ = run(model, seconds=1.2)
    latent, report = run(model, guider=guider_for(with_attention(model, broken)), seconds=1.2)
    assert torch.isfinite(latent["samples"]).all()
    assert "plain PyTorch attention" in report and "Section 1" in report
    assert torch.allclose(latent["samples"], plain["samples"], atol=1e-4)


def test_fault_13_section_that_stays_nan_is_an_error_with_backend_and_dtype(model):
    def poison(executor, x, *args, **kwargs):
        return executor(x, *args, **kwargs) * float("nan")

    clone = of_kind(model, "F1")
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "poison", poison)
    with pytest.raises(SectionError, match=r"Section 1 .*first try: \w+; weights: torch"):
        run(model, guider=guider_for(clone), seconds=1.2)


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


def test_plain_sampling_without_a_context_is_refused(model):
    guider = guider_for(model)
    latent = torch.zeros(1, 16, 9, 6, 10)
    import comfy.samplers

    with pytest.raises(ValueError, match="Anti-Drift Sampler"), torch.inference_mode():
        guider.sample(
            latent, latent, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), disable_pbar=True
        )


def test_a_model_of_another_family_is_refused_by_name(model):
    class Other:
        model = torch.nn.Linear(1, 1)
        model_options: dict = {}

    guider = guider_for(of_kind(model, "F1"))
    guider.model_patcher = Other()
    with pytest.raises(PlanError, match="no packed-context weights.*Load FramePack Model"):
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
    assert needs["latents"] == 451 * 16 * 76 * 80 * 4
    assert needs["decode"] < 1 * 2**30
    line, shortage = describe_needs(needs, free=64 * 2**30)
    assert shortage is None and "weights 12.00 GiB" in line
    _, shortage = describe_needs(needs, free=8 * 2**30)
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
