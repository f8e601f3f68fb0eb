"""A few hundred seeded inputs of every kind that may hold a picture, tokens or a mask: each works or is refused by one
of the promised exceptions, and what works is a picture. In a process of its own, so that a crash is seen.

`python tests/fuzz/test_fuzz_images.py FIRST LAST` tries seeds by hand.
"""

from __future__ import annotations

import faulthandler
import io
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

PROMISED = (ValueError, TypeError)  # CheckpointError is a ValueError
SEEDS = 400
DIMENSIONS = (0, 1, 2, 3, 3, 3, 4, 4, 5, 6, 8, 8, 9, 17)
Rng = np.random.Generator


def pick(rng: Rng, *options: Any) -> Any:
    return options[rng.integers(len(options))]


def shape(rng: Rng) -> tuple[int, ...]:
    if rng.random() < 0.6:
        n, height, width = rng.integers(1, 9, 3).tolist()
        colour = (height, width, 3), (3, height, width), (n, height, width, 3), (n, 3, height, width)
        return pick(rng, (height, width), (n, height, width), (n, 1, height, width), *colour)
    return tuple(int(rng.choice(DIMENSIONS)) for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 3, 4, 4, 5])))


def numbers(rng: Rng) -> np.ndarray:
    dtypes = [
        "u1",
        "u1",
        "?",
        "f4",
        "f4",
        "f8",
        "f2",
        ">f4",
        "i8",
        ">i8",
        "i4",
        "u2",
        "u8",
        "c8",
        "O",
        "U3",
        "M8[s]",
        "u1,u1",
    ]
    values = rng.random(shape(rng))
    if rng.random() < 0.2:
        values = rng.normal(0, pick(rng, 0.3, 100, 1e30), values.shape)
    if rng.random() < 0.5:
        return (values * 255).astype(np.uint8) if rng.random() < 0.5 else values
    if values.size and rng.random() < 0.4:
        values.flat[rng.integers(values.size)] = pick(rng, np.nan, np.inf, -0.1, 1.5, 256)
    with np.errstate(all="ignore"):
        return values.astype(pick(rng, *dtypes))


def array(rng: Rng) -> Any:
    found = numbers(rng)
    match rng.integers(5):
        case 0:
            found = found[..., ::-1] if found.ndim else found
        case 1:
            found = found.T
        case 2:
            found.setflags(write=False)
        case 3:
            found = np.broadcast_to(found, (pick(rng, 0, 1, 3, 40_000), *found.shape)) if found.ndim < 3 else found
    return found


def tensor(rng: Rng) -> Any:
    values = numbers(rng)
    if values.dtype.kind not in "uifb?c" or not values.dtype.isnative:
        values = rng.random(values.shape).astype(np.float32)
    found = torch.from_numpy(values.copy())
    match rng.integers(12):
        case 0:
            found = found.to(pick(rng, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.float16))
        case 1:
            found = found.to("meta")
        case 2:
            found = found.float().to_sparse() if found.ndim else found
        case 3:
            found = torch.complex(found.float(), -found.float()).conj().imag if not found.is_complex() else found.conj()
        case 4:
            found = found.float().requires_grad_()
        case 5:
            found = found.clone()
            found.untyped_storage().resize_(0)
        case 6:
            found = torch.nested.nested_tensor([found.float(), found.float()]) if found.ndim else found
        case 7:
            found = torch.quantize_per_tensor(found.float(), 0.1, 0, torch.quint8)
        case 8:
            found = found.movedim(0, -1) if found.ndim else found
        case 9:
            found = torch._neg_view(found) if found.dtype != torch.bool else found
    return found


def picture(rng: Rng) -> Image.Image:
    modes = (
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "LA",
        "PA",
        "La",
        "RGBa",
        "I;16",
    )
    size = (int(rng.choice([0, 1, 2, 7, 30])), int(rng.choice([1, 3, 20])))
    source = Image.fromarray(rng.integers(0, 256, (max(1, size[1]), max(1, size[0]), 3), dtype=np.uint8)).resize(size)
    mode = pick(rng, *modes, "I;16B")
    try:
        found = source.convert(mode)
    except ValueError:
        found = Image.new(mode, size)
    if rng.random() < 0.4:
        key = pick(rng, "transparency", "exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "icc_profile")
        exif = Image.Exif()
        exif[0x0112] = pick(rng, 0, 1, 3, 6, 8, 9)
        junk = (0, -5, 300, (1, 2, 3), b"\1\2", "text", None, rng.bytes(40), exif.tobytes(), 3.5, (), [1])
        found.info[key] = pick(rng, *junk)
    return found


def file(rng: Rng, folder: Path) -> Path:
    """An image file of some format, then damaged or not."""
    formats = [
        "PNG",
        "PNG",
        "JPEG",
        "JPEG",
        "GIF",
        "BMP",
        "TIFF",
        "TIFF",
        "PPM",
        "TGA",
        "ICO",
        "PCX",
        "SGI",
        "DDS",
        "IM",
    ]
    formats += [
        name
        for name, feature in (("WEBP", "webp"), ("JPEG2000", "jpg_2000"), ("AVIF", "avif"))
        if features.check(feature)
    ]
    format, image = pick(rng, *formats), picture(rng)
    data = io.BytesIO()
    options: dict[str, Any] = {}
    if format == "TIFF":
        options["compression"] = pick(rng, "raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")
    if format in ("GIF", "PNG", "TIFF") and rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [image]}
    try:
        image.save(data, format, **options)
    except Exception:  # what a format cannot hold is saved as one that can
        image.info.clear()
        as_rgb = Image.new("RGB", (9, 9), "red") if 0 in image.size else image.convert("RGB")
        as_rgb.save(data, "PNG")
    content = bytearray(data.getvalue())
    match rng.integers(10):
        case 0:
            content = content[: rng.integers(len(content))]
        case 1 | 2:
            for _ in range(rng.integers(1, 12)):
                content[rng.integers(len(content))] = rng.integers(256)
        case 3:
            at = rng.integers(min(64, len(content)))
            content[at : at + 4] = pick(rng, b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x40\0")
        case 4:
            at = rng.integers(len(content))
            content[at:at] = rng.bytes(rng.integers(1, 30))
    path = folder / f"picture.{pick(rng, format.lower(), 'png', 'jpg', 'tif')}"
    path.write_bytes(content)
    return path


def archive(rng: Rng, folder: Path) -> Path:
    n = int(rng.integers(6, 12))
    x = rng.integers(0, 256, (n, *pick(rng, (8, 8), (8, 8, 3), (1, 8, 8), (8, 8, 4), (8, 8, 2), ())), dtype=np.uint8)
    y = (np.arange(n) % 2).reshape(pick(rng, (n,), (n, 1), (1, n)))
    data = io.BytesIO()
    save = pick(rng, np.savez, np.savez_compressed)
    save(data, **{pick(rng, "x", "x", "x", "z"): x, "y": y.astype(pick(rng, "i8", "u1", "f4", "U1"))})
    content = bytearray(data.getvalue())
    for _ in range(pick(rng, 0, 0, 0, 1, 4, 8)):
        content[rng.integers(min(len(content), pick(rng, 200, 10**9)))] = rng.integers(256)
    path = folder / "data.npz"
    path.write_bytes(content[: rng.integers(len(content))] if rng.random() < 0.1 else content)
    return path


def anything(rng: Rng, folder: Path, depth: int = 0) -> Any:
    match rng.integers(6 if depth < 2 else 4):
        case 0:
            return array(rng)
        case 1:
            return tensor(rng)
        case 2:
            return picture(rng)
        case 3:
            return pick(
                rng, file(rng, folder), str(file(rng, folder)), folder, "", "no.png", "a\0b", b"bytes", None, 3, {}, 1.5
            )
    return [anything(rng, folder, depth + 1) for _ in range(rng.integers(4))]


# --- what is tried with them -----------------------------------------------------------------------------------------


def try_images(rng: Rng, folder: Path) -> None:
    from fastigpt.images import as_image_list, to_canvas

    given = pick(rng, array, tensor, picture)(rng) if rng.random() < 0.7 else anything(rng, folder)
    for found in as_image_list(given):
        assert found.mode in ("RGB", "RGBA") and min(found.size) > 0
        (again,) = as_image_list(found)
        assert again.mode == found.mode and again.tobytes() == found.tobytes()
        assert to_canvas(found, 4, 5).shape == (4, 5, 3)


def try_files(rng: Rng, folder: Path) -> None:
    from fastigpt.images import as_image_list, read_image, to_canvas
    from fastigpt.training.data import _read_square

    path = file(rng, folder)
    seen = to_canvas(read_image(path), 8, 8)
    assert np.array_equal(seen, to_canvas(as_image_list(path)[0], 8, 8)) and _read_square(path, 4).shape == (4, 4, 3)


def try_masks(rng: Rng, folder: Path) -> None:
    from fastigpt.images import mask_cells

    given = pick(rng, array, tensor, picture)(rng)
    if rng.random() < 0.5:
        given = rng.random(shape(rng)) < 0.5
    if rng.random() < 0.3:
        given = anything(rng, folder)
    cells = mask_cells(given, [(8, 4)] * int(rng.integers(1, 4)), 5, 3)
    assert cells.shape[1:] == (5, 3) and cells.dtype == bool


def try_tokens(rng: Rng, folder: Path) -> None:
    from fastigpt.arguments import token_array
    from fastigpt.families import image_gpt
    from fastigpt.families.image_gpt.config import ImageGPTConfig

    config = ImageGPTConfig(1, 1, 8, height=2, width=2, n_colors=9)
    given = pick(rng, array, tensor)(rng)
    if rng.random() < 0.5:
        given = rng.integers(-1, 10, (rng.integers(3), 4)).astype(pick(rng, "i8", ">i8", "i4"))
    tokens = token_array("tokens", given, image_gpt.spec(config), unknown=True, whole_canvas=True)
    assert tokens.dtype == torch.int64 and tokens.shape[1] == 4 and tokens.min() >= -1 and tokens.max() < 9


def try_palettes(rng: Rng, folder: Path) -> None:
    from fastigpt.codecs.palette import Palette

    given = pick(rng, array, tensor, picture)(rng) if rng.random() < 0.6 else anything(rng, folder)
    assert len(Palette.fit(given, pick(rng, 1, 1, 2, 5))) <= 5


def try_archives(rng: Rng, folder: Path) -> None:
    from fastigpt.probe_data import load

    assert load(archive(rng, folder), 10, 4, 4).pixels.shape[1:] == (4, 4, 3)


KINDS: tuple[Callable[[Rng, Path], None], ...] = (
    try_images, try_images, try_files, try_files, try_masks, try_tokens, try_palettes, try_archives
)  # fmt: skip


def run(first: int, last: int) -> None:
    from fastigpt import image_arrays

    faulthandler.enable()
    warnings.simplefilter("ignore")
    image_arrays.MAX_PIXELS = 1_000_000  # so that no damaged header takes a second
    torch.set_num_threads(1)
    wrong = refused = 0
    for seed in range(first, last):
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                KINDS[seed % len(KINDS)](np.random.default_rng(seed), Path(folder))
            except PROMISED as error:
                refused += 1
                if not str(error) or "Traceback" in str(error):
                    wrong += 1
                    print(f"seed {seed} says nothing: {error!r}", file=sys.stderr)
            except Exception:
                wrong += 1
                print(f"seed {seed}:", traceback.format_exc(), file=sys.stderr)
    print(f"refused {refused}", flush=True)
    sys.exit(min(wrong, 100))


def test_whatever_is_handed_over_works_or_is_refused_by_a_promised_exception():
    result = subprocess.run(
        [sys.executable, __file__, "0", str(SEEDS)], capture_output=True, text=True, timeout=300, check=False
    )
    last = [line for line in result.stdout.splitlines() if line.startswith("seed")][-1:]
    assert result.returncode == 0, f"exit {result.returncode} after {last}\n{result.stderr[-6000:]}"
    refused = int(result.stdout.splitlines()[-1].removeprefix("refused "))
    assert SEEDS * 0.2 < refused < SEEDS * 0.9  # a good part works, a good part does not


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
