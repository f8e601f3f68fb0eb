"""Damaged and hostile files of the families that leave their weights in them, LlamaGen and Janus: as
test_fuzz_checkpoints.py has it, whose damage this deals out, in a process of its own.

    python tests/fuzz/test_fuzz_families.py SEED KIND=COUNT …     # runs kinds by hand and prints what it found
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_fuzz_checkpoints import _MEMORY, changed_json, damaged, pickles, safetensors, tried  # noqa: E402

KINDS = {
    "llamagen_config": 120,
    "llamagen_safetensors": 120,
    "llamagen_pickle": 150,
    "janus_config": 150,
    "janus_pickle": 120,
    "generation_config": 60,
    "tokenizer": 100,
}


@pytest.fixture(scope="module")
def child() -> subprocess.CompletedProcess[str]:
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


def run(kind: str, seed: int, count: int) -> int:
    import warnings

    import torch
    from safetensors.torch import load_file

    import fastigpt

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp())
    if kind.startswith(("llamagen", "generation")):
        write_llamagen(base / "good")
        json_files = ["generation_config.json"] if kind == "generation_config" else ["config.json"]
    else:
        write_janus(base / "good")
        json_files = ["tokenizer.json"] if kind == "tokenizer" else ["config.json", "processor_config.json"]
    good = {path.name: path.read_bytes() for path in (base / "good").iterdir()}
    tensors = load_file(base / "good" / "model.safetensors")
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zipped)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)

    def write(folder: Path, rng: random.Random) -> None:
        for name, data in good.items():
            (folder / name).write_bytes(data)
        if kind.endswith("safetensors"):
            (folder / "model.safetensors").write_bytes(safetensors(rng, good["model.safetensors"]))
        elif kind.endswith("pickle"):
            (folder / "model.safetensors").unlink()
            data = pickles(rng, zipped.getvalue(), legacy.getvalue(), tensors)
            if rng.random() < 0.2:
                whole = {rng.choice(["model", "module", "state_dict"]): tensors, "args": argparse.Namespace(lr=1)}
                buffer = io.BytesIO()
                torch.save(whole, buffer)
                data = damaged(rng, buffer.getvalue()) if rng.random() < 0.7 else buffer.getvalue()
            (folder / "pytorch_model.bin").write_bytes(data)
        else:
            name = rng.choice(json_files)
            (folder / name).write_bytes(changed_json(rng, good[name]))

    def read(folder: Path) -> None:
        found = fastigpt.load(folder, backend="portable", device="cpu")
        assert bool(found.logits(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all())
        what = {"prompt": "a red house"} if kind.startswith(("janus", "tokenizer")) else {"label": 1}
        try:
            assert len(found.sample(1, seed=0, output_type="tokens", **what)) == 1
        except ValueError as error:  # a tokenizer that makes too much of the words
            assert kind == "tokenizer" and "prompt" in str(error) and not isinstance(error, fastigpt.CheckpointError)
        found.save_pretrained(folder)

    return tried(kind, seed, count, base, write, read)


def write_llamagen(folder: Path) -> None:
    import torch

    from fastigpt.families.llamagen import LlamaGen, LlamaGenConfig

    config = LlamaGenConfig(1, 2, 2, 16, 24, 12, 10, 2, 2)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in config.tensor_shapes().items()}
    LlamaGen(config, weights).write(folder)


def write_janus(folder: Path) -> None:
    """In this library's own words; transformers' class would take seconds."""
    import torch
    from tiny_janus import tokenizer

    from fastigpt.codecs.vq import VQConfig
    from fastigpt.families.chat import ChatReader
    from fastigpt.families.janus import Janus, JanusConfig

    config, vq = JanusConfig(1, 2, 1, 8, 16, 24, 64, 12, 4, 2, 2, prompt_length=40), VQConfig(32, (1, 2), 1, 32, 12, 4)
    generator = torch.Generator().manual_seed(0)

    def made(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    reader = ChatReader(tokenizer().to_str(), 40, 1, 2, 3)
    Janus(config, made(config.tensor_shapes()), vq, made(vq.tensor_shapes()), reader).write(folder)


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    wrong = [run(*kind.split("=")[:1], int(sys.argv[1]), int(kind.split("=")[1])) for kind in sys.argv[2:]]
    sys.exit(min(sum(wrong), 100))
