"""What a call of transformers' `generate` asks for, once transformers has prepared it, and what of that is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import ImageGPTForCausalImageModeling

# Arguments of the original that no fixed decoding loop can honour; the others arrive prepared in the loop.
REFUSED = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "past_key_values",
    "inputs_embeds",
    "tokenizer",
    "assistant_tokenizer",
)
# What reaches the loop and changes no token: how transformers would cache, and what it would return besides.
_WITHOUT_EFFECT = {"past_key_values", "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states"}


class Refused(Exception):
    """What a call asks for that the loop cannot do."""


def check_call(model: ImageGPTForCausalImageModeling, given: dict[str, Any]) -> None:
    names = [name for name in REFUSED if _asks(given.get(name))]
    if given.get("cache_implementation") == "paged":
        names.append("cache_implementation='paged'")
    if names:
        raise Refused(", ".join(names))
    check_modules(model)


def check_modules(model: torch.nn.Module) -> None:
    """Raises Refused for what a module does besides computing."""
    modules = list(model.modules())
    if any(isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in modules):
        raise Refused("a model in training mode, with dropout (call eval())")
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        raise Refused("a model with forward hooks")


def _asks(value: Any) -> bool:
    """Whether an argument was given: an empty list of processors is as good as none."""
    return value is not None and value is not False and not (isinstance(value, list) and not value)


def check_mode(config: Any) -> None:
    from transformers.generation import GenerationMode

    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        argument = f"num_beams={config.num_beams}, " if (config.num_beams or 1) > 1 else ""
        raise Refused(f"{argument}the generation mode {mode.value}")
    for name in ("return_dict_in_generate", "token_healing"):
        if getattr(config, name, None):
            raise Refused(name)


def check_inputs(input_ids: torch.Tensor, model_kwargs: dict[str, Any], start: int) -> None:
    for name, value in model_kwargs.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name == "position_ids" and bool((value == torch.arange(input_ids.shape[1], device=value.device)).all()):
            continue
        if name == "attention_mask" and bool((value == 1).all()):
            continue
        also = " (or pad_token_id among input_ids)" if name == "attention_mask" else ""
        raise Refused(name + also)
    if bool((input_ids[:, :1] != start).any()):
        raise Refused(f"input_ids that do not begin with the start token, {start}")
    if bool((input_ids[:, 1:] == start).any()):
        raise Refused(f"input_ids with the start token, {start}, inside the image")


def filters_of(processors: Any) -> dict[str, Any]:
    """temperature, top_k, top_p of a prepared list of processors. The order is transformers' own, and ours."""
    from transformers.generation import LogitNormalization, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    filters: dict[str, Any] = {}
    for processor in processors:
        kind = type(processor)
        if kind is TemperatureLogitsWarper:
            filters["temperature"] = float(processor.temperature)
        elif kind is TopKLogitsWarper:
            filters["top_k"] = processor.top_k
        elif kind is TopPLogitsWarper:
            filters["top_p"] = processor.top_p
        elif kind is not LogitNormalization:  # adds the same number to all logits
            raise Refused(kind.__name__)
    return filters


def end_of(criteria: Any, n_colors: int) -> int:
    """The length at which prepared stopping criteria stop. An end token that is no colour is never drawn."""
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

    lengths = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(int(criterion.max_length))
        elif type(criterion) is not EosTokenCriteria:
            raise Refused(type(criterion).__name__)
        elif bool(((criterion.eos_token_id >= 0) & (criterion.eos_token_id < n_colors)).any()):
            raise Refused(f"eos_token_id={criterion.eos_token_id.tolist()}, a colour")
    if not lengths:
        raise Refused("no max_length")
    return min(lengths)
