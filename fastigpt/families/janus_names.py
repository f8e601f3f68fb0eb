"""What a Janus's tensors are called: in DeepSeek's layout, in transformers', and in codecs/vq.py."""

from __future__ import annotations

from fastigpt.lazy_tensors import Held

_OTHER_TASKS = ("vision_model.", "aligner.", "lm_head.")  # what looks at images, and what writes words
# What DeepSeek's names begin with: what transformers' do.
_DEEPSEEK = {
    "language_model.model.": "language_model.",
    "gen_embed.": "generation_embeddings.",
    "gen_aligner.layers.0.": "generation_aligner.fc1.",
    "gen_aligner.layers.2.": "generation_aligner.hidden_layers.0.",
    "gen_head.output_mlp_projector.": "generation_head.proj_out.",
    "gen_head.vision_head.": "generation_head.vision_head.",
    "gen_vision_model.": "vqmodel.",
}
_MIDDLE = {"mid.0.": "mid.block_1.", "mid.1.": "mid.attn_1.", "mid.2.": "mid.block_2."}


def their_names(stored: Held) -> Held:
    """In transformers' layout, without "model." in front and without what is for other tasks."""
    found: Held = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("model.")
        for theirs, ours in _DEEPSEEK.items():
            if plain.startswith(theirs):
                plain = ours + plain.removeprefix(theirs)
                break
        if not plain.startswith(_OTHER_TASKS):
            found[plain] = tensor
    return found


def vq_name(name: str) -> str:
    """The name in codecs/vq.py of a VQ's tensor in either layout."""
    for ours, theirs in _MIDDLE.items():
        name = name.replace(theirs, ours)
    return name.replace(".down.", ".conv_blocks.").replace(".up.", ".conv_blocks.").replace(".block.", ".res.")


def their_vq_name(name: str) -> str:
    for ours, theirs in _MIDDLE.items():
        name = name.replace(ours, theirs)
    side = "down" if name.startswith("encoder.") else "up"
    return name.replace(".conv_blocks.", f".{side}.").replace(".res.", ".block.")
