"""Exports as their readers read them; with the pixels of `sample`."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_jobs import checkpoint

import fastigpt
from fastigpt import jobs

N, FIRST = 21, 150


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A job with a prompt for each image, and its pixels."""
    folder = tmp_path_factory.mktemp("export")
    model = checkpoint(folder / "tiny", prompted=True)
    jobs.run(
        folder / "job",
        N,
        model=model,
        seed=5,
        first_index=FIRST,
        shard_size=6,
        prompts=["red cat", "dog"],
        progress=False,
    )
    loaded = fastigpt.load(model)
    prompts = [["red cat", "dog"][k % 2] for k in range(FIRST, FIRST + N)]
    pixels = loaded.sample(N, seed=5, first_index=FIRST, prompt=prompts, output_type="np")
    return folder / "job", pixels


def test_an_npz_is_what_numpy_and_the_evaluator_of_adm_read(tmp_path, job):
    path, pixels = job
    jobs.export(path, "npz", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        assert list(archive) == ["arr_0"] and np.array_equal(archive["arr_0"], pixels)
    # As guided-diffusion's evaluator opens it, to stream it: version 1.0 of the header and no other.
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == (pixels.shape, False, np.dtype(np.uint8))
        first = np.frombuffer(file.read(8 * pixels[0].size), dtype).reshape(8, *shape[1:])
    assert np.array_equal(first, pixels[:8])


def test_a_folder_and_a_zip_of_pictures_have_a_file_for_each_image(tmp_path, job):
    path, pixels = job
    jobs.export(path, "png", tmp_path / "folder")
    jobs.export(path, "png", tmp_path / "all.zip")
    names = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert names == [f"{FIRST + k:08d}.png" for k in range(N)]
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert sorted(archive.namelist()) == names and archive.testzip() is None
        for k, name in enumerate(names):
            data = archive.read(name)
            assert data == (tmp_path / "folder" / name).read_bytes()
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), pixels[k])
                told = {"seed": "5", "index": str(FIRST + k), "prompt": ["red cat", "dog"][(FIRST + k) % 2]}
                assert picture.info.items() >= told.items()


def test_parquet_says_what_its_columns_are(tmp_path, job):
    pq = pytest.importorskip("pyarrow.parquet")
    path, pixels = job
    jobs.export(path, "parquet", tmp_path / "set")
    assert [str(p.relative_to(tmp_path / "set")) for p in (tmp_path / "set").rglob("*.parquet")] == [
        "data/train-00000-of-00001.parquet"
    ]
    table = pq.read_table(tmp_path / "set" / "data")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and features.keys() == {"image", "prompt", "index"}
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == list(range(FIRST, FIRST + N))
    assert [row["prompt"] for row in rows[:2]] == ["red cat", "dog"]
    for row, image in zip(rows, pixels):
        assert row["image"]["path"] == f"{row['index']:08d}.png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), image)


def test_datasets_opens_the_parquet_as_images(tmp_path, job):
    datasets = pytest.importorskip("datasets")
    path, pixels = job
    jobs.export(path, "parquet", tmp_path / "set")
    found = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(found.features["image"], datasets.Image) and len(found) == N
    assert np.array_equal(np.asarray(found[3]["image"]), pixels[3]) and found[3]["index"] == FIRST + 3


def test_clean_fid_reads_folders_and_zips(tmp_path, job):
    fid = pytest.importorskip("cleanfid.fid")
    path, pixels = job
    for out in ("folder", "all.zip"):
        jobs.export(path, "png", tmp_path / out)
        features = fid.get_folder_features(
            str(tmp_path / out),
            lambda batch: batch.flatten(1),  # in place of its network, which it would have to fetch
            custom_fn_resize=lambda image: image,
            num_workers=0,
            device="cpu",
            verbose=False,
        )
        found = features.reshape(N, 3, *pixels.shape[1:3]).transpose(0, 2, 3, 1)
        assert sorted(map(bytes, np.rint(found).astype(np.uint8))) == sorted(map(bytes, pixels))


def test_torch_fidelity_reads_folders(tmp_path, job):
    utils = pytest.importorskip("torch_fidelity.utils")
    defaults = pytest.importorskip("torch_fidelity.defaults")
    path, pixels = job
    jobs.export(path, "png", tmp_path / "folder")
    kwargs = {**defaults.DEFAULTS, "input1": str(tmp_path / "folder"), "cuda": False, "verbose": False}
    found = utils.prepare_input_from_id(1, **kwargs)
    assert len(found) == N
    assert all(np.array_equal(found[k].permute(1, 2, 0).numpy(), pixels[k]) for k in range(N))


def test_a_tar_holds_a_picture_and_its_facts_by_one_name(tmp_path, job):
    path, pixels = job
    jobs.export(path, "webdataset", tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:4]] == ["00000150.png", "00000150.json", "00000151.png", "00000151.json"]
        for k in range(N):
            picture, facts = (archive.extractfile(member).read() for member in members[2 * k : 2 * k + 2])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), pixels[k])
            told = json.loads(facts)
            assert (told["index"], told["seed"], told["prompt"]) == (FIRST + k, 5, ["red cat", "dog"][(FIRST + k) % 2])


def test_large_exports_come_in_several_files(tmp_path, job, monkeypatch):
    from fastigpt.jobs import exporting

    monkeypatch.setattr(exporting, "_images_of_a_file", lambda images: 8)
    path, _ = job
    jobs.export(path, "webdataset", tmp_path / "tars")
    counts = []
    for file in sorted((tmp_path / "tars").iterdir()):
        with tarfile.open(file) as archive:
            counts.append((file.name, len(archive.getnames())))
    assert counts == [("000000.tar", 16), ("000001.tar", 16), ("000002.tar", 10)]
    pq = pytest.importorskip("pyarrow.parquet")
    jobs.export(path, "parquet", tmp_path / "set")
    found = sorted((tmp_path / "set" / "data").iterdir())
    assert [file.name for file in found] == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert [pq.read_metadata(file).num_rows for file in found] == [8, 8, 5]


def test_the_same_job_gives_the_same_bytes(tmp_path, job):
    path, _ = job
    for kind, out in (("npz", "{}.npz"), ("png", "{}.zip"), ("webdataset", "{}.tar")):
        for name in "ab":
            jobs.export(path, kind, tmp_path / out.format(name))
        assert (tmp_path / out.format("a")).read_bytes() == (tmp_path / out.format("b")).read_bytes()


@pytest.mark.parametrize(
    ("kind", "out", "error", "told"),
    [
        ("gif", "a", ValueError, "kind must be one of npz, png"),
        ("npz", "a", ValueError, r"must be a .npz file"),
        ("npz", "a.zip", ValueError, r"must be a .npz file"),
        ("png", "a.tar", ValueError, r"must be a folder or a .zip"),
        ("parquet", "a.parquet", ValueError, "must be a folder for parquet"),
        ("webdataset", "a.zip", ValueError, r"must be a folder or a .tar"),
        ("npz", "no/such/a.npz", FileNotFoundError, "no/such"),
        ("png", "old", FileExistsError, "old"),
        ("parquet", "old", FileExistsError, "old"),
    ],
)
def test_outputs_that_cannot_be_are_refused(tmp_path, job, kind, out, error, told):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    with pytest.raises(error, match=told):
        jobs.export(job[0], kind, tmp_path / out)
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "notes.txt"]


@pytest.mark.parametrize(("kind", "out"), [("npz", "{}.npz"), ("png", "{}.zip"), ("webdataset", "{}.tar")])
def test_memory_does_not_grow_with_the_job(tmp_path, kind, out):
    """Python's and numpy's memory, which holds the pixels."""
    model = checkpoint(tmp_path / "tiny")

    def peak(n: int) -> int:
        path: Any = tmp_path / f"job-{n}"
        jobs.run(path, n, model=model, seed=1, shard_size=100, progress=False)
        tracemalloc.start()
        jobs.export(path, kind, tmp_path / out.format(n))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)  # what is imported and kept
    few, many = peak(200), peak(1400)
    index = 0 if kind == "npz" else 1000  # a zip and a tar keep a list of their members
    assert many - few < 1200 * (16 * 3 / 2 + index)
