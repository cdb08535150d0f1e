"""Memory on through a whole video: who sees what, and that stops, re-rolls and re-runs change nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import comfy.samplers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from frame_memory.model.framepack import MEMORY_KEY
from frame_memory.model.memory import attach, encoder_from_tensors
from frame_memory.model.semantic_pack import SemanticPack
from frame_memory.plan import PRESETS, PlanError, parse_timeline, plan_sections
from frame_memory.sampling.changes import SectionChange
from frame_memory.sampling.guards import SectionError
from frame_memory.sampling.memory import with_memory
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.prompts import EncodedTimeline
from frame_memory.sampling.section_loop import Inputs
from frame_memory.sampling.unipc import sample_framepack_unipc

from .conftest import anchored, opened, prompt
from .runs import guider_for, of_kind, run, start_latent

SECONDS = 4.8  # four sections
STEPS = 2


class Plain(comfy.samplers.KSAMPLER):
    """FramePack UniPC that notes what each section was shown, and fails at one of them if told so."""

    def __init__(self, log: list, fail_at: int | None = None):
        super().__init__(sample_framepack_unipc)
        type(self).log, type(self).fail_at = log, fail_at

    def sample(self, model_wrap, *args, **kwargs):
        conds = model_wrap.conds["positive"][0]["model_conds"]
        type(self).log.append(conds[MEMORY_KEY].cond if MEMORY_KEY in conds else None)
        if type(self).fail_at == len(self.log):
            raise RuntimeError("pulled the plug")
        return super().sample(model_wrap, *args, **kwargs)


def project(tmp_path, name: str = "p") -> ProjectRequest:
    return ProjectRequest(tmp_path / "frame_memory", name, "reuse what fits")


def film(model, memory, *, tmp_path=None, name="p", fail_at=None, **more):
    """(samples, memory tokens that each made section saw, report)."""
    shown: list = []
    if tmp_path is not None:
        more["project"] = project(tmp_path, name)
    settings = {"seconds": SECONDS, "steps": STEPS, "guider": guider_for(model), **more}
    with pytest.raises(RuntimeError, match="pulled") if fail_at else contextlib.nullcontext():
        made = run(model, sampler=Plain(shown, fail_at), memory=memory, **settings)
    if fail_at:
        return None, shown, ""
    latent, report = (made.latent, made.report) if tmp_path is not None else made
    return latent["samples"].clone(), shown, report


def psi_by_hand(memory, model, clips):
    """psi after some clips in VAE space, by the network's own methods in the plainest order."""
    with torch.no_grad():
        psi = memory.pack.anchor(memory.text, memory.vision)
        for number, clip in enumerate(clips):
            psi = memory.pack.update(psi, model.model.process_latent_in(clip.float()), first=number == 0)
    return psi


def test_each_section_sees_what_was_finished_before_it_and_the_first_sees_nothing(model, memory):
    plain, none, _ = film(model, None)
    with_it, shown, report = film(model, memory)
    assert none == [None] * 4 and shown[0] is None
    clips = [with_it[:, :, 1 + 9 * n : 10 + 9 * n] for n in range(4)]
    for n in (1, 2, 3):
        expected = psi_by_hand(memory, model, clips[:n]) * torch.tanh(torch.tensor(0.5))
        assert torch.allclose(shown[n], expected, atol=1e-5), n
    assert torch.equal(with_it[:, :, :10], plain[:, :, :10])  # the start and the first section
    for n in (1, 2, 3):
        assert not torch.allclose(clips[n], plain[:, :, 1 + 9 * n : 10 + 9 * n], atol=1e-2)
    assert "6 tokens a clip" in report and "gate 0.4621" in report


def test_a_closed_gate_is_the_plain_model_bit_for_bit_and_computes_nothing(model, memory, monkeypatch):
    plain, _, _ = film(model, None, seconds=6.0)  # the fifth section's image would stand elsewhere
    monkeypatch.setattr(SemanticPack, "clip_tokens", None)
    closed, shown, report = film(attach(model, memory), opened(memory, gate=0.0), seconds=6.0)
    assert torch.equal(closed, plain) and shown == [None] * 5
    assert "changes nothing" in report


def test_an_existing_video_is_read_first(model, memory):
    history = start_latent(frames=13, seed=3)
    _, shown, _ = film(model, memory, history=history, seconds=1.2)
    video = history["samples"]
    expected = psi_by_hand(memory, model, [video[:, :, 1:4], video[:, :, 4:13]]) * torch.tanh(torch.tensor(0.5))
    assert torch.allclose(shown[0], expected, atol=1e-5)


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_a_run_that_dies_goes_on_with_its_memory_and_ends_bit_identical(model, memory, tmp_path, fail_at):
    whole, shown, _ = film(model, memory)
    film(model, memory, tmp_path=tmp_path, fail_at=fail_at)
    resumed, again, _ = film(model, memory, tmp_path=tmp_path)
    assert torch.equal(resumed, whole)
    assert len(again) == 4 - (fail_at - 1)
    for mine, before in zip(again, shown[fail_at - 1 :], strict=True):
        assert mine is before is None or torch.equal(mine, before)


def test_psi_lies_beside_each_section_and_is_not_computed_twice(model, memory, tmp_path, monkeypatch):
    whole, _, _ = film(model, memory, tmp_path=tmp_path)
    for number in range(4):
        stored = load_file(tmp_path / "frame_memory" / "p" / "sections" / f"{number:03d}.safetensors")
        (name,) = set(stored) - {"samples"}
        clips = [whole[:, :, 1 + 9 * n : 10 + 9 * n] for n in range(number + 1)]
        assert name.startswith("psi.") and torch.allclose(stored[name], psi_by_hand(memory, model, clips), atol=1e-5)
    monkeypatch.setattr(SemanticPack, "update", None)
    again, shown, report = film(model, memory, tmp_path=tmp_path)
    assert torch.equal(again, whole) and shown == []
    assert "4 of 4 sections were finished before" in report


def test_sections_kept_without_memory_serve_as_its_first_and_those_of_another_memory_do_not(model, memory, tmp_path):
    plain, _, _ = film(model, None, tmp_path=tmp_path)
    mine, shown, _ = film(model, memory, tmp_path=tmp_path)
    assert len(shown) == 3 and torch.equal(mine, film(model, memory)[0])
    other = anchored(memory, seed=20)
    theirs, shown, _ = film(model, other, tmp_path=tmp_path)
    assert len(shown) == 3 and torch.equal(theirs, film(model, other)[0])
    back, shown, _ = film(model, None, tmp_path=tmp_path)
    assert torch.equal(back, plain) and shown == []  # all takes are there still


def test_a_section_made_anew_renews_the_memory_of_those_behind_it(model, memory, tmp_path):
    film(model, memory, tmp_path=tmp_path)
    changes = (SectionChange(2, seed=99),)
    rerolled, shown, _ = film(model, memory, tmp_path=tmp_path, changes=changes)
    assert len(shown) == 3
    assert torch.equal(rerolled, film(model, memory, changes=changes)[0])


def test_a_memory_that_breaks_costs_no_section(model, memory, tmp_path, monkeypatch):
    whole, _, _ = film(model, memory)
    real = SemanticPack.clip_tokens
    with monkeypatch.context() as broken:
        broken.setattr(SemanticPack, "clip_tokens", lambda self, clip: real(self, clip) * float("nan"))
        with pytest.raises(SectionError, match="NaN.*earlier checkpoint"):
            film(model, memory, tmp_path=tmp_path)
    resumed, shown, _ = film(model, memory, tmp_path=tmp_path)
    assert torch.equal(resumed, whole) and len(shown) == 3  # the first section was kept


def test_batches_and_odd_sizes(model, memory):
    start = start_latent(batch=2, height=5, width=7)
    made, shown, _ = film(model, memory, start=start, seconds=2.4)
    assert made.shape == (2, 16, 19, 5, 7) and shown[1].shape == (2, 3, 128)
    assert torch.isfinite(made).all() and not torch.equal(shown[1][0], shown[1][1])


def test_two_prompts_a_batch_and_a_timeline_are_resumed_with_memory_bit_for_bit(model, memory, tmp_path):
    """CFG, prompts of unlike lengths with padding, two videos, other words from section 3 on."""
    negative = prompt(seed=3)
    negative[0][1]["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    timeline = parse_timeline("0: a\n2.4: b", 0)
    words = EncodedTimeline(timeline, tuple(prompt({"a": 1, "b": 9}[e.text]) for e in timeline.entries))

    def made(**more):
        guider = guider_for(model, prompt(), negative, cfg=2.0)
        return film(model, memory, start=start_latent(batch=2), guider=guider, timeline=words, **more)

    whole, shown, _ = made()
    assert [None if s is None else s.shape[0] for s in shown] == [None, 2, 2, 2]
    made(tmp_path=tmp_path, fail_at=3)
    resumed, again, _ = made(tmp_path=tmp_path)
    assert torch.equal(resumed, whole) and len(again) == 2


def test_an_encoder_in_bf16_is_resumed_bit_for_bit(model, memory, tmp_path):
    tensors = {name: value.bfloat16() for name, value in memory.pack.state_dict().items()}
    half = anchored(encoder_from_tensors(tensors, memory.spec, label="half.safetensors", base=memory.base))
    whole, shown, _ = film(model, half, seconds=3.6)
    assert shown[2].dtype == torch.bfloat16 and torch.isfinite(whole).all()
    film(model, half, seconds=3.6, tmp_path=tmp_path, fail_at=3)
    assert torch.equal(film(model, half, seconds=3.6, tmp_path=tmp_path)[0], whole)


@pytest.mark.parametrize(("videos", "with_history"), [(1, False), (1, True), (2, True)])
def test_pictures_of_more_videos_than_are_made_and_one_history_for_all(model, memory, videos, with_history):
    """As core does with all it is given: what is too much is left out, what is too little is repeated."""
    seen = torch.randn(2, 4, 1152, generator=torch.Generator().manual_seed(8))
    own = memory.with_features(memory.text, seen)
    history = start_latent(frames=10, seed=3) if with_history else None
    made, shown, _ = film(model, own, start=start_latent(batch=videos), history=history, seconds=2.4)
    first = memory.with_features(memory.text, seen[:1])
    alone, _, _ = film(model, first, start=start_latent(batch=videos), history=history, seconds=2.4)
    assert shown[-1].shape[0] == videos
    if videos == 1:
        assert torch.equal(made, alone)
    else:
        assert torch.allclose(made[:1], alone[:1], atol=1e-4)
        assert not torch.allclose(made[1:], alone[1:], atol=1e-2)


def test_the_image_moves_with_an_open_gate_only_where_its_memory_was_trained_so(model, memory):
    """The fourth section's image is 28 latent frames away: with and without its true place, the same psi before it."""
    moved, a, _ = film(model, memory)
    still = replace(memory, spec=replace(memory.spec, true_image=False))
    unmoved, b, _ = film(model, still)
    assert torch.equal(a[3], b[3]) and torch.equal(moved[:, :, :28], unmoved[:, :, :28])
    assert not torch.allclose(moved[:, :, 28:], unmoved[:, :, 28:], atol=1e-3)


def test_wrong_orders_and_unanchored_memories_are_refused_before_any_step(model, memory):
    with pytest.raises(PlanError, match="order inverted.*Frame Context Packer"):
        film(of_kind(model, ""), memory, kind=None, preset="F0 inverted")
    with pytest.raises(PlanError, match="told neither prompt nor picture.*MemoryPack Encoder"):
        film(model, replace(memory, text=None))


def test_a_model_with_an_encoder_whose_memory_is_not_connected_is_warned_of(model, memory):
    _, shown, report = film(attach(model, memory), None, seconds=1.2)
    assert shown == [None] and "'memory' of 'Anti-Drift Sampler' is not connected" in report


@settings(max_examples=15)
@given(sections=st.integers(1, 200), given_frames=st.sampled_from([0, 30, 900]))
def test_fault_21_a_video_beyond_the_reach_of_positions_is_warned_of_once(model, memory, sections, given_frames):
    plan = plan_sections(PRESETS["F1 forward"], sections=sections, history_frames=given_frames)
    start = torch.zeros(1, 16, 1, 6, 10)
    inputs = Inputs(start, given=torch.zeros(1, 16, given_frames, 6, 10) if given_frames else None)
    _, moved, _, warnings = with_memory(memory, model, plan, inputs)
    first = given_frames - 1 if given_frames else 0
    too_far = [s for s in plan.sections if s.start - first > 800]
    assert len(warnings) == bool(too_far)
    if too_far:
        assert f"{len(too_far)} of {sections} sections" in warnings[0]
    assert min(p for s in moved.sections for g in s.groups for p in g.positions) >= 20 - 800


def test_what_a_run_holds_and_computes_does_not_grow_with_the_square_of_its_length(model, memory, monkeypatch):
    """One update a section, whatever the length: time is linear. psi keeps its size: memory is flat."""
    sizes: dict[int, list] = {}
    real = SemanticPack.update
    for sections in (2, 6):
        sizes[sections] = []

        def update(self, psi, clip, *, first, into=sizes[sections]):
            into.append((psi.shape[1], clip.shape[2]))
            return real(self, psi, clip, first=first)

        monkeypatch.setattr(SemanticPack, "update", update)
        film(model, memory, seconds=1.2 * sections, steps=1)
        assert len(sizes[sections]) == sections
    assert sizes[6][1:] == [(6, 9)] * 5  # each reads 9 frames and 6 tokens
