"""Replaces the quantiser of another library's VQ model: vector-quantize-pytorch, lucidrains' VectorQuantize.

    pip install vector-quantize-pytorch
    python examples/vq_codebook.py

Its layer finds codes with torch.cdist and an N × K matrix. Here the same layer, in eval mode, looks them up with
fastigpt.nearest_centroid; the indices are compared, and the whole layer is timed in turn with that search alone.
"""

from __future__ import annotations

import statistics
import time

import torch
from vector_quantize_pytorch import VectorQuantize

from fastigpt.nearest import nearest_centroid


def median_seconds(jobs: list, rounds: int = 3) -> list[float]:
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        for job, taken in zip(jobs, times):
            start = time.perf_counter()
            job()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


@torch.inference_mode()
def compare(dim: int, codebook_size: int, n: int, cosine: bool) -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(dim=dim, codebook_size=codebook_size, use_cosine_sim=cosine).eval()
    codebook = torch.randn(codebook_size, dim)
    if cosine:
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    layer._codebook.embed.copy_(codebook)
    x = torch.randn(1, n, dim)
    metric = "cosine" if cosine else "l2"

    def theirs() -> torch.Tensor:
        return layer(x)[1]

    def ours() -> torch.Tensor:
        return nearest_centroid(x, layer.codebook, metric=metric)

    expected, found = theirs(), ours()
    differ = (expected != found).nonzero()[:, 1]
    seconds, our_seconds = median_seconds([theirs, ours])
    points, codes = x[0, differ].double(), layer.codebook.double()
    if cosine:
        points, codes = (torch.nn.functional.normalize(rows, dim=-1) for rows in (points, codes))
    gaps = ((points - codes[expected[0, differ]]) ** 2).sum(-1) - ((points - codes[found[0, differ]]) ** 2).sum(-1)
    assert (gaps >= -1e-6).all() and (gaps < 1e-4).all(), "an index that differs must be a tie up to float32 rounding"
    print(f"{n:,} × {dim} against {codebook_size:,}, {metric}: {n - len(differ):,} indices equal,", end=" ")
    print(f"{len(differ)} where two codes are equally near up to rounding;", end=" ")
    print(f"{seconds * 1e3:.1f} ms, with fastigpt {our_seconds * 1e3:.1f} ms: {seconds / our_seconds:.1f}×")


if __name__ == "__main__":
    compare(dim=8, codebook_size=16384, n=16384, cosine=False)
    compare(dim=8, codebook_size=8192, n=16384, cosine=True)
    compare(dim=256, codebook_size=1024, n=16384, cosine=False)
