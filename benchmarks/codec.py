"""A linear video codec: 4x8x8 pixel blocks to 16 numbers by principal components.

It is the teacher of the shipped autoencoder: the video model trains on its latents while the autoencoder learns to
make and to read them. Latents are in model space (unit variance over all); the autoencoder's own are larger by
1 / `LATENT_SCALE`, as core's HunyuanVideo latent format expects.

Shape legend: T pixel frames (4n + 1), t latent frames (n + 1), H W pixels, h w latent pixels (H / 8, W / 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = 16
LATENT_SCALE = 0.476986
WHITEN = 0.5


def blocks(video_THWC: Tensor) -> Tensor:
    """Cut `[4n+1, H, W, 3]` into `[n+1, h, w, 768]`; the first frame stands for four of itself."""
    video = torch.cat([video_THWC[:1].expand(4, -1, -1, -1), video_THWC[1:]])
    t, h, w = video.shape[0] // 4, video.shape[1] // 8, video.shape[2] // 8
    return video.reshape(t, 4, h, 8, w, 8, 3).permute(0, 2, 4, 1, 3, 5, 6).reshape(t, h, w, -1)


@dataclass(frozen=True)
class LinearCodec:
    """`mean [768]`, `encoder [768, 16]`, `decoder [16, 768]`."""

    mean: Tensor
    encoder: Tensor
    decoder: Tensor

    @classmethod
    def fit(cls, samples_N768: Tensor) -> LinearCodec:
        """Principal components, partly whitened so that fine detail is not drowned by noise."""
        mean = samples_N768.mean(0)
        centred = (samples_N768 - mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        values, vectors = values.flip(0)[:CHANNELS].clamp_min(1e-12), vectors.flip(1)[:, :CHANNELS]
        gain = values.pow(-WHITEN / 2)
        gain = gain / (values * gain.square()).mean().sqrt()
        return cls(mean, (vectors * gain).float(), (vectors / gain).T.float())

    def encode(self, video_THWC: Tensor) -> Tensor:
        """Video 0..1 to latents `[16, t, h, w]`."""
        return ((blocks(video_THWC) - self.mean) @ self.encoder).permute(3, 0, 1, 2)

    def decode(self, latent_CtHW: Tensor) -> Tensor:
        """Latents `[16, t, h, w]` to video `[4t - 3, H, W, 3]`."""
        x = latent_CtHW.permute(1, 2, 3, 0) @ self.decoder + self.mean
        t, h, w = x.shape[:3]
        video = x.reshape(t, h, w, 4, 8, 8, 3).permute(0, 3, 1, 4, 2, 5, 6).reshape(t * 4, h * 8, w * 8, 3)
        return torch.cat([video[:4].mean(0, keepdim=True), video[4:]]).clamp(0, 1)
