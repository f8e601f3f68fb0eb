"""`generate(generation_mode="image")` of transformers' JanusForConditionalGeneration, served by this library.

Arguments and results are transformers'. What its own loop gets wrong is right here: no top-k of 50 that nobody asked
for, any guidance_scale, 1 and below included, no attention_mask where nothing is padded, an image that does not depend
on its batch, and guidance and softmax in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastigpt.engine import Engine, loop
from fastigpt.engine.choose import build
from fastigpt.families import janus, llama
from fastigpt.families.named_tensors import take
from fastigpt.integrations.hf_calls import Refused, check_mode, check_modules, filters_of
from fastigpt.integrations.hf_method import Method, refused, seed_for
from fastigpt.integrations.hf_weights import computing, tensors_of
from fastigpt.job import Request
from fastigpt.lazy_tensors import in_memory
from fastigpt.overflow import OverflowWatch, cannot_overflow
from fastigpt.sampling import checked_drawing

_GUIDANCE = 5.0  # transformers' own default, and DeepSeek's
_DRAWS = ("language_model.", "generation_")  # what decides which tokens are drawn
# What reaches the loop and changes no token.
_WITHOUT_EFFECT = {"use_cache", "attention_mask", "guidance_scale", "logits_to_keep"}


@dataclass(frozen=True)
class Drawer:
    """A Janus that draws for prompts which are ids already."""

    engine: Engine
    watch: OverflowWatch | None

    def draw(self, requests: Sequence[Request]) -> torch.Tensor:
        """int64 [n, h·w]. Raises CheckpointError if its numbers leave float32 on the way."""
        filled, _ = loop.run(self.engine, requests)
        if self.watch is not None:
            for index, prefix in self.engine.spec.by_length([request.prefix for request in requests]):
                self.watch.check(filled.tokens[index], prefix)
        return filled.tokens


@dataclass(frozen=True)
class _Januses:
    """Of hf_method.Kind."""

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        plain = {name.removeprefix("model."): tensor for name, tensor in tensors_of(model).items()}
        return {name: tensor for name, tensor in plain.items() if name.startswith(_DRAWS)}

    def build(self, model: Any, *, dtype: Any, kv_dtype: Any, backend: str) -> Drawer:
        config = janus.config_of(model.config.to_dict(), "hf_model.config")
        tensors, shapes = self.tensors(model), config.tensor_shapes()
        unknown = sorted(tensors.keys() - shapes.keys())
        if unknown:
            raise ValueError(f"hf_model has parameters that a Janus has not, {unknown[0]} for one: it was adapted")
        weights = take(in_memory(tensors), shapes, "hf_model")
        # A prefix is whatever ids are given, so there is none to begin with: any will do for the spec.
        spec = llama.spec(
            config,
            n_prefix_tokens=config.vocabulary,
            prefix_length=config.prompt_length,
            unconditional=(0,),
            head_inner=config.width,
        )
        canonical = janus.canonical(config, spec, weights)
        watch = None if cannot_overflow(spec, canonical) else OverflowWatch(spec, canonical)
        how = computing(next(iter(tensors.values())), dtype, kv_dtype, backend)
        return Drawer(build(spec, canonical, **how), watch)


KIND = _Januses()


class Generate(Method[Drawer]):
    """`generate` of a JanusForConditionalGeneration."""

    def __call__(
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_processor: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; images are drawn by fastigpt. Besides its arguments: seed, an int, or generator."""
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        try:
            if kwargs.get("generation_mode", "text") == "text":
                raise Refused('generation_mode="text"')
            return self._draw(inputs, attention_mask, logits_processor, dict(kwargs), seed, generator)
        except Refused as why:
            told = refused(why, seed, generator)
            if kwargs.get("generation_mode", "text") != "text":
                warnings.warn(told, stacklevel=2)
        return self._original(inputs, attention_mask, logits_processor, **kwargs)

    @torch.no_grad()
    def _draw(
        self,
        inputs: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        logits_processor: Any,
        given: dict[str, Any],
        seed: int | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """int [B · num_return_sequences, h·w], as transformers' returns them. Raises Refused."""
        model: Any = self.__self__
        if logits_processor:
            raise Refused("logits_processor")
        check_modules(model)
        given.pop("generation_mode")
        own = given.pop("generation_config", None)
        config, rest = model._prepare_generation_config(own, **given)
        check_mode(config)
        config.validate()
        model._validate_model_kwargs(rest.copy())
        asked = [name for name, value in rest.items() if value is not None and name not in _WITHOUT_EFFECT]
        if asked:
            raise Refused(asked[0])
        scale = _GUIDANCE if config.guidance_scale is None else config.guidance_scale
        config.guidance_scale = None  # for it there would be a processor
        if all(getattr(each, "top_k", None) is None for each in (own, model.generation_config)):
            config.top_k = given.get("top_k")  # not the 50 of text
        ids, _, _ = model._prepare_model_inputs(inputs, config.bos_token_id, {})
        if ids.ndim != 2:
            raise ValueError(f"inputs must be ids [B, L], not {list(ids.shape)}")
        model._prepare_special_tokens(config, attention_mask is not None, device=ids.device)
        processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=[],
            device=ids.device,
        )
        filters = filters_of(processors)
        if not config.do_sample:
            filters = {"temperature": 0.0}
        guided = scale != 1
        drawing = checked_drawing(
            seed_for(seed, generator, bool(config.do_sample)), **filters, guidance_scale=scale if guided else None
        )
        drawer = self.engine()
        spec, copies = drawer.engine.spec, config.num_return_sequences or 1
        if model.model.vision_model.config.num_image_tokens != spec.n_positions:
            raise Refused("a vision_config of another number of image tokens than vq_config")
        empty = torch.full((spec.n_positions,), -1, dtype=torch.int64, device="cpu")
        requests: list[Request] = []
        for prefix in _prefixes(ids, attention_mask, spec.prefix_length, spec.n_prefix_tokens):
            negative = _unconditional(prefix, config) if guided else None
            requests += [Request(empty, len(requests) + k, drawing, prefix, negative) for k in range(copies)]
        return drawer.draw(requests).to(ids.device, ids.dtype)


def _prefixes(ids: torch.Tensor, mask: torch.Tensor | None, longest: int, vocabulary: int) -> list[tuple[int, ...]]:
    """What each row reads: its ids without the padding in front. Without a mask nothing is padding."""
    if not (ids.numel() == 0 or 0 <= int(ids.min()) <= int(ids.max()) < vocabulary):
        raise ValueError(f"inputs must hold ids of 0 to {vocabulary - 1}, found {int(ids.min())} to {int(ids.max())}")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise ValueError(f"attention_mask has the shape {list(real.shape)}, inputs {list(ids.shape)}")
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise Refused("padding in attention_mask elsewhere than in front")
    found = [tuple(row[seen].tolist()) for row, seen in zip(ids, real)]
    if min(map(len, found), default=0) == 0:
        raise ValueError("inputs must hold at least one id for each row")
    if max(map(len, found)) > longest:
        raise Refused(f"a prompt of {max(map(len, found))} ids, more than {longest}")
    return found


def _unconditional(prefix: tuple[int, ...], config: Any) -> tuple[int, ...]:
    """Padding for all but the start and the id that an image begins with."""
    kept = {config.bos_token_id, (getattr(config, "generation_kwargs", None) or {}).get("boi_token_id")}
    if config.pad_token_id is None or None in kept:
        raise ValueError(
            "guidance needs bos_token_id, pad_token_id and generation_kwargs['boi_token_id'] in the generation config"
        )
    return tuple(token if token in kept else config.pad_token_id for token in prefix)
