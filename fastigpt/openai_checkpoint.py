"""OpenAI's original TensorFlow checkpoints as directories in the Hugging Face layout.

OpenAI published a TensorFlow checkpoint per size and training step, and the palette as kmeans_centers.npy
(github.com/openai/image-gpt). TensorFlow itself reads the former: `pip install tensorflow`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastigpt import checkpoint
from fastigpt.config import ImageGPTConfig
from fastigpt.errors import CheckpointError
from fastigpt.extras import require

_BLOCK = re.compile(r"h(\d+)/(.+)")
_SAME = {
    "ln_1/g": "ln_1.weight",
    "ln_2/g": "ln_2.weight",
    "mlp/c_fc/w": "mlp.c_fc.weight",
    "mlp/c_proj/w": "mlp.c_proj.weight",
}


def convert(
    tf_checkpoint: str | os.PathLike[str],
    palette: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    n_head: int | None = None,
) -> Path:
    """Writes `out`, a directory that `ImageGPT.from_pretrained` and transformers open, and returns its path.

    tf_checkpoint: the checkpoint's prefix (".../model.ckpt-1000000", without ".index"). palette: kmeans_centers.npy.
    n_head: where the stored shapes don't tell it. The sizes are read off the tensors; the canvas is square.
    Raises ImportError without tensorflow, CheckpointError if the files are missing, damaged or of another model.
    """
    variables = _read_variables(tf_checkpoint)
    config, weights = from_variables(variables, n_head=n_head, source=os.fspath(tf_checkpoint))
    colors = checkpoint.read_palette_array(Path(palette), config)
    checkpoint.write(out, config, weights, colors, None)
    return Path(out)


def _read_variables(prefix: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    require("tensorflow", for_="reading a TensorFlow checkpoint")
    import tensorflow as tf

    name = os.fspath(prefix)
    if not Path(name + ".index").is_file():
        raise CheckpointError(f"no TensorFlow checkpoint at {name}: {name}.index is missing")
    try:
        reader = tf.train.load_checkpoint(name)
        return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map() if key.startswith("model/")}
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} is damaged or no TensorFlow checkpoint: {error}") from None


def from_variables(
    variables: dict[str, np.ndarray], *, n_head: int | None = None, source: str = "the checkpoint"
) -> tuple[ImageGPTConfig, dict[str, torch.Tensor]]:
    """The config and the renamed tensors of OpenAI's variables ("model/h0/attn/q_proj", …)."""
    named = {key.removeprefix("model/"): value for key, value in variables.items()}

    def take(name: str) -> np.ndarray:
        if name not in named:
            raise CheckpointError(f"{source} lacks the variable model/{name}")
        return named[name]

    wte, wpe = take("wte"), take("wpe")
    n_embd = wte.shape[-1]
    blocks = {int(match[1]) for key in named if (match := _BLOCK.fullmatch(key))}
    q_proj = take("h0/attn/q_proj")
    heads = n_head or (q_proj.shape[0] if q_proj.ndim == 3 else None)
    if heads is None:
        raise CheckpointError(f"{source}: model/h0/attn/q_proj has shape {q_proj.shape}; give n_head")
    side = round(wpe.shape[0] ** 0.5)
    config = ImageGPTConfig(
        n_layer=len(blocks), n_head=heads, n_embd=n_embd, height=side, width=side, n_colors=wte.shape[0]
    )
    arrays: dict[str, Any] = {
        "transformer.wte.weight": np.concatenate([wte, take("sos").reshape(1, n_embd)]),
        "transformer.wpe.weight": wpe,
        "transformer.ln_f.weight": take("ln_f/g"),
        "lm_head.weight": take("wtet"),
    }
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        for theirs, ours in _SAME.items():
            array = take(f"h{i}/{theirs}")
            arrays[block + ours] = array.reshape(array.shape[-2:]) if theirs.endswith("/w") else array
        # [n_head, head_dim, n_embd], and they compute "bsf,hef->bhse": rows are outputs, ours are inputs.
        qkv = [take(f"h{i}/attn/{part}_proj").reshape(n_embd, n_embd).T for part in "qkv"]
        arrays[block + "attn.c_attn.weight"] = np.concatenate(qkv, axis=1)
        # "bhse,hef->bsf": (head, element) is the input, as in ours.
        arrays[block + "attn.c_proj.weight"] = take(f"h{i}/attn/c_proj").reshape(n_embd, n_embd)
    weights = {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}
    return config, checkpoint.check_weights(config, weights, source=source)
