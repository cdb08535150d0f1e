"""Oracles and makers for the video tests, written from the reference and not from the code under test."""

from pathlib import Path

import torch


def shipped_vae(name: str):
    """A VAE that ships with the pack, as the stock VAELoader makes it: with the file's metadata beside the patcher."""
    import comfy.sd
    import comfy.utils

    file = str(Path(__file__).resolve().parents[2] / "selftest_models" / "vae" / f"{name}.safetensors")
    weights, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
    vae = comfy.sd.VAE(sd=weights, metadata=metadata)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (file, metadata, None))
    return vae


def wan_state_dict(dim: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of core's WanVAE class, scaled so that colours neither vanish nor saturate."""
    from comfy.ldm.wan.vae import WanVAE

    model = WanVAE(dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, value in model.state_dict().items():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
        if key.endswith("gamma"):
            weights[key] = torch.ones_like(value)
        else:
            weights[key] = torch.randn(value.shape, generator=generator) * (fan_in**-0.5 if value.ndim > 1 else 0.1)
    return weights


def generation_order_windows(order: str, sections: int) -> list[tuple[int, int]]:
    """Latent ranges in the order in which the published code decodes them, by hand from framepack.md 3.1 and 3.2."""
    if order == "forward":
        # First everything there is (the start frame and 9), then the newest 18.
        return [(0, 10)] + [(9 * k + 10 - 18, 9 * k + 10) for k in range(1, sections)]
    total = 9 * sections + 1
    if sections == 1:
        return [(0, 10)]
    # The end of the video first: 9 latents, then the 18 at the front of what exists, 19 with the start frame.
    middle = [(total - 9 * (k + 1), total - 9 * (k + 1) + 18) for k in range(1, sections - 1)]
    return [(total - 9, total), *middle, (0, 19)]


def soft_append(first: torch.Tensor, second: torch.Tensor, overlap: int) -> torch.Tensor:
    """The reference's crossfade on whole [T,H,W,C] tensors: weight 1 to 0 on the tail of the first."""
    weight = torch.linspace(1, 0, overlap).reshape(-1, 1, 1, 1)
    mixed = weight * first[-overlap:] + (1 - weight) * second[:overlap]
    return torch.cat([first[:-overlap], mixed, second[overlap:]])


def reference_video(decode, latents: torch.Tensor, order: str, sections: int) -> torch.Tensor:
    """Naive twin of decode_stream: the whole video as one tensor, grown in generation order."""
    video = None
    for start, stop in generation_order_windows(order, sections):
        current = decode(latents[:, :, start:stop])[0].float()
        if video is None:
            video = current
        elif order == "forward":
            video = soft_append(video, current, 33)
        else:
            video = soft_append(current, video, 33)
    return video
