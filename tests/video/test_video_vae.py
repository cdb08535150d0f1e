"""check_vae on VAEs that core itself builds from state dicts."""

import sys
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from safetensors.torch import save_file

from frame_memory.plan.mark import LatentMark, read_mark
from frame_memory.video.vae import HUNYUAN, SELFTEST, SELFTEST_WAN, WAN, VAEError, check_vae, identify_vae

from .reference import shipped_vae, wan_state_dict

FRAMEPACK = LatentMark(latent_format="HunyuanVideo", base="HunyuanVideo", order="inverted")
SELFTEST_MARK = LatentMark(latent_format="HunyuanVideo", base="selftest", order="forward")
WAN_MARK = LatentMark(latent_format="Wan21", base="Wan21")
SELFTEST_WAN_MARK = LatentMark(latent_format="Wan21", base="selftest Wan")
LATENT = torch.zeros(1, 16, 10, 2, 4)


@pytest.fixture(scope="module")
def vaes(tiny_vae):
    """One of each family that has 16 channels at 8x8x4. Weights that core only counts are left out of the dicts."""
    hunyuan = comfy.sd.VAE(
        sd={
            "decoder.conv_in.conv.weight": torch.zeros(512, 16, 3, 3, 3),
            "post_quant_conv.weight": torch.zeros(16, 16, 1, 1, 1),
        }
    )
    assert isinstance(hunyuan.first_stage_model, AutoencoderKL)

    def wan(width):
        shapes = {
            "decoder.middle.0.residual.0.gamma": (4 * width, 1, 1, 1), "decoder.head.0.gamma": (width, 1, 1, 1),
            "encoder.conv1.weight": (width, 3, 3, 3, 3), "decoder.head.2.weight": (3, width, 3, 3, 3),
        }  # fmt: skip
        return comfy.sd.VAE(sd={key: torch.zeros(shape) for key, shape in shapes.items()})

    def taehv(dtype):
        keys = {"decoder.1.weight": (256, 16, 3, 3), "decoder.22.bias": (3,)}
        return comfy.sd.VAE(sd={key: torch.zeros(shape, dtype=dtype) for key, shape in keys.items()})

    def bare(vae):
        """As another loader makes it: its weights, without what the file says."""
        return comfy.sd.VAE(sd=vae.first_stage_model.state_dict())

    return {
        "hunyuan": hunyuan,
        "wan": wan(96),
        "light wan": wan(24),
        "selftest": tiny_vae,
        "shipped": shipped_vae("frame_memory_selftest_vae"),
        "shipped Wan": shipped_vae("frame_memory_selftest_wan_vae"),
        "bare": bare(shipped_vae("frame_memory_selftest_vae")),
        "bare Wan": bare(shipped_vae("frame_memory_selftest_wan_vae")),
        "tiny hunyuan": taehv(torch.float16),
        "tiny wan": taehv(torch.float32),
    }


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("hunyuan", HUNYUAN), ("tiny hunyuan", HUNYUAN), ("wan", WAN), ("tiny wan", WAN), ("selftest", SELFTEST),
        ("light wan", WAN), ("shipped", SELFTEST), ("shipped Wan", SELFTEST_WAN),
        ("bare", SELFTEST), ("bare Wan", SELFTEST_WAN),
    ],
)  # fmt: skip
def test_families_are_told_apart(vaes, name, family):
    found = identify_vae(vaes[name])
    assert (found.family, found.channels, found.spatial, found.temporal) == (family, 16, 8, 4)


@pytest.mark.parametrize(
    ("mark", "good"),
    [
        (FRAMEPACK, {"hunyuan", "tiny hunyuan"}), (SELFTEST_MARK, {"selftest", "shipped", "bare"}),
        (WAN_MARK, {"wan", "light wan", "tiny wan"}), (SELFTEST_WAN_MARK, {"shipped Wan", "bare Wan"}),
    ],
)  # fmt: skip
def test_fault_22_same_shape_is_not_enough(vaes, mark, good):
    expected = {
        FRAMEPACK: "HunyuanVideo VAE", SELFTEST_MARK: "frame_memory_selftest_vae.safetensors", WAN_MARK: "Wan 2.1 VAE",
        SELFTEST_WAN_MARK: "frame_memory_selftest_wan_vae.safetensors",
    }[mark]  # fmt: skip
    for name, vae in vaes.items():
        if name in good:
            check_vae(vae, LATENT, mark)
            continue
        with pytest.raises(VAEError) as error:
            check_vae(vae, LATENT, mark)
        assert "'Load VAE'" in str(error.value) and expected in str(error.value)


def test_a_video_of_the_small_wan_from_before_the_two_had_names_is_its_own_vaes(vaes):
    before = {"latent_format": "Wan21", "base": "selftest", "order": "forward", "window": 2, "fps": 16.0, "given": 1}
    mark = read_mark({"frame_memory": before})
    assert check_vae(vaes["shipped Wan"], LATENT, mark).family == SELFTEST_WAN
    with pytest.raises(VAEError, match="frame_memory_selftest_wan_vae.safetensors"):
        check_vae(vaes["shipped"], LATENT, mark)


def test_fault_22_a_latent_without_a_mark_is_checked_by_shape(vaes):
    for vae in vaes.values():
        check_vae(vae, LATENT, None)
        check_vae(vae, LATENT, LatentMark())
    with pytest.raises(VAEError, match="16 channels, the latent has 48"):
        check_vae(vaes["wan"], torch.zeros(1, 48, 3, 2, 2), None)


def test_an_image_vae_is_refused():
    image_vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    with pytest.raises(VAEError, match="expected a video VAE"):
        check_vae(image_vae, LATENT, FRAMEPACK)


def test_a_vae_without_weights_is_refused():
    with pytest.raises(VAEError, match="no weights"):
        identify_vae(comfy.sd.VAE(sd={"nothing": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("base", "family"), [("selftest", SELFTEST), ("selftest Wan", SELFTEST_WAN), ("something else", "")]
)
def test_metadata_of_the_file_counts(tmp_path, monkeypatch, base, family):
    """The stock VAELoader keeps the file's metadata beside the patcher; a narrow WanVAE may say what it belongs to."""
    import folder_paths

    # Another test may have imported the pack's own package of this name.
    monkeypatch.delitem(sys.modules, "nodes", raising=False)
    monkeypatch.syspath_prepend(str(Path(folder_paths.__file__).parent))
    import nodes

    save_file(wan_state_dict(4), tmp_path / "small.safetensors", metadata={"frame_memory.base": base})
    folder_paths.add_model_folder_path("vae", str(tmp_path))
    try:
        (vae,) = nodes.VAELoader().load_vae("small.safetensors")
    finally:
        folder_paths.folder_names_and_paths["vae"][0].remove(str(tmp_path))
        folder_paths.filename_list_cache.pop("vae", None)
    assert identify_vae(vae).family == family
