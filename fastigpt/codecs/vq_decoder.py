"""The decoder of a VQ on CPUs, in C++ (csrc/codecs): the formula of `VQNetworks.decoder`, and no other result in other
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


def draws(name: str) -> bool:
    """Whether a tensor of a VQ is one of its decoder's."""
    return name.startswith(("decoder.", "post_quant_conv."))


class CpuVQDecoder:
    """weights: named and shaped as config.tensor_shapes() says; those of the decoder are copied. dtype: float32 or
    bfloat16, of what is multiplied and kept between layers; sums are float32. isa: "auto" or one of
    `_C.supported_isas()`. Working memory for the largest picture so far stays until the decoder goes: some three
    pictures of the base width, 115 MB at 384×384 in bfloat16 with the published VQ."""

    def __init__(
        self, config: VQConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, *, isa: str = "auto"
    ) -> None:
        self.config = config
        self._decoder = _C.VqDecoder(str(dtype).removeprefix("torch."), isa)
        for name, shape in config.tensor_shapes().items():
            if not draws(name):
                continue
            tensor = weights[name].detach()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
            given = tensor.contiguous() if tensor.dtype == torch.bfloat16 else tensor.float().contiguous()
            stored = "bfloat16" if given.dtype == torch.bfloat16 else "float32"
            self._decoder.load(name, given.data_ptr(), stored, list(shape), _threads(None))

    def __call__(self, entries: torch.Tensor, height: int, width: int, *, threads: int | None = None) -> torch.Tensor:
        """float32 [3, height · patch, width · patch], about −1 to 1, of entries of the codebook [height · width,
        code_dim]. threads: None takes torch.get_num_threads()."""
        if entries.shape != (height * width, self.config.code_dim):
            raise ValueError(
                f"entries must have shape {[height * width, self.config.code_dim]}, not {list(entries.shape)}"
            )
        given, side = entries.detach().float().contiguous(), self.config.patch
        pixels = torch.empty(height * side, width * side, 3, dtype=torch.float32, device="cpu")
        self._decoder.decode(
            given.data_ptr(), height, width, self.config.code_dim, pixels.data_ptr(), _threads(threads)
        )
        return pixels.permute(2, 0, 1)


def _threads(threads: int | None) -> int:
    return check_threads(threads) or min(torch.get_num_threads(), _C.MAX_THREADS)
