"""What others offer for the nearest centroid: the same job, done the way their documentation does it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Peer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def faiss(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index.search(points, 1)[1][:, 0]


def sklearn(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    from sklearn.metrics import pairwise_distances_argmin

    return pairwise_distances_argmin(points, centroids)


def torch_cdist(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """In chunks of 65,536 points, so that the matrix fits into memory."""
    import torch

    chunks = torch.from_numpy(points).split(65536)
    return torch.cat([torch.cdist(chunk, torch.from_numpy(centroids)).argmin(dim=1) for chunk in chunks]).numpy()


def scipy_tree(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    from scipy.spatial import cKDTree

    return cKDTree(centroids).query(points, workers=-1)[1]


def transformers(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """ImageGPT's processor, the one without torchvision. pixels: uint8 [H, W, 3]; clusters: [K, 3] in [−1, 1]."""
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    processor = ImageGPTImageProcessorPil(clusters=clusters, do_resize=False)
    return np.asarray(processor(pixels)["input_ids"]).reshape(-1)


def transformers_torch(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """ImageGPT's processor built on torchvision."""
    import torchvision  # noqa: F401  (transformers would name a missing class instead of it)
    from transformers.models.imagegpt.image_processing_imagegpt import ImageGPTImageProcessor

    processor = ImageGPTImageProcessor(clusters=clusters, do_resize=False)
    return processor(pixels)["input_ids"][0].numpy().reshape(-1)


POINTS: dict[str, Peer] = {"faiss": faiss, "sklearn": sklearn, "torch.cdist": torch_cdist, "scipy cKDTree": scipy_tree}
PIXELS: dict[str, Peer] = {"transformers": transformers, "transformers (torch)": transformers_torch}
