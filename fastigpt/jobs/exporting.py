"""`export`: a complete job as the files that evaluations and datasets read, written in constant memory and named when
they are whole."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastigpt.extras import require
from fastigpt.files import check_folder_writable, check_writable, replacing, umask
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.images import Images, Picture, file_name
from fastigpt.jobs.store import open_store
from fastigpt.progress import image_bar

_FILE_BYTES = 2**29  # of a Parquet file or a tar of several, about
_ROWS = 256  # images of a row group


def export(
    directory: str | os.PathLike[str],
    kind: str,
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: bool | None = None,
) -> None:
    """Writes the images of a complete job.

    kind and out: "npz", a .npz file with arr_0 uint8 [n, H, W, 3] (ADM's evaluator); "png", a folder of 00000000.png …
    named by image index, or a .zip of them (clean-fid, torch-fidelity, pytorch-fid); "parquet", a folder with
    data/train-00000-of-00001.parquet … that `datasets` opens, with image, prompt and index; "webdataset", a .tar, or a
    folder of them, with a .png and a .json for each image. model, device: what decodes; None: where the job has it
    from, and what is there. progress: a bar; None: if a person watches.

    Raises ValueError for a job that is not complete or is damaged, OSError if `out` cannot be written or a folder of
    that name exists; then nothing is left there.
    """
    writers: dict[str, Callable[[Images, Path, Any], None]] = {
        "npz": _npz,
        "png": _png,
        "parquet": _parquet,
        "webdataset": _webdataset,
    }
    if kind not in writers:
        raise ValueError(f"kind must be one of {', '.join(writers)}, not {kind!r}")
    path = Path(out).expanduser()
    suffix = {"npz": ".npz", "png": ".zip", "webdataset": ".tar"}.get(kind)
    is_file = suffix is not None and path.suffix.lower() == suffix
    if kind == "npz" and not is_file:
        raise ValueError(f"out must be a .npz file, not {os.fspath(out)!r}")
    if not is_file and path.suffix.lower() in (".npz", ".zip", ".tar", ".png", ".parquet"):
        raise ValueError(
            f"out must be a folder{f' or a {suffix}' if suffix else ''} for {kind}, not {os.fspath(out)!r}"
        )
    if kind == "parquet":
        require("pyarrow", for_="Parquet")
    if is_file:
        check_writable(path)
    else:
        if path.exists():
            raise FileExistsError(f"{path} exists; an export does not mix with what is there: name another folder")
        check_folder_writable(path)
    images = Images(JobDirectory.open(open_store(directory)), None if model is None else os.fspath(model), device)
    with replacing(path) if is_file else _new_folder(path) as target, image_bar(images.n, progress) as bar:
        count = 0

        def counted() -> Iterator[Picture]:
            nonlocal count
            for picture in images:
                yield picture
                count += 1
                if count % 64 == 0:
                    bar.images(count)

        writers[kind](images, target, counted())
        bar.images(count)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, renamed to it if the block succeeds, removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _npz(images: Images, path: Path, pictures: Iterator[Picture]) -> None:
    import numpy as np

    shape = (images.n, images.height, images.width, 3)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        archive.open(_entry("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        header: Any = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for picture in pictures:
            member.write(picture.pixels.tobytes())


def _png(images: Images, path: Path, pictures: Iterator[Picture]) -> None:
    if path.is_dir():
        for picture in pictures:
            (path / f"{file_name(picture)}.png").write_bytes(images.png(picture))
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for picture in pictures:
            archive.writestr(_entry(f"{file_name(picture)}.png"), images.png(picture))


def _entry(name: str) -> zipfile.ZipInfo:
    """With a fixed date, so that the same job gives the same bytes."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    return entry


def _parquet(images: Images, path: Path, pictures: Iterator[Picture]) -> None:
    """As `datasets` writes it: an image is a struct of its bytes and its name, and the schema says what columns are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {
        "image": {"_type": "Image"},
        "prompt": {"dtype": "string", "_type": "Value"},
        "index": {"dtype": "int64", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("prompt", pa.string()), ("index", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    each = _images_of_a_file(images)
    files = -(-images.n // each)
    (path / "data").mkdir()
    for file in range(files):
        left = min(each, images.n - file * each)
        with pq.ParquetWriter(path / "data" / f"train-{file:05d}-of-{files:05d}.parquet", schema) as writer:
            while left:
                some = [next(pictures) for _ in range(min(_ROWS, left))]
                left -= len(some)
                rows = [
                    {
                        "image": {"bytes": images.png(picture), "path": f"{file_name(picture)}.png"},
                        "prompt": picture.prompt,
                        "index": picture.index,
                    }
                    for picture in some
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
    for _ in pictures:
        raise AssertionError("more images than the job has")


def _webdataset(images: Images, path: Path, pictures: Iterator[Picture]) -> None:
    if not path.is_dir():
        _tar(images, path, pictures)
        return
    each = _images_of_a_file(images)
    for file in range(-(-images.n // each)):
        some = (next(pictures) for _ in range(min(each, images.n - file * each)))
        _tar(images, path / f"{file:06d}.tar", some)
    for _ in pictures:
        raise AssertionError("more images than the job has")


def _tar(images: Images, path: Path, pictures: Iterator[Picture]) -> None:
    import io

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for picture in pictures:
            facts = {**images.facts(picture), "index": picture.index, "seed": images.job.parameters.seed}
            for suffix, data in ((".png", images.png(picture)), (".json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(file_name(picture) + suffix)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _images_of_a_file(images: Images) -> int:
    """PNGs take no more than their pixels, about."""
    return max(1000, _FILE_BYTES // (3 * images.height * images.width))
