"""Cancel, bad input and odd prompts over HTTP, as the editor would send them; the server works on after each."""

import copy
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scripts.client import PromptError
from scripts.workflow import set_inputs

from .tiny import FILES, REPO, during, one, progress_texts, shrink

LOADER, SAMPLER, PACKER = "FrameMemoryLoadFramePack", "FrameMemoryAntiDriftSampler", "FrameMemoryContextPacker"
SELFTEST = REPO / "workflows" / "selftest.json"
TIMELINE = REPO / "workflows" / "framepack_f1_timeline.json"


@pytest.fixture(scope="module")
def smallest(api):
    """The self-test graph with one section of one step."""
    return shrink(api(SELFTEST), seconds=1.2, steps=1)


@pytest.fixture
def works_afterwards(server, smallest):
    """After the test the server still makes a video."""
    yield
    seed = set_inputs(smallest, "RandomNoise", {"noise_seed": time.time_ns() % 2**32})
    assert server.client.queue(seed, timeout=600).outputs


def refused(server, prompt) -> str:
    with pytest.raises(PromptError) as error:
        server.client.queue(prompt, timeout=600)
    return str(error.value)


def test_fault_05_cancel_acts_within_one_model_call(server, smallest, works_afterwards):
    prompt = set_inputs(smallest, SAMPLER, {"seconds": 60.0})
    prompt = set_inputs(prompt, "FrameMemorySigmas", {"steps": 40})
    sampler = one(prompt, SAMPLER)[0]
    client = server.client
    prompt_id = client.submit(prompt)

    def steps():
        return [d["value"] for n, d in client.about(prompt_id) if n == "progress" and d["node"] == sampler]

    end = time.monotonic() + 600
    while len(steps()) < 3 and time.monotonic() < end:
        time.sleep(0.005)
    client.interrupt()
    reached = len(steps())
    with pytest.raises(PromptError, match="Cancelled in FrameMemoryAntiDriftSampler"):
        client.wait(prompt_id, timeout=600)
    assert reached >= 3 and len(steps()) <= reached + 1
    assert len(steps()) < 50 * 40


def test_an_end_picture_with_f1_is_refused_before_sampling(server, smallest, works_afterwards):
    prompt = copy.deepcopy(smallest)
    image_id, image = one(prompt, "FrameMemoryFramePackImage")
    image["inputs"]["end_image"] = image["inputs"]["image"]
    sampler_id, sampler = one(prompt, SAMPLER)
    sampler["inputs"]["end"] = [image_id, 3]
    before = len(server.client.messages)
    text = refused(server, prompt)
    assert "FrameMemoryAntiDriftSampler" in text and "end" in text
    assert "F1 cannot aim at an end picture" in text and "'FramePack Image'" in text, "the node to change"
    steps = [d for n, d in server.client.messages[before:] if n == "progress" and d["node"] == sampler_id]
    assert not steps


def test_fault_35_a_checkpoint_without_context_weights_is_refused(server, smallest, works_afterwards):
    """A plain HunyuanVideo file has everything but the packed context."""
    with safe_open(REPO / "selftest_models" / "diffusion_models" / FILES["F1"], framework="pt") as file:
        plain = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    plain = {k: v for k, v in plain.items() if not k.startswith(("clean_x_embedder", "image_projection"))}
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain, folder / "plain_hunyuan_F1.safetensors")
    text = refused(server, set_inputs(smallest, LOADER, {"model_name": "plain_hunyuan_F1.safetensors"}))
    assert text.startswith("FrameMemoryLoadFramePack") and "no packed-context weights" in text


def test_the_wrong_kind_is_refused(server, smallest, works_afterwards):
    text = refused(server, set_inputs(smallest, PACKER, {"preset": "F0 inverted"}))
    assert "F1" in text and "Frame Context Packer" in text


def test_a_schedule_that_does_not_parse_names_the_place(server, smallest, works_afterwards):
    bad = {"preset": "free schedule", "schedule": "td_f16k4f2k3f1k1_g9"}
    text = refused(server, set_inputs(smallest, PACKER, bad))
    assert text.startswith("FrameMemoryContextPacker") and "character 12" in text and "^" in text


def test_fault_23_a_size_off_the_grid_shows_the_nearest_pair(server, smallest, works_afterwards):
    """The editor's widgets keep to the grid, the API does not."""
    text = refused(server, set_inputs(smallest, PACKER, {"width": 100, "height": 72}))
    assert text.startswith("FrameMemoryContextPacker") and "100x72" in text
    assert "Nearest valid: 96x80" in text and "Frame Context Packer" in text


def test_zero_seconds_and_unknown_files_are_refused_by_validation(server, smallest):
    text = refused(server, set_inputs(smallest, SAMPLER, {"seconds": 0.0}))
    assert "FrameMemoryAntiDriftSampler" in text and "seconds" in text
    text = refused(server, set_inputs(smallest, LOADER, {"model_name": "nothing.safetensors"}))
    assert "FrameMemoryLoadFramePack" in text and "model_name" in text


def test_fault_29_times_past_the_end_are_refused_before_sampling(server, api, works_afterwards):
    prompt = shrink(api(TIMELINE), seconds=2.4, steps=1)
    prompt = set_inputs(prompt, "FrameMemoryPromptTimeline", {"text": "0-1.2: a red circle\n6-9: a green square"})
    text = refused(server, prompt)
    assert "6 s" in text and "past the end" in text and "Prompt Timeline" in text


@pytest.mark.parametrize(
    "text",
    ["", "   \n", "红色的圆 向右移动", "كرة حمراء تتحرك", " ".join(f"word{i}" for i in range(400))],
    ids=["empty", "blank", "chinese", "arabic", "long"],
)
def test_fault_30_prompts_of_any_script_and_length_run(server, smallest, api, text):
    notices = server.log().count("the first 20 are used")
    run = server.client.queue(set_inputs(smallest, "CLIPTextEncode", {"text": text}), timeout=600)
    assert run.outputs
    said = server.log().count("the first 20 are used") > notices
    assert said == (len(text.split()) > 20), "a cut prompt is said to be cut"


def test_fault_30_a_timeline_takes_them_too(server, api):
    prompt = shrink(api(TIMELINE), seconds=2.4, steps=1)
    text = "0-1.2:\n1.2-: 红色的圆 " + " ".join(f"word{i}" for i in range(400))
    run = server.client.queue(set_inputs(prompt, "FrameMemoryPromptTimeline", {"text": text}), timeout=600)
    shown = [t for _, _, t in progress_texts(during(run.messages, run.prompt_id))]
    assert run.outputs and any("73 frames" in t for t in shown)


def test_fault_28_an_empty_batch_names_its_socket():
    import comfy.sd
    import comfy.utils

    from frame_memory.video.images import ImageError
    from frame_memory.video.start_image import prepare

    file = REPO / "selftest_models" / "vae" / "frame_memory_selftest_vae.safetensors"
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    picture, empty = torch.zeros(1, 64, 64, 3), torch.zeros(0, 64, 64, 3)
    with torch.inference_mode():
        with pytest.raises(ImageError, match="'image' got an empty batch"):
            prepare(vae, None, empty, None, 64, "white")
        with pytest.raises(ImageError, match="'end_image' got an empty batch"):
            prepare(vae, None, picture, empty, 64, "white")
