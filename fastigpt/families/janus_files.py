"""A trained model of scenes as files in Janus's layout, which this library and transformers open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastigpt import save
from fastigpt.codecs.vq_networks import VQConfig
from fastigpt.families.chat import IMAGE, PAD, START
from fastigpt.families.generation_config import GENERATION
from fastigpt.families.janus import BELONGS, TOKENIZER, JanusConfig, their_vq_name
from fastigpt.families.pretrained import CONFIG
from fastigpt.tensor_files import SAFETENSORS

USER, ASSISTANT = "<|User|>:", "<|Assistant|>:"
AROUND = 4  # ids of a prefix beside those of the prompt's words
_EYE = 8  # width of what stands in for the part that looks at images


def word_tokenizer(words: tuple[str, ...]) -> str:
    """The text of a tokenizer.json: one id for each word, in lower case and without punctuation, and for each of the
    chat's. Another word is an error, not an unknown."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    special = [START, PAD, IMAGE, USER, ASSISTANT]
    ids = {name: i for i, name in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w']+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return str(tokenizer.to_str())


def write(
    folder: Path,
    config: JanusConfig,
    weights: dict[str, torch.Tensor],
    vq: VQConfig,
    vq_weights: dict[str, torch.Tensor],
    tokenizer: str,
) -> None:
    """weights, vq_weights: as the configs' tensor_shapes() say; written in bfloat16."""

    def fill(target: Path) -> None:
        (target / CONFIG).write_text(json.dumps(_config(config, vq), indent=2) + "\n")
        (target / TOKENIZER).write_text(tokenizer)
        (target / GENERATION).write_text(json.dumps(_generation(tokenizer), indent=2) + "\n")
        held = {f"model.{name}": tensor for name, tensor in weights.items()}
        held |= {f"model.vqmodel.{their_vq_name(name)}": tensor for name, tensor in vq_weights.items()}
        held |= _stand_in(config, vq)
        half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in held.items()}
        save_file(half, target / SAFETENSORS, metadata={"format": "pt"})

    save.replace(folder, fill, BELONGS)


def _config(config: JanusConfig, vq: VQConfig) -> dict[str, Any]:
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "image_token_id": 2,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": config.vocabulary,
            "hidden_size": config.width,
            "intermediate_size": config.n_inner,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
            "max_position_embeddings": config.prompt_length + config.height * config.columns - 1,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 1,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "base_channels": vq.base,
            "channel_multiplier": list(vq.multipliers),
            "num_res_blocks": vq.res_blocks,
            "latent_channels": vq.latent,
            "num_embeddings": vq.n_codes,
            "embed_dim": vq.code_dim,
            "num_patches": config.height,
            "image_token_embed_dim": config.width,
            "projection_dim": config.width,
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": _EYE,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": config.height * vq.patch,
            "patch_size": vq.patch,
            "num_image_tokens": config.height * config.columns,
            "projection_dim": config.width,
            "mlp_ratio": 1.0,
            "depth": 1,
        },
    }


def _generation(tokenizer: str) -> dict[str, Any]:
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    return {
        "bos_token_id": ids[START],
        "pad_token_id": ids[PAD],
        "eos_token_id": None,
        "do_sample": True,
        "top_k": 0,  # transformers would take 50
        "max_length": 1024,
        "generation_kwargs": {"boi_token_id": ids[IMAGE]},
    }


def _stand_in(config: JanusConfig, vq: VQConfig) -> dict[str, torch.Tensor]:
    """Zeros for what transformers' class has and a model that only draws has not: eyes, and a head for words."""
    d, places, eye = config.width, config.height * config.columns, "model.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (config.vocabulary, d),
        "model.aligner.fc1.weight": (d, _EYE),
        "model.aligner.fc1.bias": (d,),
        eye + "embeddings.patch_embedding.weight": (_EYE, 3, vq.patch, vq.patch),
        eye + "embeddings.patch_embedding.bias": (_EYE,),
        eye + "embeddings.position_embedding.weight": (places, _EYE),
    }
    layer = eye + "encoder.layers.0."
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.projection_layer"):
        shapes |= {f"{layer}{name}.weight": (_EYE, _EYE), f"{layer}{name}.bias": (_EYE,)}
    for name in ("mlp.fc1", "mlp.fc2"):
        shapes |= {f"{layer}{name}.weight": (_EYE, _EYE), f"{layer}{name}.bias": (_EYE,)}
    for name in (layer + "layer_norm1", layer + "layer_norm2", eye + "post_layernorm"):
        shapes |= {f"{name}.weight": (_EYE,), f"{name}.bias": (_EYE,)}
    return {name: torch.zeros(shape, dtype=torch.float32) for name, shape in shapes.items()}
