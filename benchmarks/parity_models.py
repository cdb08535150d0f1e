"""Small networks of FramePack's true topology with random weights, in diffusers' class and in ours.

Both hold the same numbers: diffusers' state dict goes through this pack's key map. Shape legend: B batch,
C latent channels, T latent frames, H W latent height and width, L text tokens, N image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import comfy.model_detection
import comfy.ops
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from frame_memory.model.key_map import convert_diffusers
from frame_memory.model.once import Once
from frame_memory.model.packing import ContextLayout
from frame_memory.model.transformer import FramePackTransformer

CHANNELS = 16
TEXT_FEATURES, POOLED_FEATURES, IMAGE_FEATURES = 4096, 768, 1152


def reference_config(heads: int = 2, double: int = 2, single: int = 2, text_features: int = TEXT_FEATURES) -> dict:
    """diffusers' configuration of the published checkpoints at another width and depth."""
    return {
        "num_attention_heads": heads, "attention_head_dim": 128, "num_layers": double, "num_single_layers": single,
        "num_refiner_layers": 2, "text_embed_dim": text_features, "pooled_projection_dim": POOLED_FEATURES,
        "has_image_proj": True, "image_proj_dim": IMAGE_FEATURES, "has_clean_x_embedder": True,
    }  # fmt: skip


def make_reference(
    seed: int = 0, device="cpu", dtype=torch.float32, **config
) -> HunyuanVideoFramepackTransformer3DModel:
    """diffusers' network with every parameter random, norms and biases too, so that no swap hides."""
    with torch.device(device):
        model = HunyuanVideoFramepackTransformer3DModel(**reference_config(**config)).eval()
    randomise(model.to(dtype), seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Replace all parameters in place: matrices by N(0, 1/fan_in), gains by 1 + N(0, 0.1), biases by N(0, 0.1)."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator, device=param.device)
            if param.ndim > 1:
                param.copy_(noise / param[0].numel() ** 0.5)
            else:
                param.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def make_ours(
    state_dict: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, device="cpu"
) -> FramePackTransformer:
    """Our network with diffusers' numbers, as core's detection would configure it, in one plain dtype."""
    return _made(convert_diffusers(state_dict), dtype, device, comfy.ops.disable_weight_init)


def make_quantised(
    native: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, device="cpu", disabled: Iterable[str] = ()
) -> FramePackTransformer:
    """Our network as core builds it for tensors with marks. disabled: formats that a device does not multiply in."""
    return _made(native, dtype, device, comfy.ops.mixed_precision_ops({}, dtype, disabled=tuple(disabled)))


def _made(native: dict[str, torch.Tensor], dtype: torch.dtype, device, operations) -> FramePackTransformer:
    config = comfy.model_detection.detect_unet_config(native, "")
    ours = FramePackTransformer(dtype=dtype, device=device, operations=operations, **config).eval()
    ours.load_state_dict(native)
    return ours


@dataclass(frozen=True)
class Inputs:
    """One forward pass: noisy window, conditioning and the three context groups, in model space.

    groups: `(rate, positions)` in token order (4x, 2x, 1x); context: a latent `[B, C, T_g, H, W]` for each.
    text_lengths: valid text tokens of each sample; what lies beyond them in `text_BLD` is rubbish on purpose.
    """

    window_BCTHW: torch.Tensor
    timestep_B: torch.Tensor
    text_BLD: torch.Tensor
    text_lengths: tuple[int, ...]
    pooled_BD: torch.Tensor
    image_BND: torch.Tensor
    guidance: float
    positions: tuple[int, ...]
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    context: tuple[torch.Tensor, ...]

    def mask_BL(self) -> torch.Tensor:
        """True on valid text tokens."""
        place = self.text_BLD.device
        lengths = torch.tensor(self.text_lengths, device=place)
        return torch.arange(self.text_BLD.shape[1], device=place)[None] < lengths[:, None]

    def merged(self) -> dict[int, tuple[tuple[int, ...], torch.Tensor]]:
        """Positions and latents by rate: groups of one rate side by side, as diffusers takes them."""
        out = {}
        for rate in dict.fromkeys(rate for rate, _ in self.groups):
            picked = [(p, c) for (r, p), c in zip(self.groups, self.context, strict=True) if r == rate]
            positions = tuple(i for p, _ in picked for i in p)
            out[rate] = (positions, torch.cat([c for _, c in picked], dim=2))
        return out


def make_inputs(
    height: int, width: int, positions, groups, *, batch: int = 1, seed: int = 0, text_lengths=(37,), image_tokens=729,
    text_features: int = TEXT_FEATURES, sigma: float = 0.7313, guidance: float = 10.0,
) -> Inputs:  # fmt: skip
    """Random inputs of a section. height, width: latent pixels. All fp32, from one generator."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    longest = max(text_lengths) + 5
    return Inputs(
        window_BCTHW=randn(batch, CHANNELS, len(positions), height, width),
        timestep_B=torch.full((batch,), sigma * 1000.0),
        text_BLD=randn(batch, longest, text_features),
        text_lengths=tuple(text_lengths[i % len(text_lengths)] for i in range(batch)),
        pooled_BD=randn(batch, POOLED_FEATURES),
        image_BND=randn(batch, image_tokens, IMAGE_FEATURES),
        guidance=guidance,
        positions=tuple(positions),
        groups=tuple((rate, tuple(p)) for rate, p in groups),
        context=tuple(randn(batch, CHANNELS, len(p), height, width) for _, p in groups),
    )


def moved(inputs: Inputs, device) -> Inputs:
    """The same inputs on a device."""

    def there(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(there(v) for v in value) if isinstance(value, tuple) else value

    return replace(inputs, **{field.name: there(getattr(inputs, field.name)) for field in fields(inputs)})


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Time and guidance as the checkpoint sees them: rounded to the network's dtype (reference/framepack.md 1)."""
    return value.to(dtype).float()


@torch.no_grad()
def run_reference(model, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """Velocity `[B, C, T, H, W]` by a network with diffusers' call; text padded, with a mask."""
    by_rate = inputs.merged()
    index = {rate: torch.tensor([p]) for rate, (p, _) in by_rate.items()}
    latent = {rate: c.to(dtype) for rate, (_, c) in by_rate.items()}
    batch = inputs.window_BCTHW.shape[0]
    out = model(
        hidden_states=inputs.window_BCTHW.to(dtype),
        timestep=rounded(inputs.timestep_B, dtype) if dtype != torch.float64 else inputs.timestep_B,
        encoder_hidden_states=inputs.text_BLD.to(dtype),
        encoder_attention_mask=inputs.mask_BL(),
        pooled_projections=inputs.pooled_BD.to(dtype),
        image_embeds=inputs.image_BND.to(dtype),
        indices_latents=torch.tensor(inputs.positions),
        guidance=rounded(torch.full((batch,), inputs.guidance * 1000.0), dtype),
        latents_clean=latent[1], indices_latents_clean=index[1][0],
        latents_history_2x=latent[2], indices_latents_history_2x=index[2][0],
        latents_history_4x=latent[4], indices_latents_history_4x=index[4][0],
        return_dict=False,
    )  # fmt: skip
    return out[0]


@torch.no_grad()
def run_ours(
    model: FramePackTransformer, inputs: Inputs, dtype: torch.dtype, once: Once | None = None, **more
) -> torch.Tensor:
    """Velocity `[B, C, T, H, W]` by our network: core's call, with a mask where text is padded.

    once: of a section's prompt.
    """
    padded = min(inputs.text_lengths) < inputs.text_BLD.shape[1]
    window, text = inputs.window_BCTHW.to(dtype), inputs.text_BLD.to(dtype)
    given = {
        "clip_fea": inputs.image_BND.to(dtype),
        "attention_mask": inputs.mask_BL() if padded else None,
        "context_latents": [c.to(dtype) for c in inputs.context],
        "context_layout": ContextLayout(positions=inputs.positions, groups=inputs.groups),
        **more,
    }
    return model(
        window,
        inputs.timestep_B,
        text,
        y=inputs.pooled_BD.to(dtype),
        guidance=window.new_full((window.shape[0],), inputs.guidance),
        packed=None if once is None else model.pack_once(once, window, text, **given),
        **given,
    )


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over RMS of the truth, in fp64."""
    value, truth = value.double(), truth.double()
    return ((value - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt()).item()


def as_bf16_sees(inputs: Inputs) -> Inputs:
    """The same inputs with time and guidance rounded as a bf16 network rounds them (10.0 is seen as 9.984)."""
    guidance = torch.tensor(inputs.guidance * 1000.0).to(torch.bfloat16).item() / 1000.0
    return replace(inputs, timestep_B=rounded(inputs.timestep_B, torch.bfloat16), guidance=guidance)


def sample(inputs: Inputs, i: int) -> Inputs:
    """One sample of a batch."""
    return replace(
        inputs,
        window_BCTHW=inputs.window_BCTHW[i : i + 1],
        timestep_B=inputs.timestep_B[i : i + 1],
        text_BLD=inputs.text_BLD[i : i + 1],
        text_lengths=inputs.text_lengths[i : i + 1],
        pooled_BD=inputs.pooled_BD[i : i + 1],
        image_BND=inputs.image_BND[i : i + 1],
        context=tuple(c[i : i + 1] for c in inputs.context),
    )
