"""Frame preservation through a whole video: what each section is shown, and that stops and re-rolls change nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import comfy.samplers
import pytest
import torch
from safetensors.torch import load_file

from frame_memory.model.framepack import FRAME_FEATURES, FRAME_POSITIONS, FRAME_TOKENS
from frame_memory.model.memory import MemoryMismatch, detach
from frame_memory.model.preserved_history import PreservedHistory
from frame_memory.model.preserved_memory import (
    attach_preserved,
    memory_from_tensors,
    new_memory,
    with_cross_attention,
    with_tokens,
)
from frame_memory.plan import PRESETS, PlanError, plan_sections
from frame_memory.sampling.changes import SectionChange
from frame_memory.sampling.guards import SectionError
from frame_memory.sampling.memory import with_memory
from frame_memory.sampling.preservation import PreservationRun
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.section_loop import Inputs
from frame_memory.sampling.unipc import sample_framepack_unipc

from .runs import guider_for, run, start_latent
from .small import drawn

SMALL = {"channels": (4, 6, 8, 8), "heads": 2}
SECONDS = 3.6  # three sections


def filled(memory, seed: int = 3):
    """Random numbers where fresh encoders have zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, value in sorted(memory.history.named_parameters()):
            if not value.any():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return memory


@pytest.fixture
def memory(model):
    return with_tokens(filled(new_memory(model, "2x2x2", **SMALL)), 1000)


class Watched(comfy.samplers.KSAMPLER):
    """FramePack UniPC that notes what each section was shown, and fails at one of them if told so."""

    def __init__(self, log: list, fail_at: int | None = None):
        super().__init__(sample_framepack_unipc)
        type(self).log, type(self).fail_at = log, fail_at

    def sample(self, model_wrap, *args, **kwargs):
        conds = model_wrap.conds["positive"][0]["model_conds"]
        names = (FRAME_TOKENS, FRAME_POSITIONS, FRAME_FEATURES)
        shown = [conds[name].cond for name in names if name in conds]
        type(self).log.append((shown[0].clone(), shown[1].tolist(), *shown[2:]) if shown else None)
        if type(self).fail_at == len(self.log):
            raise RuntimeError("pulled the plug")
        return super().sample(model_wrap, *args, **kwargs)


def film(model, memory, *, tmp_path=None, name="p", fail_at=None, **more):
    """(samples, tokens and positions that each made section saw, report)."""
    shown: list = []
    if tmp_path is not None:
        more["project"] = ProjectRequest(tmp_path / "frame_memory", name, "reuse what fits")
    patched = model if memory is None else attach_preserved(model, memory)
    settings = {"seconds": SECONDS, "steps": 2, "guider": guider_for(patched), **more}
    with pytest.raises(RuntimeError, match="pulled") if fail_at else contextlib.nullcontext():
        made = run(patched, sampler=Watched(shown, fail_at), memory=memory, **settings)
    if fail_at:
        return None, shown, ""
    latent, report = (made.latent, made.report) if tmp_path is not None else made
    return latent["samples"].clone(), shown, report


def by_hand(memory, model, video, spans, window_at, rate=(2, 2, 2)):
    """Tokens of a video in VAE space, chunk by chunk, and where they stand before a window that begins at a frame."""
    deep, tall, wide = rate
    with torch.no_grad():
        latents, encoder = model.model.process_latent_in(video.float()), memory.history.encoders[0]
        parts = [encoder.encode(latents[:, :, a:b]) for a, b in spans]
    rows, columns = video.shape[3] // 2 // tall, video.shape[4] // 2 // wide
    places = [
        [20 - (window_at - (t + deep // 2)), y * tall + tall // 2, x * wide + wide // 2]
        for a, b in spans for t in range(a, b, deep) for y in range(rows) for x in range(columns)
    ]  # fmt: skip
    return torch.cat([part.tokens for part in parts], 1), places


def test_each_section_is_shown_all_whole_blocks_before_it_at_their_true_places(model, memory):
    plain, none, _ = film(model, None)
    with_it, shown, report = film(model, memory)
    assert none == [None] * 3 and shown[0] is None
    for number, spans in ((1, [(0, 10)]), (2, [(0, 10), (10, 18)])):
        tokens, places = by_hand(memory, model, with_it, spans, 1 + 9 * number)
        assert torch.allclose(shown[number][0], tokens, atol=1e-5) and shown[number][1] == places
    assert torch.equal(with_it[:, :, :10], plain[:, :, :10])  # the start and the first section
    assert not torch.allclose(with_it[:, :, 10:19], plain[:, :, 10:19], atol=1e-3)
    assert "28 tokens at the end, at most 1000" in report and "is untrained" in report
    for again in (model, attach_preserved(model, memory), detach(attach_preserved(model, memory))):
        assert torch.equal(film(again, None)[0], plain)  # taken out, it has left nothing


def test_an_existing_video_is_cut_into_segments_and_read_first(model, memory):
    history = start_latent(frames=13, seed=3)
    _, shown, _ = film(model, memory, history=history, seconds=2.4)
    spans = [(0, 4), (4, 12)]
    tokens, places = by_hand(memory, model, history["samples"], spans, 13)
    assert torch.allclose(shown[0][0], tokens, atol=1e-5) and shown[0][1] == places
    assert len(shown[1][1]) == len(places) + 10  # frames 12 to 21: the one that waited and a section


@pytest.mark.parametrize("fail_at", [1, 3])
def test_a_run_that_dies_goes_on_with_its_memory_and_ends_bit_identical(model, memory, tmp_path, fail_at):
    whole, shown, _ = film(model, memory)
    film(model, memory, tmp_path=tmp_path, fail_at=fail_at)
    resumed, again, _ = film(model, memory, tmp_path=tmp_path)
    assert torch.equal(resumed, whole) and len(again) == 3 - (fail_at - 1)
    for mine, before in zip(again, shown[fail_at - 1 :], strict=True):
        assert mine is before is None or (torch.equal(mine[0], before[0]) and mine[1] == before[1])


def test_tokens_lie_beside_each_section_and_are_not_computed_twice(model, memory, tmp_path, monkeypatch):
    whole, _, _ = film(model, memory, tmp_path=tmp_path)
    for number, span in enumerate([(0, 10), (10, 18), (18, 28)]):
        stored = load_file(tmp_path / "frame_memory" / "p" / "sections" / f"{number:03d}.safetensors")
        (name,) = set(stored) - {"samples"}
        assert name.startswith("preserved.2x2x2.")
        assert torch.allclose(stored[name], by_hand(memory, model, whole, [span], 0)[0], atol=1e-5)
    with monkeypatch.context() as off:
        off.setattr(PreservedHistory, "encode", None)
        again, shown, report = film(model, memory, tmp_path=tmp_path)
    assert torch.equal(again, whole) and shown == [] and "3 of 3 sections were finished before" in report


def test_features_for_cross_attention_lie_beside_the_tokens_and_go_with_them(model, memory, tmp_path):
    """Fresh ones change no bit; learned ones do, and a run that dies ends as one that does not."""
    before, _, _ = film(model, memory)
    both = with_tokens(with_cross_attention(memory, model), 17)
    assert torch.equal(film(model, with_tokens(both, 1000))[0], before)
    filled(both, 5)
    with torch.no_grad():
        both.history.cross_attention.norm.bias.fill_(0.1)
    whole, shown, report = film(model, both)
    assert not torch.allclose(whole, film(model, with_tokens(memory, 17))[0], atol=1e-3)
    with torch.no_grad():
        latents, encoder = model.model.process_latent_in(whole.float()), both.history.encoders[0]
        parts = [encoder.encode(latents[:, :, a:b]) for a, b in ((0, 10), (10, 18))]
    for (tokens, places, features), part in zip(shown[1:], parts, strict=True):  # the budget keeps the newest chunk
        assert torch.allclose(tokens, part.tokens, atol=1e-5) and torch.allclose(features, part.features, atol=1e-5)
        assert len(places) == features.shape[1] and features.shape[2] == 8
    film(model, both, tmp_path=tmp_path, fail_at=3)
    stored = load_file(tmp_path / "frame_memory" / "p" / "sections" / "000.safetensors")
    (name,) = set(stored) - {"samples"}
    assert torch.equal(stored[name], torch.cat((shown[1][0], shown[1][2]), -1))
    run = PreservationRun(both, model, whole[:, :, :1], 9)
    assert run.bytes_a_section(whole.shape) == stored[name].nbytes == 10 * (128 + 8) * 4
    assert torch.equal(film(model, both, tmp_path=tmp_path)[0], whole)
    with pytest.raises(PlanError, match="Expected both outputs of 'Frame Preservation Encoder'"):
        film(model, both, guider=guider_for(attach_preserved(model, memory)))


def test_each_section_is_encoded_once(model, memory, monkeypatch):
    spans, real = [], PreservedHistory.encode
    monkeypatch.setattr(PreservedHistory, "encode", lambda self, x: (spans.append(x.shape[2]), real(self, x))[1])
    film(model, memory, seconds=6.0, steps=1)
    assert spans == [10, 8, 10, 8, 10]


def test_a_section_made_anew_renews_the_memory_and_another_memory_or_budget_is_another_video(model, memory, tmp_path):
    film(model, memory, tmp_path=tmp_path)
    changes = (SectionChange(2, seed=99),)
    rerolled, shown, _ = film(model, memory, tmp_path=tmp_path, changes=changes)
    assert len(shown) == 2 and torch.equal(rerolled, film(model, memory, changes=changes)[0])
    other = with_tokens(filled(new_memory(model, "2x2x2", seed=1, **SMALL), 9), 1000)
    theirs, shown, _ = film(model, other, tmp_path=tmp_path)
    assert len(shown) == 2 and torch.equal(theirs, film(model, other)[0])
    small = with_tokens(memory, 10)
    short, shown, _ = film(model, small, tmp_path=tmp_path)
    assert len(shown) == 1 and torch.equal(short, film(model, small)[0])
    assert film(model, with_tokens(memory, 2000), tmp_path=tmp_path)[1] == [], "nothing was forgotten: the same video"


def test_past_the_budget_the_oldest_chunks_go(model, memory):
    _, shown, report = film(model, with_tokens(memory, 18))
    assert [len(s[1]) for s in shown[1:]] == [10, 18]
    _, shown, report = film(model, with_tokens(memory, 17))
    assert [len(s[1]) for s in shown[1:]] == [10, 8] and "the oldest go, and the end is shown the last" in report
    with pytest.raises(PlanError, match="a budget of 9 tokens.*Frame Preservation Encoder"):
        film(model, with_tokens(memory, 9))


def test_two_encoders_stand_beside_each_other_and_the_finer_forgets_first(model):
    """Chunks end on blocks of 8 frames of 4x5 tokens and 1x2 patches of the two grids: 4 times 2x5, and 1 time 2x5."""
    memory = with_tokens(filled(new_memory(model, "2x2x2", "2x2x8", **SMALL)), 1000)
    start = start_latent(height=8, width=20)
    _, shown, _ = film(model, memory, start=start)
    assert [None if s is None else len(s[1]) for s in shown] == [None, 40 + 10, 80 + 20]
    assert [p for p in shown[1][1] if p[0] == 20 - (10 - 4)][:1] and shown[1][1][-1] == [20 - (10 - 4), 3, 9]
    _, shown, _ = film(model, with_tokens(memory, 99), start=start)
    assert len(shown[2][1]) == 10 + 40 + 10


def test_batches_odd_sizes_and_two_prompts(model, memory, tmp_path):
    start = start_latent(batch=2, height=7, width=11)
    guider = guider_for(attach_preserved(model, memory), cfg=2.0)
    made, shown, _ = film(model, memory, start=start, guider=guider)
    assert made.shape == (2, 16, 28, 7, 11) and shown[1][0].shape[0] == 2 and torch.isfinite(made).all()
    alone, _, _ = film(model, memory, start={"samples": start["samples"][:1]})
    assert alone.shape[0] == 1


def test_an_encoder_in_bf16_is_resumed_bit_for_bit(model, memory, tmp_path):
    tensors = {n: v if ".embed." in n else v.bfloat16() for n, v in memory.history.state_dict().items()}
    half = with_tokens(memory_from_tensors(tensors, memory.specs, label="half", base=memory.base), 1000)
    whole, shown, _ = film(model, half)
    assert shown[2][0].dtype == torch.bfloat16 and torch.isfinite(whole).all()
    film(model, half, tmp_path=tmp_path, fail_at=3)
    assert torch.equal(film(model, half, tmp_path=tmp_path)[0], whole)


def test_a_memory_that_breaks_costs_no_section(model, memory, tmp_path, monkeypatch):
    whole, _, _ = film(model, memory)
    real = PreservedHistory.encode
    with monkeypatch.context() as broken:
        broken.setattr(
            PreservedHistory, "encode",
            lambda self, x: tuple(one._replace(tokens=one.tokens * float("nan")) for one in real(self, x)),
        )  # fmt: skip
        with pytest.raises(SectionError, match="NaN.*earlier checkpoint"):
            film(model, memory, tmp_path=tmp_path)
    resumed, shown, _ = film(model, memory, tmp_path=tmp_path)
    assert torch.equal(resumed, whole) and len(shown) == 2  # the first section was kept


def test_what_cannot_work_is_refused_before_any_step(model, memory):
    with pytest.raises(PlanError, match="straight from the node that loads.*'Frame Preservation Encoder'"):
        film(model, replace(memory, tokens=None))
    with pytest.raises(MemoryMismatch, match="was made for another base"):
        film(model, replace(memory, base=replace(memory.base, kind="F0")))
    plan = plan_sections(PRESETS["F0 inverted"], sections=2)
    with pytest.raises(PlanError, match="order inverted.*Frame Context Packer"):
        with_memory(memory, model, plan, Inputs(torch.zeros(1, 16, 1, 6, 10)))
    with pytest.raises(PlanError, match="at least 4x4"):
        film(model, memory, start=start_latent(height=3, width=10))


def test_the_memory_of_an_encoder_that_is_not_connected_is_warned_of(model, memory):
    _, shown, report = film(attach_preserved(model, memory), None, seconds=1.2)
    assert shown == [None] and "or 'Frame Preservation Encoder'" in report


def test_what_is_held_does_not_grow_with_the_length_of_the_video(model, memory):
    """An hour in sections of 9 latent frames; the encoder is left out, since only what is kept counts here."""
    small = with_tokens(memory, 60)
    made = PreservationRun(small, model, drawn(1, 16, 1, 4, 4), 9)
    held = []
    for number in range(400):
        made._waiting = made._waiting.clone()
        made._encoded = lambda chunk: {"2x2x2": torch.zeros(1, chunk.shape[2] // 2, 128)}
        made.take(torch.full((1, 16, 9, 4, 4), float(number)))
        held.append(sum(t.numel() for chunk in made.chunks for t in chunk.tokens.values()) + made._waiting.numel())
    assert max(held) == max(held[:40]) <= 60 * 128 + 16 * 16
