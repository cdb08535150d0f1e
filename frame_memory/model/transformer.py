"""The FramePack transformer: core's HunyuanVideo with a packed history in front of the noisy window.

Shape legend: B batch, C latent channels, T latent frames, H W latent height and width, L text tokens,
N packed tokens, D hidden size.
Source: reference/framepack.md sections 1 and 2.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from torch import Tensor

from ..kernels.rounding import rounded_to
from .cross_attention import with_features
from .once import Once, vary
from .packing import CleanEmbedder, ContextLayout, ImageProjection, packed_rope

IMAGE_FEATURES = 1152
# Inputs that `pack` takes beside window and text.
TO_PACK = (
    "attention_mask", "clip_fea", "context_latents", "context_layout", "memory_tokens", "frame_memory_tokens",
    "frame_memory_positions", "frame_memory_features",
)  # fmt: skip
FROM_IMAGE_NODE = (
    "Take out the node 'HunyuanImageToVideo': FramePack gets its start picture from 'FramePack Image', as the 'start' "
    "of 'Anti-Drift Sampler'."
)
FROM_TEXT_ENCODER = "Set 'type' in 'DualCLIPLoader' to hunyuan_video, with clip_l and llava_llama3."


class Packed(NamedTuple):
    """What no step of a section changes, of the whole batch or of one sample.

    samples: which of the batch. length: how many tokens of the text are valid, None for all. image_BND: the picture's
    tokens. memory_BMD: SemanticPack's. frames_BPD: frame preservation's, and features_BPE for cross-attention.
    history_BND: the context groups'. Each is None where there is none. pe: rotary table of the whole sequence.
    """

    samples: slice
    length: int | None
    image_BND: Tensor | None
    memory_BMD: Tensor | None
    frames_BPD: Tensor | None
    features_BPE: Tensor | None
    history_BND: Tensor | None
    pe: Tensor


class FramePackTransformer(HunyuanVideo):
    """Core's HunyuanVideo blocks over [image, memory, text | 4x, 2x, 1x context, noisy window]."""

    def __init__(self, dtype=None, device=None, operations=None, **kwargs):
        super().__init__(dtype=dtype, device=device, operations=operations, **kwargs)
        made = {"dtype": dtype, "device": device, "operations": operations}
        self.clean_x_embedder = CleanEmbedder(self.in_channels, self.hidden_size, **made)
        self.image_projection = ImageProjection(IMAGE_FEATURES, self.hidden_size, **made)

    def pack(
        self,
        x: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        clip_fea: Tensor | None = None,
        context_latents: list[Tensor] | None = None,
        context_layout: ContextLayout | None = None,
        memory_tokens: Tensor | None = None,
        frame_memory_tokens: Tensor | None = None,
        frame_memory_positions: Tensor | None = None,
        frame_memory_features: Tensor | None = None,
        **_,
    ) -> tuple[Packed, ...]:
        """What no step of a section changes, from the inputs of `_forward`, for a window like `x`.

        One for the batch, or one a sample where the text has padding: that must never meet real tokens, and core's
        refiner pools over whatever it is given (reference/framepack.md 2.5 M3). Raises ValueError without a context or
        memory tokens, and where these do not fit the window.
        """
        latents = context_latents or []
        layout = _needed(latents, context_layout, frame_memory_tokens)
        layout.check(latents, x)
        tokens = (memory_tokens, frame_memory_tokens, frame_memory_features)  # from an encoder, in RAM
        given = (clip_fea, *(None if part is None else part.to(x) for part in tokens), *latents)

        def one(samples: slice, length: int | None) -> Packed:
            image, memory, frames, features, *context_groups = (_of(samples, value) for value in given)
            image = None if image is None else self.image_projection(image.to(x))
            before = sum(part.shape[1] for part in (image, memory) if part is not None)
            text = before + (context.shape[1] if length is None else length)
            pe = self._positions(layout, latents, _grid(x), text, x.device, frame_memory_positions)
            history = self._history(x, layout, context_groups)
            return Packed(samples, length, image, memory, frames, features, history, pe)

        lengths = _valid_lengths(attention_mask)
        if lengths is None:
            return (one(slice(None), None),)
        return tuple(one(slice(i, i + 1), length) for i, length in enumerate(lengths))

    def pack_once(self, once: Once[tuple[Packed, ...]], x: Tensor, context: Tensor, **given) -> tuple[Packed, ...]:
        """What `pack` makes, in the first step of a section. once: of this prompt. given: as the inputs of `pack`."""
        made_for = (x.device, x.dtype, x.shape, given.get("context_layout"))
        packed = once(made_for, partial(self.pack, x, context, **given))
        for one in packed:
            if one.frames_BPD is not None:
                vary((one.frames_BPD, 1), (one.features_BPE, 1), (one.pe, 2))
        return packed

    def _history(self, x: Tensor, layout: ContextLayout, latents) -> Tensor | None:
        """Tokens `[B, N, D]` of the context groups, None where there are none."""
        padded = [pad_to_patch_size(c.to(x), (1, 2, 2), padding_mode="replicate") for c in latents]
        tokens = [self.clean_x_embedder(c, rate) for c, (rate, _) in zip(padded, layout.groups, strict=True)]
        return torch.cat(tokens, dim=1) if tokens else None

    def _forward(
        self,
        x,
        timestep,
        context,
        y=None,
        txt_byt5=None,
        clip_fea=None,
        guidance=None,
        attention_mask=None,
        guiding_frame_index=None,
        ref_latent=None,
        disable_time_r=False,
        control=None,
        transformer_options={},  # noqa: B006 (core's signature; copied before use)
        packed: tuple[Packed, ...] | None = None,
        **kwargs,
    ) -> Tensor:
        """Predict the velocity of `x [B, C, T, H, W]`.

        timestep: sigma * 1000, `[B]`. context: text `[B, L, ·]`; clip_fea: CLIP-vision tokens `[B, ·, 1152]`.
        Of kwargs, context_latents: one model-space tensor `[B, C, T_g, H, W]` for each group of `context_layout`.
        memory_tokens: `[B, M, D]`, what SemanticPack hands out, put between image and text (no rotary position).
        frame_memory_tokens: `[B, P, D]` of frame preservation, clean and in front of the context, at
        frame_memory_positions `[P, 3]`: latent frame, row and column of patches (pfp reference 2.4), with
        frame_memory_features `[B, ·, E]` for cross-attention. packed: what `pack` has made of all these, in their
        place. Raises ValueError as `pack` does, and for foreign conditioning.
        """
        _check_stock(txt_byt5, guiding_frame_index, ref_latent)
        if packed is None:
            packed = self.pack(x, context, attention_mask, clip_fea, **kwargs)
        given = (x, timestep, context, y, guidance)
        run = partial(self._velocity, control=control, transformer_options=transformer_options)
        made = [run(one, *(_of(one.samples, value) for value in given)) for one in packed]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _velocity(self, packed: Packed, x, timestep, context, y, guidance, control, transformer_options) -> Tensor:
        padded = pad_to_patch_size(x, self.patch_size, padding_mode="replicate")
        vec, rounded_time = self._modulation_vector(timestep, y, guidance, x.dtype)
        txt = self.txt_in(context[:, : packed.length], rounded_time, None, transformer_options=transformer_options)
        front = (packed.image_BND, packed.memory_BMD, txt)
        txt = torch.cat([t.to(txt.dtype) for t in front if t is not None], dim=1)
        window = self.img_in(padded)
        last, frames = slice(-window.shape[1], None), packed.frames_BPD
        parts = (None if frames is None else frames.to(window), packed.history_BND, window)
        img = torch.cat([part for part in parts if part is not None], dim=1)
        rows, clean = self._rows(vec, frames, timestep, y, guidance)
        options = with_features(transformer_options, packed.features_BPE, window, last)
        img = self._run_blocks(img, txt, rows, packed.pe, clean, window.shape[1], control, options)
        return self._pixels(self.final_layer(img[:, last], vec), _grid(x))[..., : x.shape[3], : x.shape[4]]

    def _pixels(self, out_BNK: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens of the window back to `[B, C, T, H, W]`."""
        out = out_BNK.unflatten(1, grid).unflatten(-1, (self.out_channels, 2, 2))
        return out.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def _modulation_vector(self, timestep: Tensor, y: Tensor, guidance: Tensor | None, dtype) -> tuple[Tensor, Tensor]:
        # The checkpoint saw both rounded (reference/framepack.md 1, M2). Core casts guidance, our training does not.
        rounded_time = rounded_to(timestep, dtype)
        vec = self.time_in(timestep_embedding(rounded_time, 256, time_factor=1.0).to(dtype))
        vec = vec + self.vector_in(y[:, : self.params.vec_in_dim])
        if guidance is not None:
            rounded_guidance = rounded_to(1000.0 * guidance.float(), guidance.dtype)
            vec = vec + self.guidance_in(timestep_embedding(rounded_guidance, 256, time_factor=1.0).to(dtype))
        return vec, rounded_time

    def _rows(self, vec: Tensor, frame_memory_tokens, timestep, y, guidance) -> tuple[Tensor, int]:
        """Modulation `[B, 2, D]` and how many tokens in front have its first row, of noise level zero; else vec, 0."""
        if frame_memory_tokens is None or not frame_memory_tokens.shape[1]:
            return vec, 0
        clean, _ = self._modulation_vector(torch.zeros_like(timestep), y, guidance, vec.dtype)
        return torch.stack((clean, vec), dim=1), frame_memory_tokens.shape[1]

    def _positions(self, layout: ContextLayout, latents, grid, text_tokens: int, device, places=None) -> Tensor:
        """Rotary table of the whole sequence; nothing on the text side is turned."""
        frames = tuple(latent.shape[2] for latent in latents)
        pe = packed_rope(self.pe_embedder, layout, frames, grid[1], grid[2], device)
        if places is not None:
            pe = torch.cat((self.pe_embedder(places.to(device, torch.float32)[None]), pe), dim=2)
        text_pe = torch.eye(2, device=pe.device, dtype=pe.dtype).expand(1, 1, text_tokens, pe.shape[3], 2, 2)
        return torch.cat((text_pe, pe), dim=2)

    def _run_blocks(self, img, txt, vec, pe, clean: int, window_tokens: int, control, transformer_options) -> Tensor:
        """All double and single blocks; returns the packed image-side tokens `[B, N, D]`.

        clean: tokens in front of img that vec `[B, 2, D]` has its first row for; 0 where vec is `[B, D]`.
        """
        rows = [(0, clean, 0), (clean, None, 1)] if clean else None
        text_rows = [(0, None, 1)] if clean else None
        options = transformer_options.copy()
        replace = options.get("patches_replace", {}).get("dit", {})
        control = control or {}
        options.update(total_blocks=len(self.double_blocks), block_type="double")
        for i, block in enumerate(self.double_blocks):
            options["block_index"] = i
            args = {"img": img, "txt": txt, "vec": vec, "pe": pe, "attention_mask": None, "modulation_dims_img": rows,
                    "modulation_dims_txt": text_rows, "transformer_options": options}  # fmt: skip
            out = _call_block(_double, block, replace.get(("double_block", i)), args)
            img, txt = out["img"], out["txt"]
            _add_control(img, control.get("input"), i, window_tokens)

        start = txt.shape[1]
        img = torch.cat((txt, img), 1)
        rows = [(0, start, 1), (start, start + clean, 0), (start + clean, None, 1)] if clean else None
        options.update(total_blocks=len(self.single_blocks), block_type="single", img_slice=[start, img.shape[1]])
        for i, block in enumerate(self.single_blocks):
            options["block_index"] = i
            args = {"img": img, "vec": vec, "pe": pe, "attention_mask": None, "modulation_dims": rows,
                    "transformer_options": options}  # fmt: skip
            img = _call_block(_single, block, replace.get(("single_block", i)), args)["img"]
            _add_control(img, control.get("output"), i, window_tokens)
        return img[:, start:]


def _of(samples: slice, value: Tensor | None) -> Tensor | None:
    """Some samples of an input with a row a sample."""
    return None if value is None else value[samples]


def _grid(x_BCTHW: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of a window's patches."""
    return x_BCTHW.shape[2], -(-x_BCTHW.shape[3] // 2), -(-x_BCTHW.shape[4] // 2)


def _needed(context_latents, context_layout: ContextLayout | None, tokens: Tensor | None) -> ContextLayout:
    """The layout, which a model of history cannot do without; its groups may be none behind tokens of a memory."""
    if context_layout is None or not (context_latents or (tokens is not None and tokens.shape[1])):
        raise ValueError(
            "A FramePack model was sampled without a frame context, so it has no history to look at. "
            "Use 'Anti-Drift Sampler' (it gives each section its context) in place of the plain sampler node."
        )
    return context_layout


def refuse_foreign(**given: tuple[object, str]) -> None:
    """Raise ValueError for conditioning that FramePack has no input for: `name=(value or None, what to change)`."""
    for name, (value, remedy) in given.items():
        if value is not None:
            raise ValueError(f"The prompt carries '{name}', which FramePack was not trained with. {remedy}")


def _check_stock(txt_byt5, guiding_frame_index, ref_latent) -> None:
    refuse_foreign(
        ref_latent=(ref_latent, FROM_IMAGE_NODE),
        guiding_frame_index=(guiding_frame_index, FROM_IMAGE_NODE),
        txt_byt5=(txt_byt5, FROM_TEXT_ENCODER),
    )


def _valid_lengths(attention_mask: Tensor | None) -> list[int] | None:
    """Count of valid text tokens per sample, or None where every token is valid."""
    if attention_mask is None:
        return None
    lengths = [max(int(n), 1) for n in attention_mask.reshape(attention_mask.shape[0], -1).bool().sum(dim=1)]
    return None if all(n == attention_mask.shape[-1] for n in lengths) else lengths


def without_padding(text_BLC: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The tokens `[1, L, C]` of the first prompt that the network is shown."""
    lengths = _valid_lengths(attention_mask)
    return text_BLC[:1] if lengths is None else text_BLC[:1, : lengths[0]]


def _double(block, a: dict) -> dict:
    img, txt = block(img=a["img"], txt=a["txt"], vec=a["vec"], pe=a["pe"], attn_mask=a["attention_mask"],
                     modulation_dims_img=a["modulation_dims_img"], modulation_dims_txt=a["modulation_dims_txt"],
                     transformer_options=a["transformer_options"])  # fmt: skip
    return {"img": img, "txt": txt}


def _single(block, a: dict) -> dict:
    return {
        "img": block(
            a["img"],
            vec=a["vec"],
            pe=a["pe"],
            attn_mask=a["attention_mask"],
            modulation_dims=a["modulation_dims"],
            transformer_options=a["transformer_options"],
        )
    }


def _call_block(run, block, replacement, args: dict) -> dict:
    """Core's seam for packs that replace a block (`patches_replace["dit"]`)."""
    if replacement is None:
        return run(block, args)
    return replacement(args, {"original_block": lambda a: run(block, a)})


def _add_control(img: Tensor, residuals, i: int, window_tokens: int) -> None:
    if residuals is not None and i < len(residuals) and residuals[i] is not None:
        img[:, -window_tokens:] += residuals[i]
