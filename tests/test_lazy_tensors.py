"""Weights stay in their files: what is read is what was written, and a loaded model holds it once, in its engine."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastigpt
from fastigpt import CheckpointError
from fastigpt.families.llamagen import LlamaGen, LlamaGenConfig
from fastigpt.families.named_tensors import take
from fastigpt.lazy_tensors import Held, named, open_pickle, open_safetensors, open_weights
from fastigpt.model import Model
from fastigpt.tensors import Tensors

CONFIG = LlamaGenConfig(2, 4, 4, 64, 96, 40, 10, 4, 4)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator)
        for name, shape in CONFIG.tensor_shapes().items()
    }


def tensors() -> dict[str, torch.Tensor]:
    big = torch.randn(6, 5)
    return {
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "slice": big[1:3],
        "whole": big,
        "turned": big.T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "double": torch.randn(2).double(),
    }


def check(found: Held, expected: dict[str, torch.Tensor], *, rows: bool = True) -> None:
    """rows: whether single ones can be read of every tensor whose rows lie one after the other."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = found[name]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(stored.read(), tensor.detach()) and stored.read().is_contiguous() == tensor.is_contiguous()
        assert stored.row is not None or not (rows and tensor.ndim > 1 and tensor.is_contiguous())
        if stored.row is not None:
            assert tensor.ndim > 1 and all(torch.equal(stored.row(i), row) for i, row in enumerate(tensor))
            for outside in (-1, len(tensor)):
                with pytest.raises(IndexError):
                    stored.row(outside)


@pytest.mark.parametrize("how", ["zip", "old", "deflated"])
def test_pickles_hold_what_was_written(tmp_path, how):
    file = tmp_path / "x.bin"
    torch.save({"model": tensors(), "steps": 3}, file, _use_new_zipfile_serialization=how != "old")
    if how == "deflated":
        with zipfile.ZipFile(file) as source:
            held = {entry.filename: source.read(entry) for entry in source.infolist()}
        with zipfile.ZipFile(file, "w") as target:
            for i, (name, data) in enumerate(held.items()):
                target.writestr(name, data, zipfile.ZIP_DEFLATED if i == 0 and len(data) > 300 else zipfile.ZIP_STORED)
    data = open_pickle(file)
    assert isinstance(data, dict) and data["steps"] == 3
    check(named(data["model"], file), torch.load(file, weights_only=True)["model"], rows=how == "zip")


def test_safetensors_hold_what_was_written(tmp_path):
    expected = {name: tensor.detach().contiguous().clone() for name, tensor in tensors().items()}
    save_file(expected, tmp_path / "x.safetensors", metadata={"format": "pt"})
    check(open_safetensors(tmp_path / "x.safetensors"), expected)


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    _, stored = open_weights(tmp_path, tmp_path.joinpath)
    held = take(stored, CONFIG.tensor_shapes(), "it")
    first = held["norm.weight"]
    first += 1
    assert bool((held["norm.weight"] == 1).all()) and len(held) == len(CONFIG.tensor_shapes())
    assert copy.deepcopy(held) is held
    again = pickle.loads(pickle.dumps(held))
    assert type(again) is dict and all(torch.equal(tensor, held[name]) for name, tensor in again.items())


def test_a_model_outlives_what_takes_the_place_of_its_files(tmp_path):
    LlamaGen(CONFIG, weights(1)).write(tmp_path / "model")
    model = fastigpt.load(tmp_path / "model", device="cpu", backend="portable")
    LlamaGen(CONFIG, weights(2)).write(tmp_path / "model")
    model.save_pretrained(tmp_path / "copy")
    expected = model.sample(2, label=1, seed=0, output_type="tokens")
    for again in (
        fastigpt.load(tmp_path / "copy", device="cpu"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(again.sample(2, label=1, seed=0, output_type="tokens"), expected)
    model.save_pretrained(tmp_path / "model")  # over files that it no longer needs, and over its own
    model = fastigpt.load(tmp_path / "model", device="cpu", backend="portable")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(model.sample(2, label=1, seed=0, output_type="tokens"), expected)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_what_is_written_into_a_file_is_noticed(tmp_path, kind):
    file = tmp_path / "x"
    save_file(weights(), file) if kind == "safetensors" else torch.save(weights(), file)
    stored = open_safetensors(file) if kind == "safetensors" else named(open_pickle(file), file)
    stored["output.weight"].read()
    data = file.read_bytes()
    file.write_bytes(data[:-4000])
    with pytest.raises(CheckpointError, match=r"x (has changed since it was opened: load it anew|is damaged)"):
        stored["output.weight"].read()
    file.write_bytes(data[:-1] + b"x")
    os.utime(file, ns=(0, 0))
    with pytest.raises(CheckpointError, match="x has changed since it was opened: load it anew"):
        stored["output.weight"].read()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "odd",
    [
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: t.to(torch.complex64),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: torch.zeros(1).expand(t.shape),
        lambda t: torch.zeros(1).expand(2**20, 2**20),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: torch._neg_view(t),
        lambda t: t.int(),
        lambda t: [t],
    ],
)
def test_tensors_that_are_no_plain_ones_are_refused(tmp_path, odd, zipped):
    held = weights()
    tensor = odd(held["output.weight"])
    if not zipped and getattr(tensor, "is_quantized", False):
        pytest.skip("the old format has none")
    try:
        torch.save({**held, "output.weight": tensor}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    except RuntimeError:
        pytest.skip("the old format has none")
    with pytest.raises(CheckpointError, match="x"):
        take(named(open_pickle(tmp_path / "x"), tmp_path / "x"), CONFIG.tensor_shapes(), "x")["output.weight"]


def held_bytes(root: object) -> int:
    """Of all tensors that can be reached from an object."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [root]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, dict):
            waiting += [*each.values()]
        elif isinstance(each, (list, tuple, set)):
            waiting += [*each]
        elif callable(each) and getattr(each, "__closure__", None):
            waiting += [cell.cell_contents for cell in each.__closure__]
        elif hasattr(each, "__dict__"):
            waiting += [*vars(each).values()]
    return sum(storages.values())


def test_a_loaded_model_holds_its_weights_once(tmp_path):
    LlamaGen(CONFIG, weights()).write(tmp_path)
    model = fastigpt.load(tmp_path, device="cpu", backend="portable", dtype="bfloat16")
    numbers = sum(tensor.numel() for tensor in model.pretrained.canonical().values())
    assert 2 * numbers <= held_bytes(model) <= 2 * numbers + 5000  # the rotary table is float32
    assert isinstance(model.pretrained.weights, Tensors)
    given = Model(LlamaGen(CONFIG, weights()), device="cpu", backend="portable", dtype="bfloat16")
    assert held_bytes(given) > 5 * numbers  # what was given in memory stays there


PEAK = """
import os, sys, resource
from pathlib import Path
import torch
import fastigpt
from fastigpt.families.llamagen import read_file
from fastigpt.model import Model

torch.set_num_threads(1)
how = {"device": "cpu", "backend": "portable", "dtype": "bfloat16"}


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load(path):
    if path.endswith(".pt"):
        return Model(read_file(Path(path), n_head=12), **how)
    return fastigpt.load(path, **how)


load(sys.argv[1])  # whatever is imported and started once
for path in sys.argv[2:]:
    if os.fork() == 0:
        now = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
        model = load(path)
        print(peak() - now, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_loading_takes_the_memory_of_the_weights_once(tmp_path):
    large = LlamaGenConfig(5, 12, 12, 768, 2048, 1024, 10, 4, 4)
    held = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in large.tensor_shapes().items()}
    LlamaGen(CONFIG, weights()).write(tmp_path / "small")
    LlamaGen(large, held).write(tmp_path / "large")
    torch.save({"model": held}, tmp_path / "c2i_T_64.pt")
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("small", "large", "c2i_T_64.pt"))]
    # What is freed goes back to the system at once, as tensors of models of the published sizes do.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    found = run.stdout.split()
    size = sum(tensor.nbytes for tensor in held.values())
    assert len(found) == 2 and size > 70e6
    for peak in map(int, found):
        assert 0.8 * size < peak < 1.7 * size, (peak, size)
