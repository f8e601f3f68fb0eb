"""The nearest row of a codebook as an operator. It is exact, so its plain twin is any exact search: tests have one in
integers and one in fractions."""

from __future__ import annotations

import torch

from fastigpt import nearest
from fastigpt.operands import same_device
from fastigpt.ops.checks import need_tensors
from fastigpt.ops.register import register

Tensor = torch.Tensor


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """int64 [...]: the exact nearest row of centroids [K, D] for points [..., D]; see fastigpt.nearest_centroid."""
    need_tensors(points=points, centroids=centroids)
    return torch.ops.fastigpt.nearest_centroid(points, centroids)


def _run(points: Tensor, centroids: Tensor) -> Tensor:
    return nearest.nearest_centroid(points, centroids)


def _fake(points: Tensor, centroids: Tensor) -> Tensor:
    same_device(points=points, centroids=centroids)
    return points.new_empty(points.shape[:-1], dtype=torch.int64)


register("nearest_centroid(Tensor points, Tensor centroids) -> Tensor", _run, _fake)
