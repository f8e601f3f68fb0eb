"""LlamaGen, class to image (github.com/FoundationVision/LlamaGen): Llama's blocks with rotary positions of two axes.

A prefix is a class, or the class after the last, which is none. Its row of the rotary table is zero, as in the
original. Published are `.pt` files, a transformer's (c2i_B_384.pt) and its VQ's (vq_ds16_c2i.pt), which is looked for
beside it; the size of the images is in the name. `save_pretrained` writes a directory with all that in safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastigpt import save
from fastigpt.classes import imagenet
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.codecs.vq import VQCodec, VQConfig
from fastigpt.errors import CheckpointError
from fastigpt.families import generation_config, llama
from fastigpt.families.generation_config import GENERATION
from fastigpt.families.named_tensors import halves, take, take_vq
from fastigpt.families.pretrained import CONFIG
from fastigpt.lazy_tensors import Held, named, open_pickle, open_safetensors, open_weights
from fastigpt.prompts import ClassReader
from fastigpt.save import CheckpointFiles
from fastigpt.scalars import integer, real
from fastigpt.spec import ROTARY, ModelSpec
from fastigpt.tensor_files import SAFETENSORS
from fastigpt.tensors import Tensors
from fastigpt.untrusted import exists, short

VQ = "vq.safetensors"
WANTED = (CONFIG, GENERATION, SAFETENSORS, VQ)
BELONGS = frozenset(WANTED)
MODEL_TYPE = "llamagen"
DEFAULTS = {"guidance_scale": 4.0, "top_k": 2000}
"""Of LlamaGen's demo."""

_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (24, 3200): 32}  # by layers and width
_WRAPPERS = {"module", "_orig_mod"}
_CLASSES, _TEXT = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
_MOST, _MOST_LAYERS = 2**24, 2**14  # of every size, and of layers
_VQ_OF_CLASSES = "vq_ds16_c2i.pt"


@dataclass(frozen=True)
class LlamaGenConfig:
    """n_layer, n_head, n_kv_head, width, n_inner: of the blocks. n_codes: entries of the codebook. height, columns: of
    the canvas in tokens. norm_epsilon, rotary_base: as in the original."""

    n_layer: int
    n_head: int
    n_kv_head: int
    width: int
    n_inner: int
    n_codes: int
    n_classes: int
    height: int
    columns: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.n_head

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint."""
        d, f = self.width, self.n_inner
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": (self.n_codes, d),
            _CLASSES: (self.n_classes + 1, d),
            "norm.weight": (d,),
            "output.weight": (self.n_codes, d),
        }
        for i in range(self.n_layer):
            layer = f"layers.{i}."
            shapes |= {
                layer + "attention.wqkv.weight": ((self.n_head + 2 * self.n_kv_head) * self.head_dim, d),
                layer + "attention.wo.weight": (d, d),
                layer + "feed_forward.w1.weight": (f, d),
                layer + "feed_forward.w3.weight": (f, d),
                layer + "feed_forward.w2.weight": (d, f),
                layer + "attention_norm.weight": (d,),
                layer + "ffn_norm.weight": (d,),
            }
        return shapes


@dataclass(frozen=True)
class LlamaGen:
    """A `Pretrained`. weights: as config.tensor_shapes() says. vq, vq_weights: None if there is no VQ."""

    config: LlamaGenConfig
    weights: Mapping[str, torch.Tensor]
    vq: VQConfig | None = None
    vq_weights: Mapping[str, torch.Tensor] | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)

    no_codec = f"has no VQ ({_VQ_OF_CLASSES} beside it, or {VQ})"
    no_head = None
    preprocessing = Preprocessing()

    @cached_property
    def spec(self) -> ModelSpec:
        none = self.config.n_classes
        return llama.spec(self.config, n_prefix_tokens=none + 1, prefix_length=1, unconditional=(none,))

    @property
    def reader(self) -> ClassReader:
        names = imagenet()
        return ClassReader(self.config.n_classes, names if self.config.n_classes == len(names.lines) else None)

    @property
    def codec(self) -> VQCodec | None:
        if self.vq is None or self.vq_weights is None:
            return None
        return VQCodec(self.vq, self.vq_weights, self.config.height, self.config.columns, half=0.5)

    def canonical(self) -> Tensors:
        makers = llama.renamed(self.weights, _PUBLISHED)
        makers[ROTARY] = lambda: rotary_table(self.config)
        for i in range(self.config.n_layer):
            ours, layer = f"blocks.{i}.", f"layers.{i}."
            names = {ours + name: layer + theirs for name, theirs in _PUBLISHED_IN_BLOCKS.items()}
            makers |= llama.renamed(self.weights, names)
            makers[ours + "qkv.weight"] = self._qkv(layer + "attention.wqkv.weight")
            gate_up = [f"{layer}feed_forward.{name}.weight" for name in ("w1", "w3")]
            makers[ours + "fc.weight"] = llama.fused(self.weights, gate_up)
        return Tensors(makers)

    def _qkv(self, name: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            q, k, v = self.weights[name].split(self.spec.block.sections)
            return torch.cat([halves(q, self.config.head_dim), halves(k, self.config.head_dim), v])

        return make

    def published(self) -> dict[str, str]:
        found = dict(_PUBLISHED)
        for i in range(self.config.n_layer):
            found |= {f"blocks.{i}.{ours}": f"layers.{i}.{theirs}" for ours, theirs in _PUBLISHED_IN_BLOCKS.items()}
            found[f"blocks.{i}.qkv.weight"] = f"layers.{i}.attention.wqkv.weight"
            found[f"blocks.{i}.fc.weight"] = f"layers.{i}.feed_forward.w1.weight"
        return found

    def write(self, folder: str | os.PathLike[str]) -> None:
        def fill(target: Path) -> None:
            data = {"model_type": MODEL_TYPE, **asdict(self.config)}
            (target / CONFIG).write_text(json.dumps(data, indent=2) + "\n")
            generation_config.write(target / GENERATION, self.defaults)
            save_file(dict(self.weights), target / SAFETENSORS, metadata={"format": "pt"})
            if self.vq_weights is not None:
                save_file(dict(self.vq_weights), target / VQ, metadata={"format": "pt"})

        save.replace(folder, fill, BELONGS)


_PUBLISHED = {
    "prefix.embedding": _CLASSES,
    "token.embedding": "tok_embeddings.weight",
    "norm": "norm.weight",
    "head.weight": "output.weight",
}
_PUBLISHED_IN_BLOCKS = {
    "norm_1": "attention_norm.weight",
    "proj.weight": "attention.wo.weight",
    "norm_2": "ffn_norm.weight",
    "out.weight": "feed_forward.w2.weight",
}


def rotary_table(config: LlamaGenConfig) -> torch.Tensor:
    """float32 [1 + h·w, head_dim / 2, 2]: the class's row, of zeros, then those of the canvas but the last: of a
    token's pairs the first half turn with its row, the others with its column."""
    half = config.head_dim // 2
    frequencies = config.rotary_base ** (-torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
    down, across = (
        torch.arange(n, device="cpu")[:, None] * frequencies[: half // 2] for n in (config.height, config.columns)
    )
    grid = torch.cat([down.repeat_interleave(config.columns, 0), across.repeat(config.height, 1)], 1)[:-1]
    turns = torch.stack([grid.cos(), grid.sin()], -1)
    return torch.cat([torch.zeros_like(turns[:1]) if len(turns) else turns.new_zeros(1, half, 2), turns]).float()


# --- files -------------------------------------------------------------------------------------------------------


def read(folder: Path, files: CheckpointFiles, data: Any) -> LlamaGen:
    """See `Family`."""
    config = _config(data, str(files.path(CONFIG)))
    source, stored = open_weights(folder, files.path)
    weights = take(stored, config.tensor_shapes(), str(source))
    defaults = generation_config.read(files.path(GENERATION), DEFAULTS)
    vq_file = files.path(VQ)
    if not exists(vq_file):
        return LlamaGen(config, weights, defaults=defaults)
    vq = take_vq(open_safetensors(vq_file), str(vq_file))
    return LlamaGen(config, weights, *_fitting_vq(config, *vq, str(vq_file)), defaults)


def _config(data: dict[str, Any], source: str) -> LlamaGenConfig:
    found: dict[str, Any] = {}
    for name, entry in LlamaGenConfig.__dataclass_fields__.items():
        if name not in data:
            raise CheckpointError(f"{source}: {name} is missing")
        is_size = entry.type == "int"
        try:
            found[name] = integer(name, data[name]) if is_size else real(name, data[name])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: {error}") from None
        least, most = (1, _MOST_LAYERS if name == "n_layer" else _MOST) if is_size else (1e-30, 1e9)
        if not least <= found[name] <= most:
            raise CheckpointError(f"{source}: {name} must be {least} to {most}, not {short(data[name])}")
    return _checked(LlamaGenConfig(**found), source)


def _checked(config: LlamaGenConfig, source: str) -> LlamaGenConfig:
    if config.width % config.n_head or config.head_dim % 4 or config.n_head % config.n_kv_head:
        raise CheckpointError(
            f"{source}: width {config.width}, n_head {config.n_head} and n_kv_head {config.n_kv_head} do not fit: "
            "heads have a multiple of 4 elements, and equally many share one of keys"
        )
    if config.height * config.columns > _MOST:
        raise CheckpointError(f"{source}: a canvas of {config.height} × {config.columns} is too large")
    return config


def read_file(path: Path, *, n_head: int | None = None, resolution: int | None = None) -> LlamaGen:
    """A published `.pt` file of a transformer. n_head: of a size that was not published. resolution: pixels on a side,
    where the name does not tell. Raises CheckpointError."""
    stored = _unwrapped(path)
    if _TEXT in stored:
        raise CheckpointError(
            f"{path} is a LlamaGen of text to image: its captions are read by Flan-T5-XL, which fastigpt does not run; "
            "those of classes (c2i) can be loaded"
        )
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if "tok_embeddings.weight" not in stored:
        raise CheckpointError(f"{path} is no LlamaGen: it lacks tok_embeddings.weight")
    vq = None
    vq_file = _vq_beside(path)
    if vq_file is not None:
        vq = take_vq(_unwrapped(vq_file), str(vq_file))
    side = _resolution(path) if resolution is None else resolution
    patch = 16 if vq is None else vq[0].patch
    if side % patch or side < patch:
        raise CheckpointError(f"{path}: images of {side} pixels are no multiple of the VQ's patches of {patch}")
    config = _config_of(shapes, n_head, side // patch, str(path))
    weights = take(stored, config.tensor_shapes(), str(path))
    return LlamaGen(config, weights, *((None, None) if vq is None else _fitting_vq(config, *vq, str(vq_file))))


def _config_of(shapes: dict[str, tuple[int, ...]], n_head: int | None, side: int, source: str) -> LlamaGenConfig:
    """What the shapes tell; the rest is told, or that of a published size."""
    try:
        n_layer = next(i for i in range(len(shapes) + 1) if f"layers.{i}.attention.wqkv.weight" not in shapes)
        (n_codes, width), (n_classes, _) = shapes["tok_embeddings.weight"], shapes[_CLASSES]
        rows, n_inner = shapes["layers.0.attention.wqkv.weight"][0], shapes["layers.0.feed_forward.w1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source} is no LlamaGen of classes: {short(error.args[0])} is missing or odd") from None
    heads = _HEADS.get((n_layer, width)) if n_head is None else n_head
    if heads is None:
        raise CheckpointError(
            f"{source} has {n_layer} layers of width {width}, which is no published size, so its number of heads is "
            "not known: `fastigpt convert` it, with --n-head"
        )
    if heads < 1 or width % heads or rows < width or (rows - width) % (2 * (width // heads)) or n_classes < 2:
        raise CheckpointError(f"{source}: a width of {width}, {heads} heads and {rows} rows of wqkv do not fit")
    n_kv_head = max(1, (rows - width) // (2 * (width // heads)))
    return _checked(
        LlamaGenConfig(n_layer, heads, n_kv_head, width, n_inner, n_codes, n_classes - 1, side, side), source
    )


def _fitting_vq(config: LlamaGenConfig, vq: VQConfig, weights: Tensors, source: str) -> tuple[VQConfig, Tensors]:
    if vq.n_codes != config.n_codes:
        raise CheckpointError(f"{source} has {vq.n_codes} codes, the transformer draws {config.n_codes}")
    return vq, weights


def _resolution(path: Path) -> int:
    found = re.search(r"_(\d{2,4})(?=[_.])", path.name)
    if found is None:
        raise CheckpointError(f"{path}: the name does not tell the size of the images, as c2i_B_384.pt does")
    return int(found[1])


def _vq_beside(path: Path) -> Path | None:
    named = path.parent / _VQ_OF_CLASSES
    found = [named] if exists(named) else sorted(path.parent.glob("vq*.pt"))
    if len(found) > 1:
        raise CheckpointError(f"{path.parent} holds several VQs, none called {_VQ_OF_CLASSES}: leave one of them there")
    return found[0] if found else None


def _unwrapped(path: Path) -> Held:
    """The tensors of a `.pt` file, bare or below "model", "module" or "state_dict", beside whatever training kept."""
    data = open_pickle(path, allowed=[argparse.Namespace])
    if isinstance(data, dict):
        data = next((data[key] for key in ("model", "module", "state_dict") if isinstance(data.get(key), dict)), data)
    held = named(data, path)
    return {".".join(part for part in name.split(".") if part not in _WRAPPERS): x for name, x in held.items()}
