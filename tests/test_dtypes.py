"""The extension's dtypes: one set of names, PyTorch's, and a refusal by name where one of them cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from fastigpt import _C

SIZES = {
    "n_layer": 1,
    "n_head": 1,
    "n_kv_head": 1,
    "head_dim": 4,
    "width": 4,
    "n_inner": 4,
    "n_positions": 4,
    "columns": 2,
    "n_tokens": 3,
    "n_prefix_tokens": 1,
    "prefix_length": 1,
    "positions": "learned",
    "mlp": "quick_gelu",
    "head_inner": None,
}


def model(weights: str, cache: str) -> object:
    return _C.CpuModel(**SIZES, epsilon=1e-5, weights=weights, cache=cache, isa="auto", threads=1)


def points(dtype: str) -> object:
    origin = np.zeros((1, 3), np.float32)
    index = _C.CentroidIndex(origin.__array_interface__["data"][0], 1, 3, False)
    return index.search(0, dtype, [0, 3], [12, 4], 0, 0, "auto", 1)


def decode(dtype: str, stored: str) -> None:
    nothing = (0, 0, 0, 0)
    _C.decode_rows(dtype, stored, (0, 1, 1, 8), nothing[:3], nothing[:3], nothing, 1, 0, nothing, 0, 0, 0, 0, "auto", 1)


def sample(hidden: str, weight: str) -> None:
    _C.sample_rows(hidden, weight, (0, 8, 8), 0, 0, 0, 0, 0, 0, 1e-5, 0, 1.0, 0, 1.0, None, 0, "auto", 1)


def test_what_can_be_is_taken() -> None:
    model("int8", "bfloat16")
    decode("bfloat16", "int8")
    sample("float32", "bfloat16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model("float16", "float32"), "weights must be float32, bfloat16 or int8, not float16"),
        (lambda: model("float32", "uint8"), "cache must be float32, bfloat16 or int8, not uint8"),
        (lambda: model("f32", "float32"), "weights must be float32, bfloat16, float16, int8 or uint8, not 'f32'"),
        (lambda: points("int8"), "points must be uint8, float16, bfloat16 or float32, not int8"),
        (lambda: decode("float16", "float16"), "q must be float32 or bfloat16, not float16"),
        (lambda: decode("float32", "uint8"), "the cache must be float32, bfloat16 or int8, not uint8"),
        (lambda: sample("int8", "float32"), "hidden must be float32 or bfloat16, not int8"),
        (lambda: sample("float32", "float16"), "weight must be float32 or bfloat16, not float16"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
