"""FramePack as a core model: detection, conditioning contract and memory estimate.

Source: reference/comfyui-host.md section 2, reference/framepack.md section 2.4.
"""

from __future__ import annotations

import math

import comfy.conds
import comfy.supported_models
import torch
from comfy import model_base

from ..plan.mark import SELFTESTS
from .once import Once
from .packing import ContextLayout
from .provenance import MODEL_OPTION
from .transformer import FROM_IMAGE_NODE, FROM_TEXT_ENCODER, TO_PACK, FramePackTransformer, refuse_foreign

DEFAULT_GUIDANCE = 10.0
FRAME_CONTEXT_KEY = "frame_context"
# In a prompt's entry: the memory's tokens `[B, M, D]` for one section.
MEMORY_KEY = "memory_tokens"
# Among a prompt's `model_conds`, of every family: tokens of frame preservation, where they stand, and the features that
# cross-attention reads.
FRAME_TOKENS, FRAME_POSITIONS = "frame_memory_tokens", "frame_memory_positions"
FRAME_FEATURES = "frame_memory_features"
# Latent positions that a token of the window stands for.
_PATCH = 4
# What the model gets of a prompt to keep what no step of the section changes, and what its network then gets of that.
ONCE, PACKED = "once", "packed"
# Under MODEL_OPTION, only where the file says another kind than the one that was chosen: who says which, as words.
CONTRADICTED = "kind_contradicted"


class AloneConstant(comfy.conds.CONDConstant):
    """Keeps core from computing two prompts in one batch.

    Core does so where memory allows at that moment, and a batch differs from one prompt in the last bits: a resumed
    video would not be the uninterrupted one. A window is long enough that a batch would gain nothing.
    """

    def can_concat(self, other) -> bool:
        return False


def token_conditions(tokens: torch.Tensor | None, positions=None, features: torch.Tensor | None = None) -> dict:
    """Tokens of frame preservation as a prompt's `model_conds`, which core hands to the network untouched.

    tokens: `[B, P, D]`, None or none of them for an empty dict. positions: (t, h, w) of each in latent frames and
    patches, on the time axis of the window. features: `[B, P', E]` of a memory with cross-attention. Raises ValueError
    where tokens and positions do not belong together.
    """
    if tokens is None or not tokens.shape[1]:
        return {}
    places = torch.as_tensor(positions, dtype=torch.long).reshape(-1, 3)
    if len(places) != tokens.shape[1]:
        raise ValueError(f"There are {tokens.shape[1]} memory tokens and {len(places)} positions for them.")
    # Whole numbers: core casts others to the model's, and bf16 cannot count beyond 256.
    read = {} if features is None else {FRAME_FEATURES: comfy.conds.CONDRegular(features)}
    return {FRAME_TOKENS: comfy.conds.CONDRegular(tokens), FRAME_POSITIONS: AloneConstant(places), **read}


class FramePack(model_base.HunyuanVideo):
    """Core's HunyuanVideo model whose conditioning also carries the packed history."""

    def __init__(self, model_config, model_type=model_base.ModelType.FLOW, device=None):
        # HunyuanVideo's own constructor fixes the network class; its base takes it as an argument.
        model_base.BaseModel.__init__(self, model_config, model_type, device=device, unet_model=FramePackTransformer)
        self.memory_usage_factor_conds = ("context_latents",)

    def extra_conds(self, **kwargs):
        """Core's conditioning plus `context_latents`, `context_layout`, `memory_tokens` and `clip_fea`.

        Reads `kwargs["frame_context"]`: `{"latents": [B C T H W, ...] in VAE space, "layout": ContextLayout}`,
        `kwargs["memory_tokens"]` (`[B, M, D]`) and `kwargs["clip_vision_output"]` (last hidden state,
        `[B, tokens, 1152]`). Raises ValueError for conditioning of other models that core would drop here without a
        word.
        """
        refuse_foreign(
            concat_latent_image=(kwargs.get("concat_latent_image"), FROM_IMAGE_NODE),
            conditioning_byt5small=(kwargs.get("conditioning_byt5small"), FROM_TEXT_ENCODER),
        )
        kwargs.setdefault("guidance", DEFAULT_GUIDANCE)
        out = super().extra_conds(**kwargs)
        vision = kwargs.get("clip_vision_output")
        if vision is not None:
            out["clip_fea"] = comfy.conds.CONDRegular(vision.last_hidden_state)
        context = kwargs.get(FRAME_CONTEXT_KEY)
        if context is not None:
            latents = [self.process_latent_in(latent) for latent in context["latents"]]
            out["context_latents"] = comfy.conds.CONDList(latents)
            out["context_layout"] = AloneConstant(context["layout"])
            if kwargs.get("hooks") is None:  # these may change the weights between two steps
                out[ONCE] = AloneConstant(Once())
        if kwargs.get(MEMORY_KEY) is not None:
            out[MEMORY_KEY] = comfy.conds.CONDRegular(kwargs[MEMORY_KEY])
        return out

    def apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):  # fmt: skip
        """Core's, behind what no step of the section changes (`once.py`)."""
        once = kwargs.pop(ONCE, None)
        if once is not None:
            given = {name: kwargs.pop(name) for name in TO_PACK if name in kwargs}
            like = x.to(self.get_dtype_inference())
            kwargs[PACKED] = self.diffusion_model.pack_once(once, like, c_crossattn, **given)
        return super().apply_model(x, t, c_concat, c_crossattn, control, transformer_options or {}, **kwargs)

    def extra_conds_shapes(self, **kwargs):
        """The token count of context and memory, said as one latent shape at the window's own rate."""
        context = kwargs.get(FRAME_CONTEXT_KEY)
        if context is None:
            return {}
        latents, layout = context["latents"], context["layout"]
        area = sum(
            math.prod(latent.shape[2:]) / (rate**3 if isinstance(rate, int) else 64)
            for latent, (rate, _) in zip(latents, layout.groups, strict=True)
        )
        memory, frames = kwargs.get(MEMORY_KEY), kwargs.get("model_conds", {}).get(FRAME_TOKENS)
        tokens = (0 if memory is None else memory.shape[1]) + (0 if frames is None else frames.cond.shape[1])
        area = math.ceil(area) + _PATCH * tokens
        batch = frames.cond.shape[0] if not latents else latents[0].shape[0]
        return {"context_latents": [batch, self.latent_format.latent_channels, area]}

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        """Keep the history whole when core's context windows cut the noisy latent; move the positions along."""
        if cond_key in ("context_latents", MEMORY_KEY, FRAME_TOKENS, FRAME_POSITIONS, FRAME_FEATURES, ONCE):
            return cond_value
        if cond_key == "context_layout":
            positions = cond_value.cond.positions
            index = list(window.index_list)
            anchor = getattr(window, "causal_anchor_index", None)
            if anchor is not None and anchor >= 0:
                index = [anchor, *index]
            picked = tuple(positions[i] for i in index)
            return cond_value._copy_with(ContextLayout(positions=picked, groups=cond_value.cond.groups))
        return super().resize_cond_for_context_window(cond_key, cond_value, window, x_in, device, retain_index_list)


class FramePackConfig(comfy.supported_models.HunyuanVideo):
    """Detected by the largest context patchifier, which no other HunyuanVideo file has."""

    required_keys = {"{}clean_x_embedder.proj_4x.weight"}

    def get_model(self, state_dict, prefix="", device=None):
        return FramePack(self, device=device)


def register() -> None:
    """Put FramePack before core's HunyuanVideo in the detection list. Safe to call again."""
    known = comfy.supported_models.models
    if not any(m.__name__ == FramePackConfig.__name__ for m in known):
        known.insert(0, FramePackConfig)


def is_framepack(model_patcher) -> bool:
    """Whether a MODEL holds a network with packed-context weights (by structure, so copies count too)."""
    return has_context_weights(model_patcher.model)


def has_context_weights(model) -> bool:
    """The same of a base model without its patcher."""
    return hasattr(getattr(model, "diffusion_model", None), "clean_x_embedder")


def latent_families(model_patcher) -> tuple[str, ...]:
    """Families of latents that a MODEL can read: the one that 'Load FramePack Model' noted.

    A model from a stock or GGUF loader only says its latent format, which a self-test model shares.
    """
    said = model_patcher.model_options.get(MODEL_OPTION, {}).get("base", "")
    name = type(model_patcher.model.latent_format).__name__
    return (said,) if said else tuple(filter(None, (name, SELFTESTS.get(name))))


def unscaled_blank(model: model_base.BaseModel, shape: tuple[int, ...]) -> torch.Tensor:
    """A missing history frame: zero in model space, given in VAE space `shape` (reference/framepack.md 3.1)."""
    return model.process_latent_out(torch.zeros(shape))
