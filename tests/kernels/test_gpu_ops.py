"""The operators' GPU implementations equal their CPU ones."""

import copy

import pytest
import torch
from either_way import device, pytestmark  # noqa: F401

pytest.importorskip("triton")

import fastigpt.ops as ops
from fastigpt.ops import devices


@pytest.fixture
def by_triton(monkeypatch):
    """A function that turns to the kernels, also where they are interpreted on a CPU."""
    return lambda: monkeypatch.setattr(devices, "by_triton", lambda x: True)


def moved(x, device):
    return x.to(device, copy=True) if isinstance(x, torch.Tensor) else x


def test_causal_attention(device, by_triton):
    q, k, v = (torch.randn(2, t, 2, 16) for t in (5, 9, 9))
    expected = ops.causal_attention(q, k, v)
    by_triton()
    got = ops.causal_attention(*(x.to(device) for x in (q, k, v)))
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("prefix", [False, True])
def test_decode_attention(device, by_triton, cache_dtype, prefix):
    q, k, v = (torch.randn(4, 2, 2, 16) for _ in range(3))
    shape = (4, 2, 9, 16)
    arguments = [q, k, v, *(torch.randn(shape).mul(20).to(cache_dtype) for _ in range(2))]
    arguments.append(torch.tensor([0, 3, 7, 1], dtype=torch.int32))
    options = {}
    if cache_dtype == torch.int8:
        options |= {"k_scale": torch.rand(shape[:-1]) / 20, "v_scale": torch.rand(shape[:-1]) / 20}
    if prefix:
        p = (2, 2, 5, 16)
        options |= {name: torch.randn(p).mul(20).to(cache_dtype) for name in ("prefix_k", "prefix_v")}
        if cache_dtype == torch.int8:
            options |= {name: torch.rand(p[:-1]) / 20 for name in ("prefix_k_scale", "prefix_v_scale")}
    gpu = [moved(x, device) for x in arguments]
    gpu_options = {name: moved(x, device) for name, x in options.items()}
    expected = ops.decode_attention(*arguments, **options)
    by_triton()
    got = ops.decode_attention(*gpu, **gpu_options)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)
    for a, b in zip(gpu, arguments):
        torch.testing.assert_close(a.cpu(), b, atol=0, rtol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_sample_head(device, by_triton, guided):
    hidden, gain, weight = torch.randn(5, 24), torch.rand(24), torch.randn(19, 24)
    arguments = [hidden, gain, weight, torch.arange(5) + 2**33, torch.arange(5) * 3, -(2**63)]
    options = {"temperature": 0.9, "top_k": 7, "known": torch.tensor([-1, -1, 3, -1, -1])}
    if guided:
        options |= {"unconditional": torch.randn(5, 24), "guidance_scale": 2.0}
    expected = ops.sample_head(*copy.deepcopy(arguments), **options)
    by_triton()
    got = ops.sample_head(
        *(moved(x, device) for x in arguments), **{name: moved(x, device) for name, x in options.items()}
    )
    assert torch.equal(got.cpu(), expected)
