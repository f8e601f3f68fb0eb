"""transformers' ImageGPT and Janus with `generate` served by this library: `accelerate` and `restore`.

transformers itself resolves every call: its `generate` prepares ids, defaults, logits processors and stopping criteria
as always and hands them to a custom decoding loop (its `custom_generate` argument), which is where this file comes in.
The loop draws what it understands and refuses the rest, and refused calls go back to the original.

An accelerated model becomes of a subclass of its class, made for it, whose `generate` is ours. So whoever holds the
bound method holds the model, nothing that the model holds leads back to it, and copies and pickles take all along.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastigpt.integrations import hf_janus, hf_weights
from fastigpt.integrations.hf_calls import REFUSED, Refused, check_call, check_inputs, check_mode, end_of, filters_of
from fastigpt.integrations.hf_method import Method, State, seed_for
from fastigpt.integrations.hf_method import refused as told
from fastigpt.model import ImageGPT

if TYPE_CHECKING:
    from transformers import ImageGPTForCausalImageModeling, JanusForConditionalGeneration

    HfModel = TypeVar("HfModel", ImageGPTForCausalImageModeling, JanusForConditionalGeneration)

_STATE = "_fastigpt"  # the name under which a model keeps its _State


def accelerate(
    hf_model: HfModel,
    *,
    dtype: torch.dtype | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> HfModel:
    """Replaces `generate` of this one model by a faster one with the same arguments and results, and returns the model.

    All arguments mean what they mean to transformers, defaults included (20 new tokens; top_k 50 when sampling). Two
    are new: `seed`, an int, and `generator`, a torch.Generator; without them the seed comes from torch's default
    generator, so torch.manual_seed governs it. Calls that ask for more than drawing (beam search, own logits
    processors, a streamer, return_dict_in_generate, a padding mask, …), and calls of a model in training mode or with
    forward hooks, run the original `generate` after one warning that says why. `cache_implementation` changes nothing.

    dtype, kv_dtype, backend: as for ImageGPT; dtype None computes in the model's own dtype, on its device. The `cpu`
    and `triton` engines keep the weights once more, laid out anew in that dtype; `portable` shares all but the linears.
    Before every call the weights are compared with those the engine was built from (place, version and checksum: one
    read of the weights), and the engine is rebuilt if they changed or moved.

    Of a JanusForConditionalGeneration it is `generate(generation_mode="image")` that is replaced; see docs/janus.md for
    what it does better.

    Raises ImportError without transformers, TypeError for anything but an ImageGPTForCausalImageModeling or a
    JanusForConditionalGeneration, ValueError or CheckpointError for one that cannot be run (spread over devices,
    adapted, quantised, not finite).
    """
    try:
        from transformers import ImageGPTForCausalImageModeling, JanusForConditionalGeneration
    except ImportError as error:
        raise ImportError("fastigpt.accelerate needs transformers: pip install 'transformers>=5.17'") from error
    if not isinstance(hf_model, (ImageGPTForCausalImageModeling, JanusForConditionalGeneration)):
        raise TypeError(
            "hf_model must be an ImageGPTForCausalImageModeling or a JanusForConditionalGeneration, not "
            f"{type(hf_model).__name__}"
        )
    restore(hf_model)
    if "generate" in vars(hf_model):
        raise ValueError("hf_model.generate was already replaced by something else")
    kind: Any = hf_janus.KIND if isinstance(hf_model, JanusForConditionalGeneration) else hf_weights.KIND
    state = State(kind, {"dtype": dtype, "kv_dtype": kv_dtype, "backend": backend})
    state.engine(hf_model)
    vars(hf_model)[_STATE] = state
    if not any(_is_ours(each) for each in type(hf_model).__mro__):
        base: Any = type(hf_model)
        hf_model.__class__ = _subclass(base)
    return hf_model


def restore(hf_model: HfModel) -> HfModel:
    """Undoes `accelerate` and returns the model; one that was not accelerated stays as it is."""
    if not isinstance(hf_model, torch.nn.Module):
        raise TypeError(f"hf_model must be a model of transformers, not {type(hf_model).__name__}")
    vars(hf_model).pop(_STATE, None)
    if isinstance(vars(hf_model).get("generate"), Method):  # somebody put the bound method there
        del vars(hf_model)["generate"]
    if _is_ours(type(hf_model)):
        hf_model.__class__ = type(hf_model).__base__  # type: ignore[assignment]
    return hf_model


@functools.cache
def _subclass(base: Any) -> Any:
    """The class of accelerated models, named as its base for save_pretrained and whoever else asks."""
    kept = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**kept, "generate": _Method(), "__reduce_ex__": _reduce}
    return types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(members))


def _is_ours(each: type) -> bool:
    return isinstance(vars(each).get("generate"), _Method)


def _reduce(model: Any, protocol: int) -> tuple[Any, ...]:
    """How accelerated models are pickled and copied: as one of the base, which has a name to be found by."""
    ours: Any = next(each for each in type(model).__mro__ if _is_ours(each))
    function, arguments, *rest = super(ours, model).__reduce_ex__(max(protocol, 2))
    arguments = tuple(ours.__base__ if each is ours else each for each in arguments)
    return _remake, (ours.__base__, function, arguments), *rest


def _remake(base: type, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    model = function(*arguments)
    model.__class__ = _subclass(base)
    return model


class _Method:
    """`generate` of the subclass: the base's for the class itself and for what was never accelerated or is restored."""

    def __set_name__(self, owner: Any, name: str) -> None:
        self._owner = owner

    def __get__(self, model: Any, owner: type) -> Any:
        holder: Any = owner if model is None else model
        original = super(self._owner, holder).generate  # type: ignore[misc]
        state = None if model is None else vars(model).get(_STATE)
        if state is None:
            return original
        return (hf_janus.Generate if state.kind == hf_janus.KIND else _Generate)(model, original, state)


class _Generate(Method[ImageGPT]):
    """That of an ImageGPTForCausalImageModeling."""

    def __call__(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, drawn by fastigpt; besides its arguments: seed, an int, or generator."""
        given: dict[str, Any] = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
            **kwargs,
        }
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        try:
            check_call(self.__self__, given)
            kwargs = {name: value for name, value in kwargs.items() if name not in REFUSED}
            return self._original(
                inputs,
                generation_config,
                custom_generate=self._draw,
                drawing_seed=seed,
                drawing_generator=generator,
                **kwargs,
            )
        except Refused as refused:
            warnings.warn(told(refused, seed, generator), stacklevel=2)
        return self._original(inputs, generation_config, **given)

    def _draw(
        self,
        model: ImageGPTForCausalImageModeling,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        drawing_seed: int | None = None,
        drawing_generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """The decoding loop: everything arrives prepared, num_return_sequences included. Raises Refused."""
        check_mode(generation_config)
        check_inputs(input_ids, model_kwargs, start=model.config.vocab_size - 1)
        engine = self.engine()
        filters = filters_of(logits_processor)
        end = end_of(stopping_criteria, engine.config.n_colors)
        limit = engine.config.n_pixels + 1
        if end > limit:
            raise ValueError(f"max_length must be at most {limit} (the start token and {limit - 1} pixels), not {end}")
        seed = seed_for(drawing_seed, drawing_generator, bool(generation_config.do_sample))
        return engine.generate(
            input_ids.long(), max_length=end, do_sample=bool(generation_config.do_sample), seed=seed, **filters
        )
