"""Tensors by name that are made when they are asked for, so that a model's are never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

RowReader = Callable[[int], torch.Tensor]
"""Gives row i of a tensor, in memory of its own. Raises CheckpointError."""


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each made anew when it is asked for; `makers` make them. A pickle holds them all. rows: of those
    whose rows can be read without the rest."""

    def __init__(
        self, makers: Mapping[str, Callable[[], torch.Tensor]], rows: Mapping[str, RowReader] | None = None
    ) -> None:
        self._makers, self.rows = dict(makers), dict(rows or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __reduce__(self) -> tuple[type, tuple[dict[str, torch.Tensor]]]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: object) -> Tensors:
        return self  # nothing in it ever changes


def row_reader(tensors: Mapping[str, torch.Tensor], name: str) -> RowReader | None:
    """Of a tensor whose rows can be read without the rest."""
    return tensors.rows.get(name) if isinstance(tensors, Tensors) else None
