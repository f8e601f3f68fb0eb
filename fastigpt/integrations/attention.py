"""`attn_implementation="fastigpt"`: the attention operators of this library in other transformers models.

transformers looks up two functions by that name: one makes the mask of a forward pass, once, the other computes
attention in every layer. The operators need no mask, only the slot of the first query in the cache, so that is what
the first hands to the second. Both refuse what the operators do not compute; there is no other implementation to go to.
"""

from __future__ import annotations

import math
from typing import Any

import torch

NAME = "fastigpt"
_WIDEST_WINDOW = 16  # queries that still count as decoding: one tile of the decode kernel
# Arguments of some models that change what attention computes. `position_bias`: T5; `s_aux`: attention sinks.
_REFUSED = ("softcap", "position_bias", "s_aux", "sliding_window", "output_attentions", "cache")


def register() -> None:
    """Makes `attn_implementation="fastigpt"` known to transformers, as an argument of from_pretrained and for
    model.set_attn_implementation("fastigpt").

    It serves decoder-only models with as many key heads as query heads, scores scaled by 1/√head_dim and plain causal
    masks, such as GPT-2, for inference: prefill through torch.ops.fastigpt.causal_attention, decoding through
    torch.ops.fastigpt.decode_attention, with dynamic and static caches, in float32, bfloat16 and float16. Everything
    else raises ValueError in the forward pass: padding, packed and custom masks, sliding windows, cross-attention,
    grouped heads, soft caps, dropout in training, gradients. Raises ImportError without
    transformers.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"attention {NAME!r} needs transformers: pip install 'transformers>=5.17'") from error
    import fastigpt.ops  # noqa: F401  defines the operators

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, first_slot)


def first_slot(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """Stands where a mask would: int32 [batch_size, 1, 1, kv_length or 1], the slot of the first query among the keys.

    Four dimensions, so that transformers takes it for a finished mask. The last is kv_length where the queries are
    known to be at the end of the keys, so that nobody has to ask the device. Raises ValueError for masks that are not
    causal.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not None and mask_function is not causal_mask_function:
        raise _error("a mask that is not plainly causal (a sliding window, packed sequences, an encoder)")
    if isinstance(kv_offset, torch.Tensor) or kv_offset != 0:
        raise _error("a cache that drops old keys")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise _error("padding in attention_mask; batch sequences of one length")
    slot = torch.as_tensor(q_offset, dtype=torch.int32, device=device)
    at_end = isinstance(q_offset, int) and q_offset + q_length == kv_length
    return slot.reshape(1, 1, 1, 1).repeat(batch_size, 1, 1, 1).expand(-1, 1, 1, kv_length if at_end else 1)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, Tq, n_head, head_dim] from query [B, n_head, Tq, head_dim] and key, value [B, n_head, capacity, head_dim],
    the cache with this pass's keys already in it. attention_mask: what `first_slot` made of it."""
    _check(module, query, key, attention_mask, dropout, scaling, is_causal, kwargs)
    window, capacity = query.shape[2], key.shape[2]
    q = query.transpose(1, 2)
    if attention_mask is None:
        if window != capacity:
            raise _error(f"{capacity} keys for {window} queries without a mask")
    elif attention_mask.shape[-1] not in (1, capacity):
        raise _error(f"{capacity} keys after a mask for {attention_mask.shape[-1]}")
    elif window <= _WIDEST_WINDOW and window < capacity:
        return _decode(q, key, value, attention_mask[:, 0, 0, 0].contiguous()), None
    elif attention_mask.shape[-1] != capacity:  # a static cache: its end is not yet in use
        end = int(attention_mask[0]) + window
        key, value = key[:, :, :end], value[:, :, :end]
    k, v = (x.transpose(1, 2).contiguous() for x in (key, value))
    return torch.ops.fastigpt.causal_attention(_rows(q), k, v), None


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    # The operator appends keys to the cache; transformers has done so, so it is given those that are there already.
    batch, window, n_head, head_dim = q.shape
    slots = (first[:, None] + torch.arange(window, device=q.device, dtype=torch.int32)).long()
    at = slots[:, None, :, None].expand(batch, n_head, window, head_dim)
    k, v = (x.gather(2, at).transpose(1, 2).contiguous() for x in (keys, values))
    caches = (x.resolve_neg().contiguous() for x in (keys, values))  # what is to be changed must not be lazily negated
    return torch.ops.fastigpt.decode_attention(_rows(q), k, v, *caches, first)


def _rows(q: torch.Tensor) -> torch.Tensor:
    """q with the heads of a token side by side: most models have them so in their fused projection."""
    heads_together = q.stride(3) == 1 and q.stride(2) == q.shape[3]
    evenly_apart = q.shape[0] == 1 or q.stride(0) == q.shape[1] * q.stride(1)
    return q if heads_together and evenly_apart else q.contiguous()


def _check(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _error("attention that is not causal (an encoder, or cross-attention)")
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        raise _error(f"a custom mask of dtype {attention_mask.dtype}")
    if dropout:
        raise _error(f"dropout={dropout}; call eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise _error("gradients; it is for inference, under torch.no_grad() or torch.inference_mode()")
    head_dim = query.shape[-1]
    if scaling is not None and not math.isclose(scaling, head_dim**-0.5, rel_tol=1e-6):
        raise _error(f"scaling={scaling}, which is not 1/√{head_dim}")
    if key.shape[1] != query.shape[1]:
        raise _error(f"{key.shape[1]} key heads for {query.shape[1]} query heads")
    for name in _REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise _error(name)


def _error(what: str) -> ValueError:
    return ValueError(f'attn_implementation="{NAME}" does not do {what}')
