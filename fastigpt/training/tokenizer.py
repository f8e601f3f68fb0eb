"""The first stage of a model of tokens: a VQ that learns to draw 128 × 128 scenes with 256 codes each.

Writes `out/training/vq.safetensors`, which the second stage (training/transformer.py) reads, and beside it the state it
goes on from.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fastigpt.codecs.vq_networks import VQConfig
from fastigpt.files import replacing
from fastigpt.scenes import scenes
from fastigpt.training.data import HELD_OUT_SEED
from fastigpt.training.stages import Stage, StageSettings
from fastigpt.training.vq_network import TrainableVQ

SIDE = 128
CONFIG = VQConfig(base=32, multipliers=(1, 1, 2, 4), res_blocks=1, latent=128, n_codes=1024, code_dim=8)
DEFAULTS = StageSettings(steps=8000, batch_size=4, learning_rate=3e-3, seed=0)
UNQUANTISED = 200  # steps, the first ones, in which vectors are not replaced by entries
_HELD_OUT = 24


def pictures(seed: int, first: int, n: int, side: int) -> torch.Tensor:
    """float32 [n, 3, side, side] in [−1, 1]."""
    drawn = np.stack([image for image, _, _ in itertools.islice(scenes(seed, first, side), n)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


class TokenizerStage(Stage):
    name = "tokenizer"

    def __init__(self, folder: Path, settings: StageSettings, config: VQConfig = CONFIG, side: int = SIDE) -> None:
        super().__init__(folder, settings)
        self.config, self.side = config, side
        self.network = self.vq = TrainableVQ(config, seed=settings.seed)
        muon = torch.optim.Muon(
            self.vq.matrices(),
            lr=settings.learning_rate,
            weight_decay=0.0,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        adam = torch.optim.AdamW(
            self.vq.vectors(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.optimizers = [muon, adam]
        self._seen: dict[int, torch.Tensor] = {}  # vectors of the parts of a batch, by first image

    def identity(self) -> dict[str, Any]:
        return {"side": self.side} | {k: _plain(v) for k, v in dataclasses.asdict(self.config).items()}

    def loss(self, first: int, n: int) -> torch.Tensor:
        images = pictures(self.settings.seed, first, n, self.side)
        self.vq.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss, seen = self.vq.loss(images, quantised=self.step >= UNQUANTISED)
        self._seen[first] = seen
        return loss

    def after(self, step: int) -> None:
        rows = torch.cat([rows for _, rows in sorted(self._seen.items())])
        self._seen.clear()
        if step >= UNQUANTISED:
            self.vq.codebook.follow(rows)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """loss; psnr: of what the codes show, in dB; used: entries that these pictures need."""
        images = pictures(HELD_OUT_SEED, 0, _HELD_OUT, self.side)
        self.vq.eval()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.vq.loss(images)[0].item()
            codes = self.vq.codes(images)
            edge = self.side // self.config.patch
            shown = self.vq.shown(codes, edge, edge)
        error = (shown - images).square().mean((1, 2, 3))
        return {
            "held_out": loss,
            "psnr": float((10 * torch.log10(4 / error)).mean()),
            "used": float(len(codes.unique())),
        }

    def export(self) -> None:
        with replacing(weights_file(self.folder)) as path:
            save_file({name: tensor.contiguous() for name, tensor in self.vq.tensors().items()}, path)


def weights_file(folder: Path) -> Path:
    return folder / "training" / "vq.safetensors"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value
