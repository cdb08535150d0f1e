"""The nodes of frame preservation: attaching with a limit, and asking a memory for a frame."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from frame_memory.model import memory_file
from frame_memory.model.framepack import FRAME_POSITIONS, FRAME_TOKENS
from frame_memory.model.transformer import FramePackTransformer
from frame_memory.plan.preservation import STAGE_FOLLOW
from frame_memory.video.fidelity import psnr, ssim

from .conftest import prompt
from .runs import start_latent
from .small import Pixels
from .test_memory_nodes import PACK, files, nodes  # noqa: F401 (fixtures)
from .test_preserved_run import SMALL, filled


@pytest.fixture
def faces(nodes):  # noqa: F811 (the fixture of that name)
    return importlib.import_module(f"{PACK}.nodes.preservation")


@pytest.fixture
def own(nodes):  # noqa: F811 (the fixture of that name)
    """The library as the nodes import it, whose classes are its own."""
    return importlib.import_module(f"{PACK}.frame_memory.model.preserved_memory")


def test_new_encoders_of_every_rate_are_offered(nodes, own, model):  # noqa: F811
    for name, rates in nodes.NEW_FRAMES.items():
        made, report = nodes.FrameMemoryLoadEncoder.execute(name, model).result
        assert isinstance(made, own.PreservedMemory) and made.rates == rates
        assert "frame preservation" in report and "UNTRAINED" in report
    with pytest.raises(ValueError, match="'model' is not connected"):
        nodes.FrameMemoryLoadEncoder.execute(next(iter(nodes.NEW_FRAMES)))


def test_a_file_is_loaded_and_attached_with_a_limit(nodes, faces, own, model, files):  # noqa: F811
    given = own.new_memory(model, "4x4x2", **SMALL)
    parts = {"frames": given.history.state_dict(), "spec": given.to_spec()}
    recipe = {"stage": STAGE_FOLLOW, "schedule": "td_f3k1_g20"}
    memory_file.write(str(files / "mine.safetensors"), given.base, **parts, recipe=recipe)
    made, report = nodes.FrameMemoryLoadEncoder.execute("mine.safetensors", model).result
    assert made.trained and made.fingerprint == given.fingerprint and "Trained on this base" in report
    patched, limited, report = faces.FrameMemoryFramePreservation.execute(model, made, 5460).result
    assert limited.tokens == 5460 and made.tokens is None and not model.additional_models
    assert patched.get_additional_models()[0].model is made.history
    assert "At most 5460 tokens, which are about 16 s of 832x480 at 30 fps. Past that the oldest go." in report
    assert report.endswith("on the schedule 'Wan, 3 clean frames' (td_f3k1_g20): choose it in 'Frame Context Packer'.")
    read = own.with_cross_attention(made, model)
    patched, _, report = faces.FrameMemoryFramePreservation.execute(model, read, 5460).result
    # Keys, values, attention and output of 128 in 3 blocks, for a window of 9 x 30 x 52 tokens.
    window, known = 9 * 30 * 52, 5460
    work = 3 * (2 * known * 8 * 128 * 2 + 4 * window * known * 128 + 2 * window * 128 * 128)
    size = 4 * (2 * 8 + 3 * (2 * 128 + 2 * (8 * 128 + 128) + 128 * 128 + 128))
    assert f"Cross-attention in 3 blocks: {size / 1e6:.1f} MB beside the MODEL, and {work / 1e12:.3g} T op" in report
    assert patched.get_additional_models()[0].model.cross_attention.spec == read.cross


def test_each_node_refuses_the_other_kind(nodes, faces, own, model):  # noqa: F811
    packs = importlib.import_module(f"{PACK}.frame_memory.model.memory")
    with pytest.raises(ValueError, match="'Frame Preservation Encoder' is new: SemanticPack.*'MemoryPack Encoder'"):
        faces.FrameMemoryFramePreservation.execute(model, packs.new_encoder(model), 100)
    frames = own.new_memory(model, "4x4x2", **SMALL)
    with pytest.raises(ValueError, match="is new: frame preservation.*into 'Frame Preservation Encoder'"):
        nodes.FrameMemoryMemoryPack.execute(model, frames, prompt())


def ask(faces, own, model, seconds=0.5, tokens=1000, frames=13, attached=None, **more):
    memory = own.with_tokens(filled(own.new_memory(model, "2x2x2", **SMALL)), tokens)
    patched = own.attach_preserved(model, attached or memory)
    asked = {"model": patched, "memory": memory, "positive": prompt(), "samples": start_latent(2, frames, 3)}
    asked |= {"vae": Pixels(), "seconds": seconds, "steps": 2, "seed": 1, **more}
    with torch.inference_mode():
        return faces.FrameMemoryRetrieveFrame.execute(**asked).result


def test_a_frame_is_asked_at_its_own_time_behind_the_whole_memory(faces, own, model, monkeypatch):
    transformer = importlib.import_module(f"{PACK}.frame_memory.model.transformer").FramePackTransformer
    calls, real = [], FramePackTransformer.pack

    def seen(self, x, *args, **kwargs):
        calls.append((x.shape, kwargs))
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(FramePackTransformer, "pack", seen)
    monkeypatch.setattr(transformer, "pack", seen)
    pair, near, like, report = ask(faces, own, model)  # picture 15, latent frame 4
    assert len(calls) == 1 and calls[0][0] == (1, 16, 1, 6, 10)
    given = calls[0][1]
    assert given["context_layout"].positions == (4,) and given["context_latents"] == []
    assert given[FRAME_TOKENS].shape[1] == 12
    assert given[FRAME_POSITIONS][:, 0].tolist() == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11]
    assert pair.shape == (1, 48, 160, 3)
    expected = Pixels().decode(start_latent(2, 13, 3)["samples"][:1, :, 2:5])[0, -2]
    assert torch.allclose(pair[0, :, :80], expected)
    sides = pair[0, :, :80], pair[0, :, 80:]
    assert near == pytest.approx(psnr(*sides)) and like == pytest.approx(ssim(*sides))
    assert report.startswith("Of 2 videos in one batch the first one is asked.\nFrame at 0.50 s (picture 15, latent fr")
    assert "Warning" not in report
    assert torch.equal(ask(faces, own, model)[0], pair), "the same seed, the same picture"


def test_a_frame_is_asked_behind_what_cross_attention_reads_too(faces, own, model):
    plain = own.with_tokens(filled(own.new_memory(model, "2x2x2", **SMALL)), 1000)
    read = own.with_cross_attention(plain, model)
    before, fresh = (ask(faces, own, model, memory=memory, attached=memory)[0] for memory in (plain, read))
    learned = ask(faces, own, model, memory=filled(read), attached=read)[0]
    assert torch.equal(fresh, before) and not torch.allclose(learned, before, atol=1e-3)
    with pytest.raises(ValueError, match="Expected both outputs of 'Frame Preservation Encoder'"):
        ask(faces, own, model, memory=read, attached=plain)


def test_the_number_stands_beside_that_of_the_mean_of_other_frames(faces, own, model):
    pair, _, _, report = ask(faces, own, model)  # latent frame 4 of 13
    video, mean = start_latent(2, 13, 3)["samples"][:1], 0
    for frame in (0, 2, 3, 6, 7, 9, 10, 12):
        mean = mean + video[:, :, frame : frame + 1] / 8
    shown = Pixels().decode(torch.cat((video[:, :, 2:4], mean), 2))[0, -2]  # as the two of the pair
    worth = psnr(pair[0, :, :80], shown), ssim(pair[0, :, :80], shown)
    assert f"mean of 8 other frames of the video in its place: PSNR {worth[0]:.2f} dB, SSIM {worth[1]:.3f}" in report


NEARER, NO_NEARER = "dB nearer than the mean.", "The memory is no nearer than the mean."
KNOWS, KNOWS_NOT = " Its SSIM is higher too: it knows of this moment.", " Its SSIM is no higher either"


@pytest.mark.parametrize(("others", "trained", "tokens", "said"), [
    ((-3, 0), True, 1000, NEARER + KNOWS),
    ((-3, 0), False, 1000, NEARER + "\n"),
    ((-3, 0), True, 20, NEARER + "\n"),
    ((1, 8), True, 1000, NEARER + "\n"),
    ((1, 0), True, 1000, f"PSNR inf dB, SSIM 1.000. {NO_NEARER}{KNOWS_NOT}"),
    ((1, 0), False, 1000, f"PSNR inf dB, SSIM 1.000. {NO_NEARER}\n"),
], ids=["knows", "untrained", "forgotten", "more alike in structure", "still", "still, untrained"])  # fmt: skip
def test_what_the_memory_knows_is_said_where_all_speaks_for_it(faces, own, model, others, trained, tokens, said):
    """others: what makes other frames out of the one that is asked for, factor and summand."""
    video = start_latent(1, 1, 3)["samples"].repeat(1, 1, 13, 1, 1)
    video[:, :, 1:] = others[0] * video[:, :, 1:] + others[1]
    memory = own.with_tokens(filled(own.new_memory(model, "2x2x1", **SMALL)), tokens)
    memory = replace(memory, trained=trained)
    report = ask(faces, own, model, 0.0, samples={"samples": video}, memory=memory, attached=memory)[3]
    assert said in report and ("holds no token of latent frame 0" in report) is (tokens == 20)


@pytest.mark.parametrize(("mark", "heading"), [
    ({"source": "1.mp4", "project": "a"}, "1.mp4:"), ({"project": "a"}, "a:"), ({"fps": 30.0}, "Frame at"),
])  # fmt: skip
def test_the_report_begins_with_the_video_that_it_is_of(faces, own, model, mark, heading):
    video = {"samples": start_latent(1, 13, 3)["samples"], "frame_memory": mark}
    assert ask(faces, own, model, samples=video)[3].startswith(heading)


def test_one_frame_has_no_other_to_compare_with(faces, own, model):
    memory = own.with_tokens(filled(own.new_memory(model, "2x2x1", **SMALL)), 1000)
    assert "has no other frame" in ask(faces, own, model, 0.0, frames=1, memory=memory, attached=memory)[3]


def test_a_memory_of_stage_two_is_told_from_one_that_answers_questions(faces, own, model):
    memory = own.with_tokens(filled(own.new_memory(model, "2x2x2", **SMALL)), 1000)
    told = ask(faces, own, model, memory=replace(memory, schedule="f1k1_x_g9"), attached=memory)[3]
    assert "Warning: this memory is of training's stage 2" in told
    assert "stage 2" not in ask(faces, own, model, memory=memory, attached=memory)[3]


def test_frames_that_are_not_remembered_are_warned_of(faces, own, model):
    assert "holds no token of latent frame 12: its block is not full yet" in ask(faces, own, model, 1.6)[3]
    assert "no token of latent frame 0: the budget of tokens has let it go" in ask(faces, own, model, 0.0, tokens=8)[3]


@pytest.mark.parametrize(("change", "said"), [
    ({"seconds": 1.62}, r"the video ends at 1.60 s. Nearest valid: 1.60"),
    ({"frames": 1, "seconds": 0.0}, "no block is full"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_words(faces, own, model, change, said):
    with pytest.raises(ValueError, match=said):
        ask(faces, own, model, **change)


def test_a_memory_that_skipped_its_node_is_refused(faces, own, model):
    with pytest.raises(ValueError, match="'memory' of 'Retrieve Frame' comes straight.*'Frame Preservation Encoder'"):
        ask(faces, own, model, memory=own.new_memory(model, "2x2x2", **SMALL))
