"""Causal attention beside SDPA, and on a GPU FlexAttention, in operations per second.

pytest benchmarks/bench_causal_attention.py --benchmark-only -s
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from race import on_cpu, on_gpu, race, rows_on_gpu

import fastigpt.ops as ops
from fastigpt.bench.timing import graph_seconds
from fastigpt.kernels import launch

SHAPES = {"small": (8, 64), "large": (16, 96), "medium": (8, 128)}
BATCH, LENGTH = 16, 1024  # on a GPU


def one(batch: int, length: int, heads: int, head_dim: int, configs: launch.Table, config=None):
    """A call, and the operations it needs: both products, the masked half left out."""
    from fastigpt.kernels.causal_attention import causal_attention

    qkv = torch.randn(batch, length, 3, heads, head_dim, device="cuda").bfloat16()
    q, k, v = qkv.unbind(2)
    out = torch.empty(q.shape, dtype=q.dtype, device="cuda")
    call = partial(causal_attention, q, k, v, configs=configs, out=out, config=config)
    return call, 2 * batch * heads * length * length * head_dim, (q, k, v)


def measure(rate: float) -> list[dict[str, object]]:
    """Rows of name, microseconds, share of the bf16 rate measured in this run, and the peers' microseconds."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    configs = launch.table(launch.family(torch.device("cuda")))
    batch, length = BATCH, LENGTH
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")
    flex = torch.compile(flex_attention)
    rows = []
    for name, (heads, head_dim) in SHAPES.items():
        call, operations, qkv = one(batch, length, heads, head_dim, configs)
        seconds = graph_seconds([call])
        row: dict[str, object] = {
            "work": f"causal_attention {name} B={batch} T={length} bfloat16",
            "microseconds": seconds * 1e6,
            "share_of_rate": operations / seconds / rate,
        }
        q, k, v = (x.transpose(1, 2).contiguous() for x in qkv)
        row["sdpa_microseconds"] = by_a_peer(partial(F.scaled_dot_product_attention, q, k, v, is_causal=True))
        if head_dim & (head_dim - 1) == 0:
            row["flex_microseconds"] = by_a_peer(partial(flex, q, k, v, block_mask=mask))
        rows.append(row)
    return rows


def by_a_peer(call) -> float | str:
    """Microseconds of a call, or why it cannot be captured in a graph: that is for whoever made it to mend."""
    try:
        return 1e6 * graph_seconds([call])
    except RuntimeError as error:
        return f"cannot be captured: {str(error).splitlines()[0]}"


@on_gpu
def bench_on_gpu(benchmark, machine):
    rows_on_gpu(benchmark, measure, machine.gemm["bfloat16"])


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1024, 64])
@pytest.mark.parametrize("name", ["small", "medium"])
def bench_on_cpu(benchmark, machine, name, queries, dtype, batch: int = 4, keys: int = 1024):
    """A whole image, and the last two rows of one behind the rest."""
    benchmark.group = f"causal attention, {name}, {queries} queries, {str(dtype).removeprefix('torch.')}"
    heads, head_dim = SHAPES[name]
    qkv = torch.randn(batch, keys, 3, heads, head_dim).to(dtype)
    q, k, v = qkv.unbind(2)
    q = q[:, keys - queries :]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    masked = {"is_causal": True} if queries == keys else {"attn_mask": seen}

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **masked).transpose(1, 2)

    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ops.causal_attention(q, k, v), sdpa(), atol=tolerance, rtol=tolerance)
    pairs = batch * heads * queries * (keys - (queries - 1) / 2)
    moved = batch * heads * head_dim * 2 * (queries + keys) * dtype.itemsize
    race(
        benchmark, machine, [partial(ops.causal_attention, q, k, v)], {"SDPA": [sdpa]},
        moved=moved, operations=4 * pairs * head_dim, dtype=dtype, rounds=5,
    )  # fmt: skip
