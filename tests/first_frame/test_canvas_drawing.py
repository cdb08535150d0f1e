"""The canvas pixel for pixel against the published rules, written here once more in plain Pillow."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, ImageOps

from frame_memory.plan.canvas import FREE, TWO_COLUMNS, CanvasError, lay_out
from frame_memory.video.canvas import (
    LINE_COLOURS,
    CanvasLook,
    compose,
    compose_batch,
    cut_out,
    flatten,
    labelled,
    mask_notes,
    named_pictures,
    parse_colour,
)
from frame_memory.video.images import ImageError

WHITE = (255, 255, 255)


def drawn(width: int, height: int, seed: int, alpha: bool) -> Image.Image:
    """A picture with edges, gradients and, with `alpha`, soft transparency over loud hidden colours."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 4, height // 4, 3 * width // 4 + 1, 3 * height // 4 + 1), fill=(200, 30, int(seed) % 256))
    if alpha:
        soft = rng.integers(0, 256, (height, width), dtype=np.uint8)
        soft[height // 3 :] = 255
        picture.putalpha(Image.fromarray(soft))
    return picture


def published(
    background: Image.Image, references: list[Image.Image], width=1280, height=720, squeezed=True, columns=1
) -> np.ndarray:
    """reference/ffgo.md section 2, step by step; two columns as on its canvas of five: 2 + 2 + 1."""
    half = width // 2
    canvas = Image.new("RGB", (width, height), WHITE)
    scene = background.convert("RGB")
    scene = scene.resize((1280, 720)) if squeezed else scene
    scene.thumbnail((half, height), Image.Resampling.LANCZOS)
    canvas.paste(scene, (half + (half - scene.width) // 2, (height - scene.height) // 2))
    columns = min(columns, len(references))
    rows = [references[i : i + columns] for i in range(0, len(references), columns)]
    slot = height // len(rows)
    for i, row in enumerate(rows):
        wide = half // len(row)
        for k, reference in enumerate(row):
            if reference.mode == "RGBA":
                white = Image.new("RGB", reference.size, WHITE)
                white.paste(reference, mask=reference.split()[3])
                reference = white
            small = reference.copy()
            small.thumbnail((wide, slot), Image.Resampling.LANCZOS)
            canvas.paste(small, (k * wide + (wide - small.width) // 2, i * slot + (slot - small.height) // 2))
    return np.asarray(canvas)


def as_image(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).float().unsqueeze(0) / 255.0


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The node itself as the pack makes it, everything that is not given at its default; a canvas as 8-bit numbers."""
    repo, name = Path(__file__).parents[2], "frame_memory_pack_of_canvas_tests"
    package = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None, is_package=True))
    package.__path__ = [str(repo)]
    sys.modules[name] = package
    node = importlib.import_module(f"{name}.nodes.first_frame").FrameMemoryFirstFrameComposer
    inputs = node.GET_SCHEMA().inputs
    usual = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))

    def made(background, references, **inputs) -> np.ndarray:
        given = {f"reference_{i}": as_image(picture) for i, picture in enumerate(references, 1)}
        result = node.execute(**{**usual, **inputs}, references=given, background=as_image(background)).result
        image_BHWC = result[0]
        assert image_BHWC.dtype == torch.float32 and len(image_BHWC) == 1
        return image_BHWC[0].mul(255).round().to(torch.uint8).numpy()

    yield made
    folder_paths.set_temp_directory(before)
    for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[key]


SIZES = [(1300, 900), (64, 700), (900, 120), (333, 334), (2100, 2050)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("alpha", [False, True])
def test_the_canvas_is_the_published_one_pixel_for_pixel(ours, count, alpha):
    references = [drawn(*SIZES[i], seed=i, alpha=alpha) for i in range(count)]
    background = drawn(1501, 1003, seed=99, alpha=False)
    assert np.array_equal(ours(background, references), published(background, references))


def test_a_transparent_border_is_kept_as_published(ours):
    cut, background = Image.new("RGBA", (400, 400), (0, 0, 0, 0)), drawn(640, 360, seed=99, alpha=False)
    cut.paste((255, 0, 0, 255), (150, 150, 250, 250))
    assert np.array_equal(ours(background, [cut]), published(background, [cut]))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_two_columns_pixel_for_pixel(ours, count):
    references = [drawn(*SIZES[-1 - i], seed=i, alpha=i % 2 == 0) for i in range(count)]
    background = drawn(900, 500, seed=99, alpha=False)
    got = ours(background, references, layout=TWO_COLUMNS, width=832, height=480)
    assert np.array_equal(got, published(background, references, 832, 480, columns=2))


def test_a_background_that_keeps_its_aspect_is_shrunk_as_pillow_does(ours):
    references, background = [drawn(333, 334, 1, True)], drawn(1501, 1003, seed=99, alpha=False)
    got = ours(background, references, keep_background_aspect=True)
    assert np.array_equal(got, published(background, references, squeezed=False))


def test_in_free_boxes_a_background_keeps_its_pixels_where_it_is(ours):
    """Untouched, written down at its place, or moved by 9: the same pixels as in the official layout."""
    references, background = [drawn(64, 48, 1, False)], drawn(1501, 1003, seed=99, alpha=False)
    wanted = published(background, references, 832, 480)[123:357, 416:]
    for line, x in (("", 416), ("background: 416, 123, 416 x 234\n", 416), ("background: 407, 123, 416 x 234", 407)):
        made = ours(background, references, layout=FREE, boxes=f"{line}\n1: 0, 0, 64 x 48", width=832, height=480)
        assert np.array_equal(made[123:357, x : x + 416], wanted), line


@pytest.mark.parametrize("size", [(20, 35), (90, 30), (1, 1)])
def test_small_pictures_are_enlarged_where_that_is_asked_for(size):
    picture = drawn(*size, seed=5, alpha=False)
    layout = lay_out(640, 368, [size], enlarge=True)
    canvas = compose(layout, {"1": picture}, WHITE)
    box = layout.regions[0].box
    wanted = ImageOps.contain(picture, (640, 368), Image.Resampling.LANCZOS)
    assert abs(box.width - wanted.width) <= 1 and abs(box.height - wanted.height) <= 1
    made = canvas.crop((box.x, box.y, box.x + box.width, box.y + box.height))
    assert np.array_equal(np.asarray(made), np.asarray(picture.resize(made.size, Image.Resampling.LANCZOS)))


@given(st.lists(st.tuples(st.integers(1, 250), st.integers(1, 250)), min_size=1, max_size=5), st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_mixture_of_sizes_is_shown_as_published(ours, sizes, alpha):
    references = [drawn(*size, seed=i, alpha=alpha) for i, size in enumerate(sizes)]
    background = drawn(64, 48, seed=7, alpha=False)
    got = ours(background, references, width=832, height=480)
    assert np.array_equal(got, published(background, references, 832, 480))


def test_fault_27_hidden_colours_leave_no_rim():
    """A red disc cut out of a black picture: on white nothing may be darker than the disc."""
    mask = torch.zeros(1, 200, 200)
    y, x = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    mask[0][(x - 100) ** 2 + (y - 100) ** 2 < 80**2] = 1
    image = torch.zeros(1, 200, 200, 3)
    image[..., 0] = mask
    for free, boxes in ((False, ""), (True, "1: 100, 100, 77 x 77")):
        pictures = {"1": cut_out(image, mask, "reference_1", crop=True)[0]}
        assert pictures["1"].size == (159, 159)
        layout = lay_out(640, 368, [pictures["1"].size], layout=FREE if free else "official stack", boxes=boxes)
        canvas = np.asarray(compose(layout, pictures, WHITE, free=free)).astype(int)
        assert canvas[..., 0].min() >= 250, "a dark rim"
        assert (canvas[..., 1] < 128).sum() > 1000, "no disc"


@pytest.mark.parametrize("joined", [False, True], ids=["mask", "mask and the same alpha"])
def test_fault_27_what_was_behind_a_soft_edge_does_not_tint_it(joined):
    """A red disc with a soft edge in front of black, and its mask: flattened it is red mixed with white alone.

    With 'joined' the picture has the same alpha already, as the blueprints' 'reference' has: nothing is cut twice.
    """
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    mask = ((45 - ((x - 60) ** 2 + (y - 60) ** 2).sqrt()) / 6 + 0.5).clamp(0, 1)[None]
    image = torch.zeros(1, 120, 120, 4 if joined else 3)
    image[..., 0] = mask
    if joined:
        image[..., 3] = mask
    before = image.clone()
    flat = np.asarray(flatten(cut_out(image, mask.half(), "reference_1", crop=False)[0], WHITE)).astype(float)
    wanted = 255 * (1 - mask[0].numpy())
    assert abs(flat[..., 0] - 255).max() <= 3 and abs(flat[..., 1] - wanted).max() <= 3
    assert torch.equal(image, before)


def test_a_mask_cuts_what_the_picture_still_shows_and_brings_nothing_back():
    image, mask = torch.rand(1, 20, 20, 4), torch.ones(1, 20, 20)
    image[..., 3], image[:, :5, :, 3], mask[:, :, :5] = 1, 0, 0
    alpha = np.asarray(cut_out(image, mask, "reference_1", crop=False)[0])[..., 3]
    assert (alpha[5:, 5:] == 255).all() and not alpha[:5].any() and not alpha[:, :5].any()
    assert named_pictures({1: image}, {1: mask}, None, crop=False)["1"][0].size == (15, 15), "cropped by its mask"
    whole = cut_out(image, torch.ones(1, 20, 20), "reference_1", crop=False)[0]
    assert np.array_equal(np.asarray(whole)[..., 3] > 0, np.arange(20)[:, None].repeat(20, 1) >= 5)


def test_thin_hair_that_is_never_solid_keeps_its_colours():
    image, mask = torch.rand(1, 30, 30, 3), torch.zeros(1, 30, 30)
    mask[:, :, 10:12] = 0.5
    got = np.asarray(cut_out(image, mask, "reference_1", crop=False)[0])[..., :3]
    assert np.array_equal(got, (image[0] * 255).round().byte().numpy())


def test_masks_of_sam3_are_joined_and_what_looks_wrong_is_said():
    """individual_masks gives several for one picture; BiRefNet and SAM 3 at the picture's size; Load Image inverted."""
    image = torch.rand(1, 60, 80, 3)
    several = torch.zeros(2, 60, 80)
    several[0, 10:20, 10:20], several[1, 30:50, 40:70] = 1, 1
    assert cut_out(image, several, "reference_1", crop=True)[0].size == (60, 40)
    inverted = torch.ones(1, 30, 30)
    inverted[:, 10:20, 10:20] = 0
    joined, stretched, hole = mask_notes({1: image, 2: image}, {1: several, 2: inverted})
    assert "mask_1 holds 2 masks" in joined and "30x30 and was stretched" in stretched
    assert "mask_2 keeps all corners" in hole and "Invert Mask" in hole
    # Load Image gives 64x64 zeros for a picture without transparency; inverted they keep all of it.
    assert mask_notes({1: image}, {1: torch.ones(60, 80)}) == mask_notes({1: image}, {1: torch.ones(1, 64, 64)}) == []


def test_in_free_boxes_the_transparent_part_shows_what_lies_below():
    blue = Image.new("RGB", (100, 100), (0, 0, 255))
    hole = Image.new("RGBA", (100, 100), (255, 0, 0, 255))
    hole.paste((255, 0, 0, 0), (25, 25, 75, 75))
    layout = lay_out(128, 128, [(100, 100)] * 2, layout=FREE, boxes="1: 0,0,128x128\n2: 0,0,128x128")
    canvas = np.asarray(compose(layout, {"1": blue, "2": hole}, WHITE, free=True))
    assert tuple(canvas[64, 64]) == (0, 0, 255) and tuple(canvas[5, 5]) == (255, 0, 0)


def test_masks_as_segmentation_gives_them_cut_out_and_crop():
    image = torch.rand(1, 90, 120, 3)
    mask = torch.zeros(1, 90, 120)
    mask[:, 20:50, 30:100] = 1
    picture = cut_out(image, mask, "reference_1", crop=True)[0]
    assert picture.size == (70, 30) and picture.mode == "RGBA"
    assert np.array_equal(np.asarray(picture)[..., :3], (image[0, 20:50, 30:100] * 255).round().byte().numpy())
    assert cut_out(image, mask, "reference_1", crop=False)[0].size == (120, 90)


def test_haze_around_a_mask_does_not_keep_the_crop_open():
    mask = torch.full((1, 60, 60), 0.01)
    mask[:, 10:20, 10:30] = 1
    assert cut_out(torch.rand(1, 60, 60, 3), mask, "reference_1", crop=True)[0].size == (20, 10)


def test_batches_make_a_canvas_each_and_single_pictures_serve_all():
    images = {1: torch.rand(3, 50, 40, 3), 2: torch.rand(1, 20, 30, 4)}
    before = {k: v.clone() for k, v in images.items()}
    pictures = named_pictures(images, {}, torch.rand(3, 64, 64, 1), crop=False)

    made, layouts = compose_batch(pictures, (320, 192), CanvasLook())
    assert made.shape == (3, 192, 320, 3) and len(layouts) == 3
    assert all(torch.equal(images[k], before[k]) for k in images)
    for i in range(3):
        alone = {name: [p[i if len(p) > 1 else 0]] for name, p in pictures.items()}
        assert torch.equal(compose_batch(alone, (320, 192), CanvasLook())[0][0], made[i])
    pictures["2"] = pictures["2"] * 2
    with pytest.raises(CanvasError, match="background has 3, reference_2 has 2"):
        compose_batch(pictures, (320, 192), CanvasLook())


def test_a_picture_of_one_pixel_is_seen():
    one = torch.zeros(1, 1, 1, 3)
    made, _ = compose_batch(named_pictures({1: one}, {}, None, crop=True), (64, 64), CanvasLook())
    assert int((made[0].sum(-1) == 0).sum()) == 1


def test_fault_28_odd_inputs_name_their_socket():
    with pytest.raises(ImageError, match="reference_2"):
        named_pictures({2: torch.zeros(0, 8, 8, 3)}, {}, None, crop=True)
    with pytest.raises(CanvasError, match="mask_3.*no reference_3"):
        named_pictures({1: torch.zeros(1, 8, 8, 3)}, {3: torch.ones(1, 8, 8)}, None, crop=True)
    with pytest.raises(CanvasError, match="reference_1.*is empty"):
        cut_out(torch.rand(1, 8, 8, 3), torch.zeros(1, 8, 8), "reference_1", crop=True)
    with pytest.raises(CanvasError, match="transparent throughout"):
        cut_out(torch.zeros(1, 8, 8, 4), None, "reference_1", crop=True)


@pytest.mark.parametrize(("text", "colour"), [("#ffffff", WHITE), (" 0af ", (0, 170, 255)), ("#102030", (16, 32, 48))])
def test_colours(text, colour):
    assert parse_colour(text) == colour


@pytest.mark.parametrize("text", ["", "white", "#12345", "#gggggg"])
def test_other_words_are_no_colour(text):
    with pytest.raises(CanvasError, match="#ffffff"):
        parse_colour(text)


def test_the_labelled_layout_frames_every_region_in_its_colour_and_leaves_the_canvas_alone():
    canvas = torch.ones(368, 640, 3)
    layout = lay_out(640, 368, [(50, 70), (90, 60)], (160, 90))
    shown = labelled(canvas, layout)
    assert shown.shape == (1, 368, 640, 3) and bool((canvas == 1).all())
    pixels = shown[0].mul(255).round().int()
    for colour, region in zip(LINE_COLOURS, layout.regions, strict=False):
        box = region.box
        right, bottom = box.x + box.width - 1, box.y + box.height - 1
        for x, y in ((right, bottom), (box.x, bottom), (right, box.y + box.height // 2), (box.x + 1, box.y)):
            assert tuple(pixels[y, x].tolist()) == colour, region.label
        assert tuple(pixels[bottom - 5, right - 5].tolist()) == (255, 255, 255), "only its frame"
    assert int((pixels != 255).any(-1)[:, 320:].sum()) and tuple(pixels[2, 638].tolist()) == (255, 255, 255)


@pytest.mark.parametrize("box", ["600,340,40x28", "-30,-20,40x28", "635,10,40x28"])
def test_a_label_never_runs_out_of_the_picture(box):
    layout = lay_out(640, 368, [(40, 28)], layout=FREE, boxes=f"1: {box}")
    left, top, right, bottom = ImageFont.load_default(size=368 // 28).getbbox("reference 1 40x28")
    rows, columns = np.nonzero((labelled(torch.ones(368, 640, 3), layout)[0].numpy() < 1).any(-1))
    assert columns.max() - columns.min() >= right - left - 1 and rows.max() - rows.min() >= bottom - top - 1
