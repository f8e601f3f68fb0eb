"""Keys and values on the device: each lane's own, and prefixes that lanes share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from fastigpt.engine.triton.weights import Model
from fastigpt.kernels.kv_cache import append_kv
from fastigpt.kernels.launch import SCALED_TYPES

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""k, v: [lanes, n_kv_head, capacity, head_dim]; their scales [lanes, n_kv_head, capacity] if they are 8-bit."""


def token_bytes(model: Model) -> int:
    """Of one token's keys and values in all layers."""
    scale = 4 if model.kv_dtype in SCALED_TYPES else 0
    bytes_of_a_head = model.head_dim * model.kv_dtype.itemsize + scale
    return 2 * model.spec.n_layer * model.spec.block.n_kv_head * bytes_of_a_head


class Cache:
    """Some lanes with `capacity` slots each."""

    def __init__(self, model: Model, lanes: int, capacity: int) -> None:
        self.model, self.lanes, self.capacity = model, lanes, capacity
        self._layers = [self._layer(lanes) for _ in range(model.spec.n_layer)]

    def _layer(self, lanes: int) -> Layer:
        model = self.model
        shape = (lanes, model.spec.block.n_kv_head, self.capacity, model.head_dim)
        k, v = (torch.empty(shape, dtype=model.kv_dtype, device=model.device) for _ in range(2))
        if model.kv_dtype not in SCALED_TYPES:
            return k, v, None, None
        k_scale, v_scale = (torch.empty(shape[:-1], dtype=torch.float32, device=model.device) for _ in range(2))
        return k, v, k_scale, v_scale

    def layer(self, i: int, lanes: int | None = None) -> Layer:
        """Layer i of the first `lanes` lanes."""
        k, v, k_scale, v_scale = self._layers[i]
        if k_scale is None or v_scale is None:
            return k[:lanes], v[:lanes], None, None
        return k[:lanes], v[:lanes], k_scale[:lanes], v_scale[:lanes]

    def append(self, i: int, k: torch.Tensor, v: torch.Tensor, lanes: torch.Tensor) -> None:
        """k, v: [B, T, n_kv_head, head_dim] of block i into slots 0 … of these lanes, int32 [B]."""
        to_k, to_v, k_scale, v_scale = self._layers[i]
        append_kv(k, v, to_k, to_v, torch.zeros_like(lanes), k_scale, v_scale, lanes)

    def copy(self, lane: int, others: Sequence[int], slots: int) -> None:
        """The first `slots` slots of a lane into those of others."""
        if others and slots > 0:
            self.take(self, lane, 0, slots, others)

    def take(self, cache: Cache, lane: int, first: int, end: int, lanes: Sequence[int]) -> None:
        """Slots first … end − 1 of a lane of `cache`, of the same model, into the first slots of these lanes."""
        to = torch.tensor(lanes, device=self.model.device)
        for mine, theirs in zip(self._layers, cache._layers):
            for x, y in zip(mine, theirs):
                if x is not None and y is not None:
                    if x.dtype.itemsize == 1:  # torch indexes no float8
                        x, y = x.view(torch.uint8), y.view(torch.uint8)
                    x[to, :, : end - first] = y[lane, :, first:end].clone()

    def grow(self, lanes: int) -> None:
        """More lanes; the first keep what they hold. Layer by layer, so that only one is there twice."""
        for i, old in enumerate(self._layers):
            if len(old[0]) < lanes:
                self._layers[i] = new = self._layer(lanes)
                for x, y in zip(new, old):
                    if x is not None and y is not None:
                        x[: len(y)] = y
        self.lanes = lanes


class PrefixStore:
    """Prefixes that lanes share, each stored once and counted. One that nobody reads any more stays until its place is
    needed: a canvas like it may come again."""

    def __init__(self, model: Model, places: int, capacity: int) -> None:
        self.cache = Cache(model, places, capacity)
        self.lengths = torch.zeros(places, dtype=torch.int32, device=model.device)
        self._readers = [0] * places
        self._keys: list[Hashable] = [None] * places
        self._used: list[int] = list(range(places))  # least lately used first

    def find(self, key: Hashable) -> int | None:
        """The place of a prefix."""
        return self._keys.index(key) if key in self._keys else None

    def take(self, key: Hashable, length: int) -> int | None:
        """A place for a prefix of so many slots; None if all are read. Its keys and values are the caller's to fill."""
        place = next((place for place in self._used if not self._readers[place]), None)
        if place is not None:
            self._keys[place] = key
            self.lengths[place] = length
        return place

    def read(self, place: int) -> None:
        """Counts one reader more."""
        self._readers[place] += 1
        self._used.remove(place)
        self._used.append(place)

    def leave(self, place: int) -> None:
        """Counts one reader less."""
        self._readers[place] -= 1

    def forget(self, place: int) -> None:
        """What is there is not what its key says: it was not filled."""
        self._keys[place] = None

    @property
    def readers(self) -> int:
        return sum(self._readers)
