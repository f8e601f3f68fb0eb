"""A transformers module's weights: which they are now, so that a change is noticed, and our model built from them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastigpt.families.image_gpt.checkpoint import check_weights
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.model import ImageGPT
from fastigpt.options import LoadOptions

if TYPE_CHECKING:
    from transformers import ImageGPTForCausalImageModeling

# What of a transformers configuration decides what an Image GPT computes.
_CONFIG = (
    "model_type",
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "layer_norm_epsilon",
    "activation_function",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)


# 64-bit words that are multiplied at a time: a buffer of their size should stay in the cache, and be shared by threads.
_WORDS = {"cpu": 1 << 17, "cuda": 1 << 22}


def marks(weights: Mapping[str, torch.Tensor]) -> list[tuple[Any, ...]]:
    """What identifies the weights now. The checksum is there because writes to `.data` leave the version as it is."""
    marks, sums = [], []
    for name, tensor in weights.items():
        version = None if tensor.is_inference() else tensor._version
        marks.append((name, tensor.data_ptr(), version, tensor.dtype, tensor.device, tuple(tensor.shape)))
        sums.append(checksum(tensor))
    return [*marks, tuple(torch.stack(sums).tolist())]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar, on the tensor's device, of its bytes and of where they stand: rows that change places change it."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # a slice of a larger buffer, which cannot be viewed in steps of eight
        data = data.clone()
    whole = len(data) // 8 * 8
    words = data[:whole].view(torch.int64)
    return _mixed(torch.cat([_mixed(words)[None], data[whole:].long()]))


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Σ (w ^ w >> 32) · an odd number that depends on the place, modulo 2⁶⁴. The shift comes first because a product
    alone passes bit 63, a float32's sign, straight through: two numbers that change sign would cancel."""
    factors = _factors(words.device)
    sums = []
    for part in words.split(len(factors)):
        mixed = part >> 32
        mixed ^= part
        mixed *= factors[: len(part)]
        sums.append(mixed.sum())
    if len(sums) > 1:
        return _mixed(torch.stack(sums))
    return sums[0]


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    size = (_WORDS["cpu" if device.type == "cpu" else "cuda"],)
    return torch.randint(-(2**63), 2**63 - 1, size, generator=generator, device="cpu").bitwise_or_(1).to(device)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All of a module. Raises ValueError if it is spread over devices."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) != 1 or devices[0] == "meta":
        raise ValueError(f"hf_model must be on one device, not on {', '.join(devices)}")
    return tensors


def build(model: ImageGPTForCausalImageModeling, *, dtype: Any, kv_dtype: Any, backend: str) -> ImageGPT:
    config = _config(model)
    tensors = tensors_of(model)
    unknown = sorted(tensors.keys() - config.tensor_shapes().keys() - config.bias_shapes().keys())
    if unknown:
        raise ValueError(f"hf_model has parameters that an Image GPT has not, {unknown[0]} for one: it was adapted")
    weights = check_weights(config, tensors, source="hf_model")
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return ImageGPT(config, weights, name=name, **computing(weights["lm_head.weight"], dtype, kv_dtype, backend))


def computing(weight: torch.Tensor, dtype: Any, kv_dtype: Any, backend: str) -> LoadOptions:
    """Where and in what an engine computes that takes a module's place. weight: one of the module's."""
    own, device = weight.dtype, weight.device
    if dtype is None and own == torch.float64:
        raise ValueError("hf_model is in float64, which no fast engine computes in: give dtype=torch.float32")
    if dtype is None and own == torch.float16 and device.type == "cpu" and backend == "auto":
        backend = "portable"  # the one with float16 on a CPU
    return {"device": device, "dtype": own if dtype is None else dtype, "kv_dtype": kv_dtype, "backend": backend}


def _config(model: ImageGPTForCausalImageModeling) -> ImageGPTConfig:
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError("hf_model has cross-attention, which no Image GPT has")
    data = {key: value for key, value in model.config.to_dict().items() if key in _CONFIG}
    pixels = data["n_positions"]
    if math.isqrt(pixels) ** 2 != pixels:  # ids are drawn here, not images: the shape of the canvas does not matter
        data["fastigpt"] = {"height": 1, "width": pixels}
    return ImageGPTConfig.from_json(json.dumps(data), source="hf_model.config")


@dataclass(frozen=True)
class _ImageGPTs:
    """Of hf_method.Kind."""

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return tensors_of(model)

    def build(self, model: Any, *, dtype: Any, kv_dtype: Any, backend: str) -> ImageGPT:
        return build(model, dtype=dtype, kv_dtype=kv_dtype, backend=backend)


KIND = _ImageGPTs()
