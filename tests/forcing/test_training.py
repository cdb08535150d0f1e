"""The trainer: exact gradients through core's blocks, losses as written, resume equals uninterrupted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.train_selftest import build
from frame_memory.forcing.flow import Conditioning, flow_loss, shifted_sigmas
from frame_memory.forcing.gradients import differentiable, rotate, training_options
from frame_memory.forcing.loop import Trainer, TrainSettings, rate_at, run
from frame_memory.forcing.muon import Muon, orthogonalise
from frame_memory.model.context import gather_context
from frame_memory.plan import plan_sections

SECTION = plan_sections("f1k1_td_f16k4f2k2f1k1_g9", sections=3).sections[2]


def made(seed: int = 0, batch: int = 2):
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 16, 28, 4, 6, generator=g)
    cond = Conditioning(
        torch.randn(batch, 5, 64, generator=g),
        torch.randn(batch, 768, generator=g),
        torch.randn(batch, 4, 1152, generator=g),
    )
    context = gather_context(SECTION, latents, latents[:, :, :1], None, 0.0)
    x = latents[:, :, SECTION.start : SECTION.stop]
    return x, torch.randn(x.shape, generator=g), torch.rand(batch, generator=g), cond, context


def network(seed: int = 0):
    torch.manual_seed(seed)
    model = build()
    for p in model.parameters():  # zero-initialised gates would hide most of the network from a gradient check
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


def test_gradients_equal_finite_differences():
    model = network().double().requires_grad_(True)
    x, noise, sigma, cond, context = (v.double() if torch.is_tensor(v) else v for v in made())
    cond = Conditioning(cond.text.double(), cond.pooled.double(), cond.vision.double())
    context = type(context)([c.double() for c in context.latents], context.layout)
    names = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear1.weight", "clean_x_embedder.proj_4x.weight"]
    parameters = dict(model.named_parameters())
    with differentiable(model):
        flow_loss(model, x, noise, sigma, cond, context, training_options())[0].backward()
    for name in names:
        p = parameters[name]
        index = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-3
        values = []
        for sign in (1, -1):
            flat[index] += sign * step
            with torch.no_grad():
                values.append(float(flow_loss(model, x, noise, sigma, cond, context, training_options())[0]))
            flat[index] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        # rotary tables and embeddings are fp32 inside core's blocks, which bounds the agreement
        assert numeric == pytest.approx(float(p.grad.view(-1)[index]), rel=5e-3)


def test_training_forward_equals_inference_forward_and_leaves_no_hooks():
    model = network()
    x, _, sigma, cond, context = made()
    args = {"context": cond.text, "y": cond.pooled, "clip_fea": cond.vision, "guidance": torch.full((2,), 10.0)}
    args |= {"context_latents": context.latents, "context_layout": context.layout}
    with torch.no_grad():
        plain = model(x, sigma * 1000, **args, transformer_options={})
        with differentiable(model):
            trained = model(x, sigma * 1000, **args, transformer_options=training_options())
    assert torch.allclose(plain, trained, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_flow_loss_equals_a_plain_loop():
    model = network()
    x, noise, sigma, cond, context = made()
    ours = float(flow_loss(model, x, noise, sigma, cond, context, {})[0].detach())
    total = 0.0
    for b in range(2):
        s = float(sigma[b])
        noisy = torch.empty_like(x[b])
        for t in range(x.shape[2]):
            noisy[:, t] = (1 - s) * x[b, :, t] + s * noise[b, :, t]
        with torch.no_grad():
            v = model(
                noisy[None], torch.tensor([s * 1000]), context=cond.text[b : b + 1], y=cond.pooled[b : b + 1],
                clip_fea=cond.vision[b : b + 1], guidance=torch.tensor([10.0]),
                context_latents=[c[b : b + 1] for c in context.latents], context_layout=context.layout,
            )[0]  # fmt: skip
        total += float(((v - (noise[b] - x[b])) ** 2).sum())
    assert ours == pytest.approx(total / x.numel(), rel=1e-5)


def test_one_step_estimate_of_a_perfect_network_is_the_data():
    x, noise, sigma, cond, context = made()

    class Perfect(torch.nn.Module):
        def forward(self, noisy, *args, **kwargs):
            return noise - x

    assert torch.allclose(flow_loss(Perfect(), x, noise, sigma, cond, context, {})[1], x, atol=1e-5)


def test_rotation_equals_core_s_and_keeps_length():
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.flux.math import apply_rope

    pe = EmbedND(128, 256, [16, 56, 56])(torch.randint(0, 30, (1, 11, 3)).float())
    q, k = torch.randn(2, 3, 11, 128), torch.randn(2, 3, 11, 128)
    ours, core = rotate(q, pe), apply_rope(q, k, pe)[0]
    assert torch.allclose(ours, core, atol=1e-5)
    assert torch.allclose(ours.norm(dim=-1), q.norm(dim=-1), rtol=1e-5)


def test_shifted_sigmas_are_stratified():
    sigmas = shifted_sigmas(64, 6.0, torch.Generator().manual_seed(0)).sort().values
    t = sigmas / (6.0 - 5.0 * sigmas)
    assert ((t * 64).floor() == torch.arange(64)).all()


@pytest.mark.parametrize("shape", [(8, 8), (16, 5), (5, 16)])
def test_muon_makes_updates_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, *shape)))
    assert (values > 0.5).all() and (values < 1.4).all()


def test_muon_stacks_equal_single_matrices():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
    grads = [torch.randn(6, 4) for _ in together]
    for p, q, g in zip(together, apart, grads, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    Muon(together, lr=0.1).step()
    for q in apart:
        Muon([q], lr=0.1).step()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(together, apart, strict=True))


def little_run(path, steps: int, stop_at: int | None = None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    trainer = Trainer(model, TrainSettings(steps=steps, warmup=2, save_every=5))

    def loss(generator):
        x = torch.randn(16, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    losses = []
    for step, value in run(trainer, loss, path, say=lambda _: None):
        losses.append(value)
        if step == stop_at:
            break
    return trainer, losses


def test_resume_equals_uninterrupted(tmp_path):
    whole, losses = little_run(tmp_path / "whole.safetensors", 12)
    little_run(tmp_path / "parts.safetensors", 12, stop_at=7)  # saved at 5; 6 and 7 are lost and made again
    resumed, rest = little_run(tmp_path / "parts.safetensors", 12)
    assert losses[5:] == rest
    for name, value in whole.averaged().items():
        assert torch.equal(value, resumed.averaged()[name])


def test_resume_with_other_settings_is_refused(tmp_path):
    little_run(tmp_path / "run.safetensors", 6)
    with pytest.raises(ValueError, match="was made with"):
        little_run(tmp_path / "run.safetensors", 7)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = torch.nn.Linear(2, 1)
    trainer = Trainer(model, TrainSettings(steps=3))
    before = model.weight.detach().clone()
    assert math.isnan(trainer.step(lambda g: model(torch.full((1, 2), float("nan"))).sum()))
    assert torch.equal(model.weight, before) and trainer.done == 1


def test_rate_warms_up_and_falls():
    settings = TrainSettings(steps=100, warmup=10)
    rates = np.array([rate_at(i, settings) for i in range(100)])
    assert rates[0] == pytest.approx(0.1) and rates.argmax() in (9, 10)
    assert (np.diff(rates[10:]) < 0).all() and rates[-1] < 0.06
