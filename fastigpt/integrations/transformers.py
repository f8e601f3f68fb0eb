"""transformers' ImageGPT with its `generate` served by this library: `accelerate` and `restore`.

transformers itself resolves every call: its `generate` prepares ids, defaults, logits processors and stopping criteria
as always and hands them to a custom decoding loop (its `custom_generate` argument), which is where this file comes in.
The loop draws what it understands and refuses the rest, and refused calls go back to the original.
"""

from __future__ import annotations

import json
import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

from fastigpt.checkpoint import check_weights
from fastigpt.config import ImageGPTConfig
from fastigpt.locks import Lock
from fastigpt.model import ImageGPT

if TYPE_CHECKING:
    from transformers import ImageGPTForCausalImageModeling

# Arguments of the original that no fixed decoding loop can honour; the others arrive prepared in `_Generate._draw`.
_REFUSED = (
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

# What of a transformers configuration decides what an Image GPT computes.
_CONFIG = (
    "model_type",
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "layer_norm_epsilon",
    "activation_function",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)


def accelerate(
    hf_model: ImageGPTForCausalImageModeling,
    *,
    dtype: torch.dtype | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> ImageGPTForCausalImageModeling:
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

    Raises ImportError without transformers, TypeError for anything but an ImageGPTForCausalImageModeling, ValueError or
    CheckpointError for one that cannot be run (spread over devices, adapted, quantised, not finite).
    """
    try:
        from transformers import ImageGPTForCausalImageModeling
    except ImportError as error:
        raise ImportError("fastigpt.accelerate needs transformers: pip install 'transformers>=5.17'") from error
    if not isinstance(hf_model, ImageGPTForCausalImageModeling):
        raise TypeError(f"hf_model must be an ImageGPTForCausalImageModeling, not {type(hf_model).__name__}")
    restore(hf_model)
    if "generate" in vars(hf_model):
        raise ValueError("hf_model.generate was already replaced by something else")
    generate = _Generate(hf_model, {"dtype": dtype, "kv_dtype": kv_dtype, "backend": backend})
    generate.engine()
    vars(hf_model)["generate"] = generate
    return hf_model


def restore(hf_model: ImageGPTForCausalImageModeling) -> ImageGPTForCausalImageModeling:
    """Undoes `accelerate` and returns the model; one that was not accelerated stays as it is."""
    if isinstance(vars(hf_model).get("generate"), _Generate):
        del vars(hf_model)["generate"]
    return hf_model


class _Refused(Exception):
    """What a call asks for that the loop cannot do."""


class _Generate:
    """Stands in for the bound method `generate` of one model. Copies and pickles along with it, without the engine."""

    def __init__(self, model: ImageGPTForCausalImageModeling, options: dict[str, Any]) -> None:
        self._reference = weakref.ref(model)  # the model owns this object: a strong reference would keep both alive
        self._options = options
        self._lock = Lock()
        self._marks: list[tuple[Any, ...]] | None = None
        self._engine: ImageGPT | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self._model(), self._options)

    def _model(self) -> ImageGPTForCausalImageModeling:
        model = self._reference()
        if model is None:
            raise ReferenceError("the model that this generate belonged to is gone")
        return model

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
        model = self._model()
        original: Any = type(model).generate
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
            _check_call(model, given)
            kwargs = {name: value for name, value in kwargs.items() if name not in _REFUSED}
            return original(
                model,
                inputs,
                generation_config,
                custom_generate=self._draw,
                drawing_seed=seed,
                drawing_generator=generator,
                **kwargs,
            )
        except _Refused as refused:
            if seed is not None or generator is not None:
                name = "generator" if seed is None else "seed"
                raise ValueError(f"{name} was given, but fastigpt cannot serve this call: it has {refused}") from None
            warnings.warn(
                f"this call of generate has {refused}: transformers' own generate runs instead of fastigpt's",
                stacklevel=2,
            )
        return original(model, inputs, generation_config, **given)

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
        """The decoding loop: everything arrives prepared, num_return_sequences included. Raises _Refused."""
        _check_mode(generation_config)
        _check_inputs(input_ids, model_kwargs, start=model.config.vocab_size - 1)
        engine = self.engine()
        filters = _filters(logits_processor)
        end = _end(stopping_criteria, engine.config.n_colors)
        limit = engine.config.n_pixels + 1
        if end > limit:
            raise ValueError(f"max_length must be at most {limit} (the start token and {limit - 1} pixels), not {end}")
        seed = drawing_seed
        if seed is None and generation_config.do_sample:
            device = "cpu" if drawing_generator is None else drawing_generator.device
            seed = int(torch.randint(0, 2**63 - 1, (), generator=drawing_generator, device=device))
        return engine.generate(
            input_ids.long(), max_length=end, do_sample=bool(generation_config.do_sample), seed=seed or 0, **filters
        )

    def engine(self) -> ImageGPT:
        """The model in our form, built anew if its weights are not the ones it was built from."""
        model = self._model()
        with self._lock:
            marks = _marks(model)
            if self._engine is None or marks != self._marks:
                self._engine = None  # frees its memory before the next one takes as much
                self._engine = _build(model, **self._options)
                self._marks = marks
            return self._engine


def _check_call(model: ImageGPTForCausalImageModeling, given: dict[str, Any]) -> None:
    names = [name for name in _REFUSED if _asks(given.get(name))]
    if given.get("cache_implementation") == "paged":
        names.append("cache_implementation='paged'")
    if names:
        raise _Refused(", ".join(names))
    modules = list(model.modules())
    if any(isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in modules):
        raise _Refused("a model in training mode, with dropout (call eval())")
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        raise _Refused("a model with forward hooks")


def _asks(value: Any) -> bool:
    """Whether an argument was given: an empty list of processors is as good as none."""
    return value is not None and value is not False and not (isinstance(value, list) and not value)


def _check_mode(config: Any) -> None:
    from transformers.generation import GenerationMode

    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        argument = f"num_beams={config.num_beams}, " if (config.num_beams or 1) > 1 else ""
        raise _Refused(f"{argument}the generation mode {mode.value}")
    for name in ("return_dict_in_generate", "token_healing"):
        if getattr(config, name, None):
            raise _Refused(name)


def _check_inputs(input_ids: torch.Tensor, model_kwargs: dict[str, Any], start: int) -> None:
    for name, value in model_kwargs.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name == "position_ids" and bool((value == torch.arange(input_ids.shape[1], device=value.device)).all()):
            continue
        if name == "attention_mask" and bool((value == 1).all()):
            continue
        also = " (or pad_token_id among input_ids)" if name == "attention_mask" else ""
        raise _Refused(name + also)
    if bool((input_ids[:, :1] != start).any()):
        raise _Refused(f"input_ids that do not begin with the start token, {start}")
    if bool((input_ids[:, 1:] == start).any()):
        raise _Refused(f"input_ids with the start token, {start}, inside the image")


def _filters(processors: Any) -> dict[str, Any]:
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
            raise _Refused(kind.__name__)
    return filters


def _end(criteria: Any, n_colors: int) -> int:
    """The length at which prepared stopping criteria stop. An end token that is no colour is never drawn."""
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

    lengths = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(int(criterion.max_length))
        elif type(criterion) is not EosTokenCriteria:
            raise _Refused(type(criterion).__name__)
        elif bool(((criterion.eos_token_id >= 0) & (criterion.eos_token_id < n_colors)).any()):
            raise _Refused(f"eos_token_id={criterion.eos_token_id.tolist()}, a colour")
    if not lengths:
        raise _Refused("no max_length")
    return min(lengths)


def _marks(model: ImageGPTForCausalImageModeling) -> list[tuple[Any, ...]]:
    """What identifies the weights now. The checksum is there because writes to `.data` leave the version as it is."""
    marks, sums = [], []
    for name, tensor in _tensors(model).items():
        version = None if tensor.is_inference() else tensor._version
        marks.append((name, tensor.data_ptr(), version, tensor.dtype, tensor.device, tuple(tensor.shape)))
        sums.append(_checksum(tensor))
    return [*marks, tuple(torch.stack(sums).tolist())]


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar, on the tensor's device: the sum of its bytes taken as 64-bit integers, eight at a time."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # a slice of a larger buffer, which cannot be viewed in steps of eight
        data = data.clone()
    whole = len(data) // 8 * 8
    total = data[:whole].view(torch.int64).sum() if whole else torch.zeros((), dtype=torch.int64, device=data.device)
    return total + data[whole:].sum()


def _tensors(model: ImageGPTForCausalImageModeling) -> dict[str, torch.Tensor]:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) != 1 or devices[0] == "meta":
        raise ValueError(f"hf_model must be on one device, not on {', '.join(devices)}")
    return tensors


def _build(model: ImageGPTForCausalImageModeling, *, dtype: Any, kv_dtype: Any, backend: str) -> ImageGPT:
    config = _config(model)
    tensors = _tensors(model)
    unknown = sorted(tensors.keys() - config.tensor_shapes().keys() - config.bias_shapes().keys())
    if unknown:
        raise ValueError(f"hf_model has parameters that an Image GPT has not, {unknown[0]} for one: it was adapted")
    weights = check_weights(config, tensors, source="hf_model")
    own, device = weights["lm_head.weight"].dtype, weights["lm_head.weight"].device
    if dtype is None and own == torch.float64:
        raise ValueError("hf_model is in float64, which no fast engine computes in: give dtype=torch.float32")
    if dtype is None and own == torch.float16 and device.type == "cpu" and backend == "auto":
        backend = "portable"  # the one with float16 on a CPU
    return ImageGPT(
        config,
        weights,
        name=getattr(model.config, "name_or_path", "") or type(model).__name__,
        device=device,
        dtype=own if dtype is None else dtype,
        kv_dtype=kv_dtype,
        backend=backend,
    )


def _config(model: ImageGPTForCausalImageModeling) -> ImageGPTConfig:
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError("hf_model has cross-attention, which no Image GPT has")
    data = {key: value for key, value in model.config.to_dict().items() if key in _CONFIG}
    pixels = data["n_positions"]
    if math.isqrt(pixels) ** 2 != pixels:  # ids are drawn here, not images: the shape of the canvas does not matter
        data["fastigpt"] = {"height": 1, "width": pixels}
    return ImageGPTConfig.from_json(json.dumps(data), source="hf_model.config")
