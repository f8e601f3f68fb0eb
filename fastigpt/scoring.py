"""What a model says of tokens that are known: logits, likelihoods and hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastigpt.arguments import is_int64, token_array, whole
from fastigpt.engine.arithmetic import finite
from fastigpt.filling import Fills
from fastigpt.prompts import prefixes
from fastigpt.scalars import shown

_SCORING_BATCH = 16  # images scored at a time by nll and features

Prefixes = list[tuple[int, ...]] | None
Score = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class Scores(Fills):
    """The scoring calls of Model, which has the rest."""

    @abstractmethod
    def encode(self, images: Any) -> torch.Tensor: ...

    def logits(self, tokens: torch.Tensor, *, prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """float32 [B, T, n_tokens]: [:, i] scores token i given tokens[:, :i]. tokens: int64 [B, T], T ≤ h·w, without
        what is read before them."""
        self._require_head()
        checked = token_array("tokens", tokens, self.spec)
        return self._logits(checked, self._read(prompt, len(checked)))

    def _read(self, prompt: str | Sequence[str] | None, count: int) -> Prefixes:
        """What is read before the tokens of each image; None: no prompt."""
        return None if prompt is None else prefixes(prompt, count, self.reader)

    def _logits(self, tokens: torch.Tensor, read: Prefixes) -> torch.Tensor:
        def score(tokens: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
            with self._named():
                return finite(self.engine.logits(tokens, prefix).float(), self.engine)

        return self._scored(tokens, read, score)

    def _scored(self, tokens: torch.Tensor, read: Prefixes, score: Score) -> torch.Tensor:
        """score(tokens, prefix) of all images, in their order: engines take prefixes of one length at a time."""
        if read is None:
            self._check_overflow(tokens, None)
            return score(tokens, None)
        found: torch.Tensor | None = None
        for index, prefix in self.spec.by_length(read):
            self._check_overflow(tokens[index], prefix)
            part = score(tokens[index], prefix)
            if len(index) == len(tokens):
                return part
            if found is None:
                found = part.new_empty(len(tokens), *part.shape[1:])
            found[index] = part
        assert found is not None
        return found

    def nll(self, tokens: torch.Tensor, *, prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """float32 [B]: mean negative log-likelihood, nats per token. tokens: int64 [B, T], T ≤ h·w."""
        self._require_head()
        checked = token_array("tokens", tokens, self.spec)
        read = self._read(prompt, len(checked))
        parts = []
        for first in range(0, len(checked), _SCORING_BATCH):
            batch = slice(first, first + _SCORING_BATCH)
            logits = self._logits(checked[batch], None if read is None else read[batch])
            target = checked[batch].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            parts.append(loss.mean(1).cpu())
        return torch.cat(parts)

    def features(
        self,
        images_or_tokens: Any,
        layer: int | None = None,
        pool: str | None = "mean",
        *,
        prompt: str | Sequence[str] | None = None,
    ) -> torch.Tensor:
        """float32 [n, width] (pool="mean") or [n, h·w, width] (pool=None): the normed hidden state after `layer`
        blocks (0 to n_layer; None: the middle one), as in the paper's linear probes."""
        depth = self.spec.n_layer // 2 if layer is None else whole("layer", layer, 0, self.spec.n_layer)
        if not (pool is None or (isinstance(pool, str) and pool == "mean")):
            raise ValueError(f'pool must be "mean" or None, not {shown(pool)}')
        if is_int64(images_or_tokens):
            tokens = token_array("tokens", images_or_tokens, self.spec, whole_canvas=True)
        else:
            tokens = self.encode(images_or_tokens)
        read = self._read(prompt, len(tokens))

        def score(tokens: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
            with self._named():
                return finite(self.engine.hidden(tokens, depth, prefix).float().cpu(), self.engine)

        parts = []
        for first in range(0, len(tokens), _SCORING_BATCH):
            batch = slice(first, first + _SCORING_BATCH)
            hidden = self._scored(tokens[batch], None if read is None else read[batch], score)
            parts.append(hidden.mean(1) if pool == "mean" else hidden)
        return torch.cat(parts)
