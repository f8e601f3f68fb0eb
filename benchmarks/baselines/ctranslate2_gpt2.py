"""CTranslate2 with a GPT-2 of an Image GPT's shape and random weights. It has no Image GPT: its norms are LayerNorms
and its activation another GELU, which cost about the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastigpt.families.image_gpt.config import ImageGPTConfig


def build(config: ImageGPTConfig, folder: Path, ctranslate2: ModuleType, compute_type: str = "float32") -> Any:
    """A ctranslate2.Generator. compute_type: float32 or int8; bfloat16 is refused on most CPUs."""
    specs = ctranslate2.specs
    spec = specs.TransformerDecoderModelSpec.from_config(
        num_layers=config.n_layer,
        num_heads=config.n_head,
        pre_norm=True,
        activation=specs.Activation.GELUSigmoid,
    )
    rng = np.random.default_rng(0)
    d, f, vocabulary = config.n_embd, config.inner, config.n_colors + 1

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    def norm(layer: Any) -> None:
        layer.gamma, layer.beta = np.ones(d, np.float32), np.zeros(d, np.float32)

    def linear(layer: Any, inputs: int, outputs: int) -> None:
        layer.weight, layer.bias = normal(outputs, inputs), np.zeros(outputs, np.float32)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = normal(vocabulary, d)
    decoder.position_encodings.encodings = normal(config.n_pixels + 1, d)
    norm(decoder.layer_norm)
    decoder.projection.weight = normal(vocabulary, d)
    for layer in decoder.layer:
        norm(layer.self_attention.layer_norm)
        linear(layer.self_attention.linear[0], d, 3 * d)
        linear(layer.self_attention.linear[1], d, d)
        norm(layer.ffn.layer_norm)
        linear(layer.ffn.linear_0, d, f)
        linear(layer.ffn.linear_1, f, d)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "<start>"
    spec.register_vocabulary([*(str(i) for i in range(config.n_colors)), "<start>"])
    spec.validate()
    spec.optimize(quantization=None if compute_type == "float32" else compute_type)
    spec.save(str(folder))
    return ctranslate2.Generator(str(folder), device="cpu", compute_type=compute_type)
