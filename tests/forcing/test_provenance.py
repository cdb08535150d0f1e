"""Files name the LoRAs that they were trained with, and a run whose MODEL does not carry one says so."""

from __future__ import annotations

import sys
from pathlib import Path

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from memory.small import Pixels
from model import wan_reference as reference

from frame_memory.forcing.context_run import ContextRequest, ContextRun
from frame_memory.forcing.preserving_run import STAGE_FOLLOW, STAGE_QUERY, PreservingRequest, PreservingRun
from frame_memory.forcing.results import Result, write_result
from frame_memory.forcing.training_run import Faces
from frame_memory.model import memory_file, tensor_file, wan_file
from frame_memory.model.preserved_memory import attach_preserved, memory_of, with_tokens
from frame_memory.model.provenance import LORAS, NamedLora, loras_of
from frame_memory.plan import parse_schedule
from frame_memory.sampling.long_video import check_model, sample_long_video
from frame_memory.sampling.retrieve import retrieve_frame

from .test_preserving_wan import QUIET, SCHEDULE, T2V, memory_for, videos
from .test_train_run import FAST

SHIPPED = Path(__file__).resolve().parents[2] / "selftest_models"
TOGETHER = "{0}.safetensors was trained together with the LoRA of the same name in models/loras, and the MODEL does not"


def text(seed: int = 6) -> list:
    return [[reference.drawn(1, 3, 24, seed=seed), {}]]


def taught(kind, model, memory, request, folder: Path, name: str) -> Result:
    run = kind(model, memory, videos(T2V), request, folder / name, QUIET)
    with torch.inference_mode():  # as core runs a node
        return write_result(run, run.run(), name, folder / "models", folder / "loras", lambda _: None)


def with_lora(model, result: Result, strength: float = 1.0):
    """By core's own loader."""
    lora = tensor_file.read(str(result.lora))
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def guider_of(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text(), text())
    return guider


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(MODEL behind trained patchifiers, their result, stage 1's, stage 2's without the LoRA of stage 1)."""
    folder, plain = tmp_path_factory.mktemp("taught"), reference.load(T2V, layers=1)
    more = {"rank": 2, "settings": FAST, "schedule": SCHEDULE}
    look = taught(ContextRun, plain, None, ContextRequest("", 1, **more), folder, "look")
    model = wan_file.with_file(plain, wan_file.read(str(look.checkpoint)))[0]
    looking, rest = with_lora(model, look), {"clips": 3, "alone": 0.0, **more}
    ask = taught(PreservingRun, looking, memory_for(looking), PreservingRequest(STAGE_QUERY, 1, **rest), folder, "ask")
    follow = taught(PreservingRun, looking, ask.memory, PreservingRequest(STAGE_FOLLOW, 1, **rest), folder, "follow")
    return model, look, ask, follow


def test_a_file_names_its_own_lora_and_those_of_what_was_given_that_lay_on_the_model(trained):
    model, look, ask, follow = trained
    for result, names in ((ask, ["look", "ask"]), (follow, ["look", "follow"])):
        read = memory_of(memory_file.read(str(result.checkpoint)), "Load Memory Encoder", model)
        assert [lora.name for lora in read.loras] == [f"{name}.safetensors" for name in names]
        assert read.loras == result.memory.loras
    assert len({lora.fingerprint for lora in (*ask.memory.loras, *follow.memory.loras)}) == 3
    assert loras_of(wan_file.read(str(look.checkpoint)).recipe) == ask.memory.loras[:1]


def test_a_memory_of_stage_two_speaks_for_the_patchifiers_that_it_was_trained_behind(trained):
    """Their own LoRA is not missed then, since that of stage 2 reads them."""
    model, _, ask, follow = trained
    schedule = parse_schedule(SCHEDULE)
    for result, count in ((follow, 0), (ask, 1)):
        read = memory_of(memory_file.read(str(result.checkpoint)), "Load Memory Encoder", model)
        assert read.patchifiers == result.memory.patchifiers
        assert len(check_model(guider_of(attach_preserved(model, read)), schedule, read)) == count


@pytest.mark.parametrize("recipe", [{}, {LORAS: 5}, {LORAS: "x"}, {LORAS: [{"name": "x"}]}])
def test_files_that_say_nothing_of_it_or_not_in_our_words_are_told_nothing(recipe):
    assert loras_of(recipe) == ()


def test_patchifiers_without_their_lora_are_warned_of(trained):
    model, look, _, _ = trained
    schedule, said = parse_schedule(SCHEDULE), TOGETHER.format("look")
    assert check_model(guider_of(with_lora(model, look)), schedule) == []
    beside = comfy.sd.load_bypass_lora_for_models(model, None, tensor_file.read(str(look.lora)), 1.0, 0.0)[0]
    assert check_model(guider_of(beside), schedule) == [], "core's loader that leaves the weights alone"
    for without in (model, with_lora(model, look, 0.0)):
        (warning,) = check_model(guider_of(without), schedule)
        assert warning.startswith(said) and "or at strength 0, which is off" in warning
        assert "'Load Video LoRA' with that file behind the MODEL's loader and set its strength to 1" in warning


def test_training_on_patchifiers_without_their_lora_is_warned_of(trained, tmp_path):
    model, look, ask, _ = trained
    request = PreservingRequest(STAGE_FOLLOW, 1, clips=3, schedule=SCHEDULE, settings=FAST)
    for on, count in ((model, 1), (with_lora(model, look), 0)):
        said: list[str] = []
        PreservingRun(on, ask.memory, videos(T2V), request, tmp_path, Faces(said.append))
        assert len(said) == count and all(text.startswith(f"Warning: {TOGETHER.format('look')}") for text in said)


def test_training_on_with_a_memory_without_its_lora_is_warned_of_but_in_stage_two(trained, tmp_path):
    model, look, ask, _ = trained
    looking = with_lora(model, look)
    for stage, on, count in ((STAGE_QUERY, looking, 1), (STAGE_QUERY, with_lora(looking, ask), 0),
                             (STAGE_FOLLOW, looking, 0)):  # fmt: skip
        said: list[str] = []
        request = PreservingRequest(stage, 1, clips=3, schedule=SCHEDULE, settings=FAST)
        PreservingRun(on, ask.memory, videos(T2V), request, tmp_path / stage[0], Faces(said.append))
        assert [TOGETHER.format("ask") in text for text in said] == [True] * count


def reported(model, memory) -> str:
    """The report of a video of two sections."""
    return sample_long_video(
        noise=Noise_RandomNoise(0), guider=guider_of(attach_preserved(model, memory)), memory=memory,
        sampler=comfy.samplers.sampler_object("euler"), sigmas=torch.tensor([1.0, 0.0]),
        schedule=parse_schedule(SCHEDULE), start={"samples": reference.drawn(1, 16, 1, 5, 6, seed=2)}, seconds=2.0,
        say=lambda _: None,
    ).report  # fmt: skip


def asked(model, memory) -> str:
    """The report of one frame."""
    video = {"samples": reference.drawn(1, 16, 9, 6, 10, seed=3)}
    settings = {"positive": text(), "latent": video, "vae": Pixels("Wan21"), "seconds": 0.5, "steps": 1, "seed": 1}
    return retrieve_frame(model=attach_preserved(model, memory), memory=memory, **settings).report


def test_a_video_and_a_retrieved_frame_say_which_lora_of_the_memory_is_missing(trained):
    model, look, ask, follow = trained
    looking = with_lora(model, look)
    first, second = (with_tokens(result.memory, 1000) for result in (ask, follow))
    with torch.inference_mode():
        on_stage_one = reported(with_lora(looking, ask), second)
        whole = reported(with_lora(looking, follow), second)
        frames = [asked(on, first) for on in (looking, with_lora(looking, ask), model)]
    assert TOGETHER.format("follow") in on_stage_one and "LoRA look" not in on_stage_one
    assert "was trained together" not in whole
    assert f"Warning: {TOGETHER.format('ask')}" in frames[0] and "was trained together" not in frames[1]
    assert "with the LoRA look.safetensors and the LoRA of the same name" in frames[2]
    assert "not carry them" in frames[2] and "'Load Video LoRA' with each of them behind" in frames[2]


def test_what_ships_names_its_lora():
    name = "frame_memory_selftest_wan_context"
    base = SHIPPED / "diffusion_models" / "frame_memory_selftest_wan_i2v.safetensors"
    model = comfy.sd.load_diffusion_model(str(base))
    held = wan_file.read(str(SHIPPED / "frame_memory" / f"{name}.safetensors"))
    lora = tensor_file.read(str(SHIPPED / "loras" / f"{name}.safetensors"))
    assert loras_of(held.recipe) == (NamedLora.of(f"{name}.safetensors", lora),)
    made, schedule = wan_file.with_file(model, held)[0], parse_schedule(held.schedule)
    assert TOGETHER.format(name) in "".join(check_model(guider_of(made), schedule))
    carries = comfy.sd.load_lora_for_models(made, None, lora, 1.0, 0.0)[0]
    assert "was trained together" not in "".join(check_model(guider_of(carries), schedule))
