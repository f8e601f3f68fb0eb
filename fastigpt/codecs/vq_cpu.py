"""The networks of a VQ on CPUs, in C++ (csrc/codecs): the formulas of `VQNetworks`, and no other result in other
company, on more threads or at another time.

Convolutions are linear layers whose rows overlap; sums for the norms are made while a layer's outputs are written, and
norms and activations while the next one reads them, in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastigpt import _C
from fastigpt.codecs.vq_networks import VQConfig
from fastigpt.nearest import check_threads


class CpuVQ:
    """weights: named and shaped as config.tensor_shapes() says, and copied; those of one network are enough to use it.
    dtype: float32 or bfloat16, of what is multiplied and kept between layers; sums are float32. isa: "auto" or one of
    `_C.supported_isas()`. threads, of calls: None takes torch.get_num_threads().

    Working memory for the largest picture so far stays until `rest` or until the networks go: some three pictures of
    the base width, 115 MB at 384×384 in bfloat16 with the published VQ."""

    def __init__(
        self, config: VQConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, *, isa: str = "auto"
    ) -> None:
        self.config = config
        self._networks = _C.VqNetworks(str(dtype).removeprefix("torch."), isa)
        for name, shape in config.layer_shapes().items():
            if name not in weights:
                continue
            tensor = weights[name].detach()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
            given = tensor.contiguous() if tensor.dtype == torch.bfloat16 else tensor.float().contiguous()
            stored = "bfloat16" if given.dtype == torch.bfloat16 else "float32"
            self._networks.load(name, given.data_ptr(), stored, list(shape), _threads(None))

    def decode(self, entries: torch.Tensor, height: int, width: int, *, threads: int | None = None) -> torch.Tensor:
        """float32 [height · patch, width · patch, 3], about −1 to 1, of entries of the codebook [height · width,
        code_dim]."""
        dim, side = self.config.code_dim, self.config.patch
        if entries.shape != (height * width, dim):
            raise ValueError(f"entries must have shape {[height * width, dim]}, not {list(entries.shape)}")
        given = entries.detach().float().contiguous()
        pixels = torch.empty(height * side, width * side, 3, dtype=torch.float32, device="cpu")
        self._networks.decode(given.data_ptr(), height, width, dim, pixels.data_ptr(), _threads(threads))
        return pixels

    def encode(self, pixels: torch.Tensor, *, threads: int | None = None) -> torch.Tensor:
        """float32 [h · w, code_dim], what the nearest entries are looked for of, of pixels [h · patch, w · patch, 3],
        about −1 to 1."""
        dim, side = self.config.code_dim, self.config.patch
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] % side or pixels.shape[1] % side:
            raise ValueError(f"pixels must have shape [h · {side}, w · {side}, 3], not {list(pixels.shape)}")
        given, (height, width, _) = pixels.detach().float().contiguous(), pixels.shape
        latents = torch.empty(height // side * (width // side), dim, dtype=torch.float32, device="cpu")
        self._networks.encode(given.data_ptr(), height, width, dim, latents.data_ptr(), _threads(threads))
        return latents

    def rest(self) -> None:
        """Gives working memory back."""
        self._networks.rest()


def _threads(threads: int | None) -> int:
    return check_threads(threads) or min(torch.get_num_threads(), _C.MAX_THREADS)
