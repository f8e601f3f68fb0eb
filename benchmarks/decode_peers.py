"""Others' attention of one query per image and head to its keys: what decode attention is measured beside on a GPU.

Each peer prepares a call from q bfloat16 [n, n_head, 1, head_dim] and k, v [n, n_head, keys, head_dim]; the call
returns [n, n_head, 1, head_dim] and can be captured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Tensor]
DEVICE = "cuda"
PAGE = 16  # keys of a page, as is usual


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Call:
    return partial(F.scaled_dot_product_attention, q, k, v)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Call:
    return partial(_compiled_flex(), q, k, v)


@cache
def _workspace() -> Tensor:
    return torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)


def flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Its cache is made of pages; the plan, which visits the host, is made here and not timed."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    n, heads, keys, head_dim = k.shape
    pages = keys // PAGE

    def paged(x: Tensor) -> Tensor:
        return x.view(n, heads, pages, PAGE, head_dim).transpose(1, 2).reshape(n * pages, heads, PAGE, head_dim)

    int32 = {"dtype": torch.int32, "device": DEVICE}
    indptr, indices = torch.arange(n + 1, **int32) * pages, torch.arange(n * pages, **int32)
    last = torch.full((n,), PAGE, **int32)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "HND", use_cuda_graph=True, paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices), paged_kv_last_page_len_buffer=torch.empty_like(last),
    )  # fmt: skip
    wrapper.plan(indptr, indices, last, heads, heads, head_dim, PAGE, q_data_type=q.dtype, kv_data_type=k.dtype)
    query, cache, out = q[:, :, 0].contiguous(), (paged(k), paged(v)), torch.empty_like(q[:, :, 0])
    return lambda: wrapper.run(query, cache, out=out)[:, :, None]


def why_not(name: str, head_dim: int) -> str | None:
    """Why a peer cannot be measured, None if it can."""
    if name == "flex" and head_dim & (head_dim - 1):
        return f"takes no head dim of {head_dim}"
    if name == "flashinfer":
        if importlib.util.find_spec("flashinfer") is None:
            return "is not installed"
        if head_dim not in (64, 128, 256):
            return f"takes no head dim of {head_dim}"
    return None


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Call]] = {"sdpa": sdpa, "flex": flex, "flashinfer": flashinfer}


def wrong(call: Call, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The largest difference to attention in float32, over the largest result."""
    expected = (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1) @ v.float()
    return float((call().float() - expected).abs().max() / expected.abs().max())
