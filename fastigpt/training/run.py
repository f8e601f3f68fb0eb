"""One training run: the settings that decide its weights, its steps, and the state it goes on from after a kill."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastigpt.engine.arithmetic import converted
from fastigpt.errors import CheckpointError
from fastigpt.families.image_gpt.checkpoint import Checkpoint
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.image_gpt.network import Network
from fastigpt.files import replacing
from fastigpt.scalars import whole
from fastigpt.tensor_files import load_pickle
from fastigpt.training import report
from fastigpt.training.data import HELD_OUT_SEED, Batch, Data
from fastigpt.untrusted import exists, refusing

SEEDS = HELD_OUT_SEED  # a run's seed is below: that one draws the scenes no run may see
_HELD_OUT = 64  # images


@dataclass(frozen=True)
class Settings:
    """What decides the weights a run ends with. steps, warmup: optimiser steps of batch_size images. learning_rate: the
    peak, reached after `warmup` steps and lowered to zero along a cosine. prompt_dropout: share of every batch that is
    shown without captions. ema_decay: of the averaged weights that are saved (lower in the first steps)."""

    steps: int = 3800
    batch_size: int = 12
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema_decay: float = 0.995
    prompt_dropout: float = 0.17
    seed: int = 0
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name, limits in (("steps", (1,)), ("batch_size", (1,)), ("warmup", (0,)), ("seed", (0, SEEDS - 1))):
            object.__setattr__(self, name, whole(name, getattr(self, name), *limits))
        for name, below in (("learning_rate", 1.0), ("clip", math.inf), ("weight_decay", 1.0)):
            value = getattr(self, name)
            if not _is_real(value) or not 0 <= value < below or (value == 0 and name != "weight_decay"):
                raise ValueError(f"{name} must be a positive number below {below}, not {value!r}")
            object.__setattr__(self, name, float(value))
        for name in ("ema_decay", "prompt_dropout"):
            value = getattr(self, name)
            if not _is_real(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {value!r}")
            object.__setattr__(self, name, float(value))
        if self.dtype not in ("bf16", "float32"):
            raise ValueError(f'dtype must be "bf16" or "float32", not {self.dtype!r}')


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def warmup_for(steps: int) -> int:
    """Steps of warm-up that suit a run of this length: a tenth of it, at most 100."""
    return min(Settings.warmup, steps // 10) if isinstance(steps, int) else 0


class Run:
    """One training: network, averaged weights, optimiser, and the step they have reached."""

    def __init__(
        self,
        folder: Path,
        config: ImageGPTConfig,
        settings: Settings,
        data: Data,
        device: torch.device,
        compile: bool = False,
    ) -> None:
        self.folder, self.config, self.settings, self.data, self.device = folder, config, settings, data, device
        self.network = Network(config, seed=settings.seed).to(device)
        self.ema = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.optimizers = _optimizers(self.network, settings)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.loss: Callable[..., torch.Tensor] = self.network.loss
        if compile:
            self.loss = torch.compile(self.network.loss, dynamic=False)
        self.init: str | None = None
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []

    def begin_from(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Takes these weights for the first step's. name: what a run that goes on is compared by."""
        self.init = name
        cpu = torch.device("cpu")
        self.network.load_state_dict({k: converted(k, tensor, cpu, torch.float32) for k, tensor in weights.items()})
        self.ema = {k: p.detach().clone() for k, p in self.network.named_parameters()}

    # --- a step --------------------------------------------------------------------------------------------------

    def schedule(self, step: int) -> float:
        """Share of the peak learning rate."""
        s = self.settings
        if step < s.warmup:
            return (step + 1) / s.warmup
        done = (step - s.warmup) / max(1, s.steps - s.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and norm of the gradient, both still on the device."""
        batch = self.data.batch(self.step, self.settings.batch_size)
        share = self.schedule(self.step)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * share
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for part, weight in self._parts(batch):
            with self._autocast():
                loss = self.loss(part.tokens.to(self.device), _to(part.prompt, self.device)) * weight
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            parameters = dict(self.network.named_parameters())
            torch._foreach_lerp_(list(self.ema.values()), [parameters[n] for n in self.ema], 1 - decay)
        self.step += 1
        return total, norm

    def _parts(self, batch: Batch) -> list[tuple[Batch, float]]:
        """The images shown with their captions and those shown without, with their shares of the batch."""
        size = len(batch.tokens)
        if batch.prompt is None:
            return [(batch, 1.0)]
        n_plain = round(size * self.settings.prompt_dropout)
        n_prompt = size - n_plain
        parts = [
            (Batch(batch.tokens[:n_prompt], batch.prompt[:n_prompt]), n_prompt / size),
            (Batch(batch.tokens[n_prompt:], None), n_plain / size),
        ]
        return [part for part in parts if len(part[0].tokens)]

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16")

    # --- the loop ------------------------------------------------------------------------------------------------

    def loop(self, save_seconds: float, log_every: int, sample_every: int, progress: bool | None) -> None:
        steps = self.settings.steps
        show = sys.stderr.isatty() if progress is None else progress
        losses: list[torch.Tensor] = []
        saved = started = time.monotonic()
        before = self.seconds
        with tqdm(total=steps, initial=self.step, unit="step", disable=not show) as bar:
            while self.step < steps:
                loss, norm = self.train_step()
                losses.append(loss)
                last = self.step == steps
                if self.step % log_every == 0 or last:
                    self.seconds = before + time.monotonic() - started
                    mean = torch.stack(losses).mean().item()
                    if not math.isfinite(mean):
                        raise ValueError(f"the loss is {mean} at step {self.step}: lower learning_rate")
                    losses.clear()
                    self._record(mean, norm.item(), held_out=self.step % (10 * log_every) == 0 or last)
                    bar.set_postfix(loss=f"{mean:.3f}")
                    if not show:
                        say(" ".join(f"{key} {value:.5g}" for key, value in self.log[-1].items()))
                bar.update()
                if last or time.monotonic() - saved > save_seconds:
                    self.save()
                    saved = time.monotonic()
                if self.step % sample_every == 0 and not last:
                    self.export()
        self.export()  # also when a run is started again that was killed after its last step

    def _record(self, loss: float, norm: float, *, held_out: bool) -> None:
        row = {
            "step": self.step,
            "images": self.step * self.settings.batch_size,
            "seconds": round(self.seconds, 1),
            "learning_rate": self.settings.learning_rate * self.schedule(self.step - 1),
            "loss": loss,
            "gradient_norm": norm,
        }
        if held_out:
            row |= self.held_out()
        self.log.append(row)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Nats per token of the averaged weights on images that were not trained on, with and without captions."""
        batch = self.data.held_out(_HELD_OUT)
        if batch is None:
            return {}
        network = Network(self.config).to(self.device)
        network.load_state_dict(self.ema)
        sums = {"held_out": 0.0} | ({"held_out_prompt": 0.0} if batch.prompt is not None else {})
        for first in range(0, len(batch.tokens), 16):
            tokens = batch.tokens[first : first + 16].to(self.device)
            with self._autocast():
                sums["held_out"] += network.loss(tokens).item() * len(tokens)
                if batch.prompt is not None:
                    prompt = batch.prompt[first : first + 16].to(self.device)
                    sums["held_out_prompt"] += network.loss(tokens, prompt).item() * len(tokens)
        return {name: value / len(batch.tokens) for name, value in sums.items()}

    # --- files ---------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, object]:
        named = {"data": self.data.name, "init": self.init}
        return {**named, **dataclasses.asdict(self.config), **dataclasses.asdict(self.settings)}

    def save(self) -> None:
        """Writes beside and renames: a full disk or a kill leaves the last good state."""
        state = {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "network": self.network.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with replacing(self.folder / "training" / "state.pt") as path:
            torch.save(state, path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        report.write_log(self.folder / "training" / "log.csv", self.log)

    def resume(self) -> None:
        """Takes over the state that `folder` holds, if any. Raises ValueError if it is of another training."""
        path = self.folder / "training" / "state.pt"
        if not exists(path):
            return
        state = load_pickle(path, self.device)
        mine, theirs = self._identity(), state.get("identity") if isinstance(state, dict) else None
        if not isinstance(state, dict) or not isinstance(theirs, dict):
            raise CheckpointError(f"{path} is no state of a training")
        differ = [f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in mine if theirs.get(k) != mine[k]]
        if differ:
            raise ValueError(f"{self.folder} holds a training with other settings ({'; '.join(differ)})")
        with refusing(path, "is no whole state of this training"):
            self._take_over(state)
        say(f"going on from step {self.step} of {self.settings.steps}")

    def _take_over(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        shapes = {name: (ema.shape, ema.dtype) for name, ema in self.ema.items()}
        if {name: (ema.shape, ema.dtype) for name, ema in state["ema"].items()} != shapes:
            raise ValueError("the averaged weights have other names, shapes or dtypes")
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = int(state["step"]), float(state["seconds"]), list(state["log"])

    def export(self) -> None:
        """Writes the averaged weights as a bfloat16 checkpoint, the plot of the loss and a grid of samples."""
        weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in self.ema.items()}
        Checkpoint(self.config, weights, self.data.palette, self.data.vocabulary).write(self.folder)
        report.plot(self.folder / "training" / "loss.png", self.log)
        report.sample_grid(
            self.folder / "training" / f"samples-{self.step:06d}.png",
            self.config,
            {name: tensor.float() for name, tensor in self.ema.items()},
            self.data.palette,
            self.data.vocabulary,
            seed=self.settings.seed,
            device=self.device,
        )


def _optimizers(network: Network, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and norms.

    Beside AdamW for everything, the same 2,400 images left 0.864 instead of 0.894 nats per held-out token.
    """
    matrices = [p for name, p in network.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for name, p in network.named_parameters() if not (".h." in name and p.ndim == 2)]
    muon = torch.optim.Muon(
        matrices,
        lr=2 * settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
