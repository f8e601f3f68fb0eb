"""What an accelerated model keeps, and the method of it that takes the place of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastigpt.integrations.hf_weights import marks
from fastigpt.locks import Lock

Ours = TypeVar("Ours", covariant=True)


class Kind(Protocol[Ours]):
    """A class of transformers that can be accelerated."""

    def tensors(self, model: Any) -> Mapping[str, torch.Tensor]:
        """The weights that decide what is drawn. Raises ValueError for a model that is spread over devices."""
        ...

    def build(self, model: Any, *, dtype: Any, kv_dtype: Any, backend: str) -> Ours: ...


class State(Generic[Ours]):
    """What an accelerated model keeps: its engine and what that was built from, and nothing that refers to a module.
    Copies and pickles take the options along; the engine is built again."""

    def __init__(self, kind: Kind[Ours], options: dict[str, Any]) -> None:
        self.kind, self._options = kind, options
        self._lock = Lock()
        self._marks: list[tuple[Any, ...]] | None = None
        self._engine: Ours | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.kind, self._options)

    def engine(self, model: Any) -> Ours:
        """The model in our form, built anew if its weights are not the ones it was built from."""
        with self._lock:
            now = marks(self.kind.tensors(model))
            if self._engine is None or now != self._marks:
                self._engine = None  # frees its memory before the next one takes as much
                self._engine = self.kind.build(model, **self._options)
                self._marks = now
            return self._engine


class Method(Generic[Ours]):
    """`generate`, bound to one model. Equal for the same model, and pickled by way of it."""

    __name__ = "generate"

    def __init__(self, model: Any, original: Callable[..., Any], state: State[Ours]) -> None:
        self.__self__, self._original, self._state = model, original, state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and other.__self__ is self.__self__

    def __hash__(self) -> int:
        return hash((Method, id(self.__self__)))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, "generate")

    def engine(self) -> Ours:
        """The model in our form, as it is now."""
        return self._state.engine(self.__self__)


def refused(what: object, seed: object, generator: object) -> str:
    """What to warn of before the original runs. Raises ValueError where a seed was given, which that does not know."""
    if seed is not None or generator is not None:
        name = "generator" if seed is None else "seed"
        raise ValueError(f"{name} was given, but fastigpt cannot serve this call: it has {what}") from None
    return f"this call of generate has {what}: transformers' own generate runs instead of fastigpt's"


def seed_for(seed: int | None, generator: torch.Generator | None, do_sample: bool) -> int:
    """The seed that is given, else one of the generator, else one of torch's."""
    if seed is not None or not do_sample:
        return seed or 0
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, device=device))
