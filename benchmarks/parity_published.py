"""The published FramePack code, from a checkout that the user names, as one more side of the parity tables.

Nothing of it is part of this repository. Only its network and its sampler are imported. Modules it imports and does
not need here (`accelerate`, `cv2`) are stood in for where they are not installed, in this process alone. Importing it
replaces the forward methods of diffusers' and torch's norms, by its own design. Its attention for batches needs CUDA
kernels, so a batch is run one sample at a time, which its own comments call the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
import types

import torch

from benchmarks import parity_models as pm

NETWORK = "diffusers_helper.models.hunyuan_video_packed"
SAMPLER = "diffusers_helper.k_diffusion.uni_pc_fm"
PIPELINE = "diffusers_helper.pipelines.k_diffusion_hunyuan"
STAND_INS = ("accelerate", "accelerate.accelerator", "cv2")


@dataclasses.dataclass(frozen=True)
class Published:
    """The imported modules of a checkout."""

    network: types.ModuleType
    sampler: types.ModuleType
    pipeline: types.ModuleType

    def make(self, reference: torch.nn.Module) -> torch.nn.Module:
        """Its network with the numbers of diffusers' (the names are the same)."""
        config = {k: v for k, v in reference.config.items() if not k.startswith("_") and k != "image_condition_type"}
        extras = {k: config.pop(k) for k in ("has_image_proj", "has_clean_x_embedder", "image_proj_dim")}
        model = self.network.HunyuanVideoTransformer3DModelPacked(**config)
        # Its own installers write to a configuration that newer diffusers made read-only; these are their effects.
        model.image_projection = self.network.ClipVisionProjection(extras["image_proj_dim"], model.inner_dim)
        model.clean_x_embedder = self.network.HunyuanVideoPatchEmbedForCleanLatents(model.inner_dim)
        model.high_quality_fp32_output_for_inference = False
        model.load_state_dict(reference.state_dict(), strict=True)
        return model.eval()

    def run(self, model: torch.nn.Module, inputs: pm.Inputs, dtype: torch.dtype) -> torch.Tensor:
        """Velocity `[B, C, T, H, W]`, one sample at a time."""
        samples = range(inputs.window_BCTHW.shape[0])
        return torch.cat([self._run_one(model, pm.sample(inputs, i), dtype) for i in samples])

    @torch.no_grad()
    def _run_one(self, model, inputs: pm.Inputs, dtype: torch.dtype) -> torch.Tensor:
        by_rate = inputs.merged()
        index = {rate: torch.tensor([p]) for rate, (p, _) in by_rate.items()}
        latent = {rate: c.to(dtype) for rate, (_, c) in by_rate.items()}
        guidance = torch.tensor([inputs.guidance * 1000.0])
        return model(
            hidden_states=inputs.window_BCTHW.to(dtype),
            timestep=inputs.timestep_B.to(dtype),
            encoder_hidden_states=inputs.text_BLD.to(dtype),
            encoder_attention_mask=inputs.mask_BL(),
            pooled_projections=inputs.pooled_BD.to(dtype),
            guidance=guidance.to(dtype),
            latent_indices=torch.tensor([inputs.positions]),
            clean_latents=latent[1],
            clean_latent_indices=index[1],
            clean_latents_2x=latent[2],
            clean_latent_2x_indices=index[2],
            clean_latents_4x=latent[4],
            clean_latent_4x_indices=index[4],
            image_embeddings=inputs.image_BND.to(dtype),
            return_dict=False,
        )[0]

    def sample(self, x0_of, noise: torch.Tensor, steps: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Its sigmas and its UniPC around `x0_of(x, sigma)`; the network itself stays in fp32.

        dtype: of the sampler's own arithmetic. As published that is fp32, in which its `expm1(h) / h - 1` over short
        steps loses digits: by itself it is some 4e-5 away from fp64 at 25 steps.
        """
        tokens = noise.shape[2] * noise.shape[3] * noise.shape[4] // 4
        sigmas = self.pipeline.get_flux_sigmas_from_mu(steps, self.pipeline.calculate_flux_mu(tokens))

        def model(x, sigma, **_):
            with default_dtype(torch.float32):
                return x0_of(x.float(), float(sigma[0])).to(dtype)

        with default_dtype(dtype):
            return self.sampler.sample_unipc(model, noise.to(dtype), sigmas.to(dtype), extra_args={}, disable=True)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    """What `torch.tensor([...])` makes, which is how the published sampler keeps its coefficients, and new networks."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(path: str) -> Published:
    """Import a checkout. Raises SystemExit in plain words where `path` is none."""
    if not os.path.isdir(os.path.join(path, "diffusers_helper")):
        raise SystemExit(f"{path} is no checkout of the published FramePack code: it has no folder diffusers_helper.")
    for name in STAND_INS:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name) is not None:
                continue
        sys.modules[name] = types.ModuleType(name)
    parent = sys.modules.get("accelerate")
    if parent is not None and not hasattr(parent, "accelerator"):
        parent.accelerator = sys.modules["accelerate.accelerator"]
    sys.path.append(os.path.abspath(path))
    with contextlib.redirect_stdout(sys.stderr):
        return Published(*(importlib.import_module(name) for name in (NETWORK, SAMPLER, PIPELINE)))
