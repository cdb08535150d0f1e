"""LoRAs of all naming styles onto a video model, with exact slices of fused tensors, and what of a file was used.

FramePack (reference/framepack.md section 7): names of FramePack in kohya/musubi and in diffusers/PEFT style, names of
HunyuanVideo in the original and in kohya style. Core's loader and weight adapters do the arithmetic (LoRA, LoHa, LoKr,
DoRA, differences); this module only says which rows of which tensor a name means. Core knows the third style and part
of the fourth by itself, so stock LoRA nodes work for those.

Models of all other families, Wan with FFGo's LoRAs among them (reference/ffgo.md section 5): the names are core's own,
the same as in its LoRA nodes. What core says in the log only, or not at all, is counted here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import comfy.lora
import comfy.lora_convert
import comfy.utils
from torch import Tensor

from .experts import expert_of, loaded_expert
from .framepack import has_context_weights
from .key_map import Row, rows, slices, swap_halves
from .sources import LOAD_LORA

LOADER = f"'{LOAD_LORA}'"
FEW = 0.5  # below this share of matched modules the report warns
NAMED = 3
MODEL_PREFIX = "diffusion_model."
DOTTED_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "model.",
)
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
FRAMEPACK_NAMES, HUNYUAN_NAMES = "FramePack in diffusers names", "HunyuanVideo in original names"
STYLES = {
    (FRAMEPACK_NAMES, False): FRAMEPACK_NAMES,
    (FRAMEPACK_NAMES, True): "FramePack in kohya (musubi) names",
    (HUNYUAN_NAMES, False): HUNYUAN_NAMES,
    (HUNYUAN_NAMES, True): "HunyuanVideo in kohya names",
}
_PARTS = re.compile(
    r"\.(lora_(up|down|mid)\.weight|lora_[AB](\.default)?(\.weight)?|lora\.(up|down)\.weight|"
    r"lora_linear_layer\.(up|down)\.weight|alpha|dora_scale|hada_[wt]\w+|lokr_\w+|oft_\w+|reshape_weight|"
    r"diff|diff_b|w_norm|b_norm|set_weight|[ab][12]\.weight)$"
)
_TEXT = re.compile(r"^(lora_te\d?_|text_encoders?[._]|clip_[lgh]\.)")
# Names of the original HunyuanVideo code, by the native module's name.
_ORIGINAL = (
    (re.compile(r"_attn\.(qkv|proj)$"), r"_attn_\1"),
    (re.compile(r"_mod\.lin$"), "_mod.linear"),
    (re.compile(r"modulation\.lin$"), "modulation.linear"),
    (re.compile(r"mlp\.0$"), "mlp.fc1"),
    (re.compile(r"mlp\.2$"), "mlp.fc2"),
    (re.compile(r"_attn\.norm\.(query|key)_norm$"), lambda m: f"_attn_{m[1][0]}_norm"),
    (re.compile(r"\.norm\.(query|key)_norm$"), lambda m: f".{m[1][0]}_norm"),
    (re.compile(r"^(time_in|guidance_in|txt_in\.t_embedder)\.in_layer$"), r"\1.mlp.0"),
    (re.compile(r"^(time_in|guidance_in|txt_in\.t_embedder)\.out_layer$"), r"\1.mlp.2"),
    (re.compile(r"^txt_in\.c_embedder\.in_layer$"), "txt_in.c_embedder.linear_1"),
    (re.compile(r"^txt_in\.c_embedder\.out_layer$"), "txt_in.c_embedder.linear_2"),
)
_FAMILIES = (
    ("LTX-Video", r"transformer_blocks[._]\d+[._]attn[12][._]"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._]img_mlp"),
    ("Wan", r"blocks[._]\d+[._](cross_attn|self_attn|attn[12])[._]"),
    ("Stable Diffusion 3", r"joint_blocks"),
    ("Stable Diffusion 1, 2 or XL", r"(input|output|middle|down|up|mid)_blocks?[._]"),
    ("HunyuanVideo or FLUX of another width", r"(double|single)_blocks|(single_)?transformer_blocks"),
)
FLUX_BLOCKS = (19, 38)
# By core's class, what people call its models where that is something else.
_CALLED = {"WAN21": "Wan 2.1 or 2.2", "WAN22": "Wan 2.2 5B"}
# How names begin that core knows, to the style a report names; the first that fits counts.
_CORE_STYLES = (("lora_unet_", "kohya names"), ("diffusion_model.", "ComfyUI names"), ("", "diffusers names"))


class LoraError(ValueError):
    """A LoRA that changes nothing in this model, or that was changed on its way into it."""


@dataclass(frozen=True)
class Target:
    """Where a LoRA module goes: a module of the network, and the rows of its fused tensors."""

    module: str
    source: str
    row: Row = field(repr=False)


@dataclass(frozen=True)
class LoraMatch:
    """What of a LoRA fits. matched, total, unmatched count the network's modules; text encoder parts are left out.

    patches: for ModelPatcher.add_patches. warnings: sentences for the artist, empty when all is well.
    """

    patches: dict
    matched: int
    total: int
    unmatched: tuple[str, ...]
    style: str
    warnings: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Matched part, 0..1."""
        return self.matched / self.total if self.total else 0.0

    def report(self) -> str:
        """The lines a node shows."""
        head = f"{self.matched} of {self.total} modules matched ({self.share:.0%}); {self.style}."
        left = [f"Not matched: {_shown(self.unmatched)}."] if self.unmatched else []
        return "\n".join([head, *left, *self.warnings])


def match_lora(lora_sd: Mapping[str, Tensor], model, allow_none: bool = False) -> LoraMatch:
    """Fit a LoRA's tensors to a base model; neither is changed.

    Raises LoraError, naming three keys and the family they look like, where not one module fits. allow_none makes that
    a warning of a match without patches.
    """
    framepack = has_context_weights(model)
    # Core's own first step: "lora_unet__" of FFGo's files becomes "lora_unet_". It renames in place, so it gets a copy.
    known = lora_sd if framepack else comfy.lora_convert.convert_lora(dict(lora_sd))
    modules, text_parts = _modules(known)
    found, patches, failed = (_match_framepack if framepack else _match_core)(known, modules, model)
    unmatched = tuple(f"{m} ({failed[m]})" if m in failed else m for m in modules if m not in found or m in failed)
    styles = Counter(style for module, (_, style) in found.items() if module not in failed)
    matched = len(modules) - len(unmatched)
    if matched == 0:
        core = type(model).__name__
        said = _nothing_matched(lora_sd, modules, failed, "FramePack" if framepack else _CALLED.get(core, core))
        if not allow_none:
            raise LoraError(said)
        return LoraMatch({}, 0, len(modules), unmatched, "no known names", (f"Warning: {said}",))
    warnings = _warnings(matched, len(modules), found, text_parts)
    return LoraMatch(patches, matched, len(modules), unmatched, styles.most_common(1)[0][0], warnings)


def apply_lora(model_patcher, lora_sd: Mapping[str, Tensor], strength: float = 1.0, allow_none: bool = False):
    """(a clone of the MODEL with the LoRA, what matched). Raises LoraError as `match_lora` does.

    At strength 0 nothing is put on it: a project finds its sections as without the LoRA.
    """
    match = match_lora(lora_sd, model_patcher.model, allow_none)
    clone = model_patcher.clone()
    if strength == 0:
        return clone, match
    taken = set(clone.add_patches(match.patches, strength))
    lost = [key for key in match.patches if key not in taken]
    if lost:
        raise LoraError(f"ComfyUI did not take {len(lost)} patches of the LoRA, the first is {lost[0]}.")
    return clone, match


def _modules(lora_sd: Mapping[str, Tensor]) -> tuple[dict[str, list[str]], int]:
    """Tensor names by module, and the count of text encoder tensors, which belong to the CLIP."""
    out: dict[str, list[str]] = {}
    text = 0
    for key in lora_sd:
        if _TEXT.match(key):
            text += 1
            continue
        out.setdefault(_PARTS.sub("", key), []).append(key)
    return out, text


def _match_framepack(lora_sd: Mapping[str, Tensor], modules: dict[str, list[str]], model) -> tuple[dict, dict, dict]:
    """(modules to their target and style, patches for core, modules to why they do not fit)."""
    names = _names(model)
    found: dict[str, tuple[Target | None, str]] = {}
    patches, failed = {}, {}
    for module, keys in modules.items():
        hit = _resolve(module, names)
        if hit is not None:
            found[module] = hit
            _collect(module, _patches(module, lora_sd, keys, hit[0], model), patches, failed)
    return found, patches, failed


def _match_core(lora_sd: Mapping[str, Tensor], modules: dict[str, list[str]], model) -> tuple[dict, dict, dict]:
    """As `_match_framepack`, for a model whose names core maps itself. Targets are None: nothing is sliced."""
    places = comfy.lora.model_lora_keys_unet(model, {})
    found: dict[str, tuple[Target | None, str]] = {}
    patches, failed = {}, {}
    for module, keys in modules.items():
        if module not in places:
            continue
        found[module] = (None, next(style for prefix, style in _CORE_STYLES if module.startswith(prefix)))
        made = _core_patches(module, lora_sd, keys, places[module])
        _collect(module, (made, _misfit(made, model)), patches, failed)
    return found, patches, failed


def _collect(module: str, made: tuple[dict, str], patches: dict, failed: dict[str, str]) -> None:
    """Adds a module's patches to all, or the reason why it is left out."""
    new, reason = made
    if reason:
        failed[module] = reason
    elif patches.keys() & new.keys():
        failed[module] = "a second tensor for the same place"
    else:
        patches.update(new)


def _core_patches(module: str, lora_sd: Mapping[str, Tensor], keys: list[str], place) -> dict:
    """Core's patches of one module. place: a key of the model, or (key, rows of it, a change of their order)."""
    made = {}
    if not isinstance(place, str):
        # Core's loader would lose a bias that goes to rows of a fused tensor.
        for key in [key for key in keys if key.endswith((".diff_b", ".b_norm"))]:
            made[(f"{place[0].removesuffix('.weight')}.bias", *place[1:])] = ("diff", (lora_sd[key],))
            keys = [other for other in keys if other != key]
    return made | comfy.lora.load_lora({k: lora_sd[k] for k in keys}, {module: place}, log_missing=False)


def _misfit(made: dict, model) -> str:
    """Why patches do not fit their tensor or its rows, or nothing. Core would find out while it samples, and log it."""
    if not made:
        return "no LoRA tensors that core knows"
    for place, patch in made.items():
        # Fused tensors (Flux, Stable Diffusion 3, Lumina 2): (key, (dimension, start, length)), and perhaps a function.
        key, span = (place, None) if isinstance(place, str) else place[:2]
        try:
            tensor = comfy.utils.get_attr(model, key)
        except AttributeError:
            return f"changes {key.removeprefix(MODEL_PREFIX)}, which this model does not have"
        shape = tensor.shape if span is None else tensor.narrow(*span).shape
        given = _delta_shape(patch)
        if given is None or not shape:
            continue
        columns = shape[1:].numel() if len(shape) > 1 else None
        if given[0] != shape[0]:
            return f"changes {given[0]} rows where this model has {shape[0]}"
        if given[1] is not None and columns is not None and given[1] != columns:
            return f"changes {given[1]} columns where this model has {columns}"
    return ""


def expert_warning(lora_name: str, model_patcher) -> str:
    """A sentence where a file's name says another of Wan 2.2's two experts than the model's file, else nothing.

    Both have the same names and shapes, so nothing else tells; a swapped pair makes a plausible but wrong video.
    """
    mine, its = expert_of(lora_name), loaded_expert(model_patcher)
    if mine is None or its is None or mine == its:
        return ""
    return (
        f"Warning: by its name this LoRA is for the {mine} noise model, and this is the {its} noise one. Both fit by "
        f"shape. Swap the files in the two {LOADER}, unless you mean it."
    )


def _names(model) -> dict[str, tuple[Target, str]]:
    """Every name without prefix, with dots and with underscores, to its target and style."""
    config = model.model_config.unet_config
    out: dict[str, tuple[Target, str]] = {}
    for row in rows(config["depth"], config["depth_single_blocks"]):
        named = [(source, source, FRAMEPACK_NAMES) for source in row.sources]
        named += [(name, row.target, HUNYUAN_NAMES) for name in (row.target, _original(row.target))]
        for name, source, family in named:
            target = Target(row.target, source, row)
            for flat in (False, True):
                out.setdefault(name.replace(".", "_") if flat else name, (target, STYLES[family, flat]))
    return out


def _original(name: str) -> str:
    for pattern, new in _ORIGINAL:
        name = pattern.sub(new, name)
    return name


def _resolve(module: str, names: Mapping[str, tuple[Target, str]]) -> tuple[Target, str] | None:
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix):
            return names.get(module.removeprefix(prefix))
    while True:
        if module in names:
            return names[module]
        prefix = next((p for p in DOTTED_PREFIXES if module.startswith(p)), None)
        if prefix is None:
            return None
        module = module.removeprefix(prefix)


def _patches(module: str, lora_sd, keys: list[str], target: Target, model) -> tuple[dict, str]:
    """Patches of one LoRA module by core's patch key, or why it does not fit."""
    weight_key = f"{MODEL_PREFIX}{target.module}.weight"
    shape = comfy.utils.get_attr(model, weight_key).shape
    hidden = model.model_config.unet_config["hidden_size"]
    whole = target.source == target.module
    spans = dict(zip(target.row.sources, slices(target.row, hidden, _rows_of(target.row, hidden, model)), strict=True))
    span = None if whole or len(spans) == 1 else spans[target.source]
    swap = target.row.swap_halves and not whole

    def place(param: str):
        key = f"{MODEL_PREFIX}{target.module}.{param}"
        if span is not None:
            return (key, (0, *span))
        return (key, None, swap_halves) if swap else key

    made = {}
    for key in keys:
        # Core's loader would lose a bias that goes to rows of a fused tensor.
        if key.endswith((".diff_b", ".b_norm")):
            made[place("bias")] = ("diff", (lora_sd[key],))
    rest = {k: lora_sd[k] for k in keys if not k.endswith((".diff_b", ".b_norm"))}
    loaded = comfy.lora.load_lora(rest, {module: place("weight")}, log_missing=False) if rest else {}
    for key, patch in loaded.items():
        if swap and isinstance(patch, tuple) and patch[0] == "set":
            patch = ("set", (swap_halves(patch[1][0]),))  # core applies a function to differences only
        made[key] = patch
    if not made:
        return {}, "no LoRA tensors that core knows"
    rows_here = shape[0] if span is None else span[1]
    for patch in made.values():
        given = _delta_shape(patch)
        if given is not None and given[0] != rows_here:
            return {}, f"changes {given[0]} rows where this model has {rows_here}"
        if given is not None and len(shape) == 2 and given[1] is not None and given[1] != shape[1]:
            return {}, f"changes {given[1]} columns where this model has {shape[1]}"
    return made, ""


def _rows_of(row: Row, hidden: int, model) -> int:
    if len(row.sources) == 4:  # q, k, v and the MLP of a single block
        return 3 * hidden + int(hidden * model.model_config.unet_config["mlp_ratio"])
    return len(row.sources) * hidden


def _delta_shape(patch) -> tuple[int, int | None] | None:
    """Rows and columns of the change that a patch makes, as far as its kind tells."""
    if isinstance(patch, tuple):
        value = patch[1][0]
        return value.shape[0], (value[0].numel() if value.ndim > 1 else None)
    weights = patch.weights
    if patch.name == "lora" and weights[3] is None and weights[5] is None:
        return weights[0].shape[0], weights[1][0].numel()
    if patch.name == "loha" and weights[5] is None:
        return weights[0].shape[0], weights[1].shape[1]
    if patch.name == "lokr" and weights[7] is None:
        first = weights[0].shape if weights[0] is not None else (weights[3].shape[0], weights[4].shape[1])
        second = weights[1].shape if weights[1] is not None else (weights[5].shape[0], weights[6].shape[1])
        return first[0] * second[0], first[1] * second[1]
    return None


def _shown(names) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _nothing_matched(lora_sd, modules, failed: Mapping[str, str], model: str) -> str:
    keys = list(lora_sd)[:NAMED]
    if not modules:
        held = _shown(list(lora_sd)) or "nothing"
        return f"This file is no LoRA for a video model: it holds {held}. Change it in {LOADER}."
    family = next((name for name, p in _FAMILIES if any(re.search(p, m) for m in modules)), None)
    looks = f" They look like {family}." if family else ""
    why = f" {next(iter(failed))} {failed[next(iter(failed))]}." if failed else ""
    wanted = "FramePack or HunyuanVideo" if model == "FramePack" else "this model"
    return (
        f"Not one of the LoRA's {len(modules)} modules fits this {model} model; its first keys are {', '.join(keys)}."
        f"{looks}{why} Choose a LoRA made for {wanted} in {LOADER}."
    )


def _warnings(
    matched: int, total: int, found: Mapping[str, tuple[Target | None, str]], text_parts: int
) -> tuple[str, ...]:
    out = []
    if matched < FEW * total:
        out.append(f"Warning: less than half of this LoRA fits. It was probably made for another model; see {LOADER}.")
    last = [0, 0]
    for target, style in found.values():
        number = re.match(r"(double|single)_blocks\.(\d+)\.", target.module) if target else None
        if number and style.startswith("FramePack"):
            kind = 0 if number[1] == "double" else 1
            last[kind] = max(last[kind], int(number[2]) + 1)
    if tuple(last) == FLUX_BLOCKS:
        out.append(
            "Warning: it stops at block 19 and 38 as FLUX does, whose names and shapes are the same. Is it for FLUX?"
        )
    if text_parts:
        out.append(f"{text_parts} tensors for a text encoder were left out: this node changes the video model only.")
    return tuple(out)


__all__ = ["LoraError", "LoraMatch", "apply_lora", "expert_warning", "match_lora"]
