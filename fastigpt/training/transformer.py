"""The second stage of a model of tokens: a Llama that learns which codes follow a caption, and the finished checkpoint.

Reads the VQ of the first stage (training/tokenizer.py), encodes scenes once, and writes `out` as a checkpoint in
Janus's layout. One in ten scenes is shown without its caption: pads stand for it, as they do when guidance leads away
from a prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from fastigpt.codecs.vq_networks import CODEBOOK, VQConfig
from fastigpt.errors import CheckpointError
from fastigpt.families import janus_files
from fastigpt.families.chat import ChatReader
from fastigpt.families.chat import read as read_tokenizer
from fastigpt.families.janus import TOKENIZER, Janus, JanusConfig
from fastigpt.families.named_tensors import take_vq
from fastigpt.files import replacing
from fastigpt.lazy_tensors import open_safetensors
from fastigpt.scenes import scene_at
from fastigpt.scenes.captions import PROMPT_LENGTH, WORDS, caption
from fastigpt.training.data import HELD_OUT_SEED
from fastigpt.training.janus_network import TrainableJanus
from fastigpt.training.run import say
from fastigpt.training.stages import Stage, StageSettings
from fastigpt.training.tokenizer import SIDE, pictures, weights_file
from fastigpt.training.vq_network import TrainableVQ
from fastigpt.untrusted import exists, refusing

DEFAULTS = StageSettings(steps=12_000, batch_size=24, learning_rate=3e-3, seed=0)
SIZES = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "head_dim": 64, "width": 256, "n_inner": 704}
N_SCENES = 80_000
_ROUND, _AT_ONCE = 400, 8  # scenes that are encoded between two writes, and in one pass
_DROPOUT = 0.1
_HELD_OUT = 64
_WEIGHT_DECAY = 0.05


class TransformerStage(Stage):
    """n_scenes: that are encoded and shown over and over, each time in another order and with other captions. compile:
    with torch.compile, which rounds sums otherwise."""

    name = "transformer"

    def __init__(
        self,
        folder: Path,
        settings: StageSettings,
        *,
        n_scenes: int = N_SCENES,
        sizes: dict[str, int] = SIZES,
        side: int = SIDE,
        compile: bool = False,
    ) -> None:
        super().__init__(folder, settings)
        self.vq, self.vq_weights = trained_vq(folder)
        self.n_scenes, self.side, edge = n_scenes, side, side // self.vq.patch
        self.init: str | None = None
        self.tokenizer = janus_files.word_tokenizer(WORDS[1:])
        self.config = JanusConfig(
            **sizes,
            vocabulary=len(WORDS) - 1 + 5,
            n_codes=self.vq.n_codes,
            code_dim=self.vq.code_dim,
            height=edge,
            columns=edge,
            prompt_length=PROMPT_LENGTH + janus_files.AROUND,
        )
        self.reader = _reader(self.tokenizer, self.config)
        self.network = self.janus = TrainableJanus(self.config, seed=settings.seed)
        self._nats = torch.compile(self.janus.nats, dynamic=False) if compile else self.janus.nats
        with torch.no_grad():  # codes that look alike begin alike
            entries = F.normalize(self.vq_weights[CODEBOOK], dim=-1)
            self.janus.parameters_by_name["generation_embeddings/weight"].copy_(entries)
        muon = torch.optim.Muon(
            self.janus.matrices(),
            lr=2 * settings.learning_rate,
            weight_decay=_WEIGHT_DECAY,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        adam = torch.optim.AdamW(
            self.janus.others(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.optimizers = [muon, adam]
        self.codes = torch.empty(0, dtype=torch.int16)  # see `prepare`

    def identity(self) -> dict[str, Any]:
        return {"n_scenes": self.n_scenes, "init": self.init} | dataclasses.asdict(self.config)

    def begin_from(self, name: str, begun: Janus) -> None:
        """Takes its weights for the first step's. name: what a run that goes on is compared by. Raises ValueError for
        another model: of other sizes or words, or whose codes mean something else."""
        if begun.config != self.config or begun.reader.tokenizer != self.tokenizer:
            raise ValueError(f"init={name!r} is no model of captions and scenes as this stage trains them")
        written = {key: tensor.to(torch.bfloat16) for key, tensor in self.vq_weights.items()}
        if begun.vq != self.vq or not all(torch.equal(begun.vq_weights[key], x) for key, x in written.items()):
            raise ValueError(f"init={name!r} has another VQ than {self.folder}: its codes look otherwise")
        self.init = name
        self.janus.take(begun.weights)

    def loss(self, first: int, n: int) -> torch.Tensor:
        picked, prefixes = [], []
        for epoch, place in (divmod(k, self.n_scenes) for k in range(first, first + n)):
            picked.append(int(self._order(epoch)[place]))
            prefixes.append(self._prefix(picked[-1], epoch))
        codes = self.codes[picked].long()
        ids, places = self.janus.inputs(prefixes, codes, self.config.prompt_length)  # always of one shape
        self.janus.train()
        with torch.autocast("cpu", torch.bfloat16):
            return self._nats(ids, places, codes)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.settings.seed, epoch]).permutation(self.n_scenes)

    def _prefix(self, index: int, epoch: int) -> tuple[int, ...]:
        """Of a scene's caption, or of none: another one in every epoch."""
        rng = np.random.default_rng([self.settings.seed, index, epoch])
        prefix = self.reader.prefix(caption(scene_at(self.settings.seed, index)[0], rng))
        if rng.random() >= _DROPOUT:
            return prefix
        return self.reader.unconditional(prefix if rng.random() < 0.5 else self.reader.prefix(""))

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Nats per code of scenes that are never trained on, after their captions and after none."""
        codes = self._encode(HELD_OUT_SEED, 0, _HELD_OUT)
        told = [self.reader.prefix(caption(*scene_at(HELD_OUT_SEED, k))) for k in range(_HELD_OUT)]
        plain = [self.reader.unconditional(self.reader.prefix(""))] * _HELD_OUT
        self.janus.eval()
        sums = {"held_out": 0.0, "held_out_prompt": 0.0}
        for name, prefixes in (("held_out", plain), ("held_out_prompt", told)):
            for first in range(0, _HELD_OUT, 16):
                part = slice(first, first + 16)
                with torch.autocast("cpu", torch.bfloat16):
                    sums[name] += self.janus.loss(prefixes[part], codes[part]).item() * len(codes[part])
        return {name: total / _HELD_OUT for name, total in sums.items()}

    def export(self) -> None:
        janus_files.write(self.folder, self.config, self.janus.tensors(), self.vq, self.vq_weights, self.tokenizer)

    # --- scenes as codes -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Encodes the scenes, int16 [n_scenes, h·w], once; a run that was killed goes on from what was written."""
        file = self.folder / "training" / "codes.safetensors"
        vq = hashlib.sha256(weights_file(self.folder).read_bytes()).hexdigest()
        made_by = {"vq": vq, "seed": str(self.settings.seed)}
        done = _kept_codes(file, made_by, self.config.height * self.config.columns)
        while len(done) < self.n_scenes:
            more = self._encode(self.settings.seed, len(done), min(_ROUND, self.n_scenes - len(done)))
            done = torch.cat([done, more.to(torch.int16)])
            with replacing(file) as path:
                save_file({"codes": done}, path, metadata=made_by)
            say(f"{self.name}: encoded {len(done)} of {self.n_scenes} scenes")
        self.codes = done[: self.n_scenes]

    @cached_property
    def _encoder(self) -> TrainableVQ:
        encoder = TrainableVQ(self.vq, seed=0).eval()
        encoder.take(self.vq_weights)
        return encoder

    def _encode(self, seed: int, first: int, n: int) -> torch.Tensor:
        """int64 [n, h·w] of scenes first, …, first + n − 1, parts of them in threads of their own."""
        encoder = self._encoder

        @torch.no_grad()
        def part(k: int) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return encoder.codes(pictures(seed, k, min(_AT_ONCE, first + n - k), self.side))

        with ThreadPoolExecutor(self.settings.parts) as threads:
            return torch.cat(list(threads.map(part, range(first, first + n, _AT_ONCE))))


def trained_vq(folder: Path) -> tuple[VQConfig, dict[str, torch.Tensor]]:
    """What the first stage left. Raises CheckpointError, also where it has not ended."""
    file = weights_file(folder)
    if not exists(file):
        raise CheckpointError(f"{file} is missing: train the tokenizer first (--stage tokenizer)")
    config, weights = take_vq(open_safetensors(file), str(file))
    return config, dict(weights)


def _kept_codes(file: Path, made_by: dict[str, str], canvas: int) -> torch.Tensor:
    """Those of an earlier run, if the same VQ made them of the same scenes."""
    empty = torch.empty(0, canvas, dtype=torch.int16)
    if not exists(file):
        return empty
    with refusing(file, "holds no codes of scenes"), safe_open(file, "pt") as stored:
        return stored.get_tensor("codes") if stored.metadata() == made_by else empty


def _reader(tokenizer: str, config: JanusConfig) -> ChatReader:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        path.write_text(tokenizer)
        return read_tokenizer(path, config.prompt_length, config.vocabulary)
