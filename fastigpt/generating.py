"""`generate`: drawing as transformers' class of the same model spells it, with ids that begin with a start token."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Unpack

import numpy as np
import torch

from fastigpt.arguments import flag, int64_tensor, token_array, whole
from fastigpt.chunks import Repeated
from fastigpt.filling import Fills
from fastigpt.options import DEFAULTS, DrawOptions
from fastigpt.sampling import fresh_seed, seed_of
from fastigpt.signatures import takes_options


class Generates(Fills):
    """Of models whose ids are one start token and then the tokens of a canvas."""

    @property
    @abstractmethod
    def start_token(self) -> int:
        """The id that every sequence begins with."""

    @takes_options(DEFAULTS)
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        num_return_sequences: int = 1,
        generator: torch.Generator | None = None,
        **options: Unpack[DrawOptions],
    ) -> torch.Tensor:
        """int64 [B · num_return_sequences, T]: as transformers' generate, faster. Ids begin with the start token.

        input_ids: int64 [B, 1 + known pixels]. Without max_length or max_new_tokens the whole canvas is drawn.
        max_length: T, the start token included. do_sample=False takes the argmax, whatever temperature, top_k and
        top_p say. num_return_sequences: for each row of input_ids. The seed comes from `seed`, else from `generator`,
        else from the system.
        """
        n_positions = self.spec.n_positions
        given = self._checked_ids(input_ids)
        copies = whole("num_return_sequences", num_return_sequences, 1)
        if max_length is not None and max_new_tokens is not None:
            raise ValueError("give max_length or max_new_tokens, not both")
        end = n_positions + 1
        if max_length is not None:
            end = whole("max_length", max_length, given.shape[1] + 1, n_positions + 1)
        if max_new_tokens is not None:
            end = given.shape[1] + whole("max_new_tokens", max_new_tokens, 1, n_positions + 1 - given.shape[1])
        do_sample = flag("do_sample", do_sample)
        if not do_sample and copies > 1:
            raise ValueError(f"num_return_sequences is {copies}, but without do_sample all would be the same")
        if options.get("seed") is None:
            options["seed"] = fresh_seed() if generator is None else seed_of(generator)
        if not do_sample:
            options.update({"temperature": 0.0, "top_k": None, "top_p": None})
        tokens = torch.full((len(given), n_positions), -1, dtype=torch.int64, device="cpu")
        tokens[:, : given.shape[1] - 1] = given[:, 1:]
        how: Any = {**options, "progress": False}
        filled = self._draw(Repeated(tokens, copies), how, "tokens", return_stats=False, stop=end - 1)
        start = torch.full((len(filled), 1), self.start_token, dtype=torch.int64, device="cpu")
        result = torch.cat([start, filled[:, : end - 1]], 1)
        return result.to(input_ids.device) if isinstance(input_ids, torch.Tensor) else result

    def _checked_ids(self, input_ids: torch.Tensor | np.ndarray) -> torch.Tensor:
        n_positions, start = self.spec.n_positions, self.start_token
        input_ids = int64_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or len(input_ids) == 0 or not 1 <= input_ids.shape[1] <= n_positions:
            raise ValueError(f"input_ids must be [B, 1 to {n_positions}], not {list(input_ids.shape)}")
        if bool((input_ids[:, 0] != start).any()):
            raise ValueError(f"input_ids must begin with the start token, {start}")
        if input_ids.shape[1] > 1:
            token_array("input_ids after the start token", input_ids[:, 1:], self.spec)
        return input_ids
