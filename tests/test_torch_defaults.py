"""What the caller has set in torch changes nothing: default device and dtype, a device context, autocast, inference
mode. Everything is called once plainly and once under each, and must give the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CACHED, PROMPTED, TINY, random_tokens, random_weights
from PIL import Image

import fastigpt
import fastigpt.ops
from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.prompts import Vocabulary

VOCABULARY = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
PALETTE = Palette(np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
ALPHA = Image.fromarray(np.random.default_rng(0).integers(0, 2, (4, 4, 4), dtype=np.uint8) * 255)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default device meta": lambda: default_device("meta"),
    "a meta context": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


def everything(backend: str, folder: Path) -> dict[str, Any]:
    """The result of each public function, as numpy where it is a tensor."""
    tokens, holes = torch.from_numpy(TOKENS.copy()), torch.from_numpy(HOLES.copy())
    weights = {name: torch.from_numpy(array.copy()) for name, array in WEIGHTS.items()}
    made = ImageGPT(
        PROMPTED, weights, palette=PALETTE, vocabulary=VOCABULARY, backend=backend, device="cpu", dtype="float32"
    )
    made.save_pretrained(folder)
    model = fastigpt.load(folder, backend=backend, device="cpu", dtype="float32")
    random = ImageGPT.from_config(TINY, seed=3, backend=backend, device="cpu", dtype="float32")
    draft = ImageGPT.from_config(ImageGPTConfig(1, 1, 16, height=4, width=4, n_colors=9), backend=backend, device="cpu")
    drafts = {} if backend == "reference" else {"draft": draft}
    options = {"backend": backend, "device": "cpu", "dtype": "float32"}
    results = {
        "sample": model.sample(3, seed=0, output_type="tokens"),
        "images": np.stack([np.asarray(image) for image in model.sample(2, seed=0)]),
        "pt": model.sample(2, seed=0, output_type="pt"),
        "guided": model.sample(2, seed=0, prompt="a red", guidance_scale=2.0, top_k=5, top_p=0.9, output_type="tokens"),
        "windows": model.sample(2, seed=0, window=4, output_type="tokens", **drafts),
        "by name": fastigpt.sample(2, seed=0, model=folder, output_type="tokens", **options),
        "complete": model.complete([PHOTO], 2, rows=2, seed=0, output_type="tokens"),
        "complete by alpha": model.complete(ALPHA, 2, seed=0, output_type="np"),
        "particles": model.complete(PHOTO, 2, mask=MASK, particles=4, seed=0, output_type="tokens"),
        "fill": model.fill(holes, seed=0),
        "stream": torch.cat([row.flatten() for *_, row in model.stream(2, seed=0)]),
        "generate": model.generate(torch.from_numpy(np.array([[9, 1, 2]])), do_sample=True, seed=0),
        "greedy": model.generate(torch.from_numpy(np.array([[9, 1, 2]])), max_new_tokens=5),
        "encode": model.encode([PHOTO, ALPHA]),
        "decode": model.decode(tokens),
        "known": model.known_cells(ALPHA),
        "logits": model.logits(tokens),
        "prompted logits": model.logits(tokens, prompt="a red house"),
        "nll": model.nll(tokens),
        "features": model.features(tokens, layer=1),
        "random": random.logits(tokens),
        "weights": torch.cat([tensor.flatten() for tensor in random.weights.values()]),
        "pickled": pickle.loads(pickle.dumps(random)).logits(tokens),
        "palette of tensors": PALETTE.encode(torch.from_numpy(np.asarray(PHOTO).copy())),
        "palette to tensors": PALETTE.decode(tokens),
        "a palette": Palette(torch.from_numpy(PALETTE.clusters.copy())).clusters,
        "nearest": fastigpt.nearest_centroid(torch.from_numpy(POINTS), torch.from_numpy(POINTS[:7] + 0.01)),
        "cosine": fastigpt.nearest_centroid(POINTS, POINTS[:7] + 0.01, metric="cosine", return_distances=True)[1],
        "operator": torch.ops.fastigpt.sample_head(*OPERANDS, 7),
        "seed": model.sample(1, output_type="tokens").shape,
        "saved": (folder / "model.safetensors").read_bytes(),
    }
    return {name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value for name, value in results.items()}


TOKENS = random_tokens(TINY, 2).numpy()
HOLES = np.where(np.arange(16) % 3 == 1, -1, TOKENS)
MASK = np.eye(4, dtype=bool)
POINTS = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
OPERANDS = [
    torch.from_numpy(array) for array in (POINTS[:3], np.ones(3, np.float32), POINTS[:9], np.arange(3), np.arange(3))
]
WEIGHTS = {name: tensor.numpy() for name, tensor in random_weights(PROMPTED).items()}


@pytest.mark.parametrize("backend", [*CACHED, "reference"])
def test_what_the_caller_has_set_in_torch_changes_nothing(tmp_path, backend):
    want = everything(backend, tmp_path / "plain")
    for setting, enter in SETTINGS.items():
        with enter():
            got = everything(backend, tmp_path / setting)
        for name, value in want.items():
            assert np.array_equal(got[name], value), f"{name} under {setting}"
            assert getattr(got[name], "dtype", None) == getattr(value, "dtype", None), f"{name} under {setting}"


def trained(out: Path) -> bytes:
    from fastigpt.training.train import train

    folder = out.parent / "images"
    if not folder.exists():
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    options = {"resolution": 4, "n_layer": 1, "n_head": 1, "n_embd": 16, "steps": 2, "batch_size": 2, "warmup": 1}
    train(out, images=folder, dtype="float32", progress=False, **options)
    return (out / "model.safetensors").read_bytes()


def test_training_is_the_same(tmp_path):
    plain = trained(tmp_path / "plain")
    for setting, enter in SETTINGS.items():
        with enter():
            assert trained(tmp_path / setting) == plain, setting
