"""A Direct Forcing head on a MODEL, against plain arithmetic on the base's weights and diffusers' own module."""

import copy
import importlib
import importlib.util
import sys
from pathlib import Path

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import parity_models as pm
from frame_memory.model import framepack, head, key_map, lora, memory_file
from frame_memory.model.base_signature import Base
from frame_memory.model.memory_file import MemoryFileError
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise

TINY = {"heads": 1, "double": 1, "single": 2, "text_features": 64}
GROUPS = ((4, tuple(range(1, 17))), (2, (17, 18)), (1, (0, 19)))
REPO = Path(__file__).resolve().parents[2]
LOADED = "final_layer.linear.weight"


@pytest.fixture(scope="module")
def reference():
    return pm.make_reference(seed=0, **TINY)


@pytest.fixture(scope="module")
def native(reference):
    return key_map.convert_diffusers(reference.state_dict())


@pytest.fixture(scope="module")
def patcher(native):
    return load(native)


def load(native, **options):
    framepack.register()
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(native), model_options=options)
    said = {"base": "HunyuanVideo", "kind": "F1"}
    patcher.model_options = {**patcher.model_options, framepack.MODEL_OPTION: said}
    return patcher


def trained(native, seed=1):
    """A head near the base's: each number moved by a tenth of the tensor's spread."""
    generator = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(native[k].shape, generator=generator) for k in memory_file.HEAD}
    return {k: native[k] + 0.1 * native[k].std() * noise[k] for k in noise}


def on_disk(tmp_path, patcher, new, form="replacement", **more):
    path = str(tmp_path / "head.safetensors")
    memory_file.write(path, Base.of(patcher), head=new, head_form=form, **more)
    return memory_file.read(path)


def patched_weights(patcher):
    """The network's numbers while the patches are in."""
    patcher.patch_model()
    try:
        return {k: v.detach().float().clone() for k, v in patcher.model.diffusion_model.state_dict().items()}
    finally:
        patcher.unpatch_model()


@pytest.mark.parametrize("form", ["replacement", "difference"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -1.0])
def test_strength_moves_the_head_that_share_of_the_way_and_nothing_else(tmp_path, patcher, native, form, strength):
    new = trained(native)
    given = new if form == "replacement" else {k: new[k] - native[k] for k in new}
    clone, patch = head.apply_head(patcher, on_disk(tmp_path, patcher, given, form), strength)
    got = patched_weights(clone)
    for key, base in native.items():
        wanted = base + strength * (new[key] - base) if key in new else base
        close = torch.allclose(got[key], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max().clamp(min=1)))
        assert close if key in new and strength else torch.equal(got[key], base), key
    for key, share in patch.changed.items():
        assert share == pytest.approx(float((new[key] - native[key]).norm() / native[key].norm()), rel=1e-4)


def test_unloading_restores_the_base_bit_for_bit(tmp_path, patcher, native):
    clone, _ = head.apply_head(patcher, on_disk(tmp_path, patcher, trained(native)), 1.0)
    comfy.model_management.load_models_gpu([clone], force_full_load=True)
    assert not torch.equal(clone.model.diffusion_model.final_layer.linear.weight, native[LOADED])
    comfy.model_management.unload_all_models()
    after = patcher.model.diffusion_model.state_dict()
    assert all(torch.equal(after[k], native[k]) for k in native)
    assert not patcher.patches and framepack.MODEL_OPTION in patcher.model_options
    assert head.HEADS not in patcher.model_options[framepack.MODEL_OPTION]


def lora_on_the_head(native):
    generator = torch.Generator().manual_seed(4)
    up, down = torch.randn(64, 4, generator=generator), torch.randn(4, 128, generator=generator) / 30
    file = {"transformer.proj_out.lora_A.weight": down, "transformer.proj_out.lora_B.weight": up}
    return file, up @ down


@pytest.mark.parametrize("head_first", [True, False])
def test_loras_add_to_the_head_in_either_order(tmp_path, patcher, native, head_first):
    new = trained(native)
    file, delta = lora_on_the_head(native)
    held = on_disk(tmp_path, patcher, new)
    model = patcher
    for step in ("head", "lora") if head_first else ("lora", "head"):
        model = head.apply_head(model, held, 0.7)[0] if step == "head" else lora.apply_lora(model, file, 0.6)[0]
    wanted = native[LOADED] + 0.7 * (new[LOADED] - native[LOADED]) + 0.6 * delta
    assert (patched_weights(model)[LOADED] - wanted).abs().max() < 3e-6


def test_a_head_read_while_a_lora_is_in_the_weights_still_starts_from_the_base(tmp_path, patcher, native):
    new, (file, delta) = trained(native), lora_on_the_head(native)
    held = on_disk(tmp_path, patcher, new)
    with_lora, _ = lora.apply_lora(patcher, file, 1.0)
    comfy.model_management.load_models_gpu([with_lora], force_full_load=True)
    try:
        both, _ = head.apply_head(with_lora, held, 1.0)
    finally:
        comfy.model_management.unload_all_models()
    assert (patched_weights(both)[LOADED] - (new[LOADED] + delta)).abs().max() < 3e-6


@pytest.mark.parametrize("everything", [False, True])
def test_an_fp8_base_takes_the_head_as_precisely_as_it_keeps_its_own(tmp_path, native, everything):
    """Blocks in fp8 and the rest in bf16, as public files are; and a file that has all in fp8, its head too."""
    fp8 = torch.float8_e4m3fn

    def kept(key, value):
        low = value.ndim == 2 and ("blocks." in key or everything)
        return value.to(fp8) if low else value.bfloat16()

    base = load({k: kept(k, v) for k, v in native.items()}, dtype=fp8 if everything else torch.bfloat16)
    new = trained(native)
    clone, _ = head.apply_head(base, on_disk(tmp_path, base, new), 1.0)
    got = patched_weights(clone)
    digits = 2.0**-3 if everything else 2.0**-8
    for key in memory_file.HEAD:
        assert ((got[key] - new[key]).abs() <= digits * new[key].abs() + 2e-2 * everything + 1e-6).all(), key


@pytest.mark.parametrize("names", ["diffusers", "diffusers with prefix", "ComfyUI"])
def test_a_head_alone_equals_diffusers_own_module(tmp_path, reference, patcher, native, names):
    """The oracle is diffusers' network with its last two modules changed: it knows nothing of our names or halves."""
    changed = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in (changed.norm_out.linear, changed.proj_out):
            module.weight += 0.02 * torch.randn(module.weight.shape, generator=generator)
            module.bias += 0.1 * torch.randn(module.bias.shape, generator=generator)
    last = {k: v for k, v in changed.state_dict().items() if k.startswith(("norm_out.linear.", "proj_out."))}
    if names == "ComfyUI":
        whole = key_map.convert_diffusers(changed.state_dict())
        last = {k: v for k, v in whole.items() if k.startswith("final_layer.")}
    prefix = "transformer." if names.endswith("prefix") else ""
    path = str(tmp_path / "their_head.safetensors")
    save_file({prefix + k: v.contiguous() for k, v in last.items()}, path)
    held = memory_file.read(path)
    assert names.split()[0] in held.source and held.base is None
    assert "only its width" in held.check_base(Base.of(patcher), "Load Direct Forcing Checkpoint")
    inputs = pm.make_inputs(
        4, 6, tuple(range(20, 29)), GROUPS, text_lengths=(7,), image_tokens=9, text_features=64, guidance=10.0
    )
    wanted = pm.run_reference(changed, inputs, torch.float32)
    clone, _ = head.apply_head(patcher, held, 1.0)
    clone.patch_model()
    try:
        got = pm.run_ours(clone.model.diffusion_model, inputs, torch.float32)
    finally:
        clone.unpatch_model()
    assert pm.relative_rms(got, wanted) < 1e-5
    assert pm.relative_rms(pm.run_ours(patcher.model.diffusion_model, inputs, torch.float32), wanted) > 1e-2


def test_a_head_of_another_width_is_refused_with_this_models_fingerprint(tmp_path, patcher):
    tensors = {"norm_out.linear.weight": torch.zeros(512, 256), "norm_out.linear.bias": torch.zeros(512),
               "proj_out.weight": torch.zeros(64, 256), "proj_out.bias": torch.zeros(64)}  # fmt: skip
    path = str(tmp_path / "wide.safetensors")
    save_file(tensors, path)
    base = Base.of(patcher)
    with pytest.raises(MemoryFileError, match=f"256 wide.*128 wide.*{base.signature.short}"):
        memory_file.read(path).check_base(base, "Load Direct Forcing Checkpoint")


def test_a_head_kept_in_a_packed_format_takes_differences_only(tmp_path, native):
    packed = load(native)
    new = trained(native)
    files = [on_disk(tmp_path / form, packed, new, form) for form in ("replacement", "difference")]
    linear = packed.model.diffusion_model.final_layer.linear
    linear.weight = torch.nn.Parameter(torch.zeros(64, 136, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(MemoryFileError, match="packed format.*'Load FramePack Model'"):
        head.apply_head(packed, files[0], 1.0)
    clone, _ = head.apply_head(packed, files[1], 1.0)
    assert len(clone.patches) == 4


@pytest.fixture(scope="module")
def node():
    name = "frame_memory_pack_of_memory_file_tests"
    package = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None, is_package=True))
    package.__path__ = [str(REPO)]
    sys.modules[name] = package
    try:
        yield importlib.import_module(f"{name}.nodes.memory_files").FrameMemoryLoadDirectForcing
    finally:
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "frame_memory", ([str(tmp_path)], set()))
    return tmp_path


def test_the_node_hands_out_model_and_memory_and_says_what_they_are(folder, patcher, native, node):
    spec = PackSpec.of(patcher.model.diffusion_model)
    pack = initialise(SemanticPack(spec, dtype=torch.float32, operations=torch.nn), patcher.model.diffusion_model)
    pack.gate.data.fill_(0.5)
    recipe = {"losses": "direct", "videos": 12, "rate": 1e-5}
    more = {"pack": pack.state_dict(), "spec": spec.to_dict(), "recipe": recipe, "licence": "CC0"}
    on_disk(folder, patcher, trained(native), **more)
    model, memory, report = node.execute(patcher, "head.safetensors", 0.5).result
    half = native[LOADED] + 0.5 * (trained(native)[LOADED] - native[LOADED])
    assert (patched_weights(model)[LOADED] - half).abs().max() < 1e-6
    held = memory.encoder.model.state_dict()
    assert all(torch.equal(held[k], v) for k, v in pack.state_dict().items()) and memory.trained
    clip, text = torch.randn(1, 16, 9, 4, 6), torch.randn(1, 5, 64)
    with torch.no_grad():
        assert torch.allclose(
            memory.pack.update(memory.pack.anchor(text), clip, first=True),
            pack.update(pack.anchor(text), clip, first=True),
            atol=1e-5,
        )
    for words in ("Trained on this base", "strength 0.5", "SemanticPack A", "gate 0.4621", "losses direct", "CC0"):
        assert words in report, (words, report)
    again = node.execute(model, "head.safetensors", 0.5).result[2]
    assert "another head" in again and "They add up" in again
    assert "off (strength 0)" in node.execute(model, "head.safetensors", 0.0).result[2]


def test_the_node_takes_a_head_alone_and_stops_what_wants_its_memory(folder, patcher, native, node):
    last = {k: v.contiguous() for k, v in native.items() if k.startswith("final_layer.")}
    save_file(last, str(folder / "head.safetensors"))
    model, memory, report = node.execute(patcher, "head.safetensors").result
    assert type(memory).__name__ == "ExecutionBlocker" and "no memory" in memory.message
    assert "ComfyUI names, without Frame Memory's metadata" in report and "Memory: none" in report
    assert torch.equal(patched_weights(model)[LOADED], native[LOADED])


def test_the_node_refuses_other_models_and_descriptions_it_does_not_know(folder, patcher, native, node):
    spec = {**PackSpec.of(patcher.model.diffusion_model).to_dict(), "levels": 3}
    on_disk(folder, patcher, trained(native), pack={"gate": torch.zeros(1)}, spec=spec)
    with pytest.raises(ValueError, match="newer version: levels"):
        node.execute(patcher, "head.safetensors")
    other = copy.copy(patcher)
    other.model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"another kind of model \(Linear\).*'Load FramePack Model'"):
        node.execute(other, "head.safetensors")
