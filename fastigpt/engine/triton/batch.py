"""The device's side of a session: canvases, caches, shared prefixes, and the passes of every width, for a number of
slots that similar sessions share.

It knows nothing of requests that wait, of time, or of what is reported; sessions take turns with it. Lane b is slot b
with its prefix; if any canvas is guided, lane n + b is slot b with its negative prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastigpt.engine.triton.cache import Cache, PrefixStore, token_bytes
from fastigpt.engine.triton.passes import Kind, Passes, Seats
from fastigpt.engine.triton.sequence import Known, prefill
from fastigpt.engine.triton.weights import Model
from fastigpt.job import Request
from fastigpt.kernels.canvases import Canvases, Steps
from fastigpt.kernels.decode_attention import keys_of_a_state
from fastigpt.sampling import Drawings

_SHARED_BYTES = 256e6  # scoring and prefill, and what cuBLAS and the captured graphs keep


def bucket(n: int) -> int:
    """Slots that a session for n canvases has: rounded up, so that similar jobs share memory and graphs."""
    grain = 1 << max(0, (n - 1).bit_length() - (3 if n > 8 else 0))
    return -(-n // grain) * grain


def _places(n: int) -> int:
    """Prefixes that lanes of n canvases may share."""
    return -(-n // 4) if n > 1 else 0


def _capacity(model: Model) -> int:
    """Slots of a lane: whatever a canvas reads fits. A multiple of 16, which kernels are compiled for."""
    return -(-model.spec.context // 16) * 16


def batch_bytes(model: Model, n: int, guided: bool, widths: Sequence[int]) -> float:
    """Memory of a batch of n slots and its passes of these widths."""
    spec, lanes = model.spec, (2 if guided else 1) * n
    linear = sum(model.sections) + model.sections[0] + spec.block.n_inner
    head = 0 if spec.head_inner is None else spec.head_inner
    row = 4 * spec.width + 4 + (linear + head + spec.width) * model.dtype.itemsize + 12 * spec.n_tokens
    return _SHARED_BYTES + (lanes + _places(n)) * _capacity(model) * token_bytes(model) + lanes * sum(widths) * row


class Batch:
    """`n` slots, all free at first."""

    def __init__(self, model: Model, n: int) -> None:
        self.model, self.n, device = model, n, model.device
        places = _places(n)
        self.seats = Seats(
            Canvases.idle(n, model.spec.n_positions, device),
            Cache(model, n, _capacity(model)),
            PrefixStore(model, places, _capacity(model)) if places else None,
            torch.zeros(2 * n, dtype=torch.int64, device=device),
        )
        self.passes: dict[tuple[int, bool], Passes] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # for captures alone
        self._sources = [-1] * (2 * n)  # the shared prefix of every lane
        self._offset = [0] * (2 * n)
        self._guided = [False] * n
        self.restart()

    def restart(self) -> None:
        """All slots free, whatever was there; what kernels are compiled for is chosen anew."""
        self.free(range(self.n))
        self.steps, self.shared = Steps(), False

    @property
    def guided(self) -> bool:
        """Whether there are lanes for negative prefixes."""
        return self.seats.cache.lanes > self.n

    @property
    def guidance_bytes(self) -> float:
        """What the lanes for negative prefixes will take, if there are none yet."""
        return 0 if self.guided else self.n * _capacity(self.model) * token_bytes(self.model)

    @property
    def kind(self) -> Kind:
        return Kind(self.steps, self.shared)

    # --- canvases come and go ----------------------------------------------------------------------------------------

    def place(self, slots: Sequence[int], requests: Sequence[Request], ends: Sequence[int]) -> None:
        """Puts canvases into free slots, and reads what is before their first unknown token."""
        steps = Steps.of((request.drawing for request in requests), self.model.spec.n_tokens)
        steps |= Steps(guided=any(r.negative is not None for r in requests), score=any(r.score for r in requests))
        if steps.guided and not self.guided:
            self.passes.clear()  # they know where the caches are
            self.seats.cache.grow(2 * self.n)
        tokens = torch.stack([request.tokens for request in requests])
        leading = (tokens >= 0).long().cumprod(1).sum(1)
        known: dict[int, Known] = {}
        for slot, request, count in zip(slots, requests, leading.tolist()):
            if count < self.model.spec.n_positions:
                known[slot] = Known(request.prefix, request.tokens[:count])
                self._guided[slot] = request.negative is not None
                if request.negative is not None:
                    known[self.n + slot] = Known(request.negative, request.tokens[:count])
        try:
            self._read(known)
        except BaseException:
            self.free(slots)
            raise
        canvases, at = self.seats.canvases, self._device(slots)
        for name, rows in (
            ("canvas", tokens.int().to(at.device)), ("position", leading.int().to(at.device)),
            ("end", self._device(ends).int()), ("index", self._device([request.index for request in requests])),
            ("guided", self._device([request.negative is not None for request in requests]).int()),
            ("scored", self._device([request.score for request in requests]).int()),
        ):  # fmt: skip
            getattr(canvases, name)[at] = rows
        for x in (canvases.pass_starts, canvases.log_likelihood, canvases.failed):
            x[at] = 0
        canvases.drawings.put(at, Drawings([request.drawing for request in requests]))
        self.steps |= steps
        self.settle()

    def _read(self, known: dict[int, Known]) -> None:
        """Prefills lanes. What several lanes know alike is read once; if it is long, and there is a place for it, it is
        stored once, else copied. Stored once are whole blocks of keys, and the rest is copied: then what a lane's
        attention comes to does not depend on whether it shares."""
        store = self.seats.store
        at_least = self.model.configs["shared_prefix"][0]["from_slots"]
        block = keys_of_a_state(self.model.configs, self.model.dtype)
        alike: dict[object, list[int]] = {}
        for lane, what in known.items():
            alike.setdefault(what.key, []).append(lane)
        own: list[tuple[int, Known]] = []
        common: list[tuple[int, Known]] = []
        copies: list[tuple[int, list[int], int]] = []
        rests: list[tuple[int, list[int], int, int]] = []
        for key, lanes in alike.items():
            what = known[lanes[0]]
            shared = what.slots // block * block
            place = store.find(key) if store is not None else None
            if place is None and store is not None and len(lanes) > 1 and shared >= max(1, at_least):
                place = store.take(key, shared)
                common += [] if place is None else [(place, what)]
            for lane in lanes:
                self._sources[lane] = -1 if place is None else place
                # The input that scores position p is input p + L − 1, counted from the first of the prefix.
                self._offset[lane] = 1 - len(what.prefix) + (0 if place is None else shared)
                if place is not None and store is not None:
                    store.read(place)
            if place is not None and shared < what.slots:
                rests.append((place, lanes, shared, what.slots))
            if place is None and what.slots > 0:
                own.append((lanes[0], what))
                copies.append((lanes[0], lanes[1:], what.slots))
        try:
            prefill(self.model, self.seats.cache, own)
            if store is not None:
                prefill(self.model, store.cache, common)
        except BaseException:
            for place, _ in common:
                store.forget(place)  # type: ignore[union-attr]
            raise
        for lane, others, slots in copies:
            self.seats.cache.copy(lane, others, slots)
        if store is not None:
            for place, lanes, first, end in rests:
                self.seats.cache.take(store.cache, place, first, end, lanes)
        self.shared |= max(self._sources) >= 0
        lanes = list(known)
        at = self._device(lanes)
        self.seats.canvases.offset[at] = self._device([self._offset[lane] for lane in lanes]).int()
        self.seats.first_input[at] = self._device([known[lane].prefix[-1] for lane in lanes])

    def fork(self, slot: int, others: Sequence[int], indices: Sequence[int], position: int) -> None:
        """Copies a canvas, which is at `position`, into free slots; slot and others draw with these image indices."""
        canvases, everybody = self.seats.canvases, self._device([slot, *others])
        to = everybody[1:]
        for x in (*canvases.tensors().values(), *vars(canvases.drawings).values()):
            if len(x) == self.n:  # what is by lane follows
                x[to] = x[slot].clone()
        canvases.index[everybody] = torch.tensor(indices, device=self.model.device)
        for first in (0, self.n) if self._guided[slot] else (0,):
            mine, theirs = first + slot, [first + other for other in others]
            for lane in theirs:
                self._offset[lane], self._sources[lane] = self._offset[mine], self._sources[mine]
                if self._sources[lane] >= 0 and self.seats.store is not None:
                    self.seats.store.read(self._sources[lane])
            self.seats.cache.copy(mine, theirs, position - self._offset[mine])
            at = self._device(theirs)
            canvases.offset[at] = self._offset[mine]
            self.seats.first_input[at] = self.seats.first_input[mine].clone()
        for other in others:
            self._guided[other] = self._guided[slot]
        self.settle()

    def stop_at(self, slot: int, end: int) -> None:
        """The canvas is drawn up to there."""
        self.seats.canvases.end[slot] = end
        self.settle()

    def free(self, slots: Sequence[int]) -> None:
        """Nothing is drawn there any more."""
        for slot in slots:
            for lane in (slot, self.n + slot):
                if self._sources[lane] >= 0 and self.seats.store is not None:
                    self.seats.store.leave(self._sources[lane])
                self._sources[lane] = -1
        canvases, at = self.seats.canvases, self._device(slots)
        canvases.position[at] = canvases.end[at] = 0
        self.settle()

    def settle(self) -> None:
        """Where every lane's cache goes on."""
        c = self.seats.canvases
        live = c.position < c.end
        places = c.position.repeat(2) - c.offset
        c.slots.copy_(torch.where(torch.cat([live, live & (c.guided != 0)]), places, -1))

    def _device(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.model.device)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def passes_of(self, width: int) -> Passes:
        """The passes of this width, for what the canvases need now."""
        key = width, self.steps.guided
        if key not in self.passes:
            self.passes[key] = Passes(self.model, self.seats, *key)
        found = self.passes[key]
        found.assign(self._sources, self.shared)
        return found
