"""Image files look to every part of the library as they look to a person: one reader, upright, whatever is in them."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastigpt.image_files import read_image
from fastigpt.images import as_image_list, on_white, to_canvas
from fastigpt.probe_data import load
from fastigpt.training.data import Folder, _read_square

RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of filtered rows. kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(
    width: int, height: int, bits: int, data: bytes, *, photometric: int = 1, kind: int = 1, turned: int = 1
) -> bytes:
    """A little-endian TIFF of one grey strip. photometric: 0 white is zero. kind: 1 unsigned, 2 signed, 3 float."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 274: turned, 277: 1, 278: height}
    tags |= {279: len(data), 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def seen(path: Path) -> list:
    return np.asarray(read_image(path)).tolist()


# --- upright ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "webp", "tif", "jpg"])
def test_photographs_are_upright_in_every_part(tmp_path, orientation, ending):
    stored = np.zeros((40, 64, 3), np.uint8)
    stored[:8, :32], stored[:8, 32:], stored[8:, :8] = 250, (250, 0, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    Image.fromarray(stored).save(path, exif=exif, **options)
    with Image.open(path) as opened:
        shown = ImageOps.exif_transpose(opened) if ending != "tif" else opened.copy()
    for found in (read_image(path), as_image_list(Image.open(path))[0], as_image_list(path)[0]):
        assert found.size == shown.size == ((40, 64) if orientation > 4 else (64, 40))
        assert np.array_equal(np.asarray(found), np.asarray(shown))
        assert np.array_equal(np.asarray(as_image_list(found)[0]), np.asarray(shown))  # never turned twice
    edge = (np.array(shown.size) - 40) // 2
    square = shown.crop((*edge, *(edge + 40))).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.abs(_read_square(path, 8).astype(int) - np.asarray(square)).max() <= 1


def test_a_raw_tiff_opened_by_name_is_upright(tmp_path):
    path = write(tmp_path / "a.tif", tiff(3, 1, 8, bytes([0, 100, 255]), turned=6))
    for found in (read_image(path), as_image_list(Image.open(path))[0]):
        assert np.asarray(found)[..., 0].tolist() == [[0], [100], [255]]


def test_damaged_exif_leaves_the_picture_as_it_is_stored(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RAMP).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01" * 40)
    assert read_image(path).size == (256, 8)


# --- grey of many kinds ----------------------------------------------------------------------------------------------


def test_integer_modes_go_by_their_range():
    for image in (Image.fromarray(RAMP).convert("I"), Image.fromarray(RAMP.astype(np.int32)), Image.fromarray(RAMP)):
        assert np.array_equal(np.asarray(as_image_list(image)[0])[..., 0], RAMP)
    for values in (RAMP.astype(np.int32) * 257, RAMP.astype(np.uint16) * 257, RAMP.astype(">u2") * 257):
        assert np.array_equal(np.asarray(as_image_list(Image.fromarray(values))[0])[..., 0], RAMP)
    for value in (-1, 65536):
        with pytest.raises(ValueError, match=rf"images holds .* mode 'I' with values from .*{value}.*neither 8 nor 16"):
            as_image_list(Image.fromarray(np.array([[0, value]], np.int32)))


def test_mode_F_is_a_float_image():
    (found,) = as_image_list(Image.fromarray((RAMP / 255).astype(np.float32)))
    assert np.array_equal(np.asarray(found)[..., 0], RAMP)
    with pytest.raises(ValueError, match=r"mode F .* must lie in \[0, 1\], found 0 to 255"):
        as_image_list(Image.fromarray(RAMP.astype(np.float32)))


@pytest.mark.parametrize(
    ("name", "data", "grey"),
    [
        ("12 bits.tif", tiff(2, 1, 12, bytes([0xFF, 0xF0, 0x00])), [[255, 0]]),
        ("16 bits.tif", tiff(2, 1, 16, struct.pack("<HH", 300, 65535)), [[1, 255]]),
        ("white is zero.tif", tiff(2, 1, 16, struct.pack("<HH", 0, 65535), photometric=0), [[255, 0]]),
        ("8 bits, white is zero.tif", tiff(2, 1, 8, bytes([0, 255]), photometric=0), [[255, 0]]),
        ("float.tif", tiff(2, 1, 32, struct.pack("<ff", 0.2, 1), kind=3), [[51, 255]]),
        ("int32.tif", tiff(2, 1, 32, struct.pack("<ii", 7, 255), kind=2), [[7, 255]]),
        ("dark.pgm", b"P5 2 1 65535\n" + struct.pack(">HH", 100, 256), [[0, 1]]),
        ("12 bits.pgm", b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 2048), [[255, 128]]),
        ("2 bits.png", png(4, 1, 2, 0, b"\0\x1b"), [[0, 85, 170, 255]]),
        ("1 bit.png", png(2, 1, 1, 0, b"\0\x40"), [[0, 255]]),
    ],
)
def test_grey_of_every_depth_is_stretched_to_what_it_means(tmp_path, name, data, grey):
    found = np.asarray(read_image(write(tmp_path / name, data)))
    assert found.shape[-1] == 3 and found[..., 0].tolist() == grey


# --- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "alpha"),
    [
        (png(4, 1, 2, 0, b"\0\x1b", tRNS=b"\0\1"), [255, 0, 255, 255]),
        (png(2, 1, 4, 0, b"\0\x1f", tRNS=b"\0\x0f"), [255, 0]),
        (png(2, 1, 1, 0, b"\0\x40", tRNS=b"\0\1"), [255, 0]),
        (png(2, 1, 8, 0, b"\0\x0a\xc8", tRNS=b"\0\xc8"), [255, 0]),
        (png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 300, 60000), tRNS=struct.pack(">H", 60000)), [255, 0]),
        (png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", tRNS=struct.pack(">HHH", 4, 5, 6)), [255, 0]),
        (png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *[256] * 3, *[51200] * 3), tRNS=b"\xc8\0" * 3), [255, 0]),
        (png(3, 1, 8, 3, b"\0\0\1\2", PLTE=bytes(range(9)), tRNS=b"\0\x80"), [0, 128, 255]),
        (png(2, 1, 8, 4, b"\0\1\xff\2\0"), [255, 0]),
        (png(2, 1, 16, 6, b"\0" + struct.pack(">8H", 1, 2, 3, 65535, 1, 2, 3, 0)), [255, 0]),
    ],
)
def test_transparent_colours_of_every_png_are_transparent(tmp_path, data, alpha):
    found = read_image(write(tmp_path / "a.png", data))
    assert found.mode == "RGBA" and np.asarray(found)[0, :, 3].tolist() == alpha
    white = np.asarray(on_white(found))[0]
    assert all((white[i] == 255).all() for i, a in enumerate(alpha) if a == 0)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_modes_with_alpha_keep_it(mode):
    assert as_image_list(Image.new(mode, (2, 2)))[0].mode == "RGBA"


# --- the same everywhere ---------------------------------------------------------------------------------------------


def pictures(folder: Path) -> list[Path]:
    """One file of each kind that readers used to disagree on."""
    folder.mkdir(parents=True)
    ramp = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    sprite = np.zeros((64, 64, 4), np.uint8)
    sprite[16:48, 16:48] = (220, 30, 30, 255)
    sprite[:8, :, 1] = 200  # a colour nobody sees
    frames = [Image.fromarray(sprite), Image.new("RGBA", (64, 64), "blue")]
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "grey16.png")
    frames[0].save(folder / "rgba.png")
    frames[0].convert("LA").save(folder / "la.png")
    frames[0].quantize(4).save(folder / "palette.png")
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    Image.fromarray(ramp).convert("RGB").convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    Image.fromarray(ramp).convert("RGB").convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(ramp).convert("1").save(folder / "bits.png")
    return sorted(folder.iterdir())


def test_training_probes_and_encode_see_one_picture(tmp_path):
    files = pictures(tmp_path / "all" / "class")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = {file.name: to_canvas(read_image(file), 16, 16) for file in files}
    for file in files:
        assert np.array_equal(seen[file.name], to_canvas(as_image_list(Image.open(file))[0], 16, 16)), file
        assert np.abs(seen[file.name].astype(int) - _read_square(file, 16)).max() <= 1, file
        if file.name.split(".")[0] in ("rgba", "la", "palette", "animated", "pages"):
            assert (seen[file.name][0] == 255).all() and seen[file.name][8, 8].max() < 255, file
    for name in ("one", "two"):
        pictures(tmp_path / "probe" / name)
    data = load(tmp_path / "probe", 100, 16, 16)
    assert np.array_equal(data.pixels[: len(files)], np.stack([seen[file.name] for file in files]))
    said: list[str] = []
    folder = Folder(tmp_path / "all", 16, n_colors=4, seed=0, warn=said.append)
    assert not said and folder.palette.n_colors == 4


def test_colours_hidden_under_alpha_are_not_learned(tmp_path):
    hidden = np.full((8, 8, 4), (0, 255, 0, 0), np.uint8)
    hidden[2:6, 2:6] = (255, 0, 0, 255)
    Image.fromarray(hidden).save(tmp_path / "a.png")
    said: list[str] = []
    palette = Folder(tmp_path, 8, n_colors=512, seed=0, warn=said.append).palette
    assert palette.colors.tolist() == [[255, 0, 0], [255, 255, 255]]
    assert said == ["the images have 2 different colours, so the palette has 2, not 512"]


# --- what cannot be read ---------------------------------------------------------------------------------------------


def bomb(path: Path) -> Path:
    return write(path, png(20000, 20000, 1, 0, b"\0"))


@pytest.mark.parametrize("limit", [None, 10**10, 89478485])
def test_a_bomb_is_found_by_its_header_whatever_pillows_limit_is(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = bomb(tmp_path / "big.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"big\.png: it has 20000 × 20000 = 400000000 pixels, more than .* 178956970"
        ):
            read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS
    if limit != 89478485:
        with Image.open(path) as opened, pytest.raises(ValueError, match=r"images holds .* 400000000 pixels"):
            as_image_list(opened)


def test_large_photographs_are_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)  # as if it were above Pillow's limit, and far above
    for size in ((10, 10), (100, 100)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(tmp_path / "a.png").size == size


def test_a_bomb_in_a_folder_is_one_skipped_file_of_a_training(tmp_path):
    bomb(tmp_path / "big.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    said: list[str] = []
    data = Folder(tmp_path, 4, n_colors=1, seed=0, warn=said.append)
    assert data.n_skipped == 1 and "big.png" in said[0] and "400000000 pixels" in said[0]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("torn.png", png(8, 8, 8, 2, b"\0")[:60], "torn.png"),
        ("empty.png", b"", "no format that Pillow knows"),
        ("text.jpg", b"no image", "no format that Pillow knows"),
        ("flat.png", png(0, 5, 8, 0, b"\0"), "flat.png"),
        ("negative.tif", tiff(2, 1, 16, struct.pack("<hh", -5, 5), kind=2), "-5 to 5, which are neither 8 nor 16 bits"),
        ("loud.tif", tiff(1, 1, 32, struct.pack("<f", 7.0), kind=3), r"must lie in \[0, 1\], found 7 to 7"),
        ("short.tif", tiff(900, 900, 16, b"ab"), "short.tif"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path, name, data, says):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=rf"cannot read the image .*{name}") as error:
        read_image(path)
    assert error.match(says) and str(error.value).count(name) == 1
    with pytest.raises(ValueError, match=name):
        as_image_list([path])


def test_folders_and_missing_files_are_no_images(tmp_path):
    for path, says in ((tmp_path, "it is a folder"), (tmp_path / "no.png", "no such file"), ("a\0b", "a")):
        with pytest.raises(ValueError, match=says):
            read_image(path)
