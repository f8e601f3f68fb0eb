"""Some hundred damaged and hostile files of each kind, made from seeds, in a process of their own: each ends in a
CheckpointError that names it, or in a model whose logits are finite, at once and in little memory.

    python tests/fuzz/test_fuzz_checkpoints.py SEED KIND=COUNT …     # runs kinds by hand and prints what it found
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KINDS = {"json": 250, "npy": 200, "safetensors": 200, "pickle": 200, "shards": 100, "nodes": 60, "palettes": 200}
_SECONDS = 20  # that one case may take; all but a few take a thousandth
_FIRST_SHARD = 5  # tensors
_MEMORY = 8 << 30  # of address space, most of which torch's libraries take


@pytest.fixture(scope="module")
def child() -> subprocess.CompletedProcess[str]:
    """All kinds in one process: importing torch takes longer than reading any of them."""
    kinds = [f"{kind}={count}" for kind, count in KINDS.items()]
    return subprocess.run([sys.executable, __file__, "0", *kinds], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_strangers(kind: str, child: subprocess.CompletedProcess[str]) -> None:
    ends = [line for line in child.stdout.splitlines() if line.startswith(f"{kind}: ")]
    found = f"{child.returncode}\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
    assert len(ends) == 1, found
    count, refused, wrong = (int(word) for word in ends[0].split() if word.isdigit())
    assert count == KINDS[kind] and wrong == 0, found
    assert 0 < refused < count, "neither all right nor all wrong, or it tries nothing"


# --- what is put into files --------------------------------------------------------------------------------------

VALUES: list[Any] = [
    0, -1, 1, 2, 3, 17, 2**31, 2**63, 10**9, 10**30, 10**400, -(10**400), 0.5, -0.0, 1e300, 1e-320, float("nan"),
    float("inf"), True, False, None, "", "x", "x" * 5000, "\ud800", "\x00", "../..", "ü" * 300, [], {}, [[]], [{}],
    [1, 2, 3], [None] * 9, [[0.5] * 3] * 9, [[10**400] * 3] * 9, [["a"] * 3] * 9, {"height": 4},
    {"height": 4, "width": 4}, [[0.1, float("nan"), 0.2]] * 9, ["ImageGPTModel"], ["x" * 9000], {"a": {"b": [1]}},
    [1] * 1000,
]  # fmt: skip


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, turned, doubled, left out, or overwritten."""
    how, at = rng.randrange(6), rng.randrange(len(data) + 1)
    length = rng.choice([1, 2, 8, 64])
    if how == 0:
        return data[:at]
    if how == 1:
        changed = bytearray(data)
        for _ in range(length):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if how == 2:
        return data[:at] + data[at : at + length] * rng.choice([2, 50]) + data[at + length :]
    if how == 3:
        return data[:at] + data[at + length :]
    if how == 4:
        return data[:at] + rng.choice([b"\0", b"\xff", b"[", b"{", b"9"]) * length + data[at + length :]
    return rng.randbytes(rng.choice([0, 1, 7, 200]))


def changed_json(rng: random.Random, text: bytes) -> bytes:
    """One value of a JSON document replaced, removed, or given twice; or the text in another dress."""
    data = json.loads(text)
    how = rng.randrange(10)
    if how == 0:
        return b"\xef\xbb\xbf" + text
    if how == 1:
        return json.dumps(data).encode(rng.choice(["utf-16", "utf-32", "utf-7", "cp500"]))
    if how == 2:
        return rng.choice([b"[", b'{"a":']) * rng.choice([10, 2000, 200_000])
    if how == 3:
        return b'{"n_layer": 1, ' + text.lstrip()[1:]
    if how == 4:
        return damaged(rng, text)
    where = data
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(where[key], (dict, list)) and rng.random() < 0.5:
            where = where[key]
            continue
        if how == 5:
            del where[key]
        else:
            where[key] = rng.choice(VALUES)
        break
    return json.dumps(data).encode("utf-8", "surrogatepass")


def npy(rng: random.Random, good: bytes) -> bytes:
    """A header that lies, or damage."""
    if rng.random() < 0.3:
        return damaged(rng, good)
    shape = rng.choice([
        "(100000000000, 3)", "(9, 3)", "(0, 3)", "(9,)", "()", "(-9, 3)", "(9, 3, 1)", "(3, 9)", "(9.0, 3)", "((9, 3))",
        "(9, 3" + ")" * 300, "(" * 400, "{}", "(True, 3)", "(2**70, 3)", "(10**30, 0)",
    ])  # fmt: skip
    dtype = rng.choice(
        ["<f4", "<f8", ">f4", "|O", "<U5", "<c8", "|b1", "<M8[s]", "|V9", "<f2", "<i8", "nonsense", "<f16"]
    )
    header = f"{{'descr': '{dtype}', 'fortran_order': {rng.choice(['True', 'False', '0', 'x'])}, 'shape': {shape}, }}"
    if rng.random() < 0.2:
        header = header.replace("'shape'", rng.choice(["(#", "'shape", "shape", "'\\x00'", '"""']))
    version = rng.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    length = rng.choice([len(header), 0, 5, 65535, 2**31])
    size = struct.pack("<H", length & 65535) if version[0] == 1 else struct.pack("<I", length)
    return b"\x93NUMPY" + version + size + header.encode() + good[-9 * 3 * 4 :]


def safetensors(rng: random.Random, good: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged(rng, good)
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    what = rng.choice(["dtype", "shape", "data_offsets", "name", "metadata", "length"])
    if what == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None])
    elif what == "shape":
        header[name]["shape"] = rng.choice([[], [0], [2**63], [2**40, 2**40], [-1], [16, 9], "16", [1.5], [9, 16, 1]])
    elif what == "data_offsets":
        header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**63], [-4, 0], [5, 3], [0], [0, 10**30], "0", None])
    elif what == "name":
        header[rng.choice(["", "x" * 5000, "\x00", "module." + name, "a.wte.weight"])] = header.pop(name)
    elif what == "metadata":
        header["__metadata__"] = rng.choice([3, {"format": 3}, {"format": "x" * 10_000}, [], None, {"a": {"b": 1}}])
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = rng.choice([2**63, 2**40, 1, len(text) - 1]) if what == "length" else len(text)
    return struct.pack("<Q", size) + text + good[8 + length :]


def pickles(rng: random.Random, good: bytes, legacy: bytes, tensors: dict[str, Any]) -> bytes:
    """Damage, opcodes at random, or things that are no plain tensor."""
    import torch

    how = rng.randrange(5)
    if how < 2:
        return damaged(rng, rng.choice([good, legacy]))
    if how == 2:
        opcodes = [
            bytes([code])
            for code in b"(.0123FNIJKLMTUXVQRbcdeghijlopqrstu}])]a\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x94"
        ]
        names = [
            b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nFloatStorage\n", b"cbuiltins\neval\n", b"ctorch.nn.parameter\nParameter\n", b"K\x05",
            b"X\x03\x00\x00\x00abc", b"J\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x8a\xff" + b"\x01" * 255,
        ]  # fmt: skip
        body = b"".join(rng.choice(rng.choice([opcodes, names])) for _ in range(rng.randrange(40)))
        return b"\x80" + bytes([rng.choice([2, 4, 9])]) + body + rng.choice([b".", b""])
    if how == 3:  # an archive that unpacks to more than itself, or lacks what it must have
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                data = source.read(entry)
                if rng.random() < 0.2:
                    data = rng.choice([b"", bytes(10**6), damaged(rng, data)])
                if rng.random() > 0.05:
                    target.writestr(entry.filename, data, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        return changed.getvalue()
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    odd = rng.choice([
        lambda: tensor.to("meta"), lambda: tensor.to_sparse(), lambda: tensor.to(torch.complex64),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), lambda: torch.zeros(1).expand(tensor.shape),
        lambda: torch.nn.Parameter(tensor), lambda: tensor.double() * 1e300, lambda: tensor[:0],
        lambda: tensor.to(torch.int8), lambda: torch.nested.nested_tensor([tensor, tensor]), lambda: {name: tensor},
        lambda: tensor * float("nan"), lambda: [tensor], lambda: None, lambda: torch.zeros(1).expand(2**20, 2**20),
        lambda: torch.cat([tensor] * 3)[: len(tensor)], lambda: tensor.bool(), lambda: torch.zeros(()),
        lambda: "x" * 1000, lambda: torch.float32, lambda: torch.Size([3]), lambda: 10**400,
        lambda: torch._neg_view(tensor), lambda: tensor.to_mkldnn(), lambda: torch.UntypedStorage(8),
    ])()  # fmt: skip
    whole = rng.choice(
        [{**tensors, name: odd}, {**tensors, rng.choice([3, None, b"x", "module." + name]): odd}, [odd], odd]
    )
    buffer = io.BytesIO()
    try:
        torch.save(whole, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    except (RuntimeError, NotImplementedError, pickle.PicklingError, AttributeError, TypeError):
        return damaged(rng, good)
    return buffer.getvalue()


def shard_index(rng: random.Random, names: list[str]) -> bytes:
    files: list[Any] = [
        "a.safetensors", "b.safetensors", "y" * 5000, "..", "", "a/b", "\x00", "\ud800", "config.json", "loop",
        "folder", "pipe", 3, None, ["a"],
    ]  # fmt: skip
    weight_map = {name: files[i >= _FIRST_SHARD] for i, name in enumerate(names)}
    for _ in range(rng.randrange(3)):
        weight_map[rng.choice([*names, "x", "\ud800", "y" * 5000])] = rng.choice(files)
    if rng.random() < 0.2:
        return changed_json(rng, json.dumps({"weight_map": weight_map}).encode())
    return json.dumps({"weight_map": weight_map}).encode("utf-8", "surrogatepass")


# --- the process that reads them ---------------------------------------------------------------------------------


def run(kind: str, seed: int, count: int) -> int:
    import warnings

    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    import fastigpt

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp())
    config = fastigpt.ImageGPTConfig(1, 1, 16, height=4, width=4, n_colors=9, n_words=5, prompt_length=3)
    random = fastigpt.ImageGPT.from_config(config, seed=0, backend="reference", device="cpu")
    palette = fastigpt.Palette(np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32))
    words = fastigpt.prompts.Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
    model = fastigpt.ImageGPT(config, random.weights, palette=palette, vocabulary=words, backend="portable")
    model.save_pretrained(base / "good")
    good = {path.name: path.read_bytes() for path in (base / "good").iterdir()}
    tensors = load_file(base / "good" / "model.safetensors")
    array = io.BytesIO()
    np.save(array, model.palette.clusters)
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zipped)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    tokens = torch.zeros(1, 16, dtype=torch.int64)

    def write(folder: Path, rng: random.Random) -> None:
        for name, data in good.items():
            (folder / name).write_bytes(data)
        if kind == "json":
            name = rng.choice(["config.json", "preprocessor_config.json", "prompt.json"])
            (folder / name).write_bytes(changed_json(rng, good[name]))
        elif kind == "npy":
            (folder / "preprocessor_config.json").unlink()
            (folder / rng.choice(["clusters.npy", "kmeans_centers.npy"])).write_bytes(npy(rng, array.getvalue()))
        elif kind == "safetensors":
            (folder / "model.safetensors").write_bytes(safetensors(rng, good["model.safetensors"]))
        elif kind == "pickle":
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(pickles(rng, zipped.getvalue(), legacy.getvalue(), tensors))
        elif kind == "shards":
            (folder / "model.safetensors").unlink()
            names = sorted(tensors)
            save_file({name: tensors[name] for name in names[:_FIRST_SHARD]}, folder / "a.safetensors")
            save_file({name: tensors[name] for name in names[_FIRST_SHARD:]}, folder / "b.safetensors")
            nodes(folder, rng)
            (folder / "model.safetensors.index.json").write_bytes(shard_index(rng, names))
        elif kind == "nodes":
            nodes(folder, rng)
            name = rng.choice(
                [*good, "pytorch_model.bin", "clusters.npy", "model.safetensors.index.json", ".fastigpt-new"]
            )
            if name in ("pytorch_model.bin", "model.safetensors.index.json"):
                (folder / "model.safetensors").unlink()
            if name == "clusters.npy":
                (folder / "preprocessor_config.json").unlink()
            (folder / name).unlink(missing_ok=True)
            os.rename(folder / rng.choice(["loop", "folder", "pipe", "broken", "huge"]), folder / name)

    def nodes(folder: Path, rng: random.Random) -> None:
        (folder / "loop").symlink_to("loop")
        (folder / "broken").symlink_to("nowhere")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe")
        with open(folder / "huge", "wb") as file:
            file.truncate(1 << 40)

    def read(folder: Path) -> None:
        found = fastigpt.load(folder, backend="portable", device="cpu")
        if "lm_head.weight" in found.weights:
            assert bool(found.logits(tokens[:, : found.config.n_pixels]).isfinite().all())
            assert len(found.sample(1, seed=0, output_type="tokens")) == 1
        found.save_pretrained(folder)

    return tried(kind, seed, count, base, write, read)


def tried(
    kind: str, seed: int, count: int, base: Path, write: Callable[..., None], read: Callable[[Path], None]
) -> int:
    import fastigpt

    def too_long(*_: object) -> None:
        raise TimeoutError(f"{_SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    bad = refused = 0
    for number in range(count):
        rng = random.Random(f"{kind} {seed} {number}")
        folder = base / "case"
        signal.alarm(_SECONDS)
        try:
            if kind == "palettes":
                palette(rng, base)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                write(folder, rng)
                print(f"{kind} {seed} {number}", file=sys.stderr)  # what a crash is looked up by
                read(folder)
        except fastigpt.CheckpointError as error:
            refused += 1
            if len(str(error)) > 3000 or "\n" in str(error):
                bad += 1
                print(f"{kind} {seed} {number}: a message of {len(str(error))} letters")
        except (ValueError, TypeError) as error:
            if kind == "palettes":
                refused += 1
            else:
                bad += 1
                print(f"{kind} {seed} {number}: {type(error).__name__} {str(error)[:200]}")
        except BaseException as error:
            bad += 1
            print(f"{kind} {seed} {number}: {type(error).__name__} {str(error)[:200]}")
        finally:
            signal.alarm(0)
    shutil.rmtree(base, ignore_errors=True)
    print(f"{kind}: {count} cases, {refused} refused, {bad} wrong", flush=True)
    return bad


def palette(rng: random.Random, base: Path) -> None:
    """Whatever somebody may hand over as colours, and as what they range over."""
    import numpy as np
    import torch

    from fastigpt import Palette

    odd = rng.random() < 0.5
    shape = rng.choice([(1, 3), (0, 3), (9, 4), (9,), (), (3, 3, 3), (70000, 3)]) if odd else (9, 3)
    values = np.random.default_rng(rng.randrange(2**32)).uniform(-1, 1, shape)
    scaled = rng.choice([values, (values + 1) / 2, 255 * (values + 1) / 2])
    if rng.random() < 0.2:
        scaled = rng.choice([1e30 * values, values * np.nan, -values * np.inf])
    plain = [np.float16, np.float32, np.float64]
    dtypes = [*plain, np.longdouble, np.uint8, np.int64, bool, object, "U9", np.complex64, ">f4"]
    with np.errstate(all="ignore"):
        array = np.asarray(scaled).astype(rng.choice(dtypes if rng.random() < 0.5 else plain))
    given = rng.choice([
        lambda: array, array.tolist, lambda: torch.from_numpy(np.asarray(scaled)),
        lambda: np.atleast_1d(array)[..., ::-1], lambda: torch.from_numpy(np.asarray(scaled)).to(torch.bfloat16),
    ])()  # fmt: skip
    if rng.random() < 0.2:
        given = rng.choice([
            lambda: rng.choice(VALUES), lambda: torch.from_numpy(values).to("meta"), lambda: iter(array),
            lambda: torch.from_numpy(np.atleast_2d(values)).to_sparse(), lambda: {"clusters": array},
            lambda: memoryview(b"abc"), lambda: torch.view_as_complex(torch.ones(2)).imag,
        ])()  # fmt: skip
    ends: list[Any] = [None, (0, 1), (-1, 1), (0, 255)]
    if rng.random() < 0.2:
        ends = [(1, 0), (0,), "ab", 3, ([0] * 3, [1, 2, 3]), ([0] * 2, 1), (10**400, 1), (0, 1e-300)]
    value_range = rng.choice(ends)
    if rng.random() < 0.3:
        np.save(base / "p.npy", array, allow_pickle=True)
        made = Palette.from_file(base / "p.npy", value_range=value_range)
    else:
        made = Palette(given, value_range=value_range)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    assert np.isfinite(made.clusters).all() and made.decode(made.encode(pixels)).shape == (5, 3)


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    wrong = [run(*kind.split("=")[:1], int(sys.argv[1]), int(kind.split("=")[1])) for kind in sys.argv[2:]]
    sys.exit(min(sum(wrong), 100))
