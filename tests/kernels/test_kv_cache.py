"""Appending to a cache writes the right slots, nothing else, and scales 8-bit caches as the plain twin does."""

import pytest
import torch
from either_way import device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.kernels.kv_cache import append_kv
from fastigpt.ops.kv_cache import append_kv_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("window, placed", [(1, False), (3, False), (3, True)])
def test_append_equals_the_twin(generator, device, dtype, cache_dtype, window, placed):
    n, heads, head_dim, capacity = 4, 3, 48, 10
    qkv = torch.randn(n * window, 3, heads, head_dim, generator=generator).to(device, dtype)
    qkv[0, 1] = 0  # an all-zero key has no scale of its own
    _, k, v = (qkv[:, i].unflatten(0, (n, window)) for i in range(3))
    slots = torch.tensor([0, 5, capacity - 1, -1], dtype=torch.int32, device=device)
    lanes = torch.tensor([5, 0, 2, 3], dtype=torch.int32, device=device) if placed else None

    def cache():
        x = [
            torch.full((6 if placed else n, heads, capacity, head_dim), 7.0, device=device).to(cache_dtype)
            for _ in range(2)
        ]
        if cache_dtype in (torch.int8, torch.float8_e4m3fn):
            x += [torch.full((6 if placed else n, heads, capacity), float("nan"), device=device) for _ in range(2)]
        return x

    got, expected = cache(), cache()
    append_kv(k, v, *got[:2], slots, *got[2:], lanes=lanes)
    append_kv_reference(k, v, *expected[:2], slots, *expected[2:], lanes=lanes)
    for a, b in zip(got, expected):
        if cache_dtype == torch.float8_e4m3fn and a.dtype == cache_dtype:
            # Ties may round differently, and the interpreter of Triton 3.6 loses a carry now and then.
            assert (a.float() == b.float()).float().mean() > 0.99
        else:
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
