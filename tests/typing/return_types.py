"""What the drawing calls return, for type checkers. `mypy` reads this file with the package; nothing runs it."""

from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image

import fastigpt
from fastigpt import ImageGPT, Stats

Pictures = list[Image.Image]


def sample(model: ImageGPT, kind: str, flag: bool) -> None:
    assert_type(model.sample(), Pictures)
    assert_type(model.sample(2, seed=0, output_type="pil"), Pictures)
    assert_type(model.sample(2, return_stats=False), Pictures)
    assert_type(model.sample(2, return_stats=True), tuple[Pictures, Stats])
    assert_type(model.sample(2, output_type="np", temperature=0.5), np.ndarray)
    assert_type(model.sample(2, output_type="np", return_stats=True), tuple[np.ndarray, Stats])
    assert_type(model.sample(2, output_type="pt"), torch.Tensor)
    assert_type(model.sample(2, output_type="tokens", draft="a/model"), torch.Tensor)
    assert_type(model.sample(2, output_type="tokens", return_stats=True), tuple[torch.Tensor, Stats])
    assert_type(model.sample(2, output_type=kind, return_stats=flag), Any)
    model.sample(2, temprature=0.5)  # type: ignore[call-overload]
    model.sample(2, top_k="many")  # type: ignore[call-overload]


def complete(model: ImageGPT, image: Image.Image) -> None:
    assert_type(model.complete(image, 2, rows=16), Pictures)
    assert_type(model.complete(image, mask=np.zeros((32, 32), bool), particles=4, output_type="np"), np.ndarray)
    assert_type(model.complete([image], rows=3, return_stats=True), tuple[Pictures, Stats])
    assert_type(model.complete(image, rows=3, output_type="pt", return_stats=True), tuple[torch.Tensor, Stats])


def fill(model: ImageGPT, tokens: torch.Tensor) -> None:
    assert_type(model.fill(tokens, seed=0, progress=False), torch.Tensor)
    assert_type(model.fill(tokens, particles=2, return_stats=True), tuple[torch.Tensor, Stats])
    assert_type(model.generate(tokens, max_length=3, do_sample=True, top_k=5), torch.Tensor)


def top(image: Image.Image) -> None:
    assert_type(fastigpt.sample(), Pictures)
    assert_type(fastigpt.sample(3, model="a/model", device="cpu", output_type="np"), np.ndarray)
    assert_type(fastigpt.sample(3, output_type="tokens", return_stats=True), tuple[torch.Tensor, Stats])
    assert_type(fastigpt.complete(image, rows=16, backend="cpu"), Pictures)
    assert_type(fastigpt.complete(image, rows=16, output_type="pt", return_stats=True), tuple[torch.Tensor, Stats])
    assert_type(fastigpt.load(dtype="bfloat16"), ImageGPT)
    assert_type(fastigpt.grid(fastigpt.sample(4)), Image.Image)
    fastigpt.load(devise="cpu")  # type: ignore[call-overload]
