"""Causal attention equals its plain twin: whole sequences, blocks appended to a cache, odd lengths, parts of a fused
qkv.
"""

import pytest
import torch
from either_way import device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.kernels.causal_attention import causal_attention
from fastigpt.ops.causal_attention import causal_attention_reference

CONFIGS = {"causal_attention": [{"block_m": 16, "block_n": 16, "stages": 1, "warps": 4}]}
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}


def close(got, expected):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("batch, tq, tk", [(1, 1, 1), (2, 33, 33), (1, 1, 40), (1, 16, 48), (7, 5, 18)])
def test_attention_equals_the_twin(generator, device, dtype, head_dim, batch, tq, tk):
    heads = 1 if batch == 7 else 2
    q = torch.randn(batch, tq, heads, head_dim, generator=generator).to(device, dtype)
    k, v = (torch.randn(batch, tk, heads, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.full_like(q, float("nan"))
    got = causal_attention(q, k, v, configs=CONFIGS, out=out)
    assert got.data_ptr() == out.data_ptr()
    close(got, causal_attention_reference(q, k, v))


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 100), (3, 1, 10), (6, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_that_share_their_keys(generator, device, heads, kv_heads, head_dim, dtype):
    """As parts of a fused projection, whose sections are not equally wide."""
    sections = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    fused = torch.randn(2, 19, sum(sections), generator=generator).to(device, dtype)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in fused.split(sections, -1))
    out = torch.full(q.shape, float("nan"), dtype=dtype, device=device)
    close(causal_attention(q, k, v, configs=CONFIGS, out=out), causal_attention_reference(q, k, v))


def test_parts_of_a_fused_qkv(generator, device):
    qkv = torch.randn(2, 19, 3, 2, 64, generator=generator).to(device)
    q, k, v = qkv.unbind(2)
    close(causal_attention(q, k, v, configs=CONFIGS), causal_attention_reference(q, k, v))


def test_heads_may_be_padded(generator, device):
    """With zeros, for wider loads: their scale is then not that of their width."""
    q, k, v = (torch.randn(1, 9, 2, 10, generator=generator).to(device) for _ in range(3))
    padded = [torch.nn.functional.pad(x, (0, 6)) for x in (q, k, v)]
    got = causal_attention(*padded, configs=CONFIGS, scale=10**-0.5)
    close(got[..., :10].contiguous(), causal_attention_reference(q, k, v))
    assert not got[..., 10:].any()


def test_blocks_that_do_not_divide_each_other(generator, device):
    configs = {"causal_attention": [{"block_m": 32, "block_n": 16, "stages": 1, "warps": 4}]}
    q, k, v = (torch.randn(1, 45, 1, 64, generator=generator).to(device) for _ in range(3))
    close(causal_attention(q[:, 10:], k, v, configs=configs), causal_attention_reference(q[:, 10:], k, v))


def test_later_keys_are_never_read(generator, device):
    """NaN in the keys and values after a query must not reach it."""
    q, k, v = (torch.randn(1, 20, 1, 64, generator=generator).to(device) for _ in range(3))
    k[:, 16:], v[:, 16:] = float("nan"), float("nan")
    got = causal_attention(q, k, v, configs=CONFIGS)
    close(got[:, :16], causal_attention_reference(q[:, :16], k[:, :16], v[:, :16]))


@pytest.mark.parametrize(
    "q, k, message",
    [
        (torch.zeros(1, 4, 1, 64), torch.zeros(1, 3, 1, 64), "as many keys"),
        (torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 2, 64), "k and v"),
        (torch.zeros(1, 4, 3, 64), torch.zeros(1, 4, 2, 64), "k and v"),
        (torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 1, 64, dtype=torch.float16), "float16"),
        (torch.zeros(1, 4, 64, 2).transpose(2, 3), torch.zeros(1, 4, 2, 64), "contiguous"),
    ],
)
def test_wrong_arguments_are_named(q, k, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(q, k, k, configs=CONFIGS)
