"""Fixtures of the video tests: core's real WanVAE at its smallest width, built by core from a state dict."""

import pytest

from .reference import shipped_vae, wan_state_dict


@pytest.fixture(scope="session")
def tiny_vae():
    """`comfy.sd.VAE` around a WanVAE of width 4, as the stock VAELoader would make it."""
    import comfy.sd

    vae = comfy.sd.VAE(sd=wan_state_dict(4))
    vae.throw_exception_if_invalid()
    return vae


@pytest.fixture(scope="session")
def selftest_vae():
    """The small VAE that ships with the pack for its FramePack models."""
    return shipped_vae("frame_memory_selftest_vae")
