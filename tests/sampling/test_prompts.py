"""Prompts over time: what a section gets of two prompts, and what is read of a long one."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import pytest
import torch
import transformers
from comfy.patcher_extension import WrappersMP
from comfy.text_encoders import hunyuan_video

from frame_memory.plan import parse_timeline
from frame_memory.sampling.prompts import USER_TOKENS, EncodedTimeline, blend_text, lost_spaces, section_text, tokenise

from .conftest import conditioning, guider_for, of_kind, run

SECTION = 1.2


# ---- blending ------------------------------------------------------------------------------------------------------


def encoded(text: str, blend: int, lengths=(3, 5)) -> EncodedTimeline:
    timeline = parse_timeline(text, blend)
    made = [conditioning(seed=10 + i, tokens=lengths[i]) for i in range(len(timeline.entries))]
    return EncodedTimeline(timeline, tuple(made))


def naive(a, b, weight_b: float):
    """Token by token; a text that is over counts as zeros."""
    length = max(a.shape[1], b.shape[1])
    out = torch.zeros(1, length, a.shape[2], dtype=torch.float64)
    for t in range(length):
        if t < a.shape[1]:
            out[:, t] += (1 - weight_b) * a[:, t].double()
        if t < b.shape[1]:
            out[:, t] += weight_b * b[:, t].double()
    return out.float()


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize(("blend", "weights"), [(1, (1 / 2, 1.0)), (2, (1 / 3, 2 / 3, 1.0)), (0, (1.0,))])
def test_a_new_prompt_is_blended_in_linearly_text_and_pooled(blend, weights, lengths):
    """The k-th of n sections after a change takes k/(n+1) of the new prompt; the older text is the first argument."""
    timeline = encoded("0-2.4: a\n2.4-: b", blend, lengths)
    (a, a_extra), (b, b_extra) = (made[0] for made in timeline.conditionings)
    for time in (0.0, SECTION):
        text, pooled = section_text(timeline, time, SECTION)
        assert torch.equal(text, a) and torch.equal(pooled, a_extra["pooled_output"])
    for k, weight in enumerate(weights):
        text, pooled = section_text(timeline, 2.4 + k * SECTION, SECTION)
        if weight == 1.0:
            assert torch.equal(text, b) and torch.equal(pooled, b_extra["pooled_output"])
            continue
        assert torch.allclose(text, naive(a, b, weight), atol=1e-6)
        expected = (1 - weight) * a_extra["pooled_output"] + weight * b_extra["pooled_output"]
        assert torch.allclose(pooled, expected, atol=1e-6)
        assert not torch.allclose(text, naive(b, a, weight), atol=1e-2) or weight == 0.5


def test_blending_changes_neither_text():
    a, b = torch.randn(1, 3, 8), torch.randn(1, 6, 8)
    before = a.clone(), b.clone()
    assert blend_text(a, b, 0.25).shape == (1, 6, 8)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_the_network_gets_the_blended_text(model):
    """Through guider, sampler and model: the text of each section as the network is handed it."""
    seen = []

    def spy(executor, x, timestep, context, y, *args, **kwargs):
        seen.append((context.clone(), y.clone()))
        return executor(x, timestep, context, y, *args, **kwargs)

    clone = of_kind(model, "F1")
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy)
    timeline = encoded("0-1.2: a\n1.2-: b", 2)
    guider = guider_for(clone)
    run(model, guider=guider, timeline=timeline, seconds=3.6, steps=1)
    (a, a_extra), (b, b_extra) = (made[0] for made in timeline.conditionings)
    assert [c.shape[1] for c, _ in seen] == [3, 5, 5]
    for (text, pooled), weight in zip(seen, (0.0, 1 / 3, 2 / 3), strict=True):
        expected = a if weight == 0 else naive(a, b, weight)
        assert torch.allclose(text, expected, atol=1e-6)
        lerped = torch.lerp(a_extra["pooled_output"], b_extra["pooled_output"], weight)
        assert torch.allclose(pooled, lerped, atol=1e-6)


# ---- long prompts, with core's own tokenizers ----------------------------------------------------------------------

TEMPLATE = 95  # tokens before the user's, as in the comment of core's class and in reference/framepack.md section 5
END = 128009


def bare_clip():
    """Core's CLIP of HunyuanVideo with its real tokenizers, as this environment makes them; there are no weights."""
    made = comfy.sd.CLIP(no_init=True)
    made.tokenizer, made.tokenizer_options = hunyuan_video.HunyuanVideoTokenizer(), {}
    return made


@pytest.fixture(scope="module")
def clip():
    """The same with the word splitter that its tokenizer.json asks for; transformers 5 takes another."""
    made = bare_clip()
    folder = Path(hunyuan_video.__file__).parent / "llama_tokenizer"
    made.tokenizer.llama.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    return made


def test_a_tokenizer_that_loses_spaces_is_named(clip):
    """huggingface/transformers issue 45488: with version 5 core's class reads 'cat dog' and 'catdog' as the same."""
    text, made = "a red circle moves right", bare_clip()
    tokens, warnings = tokenise(made, text)
    lost = [t[0] for t in tokens["llama"][0]] != [t[0] for t in clip.tokenize(text)["llama"][0]]
    assert any("'transformers>=4.50.3,<5'" in w for w in warnings) is lost
    assert tokenise(clip, text)[1] == ()
    assert bool(lost_spaces()) is lost


def words(count: int) -> str:
    """A text of `count` tokens: each of these words is one."""
    return " ".join(["cat"] + ["dog"] * (count - 1))


@pytest.mark.parametrize("text", ["", "a cat walks", "红色的圆 向右移动", "كرة حمراء تتحرك", words(255)])
def test_fault_30_short_prompts_are_tokenised_as_core_does(clip, text):
    tokens, warnings = tokenise(clip, text)
    assert tokens == clip.tokenize(text) and warnings == ()


@pytest.mark.parametrize("count", [256, 257, 300, 700])
def test_fault_30_a_long_prompt_is_cut_with_notice(clip, count):
    whole = clip.tokenize(words(count))
    assert len(whole["llama"][0]) == TEMPLATE + count + 1, "the words are one token each"
    tokens, warnings = tokenise(clip, words(count))
    ids = [t[0] for t in tokens["llama"][0]]
    assert ids[: TEMPLATE + USER_TOKENS] == [t[0] for t in whole["llama"][0][: TEMPLATE + USER_TOKENS]]
    assert END not in ids[TEMPLATE:] and tokens["l"] == whole["l"]
    assert len(warnings) == (count > USER_TOKENS)
    for said in warnings:
        assert f"{count} tokens" in said and f"last {count - 256} " in said and "'Prompt Timeline'" in said


@pytest.mark.parametrize("text", ["红" * 400, "(a red circle:1.2) " * 100, "word{} " * 300, "\n".join(["line"] * 300)])
def test_fault_30_the_cut_counts_the_users_tokens_only(clip, text):
    tokens, warnings = tokenise(clip, text)
    row = tokens["llama"][0]
    assert len(row) == TEMPLATE + USER_TOKENS + 1 and row == [*clip.tokenize(text)["llama"][0][: len(row) - 1], row[-1]]
    assert "FramePack reads 256" in warnings[0]


class Positions:
    """In place of an encoder's weights: each token's feature is its place, so that one sees what core keeps."""

    def encode_token_weights(self, pairs):
        places = torch.arange(len(pairs[0])).float()[None, :, None]
        extra = {"attention_mask": torch.ones(1, len(pairs[0]))}
        return places, torch.zeros(1, 4), extra


class Pooled:
    """In place of CLIP-L's weights."""

    def encode_token_weights(self, pairs):
        return None, torch.zeros(1, 4)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 400])
def test_fault_30_core_keeps_the_places_that_the_published_code_keeps(clip, count):
    """Published: 351 tokens at most, then from the 95th on; the end mark is among them where there is room."""

    class Encoder:
        clip_l, llama = Pooled(), Positions()

    tokens, _ = tokenise(clip, words(count))
    features, _, extra = hunyuan_video.HunyuanVideoClipModel.encode_token_weights(Encoder(), tokens)
    published = list(range(TEMPLATE + count + 1))[:351][95:]
    assert features[0, :, 0].tolist() == published and "attention_mask" not in extra


def test_fault_30_a_long_prompt_of_another_node_is_warned_of(model):
    for tokens, warned in ((257, False), (300, True)):
        guider = guider_for(of_kind(model, "F1"), positive=conditioning(tokens=tokens))
        _, report = run(model, guider=guider, seconds=1.2, steps=1)
        assert ("299 tokens" in report and "CLIP Text Encode" in report) is warned
