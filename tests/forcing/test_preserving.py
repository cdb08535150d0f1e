"""Frame preservation's two losses against plain loops, golden numbers, gradients by finite differences, what learns."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import comfy.ops
import pytest
import torch

from frame_memory.forcing.clips import ForcingError
from frame_memory.forcing.forcings import Forced
from frame_memory.forcing.preserving import (
    FOLLOW,
    LOSSES,
    QUERY,
    asked_frames,
    draw_follow,
    draw_query,
    frame_query,
    next_section,
)
from frame_memory.forcing.stages import LORA, MEMORY, Trained
from frame_memory.model.cross_attention import spec_of
from frame_memory.model.preservation import PreservationSpec
from frame_memory.model.preserved_history import PreservedHistory, initialise_all

from . import reference_preserving, small

GOLDEN = Path(__file__).with_name("golden_preserving.json")
SMALL = {"channels": (4, 6, 8, 8), "heads": 2}


@pytest.fixture(scope="module")
def model():
    return small.network()


def encoders(model, *rates: str, seed: int = 1, cross: bool = False, **options) -> PreservedHistory:
    """Encoders for a network, no part of them zero. cross: with cross-attention."""
    layer = model.img_in.proj if hasattr(model, "img_in") else model.patch_embedding
    options = {**SMALL, **options, "cross_attention": cross}
    specs = [PreservationSpec.of(layer, 16, rate=rate, **options) for rate in rates or ("2x2x2",)]
    read = spec_of(model, specs[0].features) if cross else None
    # Layers that cast, as own_history's.
    pack = PreservedHistory(specs, torch.float32, None, comfy.ops.manual_cast, read)
    initialise_all(pack, layer.weight, layer.bias, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(pack.named_parameters()):
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return pack.requires_grad_(False)


def drawn(stage: str, video, pack, seed: int = 5, count: int = 3):
    generator = torch.Generator().manual_seed(seed)
    if stage == QUERY:
        return draw_query(video, count, pack.rates, generator)
    return draw_follow(video, count, generator)


@pytest.mark.parametrize("rates", [("2x2x1",), ("2x2x2", "2x2x8")], ids=" and ".join)
@pytest.mark.parametrize("stage", [QUERY, FOLLOW])
@torch.no_grad()
def test_each_loss_equals_the_plain_loop(model, stage, rates):
    pack, video = encoders(model, *rates), small.video(3, batch=2)
    draw, before = drawn(stage, video, pack), video.latents.clone()
    (made,) = LOSSES[stage](Forced(model, pack), video, draw)
    if stage == QUERY:
        expected, _ = reference_preserving.frame_query(model, pack, video, draw)
    else:
        expected = reference_preserving.next_section(model, pack, video, draw)
    assert float(made.loss) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(video.latents, before)


@pytest.mark.parametrize(("schedule", "clean"), [("f1k1_x_g9", 0), ("f1k1_x_f3k1_g9", 3)])
@torch.no_grad()
def test_a_section_may_follow_a_schedule_with_fewer_clean_frames(model, schedule, clean):
    pack, video = encoders(model, "2x2x2"), small.video(3, batch=2)
    draw = drawn(FOLLOW, video, pack)
    (made,) = next_section(Forced(model, pack), video, draw, schedule)
    expected = reference_preserving.next_section(model, pack, video, draw, clean)
    assert float(made.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [QUERY, FOLLOW])
@torch.no_grad()
def test_a_tenth_of_the_updates_has_no_text_and_nothing_else_changes(model, stage):
    """Such an update is that of a video whose caption says nothing; its picture is still seen."""
    pack, video = encoders(model), small.video(3, batch=2)

    def draws(share: float, count: int):
        made = [torch.Generator().manual_seed(seed) for seed in range(count)]
        if stage == QUERY:
            return [draw_query(video, 2, pack.rates, g, drop_text=share) for g in made]
        return [draw_follow(video, 3, g, drop_text=share) for g in made]

    often = draws(0.1, 600)
    assert 40 < sum(draw.without_text for draw in often) < 80
    for draw, plain in zip(often[:20], draws(0.0, 20), strict=True):
        assert torch.equal(draw.noise, plain.noise) and torch.equal(draw.sigma, plain.sigma)
        assert not plain.without_text
    draw = next(draw for draw in often if draw.without_text)
    cond = replace(video.cond, text=0 * video.cond.text, pooled=0 * video.cond.pooled)
    (made,) = LOSSES[stage](Forced(model, pack), video, draw)
    bare, told = replace(video, cond=cond), replace(draw, without_text=False)
    (expected,) = LOSSES[stage](Forced(model, pack), bare, told)
    (other,) = LOSSES[stage](Forced(model, pack), video, told)
    assert torch.equal(made.estimate, expected.estimate) and not torch.equal(made.estimate, other.estimate)


@pytest.mark.parametrize("stage", [QUERY, FOLLOW])
@torch.no_grad()
def test_golden_losses(model, stage):
    """A change of numbers is seen. The file was written by make_golden.py from the plain loop, not by the pack."""
    golden, video, pack = json.loads(GOLDEN.read_text()), small.video(3), encoders(model)
    draws = [drawn(stage, video, pack, seed) for seed in range(3)]
    made = [float(c.loss) for draw in draws for c in LOSSES[stage](Forced(model, pack), video, draw)]
    assert made == pytest.approx(golden["losses"][stage], rel=golden["tolerance"])


class Recording:
    """The encoders, with what they were shown."""

    def __init__(self, pack, seen: list):
        self.hook = pack.register_forward_pre_hook(lambda _, args: seen.append(args))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


@torch.no_grad()
def test_asked_frames_are_shown_bit_for_bit_and_all_others_behind_noise(model):
    pack, video, seen = encoders(model, "2x2x2"), small.video(4, batch=2), []
    for seed in range(6):
        draw = drawn(QUERY, video, pack, seed, count=2)
        seen.clear()
        with Recording(pack, seen):
            (made,) = frame_query(Forced(model, pack), video, draw)
        shown, ends, lows = seen[0]
        history = video.latents[:, :, 9 * draw.first : 9 * draw.first + 19]
        same = [t for t in range(19) if torch.equal(shown[:, :, t], history[:, :, t])]
        assert tuple(same) == draw.asked and ends == (1, 10, 19) and lows[0].shape == (2, 16, 9, 2, 3)
        assert made.estimate.shape == (2, 16, len(draw.asked), 4, 6)
        assert float(draw.levels.min()) >= 0.2 and float(draw.levels.max()) <= 1 and draw.levels.shape == (1, 19)


@torch.no_grad()
def test_no_frame_of_the_copy_shows_what_is_masked(model):
    """At full noise two histories that agree in the asked frames alone are one to the encoder, small copy and all."""
    pack, video = encoders(model, "2x2x2"), small.video(2)
    other = replace(video, latents=small.video(2, seed=7).latents.clone())
    draw = replace(drawn(QUERY, video, pack), levels=torch.ones(1, 19), first=0, asked=(4, 5, 9))
    draw = replace(draw, noise=torch.zeros(1, 16, 3, 4, 6))
    other.latents[:, :, list(draw.asked)] = video.latents[:, :, list(draw.asked)]
    other = replace(other, cond=video.cond)
    mine, theirs = (next(frame_query(Forced(model, pack), v, draw)) for v in (video, other))
    assert torch.equal(mine.estimate, theirs.estimate)


def test_index_sets_are_half_contiguous_and_half_scattered_and_reach_every_frame():
    generator, counts, runs, reached = torch.Generator().manual_seed(0), [], 0, set()
    for _ in range(4000):
        asked = asked_frames(40, generator)
        assert list(asked) == sorted(set(asked)) and asked[0] >= 0 and asked[-1] < 40
        counts.append(len(asked))
        reached |= set(asked)
        if len(asked) >= 3:
            runs += asked[-1] - asked[0] == len(asked) - 1
    assert set(counts) == set(range(1, 9)) and all(400 < counts.count(n) < 600 for n in range(1, 9))
    assert 0.46 < runs / sum(c >= 3 for c in counts) < 0.54 and reached == set(range(40))
    assert asked_frames(1, generator) == (0,)


def test_no_frame_is_asked_that_no_block_holds(model):
    pack, video = encoders(model, "2x2x8"), small.video(2)
    for seed in range(30):
        assert max(drawn(QUERY, video, pack, seed, count=2).asked) < 16
    with pytest.raises(ForcingError, match="video 0.*1 latent frames.*raise 'clips'"):
        draw_query(replace(video, latents=video.latents[:, :, :1]), 1, pack.rates, torch.Generator())
    with pytest.raises(ForcingError, match="from 2 on"):
        draw_follow(video, 1, torch.Generator())


def losses_of(trained: Trained, stage: str, video, draw) -> torch.Tensor:
    (made,) = LOSSES[stage](trained.forced, video, draw)
    return made.loss


def gradients(trained: Trained, stage: str, video, draw) -> dict[str, torch.Tensor]:
    with trained.ready():
        losses_of(trained, stage, video, draw).backward()
    found = {n: p.grad.clone() for n, p in trained.parameters.items() if p.grad is not None and bool(p.grad.any())}
    for p in trained.parameters.values():
        p.grad = None
    return found


def opened(trained: Trained) -> Trained:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for pair in trained.pairs.values():
            pair.up.copy_(torch.randn(pair.up.shape, generator=generator) * 0.1)
    return trained


@pytest.mark.parametrize("parts", [(MEMORY,), (MEMORY, LORA), (LORA,)], ids=" and ".join)
@pytest.mark.parametrize("stage", [QUERY, FOLLOW])
def test_gradients_are_where_they_should_be_and_nothing_stays_behind(model, stage, parts):
    pack, video = encoders(model, "2x2x2"), small.video(3)
    base = {n: p.clone() for n, p in (*model.named_parameters(), *pack.named_parameters())}
    trained = opened(Trained(model, pack, parts, rank=2))
    found = set(gradients(trained, stage, video, drawn(stage, video, pack)))
    found -= {n for n in found if n.endswith("key.bias")}  # moves all logits alike, which a softmax does not see
    encoder = {f"pack.{n}" for n, _ in pack.named_parameters() if ".embed." not in n and not n.endswith("key.bias")}
    linears = {n for n in trained.parameters if n.startswith("lora.")}
    assert {n for n in found if n.startswith("pack.")} == (encoder if MEMORY in parts else set())
    # The last block's text side is not looked at any more.
    assert {n for n in found if n.startswith("lora.")} <= linears and (LORA in parts) == bool(found & linears)
    assert not any(".embed." in n for n in trained.parameters), "the low branch's embedding is the base's"
    now = dict((*model.named_parameters(), *pack.named_parameters()))
    assert all(torch.equal(now[n], value) for n, value in base.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *pack.modules()))


@pytest.mark.parametrize("kind", ["pack.", "lora.", "pack.cross_attention.", "pack.encoders."])
@pytest.mark.parametrize("stage", [QUERY, FOLLOW])
def test_gradients_equal_finite_differences(stage, kind):
    """In fp64, along the gradients of encoder or LoRA, each number of them stretched by chance; and of cross-attention,
    or of the encoder through it."""
    model = small.network().double()
    pack = encoders(model, "2x2x2", cross=kind.count(".") > 1).double()
    for encoder in pack.each:
        encoder.dtype = torch.float64
        encoder.embed.float()
    trained = opened(Trained(model, pack, (MEMORY, LORA), rank=2, dtype=torch.float64))
    for pair in trained.pairs.values():
        pair.double()
    video = replace(small.video(3), latents=small.video(3).latents.double())
    draw, generator = drawn(stage, video, pack), torch.Generator().manual_seed(6)
    found = {n: g for n, g in gradients(trained, stage, video, draw).items() if n.startswith(kind)}
    way = {n: g * (0.5 + torch.rand(g.shape, generator=generator)) for n, g in found.items()}
    length = sum(float(d.square().sum()) for d in way.values()) ** 0.5

    def moved(step: float) -> float:
        with trained.ready(), torch.no_grad():
            for n, direction in way.items():
                trained.parameters[n].add_(direction, alpha=step / length)
            value = float(losses_of(trained, stage, video, draw))
            for n, direction in way.items():
                trained.parameters[n].sub_(direction, alpha=step / length)
        return value

    # The rotation stays in fp32, which smaller steps drown in; two steps take the curvature out.
    near, far = ((moved(h) - moved(-h)) / (2 * h) for h in (1e-2, 2e-2))
    expected = sum(float((found[n] * direction).sum()) for n, direction in way.items()) / length
    assert (4 * near - far) / 3 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("stage", "cross"), [(QUERY, False), (FOLLOW, False), (FOLLOW, True)])
def test_gradient_checkpointing_changes_no_gradient(model, stage, cross):
    pack, video, found = encoders(model, "2x2x2", cross=cross), small.video(3), []
    draw = drawn(stage, video, pack)
    for on in (False, True):
        trained = opened(Trained(model, pack, (MEMORY, LORA), rank=2, checkpointing=on))
        found.append(gradients(trained, stage, video, draw))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][n], found[1][n], rtol=1e-4, atol=1e-7) for n in found[0])


@pytest.mark.parametrize("stage", [QUERY, FOLLOW])
def test_cross_attention_learns_in_fp32_beside_a_network_in_bf16_and_every_block_of_it(model, stage):
    pack, video, found = encoders(model, "2x2x2", cross=True), small.video(3, batch=2), []
    draw = drawn(stage, video, pack)
    for dtype in (torch.float32, torch.bfloat16):
        network = copy.deepcopy(model).to(dtype)
        made = gradients(Trained(network, pack, (MEMORY,), dtype=dtype), stage, video, draw)
        found.append({n: g for n, g in made.items() if n.startswith("pack.cross") and not n.endswith("key.bias")})
    names = {f"pack.{n}" for n, _ in pack.named_parameters() if n.startswith("cross") and not n.endswith("key.bias")}
    exact, near = ({n: g for n, g in made.items() if n in names} for made in found)
    assert exact.keys() == names and len(names) == 2 + 2 * 7 and near.keys() == names
    for name, value in exact.items():
        assert near[name].dtype == torch.float32
        assert torch.cosine_similarity(near[name].flatten(), value.flatten(), 0) > 0.97, name
