"""Slots, and the passes that advance what is in them: fixed-point sampling over a window of tokens of each canvas."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fastigpt.engine import Advance
from fastigpt.engine.arithmetic import undisturbed
from fastigpt.engine.portable import guesses
from fastigpt.engine.portable.blocks import Blocks
from fastigpt.engine.portable.canvases import Canvases
from fastigpt.engine.portable.reader import DraftReader, Reader
from fastigpt.engine.window import WindowTuner
from fastigpt.errors import NotFiniteError
from fastigpt.job import Filled, Request
from fastigpt.sampling import draw


class PortableSession:
    """Slots are numbers that callers see, rows are where their canvases lie: a pass computes the first rows only, so
    canvases that have nothing to do move behind the others once they are half of them."""

    def __init__(self, blocks: Blocks, capacity: int, tuner: WindowTuner, draft: Blocks | None) -> None:
        self.capacity, self.n_positions, self.device = capacity, blocks.spec.n_positions, blocks.device
        self.tuner = tuner
        self.canvases = Canvases(blocks.spec, capacity, blocks.device)
        self.reader = Reader(blocks, capacity)
        self.draft = None if draft is None else DraftReader(draft, capacity, blocks.spec)
        self._requests: dict[int, Request] = {}  # of the slots that are taken
        self._rows: dict[int, int] = {}
        self._free_slots = list(reversed(range(capacity)))
        self._free_rows = list(range(capacity))  # a heap: the first rows are taken first

    # --- the canvases of slots -----------------------------------------------------------------------------------

    @undisturbed
    def add(self, requests: Sequence[Request]) -> list[int]:
        with self._free(len(requests)) as rows:
            if rows:
                for reader in self._readers():
                    reader.add(rows, requests)
                self.canvases.put(rows, requests)
        return [self._take(row, request) for row, request in zip(rows, requests)]

    @contextmanager
    def _free(self, count: int) -> Iterator[list[int]]:
        """The first free rows; they stay free if there is an error."""
        if len(self._free_rows) < count:
            raise ValueError(f"{count} canvases for {len(self._free_rows)} free slots")
        rows = [heapq.heappop(self._free_rows) for _ in range(count)]
        try:
            yield rows
        except BaseException:
            for row in rows:
                heapq.heappush(self._free_rows, row)
            raise

    def _take(self, row: int, request: Request) -> int:
        """The slot for the canvas in this row."""
        slot = self._free_slots.pop()
        self._requests[slot], self._rows[slot] = request, row
        return slot

    def _readers(self) -> list[Reader]:
        return [self.reader] if self.draft is None else [self.reader, self.draft]

    def read(self, slots: Sequence[int]) -> Filled:
        return self.canvases.filled([self._row(slot) for slot in slots])

    def _row(self, slot: int) -> int:
        if slot not in self._rows:
            raise KeyError(f"slot {slot} is free")
        return self._rows[slot]

    @undisturbed
    def resume(self, slot: int, stop: int) -> None:
        row = self._row(slot)
        request = self._requests[slot] = replace(self._requests[slot], stop=stop)
        self.canvases.target[row] = self.canvases.end(request)

    @undisturbed
    def fork(self, slot: int, indices: Sequence[int]) -> list[int]:
        if len(indices) == 0:
            raise ValueError("fork needs at least one image index")
        row, request = self._row(slot), self._requests[slot]
        with self._free(len(indices) - 1) as rows:
            if rows:
                self._copy([row] * len(rows), rows, int(self.canvases.position[row]))
            self.canvases.index[[row, *rows]] = torch.tensor(indices, device=self.device)
        self._requests[slot] = replace(request, index=indices[0])
        return [slot, *(self._take(other, replace(request, index=i)) for other, i in zip(rows, indices[1:]))]

    def _copy(self, sources: Sequence[int], targets: Sequence[int], positions: int | None = None) -> None:
        self.canvases.copy(sources, targets)
        for reader in self._readers():
            reader.copy(sources, targets, positions)

    @undisturbed
    def remove(self, slot: int) -> None:
        row = self._row(slot)
        self.canvases.target[row] = 0
        for reader in self._readers():
            reader.guided[row] = False
        del self._requests[slot], self._rows[slot]
        self._free_slots.append(slot)
        heapq.heappush(self._free_rows, row)

    def close(self) -> None:
        vars(self).clear()  # whoever still holds the session shall not hold its caches

    # --- passes --------------------------------------------------------------------------------------------------

    @undisturbed
    def step(self, seconds: float) -> list[Advance]:
        """Returns early when a canvas has come as far as it shall, so that its slot can take another."""
        end, canvases = time.perf_counter() + seconds, self.canvases
        waiting = len(active := canvases.active())
        while len(active) == waiting > 0:
            self._timed_pass(active)
            active = canvases.active()
            if time.perf_counter() >= end:
                break
        position, target = canvases.position.tolist(), canvases.target.tolist()
        return [
            Advance(slot, self._decided(request, position[self._rows[slot]], target[self._rows[slot]]))
            for slot, request in self._requests.items()
        ]

    def _decided(self, request: Request, position: int, target: int) -> int:
        """What is known behind the last decided token is decided as well, up to where the canvas stops."""
        if position < target:
            return position
        return max(position, self.n_positions if request.stop is None else request.stop)

    def _timed_pass(self, active: torch.Tensor) -> None:
        left = int((self.canvases.target - self.canvases.position)[active].max())
        width = self.tuner.width()
        started = time.perf_counter()
        kept = self.advance(self._first_rows(active), min(width, left))
        if width <= left:
            self.tuner.record(width, time.perf_counter() - started, kept)

    def _first_rows(self, active: torch.Tensor) -> slice:
        """The rows a pass has to compute: as few as hold all active ones, or up to twice as many."""
        count, end = len(active), int(active[-1]) + 1
        if 2 * count <= end:
            behind = active[active >= count].tolist()
            before = sorted(set(range(count)) - set(active.tolist()))
            if behind:
                sources, targets = [*behind, *before], [*before, *behind]
                self._copy(sources, targets)
                moved = dict(zip(sources, targets))
                self._rows = {slot: moved.get(row, row) for slot, row in self._rows.items()}
                self._free_rows = [moved.get(row, row) for row in self._free_rows]
                heapq.heapify(self._free_rows)
            end = count
        return slice(0, end)

    def advance(self, rows: slice, width: int) -> float:
        """One pass: scores a window of every canvas of these rows and keeps the guesses that agree with the draw.
        Returns how many tokens each canvas that had something to do kept, on average."""
        canvases, n, device = self.canvases, self.n_positions, self.device
        self._guess(rows, width)
        drawings, tokens = canvases.drawings.rows(rows), canvases.tokens[rows]
        position, target = canvases.position[rows].to(device), canvases.target[rows].to(device)
        window = position[:, None] + torch.arange(width, device=device)  # may run past the canvas
        at = window.clamp(max=n)
        logits = self.reader.logits(
            canvases.inputs(rows, canvases.position[rows], width),
            canvases.position[rows],
            rows,
            drawings.guidance_scale,
        )
        known, guessed = canvases.known[rows].gather(1, at), tokens.gather(1, at)
        drawn = draw(logits, canvases.index[rows, None], window, drawings)
        drawn = torch.where(known, guessed, drawn)
        # A position is decided if all guesses before it were right; the first always is.
        right = (guessed == drawn)[:, :-1] & (window < target[:, None])[:, 1:]
        active = position < target
        kept = (1 + right.long().cumprod(1).sum(1)) * active
        decided = torch.arange(width, device=device) < kept[:, None]
        counted = decided & (~known | canvases.scores[rows, None])
        bad = ~torch.isfinite(logits).all(-1)
        if bool(bad.any()) and not self._may_stay(bad, window, decided, counted):
            return self.advance(rows, 1)
        if bool(canvases.scores[rows].any()):
            nats = logits.cpu().double().log_softmax(-1).gather(-1, guessed.cpu()[..., None])[..., 0]
            canvases.log_likelihood[rows] += nats.masked_fill(~(counted & known).cpu(), 0).sum(1)
        last = (kept - 1).clamp(min=0)[:, None]
        taken_for = guessed.gather(1, last)
        wrong = torch.where(taken_for == drawn.gather(1, last), -1, taken_for)[:, 0]
        tokens.scatter_(1, at, torch.where(active[:, None], drawn, guessed))
        canvases.wrong[rows] = torch.where(active, wrong, canvases.wrong[rows])
        canvases.scored[rows] = torch.where(active, position + width, canvases.scored[rows])
        canvases.pass_starts[rows].scatter_(1, torch.where(active, position, n)[:, None], True)
        kept = kept.cpu()
        canvases.position[rows] += kept
        return float(kept.sum() / (kept > 0).sum())

    def _guess(self, rows: slice, width: int) -> None:
        if self.draft is None:
            guesses.from_last_pass(self.canvases, rows, width)
        else:
            guesses.from_draft(self.canvases, self.draft, rows, width)

    def _may_stay(self, bad: torch.Tensor, window: torch.Tensor, decided: torch.Tensor, counted: torch.Tensor) -> bool:
        """Whether a pass with logits that are not finite may keep what it decided; raises if the model is to blame.

        If not, the pass has to be run again without guesses: a wrong one may overflow, and that reaches back to the
        positions before it, since zero times what is not a number is not a number."""
        broken = bool((bad & counted).any())
        spoilt = bad.any(1, keepdim=True).expand_as(bad) if broken else bad & ~decided
        row, place = spoilt.cpu().nonzero().unbind(1)
        self.reader.discard(row, window.cpu()[row, place])
        if broken and window.shape[1] == 1:
            raise NotFiniteError("the model's logits are not finite numbers")
        return not broken
