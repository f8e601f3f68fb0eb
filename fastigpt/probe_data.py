"""Labelled images for probes: a folder of folders, an .npz file, scikit-learn's digits, or the scenes' own facts."""

from __future__ import annotations

import itertools
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastigpt.engine.memory import free_memory
from fastigpt.images import as_image_list, on_white, read_image, to_canvas
from fastigpt.scalars import whole

FEWEST = 3  # images of a class: one each to train, to choose by and to test
_SCENES_SEED = 2**32 - 1  # no training run draws these
_FIRST_SCENE = 50_000  # nor do the evaluations look at them
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Labelled:
    """pixels: uint8 [n, height, width, 3], on the canvas. labels: by fact, the class of each image, or None where an
    image does not have that fact."""

    name: str
    pixels: np.ndarray
    labels: dict[str, list[str | None]]


def load(data: str | os.PathLike[str], n: int, height: int, width: int, seed: int = 0) -> Labelled:
    """At most n labelled images (which ones, the seed says), resized to the canvas.

    data: "digits", "scenes", a folder whose subfolders are classes, or an .npz of x uint8 [n, H, W], [n, 1, H, W] or
    [n, H, W, 1 | 3 | 4] and y int [n] or [n, 1]. Raises ValueError or OSError that names what is wrong: also if there
    is one class only, or a class with fewer than 3 images.
    """
    whole("n", n, 1)
    whole("seed", seed, 0)
    data = os.fspath(data)
    path = Path(data)
    if data == "scenes":
        found = _scenes(n)
    elif data == "digits":
        found = _digits(n, seed)
    elif path.is_dir():
        found = _folder(path, n, height, width, seed)
    elif path.suffix == ".npz":
        found = _npz(path, n, seed)
    elif path.exists():
        raise ValueError(f"data {data}: is neither a folder nor an .npz file")
    else:
        raise ValueError(f'data {data}: no such folder or .npz file, nor is it "digits" or "scenes"')
    if found.pixels.shape[1:3] != (height, width):
        pictures = as_image_list(found.pixels)
        found = Labelled(found.name, np.stack([to_canvas(p, height, width) for p in pictures]), found.labels)
    for fact, classes in found.labels.items():
        _check(data, fact, classes)
    return found


def _check(data: str, fact: str, classes: list[str | None]) -> None:
    names, counts = np.unique([name for name in classes if name is not None], return_counts=True)
    if len(names) < 2:
        raise ValueError(f"data {data}: {fact} has {len(names)} class(es); a probe tells two or more apart")
    if counts.min() < FEWEST:
        rarest = str(names[counts.argmin()])
        raise ValueError(
            f"data {data}: {counts.sum()} images of {len(names)} classes, but {counts.min()} of {fact} {rarest!r}; "
            f"each class needs {FEWEST} or more"
        )


def _pick(total: int, n: int, seed: int) -> np.ndarray:
    """Which of `total` images to use, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:n])


def _scenes(n: int) -> Labelled:
    from fastigpt.scenes import scenes

    images, _, drawn = zip(*itertools.islice(scenes(_SCENES_SEED, _FIRST_SCENE), n))
    facts = [scene.facts() for scene in drawn]
    names = dict.fromkeys(name for each in facts for name in each)
    return Labelled("scenes", np.stack(images), {name: [each.get(name) for each in facts] for name in names})


def _digits(n: int, seed: int) -> Labelled:
    from sklearn.datasets import load_digits

    digits = load_digits()
    picked = _pick(len(digits.images), n, seed)
    grey = np.rint(digits.images[picked] * (255 / 16)).astype(np.uint8)
    return Labelled("digits", grey[..., None].repeat(3, -1), {"digit": [str(y) for y in digits.target[picked]]})


def _folder(path: Path, n: int, height: int, width: int, seed: int) -> Labelled:
    endings = Image.registered_extensions()
    files = [
        (file, folder.name)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in endings and file.is_file()
    ]
    if not files:
        raise ValueError(f"data {path}: no subfolder holds images; each class is a subfolder")
    pixels, labels = [], []
    for k in _pick(len(files), n, seed):
        file, label = files[k]
        pixels.append(to_canvas(read_image(file), height, width))
        labels.append(label)
    return Labelled(path.name, np.stack(pixels), {"class": labels})


def _npz(path: Path, n: int, seed: int) -> Labelled:
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = {"x", "y"} - set(held)
            if missing:
                raise ValueError(f"has no {' and no '.join(sorted(missing))}; found {', '.join(held)}")
            x, y = _array(archive, "x"), _array(archive, "y")
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"data {path}: {error}") from None
    if x.ndim == 4 and x.shape[1] == 1 and x.shape[3] not in (1, 3, 4):
        x = x[:, 0]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)) or x.size == 0:
        raise ValueError(f"data {path}: x must be uint8 [n, H, W] or [n, H, W, 3], not {x.dtype} {list(x.shape)}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(f"data {path}: y must be int [{len(x)}] or [{len(x)}, 1], not {y.dtype} {list(y.shape)}")
    picked = _pick(len(x), n, seed)
    pictures = as_image_list(x[picked] if x.ndim == 4 else x[picked][..., None])
    pixels = np.stack([np.asarray(on_white(picture)) for picture in pictures])
    return Labelled(path.stem, pixels, {"class": [str(label) for label in y.reshape(-1)[picked]]})


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an archive, once its header and its size have been checked: neither is to be believed."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of .npy version {version}, expected one of {', '.join(map(str, _HEADERS))}")
        shape, _, dtype = _HEADERS[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, expected numbers")
        if file.tell() + size != member.file_size:
            raise ValueError(
                f"{name} should hold {size} bytes, {dtype} {list(shape)}, but has {member.file_size} with its header"
            )
    free = free_memory(torch.device("cpu"))
    if size > free:
        raise ValueError(f"{name} takes {size} bytes of memory, {free} are free")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
