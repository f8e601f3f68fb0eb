"""Causal attention beside SDPA and FlexAttention, in operations per second.

pytest benchmarks/bench_causal_attention.py -s
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastigpt.kernels import launch
from gpu_time import graph_seconds

SHAPES = {"small": (8, 64), "large": (16, 96), "medium": (8, 128)}


def one(batch: int, length: int, heads: int, head_dim: int, configs: launch.Table, config=None):
    """A call, and the operations it needs: both products, the masked half left out."""
    from fastigpt.kernels.causal_attention import causal_attention

    qkv = torch.randn(batch, length, 3, heads, head_dim, device="cuda").bfloat16()
    q, k, v = qkv.unbind(2)
    out = torch.empty(q.shape, dtype=q.dtype, device="cuda")
    call = partial(causal_attention, q, k, v, configs=configs, out=out, config=config)
    return call, 2 * batch * heads * length * length * head_dim, (q, k, v)


def measure(rate: float, batch: int = 16, length: int = 1024) -> list[dict[str, object]]:
    """Rows of name, microseconds, share of the bf16 rate measured in this run, and the peers' microseconds."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    configs = launch.table(launch.family(torch.device("cuda")))
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
        row["sdpa_microseconds"] = 1e6 * graph_seconds(
            [partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)]
        )
        if head_dim & (head_dim - 1) == 0:
            row["flex_microseconds"] = 1e6 * graph_seconds([partial(flex, q, k, v, block_mask=mask)])
        rows.append(row)
    return rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def bench_causal_attention(machine):
    for row in measure(machine.gemm["bfloat16"]):
        print(row)
