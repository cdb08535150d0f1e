"""The three forcings against a plain loop written from the reference, and their identities."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frame_memory.forcing.clips import ForcingError, TrainingVideo, clip_sections, stored_videos
from frame_memory.forcing.draws import (
    DIRECT,
    FORCINGS,
    LOGIT_NORMAL,
    STUDENT,
    TEACHER,
    UNIFORM,
    Recipe,
    clips_at,
    draw_video,
    sigmas,
)  # fmt: skip
from frame_memory.forcing.forcings import LOSSES, Forced
from frame_memory.forcing.gradients import differentiable, training_options
from frame_memory.forcing.recurrence import Recurrence

from . import reference_forcing, small

SHORT = {TEACHER: "teacher", STUDENT: "student", DIRECT: "direct"}
GOLDEN = Path(__file__).with_name("golden_losses.json")


@pytest.fixture(scope="module")
def model():
    return small.network()


@pytest.fixture(scope="module")
def pack(model):
    return small.memory(model)


def drawn(forcing, video, count=3, seed=5, **more):
    recipe = Recipe(forcing=forcing, drop_memory=0.0, **more)
    return recipe, draw_video(video, count, recipe, torch.Generator().manual_seed(seed))


def ours(forcing, forced, video, draw, recipe):
    return list(LOSSES[forcing](forced, video, draw, recipe))


@pytest.mark.parametrize("remembering", [False, True], ids=["F1", "MemoryPack"])
@pytest.mark.parametrize("forcing", FORCINGS)
@torch.no_grad()
def test_each_forcing_equals_the_plain_loop(model, pack, forcing, remembering):
    video = small.video(4, batch=2)
    recipe, draw = drawn(forcing, video, count=4, rollout_steps=3)
    used = pack if remembering else None
    made = ours(forcing, Forced(model, used), video, draw, recipe)
    expected = reference_forcing.losses(
        SHORT[forcing], model, used, video, draw.sigmas, draw.noises, draw.rollout_noises, steps=3
    )
    assert [c.clip for c in made] == [0, 1, 2, 3] and len(expected) == 4
    for clip, (loss, estimate) in zip(made, expected, strict=True):
        assert float(clip.loss) == pytest.approx(float(loss), rel=1e-5)
        assert torch.allclose(clip.estimate, estimate, atol=1e-5)


@pytest.mark.parametrize("forcing", FORCINGS)
def test_golden_losses(model, pack, forcing):
    """A change of numbers is seen. The file was written by tests/forcing/reference_forcing.py, not by the pack."""
    golden = json.loads(GOLDEN.read_text())
    video = small.video(3)
    recipe, draw = drawn(forcing, video)
    with torch.no_grad():
        made = [float(c.loss) for c in ours(forcing, Forced(model, pack), video, draw, recipe)]
    assert made == pytest.approx(golden["losses"][SHORT[forcing]], rel=golden["tolerance"])


@torch.no_grad()
def test_paper_time_and_the_hosts_sigma_give_the_same_estimate(model):
    """x_t = t x + (1 - t) e, v = -v', estimate x_t + (1 - t) v, with t = 1 - sigma."""
    video = small.video(1)
    recipe, draw = drawn(DIRECT, video, count=1)
    (clip,) = ours(DIRECT, Forced(model), video, draw, recipe)
    x, noise, t = video.latents[:, :, 1:].double(), draw.noises[0].double(), 1 - float(draw.sigmas[0])
    x_t = t * x + (1 - t) * noise
    velocity = -reference_forcing.predict(
        model, x_t.float(), torch.tensor([1 - t]), video, video.latents[:, :, :1], 0, None
    )
    assert torch.allclose(clip.estimate.double(), x_t + (1 - t) * velocity.double(), atol=1e-6)


@torch.no_grad()
def test_the_estimates_error_is_sigma_times_the_velocitys(model, pack):
    video = small.video(3)
    recipe, draw = drawn(TEACHER, video)
    for place, clip in enumerate(ours(TEACHER, Forced(model, pack), video, draw, recipe)):
        x = video.latents[:, :, 1 + 9 * place : 10 + 9 * place]
        error = float((clip.estimate - x).norm())
        assert error == pytest.approx(clip.sigma * float(clip.loss * x.numel()) ** 0.5, rel=1e-4)


class Recording:
    """The network, with what it was shown."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, timestep, **inputs):
        self.calls.append({"x": x.clone(), "sigma": timestep / 1000, **inputs})
        return self.model(x, timestep, **inputs)


@torch.no_grad()
def test_direct_forcing_shows_all_later_clips_the_estimates_and_always_the_clean_image(model, pack):
    video = small.video(4)
    given = video.latents.clone()
    recipe, draw = drawn(DIRECT, video, count=4)
    network = Recording(model)
    made = ours(DIRECT, Forced(network, pack), video, draw, recipe)
    assert torch.equal(video.latents, given)
    assert len(network.calls) == 4, "the estimates cost no forward pass of their own"
    history = torch.cat([torch.zeros(1, 16, 18, 4, 6), given[:, :, :1], *(c.estimate for c in made)], dim=2)
    for place, call in enumerate(network.calls):
        behind = history[:, :, : 19 + 9 * place][:, :, -19:]
        far, mid, image, near = call["context_latents"]
        assert torch.equal(image, given[:, :, :1])
        assert torch.equal(torch.cat([far, mid, near], dim=2), behind)
        psi = pack.anchor(video.cond.text, video.cond.vision)
        for i in range(place):
            psi = pack.update(psi, made[i].estimate, first=i == 0)
        assert (call["memory_tokens"] is None) if place == 0 else torch.equal(call["memory_tokens"], pack.tokens(psi))


@torch.no_grad()
def test_estimates_with_noise_levels_of_their_own(model):
    """The loss stays at high noise, and the history is estimated at low noise: one more forward pass a clip."""
    video = small.video(3)
    recipe, draw = drawn(DIRECT, video, shift=6.0, history_shift=0.6)
    network = Recording(model)
    made = ours(DIRECT, Forced(network), video, draw, recipe)
    assert len(network.calls) == 5, "none for the last clip, which nothing follows"
    levels = [float(c["sigma"]) for c in network.calls]
    assert levels[1] == pytest.approx(float(draw.history_sigmas[0])) and levels[1] != levels[0]
    noisy, level = network.calls[1]["x"], draw.history_sigmas[0]
    velocity = reference_forcing.predict(model, noisy, level, video, video.latents[:, :, :1], 0, None)
    shown = network.calls[2]["context_latents"]
    newest = torch.cat([shown[0], shown[1], shown[3]], dim=2)[:, :, -9:]
    assert torch.allclose(newest, noisy - level * velocity, atol=1e-5)
    assert not torch.allclose(newest, made[0].estimate, atol=1e-3)


@torch.no_grad()
def test_a_clip_without_its_memory_is_f1(model, pack):
    video = small.video(4)
    recipe, draw = drawn(TEACHER, video, count=4)
    dropped = replace(draw, dropped=(False, False, False, True))
    plain, without = Recording(model), Recording(model)
    ours(TEACHER, Forced(plain), video, draw, recipe)
    ours(TEACHER, Forced(without, pack), video, dropped, recipe)
    assert without.calls[3]["memory_tokens"] is None and without.calls[2]["memory_tokens"] is not None
    assert without.calls[3]["context_layout"] == plain.calls[3]["context_layout"]
    many = Recipe(drop_memory=0.1)
    kept = [draw_video(small.video(16), 16, many, torch.Generator().manual_seed(s)).dropped for s in range(100)]
    assert 0.06 < sum(map(sum, kept)) / 1600 < 0.14


@torch.no_grad()
def test_a_memory_whose_gate_is_closed_and_does_not_learn_is_none(model):
    """As when sampling: no tokens, and the image where F1 has it, also where its true place is farther away."""
    video, closed = small.video(4), small.memory(model, gate=0.0)
    recipe, draw = drawn(DIRECT, video, count=4)
    plain, behind = Recording(model), Recording(model)
    ours(DIRECT, Forced(plain), video, draw, recipe)
    ours(DIRECT, Forced(behind, closed), video, draw, recipe)
    assert [c["memory_tokens"] for c in behind.calls] == [None] * 4
    assert [c["context_layout"] for c in behind.calls] == [c["context_layout"] for c in plain.calls]
    learning = Recording(model)
    with torch.enable_grad():
        closed.requires_grad_(True)
        ours(DIRECT, Forced(learning, closed, True), video, draw, recipe)
    assert learning.calls[3]["memory_tokens"] is not None, "or it could never open"


def test_a_random_start_reads_the_clips_before_it(model, pack):
    video = small.video(5)
    recipe = Recipe(forcing=TEACHER, random_start=True, drop_memory=0.0)
    firsts = {draw_video(video, 2, recipe, torch.Generator().manual_seed(s)).first for s in range(40)}
    assert firsts == {0, 1, 2, 3}
    draw = replace(draw_video(video, 2, recipe, torch.Generator().manual_seed(1)), first=3)
    network = Recording(model)
    with torch.no_grad():
        made = ours(TEACHER, Forced(network, pack), video, draw, recipe)
    assert [c.clip for c in made] == [3, 4]
    assert torch.equal(network.calls[0]["context_latents"][3], video.latents[:, :, 27:28])
    psi = pack.anchor(video.cond.text, video.cond.vision)
    for i, call in enumerate([None] * 3 + network.calls):
        assert call is None or torch.allclose(call["memory_tokens"], torch.tanh(pack.gate) * psi, atol=1e-6)
        psi = pack.update(psi, video.latents[:, :, 1 + 9 * i : 10 + 9 * i], first=i == 0)


def test_psi_keeps_a_graph_of_the_newest_clips_only(model, pack):
    """Gradients of psi reach the last two clips' tokens; the value is that of the whole recurrence."""
    video, learning = small.video(5), small.memory(model).requires_grad_(True)
    memory, psi = Recurrence(learning, video.cond, unroll=2), learning.anchor(video.cond.text, video.cond.vision)
    seen = []
    handle = learning.embed.register_forward_hook(lambda m, a, out: seen.append(out) if out.requires_grad else None)
    for i, section in enumerate(clip_sections(5)):
        clip = video.latents[:, :, section.start : section.stop]
        memory.fold(clip)
        seen.clear()
        tokens = memory.tokens()
        assert len(seen) == min(i + 1, 2) and len(memory.recent) <= 2
        with torch.no_grad():
            psi = learning.update(psi, clip, first=i == 0)
        assert torch.allclose(tokens, learning.tokens(psi), atol=1e-5)
    handle.remove()
    tokens.sum().backward()
    # psi_0 is five clips back: nothing of it is in the graph.
    assert learning.text_in.weight.grad is None and bool(learning.embed.weight.grad.any())
    still = Recurrence(pack, video.cond, unroll=0)
    still.fold(video.latents[:, :, 1:10])
    assert not still.tokens().requires_grad


def test_teacher_forcing_trains_the_memory_through_the_frozen_network(model):
    video, learning = small.video(3), small.memory(model).requires_grad_(True)
    recipe, draw = drawn(TEACHER, video)
    with differentiable(model):
        forced = Forced(model, learning, True, training_options())
        for clip in LOSSES[TEACHER](forced, video, draw, recipe):
            if clip.loss.requires_grad:
                clip.loss.backward()
    untouched = [n for n, p in learning.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias moves all logits alike, which a softmax does not see.
    assert all(n.endswith("key.bias") for n in untouched), untouched


def test_noise_levels(model):
    g = torch.Generator().manual_seed(0)
    plain = sigmas(20000, 1.0, LOGIT_NORMAL, g)
    logits = torch.log(plain / (1 - plain))
    assert abs(float(logits.mean())) < 0.03 and float(logits.std()) == pytest.approx(1, abs=0.03)
    even = sigmas(20000, 1.0, UNIFORM, g)
    assert float(even.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(even.var()) == pytest.approx(1 / 12, abs=0.003)
    # A shift multiplies the odds of noise to data.
    moved = sigmas(20000, 5.0, LOGIT_NORMAL, g)
    assert float(torch.log(moved / (1 - moved)).mean()) == pytest.approx(torch.log(torch.tensor(5.0)).item(), abs=0.03)
    with pytest.raises(ForcingError, match="expected one of: logit-normal, uniform"):
        Recipe(sampling="cosine")


def test_the_curriculum_gives_every_clip_count_the_same_number_of_updates():
    counts = [clips_at(step, 500, 16) for step in range(500)]
    shares = {c: counts.count(c) for c in set(counts)}
    assert counts == sorted(counts) and shares == dict.fromkeys((1, 2, 4, 8, 16), 100)
    assert {clips_at(s, 90, 6, least=2) for s in range(90)} == {2, 4, 6}
    assert {clips_at(s, 10, 1) for s in range(10)} == {1} and clips_at(50, 10, 4) == 4


def test_videos_from_the_graphs_lists(model):
    latent = {"samples": torch.randn(1, 16, 24, 4, 6)}
    text, vision = torch.randn(1, 7, 64), torch.randn(1, 4, 1152)
    seen = type("Seen", (), {"last_hidden_state": vision})()
    more = {"pooled_output": torch.randn(1, 768), "clip_vision_output": seen}
    more["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    (stored,) = stored_videos([latent], [[[text, more]]])
    assert stored.samples is latent["samples"] and stored.clips == 2
    video = stored.open(lambda x: x * 2, "cpu")
    assert isinstance(video, TrainingVideo) and video.clips == 2
    assert torch.equal(video.latents, latent["samples"][:, :, :19] * 2)
    assert torch.equal(video.cond.text, text[:, :4]) and torch.equal(video.cond.vision, vision)


@pytest.mark.parametrize(
    ("latents", "positive", "said"),
    [
        ([], [], "no videos to train on"),
        ([{"samples": torch.zeros(1, 16, 10, 4, 6)}], [], "1 videos came with 0 prompts"),
        ([{"samples": torch.zeros(2, 16, 10, 4, 6)}], [[]], "expected one video"),
        ([{"samples": torch.zeros(1, 16, 10, 4, 6)}], [[]], "has 0 prompts"),
        ([{"samples": torch.zeros(1, 16, 10, 4, 6)}], [[[torch.zeros(1, 2, 64), {}]]], "no pooled text"),
    ],
    ids=["none", "no prompts", "a batch", "empty prompt", "no pooled text"],
)
def test_what_cannot_be_trained_on_is_refused_in_words(latents, positive, said):
    with pytest.raises(ForcingError, match=said):
        stored_videos(latents, positive)
