"""The networks of a VQ: what turns pixels into vectors beside a codebook, and back.

As LlamaGen and Janus have them, level by level of ResNet blocks, with attention on the coarsest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_GROUPS, _EPSILON = 32, 1e-6  # of every norm
CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class VQConfig:
    """base: channels of the finest level; multipliers: of the levels, finest first, each half the size of the one
    before; res_blocks: of a level of the encoder, the decoder's have one more; latent: channels between the networks
    and the codebook; n_codes, code_dim: its shape. Attention stands on the coarsest level only."""

    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent: int = 256
    n_codes: int = 16384
    code_dim: int = 8

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> VQConfig:
        """That of tensors with these names and shapes. KeyError for one without which it cannot be told; whether all
        fit, tensor_shapes() says."""

        def count(pattern: str) -> int:
            return next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)

        first = "encoder.conv_blocks.{}.res.0.conv1.weight"
        base = max(1, shapes["encoder.conv_in.weight"][0])
        return cls(
            base=base,
            multipliers=tuple(shapes[first.format(i)][0] // base for i in range(count(first))),
            res_blocks=count("encoder.conv_blocks.0.res.{}.conv1.weight"),
            latent=shapes["quant_conv.weight"][1],
            n_codes=shapes[CODEBOOK][0],
            code_dim=shapes[CODEBOOK][1],
        )

    @property
    def patch(self) -> int:
        """Pixels on a side of what a token stands for."""
        return 2 ** (len(self.multipliers) - 1)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name, as LlamaGen has it, and shape of every tensor."""
        return {CODEBOOK: (self.n_codes, self.code_dim), **self.layer_shapes()}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the two networks."""
        shapes: dict[str, tuple[int, ...]] = {}

        def conv(name: str, into: int, out: int, size: int = 3) -> None:
            shapes[name + ".weight"], shapes[name + ".bias"] = (out, into, size, size), (out,)

        def norm(name: str, width: int) -> None:
            shapes[name + ".weight"], shapes[name + ".bias"] = (width,), (width,)

        def res(name: str, into: int, out: int) -> None:
            norm(name + ".norm1", into)
            conv(name + ".conv1", into, out)
            norm(name + ".norm2", out)
            conv(name + ".conv2", out, out)
            if into != out:
                conv(name + ".nin_shortcut", into, out, 1)

        def attention(name: str, width: int) -> None:
            norm(name + ".norm", width)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{name}.{part}", width, width, 1)

        def middle(name: str, width: int) -> None:
            res(name + ".0", width, width)
            attention(name + ".1", width)
            res(name + ".2", width, width)

        widths = [self.base * m for m in self.multipliers]
        last = len(widths) - 1
        conv("encoder.conv_in", 3, self.base)
        into = self.base
        for level, out in enumerate(widths):
            name = f"encoder.conv_blocks.{level}"
            for j in range(self.res_blocks):
                res(f"{name}.res.{j}", into, out)
                into = out
                if level == last:
                    attention(f"{name}.attn.{j}", out)
            if level < last:
                conv(name + ".downsample.conv", out, out)
        middle("encoder.mid", into)
        norm("encoder.norm_out", into)
        conv("encoder.conv_out", into, self.latent)
        conv("quant_conv", self.latent, self.code_dim, 1)
        conv("post_quant_conv", self.code_dim, self.latent, 1)
        conv("decoder.conv_in", self.latent, into)
        middle("decoder.mid", into)
        for level, out in enumerate(reversed(widths)):
            name = f"decoder.conv_blocks.{level}"
            for j in range(self.res_blocks + 1):
                res(f"{name}.res.{j}", into, out)
                into = out
                if level == 0:
                    attention(f"{name}.attn.{j}", out)
            if level < last:
                conv(name + ".upsample.conv", out, out)
        norm("decoder.norm_out", into)
        conv("decoder.conv_out", into, 3)
        return shapes


def draws(name: str) -> bool:
    """Whether a tensor of a VQ is one of its decoder's, which turns entries into pixels."""
    return name.startswith(("decoder.", "post_quant_conv."))


class VQNetworks:
    """Encoder and decoder. config: of their sizes. weights: named and shaped as config.tensor_shapes() says."""

    config: VQConfig
    weights: Mapping[str, torch.Tensor]

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = self.weights[name + ".weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.weights[name + ".bias"], stride, padding)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.group_norm(x, _GROUPS, self.weights[name + ".weight"], self.weights[name + ".bias"], _EPSILON)

    def _active(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """After a norm. Without gradients in place: new memory of such sizes costs as much as what is computed."""
        return F.silu(self._norm(x, name), inplace=not torch.is_grad_enabled())

    def _res(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self._conv(self._active(x, name + ".norm1"), name + ".conv1")
        h = self._conv(self._active(h, name + ".norm2"), name + ".conv2")
        x = self._conv(x, name + ".nin_shortcut") if name + ".nin_shortcut.weight" in self.weights else x
        return x + h if torch.is_grad_enabled() else h.add_(x)

    def _attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """One head over all places."""
        h = self._norm(x, name + ".norm")
        q, k, v = (self._conv(h, f"{name}.{part}").flatten(2).transpose(1, 2) for part in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(x)
        return x + self._conv(y, name + ".proj_out")

    def _middle(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._res(self._attention(self._res(x, name + ".0"), name + ".1"), name + ".2")

    def _level(self, x: torch.Tensor, name: str, res_blocks: int) -> torch.Tensor:
        for j in range(res_blocks):
            x = self._res(x, f"{name}.res.{j}")
            if f"{name}.attn.{j}.q.weight" in self.weights:
                x = self._attention(x, f"{name}.attn.{j}")
        return x

    def encoder(self, x: torch.Tensor) -> torch.Tensor:
        """[B, code_dim, h, w] of images [B, 3, height, width], about −1 to 1: what the nearest entries are looked for
        of."""
        x = self._conv(x, "encoder.conv_in")
        levels = len(self.config.multipliers)
        for level in range(levels):
            name = f"encoder.conv_blocks.{level}"
            x = self._level(x, name, self.config.res_blocks)
            if level < levels - 1:
                x = self._conv(F.pad(x, (0, 1, 0, 1)), name + ".downsample.conv", stride=2)
        x = self._middle(x, "encoder.mid")
        x = self._conv(self._active(x, "encoder.norm_out"), "encoder.conv_out")
        return self._conv(x, "quant_conv")

    def decoder(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, height, width] of entries of the codebook [B, code_dim, h, w]."""
        x = self._middle(self._conv(self._conv(x, "post_quant_conv"), "decoder.conv_in"), "decoder.mid")
        levels = len(self.config.multipliers)
        for level in range(levels):
            name = f"decoder.conv_blocks.{level}"
            x = self._level(x, name, self.config.res_blocks + 1)
            if level < levels - 1:
                x = self._conv(F.interpolate(x, scale_factor=2.0), name + ".upsample.conv")
        return self._conv(self._active(x, "decoder.norm_out"), "decoder.conv_out")


@dataclass(frozen=True)
class PlainVQ(VQNetworks):
    """Networks of these tensors; those of one of the two are enough."""

    config: VQConfig
    weights: Mapping[str, torch.Tensor]
