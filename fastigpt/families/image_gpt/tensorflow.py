"""OpenAI's original TensorFlow checkpoints as directories in the Hugging Face layout.

OpenAI published a TensorFlow checkpoint per size and training step, and the palette as kmeans_centers.npy
(github.com/openai/image-gpt). TensorFlow itself reads the former: `pip install tensorflow`.
"""

from __future__ import annotations

import glob
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastigpt.codecs.palette import ValueRange
from fastigpt.errors import CheckpointError
from fastigpt.extras import require
from fastigpt.families.image_gpt.checkpoint import Checkpoint, check_weights, read_palette_array
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.scalars import whole
from fastigpt.untrusted import exists, file_size, refusing

_BLOCK = re.compile(r"h(\d+)/(.+)")
_LARGEST_SIZE = 1 << 16  # of an axis of an array that says how large the model is


def convert(
    tf_checkpoint: str | os.PathLike[str],
    palette: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    n_head: int | None = None,
    value_range: ValueRange | None = None,
) -> Path:
    """Writes `out`, a directory that `ImageGPT.from_pretrained` and transformers open, and returns its path.

    tf_checkpoint: the checkpoint's prefix (".../model.ckpt-1000000", without ".index"). palette: kmeans_centers.npy.
    n_head: where the stored shapes don't tell it. value_range: of the palette, as for Palette. The sizes are read off
    the tensors; the canvas is square.
    Raises ImportError without tensorflow, CheckpointError if the files are missing, damaged or of another model.
    """
    heads = None if n_head is None else whole("n_head", n_head, 1)
    variables = _read_variables(tf_checkpoint)
    config, weights = from_variables(variables, n_head=heads, source=os.fspath(tf_checkpoint))
    colors = read_palette_array(Path(palette), config, value_range=value_range)
    Checkpoint(config, weights, colors, None).write(out)
    return Path(out)


def _read_variables(prefix: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    require("tensorflow", for_="reading a TensorFlow checkpoint")
    import tensorflow as tf

    name = os.fspath(prefix)
    index = Path(name + ".index")
    if not exists(index):
        raise CheckpointError(f"no TensorFlow checkpoint at {name}: {name}.index is missing")
    file_size(index)
    stored = sum(file_size(shard) for shard in index.parent.glob(glob.escape(index.stem) + ".data-*-of-*"))
    with refusing(name, "is damaged or no TensorFlow checkpoint"):
        reader = tf.train.load_checkpoint(name)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        names = [key for key in shapes if key.startswith("model/")]
        promised = sum(math.prod(shapes[key]) * dtypes[key].size for key in names)
        if promised > stored:
            raise ValueError(f"its variables take {promised} bytes, its files hold {stored}")
        return {key: reader.get_tensor(key) for key in names}


def from_variables(
    variables: dict[str, np.ndarray], *, n_head: int | None = None, source: str = "the checkpoint"
) -> tuple[ImageGPTConfig, dict[str, torch.Tensor]]:
    """The config and the renamed tensors of OpenAI's variables ("model/h0/attn/q_proj", …)."""
    named = {key.removeprefix("model/"): value for key, value in variables.items()}

    def take(name: str, *shape: int) -> np.ndarray:
        """A variable in this shape, whatever axes of length 1 or heads it is stored with."""
        if name not in named:
            raise CheckpointError(f"{source} lacks the variable model/{name}")
        array = np.asarray(named[name])
        if array.dtype.kind != "f":
            raise CheckpointError(f"{source}: model/{name} is {array.dtype}, expected floating-point numbers")
        if shape and array.size != math.prod(shape):
            raise CheckpointError(f"{source}: model/{name} has shape {array.shape}, expected {shape}")
        return array.reshape(shape) if shape else array

    wte, wpe, q_proj = take("wte"), take("wpe"), take("h0/attn/q_proj")
    for name, array in (("wte", wte), ("wpe", wpe)):
        if array.ndim != 2 or not all(0 < size < _LARGEST_SIZE for size in array.shape):
            raise CheckpointError(f"{source}: model/{name} has shape {array.shape}, expected two axes")
    n_embd = wte.shape[1]
    blocks = {match[1] for key in named if (match := _BLOCK.fullmatch(key))}
    heads = n_head or (q_proj.shape[0] if q_proj.ndim == 3 else None)
    if heads is None:
        raise CheckpointError(f"{source}: model/h0/attn/q_proj has shape {q_proj.shape}; give n_head")
    side = math.isqrt(len(wpe))
    try:
        config = ImageGPTConfig(
            n_layer=len(blocks), n_head=heads, n_embd=n_embd, height=side, width=side, n_colors=len(wte)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    inner = config.inner
    arrays: dict[str, Any] = {
        "transformer.wte.weight": np.concatenate([wte, take("sos", 1, n_embd)]),
        "transformer.wpe.weight": take("wpe", len(wpe), n_embd)[: config.n_pixels],
        "transformer.ln_f.weight": take("ln_f/g", n_embd),
        "lm_head.weight": take("wtet", config.n_colors, n_embd),
    }
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        arrays[block + "ln_1.weight"] = take(f"h{i}/ln_1/g", n_embd)
        arrays[block + "ln_2.weight"] = take(f"h{i}/ln_2/g", n_embd)
        arrays[block + "mlp.c_fc.weight"] = take(f"h{i}/mlp/c_fc/w", n_embd, inner)
        arrays[block + "mlp.c_proj.weight"] = take(f"h{i}/mlp/c_proj/w", inner, n_embd)
        # [n_head, head_dim, n_embd], and they compute "bsf,hef->bhse": rows are outputs, ours are inputs.
        qkv = [take(f"h{i}/attn/{part}_proj", n_embd, n_embd).T for part in "qkv"]
        arrays[block + "attn.c_attn.weight"] = np.concatenate(qkv, axis=1)
        # "bhse,hef->bsf": (head, element) is the input, as in ours.
        arrays[block + "attn.c_proj.weight"] = take(f"h{i}/attn/c_proj", n_embd, n_embd)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused by name
        weights = {
            name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()
        }
    return config, check_weights(config, weights, source=source)
