"""Tensors and arrays whose numbers are not simply what lies at their address: worked out, or refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, random_tokens, random_weights
from torch._subclasses.fake_tensor import FakeTensorMode

import fastigpt
import fastigpt.ops as ops
from fastigpt import ImageGPT, Palette
from fastigpt.kernels import launch


def negated(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def freed(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.untyped_storage().resize_(0)
    return y


def test_every_operand_in_every_form_is_worked_out_or_refused() -> None:
    ran = subprocess.run(
        [sys.executable, Path(__file__).parent / "hostile_operands.py"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert int(ran.stdout.split()[0]) > 1000  # cases


CALLS: dict[str, Any] = {
    "causal_attention": lambda: [torch.randn(2, 3, 2, 8) for _ in range(3)],
    "decode_attention": lambda: [
        *(torch.randn(2, 1, 2, 8) for _ in range(3)), *(torch.randn(2, 2, 6, 8) for _ in range(2)),
        torch.zeros(2, dtype=torch.int32),
    ],
    "sample_head": lambda: [torch.randn(3, 8), torch.ones(8), torch.randn(5, 8), torch.arange(3), torch.arange(3), 7],
    "nearest_centroid": lambda: [torch.randn(6, 3), torch.randn(5, 3)],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_values_stay_shapes_without_values(name: str) -> None:
    operator, arguments = getattr(torch.ops.fastigpt, name), CALLS[name]()
    real = operator(*arguments)
    meta = operator(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    assert meta.device.type == "meta" and meta.shape == real.shape and meta.dtype == real.dtype
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    assert fake.device.type == "cpu" and fake.shape == real.shape and fake.dtype == real.dtype


@pytest.mark.parametrize("name", CALLS)
def test_one_operand_on_the_meta_device_is_refused_whichever_it_is(name: str) -> None:
    operator = getattr(torch.ops.fastigpt, name)
    for i, x in enumerate(CALLS[name]()):
        if isinstance(x, torch.Tensor):
            arguments = CALLS[name]()
            arguments[i] = x.to("meta")
            with pytest.raises(ValueError, match=r"must be on one device, not .* on meta"):
                operator(*arguments)


def test_a_caller_who_asks_for_no_gradient_gets_values_of_tensors_that_have_one() -> None:
    points = torch.randn(6, 3, requires_grad=True)
    assert torch.equal(fastigpt.nearest_centroid(points, points), torch.arange(6))
    assert torch.equal(ops.nearest_centroid(points, points), torch.arange(6))


def test_launchers_of_kernels_look_at_memory_too() -> None:
    x = torch.randn(2, 1, 2, 8)
    launch.expect_contiguous(x=x, nothing=None)
    assert launch.row_stride("x", x) == 16
    for bad, message in ((negated(x), "lazily negated"), (freed(x), "its storage holds 0"), (x.to("meta"), "on meta")):
        for check in (lambda x: launch.expect_contiguous(weight=x), lambda x: launch.row_stride("weight", x)):
            with pytest.raises(ValueError, match=f"weight .*{message}"):
                check(bad)


def test_tokens_and_weights_are_held_to_the_same() -> None:
    weights = random_weights(TINY)
    model, tokens = ImageGPT(TINY, weights, backend="cpu"), random_tokens(TINY, 2)
    name = "transformer.wpe.weight"
    again = ImageGPT(TINY, weights | {name: negated(weights[name])}, backend="cpu")
    assert torch.equal(again.logits(tokens), model.logits(tokens))
    for use in (model.fill, model.logits, model.nll, model.stream, model.engine.logits):
        with pytest.raises(ValueError, match="must have its memory"):
            use(freed(tokens))
        with pytest.raises(TypeError, match="must be a dense tensor"):
            use(tokens.to_sparse())
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        narrow = {key: value.to(dtype) for key, value in weights.items()}
        engines = [ImageGPT(TINY, w, backend="cpu") for w in (narrow, {k: v.float() for k, v in narrow.items()})]
        assert torch.equal(*(engine.logits(tokens) for engine in engines))


@pytest.mark.parametrize("view", [
    lambda x: x[::-1][::-1], lambda x: np.repeat(x, 2, 1)[:, ::2], np.asfortranarray,
    lambda x: x.astype(">i8"), lambda x: np.flip(np.flip(x, 1).copy(), 1),
])  # fmt: skip
def test_arrays_of_tokens_may_have_any_layout_and_byte_order(view: Any) -> None:
    model, tokens = ImageGPT(TINY, random_weights(TINY), backend="cpu"), random_tokens(TINY, 3)
    assert torch.equal(model.logits(view(tokens.numpy())), model.logits(tokens))
    for wrong in (tokens.numpy().astype("i4"), tokens.numpy().astype(object), tokens.numpy().astype("U")):
        with pytest.raises(TypeError, match="tokens must be of dtype int64"):
            model.logits(wrong)
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, T\]"):
        model.logits(np.array(3))


def test_a_palette_sees_the_numbers_that_torch_shows() -> None:
    clusters = torch.linspace(-1, 1, 27).view(9, 3)
    assert Palette(negated(clusters)) == Palette(clusters)
    for bad in (clusters.to("meta"), freed(clusters)):
        with pytest.raises(ValueError, match="clusters must"):
            Palette(bad)
    with pytest.raises(ValueError, match="tokens must be on the CPU"):
        Palette(clusters).decode(torch.zeros(3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("dtype", [np.int64, np.float64, ">f4"])
def test_a_dtype_that_is_not_taken_is_refused_with_what_to_do(dtype: Any) -> None:
    points = np.zeros((4, 3), dtype)
    with pytest.raises(TypeError, match=r"points must be one of uint8, .*; convert with .astype\(\)"):
        fastigpt.nearest_centroid(points, np.eye(3, dtype=np.float32))
    if points.dtype.isnative:
        with pytest.raises(TypeError, match=r"centroids must be one of uint8, .*; convert with .to\(\)"):
            fastigpt.nearest_centroid(torch.zeros(4, 3), torch.from_numpy(points))


def test_an_array_on_a_gpu_that_torch_does_not_see_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    class OnGpu:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {"shape": (4, 3), "typestr": "<f4", "data": (0, False), "version": 3}

    with pytest.raises(ValueError, match="points must be on a device that torch sees"):
        fastigpt.nearest_centroid(OnGpu(), np.eye(3, dtype=np.float32))
