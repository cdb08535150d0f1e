"""Helios, which packs its history on Wan's blocks: public weights read onto core's own WanModel.

    blocks([noisy window | 4x | 2x | first frame, 1x]) -> head(window)

Source: arXiv 2603.04379; diffusers 0.39, `transformer_helios.py`, whose names the files have. Its blocks are Wan's, one
for one, under diffusers' names. `wan.py` does what else it does: patchifiers of its own at 1x, 2x and 4x for the
history, mean phases for coarse tokens, timestep 0 for the history. One thing is left: the history does not read the
text, so that the cross-attention of each block becomes a subclass of core's that sees the window alone.

What the flags of its configuration switch is diffusers' default here; a configuration that says otherwise is refused
(`EXPECTED`), and so are amplified keys of the history: core's attention scales no part of its keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import comfy.ldm.wan.model
import torch
import torch.nn.functional as F
from comfy.model_detection import count_blocks
from torch import Tensor

from ..plan import PRESETS
from . import checkpoint, wan
from .checkpoint import CheckpointError
from .families import CLIPS, FPS_SAID, LOADER, PATCHIFIERS, SCHEDULE
from .key_map import BOTH, WEIGHT, KeyMapError, compare
from .provenance import MODEL_OPTION
from .sources import LOAD_MEMORY_MODEL, choose
from .tensor_file import StoredTensor

CHOOSE = choose(LOAD_MEMORY_MODEL)
# What the artist has to know, since no file says it.
RULES = (
    "packing: the preset 'Helios' of 'Frame Context Packer'; text encoder umt5_xxl and VAE of Wan 2.1; start: "
    "'still_clip' on in 'FramePack Image', or an empty latent for text to video; 24 fps, each section decoded alone"
)
# Of its videos: other models on Wan 2.1's latents make 16 pictures a second, and their sections are one running video.
NOTES = {
    FPS_SAID: 24.0, CLIPS: True, PATCHIFIERS: "Helios", SCHEDULE: PRESETS["Helios"], LOADER: LOAD_MEMORY_MODEL,
}  # fmt: skip
# The largest patchifier, which no other family has under this name.
SIGNATURE = "patch_long.weight"
AMPLIFIED = "history_key_scale"
# Left over from Wan's image-to-video network; diffusers passes over it in files too.
UNUSED = ".norm_added_q."
# Of the configuration beside the files: what core's Wan and `wan.py` compute.
EXPECTED = {
    "patch_size": [1, 2, 2], "attention_head_dim": 128, "freq_dim": 256, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "added_kv_proj_dim": None, "rope_dim": [44, 42, 42],
    "rope_theta": 10000.0, "guidance_cross_attn": True, "zero_history_timestep": True,
    "has_multi_term_memory_patch": True, "is_amplify_history": False,
}  # fmt: skip
# In the model index beside the folder of the network: of checkpoints that are sampled at growing sizes.
PYRAMID = "HeliosPyramidPipeline"

_PATCHIFIERS = {"proj": "patch_short", "proj_2x": "patch_mid", "proj_4x": "patch_long"}
_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_MLP = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}


class WindowCrossAttention(comfy.ldm.wan.model.WanT2VCrossAttention):
    """Core's cross-attention for the window's tokens; those behind it pass by unchanged."""

    def forward(self, x, context, transformer_options=None, **kwargs):
        """What tokens `[B, N, D]` read of the text `[B, L, D]`: zeros for those behind the window."""
        options = transformer_options or {}
        behind = options.get(wan.BEHIND, 0)
        window_BND = x[:, : x.shape[1] - behind]
        read_BND = super().forward(window_BND, context, transformer_options=options, **kwargs)
        return F.pad(read_BND, (0, 0, 0, behind))


def names(blocks: int) -> dict[str, str]:
    """Core's key of every tensor to diffusers' key, of a network with that many blocks, patchifiers left out."""
    modules = dict(_MODULES)
    norms = {}
    tables = {"head.modulation": "norm_out.scale_shift_table"}
    for block in (f"blocks.{index}." for index in range(blocks)):
        tables[f"{block}modulation"] = f"{block}scale_shift_table"
        modules[f"{block}norm3"] = f"{block}norm2"
        modules.update({block + ours: block + theirs for ours, theirs in _MLP.items()})
        for ours, theirs in _ATTENTION.items():
            modules.update({f"{block}{ours}.{q}": f"{block}{theirs}.{to_q}" for q, to_q in _PROJECTIONS.items()})
            norms.update({f"{block}{ours}.norm_{q}": f"{block}{theirs}.norm_{q}" for q in "qk"})
    return {**tables, **_with(BOTH, modules), **_with(WEIGHT, norms)}


def is_helios(keys) -> bool:
    """Whether keys without prefix are diffusers' Helios names."""
    return SIGNATURE in keys and any(key.startswith("condition_embedder.") for key in keys)


def open_state_dict(paths: str | Sequence[str]) -> tuple[tuple[str, ...], dict[str, StoredTensor], dict[str, str]]:
    """Files, tensors (on disk) and metadata of a checkpoint: core's Wan names, and `_PATCHIFIERS`' under their own.

    Raises FileError, CheckpointError or KeyMapError (all ValueError) for files that are damaged, of another family, or
    not complete.
    """
    files, stored, metadata, _ = checkpoint.read_stored(paths, LOAD_MEMORY_MODEL)
    _refuse_other(files[0], stored)
    table = {**names(count_blocks(stored, "blocks.{}.")), **_with(BOTH, _PATCHIFIERS)}
    try:
        compare(set(table.values()), {key for key in stored if UNUSED not in key}, "Helios")
    except KeyMapError as error:
        raise KeyMapError(f"{files[0]}: {error} {CHOOSE}", error.missing, error.unexpected) from None
    native = {ours: stored[theirs] for ours, theirs in table.items()}
    # Core does not read the width of the text's features from the tensors.
    config = {"transformer": {"text_dim": native["text_embedding.0.weight"].shape[-1]}}
    return files, native, {**metadata, "config": json.dumps(config)}


def inspect(paths: str | Sequence[str]) -> checkpoint.CheckpointInfo:
    """What the headers tell; raises the same errors as loading does for bad, missing and foreign files."""
    files, stored, _ = open_state_dict(paths)
    return checkpoint.CheckpointInfo(
        kind=None, kind_from="", layout="diffusers", quantised=0, **checkpoint.measured(files, stored)
    )


def load_helios(paths, model_options=None, disable_dynamic=False):
    """A MODEL of core's Wan class that accepts history, from a Helios checkpoint.

    model_options: core's own (`dtype`, `custom_operations`, ...). Raises FileError, CheckpointError or KeyMapError.
    """
    model_options = dict(model_options or {})
    files, stored, metadata = open_state_dict(paths)
    own = {name: stored.pop(name) for name in _with(BOTH, _PATCHIFIERS)}
    checkpoint.check_shapes(files[0], stored, comfy.ldm.wan.model.WanModel, metadata, LOAD_MEMORY_MODEL)
    model = checkpoint.load_stored(files, stored, metadata, model_options, disable_dynamic)
    if model is None:
        raise CheckpointError(f"ComfyUI did not recognise {paths} as a Wan network. {CHOOSE}")
    network = wan.check(model)
    # The network is this loader's own, and nobody else has seen it yet.
    for block in network.blocks:
        block.cross_attn.__class__ = WindowCrossAttention
    attached = wan.attach(model, wan.patcher_of(_patchifiers(files[0], network, own)))
    attached.model_options = {**attached.model_options, MODEL_OPTION: dict(NOTES)}
    attached.cached_patcher_init = (load_helios, (paths, model_options))
    return attached


@torch.no_grad()
def _patchifiers(path: str, network, stored: Mapping[str, Tensor]) -> wan.Patchifiers:
    made = wan.Patchifiers(network.out_dim, network.dim)
    for name, value in made.state_dict().items():
        if stored[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: {_PATCHIFIERS[name.partition('.')[0]]} is {list(stored[name].shape)}, expected "
                f"{list(value.shape)} as in the rest of the network. {CHOOSE}"
            )
        value.copy_(stored[name])
    return made


def _with(params: Sequence[str], modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{param}": f"{theirs}.{param}" for ours, theirs in modules.items() for param in params}


def _refuse_other(path: str, stored: Mapping[str, Tensor]) -> None:
    if not is_helios(stored):
        raise CheckpointError(
            f"{path}: this is no Helios checkpoint in diffusers' names ({SIGNATURE} beside a condition_embedder is not "
            f"in it). {checkpoint.looks_like(stored)} {CHOOSE}"
        )
    if any(key.endswith(AMPLIFIED) for key in stored):
        raise CheckpointError(
            f"{path}: this Helios amplifies the history's keys ({AMPLIFIED}), which core's Wan blocks cannot do. "
            f"Expected one without, as diffusers makes it. {CHOOSE}"
        )
    folder = os.path.dirname(path)
    _check_config(os.path.join(folder, "config.json"))
    for index in (os.path.join(place, "model_index.json") for place in (folder, os.path.dirname(folder))):
        if _read_json(index).get("_class_name") == PYRAMID:
            raise CheckpointError(
                f"{path}: this is Helios-Mid or Helios-Distilled ({index} says {PYRAMID}), which begin at a quarter of "
                f"the size; no sampler here does that. Expected Helios-Base. {CHOOSE}"
            )


def _read_json(path: str) -> dict:
    """diffusers' own file where one lies there; empty where it does not."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_config(path: str) -> None:
    """The flags are not in the tensors: they count where diffusers' own file lies beside them."""
    config = _read_json(path)
    if config.get("_class_name") != "HeliosTransformer3DModel":
        return
    wrong = [f"{k} {config[k]!r}, expected {v!r}" for k, v in EXPECTED.items() if config.get(k, v) != v]
    if wrong:
        raise CheckpointError(f"{path} says {'; '.join(wrong)}: core's Wan blocks cannot do that. {CHOOSE}")
