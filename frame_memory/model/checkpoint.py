"""FramePack checkpoints: find the files, say what they are, stream them into core's layout, load and save.

Reads diffusers' three-shard folder (by folder, index or any shard), single files in bf16, fp16, fp32 or plain fp8,
core's scaled fp8, and native-layout files; safetensors only. Source: reference/framepack.md section 2.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import comfy.memory_management
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from . import framepack, quantised, tensor_file
from .key_map import (
    CONTEXT_SIGNATURE,
    QUANT_MARKER,
    KeyMapError,
    Row,
    check_keys,
    find_prefix,
    is_diffusers,
    is_native,
    is_quant_key,
    layer_of,
    swap_halves,
)
from .sources import LOAD_MEMORY_MODEL, LOAD_MODEL, LOAD_WAN, choose
from .tensor_file import FileError, StoredTensor, real
from .transformer import FramePackTransformer

FORMAT = "framepack-native-1"
KIND_KEY, FORMAT_KEY, SOURCE_KEY = "frame_memory.kind", "frame_memory.format", "frame_memory.source"
KINDS = ("F0", "F1")
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ext>\.safetensors)$")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PACKED = (torch.uint8, torch.int8)
CHOOSE = choose(LOAD_MODEL)
SHARDS_SHOWN = 4


class CheckpointError(ValueError):
    """Files that are no FramePack checkpoint, or not all of one. The message says what they are instead."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known from the headers alone.

    kind: "F0", "F1" or None where neither the metadata nor the name says; kind_from: "metadata", "name" or "".
    layout: "diffusers" or "native". dtypes: dtype name and count of numbers, most first. quantised: layers with scales.
    shards: full paths of all files. bytes: of all files together.
    """

    kind: str | None
    kind_from: str
    layout: str
    dtypes: tuple[tuple[str, int], ...]
    quantised: int
    shards: tuple[str, ...]
    tensors: int
    bytes: int

    def report(self) -> list[str]:
        """Layout, size and number formats as an artist reads them, a line each."""
        size = f"{self.tensors} tensors in {len(self.shards)} file(s), {self.bytes / 2**30:.2f} GiB"
        numbers = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.dtypes)
        return [f"{self.layout} layout, {size}", f"in the file: {numbers}"]


def kind_from_name(name: str) -> str | None:
    """F0 or F1 as the file's name tells it, else its folders' names (nearest first), else None.

    name: path inside the model folder. Of an absolute path only the file's own name is judged: where ComfyUI lies
    says nothing about a file. A folder that is called FramePack and no more names the family, not the kind.
    The files of both kinds have the same keys and shapes (reference/framepack.md section 1).
    """
    parts = [p for p in re.split(r"[\\/]", name) if p]
    if re.match(r"[\\/]|[A-Za-z]:", name):
        parts = parts[-1:]
    for place, part in enumerate(reversed(parts)):
        if re.search(r"(?<![a-z0-9])f1(?![a-z0-9])|frame[-_ ]?packf1", part.lower()):
            return "F1"
        family_only = place > 0 and re.fullmatch(r"frame[-_ ]?pack", part.lower())
        if re.search(r"frame[-_ ]?pack|(?<![a-z0-9])f0(?![a-z0-9])", part.lower()) and not family_only:
            return "F0"
    return None


def find_files(paths: str | Sequence[str], node: str = LOAD_MODEL) -> tuple[str, ...]:
    """All files of the checkpoint that `paths` names: a file, any shard, a shard index, a folder, or a list.

    node: display name of the loader. Raises CheckpointError naming the shards that are not there.
    """
    if not isinstance(paths, str):
        files: dict[str, None] = {}
        for path in paths:
            files.update(dict.fromkeys(find_files(path, node)))
        return tuple(files)
    if os.path.isdir(paths):
        return _files_of_folder(paths, node)
    folder, name = os.path.split(paths)
    if name.endswith(".safetensors.index.json"):
        return _files_of_index(paths, node)
    shard = SHARD.match(name)
    if shard is None:
        return (paths,)
    count = int(shard["count"])
    names = [f"{shard['stem']}-{i:05d}-of-{count:05d}{shard['ext']}" for i in range(1, count + 1)]
    return _all_present(folder, names, paths, node)


def _files_of_folder(folder: str, node: str) -> tuple[str, ...]:
    names = sorted(os.listdir(folder))
    for name in names:
        if name.endswith(".safetensors.index.json"):
            return _files_of_index(os.path.join(folder, name), node)
    files = [n for n in names if n.lower().endswith(tensor_file.SAFETENSORS)]
    if not files and os.path.isdir(os.path.join(folder, "transformer")):
        return _files_of_folder(os.path.join(folder, "transformer"), node)
    if files and SHARD.match(files[0]):
        return find_files(os.path.join(folder, files[0]), node)
    if len(files) == 1:
        return (os.path.join(folder, files[0]),)
    found = f"{len(files)} .safetensors files: {', '.join(files[:SHARDS_SHOWN])}" if files else "no .safetensors file"
    raise CheckpointError(f"The folder {folder} holds {found}; expected one file or the shards of one. {choose(node)}")


def _files_of_index(index: str, node: str) -> tuple[str, ...]:
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable shard index ({error}). {choose(node)}") from error
    if any(not isinstance(n, str) or os.path.basename(n) != n for n in names):
        raise CheckpointError(f"{index} names shards outside its own folder, which is not followed. {choose(node)}")
    return _all_present(os.path.dirname(index), names, index, node)


def _all_present(folder: str, names: list[str], given: str, node: str) -> tuple[str, ...]:
    missing = [n for n in names if not os.path.isfile(os.path.join(folder, n))]
    if missing:
        raise CheckpointError(
            f"{given} belongs to a checkpoint of {len(names)} files, and {len(missing)} of them are not in its "
            f"folder: {', '.join(missing)}. Put all of them side by side, then run '{node}' again."
        )
    return tuple(os.path.join(folder, n) for n in names)


def read_stored(
    paths: str | Sequence[str], node: str = LOAD_MODEL
) -> tuple[tuple[str, ...], dict[str, StoredTensor], dict[str, str], str]:
    """Files, stored tensors by name without prefix, metadata, and the prefix that was removed."""
    files = find_files(paths, node)
    entries: dict[str, tensor_file.Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        found, meta = tensor_file.read_header(path, node)
        entries.update(found)
        metadata.update(meta)
    prefix = find_prefix(entries)
    stored = {k.removeprefix(prefix): StoredTensor(e.read, e.shape, e.dtype, e.read_into) for k, e in entries.items()}
    return files, stored, metadata, prefix


def _open(paths: str | Sequence[str]) -> tuple[tuple[str, ...], dict[str, StoredTensor], dict[str, str], str]:
    """The same of a FramePack checkpoint; others are refused."""
    files, stored, metadata, prefix = read_stored(paths)
    _refuse_other_families(files[0], stored)
    return files, stored, metadata, prefix


def inspect(paths: str | Sequence[str], name: str = "") -> CheckpointInfo:
    """Read only the headers; raises the same errors as loading does for bad, missing and foreign files.

    name: the checkpoint's path inside the model folder, from which the kind is guessed; without it, the file's name.
    """
    files, stored, metadata, prefix = _open(paths)
    said = metadata.get(KIND_KEY) if metadata.get(KIND_KEY) in KINDS else None
    guess = kind_from_name(name or os.path.basename(files[0]))
    return CheckpointInfo(
        kind=said or guess,
        kind_from="metadata" if said else "name" if guess else "",
        layout="diffusers" if is_diffusers(stored) else "native",
        quantised=len(quantised.layer_settings(stored, metadata, prefix)),
        **measured(files, stored),
    )


def measured(files: tuple[str, ...], stored: Mapping[str, Tensor]) -> dict:
    """What of a CheckpointInfo is counted: number formats, files, tensors and bytes."""
    sizes: Counter = Counter()
    for key, value in stored.items():
        if not is_quant_key(key):
            sizes[tensor_file.NAMES[value.dtype]] += value.numel()
    whole = sum(os.path.getsize(f) for f in files)
    return {"dtypes": tuple(sizes.most_common()), "shards": files, "tensors": len(stored), "bytes": whole}


def open_state_dict(paths: str | Sequence[str]) -> tuple[dict[str, StoredTensor | Tensor], dict[str, str]]:
    """The checkpoint in core's layout, every tensor still on disk, and its metadata.

    Raises FileError, CheckpointError or KeyMapError (all ValueError) for files that are damaged, of another
    family, or not complete.
    """
    files, stored, metadata, prefix = _open(paths)
    diffusers = is_diffusers(stored)
    try:
        table = check_keys(stored, diffusers)
    except KeyMapError as error:
        raise KeyMapError(f"{files[0]}: {error} {CHOOSE}", error.missing, error.unexpected) from None
    settings = quantised.layer_settings(stored, metadata, prefix)
    metadata = {k: v for k, v in metadata.items() if k != quantised.METADATA_KEY}
    if not diffusers:
        out: dict[str, Tensor] = dict(stored)
        if QUANT_MARKER not in stored:  # core turns its older mark into this one by itself
            out.update({f"{layer}.comfy_quant": quantised.mark(conf) for layer, conf in settings.items()})
        return out, metadata
    native: dict[str, Tensor] = {}
    for row in table:
        packed = any(stored[f"{source}.weight"].dtype in PACKED for source in row.sources)
        if not packed:
            _check_parts(files[0], row, stored)
        with_scales = quantised.convert_row(row, stored, settings)
        if packed:  # their widths only mean something once it is known that they have no unknown format
            _check_parts(files[0], row, stored)
        native.update(with_scales or {})
        for param in row.params:
            if f"{row.target}.{param}" not in native:
                native[f"{row.target}.{param}"] = _fuse(row, param, stored)
    return native, metadata


def _check_parts(path: str, row: Row, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError unless the tensors that become one have one width."""
    for param in row.params:
        shapes = {f"{source}.{param}": list(stored[f"{source}.{param}"].shape) for source in row.sources}
        if any(not s for s in shapes.values()) or len({tuple(s[1:]) for s in shapes.values()}) > 1:
            found = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
            raise CheckpointError(f"{path}: these tensors belong to one matrix but do not fit: {found}. {CHOOSE}")


def check_shapes(
    path: str,
    stored: Mapping[str, Tensor],
    network_class: Callable = FramePackTransformer,
    metadata: dict[str, str] | None = None,
    node: str = LOAD_MODEL,
) -> None:
    """Raise CheckpointError where a tensor has another shape than in the network core builds for the file.

    The network is built without memory. Formats that pack several numbers into one byte have shapes of their own.
    """
    try:
        config = comfy.model_detection.detect_unet_config(stored, "", metadata=metadata)
        network = network_class(**config, device="meta", operations=comfy.ops.disable_weight_init)
    except (ArithmeticError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the shapes of its tensors describe no network ({error}). {choose(node)}"
        ) from error
    wrong = []
    for key, value in network.state_dict().items():
        given = stored[key]
        if given.shape != value.shape and given.dtype not in PACKED:
            wrong.append(f"{key} is {list(given.shape)}, expected {list(value.shape)}")
    if wrong:
        more = f" ({len(wrong) - 1} more do not fit either)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path}: {wrong[0]} as in the rest of the network{more}. The file mixes parts of two models. "
            f"{choose(node)}"
        )


def _fuse(row: Row, param: str, stored: Mapping[str, StoredTensor]) -> StoredTensor:
    parts = [stored[f"{s}.{param}"] for s in row.sources]
    if len(parts) == 1 and not row.swap_halves:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    dtype = max((p.dtype for p in parts), key=lambda d: d.itemsize)

    def load() -> Tensor:
        out, start = torch.empty(shape, dtype=dtype), 0
        for part in parts:
            place = out.narrow(0, start, part.shape[0])
            # Straight from the file where it fits: a copy of each part would leave holes in the heap.
            part.read_into(place) if part.dtype == dtype else place.copy_(part)
            start += part.shape[0]
        return swap_halves(out) if row.swap_halves else out

    return StoredTensor(load, shape, dtype)


def load_state_dict(paths: str | Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The checkpoint in core's layout, in RAM, and its metadata. Peak RAM: the tensors and one more of them."""
    stored, metadata = open_state_dict(paths)
    return {key: real(value) for key, value in stored.items()}, metadata


def load_framepack(paths, model_options=None, disable_dynamic=False):
    """A core ModelPatcher around the FramePack network of a checkpoint.

    model_options: core's own (`dtype`, `custom_operations`, ...) and `quantised.ROUND_TO`. Beyond what core does, a
    network kept in fp8 has only its blocks' matrices in fp8: embedders, context weights, output layer, norms and
    biases stay as precise as the file has them (reference/framepack.md 9, trap 15).
    Raises FileError, CheckpointError or KeyMapError; nothing is ever filled with random numbers.
    """
    framepack.register()
    model_options = dict(model_options or {})
    stored, metadata = open_state_dict(paths)
    files = find_files(paths)
    check_shapes(files[0], stored)
    model = load_stored(files, stored, metadata, model_options, disable_dynamic)
    if model is None or not framepack.is_framepack(model):
        raise CheckpointError(f"ComfyUI did not recognise {paths} as a FramePack network. {CHOOSE}")
    model.cached_patcher_init = (load_framepack, (paths, model_options))
    return model


def load_stored(files: Sequence[str], stored: Mapping[str, Tensor], metadata, model_options, disable_dynamic=False):
    """A core ModelPatcher around tensors on disk in core's layout, or None where core does not know them.

    model_options: core's own, and `quantised.ROUND_TO`; neither that nor an fp8 `dtype` counts where the file has
    formats with scales.
    """
    model_options = dict(model_options)
    round_to = model_options.pop(quantised.ROUND_TO, None)
    own_formats = any(layer_of(k)[1] == "comfy_quant" for k in stored) or QUANT_MARKER in stored
    if own_formats and model_options.get("dtype") in FP8:
        del model_options["dtype"]  # it has fp8 where fp8 is wanted; core would round everything else to it as well
    if round_to and not own_formats:
        stored, own_formats = quantised.rounded(stored, round_to, comfy.model_management.get_torch_device()), True
    own_formats = own_formats or "custom_operations" in model_options
    disk_backed = comfy.memory_management.aimdo_enabled
    sd = _tensors_to_keep(files, stored, disk_backed) if own_formats or disk_backed else stored
    model = comfy.sd.load_diffusion_model_state_dict(
        dict(sd), model_options=model_options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if model is not None and not own_formats:
        _restore_precision(model.model, stored)
    return model


def in_memory(model, info: CheckpointInfo, asked: str = "default") -> list[str]:
    """The number formats that a loaded MODEL is kept in, in words, and that `asked`, a weight_dtype, was not used."""
    network, blocks, rest = model.model.diffusion_model, Counter(), Counter()
    for key, value in network.named_parameters():
        module, param = layer_of(key)
        # Where core pages weights in from disk, it notes here what each is cast to.
        noted = getattr(network.get_submodule(module), f"{param}_comfy_model_dtype", value.dtype)
        dtype = value._qdata.dtype if hasattr(value, "_qdata") else noted
        kept = quantised.CALLED.get(dtype) or tensor_file.NAMES[dtype]
        (blocks if quantised.is_block_matrix(key, value) else rest)[kept] += value.numel()
    inside, outside = (" and ".join(name for name, _ in each.most_common()) for each in (blocks, rest))
    lines = [f"in memory: {inside}" + (f" in the blocks, {outside} elsewhere" if inside != outside else "")]
    if info.quantised and asked != "default":
        lines.append(f"weight_dtype {asked} is not used: the file has scales of its own and keeps its format")
    return lines


def _tensors_to_keep(files: Sequence[str], stored: Mapping[str, Tensor], disk_backed: bool) -> dict[str, Tensor]:
    """Real tensors, for the paths of core that make what they are given the network's own.

    disk_backed: core can page weights in from a file it has mapped itself; a native file needs no copy in RAM then.
    """
    if disk_backed and len(files) == 1 and stored.keys() == tensor_file.read_header(files[0])[0].keys():
        return comfy.utils.load_torch_file(files[0])
    return {key: real(value) for key, value in stored.items()}


def _restore_precision(model: comfy.model_base.BaseModel, stored: Mapping[str, Tensor]) -> None:
    """Undo core's rounding to fp8 where it costs quality and saves next to nothing.

    An fp8 file keeps every tensor that it has in more bits. Where fp8 was asked for with another file, it means
    the matrices of the blocks.
    """
    numbers: Counter = Counter()
    for value in stored.values():
        numbers[value.dtype in FP8] += value.numel()
    fp8_file = numbers[True] > numbers[False]
    for key, value in stored.items():
        if value.dtype in FP8 or (quantised.is_block_matrix(key, value) and not fp8_file):
            continue
        module_name, param = layer_of(key)
        module = model.diffusion_model.get_submodule(module_name)
        held = getattr(module, param)
        if held.dtype in FP8:
            setattr(module, param, torch.nn.Parameter(real(value).to(held.device), requires_grad=False))
        # Where core pages weights in from disk, it casts each to the dtype it noted when the network was made.
        if getattr(module, f"{param}_comfy_model_dtype", None) in FP8:
            setattr(module, f"{param}_comfy_model_dtype", value.dtype)


def save_native(sd: Mapping[str, Tensor], path: str, metadata: Mapping[str, str], kind: str, source: str = "") -> None:
    """Write core's layout as one safetensors file that stock and GGUF tools read; tensors may still be on disk.

    kind: "F0" or "F1". source: the name of the file it came from. `path` appears only when complete.
    Raises FileError (a full disk, a place that cannot be written) and KeyMapError (an incomplete network).
    """
    if kind not in KINDS:
        raise CheckpointError(f"The kind of a FramePack checkpoint is 'F0' or 'F1', not '{kind}'.")
    if not path.lower().endswith(tensor_file.SAFETENSORS):
        raise CheckpointError(f"A converted checkpoint is saved as .safetensors, not as {os.path.basename(path)}.")
    check_keys(sd, diffusers=False)
    extra = {FORMAT_KEY: FORMAT, KIND_KEY: kind, SOURCE_KEY: os.path.basename(source), "format": "pt"}
    tensor_file.write(path, sd, {**metadata, **extra})


# Shown to the artist in place of "could not detect": family, and keys that only it has.
_FAMILIES = (
    ("a LoRA, which goes into 'Load Video LoRA'", r"lora_(unet|te)|\.lora_(A|B|up|down)\b|\.hada_w1|\.lokr_w"),
    ("HunyuanVideo 1.5", r"^vision_in\.|^image_embedder\.norm_in"),
    (f"Helios, which goes into '{LOAD_MEMORY_MODEL}'", r"^patch_long\."),
    (f"Wan, which goes into '{LOAD_WAN}'", r"^blocks\.\d+\.cross_attn\.|^blocks\.\d+\.attn2\.(to_q|norm_q)"),
    ("a Frame Memory encoder or head, which needs its own node", r"^(semantic_pack|frame_preservation|head)\."),
    ("FLUX", r"^double_blocks\.0\.img_attn\..*|^double_stream_modulation"),
    ("Stable Diffusion 1, 2 or XL", r"^input_blocks\.|^down_blocks\.\d+\.(attentions|resnets)\."),
    ("Stable Diffusion 3", r"^joint_blocks\."),
    ("LTX-Video", r"^transformer_blocks\.\d+\.scale_shift_table|^patchify_proj\."),
    ("Cosmos", r"^blocks\.block0\."),
    ("Qwen-Image", r"^transformer_blocks\.\d+\.img_mlp\."),
    ("a VAE", r"^decoder\.(conv_in|conv1|mid|middle)|^encoder\.(conv_in|conv1)"),
    ("a text encoder", r"^model\.layers\.0\.|^text_model\.|^encoder\.block\.0\.|^layers\.0\.self_attn"),
    ("a CLIP vision model", r"^vision_model\."),
)  # fmt: skip
_HUNYUAN = ("txt_in.individual_token_refiner.", "context_embedder.token_refiner.")


def name_family(keys: Sequence[str] | Mapping) -> str | None:
    """A known family's name for keys without prefix, or None."""
    hunyuan = any(k.startswith(_HUNYUAN) for k in keys)
    for name, pattern in _FAMILIES:
        if not (hunyuan and name == "FLUX") and any(re.search(pattern, k) for k in keys):
            return name
    return "plain HunyuanVideo" if hunyuan else None


def looks_like(stored: Mapping[str, Tensor]) -> str:
    """A sentence about a file that was refused: its family, or what is in it."""
    family = name_family(stored)
    return f"It looks like {family}." if family else f"Its first tensors are {', '.join(list(stored)[:3]) or 'none'}."


def _refuse_other_families(path: str, stored: Mapping[str, Tensor]) -> None:
    if CONTEXT_SIGNATURE in stored and (is_diffusers(stored) or is_native(stored)):
        return
    raise CheckpointError(
        f"{path}: this checkpoint has no packed-context weights ({CONTEXT_SIGNATURE} is not in it), "
        f"so it cannot look at a history. {looks_like(stored)} {CHOOSE}"
    )


__all__ = [
    "CheckpointError", "CheckpointInfo", "FileError", "KeyMapError", "find_files", "inspect",
    "kind_from_name", "load_framepack", "load_state_dict", "name_family", "open_state_dict", "save_native",
]  # fmt: skip
