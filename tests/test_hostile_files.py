"""Files made to hurt: each ends at once in a CheckpointError that names it, and takes neither minutes nor memory."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTED, random_tokens, random_weights
from PIL import Image
from safetensors.torch import load_file, save_file

import fastigpt
from fastigpt import CheckpointError, ImageGPT, Palette
from fastigpt.prompts import Vocabulary

PALETTE = Palette(np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    vocabulary = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
    weights = random_weights(PROMPTED)
    model = ImageGPT(PROMPTED, weights, palette=PALETTE, vocabulary=vocabulary, backend="portable", device="cpu")
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A pipe that nobody writes to must not be waited for, nor a file that never ends be read."""

    def late(*_: object) -> None:
        raise TimeoutError("a minute")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)


def refuse(folder: Path, *words: str) -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        fastigpt.load(folder, backend="portable", device="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 2000


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


JSON = ["config.json", "preprocessor_config.json", "prompt.json"]


@pytest.mark.parametrize("name", [*JSON, "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"[" * 200_000, "recursion"),
        (b'{"a":' * 200_000, "recursion"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' comes twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": "\xe4"}', "is not JSON"),
        (b"", "is not JSON"),
        (b" " * (17 << 20), "bytes, expected at most"),
        (b"[]", ""),
        (b"null", ""),
    ],
)
def test_json_that_is_none(saved, name, data, word):
    if name.startswith("model"):
        (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(data)
    refuse(saved, name, word)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_its_other_encodings_is_read(saved, name, encoding):
    (saved / name).write_bytes((saved / name).read_text().encode(encoding))
    fastigpt.load(saved, backend="portable")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 10**400),
        ("n_head", 2**31),
        ("n_embd", 10**12),
        ("n_inner", 2**62),
        ("vocab_size", 10**18),
        ("n_positions", 10**30),
        ("layer_norm_epsilon", True),
        ("layer_norm_epsilon", 10**400),
        ("layer_norm_epsilon", 1e300),
        ("layer_norm_epsilon", 1e-50),
        ("layer_norm_epsilon", -1e-5),
        ("layer_norm_epsilon", float("inf")),
        ("layer_norm_epsilon", None),
        ("layer_norm_epsilon", "1e-5"),
        ("model_type", "x" * 10**6),
        ("activation_function", [["quick_gelu"]] * 10**5),
        ("add_cross_attention", True),
        ("architectures", "ImageGPTModel"),
        ("fastigpt", "x" * 10**6),
    ],
)
def test_config_values_that_no_model_has(saved, key, value):
    rewrite(saved / "config.json", lambda config: config.update({key: value}))
    refuse(saved, "config.json", key if key != "vocab_size" else "n_colors" if value < 2**24 else "vocab_size")


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"height": 10**9, "width": 10**9}, "height"),
        ({"height": 4096, "width": 8192}, "n_positions is 16"),
        ({"height": True, "width": 16}, "height"),
        ({"height": 4, "width": 4, "n_words": 10**9, "prompt_length": 3}, "n_words"),
        ({"height": 4, "width": 4, "n_words": 5, "prompt_length": "3"}, "prompt_length"),
    ],
)
def test_canvases_and_prompts_that_no_model_has(saved, own, word):
    rewrite(saved / "config.json", lambda config: config.update(fastigpt=own))
    refuse(saved, "config.json", word)


def test_a_vocabulary_of_many_equal_words_is_refused_at_once(saved):
    rewrite(saved / "prompt.json", lambda prompt: prompt.update(words=["a", "b"] * 100_000))
    refuse(saved, "prompt.json", "more than once")


# --- what is no file ---------------------------------------------------------------------------------------------

FILES = [*JSON, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "clusters.npy"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "nowhere", "device"])
def test_what_is_no_file_is_not_opened(saved, name, kind):
    if name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (saved / "model.safetensors").unlink()
    if name == "clusters.npy":
        (saved / "preprocessor_config.json").unlink()
    path = saved / name
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": name, "nowhere": "nowhere", "device": "/dev/zero"}[kind])
    words = {"directory": "a directory", "pipe": "a pipe", "device": "a device", "loop": "cannot", "nowhere": "cannot"}
    refuse(saved, name, words[kind])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", [*JSON, "model.safetensors"])
def test_files_that_may_not_be_read(saved, name):
    (saved / name).chmod(0)
    refuse(saved, name)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/m", "a\0b", "x" * 5000, "/" + "y/" * 3000, "\ud800"])
def test_places_that_cannot_be(name):
    with pytest.raises(CheckpointError):
        fastigpt.load(name, local_files_only=True)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["y" * 5000, "a\0b", "\ud800", "config.json", "folder", "../m/model.safetensors", ""])
def test_shards_that_cannot_be(saved, shard):
    (saved / "model.safetensors").rename(saved / "a.safetensors")
    (saved / "folder").mkdir()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    refuse(saved, "model.safetensors.index.json" if shard not in ("config.json", "folder") else shard)


def odd_tensors() -> dict[str, Callable[[torch.Tensor], object]]:
    return {
        "meta": lambda t: t.to("meta"),
        "sparse": lambda t: t.to_sparse(),
        "sparse_csr": lambda t: t.to_sparse_csr(),
        "torch.complex64": lambda t: t.to(torch.complex64),
        "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "not all are stored": lambda t: torch.zeros(1).expand(t.shape),
        "shape [1048576, 1048576]": lambda t: torch.zeros(1).expand(2**20, 2**20),
        "shape [0, 16]": lambda t: t[:0],
        "torch.int8": lambda t: t.to(torch.int8),
        "torch.bool": lambda t: t.bool(),
        "dictionary": lambda t: [t],
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("word", odd_tensors())
def test_tensors_that_are_no_plain_ones(saved, word, zipped):
    weights = load_file(saved / "model.safetensors")
    weights["lm_head.weight"] = odd_tensors()[word](weights["lm_head.weight"])
    (saved / "model.safetensors").unlink()
    if word in ("meta", "quantised", "nested", "sparse_csr") and not zipped:
        pytest.skip("the old format has none")
    torch.save(weights, saved / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refuse(saved, "pytorch_model.bin")
    if word != "nested":  # which weights_only does not let in
        refuse(saved, word)


def test_parameters_and_slices_are_plain_enough(saved):
    weights = load_file(saved / "model.safetensors")
    before = fastigpt.load(saved, backend="portable").logits(random_tokens(PROMPTED, 1))
    (saved / "model.safetensors").unlink()
    big = torch.cat([weights["lm_head.weight"], weights["transformer.wte.weight"]])
    weights |= {"lm_head.weight": torch.nn.Parameter(big[:9]), "transformer.wte.weight": big[9:].T.contiguous().T}
    torch.save(weights, saved / "pytorch_model.bin")
    loaded = fastigpt.load(saved, backend="portable")
    assert torch.equal(loaded.logits(random_tokens(PROMPTED, 1)), before)
    assert all(w.untyped_storage().nbytes() == w.nbytes and not w.requires_grad for w in loaded.weights.values())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"]" * 100,
        b"\x80\x02(((((.",
        b"\x80\x02ctorch\nSize\nX\x03\x00\x00\x00abc\x85R.",
        b"\x80\x02}U\xffx.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
        b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
        b"PK\x03\x04" + bytes(200),
    ],
)
def test_pickles_that_are_none(saved, data):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(data)
    refuse(saved, "pytorch_model.bin is damaged, or holds more than tensors: ")


def test_an_archive_that_unpacks_to_more_than_itself(saved):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(saved / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, bytes(200 << 20) if entry.filename.endswith("data/0") else data)
    refuse(saved, "larger than the file")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8])
def test_a_safetensors_header_longer_than_the_file(saved, length):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])
    refuse(saved, "model.safetensors")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**31, 16], [0], [-9, 16]])
def test_a_safetensors_shape_larger_than_the_file(saved, shape):
    data = (saved / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refuse(saved, "model.safetensors")


def test_tensors_that_are_not_needed_are_not_read(saved):
    weights = load_file(saved / "model.safetensors")
    save_file({**weights, "huge": torch.zeros(20_000_000)}, saved / "model.safetensors")
    with pytest.warns(UserWarning, match="huge"):
        loaded = fastigpt.load(saved, backend="portable")
    assert "huge" not in loaded.weights


# --- palettes ----------------------------------------------------------------------------------------------------


def npy(header: str, version: bytes = b"\x01\x00") -> bytes:
    good = io.BytesIO()
    np.save(good, PALETTE.clusters)
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + good.getvalue()[128:]


@pytest.mark.parametrize(
    "data",
    [
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000, 3), }"),
        npy("{'descr': '<f4', 'fortran_order': False, (#: (9, 3), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 900 + "}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (9, 3), }"),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (9, 3), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-9, 3), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2**70, 3), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 3), }", b"\x07\x00"),
        b"\x93NUMPY",
        b"\x80\x04.",
        bytes(5 << 20),
    ],
)
def test_arrays_that_are_none(saved, data):
    (saved / "preprocessor_config.json").unlink()
    (saved / "clusters.npy").write_bytes(data)
    refuse(saved, "clusters.npy")
    with pytest.raises(CheckpointError, match=r"clusters\.npy"):
        Palette.from_file(saved / "clusters.npy")


@pytest.mark.parametrize("value", [10**400, 1e300, float("nan"), True, "0.5", None, [0.5], {}])
def test_clusters_that_are_no_colours(saved, value):
    def change(processor: dict) -> None:
        processor["clusters"][0][0] = value

    rewrite(saved / "preprocessor_config.json", change)
    if value is True:
        fastigpt.load(saved, backend="portable")  # a 1 to every reader of numbers
    else:
        refuse(saved, "preprocessor_config.json", "clusters must")


# --- what training reads back -------------------------------------------------------------------------------------


def test_a_damaged_state_of_a_training_is_named(tmp_path):
    from fastigpt.training.train import train

    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    sizes = {"resolution": 4, "n_layer": 1, "n_head": 1, "n_embd": 16, "batch_size": 2, "warmup": 1}

    def go_on() -> None:
        train(tmp_path / "out", images=images, steps=1, progress=False, **sizes)

    go_on()
    state = tmp_path / "out" / "training" / "state.pt"
    good = state.read_bytes()
    whole = torch.load(state, weights_only=True)
    wrong = [
        {**whole, "network": {}},
        {**whole, "ema": {name: tensor[:1] for name, tensor in whole["ema"].items()}},
        {**whole, "ema": None},
        {**whole, "optimizers": whole["optimizers"][:1]},
        {**whole, "optimizers": [{}, {}]},
        {**whole, "step": "x"},
        {"identity": whole["identity"]},
        {**whole, "identity": 3},
        [],
    ]
    for content in (good[:1000], b"", b"\x80\x02(((((.", *wrong):
        if isinstance(content, bytes):
            state.write_bytes(content)
        else:
            torch.save(content, state)
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            go_on()
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(CheckpointError, match=r"state\.pt is a pipe"):
        go_on()
    state.unlink()
    state.write_bytes(good)
    go_on()
