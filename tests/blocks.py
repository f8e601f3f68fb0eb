"""A codec whose tokens are no colours and whose pixels are no tokens, for the tests of what is above codecs."""

from __future__ import annotations

import numpy as np
import torch

from fastigpt.codecs import UNKNOWN


class Blocks:
    """A token is the mean brightness of a patch of 4 × 3 pixels, in n_tokens levels; bright ones are high tokens."""

    def __init__(self, height: int, columns: int, n_tokens: int) -> None:
        self.grid, self.size, self.n_tokens = (height, columns), (4 * height, 3 * columns), n_tokens

    def on(self, device: torch.device, dtype: torch.dtype) -> Blocks:
        return self

    def encode(self, images: np.ndarray) -> torch.Tensor:
        n, (h, w) = len(images), self.grid
        assert images.dtype == np.uint8 and images.shape == (n, *self.size, 3)
        means = images.reshape(n, h, 4, w, 9).mean((2, 4))
        return torch.from_numpy((means * self.n_tokens / 256).astype(np.int64)).flatten(1)

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        assert int(tokens.min()) >= 0
        return self.preview(tokens)

    def preview(self, tokens: torch.Tensor) -> np.ndarray:
        levels = np.append((np.arange(self.n_tokens) + 0.5) * 256 / self.n_tokens, UNKNOWN).astype(np.uint8)
        return levels[tokens.numpy()].reshape(-1, *self.grid, 1).repeat(4, 1).repeat(3, 2).repeat(3, 3)
