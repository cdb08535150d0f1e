"""FFGo's training triples and one expert's noise levels, with core's own classes and core's Train LoRA at tiny size."""

from __future__ import annotations

from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy import model_management
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_train import TrainLoraNode, TrainSampler
from comfy_extras.nodes_wan import WanImageToVideo

from frame_memory.forcing import first_frame as ff

from .wan_files import TEXT_FEATURES, save_model

VAE_FILE = Path(__file__).resolve().parents[2] / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_FILE)))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("wan") / "tiny.safetensors")
    save_model(path, blocks=2)
    return comfy.sd.load_diffusion_model(path)


def clip(seed: int, frames: int = 9, height: int = 32, width: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, height, width, 3, generator=generator), torch.rand(height, width, 3, generator=generator)


def test_the_first_four_frames_are_the_canvas_and_nothing_given_is_changed():
    frames, canvas = clip(0)
    before = frames.clone()
    made = ff.with_canvas(frames, canvas)
    assert torch.equal(frames, before) and made.shape == frames.shape
    assert all(torch.equal(made[i], canvas) for i in range(4)) and torch.equal(made[4:], frames[4:])


def test_a_canvas_of_another_size_is_refused_with_both_sizes():
    frames, canvas = clip(0)
    with pytest.raises(ff.FirstFrameTrainingError, match=r"48x32 pixels and its canvas 32x32"):
        ff.with_canvas(frames, canvas[:, :32])
    with pytest.raises(ff.FirstFrameTrainingError, match=r"4 frames of a clip of 4"):
        ff.with_canvas(frames[:4], canvas)
    with pytest.raises(ff.FirstFrameTrainingError, match="expected RGB"):
        ff.with_canvas(frames, canvas[..., :1])


@pytest.mark.parametrize(("frames", "width", "nearest"), [(10, 48, "9 frames of 48x32"), (9, 40, "9 frames of 48x32")])
def test_lengths_and_sizes_wan_cannot_make_are_refused_with_the_nearest(vae, frames, width, nearest):
    video, canvas = clip(0, frames, 32, width)
    with pytest.raises(ff.FirstFrameTrainingError, match=nearest):
        ff.triple(vae, video, canvas)


def test_the_conditioning_is_what_inference_makes_and_the_latent_begins_with_the_canvas(vae):
    frames, canvas = clip(1)
    latent, image, mask = ff.triple(vae, frames, canvas)
    positive = WanImageToVideo.execute([["", {}]], [], vae, 48, 32, 9, 1, start_image=canvas[None])[0]
    seen = positive[0][1]
    assert torch.equal(image, seen["concat_latent_image"]) and torch.equal(mask, seen["concat_mask"])
    assert latent["samples"].shape == image.shape == (1, 16, 3, 4, 6) and mask.shape == (1, 1, 3, 4, 6)
    assert not mask[:, :, 0].any() and bool((mask[:, :, 1:] == 1).all())
    # The autoencoder is causal: its first latent frame is the canvas alone, in the clip as in the conditioning.
    torch.testing.assert_close(latent["samples"][:, :, 0], image[:, :, 0])
    assert not torch.allclose(latent["samples"][:, :, 2], image[:, :, 2])


def published_levels(shift: float, boundary: float) -> tuple[list[float], list[float]]:
    """The published script's two lists, worked out on its own grid of t."""
    t = [1 - i / 1000 for i in range(1000)]
    sigmas = [shift * x / (1 + (shift - 1) * x) for x in t]
    split = min(range(1000), key=lambda i: abs(sigmas[i] * 1000 - 1000 * boundary))
    return sigmas[:split], sigmas[split:]


def test_both_experts_levels_are_the_published_ones_but_for_the_one_at_the_boundary():
    high, low = ff.expert_levels(ff.HIGH), ff.expert_levels(ff.LOW)
    published_high, published_low = published_levels(5.0, 0.9)
    assert high == pytest.approx([*published_high, published_low[0]])
    assert low == pytest.approx(published_low[1:]) and len(high) == 358 and len(high) + len(low) == 1000
    assert min(high) >= 0.9 > max(low) and min(low) > 0


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(ff.FirstFrameTrainingError, match="high noise, low noise"):
        ff.expert_levels("both")
    with pytest.raises(ff.FirstFrameTrainingError, match="has none of the noise levels"):
        ff.expert_levels(ff.HIGH, boundary=1.01)


def test_only_training_draws_the_experts_levels_and_sampling_is_as_it_was(wan, monkeypatch):
    shifted = ModelSamplingSD3().patch(wan, 5.0)[0]
    changed = ff.expert_range(shifted, ff.LOW)
    before, after = (m.get_model_object("model_sampling") for m in (shifted, changed))
    assert torch.equal(before.sigmas, after.sigmas) and before.shift == after.shift == 5.0
    percents = [0.0, 0.1, 0.5, 0.999, 1.0]
    assert [before.percent_to_sigma(p) for p in percents] == [after.percent_to_sigma(p) for p in percents]
    assert wan.get_model_object("model_sampling").shift == 8.0
    monkeypatch.setattr(model_management, "in_training", True)
    drawn = {after.percent_to_sigma(i / 5000) for i in range(5001)}
    assert sorted(drawn) == sorted(ff.expert_levels(ff.LOW))


@torch.inference_mode()
def test_a_video_made_with_the_clone_is_the_same(wan, vae):
    latents, positive = triples(vae, 1)
    empty = torch.zeros_like(latents[0]["samples"])
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(3))
    args = (2, 2.0, "euler", "simple", positive[0], [[torch.zeros(1, 4, TEXT_FEATURES), {}]], empty)
    made = [comfy.sample.sample(m, noise, *args) for m in (wan, ff.expert_range(wan, ff.HIGH))]
    assert torch.equal(*made) and bool(made[0].any())


def test_a_model_of_another_kind_is_refused(wan):
    odd = wan.clone()
    odd.add_object_patch("model_sampling", torch.nn.Identity())
    with pytest.raises(ff.FirstFrameTrainingError, match="Identity; expected a flow model"):
        ff.expert_range(odd, ff.HIGH)


class Watched:
    """Core's training with every noise level it draws written down."""

    def __init__(self, monkeypatch):
        self.sigmas: list[float] = []
        drawn = TrainSampler._generate_batch_sigmas

        def watch(sampler, *args):
            made = drawn(sampler, *args)
            self.sigmas += made.tolist()
            return made

        monkeypatch.setattr(TrainSampler, "_generate_batch_sigmas", watch)


@torch.inference_mode()
def triples(vae, count: int):
    """LATENTs and CONDITIONINGs as the nodes before Train LoRA hand them out: made while nothing is learned."""
    latents, positive = [], []
    for i in range(count):
        latent, image, mask = ff.triple(vae, *clip(i))
        latents.append(latent)
        text = torch.randn(1, 4 + i, TEXT_FEATURES, generator=torch.Generator().manual_seed(i))
        positive.append([[text, {"concat_latent_image": image, "concat_mask": mask}]])
    return latents, positive


def train(model, vae, count: int = 2, steps: int = 3, **settings):
    latents, positive = triples(vae, count)
    usual = {
        "batch_size": 1, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 1e-3, "rank": 4,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 1, "training_dtype": "bf16", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    wrapped = {name: [value] for name, value in {**usual, **settings}.items()}
    return TrainLoraNode.execute([model], latents, positive, **wrapped).result


@pytest.mark.parametrize("expert", ff.EXPERTS)
def test_cores_train_lora_draws_only_the_experts_levels(wan, vae, expert, monkeypatch):
    watched = Watched(monkeypatch)
    lora, losses, steps = train(ff.expert_range(wan, expert), vae)
    levels = torch.tensor(ff.expert_levels(expert))
    assert len(watched.sigmas) == 3 and all(float((levels - s).abs().min()) < 1e-6 for s in watched.sigmas)
    assert steps == 3 and all(torch.isfinite(torch.tensor(losses["loss"])))
    moved = [name for name, p in lora.items() if name.endswith("lora_up.weight") and bool(p.any())]
    assert len(moved) >= 10 * 2 and any(".ffn.2." in name for name in moved)


class Compared:
    """Each batch of core's training once more, clip by clip, and the conditionings the model was given."""

    def __init__(self, monkeypatch):
        self.batch, self.alone, self.concats = [], [], []
        whole = TrainSampler.fwd_bwd

        def watch(sampler, guider, sigmas, noise, latent, cond, indices, extra, size, bwd=True):
            loss = whole(sampler, guider, sigmas, noise, latent, cond, indices, extra, size, bwd=bwd)
            self.batch.append(loss.item())
            self.alone.append([])
            for n, i in enumerate(indices):
                given = (t[n : n + 1].detach() for t in (sigmas, noise, latent))
                self.alone[-1].append(whole(sampler, guider, *given, cond, [i], extra, size, bwd=False).item())
            self.concats = [c["model_conds"]["c_concat"].cond for c in cond]
            return loss

        monkeypatch.setattr(TrainSampler, "fwd_bwd", watch)


def test_each_clip_keeps_one_canvas_and_a_batch_is_not_mixed(wan, vae, monkeypatch):
    """Against core as it is: there every canvas is as large as the dataset, and the results of a batch are averaged."""
    settings = {"count": 3, "steps": 1, "batch_size": 3, "training_dtype": "fp32", "gradient_checkpointing": False}
    with monkeypatch.context() as patch:
        ours = Compared(patch)
        train(ff.expert_range(wan, ff.HIGH), vae, **settings)
    with monkeypatch.context() as patch:
        cores = Compared(patch)
        train(wan, vae, **settings)
    assert ours.batch[0] == pytest.approx(sum(ours.alone[0]) / 3, rel=1e-5)
    assert cores.batch[0] != pytest.approx(sum(cores.alone[0]) / 3, rel=1e-3)
    assert [len(c) for c in cores.concats] == [3] * 3 and [len(c) for c in ours.concats] == [1] * 3
    assert all(torch.equal(mine, core[:1]) for mine, core in zip(ours.concats, cores.concats, strict=True))
