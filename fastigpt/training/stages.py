"""What the two stages of training a model of tokens have in common: settings, schedule, a state that survives a kill.

All that happens depends on the step alone: a stage that was killed and started again ends with the weights of one that
was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastigpt.errors import CheckpointError
from fastigpt.files import replacing
from fastigpt.tensor_files import load_pickle
from fastigpt.training.run import say
from fastigpt.untrusted import exists, refusing

COOLDOWN = 0.3  # share of the steps, the last ones, in which the learning rate falls to zero
_WARMUP = 100


@dataclass(frozen=True)
class StageSettings:
    """steps: optimiser steps of batch_size images. learning_rate: reached after the first steps, kept, and lowered to
    zero along a line over the last three tenths. seed: of weights and scenes. parts: of a batch, computed beside each
    other."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    parts: int = 2

    @property
    def cooldown(self) -> int:
        """The first step of it."""
        return self.steps - round(COOLDOWN * self.steps)

    def share(self, step: int) -> float:
        """Of the peak learning rate."""
        warm = min(1.0, (step + 1) / min(_WARMUP, max(1, self.steps // 10)))
        return min(warm, (self.steps - step) / max(1, self.steps - self.cooldown))


class Stage(ABC):
    """One stage on its way. name: of its state. network: what is saved. A subclass does the steps and the export."""

    name: str
    network: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def __init__(self, folder: Path, settings: StageSettings) -> None:
        self.folder, self.settings = folder, settings
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []

    @abstractmethod
    def loss(self, first: int, n: int) -> torch.Tensor:
        """The mean loss of images first, …, first + n − 1 of the endless row that training sees."""

    def gradients(self) -> float:
        """Leaves the gradients of the step's batch in the parameters. Its parts are computed in threads of their own,
        each with one thread of the CPU: they wait for each other once, where the threads of an operation would wait
        for each other after each. Returns the loss."""
        size, parts = self.settings.batch_size, min(self.settings.parts, self.settings.batch_size)
        edges = [size * k // parts for k in range(parts + 1)]
        parameters = [p for p in self.network.parameters() if p.requires_grad]

        def part(k: int) -> tuple[float, Sequence[torch.Tensor]]:
            share = (edges[k + 1] - edges[k]) / size
            loss = self.loss(self.step * size + edges[k], edges[k + 1] - edges[k]) * share
            return loss.item(), torch.autograd.grad(loss, parameters)

        with ThreadPoolExecutor(parts) as threads:
            found = list(threads.map(part, range(parts)))
        for each, *shares in zip(parameters, *(gradients for _, gradients in found)):
            each.grad = torch.stack(shares).sum(0)
        self.after(self.step)
        return sum(loss for loss, _ in found)

    def prepare(self) -> None:  # noqa: B027
        """What must be there before the first step that is taken."""

    def after(self, step: int) -> None:  # noqa: B027
        """What else a step does, once all parts of its batch have been seen."""

    @abstractmethod
    def held_out(self) -> dict[str, float]:
        """Figures on scenes that are never trained on."""

    @abstractmethod
    def export(self) -> None:
        """Writes what the next stage, or the model's user, reads."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a state must share to be gone on from, besides the settings."""

    def loop(self, *, save_seconds: float, log_every: int) -> None:
        peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        if self.step < self.settings.steps:
            self.prepare()
        total, began, saved = 0.0, time.monotonic() - self.seconds, time.monotonic()
        while self.step < self.settings.steps:
            for optimizer, each in zip(self.optimizers, peaks):
                for group, peak in zip(optimizer.param_groups, each):
                    group["lr"] = peak * self.settings.share(self.step)
            total += self.gradients()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            last = self.step == self.settings.steps
            self.seconds = time.monotonic() - began
            if self.step % log_every == 0 or last:
                mean = total / (self.step % log_every or log_every)
                if not math.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {self.step}: lower learning_rate")
                self._record(mean, last or self.step % (10 * log_every) == 0)
                total = 0.0
            if last or time.monotonic() - saved > save_seconds:
                self.save(peaks)
                saved = time.monotonic()
        self.export()  # also when a stage is started again that was killed after its last step

    def _record(self, loss: float, held_out: bool) -> None:
        row = {"step": self.step, "seconds": round(self.seconds, 1), "loss": loss}
        if held_out:
            row |= self.held_out()
        self.log.append(row)
        say(f"{self.name}: " + " ".join(f"{key} {value:.5g}" for key, value in row.items()))

    # --- files ---------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> Path:
        return self.folder / "training" / f"{self.name}.pt"

    def save(self, peaks: list[list[float]]) -> None:
        for optimizer, each in zip(self.optimizers, peaks):  # a state holds peaks, not where the schedule was
            for group, peak in zip(optimizer.param_groups, each):
                group["lr"] = peak
        state = {
            "identity": self.identity(),
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        self._state.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._state) as path:
            torch.save(state, path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        with replacing(self._state.with_name(f"{self.name}-log.json")) as path:
            path.write_text(json.dumps(self.log))

    def resume(self) -> None:
        """Takes over the state that the folder holds, if any. Raises ValueError if it is of another training. Another
        number of steps is fine while neither has begun to lower its learning rate."""
        if not exists(self._state):
            return
        state = load_pickle(self._state, torch.device("cpu"))
        if not isinstance(state, dict) or not all(isinstance(state.get(k), dict) for k in ("identity", "settings")):
            raise CheckpointError(f"{self._state} is no state of a training")
        with refusing(self._state, "is no whole state of this training"):
            theirs = StageSettings(**state["settings"])
            step = int(state["step"])
        mine, others = self.identity() | dataclasses.asdict(self.settings), state["identity"] | state["settings"]
        free = {"steps"} if step <= min(self.settings.cooldown, theirs.cooldown) else set()
        differ = [f"{k}: {others.get(k)!r} there, {mine[k]!r} here" for k in mine if others.get(k) != mine[k]]
        differ = [text for text in differ if text.partition(":")[0] not in free]
        if differ:
            raise ValueError(f"{self.folder} holds a {self.name} with other settings ({'; '.join(differ)})")
        with refusing(self._state, "is no whole state of this training"):
            self.network.load_state_dict(state["network"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self.log = step, float(state["seconds"]), list(state["log"])
        say(f"{self.name}: going on from step {self.step} of {self.settings.steps}")
