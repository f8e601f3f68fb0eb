"""Tensors under the names and in the shapes that a configuration asks for, whatever wrapped the model that had them."""

from __future__ import annotations

import re
import warnings

import torch

from fastigpt.errors import CheckpointError
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.named_tensors import check
from fastigpt.lazy_tensors import Held
from fastigpt.tensor_files import some
from fastigpt.untrusted import short

HEAD = "lm_head.weight"
# What DataParallel, torch.compile, FSDP and activation checkpointing put into names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_TRUNK = {"wte", "wpe", "h", "ln_f"}
# Causal masks that old transformers versions stored beside the weights.
_MASK_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


def canonical_names(stored: Held, source: str) -> Held:
    """The same tensors without wrappers' prefixes, and with the "transformer." that a bare ImageGPTModel lacks. Uses
    `stored` up."""
    bare: dict[str, str] = {}
    for name in stored:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in bare:
            raise CheckpointError(f"{source} holds {short(plain)} twice: as {short(bare[plain])} and {short(name)}")
        bare[plain] = name
    end = "wte.weight"
    prompts = f"prompt.{end}"
    roots = {
        name.removesuffix(end).removesuffix("transformer.")
        for name in bare
        if (name == end or name.endswith("." + end)) and name != prompts and not name.endswith("." + prompts)
    }
    if len(roots) > 1 and "" not in roots:
        raise CheckpointError(f"{source} holds several models, named {some(sorted(roots))}")
    root = "" if "" in roots or not roots else roots.pop()
    found: Held = {}
    for plain, name in bare.items():
        inner = plain.removeprefix(root)
        ours = f"transformer.{inner}" if inner.split(".", 1)[0] in _TRUNK else inner
        if ours in found:
            raise CheckpointError(f"{source} holds {short(ours)} twice")
        found[ours] = stored.pop(name)
    return found


def check_tensors(
    config: ImageGPTConfig, stored: Held, *, source: str, n_positions: int, headless: bool, own: bool
) -> dict[str, torch.Tensor]:
    """The tensors a model of this config uses. Raises CheckpointError for missing, misshapen or non-finite ones.

    n_positions: rows of the position embedding, of which the first n_pixels are kept. headless: lm_head.weight may be
    missing. own: each is in memory of no others, and no larger than it is: a pickle may hold a slice of a whole.
    `stored` is used up.
    """
    required, optional = config.tensor_shapes(), config.bias_shapes()
    missing = sorted(required.keys() - stored.keys())
    if headless and missing == [HEAD]:
        del required[HEAD]
    elif missing:
        raise CheckpointError(f"{source} lacks {some(missing)}")
    extra = sorted(
        name for name in stored.keys() - required.keys() - optional.keys() if not _MASK_BUFFERS.fullmatch(name)
    )
    if extra and not headless:
        warnings.warn(f"{source} also holds {some(extra)}, which an Image GPT does not use", stacklevel=4)
    kept: dict[str, torch.Tensor] = {}
    positions = "transformer.wpe.weight"
    for name, shape in {**required, **optional}.items():
        if name not in stored:
            continue
        rows = (n_positions, *shape[1:]) if name == positions else shape
        # Taken out, so that what a pickle held is let go of tensor by tensor.
        found = stored.pop(name)
        asks = "config.json (n_positions) asks for" if name == positions else "config.json asks for"
        check(found, name, rows, source, whole=own, asks=asks)
        tensor = found.read().detach()
        if name == positions:
            tensor = tensor[: config.n_pixels]
        if own and tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values")
        if name in optional and not bool(tensor.any()):
            continue
        kept[name] = tensor.contiguous()
    return kept
