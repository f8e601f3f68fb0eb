"""A tiny Janus of transformers' own class, with random weights and a tokenizer of a few words."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import JanusConfig, JanusForConditionalGeneration

from fastigpt.families.chat import IMAGE, PAD, START

WORDS = ["User", "Assistant", "a", "red", "house", "on", "snow", "blue", "tree", "Ċ", "<", ">", "|", ":", ">:"]
SIDE, CODES, VOCABULARY = 4, 40, 64


def tokenizer() -> Tokenizer:
    names = ["<unk>", START, PAD, IMAGE, *WORDS]
    found = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    found.add_special_tokens([START, PAD, IMAGE])
    return found


START_ID, PAD_ID, IMAGE_ID = 1, 2, 3


def their_model() -> JanusForConditionalGeneration:
    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 256, "initializer_range": 0.15,
        },
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16 * SIDE,
            "patch_size": 16, "projection_dim": 64, "mlp_ratio": 1.0, "depth": 1,
            "num_image_tokens": SIDE * SIDE,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "num_patches": SIDE, "projection_dim": 64,
            "image_token_embed_dim": 64, "initializer_range": 0.15,
        },
        image_token_id=5,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name and tensor.ndim > 1:
                scale = 2.0 if "embed" in name else tensor[0].numel() ** -0.5
                tensor.normal_(0, scale * (2 if "vision_head" in name else 1), generator=generator)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.1, generator=generator)
    told = model.generation_config
    told.bos_token_id, told.pad_token_id, told.eos_token_id = START_ID, PAD_ID, None
    told.generation_kwargs, told.max_length = {"boi_token_id": IMAGE_ID}, 256
    return model
