"""Images as entries of a codebook: the convolutional tokenizer of VQGAN as LlamaGen and Janus have it (VQ-16, VQ-8).

An encoder turns patches of 2^k pixels squared into short vectors; the token of one is the nearest entry of the
codebook, both divided by their lengths; a decoder turns entries into pixels. Images are computed one at a time, so that
what an image looks like does not depend on its company.

Tokens are looked for in float32 on the CPU, always: whatever computes, a picture has the same ones. Pixels are made
where the model computes, in bfloat16 if it does, which halves the bytes and is several times as fast on processors that
multiply it (DeepSeek's code does the same); they differ by a few levels of 255 from those in float32. On
CPUs both networks are kernels of our own (vq_cpu.py); on GPUs pixels are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastigpt import _C
from fastigpt.codecs import UNKNOWN, patch, pixels_of
from fastigpt.codecs.vq_cpu import CpuVQ
from fastigpt.codecs.vq_networks import CODEBOOK, PlainVQ, VQConfig, draws
from fastigpt.nearest import NearestCentroid


class VQCodec:
    """An ImageCodec whose tokens are entries of a codebook.

    weights: named and shaped as config.tensor_shapes() says. height, width: of the canvas in tokens. half: what is
    added before pixels are cut to integers, 0 to truncate as Janus does, 0.5 to round as LlamaGen does. device, dtype:
    float32 or bfloat16, of the decoder (see `on`).
    """

    def __init__(
        self,
        config: VQConfig,
        weights: Mapping[str, torch.Tensor],
        height: int,
        width: int,
        *,
        half: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.half, self.grid, self.n_tokens = config, half, (height, width), config.n_codes
        self.size = height * config.patch, width * config.patch
        self.device, self.dtype = torch.device(device), dtype
        self.weights = {name: _as_stored(weights[name]) for name in config.tensor_shapes()}
        self._entries = F.normalize(self.weights[CODEBOOK].float(), dim=-1)  # as they are decoded

    def on(self, device: torch.device, dtype: torch.dtype) -> VQCodec:
        """The same codec, with pixels made on a device, in bfloat16 if an engine's dtype is no more exact and the
        device multiplies it, else in float32."""
        half = dtype not in (torch.float32, torch.float64) and _multiplies_bfloat16(device)
        found = torch.bfloat16 if half else torch.float32
        if (device, found) == (self.device, self.dtype):
            return self
        return VQCodec(self.config, self.weights, *self.grid, half=self.half, device=device, dtype=found)

    # --- what codecs do ------------------------------------------------------------------------------------------

    def encode(self, images: np.ndarray) -> torch.Tensor:
        found = torch.empty(len(images), self.grid[0] * self.grid[1], dtype=torch.int64, device="cpu")
        for row, image in zip(found, images):
            pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
            row[:] = self._codebook.search(self._encoder.encode(pixels))
        self._encoder.rest()  # pictures are read now and then, and in float32
        return found

    @cached_property
    def _encoder(self) -> CpuVQ:
        seeing = {name: x for name, x in self.weights.items() if not draws(name)}
        return CpuVQ(self.config, seeing, torch.float32)

    @cached_property
    def _codebook(self) -> NearestCentroid:
        return NearestCentroid(self.weights[CODEBOOK].float(), metric="cosine")

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        found = np.empty((len(tokens), *self.size, 3), np.uint8)
        for image, row in zip(found, tokens):
            image[:] = self._levels(self._entries[row])
        return found

    def _levels(self, entries: torch.Tensor) -> np.ndarray:
        """uint8 [height, width, 3] of entries as for `pixels`."""
        levels = (self.pixels(entries) + 1) * 127.5 + self.half
        return levels.clamp(0, 255).to(torch.uint8).numpy()

    @cached_property
    def _decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """pixels."""
        drawing = {name: x for name, x in self.weights.items() if draws(name)}
        if self.device.type == "cpu":
            ours = CpuVQ(self.config, drawing, self.dtype)
            return lambda entries: ours.decode(entries, *self.grid)
        layout = {4: torch.channels_last}  # in which convolutions are fastest
        networks = PlainVQ(
            self.config,
            {
                name: x.to(self.device, self.dtype, memory_format=layout.get(x.ndim, torch.preserve_format))
                for name, x in drawing.items()
            },
        )

        @torch.inference_mode()
        def decode(entries: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):
                x = entries.T.reshape(1, -1, *self.grid).to(self.device, self.dtype)
                return networks.decoder(x)[0].float().cpu().permute(1, 2, 0)

        return decode

    def pixels(self, entries: torch.Tensor) -> torch.Tensor:
        """float32 [height, width, 3], about −1 to 1, of entries of the codebook float32 [h·w, code_dim]."""
        return self._decoder(entries)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the weights when it is first needed."""
        return {name: value for name, value in vars(self).items() if name not in ("_encoder", "_decoder", "_codebook")}

    def preview(self, tokens: torch.Tensor) -> np.ndarray:
        """Unknown tokens are decoded as the nearest known ones of their column, so that the decoder's norms, which are
        taken over the whole picture, leave known ones nearly the colours that they will have; and greyed."""
        known = tokens >= 0
        found = np.full((len(tokens), *self.size, 3), UNKNOWN, np.uint8)
        for image, row, seen in zip(found, tokens, known):
            if bool(seen.any()):
                levels = self._levels(self._entries[_continued(row.view(self.grid)).flatten()])
                image[:] = np.where(pixels_of(self, seen[None])[0, ..., None], levels, np.uint8(UNKNOWN))
        return found

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, VQCodec)
            and (self.config, self.grid) == (other.config, other.grid)
            and all(torch.equal(tensor.float(), other.weights[name].float()) for name, tensor in self.weights.items())
        )

    def __hash__(self) -> int:
        return hash((self.config, self.grid))

    def __repr__(self) -> str:
        side = patch(self)[0]
        return f"VQCodec({self.n_tokens} codes for {side}×{side} pixels, {self.size[0]}×{self.size[1]})"


def _continued(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens int64 [h, w], some of which are known, with −1 replaced: by what is above, else below, else beside."""
    found = tokens.clone()
    for lines in (found, found.T):
        n = len(lines)
        for order, back in ((range(1, n), -1), (range(n - 2, -1, -1), 1)):
            for i in order:
                lines[i] = torch.where(lines[i] < 0, lines[i + back], lines[i])
    return found


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """But never larger than float32."""
    kept = tensor.detach()
    return (kept if kept.dtype in (torch.bfloat16, torch.float16) else kept.float()).contiguous()


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return "avx512vnni" in _C.supported_isas()  # of processors that multiply bfloat16, too
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
