"""to_bucket against plain PIL."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frame_memory.plan import PlanError
from frame_memory.video.images import ImageError, to_bucket, with_mask


def picture(width, height, channels=3, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, height, width, channels, generator=generator)


def published(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The rule of framepack.md section 5 with PIL's own float crop box: LANCZOS by the larger ratio, centre crop."""
    source = Image.fromarray(pixels)
    ratio = max(width / source.width, height / source.height)
    grown = source.resize((int(round(source.width * ratio)), int(round(source.height * ratio))), Image.LANCZOS)
    box = ((grown.width - width) / 2, (grown.height - height) / 2)
    return np.asarray(grown.crop((box[0], box[1], box[0] + width, box[1] + height)))


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (96, 64), (50, 400), (97, 65), (1000, 31)])
@pytest.mark.parametrize("target", [(96, 64), (64, 96), (48, 48)])
def test_equals_the_published_preparation(size, target):
    image = picture(*size)
    before = image.clone()
    result, report = to_bucket(image, *target)
    expected = published(image[0].mul(255).round().to(torch.uint8).numpy(), *target)
    assert result.shape == (1, target[1], target[0], 3) and result.dtype == torch.float32
    assert np.array_equal(result[0].mul(255).round().to(torch.uint8).numpy(), expected)
    assert torch.equal(image, before)
    assert f"{target[0]}x{target[1]}" in report


@settings(max_examples=80, deadline=None)
@given(
    source=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    target=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_every_size_fits_exactly(source, target):
    width, height = target[0] * 16, target[1] * 16
    result, _ = to_bucket(picture(*source), width, height)
    assert result.shape == (1, height, width, 3)
    assert float(result.min()) >= 0 and float(result.max()) <= 1


def test_the_crop_is_centred():
    """A white bar in the middle of a wide picture stays in the middle; what is cut lies at both ends."""
    image = torch.zeros(1, 64, 256, 3)
    image[:, :, 120:136] = 1.0
    result, report = to_bucket(image, 64, 64)
    columns = result[0].mean(dim=(0, 2))
    assert torch.allclose(columns, columns.flip(0), atol=1 / 255)
    assert "Centre crop to 64x64: 192 pixels of width cut, 75.0% of the picture" in report


def test_a_fitting_picture_is_kept():
    image = picture(96, 64).mul(255).round().div(255)
    result, report = to_bucket(image, 96, 64)
    assert torch.allclose(result, image, atol=1e-6) and "size kept" in report


def test_batches_stay_batches():
    images = picture(100, 80, batch=3)
    together, report = to_bucket(images, 64, 48)
    alone = torch.cat([to_bucket(images[i : i + 1], 64, 48)[0] for i in range(3)])
    assert torch.equal(together, alone) and report.startswith("3 images of 100x80")


@pytest.mark.parametrize("background", ["white", "black"])
def test_fault_27_alpha_is_composited_and_said(background):
    image = picture(120, 90, channels=4)
    result, report = to_bucket(image, 64, 64, background=background)
    paper = Image.new("RGBA", (120, 90), background)
    paper.alpha_composite(Image.fromarray(image[0].mul(255).round().to(torch.uint8).numpy()))
    expected = published(np.asarray(paper.convert("RGB")), 64, 64)
    difference = np.abs(result[0].mul(255).numpy() - expected.astype(float))
    assert difference.max() <= 2, "8-bit rounding of the composite, spread by LANCZOS"
    assert f"Transparency laid over {background}" in report and "Centre crop" in report


def test_fault_27_a_transparent_picture_is_only_background():
    image = torch.cat([torch.rand(1, 32, 32, 3), torch.zeros(1, 32, 32, 1)], dim=-1)
    assert bool((to_bucket(image, 32, 32)[0] == 1).all())
    assert bool((to_bucket(image, 32, 32, background="black")[0] == 0).all())
    with pytest.raises(ImageError, match="expected one of: white, black"):
        to_bucket(image, 32, 32, background="pink")


@pytest.mark.parametrize("background", ["white", "black"])
def test_fault_27_a_mask_is_the_alpha_that_load_image_took_away(background):
    """Core's mask is 1 where the picture is transparent; RGB and mask must give what RGBA gives."""
    rgba = picture(120, 90, channels=4, batch=2)
    rgb, mask = rgba[..., :3].contiguous(), 1 - rgba[..., 3]
    kept = rgb.clone(), mask.clone()
    together, report = to_bucket(with_mask(rgb, mask), 64, 64, background=background)
    assert torch.equal(together, to_bucket(rgba, 64, 64, background=background)[0])
    assert f"Transparency laid over {background}" in report
    assert torch.equal(rgb, kept[0]) and torch.equal(mask, kept[1])
    both = with_mask(torch.cat([rgb, torch.full_like(rgb[..., :1], 0.5)], dim=-1), mask)
    assert torch.allclose(both[..., 3], rgba[..., 3] * 0.5)


def test_a_mask_of_nothing_changes_nothing_and_other_sizes_are_scaled():
    """Load Image gives a mask of 64x64 zeros for a picture without alpha."""
    rgb = picture(96, 48, batch=2)
    assert with_mask(rgb, torch.zeros(1, 64, 64)) is rgb and with_mask(rgb, None) is rgb
    half = torch.zeros(1, 4, 2)
    half[..., 1] = 1
    alpha = with_mask(rgb, half)[..., 3]
    assert alpha.shape == (2, 48, 96) and bool((alpha[..., :20] == 1).all()) and bool((alpha[..., 76:] == 0).all())
    grey = with_mask(picture(32, 32, channels=1), torch.ones(32, 32))
    assert grey.shape == (1, 32, 32, 4) and bool((grey[..., 3] == 0).all())


@pytest.mark.parametrize("mask", [torch.ones(3, 8, 8), torch.ones(0, 8, 8), torch.ones(1, 8, 8, 3) * float("nan")])
def test_fault_28_a_mask_that_belongs_to_no_picture_names_its_socket(mask):
    with pytest.raises(ImageError, match="'end_mask'"):
        with_mask(picture(32, 32, batch=2), mask, "end_mask")


def test_grey_becomes_three_colours():
    result, report = to_bucket(picture(64, 64, channels=1), 32, 32)
    assert result.shape[-1] == 3 and torch.equal(result[..., 0], result[..., 2]) and "Grey" in report


def test_fault_28_empty_and_odd_batches_name_the_socket():
    with pytest.raises(ImageError, match="'end_image' got an empty batch"):
        to_bucket(torch.zeros(0, 64, 64, 3), 32, 32, socket="end_image")
    with pytest.raises(ImageError, match="'image' got a tensor of shape"):
        to_bucket(torch.zeros(64, 64, 3), 32, 32)
    with pytest.raises(ImageError, match="0x64 pixels"):
        to_bucket(torch.zeros(1, 64, 0, 3), 32, 32)
    with pytest.raises(ImageError, match="NaN or Inf"):
        to_bucket(torch.full((1, 64, 64, 3), float("nan")), 32, 32)


@pytest.mark.parametrize(("size", "nearest"), [((100, 64), "96x64"), ((641, 479), "640x480"), ((3, 64), "16x64")])
def test_fault_23_sizes_off_the_grid_show_the_nearest_pair(size, nearest):
    with pytest.raises(PlanError, match="multiples of 16") as error:
        to_bucket(picture(64, 64), *size)
    assert f"Nearest valid: {nearest}" in str(error.value) and "FramePack Image" in str(error.value)
