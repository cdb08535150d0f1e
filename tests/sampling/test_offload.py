"""Where the weights lie and how the work is cut up changes nothing: the same sections, under the same keys."""

from __future__ import annotations

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frame_memory.journal import files, read_manifest
from frame_memory.model import checkpoint, quantised
from frame_memory.sampling.identity import model_fields

from .conftest import conditioning, guider_for, of_kind, run
from .test_project import Plain, project

SECONDS, SECTIONS = 2.4, 2
WEIGHT = "diffusion_model.double_blocks.0.img_mlp.0.weight"


class Budgeted(comfy.model_patcher.ModelPatcher):
    """Core's patcher, given so many bytes for weights when it loads; core decides so itself on a GPU that is full.

    free: bytes that core believes to be free for activations; too few for two prompts at once cut them up.
    """

    budget: float = 0.0
    free: float = float("inf")

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, self.budget, force_patch_weights, full_load=False)

    def get_free_memory(self, device):
        return self.free


def loaded(tiny_file, budget: float | None, free: float = float("inf"), lora: bool = False):
    """The model newly loaded, all of it or within a budget; with a LoRA's patch on one weight."""
    made = of_kind(checkpoint.load_framepack(str(tiny_file)), "F1")
    if budget is not None:
        Class = type("Budgeted", (Budgeted,), {"budget": budget, "free": free})
        made.__class__ = Class
    if lora:
        shape = made.model.state_dict()[WEIGHT].shape
        generator = torch.Generator().manual_seed(3)
        up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
        made.add_patches({WEIGHT: ("diff", (0.01 * up @ down,))}, 0.8)
    return made


def film(model, root, cfg: float = 1.0, **more):
    """The latents, and the keys of the sections."""
    guider = guider_for(model, conditioning(), conditioning(3), cfg=cfg)
    more["sampler"] = more.get("sampler") or Plain([])
    made = run(model, guider=guider, seconds=SECONDS, steps=2, project=project(root), **more)
    manifest = read_manifest(root / "frame_memory" / "p")
    return made.latent["samples"].clone(), [record.key for record in manifest.finished]


def size_of(model) -> int:
    return model.model_size()


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("share", [0.5, 1e-7], ids=["half", "next to nothing"])
def test_fault_18_weights_offloaded_in_part_make_the_same_sections(tiny_file, tmp_path, share, lora):
    whole = loaded(tiny_file, None, lora=lora)
    expected = film(whole, tmp_path / "whole")
    assert not whole.model.model_lowvram
    part = loaded(tiny_file, share * size_of(whole), lora=lora)
    made = film(part, tmp_path / "part")
    assert part.model.model_lowvram and part.loaded_size() < 0.6 * size_of(part)
    assert torch.equal(made[0], expected[0]) and made[1] == expected[1]
    plain = film(loaded(tiny_file, None), tmp_path / "plain") if lora else None
    assert plain is None or (not torch.equal(plain[0], expected[0]) and plain[1] != expected[1])


def test_fault_18_a_run_begun_offloaded_goes_on_fully_loaded(tiny_file, tmp_path):
    """The settings may change between two queues, and nothing is made again."""
    whole = loaded(tiny_file, None, lora=True)
    expected = film(whole, tmp_path / "whole")
    part = loaded(tiny_file, 0.3 * size_of(whole), lora=True)
    with pytest.raises(RuntimeError, match="broke"):
        film(part, tmp_path / "part", sampler=Plain([], 2, RuntimeError("the machine broke")))
    log: list = []
    made = film(loaded(tiny_file, None, lora=True), tmp_path / "part", sampler=Plain(log))
    assert len(log) == 1 and torch.equal(made[0], expected[0]) and made[1] == expected[1]


def test_fault_18_memory_that_is_free_at_the_moment_changes_nothing(tiny_file, tmp_path):
    """With CFG core would batch both prompts where memory allows, which changes the last bits."""
    sizes: list[int] = []

    def count(model):
        def spy(executor, x, *args, **kwargs):
            sizes.append(x.shape[0])
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", spy)
        return model

    roomy = film(count(loaded(tiny_file, 1e32)), tmp_path / "roomy", cfg=2.0)
    tight = film(count(loaded(tiny_file, 1e32, free=0.0)), tmp_path / "tight", cfg=2.0)
    assert set(sizes) == {1}
    assert torch.equal(roomy[0], tight[0]) and roomy[1] == tight[1]


@pytest.mark.parametrize("name", [quantised.FP8, quantised.INT8])
@torch.inference_mode()
def test_fault_18_a_lora_merged_into_quantised_weights_leaves_the_model_what_it_was(tiny_file, name):
    """Core rounds the sum anew, with another scale; the second queue finds it so, and nothing is made again."""
    whole = of_kind(checkpoint.load_framepack(str(tiny_file), {quantised.ROUND_TO: name}), "F1")
    before, shape = model_fields(whole), whole.model.diffusion_model.get_parameter(WEIGHT.split(".", 1)[1]).shape
    whole.add_patches({WEIGHT: ("diff", (0.05 * torch.randn(shape),))}, 0.8)
    patched = model_fields(whole)
    kept = whole.model.state_dict()[f"{WEIGHT}_scale"].clone()
    whole.patch_model()
    assert not torch.equal(whole.model.state_dict()[f"{WEIGHT}_scale"], kept)
    assert model_fields(whole) == patched != before
    whole.unpatch_model()
    assert torch.equal(whole.model.state_dict()[f"{WEIGHT}_scale"], kept) and model_fields(whole) == patched


@pytest.mark.parametrize("setting", ["small pieces", "interrupted twice", "previews"])
def test_fault_18_pieces_of_files_interrupts_and_previews_change_nothing(tiny_file, tmp_path, monkeypatch, setting):
    expected = film(loaded(tiny_file, None), tmp_path / "whole")
    if setting == "small pieces":
        monkeypatch.setattr(files, "CHUNK", 1000)
    if setting == "previews":
        monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    if setting == "interrupted twice":
        stop = comfy.model_management.InterruptProcessingException()
        for at in (1, 2):
            with pytest.raises(type(stop)):
                film(loaded(tiny_file, None), tmp_path / "other", sampler=Plain([], at, stop))
    made = film(loaded(tiny_file, None), tmp_path / "other")
    assert torch.equal(made[0], expected[0]) and made[1] == expected[1]
