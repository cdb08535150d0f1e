"""No node changes what it is given: inputs are hashed before and after each node's execute (style rule 20)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from diffusers import HeliosTransformer3DModel
from safetensors.torch import save_file

from frame_memory.model import checkpoint, memory_file
from frame_memory.model.base_signature import Base
from frame_memory.model.host_needs import FAMILIES
from frame_memory.model.selftest import SelfTestText, SelfTestVision
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise
from frame_memory.plan import PRESETS, parse_schedule, parse_timeline
from frame_memory.sampling.prompts import EncodedTimeline
from frame_memory.sampling.unipc import framepack_unipc

from .source import REPO

sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from first_frame import clip_folders
from video.reference import shipped_vae

SELFTEST = REPO / "selftest_models"
MODEL, VAE = "frame_memory_selftest_F1.safetensors", "frame_memory_selftest_vae.safetensors"
HELIOS = "helios.safetensors"
WAN, WAN_CONTEXT = "frame_memory_selftest_wan_i2v.safetensors", "frame_memory_selftest_wan_context.safetensors"
VIDEO = InputImpl.VideoFromFile(str(SELFTEST / "frame_memory_before.mp4"))
PACK = "frame_memory_pack_of_input_tests"
IDS = [node for family in FAMILIES.values() for node in family.nodes]


def parts_of(value):
    """What is hashed of an object that is no plain container."""
    if isinstance(value, torch.nn.Module):
        return dict(value.state_dict())
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        return [value.model, value.model_options, value.patches, value.wrappers, value.object_patches]
    if isinstance(value, comfy.samplers.CFGGuider):
        return [value.model_patcher, value.model_options, value.original_conds, value.cfg]
    if isinstance(value, comfy.sd.VAE):
        return value.first_stage_model
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") and not callable(value) else None


def add(digest, value) -> None:
    """Feed a value into the digest: every number of every tensor, names, order, and plain values."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(str(key).encode())
            add(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            add(digest, item)
    elif isinstance(value, (set, frozenset)):
        add(digest, sorted(map(str, value)))
    elif value is None or isinstance(value, (str, bytes, int, float, torch.dtype)):
        digest.update(repr(value).encode())
    else:
        add(digest, parts_of(value))


def fingerprint(value) -> str:
    digest = hashlib.sha256()
    add(digest, value)
    return digest.hexdigest()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def nodes():
    """node id -> class, imported as the host imports the pack: a package with relative imports inside."""
    spec = importlib.util.spec_from_loader(PACK, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(REPO)]
    sys.modules[PACK] = package
    try:
        modules = [importlib.import_module(f"{PACK}.nodes.{name}") for name in FAMILIES]
        yield {node.GET_SCHEMA().node_id: node for module in modules for node in module.NODES}
    finally:
        for key in [key for key in sys.modules if key == PACK or key.startswith(f"{PACK}.")]:
            del sys.modules[key]


@pytest.fixture(scope="module")
@torch.inference_mode()  # as the host makes them: weights of few bits are moved in that mode only
def graph(nodes):
    """What the nodes of a graph on the self-test models hand to each other."""
    model = checkpoint.load_framepack(str(SELFTEST / "diffusion_models" / MODEL))
    model.model_options["frame_memory"] = {"kind": "F1", "base": "selftest"}
    sd, metadata = comfy.utils.load_torch_file(str(SELFTEST / "vae" / VAE), return_metadata=True)
    text = SelfTestText()
    positive, negative = (text.encode_from_tokens_scheduled(text.tokenize(t)) for t in ("a red circle", "a hill"))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    change = importlib.import_module(f"{PACK}.frame_memory.sampling.changes").SectionChange
    timeline = parse_timeline("0-1.2: a\n1.2-: b", 1)
    socket = importlib.import_module(f"{PACK}.nodes.sockets").FrameContext(parse_schedule(PRESETS["F1 forward"]))
    encoders = importlib.import_module(f"{PACK}.frame_memory.model.memory")
    memory, _ = encoders.with_features_of(encoders.new_encoder(model), positive)
    memory.pack.gate.fill_(0.5)
    preserved = importlib.import_module(f"{PACK}.frame_memory.model.preserved_memory")
    frames = preserved.with_tokens(preserved.new_memory(model, "2x2x2"), 1000)
    return SimpleNamespace(
        wan=comfy.sd.load_diffusion_model(str(SELFTEST / "diffusion_models" / WAN)),
        memory=memory, frames=frames, model=model, vae=comfy.sd.VAE(sd=sd, metadata=metadata), guider=guider,
        positive=positive, wan_vae=shipped_vae("frame_memory_selftest_wan_vae"),
        negative=negative, context=socket, change=change, timeline=EncodedTimeline(timeline, (positive, negative)),
        latent=lambda frames, seed: {"samples": random(1, 16, frames, 8, 8, seed=seed), "noise_mask": random(1, 1)},
    )  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch, graph):
    """Model folders with the self-test model and a LoRA for it, and output folders of the test's own."""
    weight = graph.model.model.diffusion_model.double_blocks[0].img_attn.proj.weight
    lora = {"lora_A": random(2, weight.shape[1]), "lora_B": random(weight.shape[0], 2)}
    name = "diffusion_model.double_blocks.0.img_attn_proj"
    save_file({f"{name}.{k}.weight": v for k, v in lora.items()}, str(tmp_path / "a.safetensors"))
    network = graph.model.model.diffusion_model
    spec = PackSpec.of(network)
    pack = initialise(SemanticPack(spec, dtype=torch.float32, operations=torch.nn))
    head = {name: 0.9 * network.get_parameter(name).detach().float() for name in memory_file.HEAD}
    path, parts = str(tmp_path / "head.safetensors"), {"pack": pack.state_dict(), "spec": spec.to_dict(), "head": head}
    memory_file.write(path, Base.of(graph.model), **parts)
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "frame_memory", ([str(tmp_path), str(SELFTEST / "frame_memory")], {".safetensors"}))
    config = {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 64, "text_dim": 8}
    save_file(HeliosTransformer3DModel(**config).state_dict(), str(tmp_path / HELIOS))
    places = [str(SELFTEST / "diffusion_models"), str(tmp_path)]
    monkeypatch.setitem(known, "diffusion_models", (places, {".safetensors"}))
    monkeypatch.setitem(known, "loras", ([str(tmp_path)], {".safetensors"}))
    clip_folders.make(tmp_path / "input" / "clips")
    clip_folders.video(tmp_path / "input" / "videos" / "a.mp4", 40, 30)
    clip_folders.caption(tmp_path / "input" / "videos" / "a.txt")
    before = folder_paths.get_output_directory(), folder_paths.get_temp_directory(), folder_paths.get_input_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    folder_paths.set_input_directory(str(tmp_path / "input"))
    yield tmp_path
    folder_paths.set_output_directory(before[0])
    folder_paths.set_temp_directory(before[1])
    folder_paths.set_input_directory(before[2])


def inputs_of(node_id: str, g) -> dict:
    """Inputs that make a node do all that it can do."""
    return (of_memory(g) | of_wan(g) | of_all_others(g))[node_id]()


def of_memory(g) -> dict:
    """The memory's nodes: id -> what gives their inputs."""
    picture = random(1, 70, 90, 4, seed=4).abs().clamp(0, 1)
    return {
        "FrameMemoryLoadDirectForcing": lambda: {"model": g.model, "file": "head.safetensors", "strength": 0.7},
        "FrameMemoryLoadEncoder": lambda: {"encoder_name": "head.safetensors", "model": g.model},
        "FrameMemoryMemoryPack": lambda: {
            "model": g.model, "memory": g.memory, "conditioning": g.positive,
            "clip_vision_output": SelfTestVision().encode_image(picture),
        },
        "FrameMemoryFramePreservation": lambda: {"model": g.model, "memory": g.frames, "tokens": 50},
        "FrameMemoryRetrieveFrame": lambda: {
            "model": g.model, "memory": g.frames, "positive": g.positive, "samples": g.latent(5, 9), "vae": g.vae,
            "seconds": 0.2, "steps": 1, "seed": 0,
        },
        "FrameMemoryTrainDirectForcing": lambda: {
            "model": [g.model], "latents": [g.latent(19, 5)], "positive": [g.positive], "memory": [g.memory],
            "stage": ["1: memory and LoRA"], "name": ["inputs"], "steps": [1], "clips": [2], "learning_rate": [1e-3],
            "training_seed": [0], "rank": [2], "save_every": [1],
        },
        "FrameMemoryTrainPreservation": lambda: {
            "model": [g.model], "latents": [g.latent(19, 5)], "positive": [g.positive], "memory": [g.frames],
            "stage": ["2: next section"], "name": ["frames"], "steps": [1], "clips": [2], "learning_rate": [1e-3],
            "training_seed": [0], "rank": [2], "save_every": [1],
        },
    }  # fmt: skip


def of_wan(g) -> dict:
    return {
        "FrameMemoryLoadMemoryModel": lambda: {"model_name": HELIOS},
        "FrameMemoryWanFrameContext": lambda: {"model": g.wan, "file": WAN_CONTEXT},
        "FrameMemoryWanExpertGuider": lambda: {
            "high": g.wan, "low": g.wan.clone(), "positive": g.positive, "negative": g.negative, "cfg_high": 3.5,
            "cfg_low": 1.0, "boundary": 0.9,
        },
        "FrameMemoryTrainWanContext": lambda: {
            "model": [g.wan], "latents": [g.latent(19, 5)], "positive": [g.positive], "frame_context": [g.context],
            "stage": ["Wan: frame context"], "name": ["wan"], "steps": [1], "learning_rate": [1e-3],
            "training_seed": [0], "rank": [2], "save_every": [1],
        },
    }


def of_all_others(g) -> dict:
    picture = random(1, 70, 90, 4, seed=4).abs().clamp(0, 1)
    return {
        "FrameMemoryLoadFramePack": lambda: {"model_name": MODEL, "kind": "from the file", "save_converted": True},
        "FrameMemoryLoraLoader": lambda: {"model": g.model, "lora_name": "a.safetensors", "strength": 0.7},
        "FrameMemoryContextPacker": lambda: {"preset": "F1 forward"},
        "FrameMemoryPromptTimeline": lambda: {
            "clip": SelfTestText(), "text": "0-1.2: a\n1.2-: b", "blend_sections": 1,
        },
        "FrameMemoryFramePackImage": lambda: {
            "positive": g.positive, "negative": g.negative, "vae": g.vae, "clip_vision": SelfTestVision(), "size": 64,
            "image": picture, "end_image": picture.flip(1), "mask": picture[..., 0], "end_mask": picture[..., 1],
        },
        "FrameMemorySigmas": lambda: {"latent": g.latent(1, 0), "steps": 4, "frame_context": g.context},
        "FrameMemoryUniPC": dict,
        "FrameMemoryAttentionBackend": lambda: {"model": g.model, "backend": "PyTorch"},
        "FrameMemoryStepCache": lambda: {"model": g.model, "drift": 0.1, "measure": True},
        "FrameMemoryAntiDriftSampler": lambda: {
            "noise": Noise_RandomNoise(3), "guider": g.guider, "sampler": framepack_unipc(),
            "sigmas": torch.tensor([1.0, 0.6, 0.0]), "frame_context": g.context, "start": g.latent(1, 1),
            "seconds": 1.2, "history": g.latent(5, 2), "initial": g.latent(14, 3), "timeline": g.timeline,
            "vae": g.vae, "changes": (g.change(1, 5, g.positive),), "memory": g.memory,
        },
        "FrameMemoryPickSection": lambda: {
            "section": 2, "seed": 5, "positive": g.positive, "changes": (g.change(1, None, g.negative),),
        },
        "FrameMemoryVideoHistory": lambda: {
            "video": VIDEO, "vae": g.vae, "seconds": 0.5, "size": 64, "bridge_to": VIDEO,
        },
        "FrameMemoryJoinVideos": lambda: {
            "video": VIDEO, "made": VIDEO, "filename_prefix": "a", "overlap": 5, "then": VIDEO,
        },
        "FrameMemorySaveLongVideo": lambda: {
            "samples": g.latent(10, 5), "vae": g.vae, "fps": 30.0, "filename_prefix": "a",
        },
        "FrameMemoryFirstFrameComposer": lambda: {
            "width": 128, "height": 96, "layout": "free boxes", "boxes": "2: 3, 4, 50 x 60",
            "references": {"reference_1": picture, "reference_2": picture[..., :3]},
            "masks": {"mask_2": picture[..., 0].flip(2).round()}, "background": picture.flip(2), "enlarge_small": True,
        },
        "FrameMemoryFFGoPrompt": lambda: {"caption": "A cat.", "names": "cat, dog", "references": 2},
        "FrameMemoryDropTransitionFrames": lambda: {"video": VIDEO, "drop": "find the cut"},
        "FrameMemoryFFGoDataset": lambda: {
            "folder": "clips", "clip": SelfTestText(), "vae": g.wan_vae, "width": 96, "height": 64, "length": 9,
        },
        "FrameMemoryVideoClips": lambda: {
            "folder": "videos", "clip": SelfTestText(), "vae": g.vae, "size": 64, "clip_vision": SelfTestVision(),
        },
        "FrameMemoryDriftMeter": lambda: {
            "samples": {**g.latent(10, 6), "frame_memory": {"base": "selftest", "given": 1, "order": "inverted"}},
            "vae": g.vae, "clip_vision": SelfTestVision(), "mask": random(1, 8, 8, seed=7).abs().clamp(0, 1),
        },
        "FrameMemoryRecall": lambda: {
            "images": random(20, 40, 50, 3, seed=8).abs().clamp(0, 1), "first_start": 0.0, "first_stop": 0.2,
            "return_start": 0.4, "return_stop": 0.6, "clip_vision": SelfTestVision(),
            "first_mask": torch.ones(1, 40, 50), "return_box": "3,4,20,20",
        },
        "FrameMemoryExpertRange": lambda: {"model": g.model, "expert": "low noise", "boundary": 0.9},
        "FrameMemorySelfTestEncoders": dict,
    }  # fmt: skip


@pytest.mark.parametrize("node_id", IDS)
def test_inputs_are_the_same_before_and_after(nodes, graph, folders, node_id):
    given = inputs_of(node_id, graph)
    files = sorted(p for p in (*SELFTEST.rglob("*.safetensors"), *folders.glob("*.safetensors")))
    before = fingerprint(given), [p.read_bytes() for p in files]
    with torch.inference_mode():
        output = nodes[node_id].execute(**given)
    assert output.result is not None
    assert fingerprint(given) == before[0]
    assert [p.read_bytes() for p in files] == before[1]


def test_dropping_frames_gives_copies_and_no_sound_of_no_samples(nodes, tmp_path):
    """IMAGE and VIDEO: no view of the input; sound that ends before the cut is left out, and the file can be saved."""
    images = random(9, 32, 32, 3, seed=1).abs().clamp(0, 1)
    sound = {"waveform": random(1, 2, 1000, seed=3), "sample_rate": 16000}
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images, Fraction(16), sound))
    before = fingerprint([images, sound])
    for given in (images, video):
        kept, made, report = nodes["FrameMemoryDropTransitionFrames"].execute(given, "4 (official)").result
        assert torch.equal(kept, images[4:])
        kept.zero_()
        assert fingerprint([images, sound]) == before
    assert made.get_components().audio is None and "The sound ended before the first frame that is left" in report
    made.save_to(str(tmp_path / "silent.mp4"))
    assert len(InputImpl.VideoFromFile(str(tmp_path / "silent.mp4")).get_components().images) == 5


def test_dropping_frames_of_a_file_keeps_its_alpha_and_its_metadata(nodes, tmp_path):
    """Core hands neither on from a VIDEO of images today; what the node gives it is complete."""
    with av.open(str(tmp_path / "clear.mov"), "w", options={"movflags": "use_metadata_tags"}) as file:
        file.metadata["prompt"] = "a"
        stream = file.add_stream("png", rate=16)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        for i in range(9):
            pixels = np.full((16, 16, 4), 20 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        file.mux(stream.encode(None))
    video = InputImpl.VideoFromFile(str(tmp_path / "clear.mov"))
    parts = video.get_components()
    assert parts.alpha is not None and parts.metadata["prompt"] == "a"
    _, made, _ = nodes["FrameMemoryDropTransitionFrames"].execute(video, "4 (official)").result
    left = vars(made)["_VideoFromComponents__components"]
    assert torch.equal(left.alpha, parts.alpha[4:]) and left.metadata == parts.metadata


@torch.inference_mode()
def test_the_fingerprint_sees_a_change_anywhere(graph):
    """Of one number in a tensor, a weight, a conditioning or an option, however deep."""
    given = inputs_of("FrameMemoryAntiDriftSampler", graph)
    was = fingerprint(given)
    assert fingerprint(given) == was
    changes = [given["start"]["samples"], given["sigmas"], graph.positive[0][0], given["history"]["noise_mask"]]
    changes.append(graph.model.model.diffusion_model.clean_x_embedder.proj.weight.data)
    for tensor in changes:
        flat = tensor.reshape(-1)
        kept = flat[-1].clone()
        flat[-1] += 1
        assert fingerprint(given) != was
        flat[-1] = kept
    options = given["guider"].model_options["transformer_options"]
    options["deep"] = {"er": 1}
    assert fingerprint(given) != was
    del options["deep"]
    assert fingerprint(given) == was
