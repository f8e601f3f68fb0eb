"""Janus and Janus-Pro, text to image (github.com/deepseek-ai/Janus): a Llama with embeddings and a head for images.

A prefix is a prompt in the chat's words, up to <begin_of_image>; guidance leads away from the same length of padding.
Read are transformers' layout (model_type "janus") and DeepSeek's ("multi_modality"); the parts that look at images
(SigLIP) and the head for words are left where they are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastigpt import save
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.codecs.vq import VQCodec, VQConfig
from fastigpt.errors import CheckpointError
from fastigpt.families import generation_config, llama
from fastigpt.families.chat import WORDS, ChatReader
from fastigpt.families.chat import read as read_tokenizer
from fastigpt.families.generation_config import GENERATION
from fastigpt.families.janus_names import their_names, their_vq_name, vq_name
from fastigpt.families.named_tensors import take, take_vq
from fastigpt.families.pretrained import CONFIG
from fastigpt.lazy_tensors import open_weights
from fastigpt.save import CheckpointFiles
from fastigpt.scalars import integer, real
from fastigpt.spec import ROTARY, ModelSpec
from fastigpt.tensor_files import SAFETENSORS
from fastigpt.tensors import Tensors, row_reader
from fastigpt.untrusted import exists, read_json, short

TOKENIZER, PROCESSOR = "tokenizer.json", "processor_config.json"
WANTED = (CONFIG, TOKENIZER, PROCESSOR, GENERATION, "model*.safetensors*", "pytorch_model*.bin*")
BELONGS = frozenset({CONFIG, TOKENIZER, PROCESSOR, GENERATION, SAFETENSORS})
DEFAULTS = {"guidance_scale": 5.0}
"""What DeepSeek's code draws with, at temperature 1 without filters."""

LONGEST_PROMPT = 512
"""Tokens of a prompt with the chat's words around it. A model could read longer ones; a session's memory is sized by
the longest."""

DEEPSEEK_PIXELS = 384
"""Side of an image in DeepSeek's layout, whose config.json does not tell it: the only one that was published."""

_MOST, _MOST_LAYERS = 2**24, 2**14  # of every size, and of layers
_SHORTEST_PROMPT = 16  # the chat's words alone take about 10


@dataclass(frozen=True)
class JanusConfig:
    """n_layer, n_head, n_kv_head, head_dim, width, n_inner: of the language model. vocabulary: of its words. n_codes,
    code_dim: of the embedding of image tokens. height, columns: of the canvas in tokens. prompt_length: tokens of the
    longest prefix."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    width: int
    n_inner: int
    vocabulary: int
    n_codes: int
    code_dim: int
    height: int
    columns: int
    norm_epsilon: float = 1e-6
    rotary_base: float = 10000.0
    prompt_length: int = LONGEST_PROMPT

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in transformers' layout, without "model." in front, and shape of every tensor but the VQ's."""
        d, f, q, kv = self.width, self.n_inner, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "language_model.embed_tokens.weight": (self.vocabulary, d),
            "language_model.norm.weight": (d,),
            "generation_embeddings.weight": (self.n_codes, self.code_dim),
            "generation_aligner.fc1.weight": (d, self.code_dim),
            "generation_aligner.fc1.bias": (d,),
            "generation_aligner.hidden_layers.0.weight": (d, d),
            "generation_aligner.hidden_layers.0.bias": (d,),
            "generation_head.proj_out.weight": (d, d),
            "generation_head.proj_out.bias": (d,),
            "generation_head.vision_head.weight": (self.n_codes, d),
            "generation_head.vision_head.bias": (self.n_codes,),
        }
        for i in range(self.n_layer):
            layer = f"language_model.layers.{i}."
            shapes |= {
                layer + "self_attn.q_proj.weight": (q, d),
                layer + "self_attn.k_proj.weight": (kv, d),
                layer + "self_attn.v_proj.weight": (kv, d),
                layer + "self_attn.o_proj.weight": (d, q),
                layer + "mlp.gate_proj.weight": (f, d),
                layer + "mlp.up_proj.weight": (f, d),
                layer + "mlp.down_proj.weight": (d, f),
                layer + "input_layernorm.weight": (d,),
                layer + "post_attention_layernorm.weight": (d,),
            }
        return shapes


@dataclass(frozen=True)
class Janus:
    """A `Pretrained`. weights: as config.tensor_shapes() says. vq_weights: as vq.tensor_shapes() says."""

    config: JanusConfig
    weights: Mapping[str, torch.Tensor]
    vq: VQConfig
    vq_weights: Mapping[str, torch.Tensor]
    reader: ChatReader
    defaults: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)

    no_codec, no_head = "", None
    preprocessing = Preprocessing()

    @cached_property
    def spec(self) -> ModelSpec:
        config = self.config
        return llama.spec(
            config,
            n_prefix_tokens=config.vocabulary,
            prefix_length=config.prompt_length,
            unconditional=self.reader.unconditional(self.reader.prefix("")),
            head_inner=config.width,
        )

    @property
    def codec(self) -> VQCodec:
        return VQCodec(self.vq, self.vq_weights, self.config.height, self.config.columns)

    def canonical(self) -> Tensors:
        return canonical(self.config, self.spec, self.weights)

    def published(self) -> dict[str, str]:
        found = {**_PUBLISHED, "token.embedding": "generation_aligner"}
        for i in range(self.config.n_layer):
            layer = f"language_model.layers.{i}."
            found |= {f"blocks.{i}.{ours}": layer + theirs for ours, theirs in _PUBLISHED_IN_BLOCKS.items()}
            found |= {f"blocks.{i}.qkv.weight": layer + "self_attn.q_proj.weight"}
            found |= {f"blocks.{i}.fc.weight": layer + "mlp.gate_proj.weight"}
        return found

    def write(self, folder: str | os.PathLike[str]) -> None:
        """In transformers' names, without the parts for other tasks, so that this library opens it and transformers
        does not."""

        def fill(target: Path) -> None:
            data = {"model_type": "janus", "fastigpt": asdict(self.config)}
            (target / CONFIG).write_text(json.dumps(data, indent=2) + "\n")
            (target / TOKENIZER).write_text(self.reader.tokenizer)
            (target / PROCESSOR).write_text(json.dumps({"sft_format": self.reader.format}, indent=2) + "\n")
            generation_config.write(target / GENERATION, self.defaults)
            vq = {f"vqmodel.{their_vq_name(name)}": tensor for name, tensor in self.vq_weights.items()}
            held = {f"model.{name}": tensor for name, tensor in {**self.weights, **vq}.items()}
            save_file(held, target / SAFETENSORS, metadata={"format": "pt"})

        save.replace(folder, fill, BELONGS)


_WORDS = "language_model.embed_tokens.weight"
_PUBLISHED = {
    "prefix.embedding": _WORDS,
    "norm": "language_model.norm.weight",
    "head.fc.weight": "generation_head.proj_out.weight",
    "head.fc.bias": "generation_head.proj_out.bias",
    "head.weight": "generation_head.vision_head.weight",
    "head.bias": "generation_head.vision_head.bias",
}
_PUBLISHED_IN_BLOCKS = {
    "norm_1": "input_layernorm.weight",
    "proj.weight": "self_attn.o_proj.weight",
    "norm_2": "post_attention_layernorm.weight",
    "out.weight": "mlp.down_proj.weight",
}


def canonical(config: JanusConfig, spec: ModelSpec, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The weights under the names of spec.weight_shapes(); made when they are asked for. weights: as
    config.tensor_shapes() says."""
    makers = llama.renamed(weights, _PUBLISHED)
    makers["token.embedding"] = lambda: token_table(weights)
    makers[ROTARY] = lambda: rotary_table(config, spec.context)
    for i in range(config.n_layer):
        ours, layer = f"blocks.{i}.", f"language_model.layers.{i}."
        makers |= llama.renamed(weights, {ours + name: layer + at for name, at in _PUBLISHED_IN_BLOCKS.items()})
        qkv = [f"{layer}self_attn.{part}_proj.weight" for part in "qkv"]
        makers[ours + "qkv.weight"] = llama.fused(weights, qkv)
        gate_up = [f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up")]
        makers[ours + "fc.weight"] = llama.fused(weights, gate_up)
    words = row_reader(weights, _WORDS)
    return Tensors(makers, {} if words is None else {"prefix.embedding": words})


@torch.inference_mode()
def token_table(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [n_codes, width]: what an image token is to the language model depends on nothing but the token."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = (weights[f"generation_aligner.{name}.{what}"].float() for what in ("weight", "bias"))
        return F.linear(x, weight, bias)

    embedding = weights["generation_embeddings.weight"].float()
    with torch.autocast(embedding.device.type, enabled=False):
        return linear(F.gelu(linear(embedding, "fc1")), "hidden_layers.0").clone()


def rotary_table(config: JanusConfig, rows: int) -> torch.Tensor:
    """float32 [rows, head_dim / 2, 2], as in Llama: pairs are halves of a head."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu")
    angles = torch.arange(rows, device="cpu")[:, None] * config.rotary_base ** (-half / config.head_dim)
    return torch.stack([angles.cos(), angles.sin()], -1).float()


# --- files -------------------------------------------------------------------------------------------------------


def read(folder: Path, files: CheckpointFiles, data: Any) -> Janus:
    """See `Family`."""
    config_file = str(files.path(CONFIG))
    sizes = _sizes(data, config_file)
    file, stored = open_weights(folder, files.path)
    source = str(file)
    named = their_names(stored)
    if not any(name.startswith("generation_head.") for name in named):
        raise CheckpointError(f"{source} has no head for images (generation_head): this Janus reads images only")
    vq_prefix = "vqmodel."
    vq_stored = {vq_name(n.removeprefix(vq_prefix)): x for n, x in named.items() if n.startswith(vq_prefix)}
    vq, vq_weights = take_vq(vq_stored, source)
    if "height" not in sizes:
        if DEEPSEEK_PIXELS % vq.patch or vq.patch > DEEPSEEK_PIXELS:
            raise CheckpointError(f"{source}: {DEEPSEEK_PIXELS} pixels are no multiple of the VQ's patch, {vq.patch}")
        sizes["height"] = sizes["columns"] = DEEPSEEK_PIXELS // vq.patch
    config = _checked(sizes, config_file)
    if vq.n_codes != config.n_codes:
        raise CheckpointError(f"{source}: the VQ has {vq.n_codes} codes, the language model draws {config.n_codes}")
    weights = take(named, config.tensor_shapes(), source)
    chat = _chat_format(folder, files.path(PROCESSOR))
    reader = read_tokenizer(files.path(TOKENIZER), config.prompt_length, config.vocabulary, chat)
    defaults = generation_config.read(files.path(GENERATION), DEFAULTS)
    return Janus(config, weights, vq, vq_weights, reader, defaults)


def _chat_format(folder: Path, processor: Path) -> str:
    """The words around a prompt: as the processor's file says, else Janus-Pro's, or for a directory or hub id that is
    called Janus-1.3B those that it was trained with, which nothing else tells."""
    told = read_json(processor) if exists(processor) else {}
    if not isinstance(told, dict):
        raise CheckpointError(f"{processor} must hold a JSON object, not {type(told).__name__}")
    old = any(re.search(r"(^|-)janus-1\.3b$", part, re.IGNORECASE) for part in folder.absolute().parts)
    found = "deepseek_old" if old else told.get("sft_format", "deepseek")
    if not isinstance(found, str) or found not in WORDS:
        known = ", ".join(WORDS)
        raise CheckpointError(f"{processor}: sft_format is {short(found)}; the known ones are {known}")
    return found


def config_of(data: dict[str, Any], source: str) -> JanusConfig:
    """What a configuration in transformers' layout says. Raises CheckpointError that names `source`."""
    return _checked(_sizes(data, source), source)


def _checked(sizes: dict[str, Any], source: str) -> JanusConfig:
    """sizes: JanusConfig's fields, and the context from which the length of prompts follows."""
    context, canvas = sizes.pop("context", None), sizes["height"] * sizes["columns"]
    if canvas > _MOST:
        raise CheckpointError(f"{source}: a canvas of {sizes['height']} × {sizes['columns']} is too large")
    if context is not None:
        sizes["prompt_length"] = min(LONGEST_PROMPT, context - canvas + 1)
        if sizes["prompt_length"] < _SHORTEST_PROMPT:
            raise CheckpointError(f"{source}: a context of {context} has no room for a prompt beside {canvas} tokens")
    if sizes["prompt_length"] > _MOST // canvas:
        raise CheckpointError(f"{source}: prompts of {sizes['prompt_length']} tokens are too long")
    config = JanusConfig(**sizes)
    if config.head_dim % 2 or config.n_head % config.n_kv_head:
        raise CheckpointError(
            f"{source}: {config.n_head} heads of {config.head_dim} elements, {config.n_kv_head} of keys, do not fit"
        )
    return config


def _sizes(data: dict[str, Any], source: str) -> dict[str, Any]:
    """What config.json says of JanusConfig's fields, and "context"."""
    if "fastigpt" in data:
        said = _part(data, "fastigpt", source)
        return {name: _number(said, name, source) for name in JanusConfig.__dataclass_fields__}
    deepseek = data.get("model_type") == "multi_modality"
    text = _part(data, "language_config" if deepseek else "text_config", source)
    text = {**_LLAMA_DEFAULTS, **text}
    for key, expected in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if text.get(key, expected) != expected:
            raise CheckpointError(f"{source}: {key} is {short(text[key])}; Janus has {expected!r}")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{source}: rotary positions are {short(rope)}; Janus has plain ones")
    text["rope_theta"] = rope.get("rope_theta", text["rope_theta"])
    found: dict[str, Any] = {name: _number(text, key, source, name) for name, key in _FROM_LLAMA.items()}
    kv, dim = text.get("num_key_value_heads"), text.get("head_dim")
    found["n_kv_head"] = found["n_head"] if kv is None else _number(text, "num_key_value_heads", source)
    found["head_dim"] = found["width"] // found["n_head"] if dim is None else _number(text, "head_dim", source)
    if deepseek:
        params = _part(_part(data, "gen_head_config", source), "params", source)
        aligner = _part(_part(data, "gen_aligner_config", source), "params", source)
        found["n_codes"] = _number(params, "image_token_size", source)
        found["code_dim"] = _number(aligner, "input_dim", source)
    else:
        vq = _part(data, "vq_config", source)
        found["n_codes"], found["code_dim"] = (_number(vq, key, source) for key in ("num_embeddings", "embed_dim"))
        found["height"] = found["columns"] = _number(vq, "num_patches", source)
    found["context"] = _number(text, "max_position_embeddings", source)
    return found


_LLAMA_DEFAULTS = {  # those of transformers' LlamaConfig: DeepSeek's files leave them out
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
_FROM_LLAMA = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "width": "hidden_size",
    "n_inner": "intermediate_size",
    "vocabulary": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
}


def _part(data: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    found = data.get(key)
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: {key} must be an object, not {short(found)}")
    return found


def _number(data: dict[str, Any], key: str, source: str, field: str | None = None) -> Any:
    """A size, or one of the two numbers that are none."""
    if key not in data:
        raise CheckpointError(f"{source}: {key} is missing")
    is_size = (field or key) not in ("norm_epsilon", "rotary_base")
    try:
        value = integer(key, data[key]) if is_size else real(key, data[key])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    layers = (field or key) == "n_layer"
    least, most = (1, _MOST_LAYERS if layers else _MOST) if is_size else (1e-30, 1e9)
    if not least <= value <= most:
        raise CheckpointError(f"{source}: {key} must be {least} to {most}, not {short(data[key])}")
    return value
