"""A session on the GPU: which slot holds which request, and the loop that replays passes until time is up.

A step leaves nothing under way: between steps the canvases are where they were said to be, so that they can be forked,
stopped and replaced. Within a step nothing is waited for while the device has less than two launches to do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastigpt.engine import Advance
from fastigpt.engine.triton.batch import Batch
from fastigpt.engine.triton.graphs import launching
from fastigpt.engine.triton.passes import Kind, Passes
from fastigpt.engine.triton.pool import Pool
from fastigpt.engine.triton.weights import Model
from fastigpt.engine.window import WIDTHS, WindowTuner
from fastigpt.errors import CheckpointError
from fastigpt.job import Filled, Request


@dataclass(frozen=True)
class _Canvas:
    """position: as far as the device is. last: one past the last unknown token."""

    request: Request
    position: int
    last: int

    @property
    def stop(self) -> int:
        return len(self.request.tokens) if self.request.stop is None else self.request.stop

    @property
    def end(self) -> int:
        """Where drawing ends: known tokens after the last unknown one are only read to be scored."""
        return self.stop if self.request.score else min(self.stop, self.last)

    @property
    def decided(self) -> int:
        return self.position if self.position < self.end else max(self.position, self.stop)


@dataclass(frozen=True)
class _Launch:
    """Passes under way. report: int32 [2, n], on its way to the host: positions, and whether logits were not finite."""

    width: int
    passes: int
    report: torch.Tensor
    seconds: float  # they took, where there are no events
    events: tuple[torch.cuda.Event, ...]  # before and after the passes, and after the report


class TritonSession:
    """See the protocol in fastigpt/engine/__init__.py."""

    def __init__(self, pool: Pool, capacity: int, window: int | None, draft: Model | None) -> None:
        # Without guesses a draft has nothing to do; with them a window of one token would leave a hole in its cache.
        draft = None if window == 1 else draft
        widths = WIDTHS[1:] if draft is not None else WIDTHS
        self.capacity, self._pool = capacity, pool
        self._batch, self._draft = pool.take(capacity, draft, widths if window is None else (window,))
        self._device = self._batch.model.device
        self._tuner = WindowTuner(window, pool.statistics(self._batch.n, draft), widths)
        self._canvases: dict[int, _Canvas] = {}
        self._fresh: set[int] = set()  # canvases whose inputs are not made yet
        self._passes: Passes | None = None  # those that were launched last
        self._ahead = 2 if self._device.type == "cuda" else 1  # launches that may be under way
        self._closed = False

    # --- canvases come and go ----------------------------------------------------------------------------------------

    def add(self, requests: Sequence[Request]) -> list[int]:
        slots = self._free(len(requests))
        if not slots:
            return []
        added = []
        for request in requests:
            unknown = (request.tokens < 0).nonzero().flatten()
            first, last = (int(unknown[0]), int(unknown[-1]) + 1) if len(unknown) else (len(request.tokens),) * 2
            added.append(_Canvas(request, first, last))
        if any(request.negative is not None for request in requests):
            self._pool.make_room(sum(batch.guidance_bytes for batch in self._batches()))
        with launching(self._device):
            self._batch.place(slots, requests, [canvas.end for canvas in added])
            if self._draft is not None:
                try:
                    self._draft.place(slots, requests)
                except BaseException:
                    self._batch.free(slots)
                    raise
        self._canvases.update(zip(slots, added))
        self._fresh.update(slots)
        return slots

    def _free(self, count: int) -> list[int]:
        free = [slot for slot in range(self.capacity) if slot not in self._canvases]
        if len(free) < count:
            raise ValueError(f"{count} canvases for {len(free)} free slots")
        return free[:count]

    def resume(self, slot: int, stop: int) -> None:
        canvas = self._canvases[slot]
        canvas = replace(canvas, request=replace(canvas.request, stop=stop))
        with launching(self._device):
            self._batch.stop_at(slot, canvas.end)
        self._canvases[slot] = canvas
        self._fresh.add(slot)  # its hidden states were overwritten while it waited

    def fork(self, slot: int, indices: Sequence[int]) -> list[int]:
        others, canvas = self._free(len(indices) - 1), self._canvases[slot]
        with launching(self._device):
            for batch in self._batches():
                batch.fork(slot, others, indices, canvas.position)
        slots = [slot, *others]
        for each, index in zip(slots, indices):
            self._canvases[each] = replace(canvas, request=replace(canvas.request, index=index))
        self._fresh.update(slots)
        return slots

    def remove(self, slot: int) -> None:
        del self._canvases[slot]
        with launching(self._device):
            for batch in self._batches():
                batch.free([slot])

    def _batches(self) -> list[Batch]:
        return [self._batch] if self._draft is None else [self._batch, self._draft.batch]

    def read(self, slots: Sequence[int]) -> Filled:
        with launching(self._device):
            canvases, at = self._batch.seats.canvases, torch.tensor(list(slots), device=self._device)
            rows = canvases.canvas[at], canvases.pass_starts[at], canvases.log_likelihood[at]
            tokens, starts, log_likelihood = (x.cpu() for x in rows)
        return Filled(tokens.long(), starts.bool(), log_likelihood.double())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._canvases.clear()
        with launching(self._device):
            if self._device.type == "cuda":  # a launch may be under way that an error in a step left behind
                torch.cuda.current_stream().synchronize()
            for batch in self._batches():
                batch.restart()
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        self._pool.give_back(self._batch, self._draft)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def step(self, seconds: float) -> list[Advance]:
        until, started = time.monotonic() + seconds, False
        under_way: deque[_Launch] = deque()
        while True:
            # At one token per pass, and after the passes that are under way.
            left = max((canvas.end - canvas.position for canvas in self._canvases.values()), default=0)
            left -= sum(launch.passes for launch in under_way)
            if left > 0 and (not started or time.monotonic() < until):
                width, started = self._tuner.width(), True
                under_way.append(self._launch(width))
                if len(under_way) < self._ahead and self._tuner.known(width):
                    continue
            if not under_way:
                return [Advance(slot, canvas.decided) for slot, canvas in self._canvases.items()]
            self._collect(under_way.popleft())

    def _launch(self, width: int) -> _Launch:
        with launching(self._device):
            passes = self._batch.passes_of(width)
            if self._draft is not None:
                self._draft.prepare()
            if passes is not self._passes or self._fresh:
                fresh = torch.zeros(self._batch.n, dtype=torch.bool, device="cpu")
                fresh[list(self._fresh)] = True
                passes.enter(self._passes, fresh.to(self._device))
                self._passes, self._fresh = passes, set()
            kind, guess = self._batch.kind, None
            if self._draft is not None and width > 1:
                kind, guess = Kind(kind.steps, kind.shared, self._draft.kind), self._draft.guess
            run = passes.runner(kind, guess, self._batch.stream)
            canvases = self._batch.seats.canvases
            if self._device.type != "cuda":
                began = time.perf_counter()
                run()
                seconds = time.perf_counter() - began
                return _Launch(width, passes.at_once, torch.stack([canvases.position, canvases.failed]), seconds, ())
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))
            report = torch.empty((2, self._batch.n), dtype=torch.int32, device="cpu", pin_memory=True)
            events[0].record()
            run()
            events[1].record()
            report[0].copy_(canvases.position, non_blocking=True)
            report[1].copy_(canvases.failed, non_blocking=True)
            events[2].record()
            return _Launch(width, passes.at_once, report, 0.0, events)

    def _collect(self, launch: _Launch) -> None:
        """Waits for a launch, without keeping anybody else from launching."""
        seconds = launch.seconds
        if launch.events:
            launch.events[2].synchronize()
            seconds = launch.events[0].elapsed_time(launch.events[1]) / 1e3
        position, failed = launch.report.tolist()
        kept: list[int] = []
        ended: list[int] = []
        for slot, canvas in self._canvases.items():
            if canvas.position < canvas.end:
                (kept if position[slot] < canvas.end else ended).append(position[slot] - canvas.position)
                self._canvases[slot] = replace(canvas, position=position[slot])
        counted = kept or ended  # one that came to its end did nothing for the rest of the launch
        if counted:
            average = sum(counted) / len(counted) / launch.passes
            self._tuner.record(launch.width, seconds / launch.passes, average)
        if any(failed[slot] for slot in self._canvases):
            raise CheckpointError("the model's logits are not finite numbers")
