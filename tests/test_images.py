"""Whatever image a person hands over becomes the right canvas, or a clear error."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from conftest import TINY
from PIL import Image

import fastigpt
from fastigpt.images import as_image_list, grid, mask_cells, to_canvas, transparent_cells

RED, GREEN = (200, 30, 40), (20, 180, 60)


def photo(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((60, 40)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_pillow_mode_becomes_rgb(mode):
    source = photo("RGB")
    image = source.convert(mode) if mode != "LAB" else Image.new("LAB", (60, 40), (120, 130, 140))
    (found,) = as_image_list(image)
    assert found.mode in ("RGB", "RGBA") and found.size == (60, 40)
    canvas = to_canvas(found, 8, 8)
    assert canvas.shape == (8, 8, 3) and canvas.dtype == np.uint8
    if mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
        difference = canvas.astype(int) - to_canvas(source, 8, 8).astype(int)
        assert np.abs(difference).max() <= 4


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (found,) = as_image_list(Image.fromarray(values))
    pixels = np.asarray(found)[..., 0]
    assert pixels.min() == 0 and pixels.max() == 255
    assert np.abs(pixels.astype(int) - (values >> 8)).max() <= 1


def test_transparent_parts_are_shown_on_white_and_can_be_drawn_anew():
    array = np.zeros((8, 8, 4), np.uint8)
    array[:4] = (*RED, 255)
    (image,) = as_image_list(Image.fromarray(array))
    canvas = to_canvas(image, 8, 8)
    assert (canvas[0] == RED).all() and (canvas[7] == 255).all()
    cells = transparent_cells(image, 4, 4)
    assert cells is not None and not cells[:2].any() and cells[2:].all()
    assert transparent_cells(photo(), 4, 4) is None


def test_palette_pngs_with_transparency(tmp_path):
    array = np.full((6, 6, 4), (*GREEN, 255), np.uint8)
    array[3:, :, 3] = 0
    path = tmp_path / "p.png"
    Image.fromarray(array).quantize(4).save(path)
    with Image.open(path) as image:
        assert image.mode == "P"
        (found,) = as_image_list(image)
    assert found.mode == "RGBA"
    cells = transparent_cells(found, 6, 6)
    assert cells is not None and cells[3:].all() and not cells[:3].any()


def test_arrays_and_tensors_single_and_batched():
    array = np.asarray(photo())
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    mirrored_twice = array[:, ::-1][:, ::-1]
    forms = [array, array[None], [array], tensor, tensor[None], [tensor], [Image.fromarray(array)], mirrored_twice]
    for form in forms:
        (found,) = as_image_list(form)
        assert np.array_equal(np.asarray(found), array)
    assert len(as_image_list(np.stack([array, array]))) == 2
    grey = as_image_list(array[..., 0])[0]
    assert (np.asarray(grey) == array[..., :1]).all()


GREY = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_grey_arrays_and_tensors_of_every_usual_shape(n):
    grey = GREY[:n]
    tensor = torch.from_numpy(grey.copy())
    forms = [
        grey,
        grey[:, None],
        grey[..., None],
        list(grey),
        tensor,
        tensor[:, None],
        list(tensor),
        list(tensor[:, None]),
    ]
    for form in forms:
        found = as_image_list(form)
        assert len(found) == n and all(picture.mode == "RGB" for picture in found)
        for picture, expected in zip(found, grey):
            assert np.array_equal(np.asarray(picture), expected[..., None].repeat(3, -1))


def test_three_axes_are_one_colour_image_where_the_channels_belong():
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 3), dtype=np.uint8)  # 3 rows: still channels last
    assert np.array_equal(np.asarray(as_image_list(array)[0]), array)
    tensor = torch.from_numpy(array).movedim(-1, 0)  # [3, 3, 8]
    assert np.array_equal(np.asarray(as_image_list(tensor)[0]), array)
    rgba = np.dstack([array, np.full((3, 8), 255, np.uint8)])
    assert as_image_list(rgba)[0].mode == as_image_list(torch.from_numpy(rgba).movedim(-1, 0))[0].mode == "RGBA"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", "bfloat16"])
def test_floats_from_0_to_1_are_the_levels_they_were_made_from(dtype):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (2, 1))
    if dtype == "bfloat16":
        (found,) = as_image_list(torch.from_numpy(ramp).bfloat16() / 255)
    else:
        (found,) = as_image_list((ramp / 255).astype(dtype))
    difference = np.abs(np.asarray(found)[..., 0].astype(int) - ramp).max()
    assert difference <= (1 if dtype == "bfloat16" else 0)  # 8 bits of fraction do not hold every level near white
    slightly = np.nextafter(np.float32(1), np.float32(2)) * np.ones((2, 2), np.float32)
    assert np.asarray(as_image_list(slightly)[0]).min() == 255  # what arithmetic leaves


def test_bool_arrays_are_black_and_white():
    bits = np.array([[True, False], [False, False]])
    for form in (bits, torch.from_numpy(bits), Image.fromarray(bits)):
        assert (np.asarray(as_image_list(form)[0])[..., 0] == bits * 255).all()


def test_lists_may_mix_kinds_and_tensors_be_views(tmp_path):
    array = np.asarray(photo())
    photo().save(tmp_path / "photo.png")
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    mixed = (
        str(tmp_path / "photo.png"),
        [tmp_path / "photo.png", array],
        photo(),
        tensor,
        torch.stack([tensor, tensor]),
    )
    assert (
        all(np.array_equal(np.asarray(found), array) for found in as_image_list(mixed))
        and len(as_image_list(mixed)) == 7
    )
    negated = torch.complex(torch.zeros(4, 4), -torch.rand(4, 4)).conj().imag
    assert negated.is_neg()
    (found,) = as_image_list(negated)
    assert np.array_equal(np.asarray(found), np.asarray(as_image_list(negated.clone().resolve_neg())[0]))
    assert as_image_list(torch.zeros(3, 2, 2, requires_grad=True))[0].size == (2, 2)
    freed = torch.zeros(3, 4, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have its memory"):
        as_image_list(freed)
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        as_image_list(endless)


@pytest.mark.parametrize(
    ("images", "error", "word"),
    [
        ([], ValueError, "empty"),
        ("photo.jpg", ValueError, r"cannot read the image photo\.jpg: there is no such file"),
        (b"photo.jpg", TypeError, "PIL.Image.open"),
        (None, TypeError, "NoneType"),
        (3, TypeError, "int"),
        (np.zeros((4, 4, 3), np.int32), TypeError, "int32"),
        (np.zeros((4, 4, 3), np.uint16), TypeError, "uint16"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "int64"),
        (np.full((4, 4, 3), 1.5), ValueError, r"float64 must lie in \[0, 1\], found 1.5 to 1.5"),
        (np.full((4, 4, 3), -1.0, np.float32), ValueError, r"\[0, 1\], found -1"),
        (np.full((4, 4, 3), 200.0), ValueError, "give 0 … 255 as uint8"),
        (np.full((4, 4, 3), np.nan), ValueError, "found nan"),
        (torch.full((3, 4, 4), float("inf")), ValueError, "found inf"),
        (
            np.zeros((3, 8, 8), np.uint8),
            ValueError,
            r"\[3, 8, 8\] could be one image with its channels first or 3 grey",
        ),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"\[8, 8, 3\] could be one image with its channels last"),
        (np.zeros((2, 3, 8, 8), np.uint8), ValueError, r"not \[2, 3, 8, 8\]"),
        (np.array(0, np.uint8), ValueError, "shape"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"), ValueError, "not on meta"),
        (torch.zeros(3, 4, 4).to_sparse(), TypeError, "sparse_coo"),
        (torch.zeros(0, 8, 8, dtype=torch.uint8), ValueError, "empty"),
        (
            np.broadcast_to(np.uint8(0), (20000, 20000)),
            ValueError,
            "400000000 pixels, more than the limit of 178956970",
        ),
        (np.zeros((4, 4, 5), np.uint8), ValueError, "4, 4, 5"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "4 × 0"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, "empty"),
        (torch.zeros(5, 4, 4, dtype=torch.uint8), ValueError, "shape"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), ValueError, "shape"),
    ],
)
def test_impossible_images_are_refused(images, error, word):
    with pytest.raises(error, match=word):
        as_image_list(images)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0 × 5"):
        as_image_list(Image.new("RGB", (0, 5)))


def test_masks_at_the_canvas_size_and_at_the_images_size():
    small = np.zeros((TINY.height, TINY.width), bool)
    small[1, 2] = True
    assert np.array_equal(mask_cells(small, [(8, 8)], 4, 4)[0], small)
    large = small.repeat(2, 0).repeat(2, 1)
    for form in (large, torch.from_numpy(large), Image.fromarray(large.astype(np.uint8) * 255)):
        assert np.array_equal(mask_cells(form, [(8, 8)], 4, 4)[0], small)
    each = np.stack([small, ~small])
    assert np.array_equal(mask_cells(each, [(8, 8), (9, 7)], 4, 4), each)


def test_masks_come_from_files_and_lists_too(tmp_path):
    small = np.eye(4, dtype=bool)
    picture = Image.fromarray(small.astype(np.uint8) * 255)
    picture.save(tmp_path / "mask.png")
    for form in (tmp_path / "mask.png", str(tmp_path / "mask.png"), small[None], small[None, None], [picture], [small]):
        assert np.array_equal(mask_cells(form, [(8, 8)], 4, 4)[0], small)
    assert np.array_equal(mask_cells(small.tolist(), [(8, 8)], 4, 4)[0], small)
    mixed = mask_cells([picture, torch.from_numpy(~small), tmp_path / "mask.png"], [(8, 8), (9, 7), (3, 3)], 4, 4)
    assert np.array_equal(mixed, np.stack([small, ~small, small]))
    grey16 = Image.fromarray(small.astype(np.uint16) * 65535)
    assert np.array_equal(mask_cells(grey16, [(8, 8)], 4, 4)[0], small)


@pytest.mark.parametrize(
    ("mask", "error", "word"),
    [
        ("no.png", ValueError, r"cannot read the image no\.png"),
        ([[True, False], [True]], ValueError, "mask must be a bool array"),
        ([np.zeros((2, 4, 4), bool)], ValueError, "mask is a list"),
        (torch.zeros(4, 4, dtype=torch.bool, device="meta"), ValueError, "mask must be on the CPU"),
        (np.zeros((5, 5), bool), ValueError, "5 × 5"),
        (np.zeros((4, 4), np.uint8), TypeError, "bool"),
        (np.zeros(4, bool), ValueError, "shape"),
        (np.zeros((3, 4, 4), bool), ValueError, "3 layers for 1"),
    ],
)
def test_masks_of_the_wrong_kind_are_refused(mask, error, word):
    with pytest.raises(error, match=word):
        mask_cells(mask, [(8, 6)], 4, 4)


def test_a_grid_shows_every_image_where_it_belongs():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    sheet = np.asarray(grid(images, 3, scale=2, gap=1))
    assert sheet.shape == (2 * 9 + 1, 3 * 13 + 1, 3)
    for i, image in enumerate(images):
        y, x = 1 + i // 3 * 9, 1 + i % 3 * 13
        assert np.array_equal(sheet[y : y + 8 : 2, x : x + 12 : 2], image)
    assert (sheet[0] == 255).all()


def test_a_public_grid_takes_whatever_images_are_and_makes_them_large_enough_to_see():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p) for p in pixels]
    expected = np.asarray(fastigpt.grid(pixels))
    assert expected.shape == (2 * 130 + 2, 3 * 130 + 2, 3)  # 128 pixels each, 2 between them
    for same in (pictures, tuple(pictures), torch.from_numpy(pixels).movedim(-1, 1), list(pixels)):
        assert np.array_equal(np.asarray(fastigpt.grid(same)), expected)
    one = fastigpt.grid(pictures[0], scale=1, gap=0)
    assert one.size == (32, 32) and one.mode == "RGB" and np.array_equal(np.asarray(one), pixels[0])
    assert fastigpt.grid(pictures, columns=5, scale=2, gap=3).size == (5 * 67 + 3, 67 + 3)
    clear = fastigpt.grid(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), scale=1)
    assert (np.asarray(clear) == 255).all()


@pytest.mark.parametrize(
    ("images", "options", "word"),
    [
        ([], {}, "empty"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], {}, "one size"),
        (Image.new("RGB", (4, 4)), {"columns": 0}, "columns"),
        (Image.new("RGB", (4, 4)), {"scale": 0}, "scale"),
        (Image.new("RGB", (4, 4)), {"gap": -1}, "gap"),
        (Image.new("RGB", (100, 100)), {"scale": 100}, "10004 × 10004|pixels"),
    ],
)
def test_grids_that_cannot_be_are_refused_by_name(images, options, word):
    with pytest.raises(ValueError, match=word):
        fastigpt.grid(images, **options)
