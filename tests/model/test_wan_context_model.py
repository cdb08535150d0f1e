"""A MODEL of core's stock loaders that accepts history: sampling, clones, LoRA, fp8, unloading, and no trace after."""

from __future__ import annotations

import comfy.ldm.wan.model
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import pytest
import torch

from frame_memory.model import wan
from frame_memory.model.packing import ContextLayout

from . import gguf_operations as gguf
from . import wan_reference as reference

LAYOUT = ContextLayout((4, 5), ((2, (1, 2)), (1, (0, 3))))
PLACES = [(0, 0, 0), (2, 1, 1)]
T2V, I2V = "2.1 T2V", "2.2 A14B I2V"


@pytest.fixture
def patcher():
    return reference.load(T2V)


def attached(patcher, scale: float = 1.0):
    patchifiers = wan.patchifiers_of(patcher)
    with torch.no_grad():
        for value in patchifiers.parameters():
            value *= scale
    return wan.attach(patcher, wan.patcher_of(patchifiers))


def context(channels: int = 16) -> dict:
    frames = [reference.drawn(1, channels, len(t), 4, 6, seed=7 + i) for i, (_, t) in enumerate(LAYOUT.groups)]
    return {"latents": frames, "layout": LAYOUT}


def prompts(model, text_seed: int = 3, **past):
    entry = {"model_conds": wan.conditions(model.model, **past)} if past else {}
    return [[reference.drawn(1, 4, 24, seed=text_seed), entry]]


@torch.inference_mode()
def sample(model, cfg: float = 1.0, channels: int = 16, texts=(3, 4), sigmas=None, **past):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*(prompts(model, text, **past) for text in texts))
    guider.set_cfg(cfg)
    sigmas = torch.tensor([1.0, 0.6, 0.0]) if sigmas is None else sigmas
    noise = reference.drawn(1, channels, 2, 4, 6, seed=2)
    made = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas,
                         disable_pbar=True, seed=0)  # fmt: skip
    assert torch.isfinite(made).all()
    return made


def both(channels: int = 16) -> dict:
    return {"context": context(channels), "tokens": reference.drawn(1, 2, 128, seed=9), "positions": PLACES}


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_core_s_loader_makes_a_model_that_can_be_attached(family):
    patcher = reference.load(family)
    assert type(patcher.model) in (comfy.model_base.WAN21, comfy.model_base.WAN22)
    names = set(patcher.model.state_dict())
    clone = attached(patcher)
    assert clone.model is patcher.model and set(clone.model.state_dict()) == names
    assert wan.is_attached(clone) and not wan.is_attached(patcher)
    channels = reference.FAMILIES[family][1]
    plain = sample(clone, channels=channels)
    assert not torch.equal(sample(clone, channels=channels, context=context(channels)), plain)


def test_conditions_reach_the_network_as_they_are_meant(patcher):
    """One step of core's sampler, against the plain sums: latents in model space, positions whole, sigma 1 at 1000."""
    clone, past = attached(patcher), both()
    past["positions"] = [(300, 0, 0), (1027, 1, 1)]
    guider = comfy.samplers.CFGGuider(clone)
    guider.set_conds(prompts(clone, **past), prompts(clone, **past))
    noise = reference.drawn(1, 16, 2, 4, 6, seed=2)
    with torch.inference_mode():
        got = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"),
                            torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)  # fmt: skip
    patchifiers = clone.get_additional_models_with_key(wan.KEY)[0].model
    convs = {1: patchifiers.proj, 2: patchifiers.proj_2x}
    latent = clone.model.latent_format
    groups = [
        (rate, times, convs[rate].weight, convs[rate].bias, latent.process_in(given)[0])
        for (rate, times), given in zip(LAYOUT.groups, past["context"]["latents"], strict=True)
    ]
    with torch.no_grad():
        velocity = reference.forward(
            clone.model.diffusion_model.state_dict(), noise[0], [1000.0, 1000.0], reference.drawn(1, 4, 24, seed=3)[0],
            groups=groups, memory=(past["tokens"][0], past["positions"]), positions=LAYOUT.positions,
        )  # fmt: skip
    wanted = latent.process_out((noise.double() - velocity)[0:1])
    assert torch.allclose(got.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_attaching_without_history_and_detaching_leave_core_s_result(family):
    patcher, channels = reference.load(family), reference.FAMILIES[family][1]
    past = {**both(channels), "channels": channels}
    plain = sample(patcher, channels=channels)
    clone = attached(patcher)
    assert torch.equal(sample(clone, channels=channels), plain)
    with_history = sample(clone, **past)
    assert not torch.equal(with_history, plain) and torch.equal(sample(patcher, channels=channels), plain)
    assert torch.equal(sample(clone.clone(), **past), with_history)
    bare = wan.detach(clone)
    assert not wan.is_attached(bare) and not bare.get_additional_models_with_key(wan.KEY)
    for kind in bare.wrappers.values():
        assert wan.KEY not in kind
    assert torch.equal(sample(bare, channels=channels), plain) and wan.is_attached(clone)
    assert torch.equal(sample(bare, **past), plain)  # nobody is there to read it


def test_attaching_again_replaces_and_never_doubles(patcher):
    once = attached(patcher)
    again = wan.attach(attached(patcher, scale=3.0), once.get_additional_models_with_key(wan.KEY)[0])
    assert len(again.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL)) == 1
    assert torch.equal(sample(again, **both()), sample(once, **both()))


def test_guidance_is_the_two_prompts_computed_alone(patcher):
    """Whatever memory is free: with history the two never share a batch. One step, so that the sum can be told."""
    clone, past = attached(patcher), both()
    one = torch.tensor([1.0, 0.0])
    positive, negative = (sample(clone, sigmas=one, texts=(text, text), **past) for text in (3, 4))
    got = sample(clone, cfg=3.0, sigmas=one, **past)
    assert torch.allclose(got, negative + 3 * (positive - negative), atol=1e-5)
    batches = []

    def watch(executor, x, *args, **kwargs):
        batches.append(x.shape[0])
        return executor(x, *args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", watch)
    sample(clone, cfg=3.0, sigmas=one, **past)
    assert batches == [1, 1]


def test_memory_tokens_need_no_patchifiers(patcher):
    clone = wan.attach(patcher)
    past = {"tokens": reference.drawn(1, 2, 128, seed=9), "positions": PLACES}
    assert not torch.equal(sample(clone, **past), sample(patcher))
    with pytest.raises(ValueError, match="no patchifiers"):
        sample(clone, context=context())
    empty = {"tokens": torch.zeros(1, 0, 128), "positions": []}
    assert wan.conditions(clone.model, **empty) == {} and torch.equal(sample(clone, **empty), sample(patcher))
    with pytest.raises(ValueError, match="2 memory tokens and 1 positions"):
        wan.conditions(clone.model, tokens=past["tokens"], positions=PLACES[:1])


def test_lora_by_core_works_on_an_attached_model(patcher):
    name = "diffusion_model.blocks.1.self_attn.q"
    up, down = reference.drawn(128, 4, seed=1), reference.drawn(4, 128)
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    before = attached(patcher)
    lora_after, _ = comfy.sd.load_lora_for_models(before, None, lora, 1.0, 0.0)
    lora_before, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    patched = sample(lora_after, **both())
    assert torch.equal(patched, sample(attached(lora_before), **both()))
    assert not torch.equal(patched, sample(before, **both()))


def test_patchifiers_come_from_the_checkpoint_and_not_from_a_loaded_lora(patcher):
    plain = wan.patchifiers_of(patcher).state_dict()
    clone = patcher.clone()
    clone.add_patches({"diffusion_model.patch_embedding.weight": (torch.ones(128, 16, 1, 2, 2),)})
    comfy.model_management.load_models_gpu([clone])
    changed = wan.patchifiers_of(clone).state_dict()
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_weights_of_few_bits_work(dtype):
    """fp8 as 'Load Diffusion Model' makes it; the same weights in fp32 give nearly the same video."""
    sd = reference.checkpoint(T2V)
    few = attached(comfy.sd.load_diffusion_model_state_dict(dict(sd), {"dtype": dtype}, metadata=reference.METADATA))
    fp32 = {k: v if k.startswith("patch_embedding") else v.to(dtype).float() for k, v in sd.items()}
    full = comfy.sd.load_diffusion_model_state_dict(fp32, {"dtype": torch.float32}, metadata=reference.METADATA)
    given, wanted = sample(few, **both()), sample(attached(full), **both())
    assert (given - wanted).square().mean().sqrt() < 0.05 * wanted.square().mean().sqrt()
    assert torch.equal(sample(few), sample(wan.detach(few)))


def test_a_bf16_model_with_history_is_near_the_fp32_one():
    dtypes = (torch.bfloat16, torch.float32)
    given, wanted = (sample(attached(reference.load(T2V, dtype)), **both()) for dtype in dtypes)
    assert (given - wanted).square().mean().sqrt() < 0.05 * wanted.square().mean().sqrt()


def test_unloading_takes_the_patchifiers_along_and_nothing_stays(patcher):
    clone = attached(patcher)
    first = sample(clone, **both())
    loaded = {id(m.model.model) for m in comfy.model_management.current_loaded_models}
    side = clone.get_additional_models_with_key(wan.KEY)[0]
    assert {id(patcher.model), id(side.model)} <= loaded
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    assert torch.equal(sample(clone, **both()), first)
    network = patcher.model.diffusion_model
    assert type(network).forward_orig is comfy.ldm.wan.model.WanModel.forward_orig
    assert not {"forward", "_forward", "forward_orig"} & set(vars(network))
    assert "patches_replace" not in clone.model_options["transformer_options"]


def test_core_makes_room_for_the_history(patcher):
    """Core is asked for as much memory as a window takes that is longer by what the history costs."""
    seen, clone = [], attached(patcher)

    def watch(executor, model, noise_shape, *args, **kwargs):
        seen.append(list(noise_shape))
        return executor(model, noise_shape, *args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, "test", watch)
    sample(clone)
    sample(clone, **both())
    # 2 frames at 1x are 48 latent pixels, 2 at 2x 48 / 8, 2 tokens 8: 62, which are 2.6 frames of 24.
    assert seen == [[1, 16, 2, 4, 6], [1, 16, 2 + 3, 4, 6]]


def test_packed_weights_of_gguf_loaders_work():
    """Matrices of the blocks stay packed as bytes; the same numbers in fp32 give the same video."""
    sd = reference.checkpoint(T2V)
    packed = {k for k, v in sd.items() if k.startswith("blocks.") and v.ndim == 2}
    file = {k: gguf.PackedTensor(gguf.pack(v)) if k in packed else v for k, v in sd.items()}
    options = {"custom_operations": gguf.PackedOperations, "dtype": torch.float32}
    clone = attached(comfy.sd.load_diffusion_model_state_dict(file, options, metadata=reference.METADATA))
    before = gguf.PackedOperations.unpacked_forwards
    with torch.no_grad():  # the stand-in's tensors cannot be loaded in inference mode
        given = sample.__wrapped__(clone, **both())
    assert gguf.PackedOperations.unpacked_forwards > before
    plain = {k: gguf.unpack(gguf.pack(v)) if k in packed else v for k, v in sd.items()}
    full = comfy.sd.load_diffusion_model_state_dict(plain, {"dtype": torch.float32}, metadata=reference.METADATA)
    assert torch.allclose(given, sample(attached(full), **both()), atol=1e-5)


def test_image_to_video_windows_keep_the_mask_and_image_that_core_gives_them():
    patcher = reference.load(I2V)
    clone = attached(patcher)
    image = {"concat_latent_image": reference.drawn(1, 16, 2, 4, 6, seed=5), "concat_mask": torch.zeros(1, 1, 2, 4, 6)}
    seen = []

    def watch(executor, x, *args, **kwargs):
        seen.append(x.clone())
        return executor(x, *args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", watch)
    guider = comfy.samplers.CFGGuider(clone)
    entry = {**image, "model_conds": wan.conditions(clone.model, **both())}
    guider.set_conds([[reference.drawn(1, 4, 24), entry]], [[reference.drawn(1, 4, 24), entry]])
    noise = torch.zeros(1, 16, 2, 4, 6)
    with torch.inference_mode():
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), disable_pbar=True)
    # Core gives a known frame the same two: ones, and its latent in model space.
    assert bool((seen[0][:, 16:20] == 1).all())
    assert torch.equal(seen[0][:, 20:], clone.model.process_latent_in(image["concat_latent_image"]))


@pytest.mark.parametrize(
    ("kind", "said"), [("vace", "is Wan Vace. Expected Wan 2.1"), ("fun control", "48 channels and makes 16")]
)
def test_other_models_are_refused_by_name(kind, said):
    sd = reference.checkpoint(T2V)
    if kind == "vace":
        sd["vace_patch_embedding.weight"] = torch.zeros(128, 96, 1, 2, 2)
        sd["vace_blocks.0.modulation"] = torch.zeros(1, 6, 128)
    else:
        sd["patch_embedding.weight"] = torch.zeros(128, 48, 1, 2, 2)
    patcher = comfy.sd.load_diffusion_model_state_dict(sd, {"dtype": torch.float32}, metadata=reference.METADATA)
    with pytest.raises(ValueError, match=said):
        wan.attach(patcher)
