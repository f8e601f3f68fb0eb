"""What a model is made of: the sizes of an Image GPT, the published presets, and the names and shapes of its tensors.

The tensor names are those of transformers' ImageGPT, so that checkpoints pass through unrenamed. A model may also read
a prompt: `prompt_length` slots of words in front of the start token, with embeddings and positions of their own, so
that without a prompt the same checkpoint is a plain Image GPT.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastigpt.errors import CheckpointError
from fastigpt.scalars import whole
from fastigpt.untrusted import parse_json, short

# n_layer, n_head, n_embd (OpenAI, "Generative Pretraining from Pixels", 2020). The heads of xl were not published; 24
# gives head_dim 128.
PRESETS: dict[str, tuple[int, int, int]] = {
    "small": (24, 8, 512),
    "medium": (36, 8, 1024),
    "large": (48, 16, 1536),
    "xl": (60, 24, 3072),
}
ACTIVATION = "quick_gelu"  # x · sigmoid(1.702 x), the only one the family uses
_MOST_LAYERS = 2**14
_MOST = 2**24  # of every other size; what the engines' 32-bit indices are safe with
_SMALLEST_EPSILON = 1.2e-38  # smaller ones are 0 in float32


@dataclass(frozen=True)
class ImageGPTConfig:
    """Sizes of an Image GPT. Raises CheckpointError for values no model can have.

    n_layer, n_head, n_embd, n_inner: blocks, attention heads, width, width of the MLP (None: 4 · n_embd).
    height, width: canvas in pixels; one token per pixel, in raster order.
    n_colors: palette size; the head has one output per colour, the embedding one row more (`start_token`).
    n_words, prompt_length: rows of the word embedding (word 0 pads) and slots of a prompt; 0 = reads no prompt.
    """

    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int | None = None
    height: int = 32
    width: int = 32
    n_colors: int = 512
    layer_norm_epsilon: float = 1e-5
    n_words: int = 0
    prompt_length: int = 0

    def __post_init__(self) -> None:
        if self.n_inner is None and isinstance(self.n_embd, int):
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        limits = dict.fromkeys(("n_head", "n_embd", "n_inner", "height", "width", "n_colors"), (1, _MOST))
        limits |= {"n_layer": (1, _MOST_LAYERS), "n_words": (0, _MOST), "prompt_length": (0, _MOST)}
        for name, (least, most) in limits.items():
            object.__setattr__(self, name, _check_int(name, getattr(self, name), least, most))
        if self.n_pixels > _MOST:
            raise CheckpointError(f"a canvas has at most {_MOST} pixels, not {self.height} × {self.width}")
        if self.n_embd % self.n_head:
            raise CheckpointError(f"n_head ({self.n_head}) must divide n_embd ({self.n_embd})")
        if bool(self.n_words) != bool(self.prompt_length):
            raise CheckpointError(
                f"n_words ({self.n_words}) and prompt_length ({self.prompt_length}) must both be 0 or both be positive"
            )
        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not _SMALLEST_EPSILON <= epsilon <= 1:
            raise CheckpointError(
                f"layer_norm_epsilon must be a number from {_SMALLEST_EPSILON} to 1, not {short(epsilon)}"
            )

    @classmethod
    def preset(cls, name: str, *, resolution: int = 32) -> ImageGPTConfig:
        """A published size ("small", "medium", "large", "xl") on a resolution × resolution canvas (32, 48, 64 were
        published)."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
        n_layer, n_head, n_embd = PRESETS[name]
        return cls(n_layer, n_head, n_embd, height=resolution, width=resolution)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        assert self.n_inner is not None
        return self.n_inner

    @property
    def n_pixels(self) -> int:
        return self.height * self.width

    @property
    def start_token(self) -> int:
        return self.n_colors

    @property
    def context(self) -> int:
        """Longest sequence the model reads: a full prompt, the start token, and every pixel but the last."""
        return self.prompt_length + self.n_pixels

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor a checkpoint must hold. Linear weights are stored [in, out]."""
        d, f = self.n_embd, self.inner
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.n_colors + 1, d),
            "transformer.wpe.weight": (self.n_pixels, d),
            "transformer.ln_f.weight": (d,),
            "lm_head.weight": (self.n_colors, d),
        }
        for i in range(self.n_layer):
            block = f"transformer.h.{i}."
            shapes[block + "ln_1.weight"] = (d,)
            shapes[block + "attn.c_attn.weight"] = (d, 3 * d)
            shapes[block + "attn.c_proj.weight"] = (d, d)
            shapes[block + "ln_2.weight"] = (d,)
            shapes[block + "mlp.c_fc.weight"] = (d, f)
            shapes[block + "mlp.c_proj.weight"] = (f, d)
        if self.n_words:
            shapes["prompt.wte.weight"] = (self.n_words, d)
            shapes["prompt.wpe.weight"] = (self.prompt_length, d)
        return shapes

    def bias_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor a checkpoint may hold besides: OpenAI's models have no biases, transformers' class
        has."""
        return {
            name.removesuffix("weight") + "bias": shape[1:]
            for name, shape in self.tensor_shapes().items()
            if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        }

    def n_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def to_json(self) -> str:
        """config.json: what transformers reads, with what it has no word for under "fastigpt"."""
        own = {name: getattr(self, name) for name in ("height", "width", "n_words", "prompt_length")}
        return json.dumps(
            {
                "architectures": ["ImageGPTForCausalImageModeling"],
                "model_type": "imagegpt",
                "activation_function": ACTIVATION,
                "bos_token_id": self.start_token,
                "eos_token_id": None,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "n_embd": self.n_embd,
                "n_head": self.n_head,
                "n_inner": self.n_inner,
                "n_layer": self.n_layer,
                "n_positions": self.n_pixels,
                "tie_word_embeddings": False,
                "vocab_size": self.n_colors + 1,
                "fastigpt": own,
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "config.json") -> ImageGPTConfig:
        """Reads a config.json of transformers or of this library. `source` names the file in errors."""
        return cls.from_dict(parse_json(text, source), source=source)

    @classmethod
    def from_dict(
        cls, data: Any, *, source: str = "config.json", size: tuple[int, int] | None = None
    ) -> ImageGPTConfig:
        """The same from parsed JSON. size: height and width that images are resized to (of preprocessor_config.json):
        it tells the canvas where n_positions alone does not. Positions beyond the canvas (of classes, say) are no
        concern of a model that draws: the first height · width are its own."""
        if not isinstance(data, dict):
            raise CheckpointError(f"{source} must hold a JSON object, not {type(data).__name__}")
        try:
            return cls._from_dict(data, size)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None

    @classmethod
    def _from_dict(cls, data: dict[str, Any], size: tuple[int, int] | None) -> ImageGPTConfig:
        if data.get("model_type", "imagegpt") != "imagegpt":
            raise CheckpointError(f'model_type is {short(data["model_type"])}; that of an Image GPT is "imagegpt"')
        for key, expected in {
            "activation_function": ACTIVATION,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "tie_word_embeddings": False,
            "add_cross_attention": False,
        }.items():
            if data.get(key, expected) != expected:
                raise CheckpointError(f"{key} is {short(data[key])}; Image GPT has {expected!r}")
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if key not in data:
                raise CheckpointError(f"{key} is missing")
        _check_int("vocab_size", data["vocab_size"], 2)
        _check_int("n_positions", data["n_positions"], 1)
        own = data.get("fastigpt", {})
        if not isinstance(own, dict):
            raise CheckpointError(f'"fastigpt" must be an object, not {short(own)}')
        guess = _canvas(data["n_positions"], size)
        height, width = own.get("height", guess[0]), own.get("width", guess[1])
        if not {"height", "width"} & own.keys() and math.prod(guess) < data["n_positions"] and guess != size:
            warnings.warn(
                f"n_positions is {data['n_positions']}: the canvas is taken to be {height} × {width}, the positions "
                'behind it for no pixels; "fastigpt": {"height": …, "width": …} in config.json spells the canvas out',
                stacklevel=2,
            )
        _check_int("height", height, 1)
        _check_int("width", width, 1)
        if height * width > data["n_positions"]:
            raise CheckpointError(f"n_positions is {data['n_positions']}, but the canvas is {height} × {width}")
        return cls(
            n_layer=data["n_layer"],
            n_head=data["n_head"],
            n_embd=data["n_embd"],
            n_inner=data.get("n_inner"),
            height=height,
            width=width,
            n_colors=data["vocab_size"] - 1,
            layer_norm_epsilon=data.get("layer_norm_epsilon", 1e-5),
            n_words=own.get("n_words", 0),
            prompt_length=own.get("prompt_length", 0),
        )

    def differences(self, other: ImageGPTConfig) -> list[str]:
        """Names of the fields in which two configurations differ, with both values."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{f.name}: {mine[f.name]} / {theirs[f.name]}" for f in fields(self) if mine[f.name] != theirs[f.name]]


def _canvas(n_positions: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width where config.json does not spell them out: a square, and what is left over are no pixels."""
    side = math.isqrt(n_positions)
    if size is not None and (
        size[0] * size[1] == n_positions or (side * side < n_positions and size[0] * size[1] < n_positions)
    ):
        return size
    return side, side


def _check_int(name: str, value: object, minimum: int, maximum: int = _MOST) -> int:
    try:
        return whole(name, value, minimum, maximum)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
