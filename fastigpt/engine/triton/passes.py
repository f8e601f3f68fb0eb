"""Passes that score `width` tokens of each canvas: their memory, their launches, and the graphs made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastigpt.engine.triton.block import Work, run_block
from fastigpt.engine.triton.cache import Cache, PrefixStore
from fastigpt.engine.triton.graphs import capture
from fastigpt.engine.triton.weights import Model
from fastigpt.kernels.canvases import Canvases, Steps
from fastigpt.kernels.decode_attention import decode_attention
from fastigpt.kernels.kv_cache import append_kv
from fastigpt.kernels.launch import SCALED_TYPES, settings
from fastigpt.kernels.norm_linear import uses_cublas
from fastigpt.kernels.online_softmax import part_scratch
from fastigpt.kernels.prefix_attention import Prefix, make_prefix
from fastigpt.kernels.sample_head import Scratch, make_scratch, sample_head

AT_ONCE = 8  # tokens per canvas that a graph scores at least: so many passes of one token, or one wide pass

Guess = Callable[["Passes"], None]
"""Replaces the guesses among the inputs of a pass."""


@dataclass(frozen=True)
class Seats:
    """What the passes of all widths share: the canvases, their own caches, and the prefixes they read.

    first_input: int64 [2 n], the last prefix element of every lane, which scores its first token.
    """

    canvases: Canvases
    cache: Cache
    store: PrefixStore | None
    first_input: torch.Tensor


@dataclass(frozen=True)
class Kind:
    """What a graph was captured for, besides the width: steps, and whether any lane reads a shared prefix; and the same
    of the draft that guesses for it."""

    steps: Steps
    shared: bool
    draft: Kind | None = None


@dataclass
class Passes:
    """Of n canvases: lane b of each, and if `guided` lane n + b."""

    model: Model
    seats: Seats
    width: int
    guided: bool
    graphs: dict[Kind, torch.cuda.CUDAGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, spec, width = self.model, self.model.spec, self.width
        n = len(self.seats.canvases.canvas)
        self.lanes = lanes = 2 * n if self.guided else n
        rows, heads, head_dim = lanes * width, spec.block.n_head, spec.block.head_dim
        # Keys and values go straight into the cache, except where scaling them needs a whole head or cuBLAS made them.
        self.straight = model.kv_dtype not in SCALED_TYPES and not uses_cublas(rows, model.configs)
        self.x = torch.zeros((rows, spec.width), dtype=torch.float32, device=model.device)
        self.inputs = torch.zeros((n, width), dtype=torch.int32, device=model.device)
        self.work = Work.empty(model, rows, straight=self.straight, scratch=True)
        name = "decode_attention_1" if width == 1 else "decode_attention"
        splits = settings(model.configs, name, lanes * heads, model.dtype)["splits"]
        arrivals = torch.zeros(lanes * heads, dtype=torch.int32, device=model.device)
        self.attention_scratch = (*part_scratch(splits, rows, heads, head_dim, model.device), arrivals)
        self.head_scratch: dict[Steps, Scratch] = {}
        self.prefixes: list[Prefix] = []  # of every layer, from when a prefix is shared first
        self.sources: list[int] | None = None  # what the prefixes were assigned last
        self.reads_shared = False  # in the pass under way

    @property
    def at_once(self) -> int:
        """Passes of one launch. Where nothing is replayed, more than one would only do too much at the end."""
        return max(1, AT_ONCE // self.width) if self.model.device.type == "cuda" else 1

    def enter(self, old: Passes | None, fresh: torch.Tensor) -> None:
        """Makes inputs and hidden states for where the canvases are. The guesses of a canvas are those of `old`, or, if
        it is fresh (bool [n]), the tokens above. Nothing of it visits the host, so it can be captured."""
        canvases, spec = self.seats.canvases, self.model.spec
        place = torch.arange(self.width, device=self.x.device)
        position = canvases.position[:, None].long() + place
        at = (position - 1).clamp(0, spec.n_positions - 1)  # input j is the token before position j
        known = canvases.canvas.gather(1, at)
        guess = canvases.canvas.gather(1, (at - spec.columns).clamp(min=0))
        guess = torch.where(guess >= 0, guess, known[:, :1])
        if old is not None:
            theirs = old.inputs[:, place.clamp(max=old.width - 1)]
            guess = torch.where(fresh[:, None], guess, theirs)
        self.inputs.copy_(torch.where(known >= 0, known, guess).clamp(min=0))
        self.embed()

    def embed(self) -> None:
        """The first hidden states of `inputs`, where they did not come out of the last pass."""
        canvases, model = self.seats.canvases, self.model
        position = canvases.position[:, None].long() + torch.arange(self.width, device=self.x.device)
        where = model.head.wpe[position.clamp(max=model.spec.n_positions - 1)].float()
        x = model.head.wte[self.inputs.long()].float() + where
        first = model.prefix_embedding[self.seats.first_input[: self.lanes]].float().view(-1, len(x), x.shape[-1])
        out = self.x.view(-1, *x.shape)
        out.copy_(x)
        begins = (canvases.position == 0)[:, None]
        out[:, :, 0] = torch.where(begins, first + where[:, 0], x[:, 0])

    def assign(self, sources: Sequence[int], shared: bool) -> None:
        """Lane b reads the shared prefix sources[b], −1: none. shared: whether passes look for any. Graphs stay as they
        are."""
        mine, store = list(sources[: self.lanes]), self.seats.store
        if not shared or store is None or mine == self.sources:
            return
        if self.prefixes:
            self.prefixes[0].assign(mine, self.width)
        else:
            model, (k, v, k_scale, v_scale) = self.model, store.cache.layer(0)
            first = make_prefix(k, v, store.lengths, mine, self.width, model.configs, model.dtype, k_scale, v_scale)
            self.prefixes = [first.of_layer(*store.cache.layer(i)) for i in range(model.spec.n_layer)]
        self.sources = mine

    # --- the launches of a pass --------------------------------------------------------------------------------------

    def projection(self, i: int) -> dict[str, Any]:
        if not self.straight:
            return {}
        k, v, _, _ = self.seats.cache.layer(i, self.lanes)
        return {"kv_cache": (k, v), "slots": self.seats.canvases.slots[: self.lanes], "window": self.width}

    def attend(self, i: int, qkv: torch.Tensor, out: torch.Tensor) -> bool:
        block, slots = self.model.spec.block, self.seats.canvases.slots[: self.lanes]
        shape = (self.lanes, self.width, block.n_head, block.head_dim)
        k, v, k_scale, v_scale = self.seats.cache.layer(i, self.lanes)
        if self.straight:
            q = qkv.view(shape)
        else:
            q, new_k, new_v = qkv.view(*shape[:2], 3, *shape[2:]).unbind(2)
            append_kv(new_k, new_v, k, v, slots, k_scale, v_scale)
        decode_attention(
            q, k, v, slots, configs=self.model.configs, k_scale=k_scale, v_scale=v_scale,
            prefix=self.prefixes[i] if self.reads_shared else None, out=out.view(shape),
            scratch=self.attention_scratch,
        )  # fmt: skip
        return True

    def one_pass(self, kind: Kind) -> None:
        """Scores the window of every canvas, keeps what stands, embeds the next inputs."""
        self.reads_shared = kind.shared
        for i in range(self.model.spec.n_layer):
            run_block(self.model, i, self.x, self.work, self)
        if kind.steps not in self.head_scratch:
            self.head_scratch[kind.steps] = make_scratch(
                len(self.inputs), self.width, self.model.head, kind.steps, self.model.configs
            )
        sample_head(
            self.x, self.inputs, self.model.head, self.seats.canvases, self.head_scratch[kind.steps], kind.steps,
            configs=self.model.configs,
        )  # fmt: skip

    def runner(self, kind: Kind, guess: Guess | None, stream: torch.cuda.Stream | None) -> Callable[[], None]:
        """Runs `at_once` passes: a graph's replay on a GPU; in the interpreter, where there is no stream, direct
        launches. guess: before each of them; the same whenever `kind` is."""

        def run(passes: int = self.at_once) -> None:
            for _ in range(passes):
                if guess is not None:
                    guess(self)
                self.one_pass(kind)

        if stream is None:
            return run
        if kind not in self.graphs:
            self.rehearse(lambda: run(1))
            self.graphs[kind] = capture(run, stream)
        return self.graphs[kind].replay

    def rehearse(self, run: Callable[[], None]) -> None:
        """Compiles and loads what `run` launches by launching it, with all canvases idle: that moves none of them and
        stores nothing in the caches."""
        canvases = self.seats.canvases
        touched = canvases.slots, canvases.end, self.inputs, self.x
        kept = [x.clone() for x in touched]
        canvases.slots.fill_(-1)
        canvases.end.zero_()
        run()
        for x, old in zip(touched, kept):
            x.copy_(old)
