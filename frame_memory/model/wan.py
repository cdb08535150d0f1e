"""History beside Wan's window: packed context and memory tokens on core's own WanModel.

    blocks([noisy window | memory | 4x, 2x, 1x context]) -> head(window)

Nothing of Wan is copied or subclassed here. A MODEL from any of core's loaders keeps its class, names and weights; a
wrapper of its ModelPatcher (core's `DIFFUSION_MODEL` seam) appends the history to the tokens of the first block and
cuts it off those of the last one through core's `patches_replace`, so `WanModel.forward_orig` runs as core wrote it,
and quantised weights, LoRAs and other packs' patches work as ever. Without history in the conditioning the wrapper
hands its arguments on.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels, M tokens of history, N tokens of the
window, D width, R rows of the modulation, F rotary frequencies (head size / 2).

Source: pfp reference 2.4 and 6, reference/framepack.md section 1.1. Wan has no released weights for this; four things
are our choice.

- Order. Attention knows places by their phases alone. The window comes first, where other packs' patches look for it,
  and so that few rows of modulation are enough (`modulation_rows`).

- Noise level. The history is modulated as timestep 0 and the window as its own: Wan's blocks take a row of modulation
  for a run of tokens (`comfy.ldm.wan.model.repeat_e`), made for Wan 2.2 5B; every other member runs the same block.
- Image-to-video models read mask and image beside the noise. A context frame is embedded as the base embeds a given
  frame: itself for the noise, ones for the mask, itself for the image. That is one kernel over its own channels and a
  bias, and the patchifiers begin with these.
- A coarse token turns by the mean of the phases in its cell, as FramePack's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.wan.model import WanModel, sinusoidal_embedding_1d
from comfy.model_base import WAN21
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .cross_attention import with_features
from .framepack import FRAME_FEATURES, FRAME_POSITIONS, FRAME_TOKENS, ONCE, PACKED, AloneConstant, token_conditions
from .once import Once, vary
from .packing import KERNEL_OF_RATE, CleanEmbedder, ContextLayout, packed_rope
from .provenance import fingerprint_of
from .stored_weights import original

# Of the wrappers and of the additional model.
KEY = "frame_memory_wan"
CONTEXT, LAYOUT = "frame_context_latents", "frame_context_layout"
TOKENS, POSITIONS = FRAME_TOKENS, FRAME_POSITIONS
# What a prompt may carry of the history, as the wrapper takes it.
_CARRIED = (CONTEXT, LAYOUT, TOKENS, POSITIONS, FRAME_FEATURES)
# In `transformer_options`: how many tokens stand behind the window.
BEHIND = "frame_memory_behind"
_MASK = 4
_PATCH = (1, 2, 2)


class Patchifiers(CleanEmbedder):
    """Wan's patch embedding at 1x, 2x and 4x for finished frames, with weights of their own, in fp32 as core's is.

    in_channels: of the latents, whatever an image-to-video model reads beside them.
    """

    def __init__(self, in_channels: int, hidden_size: int, device=None, operations=None):
        super().__init__(in_channels, hidden_size, torch.float32, device, operations or comfy.ops.manual_cast)

    def forward(self, latent_BCTHW: Tensor, rate: int | str) -> Tensor:
        """Tokens `[B, N, D]` of one context group, in the numbers of the latents."""
        return super().forward(latent_BCTHW.float(), rate).to(latent_BCTHW.dtype)


@torch.no_grad()
def initialise(patchifiers: Patchifiers, weight: Tensor, bias: Tensor) -> Patchifiers:
    """Fill fresh patchifiers in place: each embeds the mean of a cell as the base embeds one patch.

    weight `[D, C, 1, 2, 2]` and bias `[D]`: of the base's patch embedding, unpacked and without patches.
    """
    for name, rate in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
        kernel = weight.detach().float()
        for axis in (2, 3, 4):
            kernel = kernel.repeat_interleave(rate, axis)
        conv = patchifiers.get_submodule(name)
        conv.get_parameter("weight").copy_(kernel / rate**3)
        conv.get_parameter("bias").copy_(bias.detach().float())
    return patchifiers


def patchifiers_of(model_patcher) -> Patchifiers:
    """Fresh patchifiers for a MODEL, trainable, from its checkpoint's own patch embedding.

    Raises ValueError as `check` does.
    """
    weight, bias = given_embedding(model_patcher)
    return initialise(Patchifiers(weight.shape[1], weight.shape[0]), weight, bias)


def given_embedding(model_patcher) -> tuple[Tensor, Tensor]:
    """Weight `[D, C, 1, 2, 2]` and bias `[D]`, fp32, by which the base embeds a finished frame's own channels.

    LoRAs are left out. Raises ValueError as `check` does.
    """
    network = check(model_patcher)
    (weight, bias), own = original(model_patcher, "patch_embedding"), network.out_dim
    if network.in_dim != own:
        noise, mask, image = weight.split((own, _MASK, own), dim=1)
        weight, bias = noise + image, bias + mask.sum(dim=(1, 2, 3, 4))
    return weight, bias


def patcher_of(patchifiers: Patchifiers, load_device=None):
    """A ModelPatcher of their own, to be loaded beside a MODEL."""
    return comfy.model_patcher.CoreModelPatcher(
        patchifiers,
        load_device=load_device or comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def attach(model_patcher, patchifiers=None):
    """A clone of a MODEL that accepts history; the MODEL stays as it is.

    patchifiers: their ModelPatcher, needed for context groups and not for memory tokens. Raises ValueError as `check`
    does.
    """
    check(model_patcher)
    clone = detach(model_patcher)
    network = None if patchifiers is None else patchifiers.model
    wrapper = _Wrapper(network)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper.ahead)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _begin)
    if patchifiers is not None:
        clone.set_additional_models(KEY, [patchifiers])
    return clone


def detach(model_patcher):
    """A clone of a MODEL that knows nothing of history."""
    clone = model_patcher.clone()
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL, WrappersMP.PREPARE_SAMPLING):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_additional_models(KEY)
    return clone


def options(patchifiers: Patchifiers | None = None) -> dict:
    """`transformer_options` with which a bare network accepts history, as a MODEL does after `attach`."""
    return {"wrappers": {WrappersMP.DIFFUSION_MODEL: {KEY: [_Wrapper(patchifiers)]}}}


def is_attached(model_patcher) -> bool:
    """Whether a MODEL accepts history."""
    return bool(model_patcher.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))


def accepts_context(model_patcher) -> bool:
    """Whether a MODEL has patchifiers too, for frames of history."""
    return is_attached(model_patcher) and bool(model_patcher.get_additional_models_with_key(KEY))


def copied_patchifiers(model_patcher) -> Patchifiers:
    """A trainable copy of a MODEL's patchifiers; fresh ones where it has none. Raises ValueError as `check` does."""
    made = patchifiers_of(model_patcher)
    if accepts_context(model_patcher):
        made.load_state_dict(model_patcher.get_additional_models_with_key(KEY)[0].model.state_dict())
    return made


def fingerprint(model_patcher) -> str:
    """A few hex digits that change with a MODEL's patchifiers; those of fresh ones where it has none. Raises ValueError
    as `check` does."""
    return fingerprint_of(copied_patchifiers(model_patcher).state_dict())


def check(model_patcher) -> WanModel:
    """The network of a MODEL. Raises ValueError unless core runs it by WanModel's own forward pass and its channels are
    those of a text-to-video or an image-to-video model."""
    network = getattr(model_patcher.model, "diffusion_model", None)
    _check_network(network, kind_of(model_patcher.model))
    return network


def kind_of(base_model) -> str:
    """What people call a model that is not the Wan meant here: Wan Vace and the like, by core's class."""
    name = type(base_model).__name__
    if not isinstance(base_model, WAN21):
        return f"another kind of model ({name})"
    return f"Wan {name.partition('_')[2] or 'with other inputs'}"


def conditions(
    base_model, context: Mapping | None = None, tokens: Tensor | None = None, positions=None,
    features: Tensor | None = None,
) -> dict:  # fmt: skip
    """What goes into a prompt's entry as `model_conds`; core hands it to the network untouched.

    context: `{"latents": [B C T H W, ...] in VAE space, "layout": ContextLayout}`, as FramePack's; the groups may be
    none, which places the window alone. tokens: `[B, M, D]`. positions: their (t, h, w) in latent frames and patches,
    M of them, on the layout's time axis. features: as in `token_conditions`, which raises ValueError as it says.
    """
    out = {}
    if context is not None:
        latents = [base_model.process_latent_in(latent) for latent in context["latents"]]
        out[CONTEXT] = comfy.conds.CONDList(latents)
        out[LAYOUT] = AloneConstant(context["layout"])
    return {**out, **token_conditions(tokens, positions, features)}


class _History(NamedTuple):
    """What stands behind the window.

    tokens_BMD: of all of it. pe `[1, M, 1, F, 2, 2]`: its rotary table, behind the window's N where the window is
    placed here, and not by core. clean_116D: the modulation of timestep 0. features_BPE: for cross-attention, or None.
    """

    tokens_BMD: Tensor
    pe: Tensor
    placed: bool
    clean_116D: Tensor
    features_BPE: Tensor | None


class _Wrapper:
    """Core's `DIFFUSION_MODEL` wrapper, and `ahead` for `APPLY_MODEL`, which is around what torch.compile captures.

    Holds no tensors but the patchifiers, which their ModelPatcher owns.
    """

    def __init__(self, patchifiers: Patchifiers | None):
        self.patchifiers = patchifiers

    def ahead(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):  # fmt: skip
        """The model's call, behind what no step of the section changes (`once.py`)."""
        once, options = kwargs.pop(ONCE, None), transformer_options or {}
        if once is not None:
            told = {name: kwargs.pop(name, None) for name in _CARRIED}
            network = executor.class_obj.diffusion_model
            network = getattr(network, "_orig_mod", network)  # as it is without torch.compile
            like = x.to(executor.class_obj.get_dtype_inference())
            made_for = (like.device, like.dtype, like.shape, told[LAYOUT], tuple(sorted(_stretch(options).items())))
            kwargs[PACKED] = made = once(made_for, partial(self.history, network, like, told, options))
            if told[TOKENS] is not None:
                vary((made.tokens_BMD, 1), (made.pe, 1), (made.features_BPE, 1))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def __call__(self, executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None,
                 **kwargs):  # fmt: skip
        told = {name: kwargs.pop(name, None) for name in _CARRIED}
        history = kwargs.pop(PACKED, None)
        options = {} if transformer_options is None else transformer_options
        network = executor.class_obj
        if history is None and any(value is not None for value in told.values()):
            history = self.history(network, x, told, options)
        if history is not None:
            _check_alone(network, time_dim_concat, kwargs)
            options = with_features(options, history.features_BPE, x, slice(_tokens_of(x)))
            options = _Behind(history).options(options, len(network.blocks))
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def history(self, network: WanModel, x: Tensor, told: Mapping, options: Mapping) -> _History:
        """Everything that stands behind a window like `x [B, C, T, H, W]`. told: as in `_CARRIED`."""
        _check_network(network, type(network).__name__)
        latents, layout, tokens, positions, features = (told[name] for name in _CARRIED)
        latents = latents or []
        if latents and self.patchifiers is None:
            raise ValueError("This Wan model was given frames of history and has no patchifiers for them.")
        if layout is not None:
            layout.check(latents, x)
        frames = tuple(latent.shape[2] for latent in latents)
        return _History(
            self._tokens(network.dim, x, latents, layout, tokens),
            _phases(_placer(network, _stretch(options)), x, layout, frames, positions),
            layout is not None,
            _clean_row(network, x),
            None if features is None else features.to(x),
        )

    def _tokens(self, width: int, x: Tensor, latents, layout: ContextLayout | None, tokens: Tensor | None) -> Tensor:
        """`[B, M, D]`: frame preservation, then context groups."""
        parts = [x.new_empty((x.shape[0], 0, width))] + ([] if tokens is None else [tokens])
        for latent, (rate, _) in zip(latents, layout.groups if layout is not None else (), strict=True):
            clean = pad_to_patch_size(latent.to(x), _PATCH)
            parts.append(self.patchifiers(clean, rate))  # pyright: ignore[reportOptionalCall]
        return torch.cat([part.to(x).expand(x.shape[0], -1, -1) for part in parts], dim=1)


@dataclass
class _Behind:
    """The history around the blocks of one forward pass."""

    history: _History
    _made: dict = field(default_factory=dict)  # last modulation and table, since every block gets the same ones

    def options(self, options: dict, blocks: int) -> dict:
        """`transformer_options` whose blocks see the history; what others had put there runs as before, inside."""
        known = options.get("patches_replace", {})
        dit = dict(known.get("dit", {}))
        for index in range(blocks):
            name = ("double_block", index)
            dit[name] = self._block(index == 0, index == blocks - 1, dit.get(name))
        return {**options, BEHIND: self.history.tokens_BMD.shape[1], "patches_replace": {**known, "dit": dit}}

    def _block(self, first: bool, last: bool, theirs: Callable | None) -> Callable:
        count = self.history.tokens_BMD.shape[1]

        def replaced(args: dict, extra: dict) -> dict:
            img = torch.cat((args["img"], self.history.tokens_BMD), dim=1) if first else args["img"]
            window = img.shape[1] - count
            args = {**args, "img": img, "vec": self._rows(args["vec"], window), "pe": self._table(args["pe"])}
            out = extra["original_block"](args) if theirs is None else theirs(args, extra)
            return {**out, "img": out["img"][:, :window]} if last else out

        return replaced

    def _rows(self, vec_BR6D: Tensor, window: int) -> Tensor:
        behind = self.history.tokens_BMD.shape[1]
        return self._last("vec", vec_BR6D, lambda: modulation_rows(vec_BR6D, self.history.clean_116D, window, behind))

    def _table(self, pe: Tensor) -> Tensor:
        own = self.history.pe
        return own if self.history.placed else self._last("pe", pe, lambda: torch.cat((pe, own), 1))

    def _last(self, name: str, source: Tensor, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._made or self._made[name][0] is not source:
            self._made[name] = (source, make())
        return self._made[name][1]


def modulation_rows(vec_BRKD: Tensor, clean_11KD: Tensor, window: int, behind: int) -> Tensor:
    """Rows that core's `repeat_e` spreads so that the `window` tokens get `vec` and `behind` tokens after them `clean`.

    Core gives each of n rows a run of N // n tokens, or of one more, cut at the end, where that does not divide. So the
    run has to divide what one row of the window holds. Any run up to the root of N is one that core makes of just more
    rows than N tokens need (but that of 2: core takes 1 for none). So the choice hangs on the window alone, and one
    graph of torch.compile serves any history. 'Wan, 81 frames' on 14B in bf16: 13 MiB at 832x480 and 16 MiB at 672x992,
    where a row a token would take 2.0 and 3.4 GiB.
    """
    if not behind:
        return vec_BRKD
    each = -(-window // vec_BRKD.shape[1])
    runs = range(int(window**0.5), 2, -1) if window % vec_BRKD.shape[1] == 0 else ()
    run = next((run for run in runs if each % run == 0), 1)
    own = vec_BRKD.repeat_interleave(each // run, dim=1)[:, : window // run]
    return torch.cat((own, clean_11KD.expand(vec_BRKD.shape[0], behind // run + 1, -1, -1)), dim=1)


def _clean_row(network: WanModel, x: Tensor) -> Tensor:
    """The modulation `[1, 1, 6, D]` of timestep 0, by core's own layers."""
    zero = x.new_zeros(1, dtype=torch.float32)
    vec = network.time_embedding(sinusoidal_embedding_1d(network.freq_dim, zero).to(x.dtype))
    return network.time_projection(vec).unflatten(1, (6, network.dim))[:, None]


def _stretch(options: Mapping) -> Mapping:
    """How core stretches and shifts the positions of the window."""
    return options.get("rope_options") or {}


def _grid(x_BCTHW: Tensor) -> tuple[int, int]:
    """Rows and columns of a window's patches."""
    return -(-x_BCTHW.shape[3] // 2), -(-x_BCTHW.shape[4] // 2)


def _tokens_of(x_BCTHW: Tensor) -> int:
    """How many tokens a window is."""
    return x_BCTHW.shape[2] * math.prod(_grid(x_BCTHW))


def _placer(network: WanModel, stretch: Mapping) -> Callable[[Tensor], Tensor]:
    """Core's rotary table for positions `[1, N, 3]`, stretched as `rope_options` stretch the window."""

    def place(ids: Tensor) -> Tensor:
        scale = ids.new_tensor([stretch.get(f"scale_{axis}", 1.0) for axis in "tyx"])
        shift = ids.new_tensor([stretch.get(f"shift_{axis}", 0.0) for axis in "tyx"])
        return network.rope_embedder(ids * scale + shift)

    return place


def _phases(place, x: Tensor, layout: ContextLayout | None, frames: tuple[int, ...], positions) -> Tensor:
    """Rotary table `[1, N, 1, F, 2, 2]`: the window where a layout places it, frame preservation, context groups."""
    parts = [] if positions is None else [place(positions.to(x.device, torch.float32)[None])[0, 0]]
    if layout is not None:
        table, own = packed_rope(place, layout, frames, *_grid(x), x.device)[0, 0], _tokens_of(x)
        parts = [table[len(table) - own :], *parts, table[: len(table) - own]]
    return torch.cat(parts)[None, :, None]


def _begin(executor, model, noise_shape, conds, *args, **kwargs):
    """Core's `PREPARE_SAMPLING` wrapper: room for the history, and a place to keep what no step of this run changes.

    The history counts as more frames; core uses the shape for its estimate alone.
    """
    kept: dict[tuple, AloneConstant] = {}
    conds = {name: [_keeping(entry, kept) for entry in entries] for name, entries in conds.items()}
    cells = max((_cells(entry.get("model_conds", {})) for entries in conds.values() for entry in entries), default=0)
    area = math.prod(noise_shape[3:])
    shape = [*noise_shape[:2], noise_shape[2] + -(-cells // area), *noise_shape[3:]]
    return executor(model, shape if cells else noise_shape, conds, *args, **kwargs)


def _keeping(entry: Mapping, kept: dict[tuple, AloneConstant]) -> Mapping:
    """A prompt's entry with a `Once`, one for all that carry the same history; without where weights may change."""
    carried = entry.get("model_conds", {})
    if not any(name in carried for name in _CARRIED) or entry.get("hooks") is not None:
        return entry
    once = kept.setdefault(tuple(id(carried.get(name)) for name in _CARRIED), AloneConstant(Once()))
    return {**entry, "model_conds": {**carried, ONCE: once}}


def _cells(model_conds: Mapping) -> int:
    """Latent pixels at the window's rate that the history of one prompt costs."""
    cells = 0
    if TOKENS in model_conds:
        cells += math.prod(_PATCH) * model_conds[TOKENS].cond.shape[1]
    if CONTEXT in model_conds:
        groups = model_conds[LAYOUT].cond.groups
        for latent, (rate, _) in zip(model_conds[CONTEXT].cond, groups, strict=True):
            volume = rate**3 if isinstance(rate, int) else math.prod(KERNEL_OF_RATE[4])
            cells += math.ceil(math.prod(latent.shape[2:]) / volume)
    return cells


def _check_network(network, name: str) -> None:
    plain = isinstance(network, WanModel) and all(
        getattr(type(network), method) is getattr(WanModel, method) for method in ("_forward", "forward_orig")
    )
    if not plain:
        raise ValueError(
            f"The MODEL is {name}. Expected Wan 2.1 or 2.2, text-to-video or image-to-video (not VACE, Camera, S2V, "
            "HuMo, Animate, SCAIL or causal ones, which core runs by forward passes of their own). Load such a model "
            "in 'Load Diffusion Model'."
        )
    if network.in_dim - network.out_dim not in (0, network.out_dim + _MASK) or tuple(network.patch_size) != _PATCH:
        raise ValueError(
            f"This Wan model reads {network.in_dim} channels and makes {network.out_dim}. Expected as many "
            f"(text-to-video, 2.2 5B) or {2 * network.out_dim + _MASK} (image-to-video): what a Fun model has beside "
            "them is not known for frames of history. Load another model in 'Load Diffusion Model'."
        )


def _check_alone(network: WanModel, time_dim_concat, kwargs: Mapping) -> None:
    """Whatever else core puts among the window's tokens has no place on the time axis of the history."""
    others = {"time_dim_concat": time_dim_concat, "context_latents": kwargs.get("context_latents")}
    if network.ref_conv is not None:
        others["reference_latent"] = kwargs.get("reference_latent")
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"The prompt carries '{name}' beside frames of history, and a model cannot take both. Take out the "
                "node that adds it, or the 'FRAME_MEMORY' and 'FRAME_CONTEXT' of 'Anti-Drift Sampler'."
            )
