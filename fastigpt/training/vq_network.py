"""The VQ of codecs/vq.py, trainable: the same networks on parameters, and a codebook that follows what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastigpt.codecs.vq_networks import CODEBOOK, VQConfig, VQNetworks

_SCALES = 3  # of the differences between neighbours that the loss compares
_COMMITMENT = 0.25


class TrainableVQ(nn.Module, VQNetworks):
    """Convolutions run channels last, norms channels first: so each is fastest on a CPU (norms by a factor of 100)."""

    def __init__(self, config: VQConfig, *, seed: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        shapes = {name: shape for name, shape in config.tensor_shapes().items() if name != CODEBOOK}
        self.parameters_by_name = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(_start(name, shape, generator)) for name, shape in shapes.items()}
        )
        self.weights = self._kernels()  # views, through which gradients go any number of times
        entries = torch.empty(config.n_codes, config.code_dim, dtype=torch.float32).normal_(generator=generator)
        self.codebook = Codebook(F.normalize(entries, dim=-1))

    def _kernels(self) -> dict[str, torch.Tensor]:
        shapes = self.config.tensor_shapes()
        named = ((name.replace("/", "."), p) for name, p in self.parameters_by_name.items())
        return {name: _kernel(p, shapes[name]) for name, p in named}

    def matrices(self) -> list[nn.Parameter]:
        """The convolutions, each as rows of what makes one channel."""
        return [p for p in self.parameters_by_name.values() if p.ndim == 2]

    def vectors(self) -> list[nn.Parameter]:
        return [p for p in self.parameters_by_name.values() if p.ndim == 1]

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        return super()._conv(_Laid.apply(x, torch.channels_last, torch.contiguous_format), name, stride)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return super()._norm(_Laid.apply(x, torch.contiguous_format, torch.channels_last), name)

    def loss(self, images: torch.Tensor, *, quantised: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Of images float32 [B, 3, height, width] in [−1, 1], and their vectors float32 [B·h·w, code_dim], which the
        codebook should follow. Not quantised: as if every vector were an entry, so that the first entries can be
        vectors that mean something. Several threads may call it at once."""
        z = F.normalize(self.encoder(images).float(), dim=1)
        rows = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
        entries = z
        if quantised:
            nearest = self.codebook.nearest(rows)
            entries = self.codebook.entries[nearest].view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
        shown = self.decoder(z + (entries - z).detach()).float()
        return reconstruction_loss(shown, images) + _COMMITMENT * F.mse_loss(z, entries.detach()), rows

    @torch.no_grad()
    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """int64 [B, h·w] of images as for `loss`."""
        z = F.normalize(self.encoder(images).float(), dim=1).permute(0, 2, 3, 1)
        return self.codebook.nearest(z.flatten(0, 2)).view(len(images), -1)

    @torch.no_grad()
    def shown(self, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """float32 [B, 3, H, W] in [−1, 1]: the pictures of codes [B, height · width]."""
        entries = self.codebook.entries[codes].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return self.decoder(entries).float().clamp(-1, 1)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Those of `tensors`, for what is already trained."""
        with torch.no_grad():
            for name, kernel in self._kernels().items():
                kernel.copy_(tensors[name])
            self.codebook.entries.copy_(F.normalize(tensors[CODEBOOK], dim=-1))

    def tensors(self) -> dict[str, torch.Tensor]:
        """float32, as config.tensor_shapes() says."""
        found = {name: p.detach().float().contiguous() for name, p in self.weights.items()}
        return {CODEBOOK: self.codebook.entries.clone(), **found}


class _Laid(torch.autograd.Function):
    """The same numbers in another memory format, and their gradients in that of what made them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to: torch.memory_format, back: torch.memory_format) -> torch.Tensor:
        ctx.back = back
        return x.contiguous(memory_format=to)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.contiguous(memory_format=ctx.back), None, None


class Codebook(nn.Module):
    """Unit vectors, each the running mean direction of what it was nearest to; one that is hardly ever nearest becomes
    a vector of the batch. entries: float32 [n, dim]."""

    entries: torch.Tensor
    uses: torch.Tensor
    sums: torch.Tensor
    decay, dead = 0.99, 0.03  # dead: as a share of the mean use

    def __init__(self, entries: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("entries", entries)
        self.register_buffer("uses", torch.zeros(len(entries), dtype=torch.float32))
        self.register_buffer("sums", torch.zeros_like(entries))

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 [n] of unit vectors float32 [n, dim]."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows @ self.entries.T).argmax(1)

    @torch.no_grad()
    def follow(self, rows: torch.Tensor) -> None:
        """rows: unit vectors float32 [n, dim], those of a batch."""
        nearest = self.nearest(rows)
        uses = torch.bincount(nearest, minlength=len(self.entries)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, rows)
        self.uses.lerp_(uses, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        mean = len(rows) / len(self.entries)
        dead = (self.uses < self.dead * mean).nonzero()[:, 0][: len(rows)]
        # Spread over the batch instead of drawn: what a step does depends on the step alone.
        taken = rows[torch.arange(len(dead), device=rows.device) * len(rows) // max(1, len(dead))]
        self.uses[dead], self.sums[dead] = mean, mean * taken
        self.entries.copy_(F.normalize(self.sums, dim=-1))


def reconstruction_loss(shown: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels, and of the differences between neighbours on three scales, so that edges stay
    sharp. What has more detail around it counts more: most of a scene is sky and ground, which are learnt soon."""
    weighted = (shown - images) * _detail(images)
    total = weighted.abs().mean()
    for scale in range(_SCALES):
        error = F.avg_pool2d(weighted, 2**scale) if scale else weighted
        total = total + (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / _SCALES
    return total


def _detail(images: torch.Tensor) -> torch.Tensor:
    """float32 [B, 1, H, W], of mean 1 in each image: half of it follows the differences between neighbours nearby."""
    edges = F.pad(images.diff(dim=3).abs(), (0, 1)) + F.pad(images.diff(dim=2).abs(), (0, 0, 0, 1))
    near = F.avg_pool2d(edges.mean(1, keepdim=True), 9, 1, 4, count_include_pad=False) + 1e-6
    return (1 + near / near.mean((2, 3), keepdim=True)) / 2


def _start(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms do nothing; branches of ResNet blocks and attention start small."""
    if len(shape) == 1:
        is_scale = "norm" in name and name.endswith("weight")
        return torch.full(shape, 1.0 if is_scale else 0.0, dtype=torch.float32)
    rows, columns = shape[0], shape[1] * shape[2] * shape[3]
    scale = columns**-0.5
    if name.endswith(("conv2.weight", "proj_out.weight")):
        scale *= 0.1
    return torch.empty(rows, columns, dtype=torch.float32).normal_(0, scale, generator=generator)


def _kernel(parameter: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A view: of a matrix as the kernel [out, in, height, width], channels last."""
    if len(shape) == 1:
        return parameter
    return parameter.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
