"""Images as entries of a codebook: the convolutional tokenizer of VQGAN as LlamaGen and Janus have it (VQ-16, VQ-8).

An encoder turns patches of 2^k pixels squared into short vectors; the token of one is the nearest entry of the
codebook, both divided by their lengths; a decoder turns entries into pixels. Images are computed one at a time, so that
what an image looks like does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from fastigpt.codecs import UNKNOWN, patch, pixels_of
from fastigpt.nearest import NearestCentroid

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
        shapes: dict[str, tuple[int, ...]] = {CODEBOOK: (self.n_codes, self.code_dim)}

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


class VQCodec:
    """An ImageCodec whose tokens are entries of a codebook, on the CPU in float32.

    weights: named and shaped as config.tensor_shapes() says. height, width: of the canvas in tokens. half: what is
    added before pixels are cut to integers, 0 to truncate as Janus does, 0.5 to round as LlamaGen does.
    """

    def __init__(
        self, config: VQConfig, weights: Mapping[str, torch.Tensor], height: int, width: int, *, half: float = 0.0
    ) -> None:
        self.config, self.half, self.grid, self.n_tokens = config, half, (height, width), config.n_codes
        self.size = height * config.patch, width * config.patch
        self.weights = {name: weights[name].detach().float().contiguous() for name in config.tensor_shapes()}
        self._entries = F.normalize(self.weights[CODEBOOK], dim=-1)  # as they are decoded

    # --- what codecs do ------------------------------------------------------------------------------------------

    def encode(self, images: np.ndarray) -> torch.Tensor:
        found = torch.empty(len(images), self.grid[0] * self.grid[1], dtype=torch.int64, device="cpu")
        for row, image in zip(found, images):
            row[:] = self._codebook.search(self.latents(image))
        return found

    @cached_property
    def _codebook(self) -> NearestCentroid:
        return NearestCentroid(self.weights[CODEBOOK], metric="cosine")

    @torch.inference_mode()
    def latents(self, image: np.ndarray) -> torch.Tensor:
        """float32 [h·w, code_dim] of an image uint8 [height, width, 3]: what the nearest entries are looked for of."""
        with torch.autocast("cpu", enabled=False):
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            return self._conv(self._encoder(x), "quant_conv")[0].flatten(1).T.contiguous()

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        found = np.empty((len(tokens), *self.size, 3), np.uint8)
        for image, row in zip(found, tokens):
            x = self.pixels(self._entries[row])
            levels = ((x + 1) * 127.5 + self.half).clamp(0, 255)
            image[:] = levels.to(torch.uint8).permute(1, 2, 0).numpy()
        return found

    @torch.inference_mode()
    def pixels(self, entries: torch.Tensor) -> torch.Tensor:
        """float32 [3, height, width], about −1 to 1, of entries of the codebook float32 [h·w, code_dim]."""
        with torch.autocast("cpu", enabled=False):
            x = entries.T.reshape(1, -1, *self.grid)
            return self._decoder(self._conv(x, "post_quant_conv"))[0]

    def preview(self, tokens: torch.Tensor) -> np.ndarray:
        """Unknown tokens are decoded as vectors of zeros, which say least to their neighbours, and greyed."""
        known = tokens >= 0
        found = np.full((len(tokens), *self.size, 3), UNKNOWN, np.uint8)
        for image, row, seen in zip(found, tokens, known):
            if bool(seen.any()):
                x = self.pixels(self._entries[row.clamp(min=0)] * seen[:, None])
                levels = ((x + 1) * 127.5 + self.half).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
                image[:] = np.where(pixels_of(self, seen[None])[0, ..., None], levels, np.uint8(UNKNOWN))
        return found

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, VQCodec)
            and (self.config, self.grid) == (other.config, other.grid)
            and all(torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())
        )

    def __hash__(self) -> int:
        return hash((self.config, self.grid))

    def __repr__(self) -> str:
        side = patch(self)[0]
        return f"VQCodec({self.n_tokens} codes for {side}×{side} pixels, {self.size[0]}×{self.size[1]})"

    # --- the networks --------------------------------------------------------------------------------------------

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = self.weights[name + ".weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.weights[name + ".bias"], stride, padding)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.group_norm(x, _GROUPS, self.weights[name + ".weight"], self.weights[name + ".bias"], _EPSILON)

    def _res(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self._conv(F.silu(self._norm(x, name + ".norm1")), name + ".conv1")
        h = self._conv(F.silu(self._norm(h, name + ".norm2")), name + ".conv2")
        return (self._conv(x, name + ".nin_shortcut") if name + ".nin_shortcut.weight" in self.weights else x) + h

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

    def _encoder(self, x: torch.Tensor) -> torch.Tensor:
        x = self._conv(x, "encoder.conv_in")
        levels = len(self.config.multipliers)
        for level in range(levels):
            name = f"encoder.conv_blocks.{level}"
            x = self._level(x, name, self.config.res_blocks)
            if level < levels - 1:
                x = self._conv(F.pad(x, (0, 1, 0, 1)), name + ".downsample.conv", stride=2)
        x = self._middle(x, "encoder.mid")
        return self._conv(F.silu(self._norm(x, "encoder.norm_out")), "encoder.conv_out")

    def _decoder(self, x: torch.Tensor) -> torch.Tensor:
        x = self._middle(self._conv(x, "decoder.conv_in"), "decoder.mid")
        levels = len(self.config.multipliers)
        for level in range(levels):
            name = f"decoder.conv_blocks.{level}"
            x = self._level(x, name, self.config.res_blocks + 1)
            if level < levels - 1:
                x = self._conv(F.interpolate(x, scale_factor=2.0), name + ".upsample.conv")
        return self._conv(F.silu(self._norm(x, "decoder.norm_out")), "decoder.conv_out")
