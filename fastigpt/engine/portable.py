"""The engine for any torch device: a static key-value cache and scaled_dot_product_attention, driven from Python.

Where nothing better runs it does the work, and it is the honest baseline of the engines that are better. Its one step
scores a window of tokens per image, each image at its own position: prefill, scoring, plain decoding and fixed-point
sampling are that step with different windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Drawing, Engine, Filled, Job, OnRow
from fastigpt.engine.arithmetic import converted, finite, undisturbed
from fastigpt.engine.memory import free_memory
from fastigpt.engine.window import WIDTHS, WindowTuner
from fastigpt.sampling import draw, guide

_PREFILL_WINDOW = 256  # tokens per prefill pass: bounds the score matrix to 256 × context per head
_MEMORY_SHARE = 0.6  # of the free memory, for the cache and the activations of a wave


@dataclass
class Cache:
    """Keys and values of every layer: [B, slots, n_head, head_dim]. Slot s holds the s-th input of the sequence."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def rows(self, index: torch.Tensor) -> Cache:
        """A copy with the given images only."""
        return Cache([k[index] for k in self.keys], [v[index] for v in self.values])


class PortableEngine:
    """float32, bfloat16 or float16; the cache has the same dtype. Weights as in ReferenceEngine."""

    name = "portable"

    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the portable engine runs in float32, bfloat16 or float16, not {self.dtype}")
        self.kv_dtype = kv_dtype or self.dtype
        if self.kv_dtype != self.dtype:
            raise ValueError(f"the portable engine keeps its cache in its own dtype: {self.dtype}, not {kv_dtype}")
        # F.linear wants [out, in]; embeddings, norms and the head already are as stored.
        self.weights = {}
        for name, tensor in weights.items():
            stored = converted(name, tensor, self.device, self.dtype)
            self.weights[name] = (stored.T if ".h." in name and stored.ndim == 2 else stored).contiguous()

    # --- the model -----------------------------------------------------------------------------------------------

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.config.layer_norm_epsilon)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _embed(self, ids: torch.Tensor, slots: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """ids: [B, W], a word where the slot is before the image's `offset`, else a colour or the start token."""
        w = self.weights
        pixel = (slots - offset[:, None]).clamp(0, self.config.n_pixels - 1)
        words = slots < offset[:, None]
        x = w["transformer.wte.weight"][ids.masked_fill(words, 0)] + w["transformer.wpe.weight"][pixel]
        if self.config.prompt_length and bool(words.any()):
            word = ids.masked_fill(~words, 0)
            position = slots.clamp(max=self.config.prompt_length - 1)
            x = torch.where(words[..., None], w["prompt.wte.weight"][word] + w["prompt.wpe.weight"][position], x)
        return x

    def _step(
        self,
        ids: torch.Tensor,
        first: torch.Tensor,
        offset: torch.Tensor,
        cache: Cache | None,
        n_layer: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, W, n_embd] of a window: ids [B, W] at slots first … first + W − 1 of each image.

        offset: [B], slots of the prompt (0 = none). cache=None: the window is the whole sequence, nothing is kept.
        """
        config = self.config
        batch, width = ids.shape
        slots = first[:, None] + torch.arange(width, device=self.device)
        x = self._embed(ids, slots, offset)
        # Image b may look at slots up to its own; those beyond hold nothing yet, or stale guesses.
        end = width if cache is None else int(first.max()) + width
        mask = None
        if cache is not None:
            mask = (torch.arange(end, device=self.device) <= slots[..., None])[:, None]  # [B, 1, W, end]
        image = torch.arange(batch, device=self.device)[:, None]
        for i in range(config.n_layer if n_layer is None else n_layer):
            block = f"transformer.h.{i}"
            qkv = self._linear(self._norm(x, block + ".ln_1.weight"), block + ".attn.c_attn")
            q, k, v = qkv.view(batch, width, 3, config.n_head, config.head_dim).unbind(2)
            if cache is not None:
                cache.keys[i][image, slots] = k
                cache.values[i][image, slots] = v
                k, v = cache.keys[i][:, :end], cache.values[i][:, :end]
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=cache is None
            )
            x = x + self._linear(y.transpose(1, 2).reshape(batch, width, config.n_embd), block + ".attn.c_proj")
            h = self._linear(self._norm(x, block + ".ln_2.weight"), block + ".mlp.c_fc")
            x = x + self._linear(h * torch.sigmoid(1.702 * h), block + ".mlp.c_proj")
        return x

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._norm(x, "transformer.ln_f.weight"), self.weights["lm_head.weight"]).float()

    # --- scoring -------------------------------------------------------------------------------------------------

    @undisturbed
    def hidden(self, tokens: torch.Tensor, layer: int, prompt: torch.Tensor | None = None) -> torch.Tensor:
        x = self._whole(tokens, prompt, layer)
        last = layer == self.config.n_layer
        gain = "transformer.ln_f.weight" if last else f"transformer.h.{layer}.ln_1.weight"
        return finite(self._norm(x, gain).float(), self)

    @undisturbed
    def logits(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        return finite(self._head(self._whole(tokens, prompt, self.config.n_layer)), self)

    def _whole(self, tokens: torch.Tensor, prompt: torch.Tensor | None, n_layer: int) -> torch.Tensor:
        ids, offset = self._sequence(tokens, prompt)
        x = self._step(ids[:, :-1], torch.zeros_like(offset), offset, None, n_layer)
        return x[:, x.shape[1] - tokens.shape[1] :]

    def _sequence(self, tokens: torch.Tensor, prompt: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, (prompt_length +) 1 + T]: words, start token, tokens; and the number of words of each image."""
        tokens = tokens.to(self.device)
        start = torch.full_like(tokens[:, :1], self.config.start_token)
        parts = [start, tokens] if prompt is None else [prompt.to(self.device), start, tokens]
        words = 0 if prompt is None else prompt.shape[1]
        return torch.cat(parts, 1), torch.full((len(tokens),), words, device=self.device)

    # --- filling -------------------------------------------------------------------------------------------------

    @undisturbed
    def fill(self, job: Job, on_row: OnRow | None = None) -> Filled:
        tuner = WindowTuner(job.window)
        wave = _Wave(self, job, widest=max(WIDTHS) if job.window == "auto" else int(job.window))
        rows_done = 0
        while True:
            done = wave.finished_rows()
            for row in range(rows_done, done):
                if on_row is not None:
                    columns = slice(row * self.config.width, (row + 1) * self.config.width)
                    on_row(range(len(job.tokens)), row, wave.tokens[:, columns].cpu())
            rows_done = done
            if done == self.config.height:
                return Filled(wave.tokens.cpu(), wave.pass_starts.cpu())
            width = tuner.width()
            started = time.perf_counter()
            kept = wave.advance(width)
            tuner.record(width, time.perf_counter() - started, kept)

    def max_batch(self, job: Job) -> int:
        lanes = 1 if job.drawing.guidance_scale is None else 2
        slots = self.config.context + max(WIDTHS)
        engines = [self] if job.draft is None else [self, job.draft]
        cache = sum(2 * e.config.n_layer * slots * e.config.n_embd * e.kv_dtype.itemsize for e in engines)
        # Compaction holds a second copy of the images that are left, at most half of them.
        activations = 8 * max(WIDTHS) * (self.config.inner + slots * self.config.n_head) * 4
        return max(1, int(_MEMORY_SHARE * free_memory(self.device) / (lanes * (1.5 * cache + activations))))

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        config, device = self.config, self.device
        shape = (n, position + window, config.n_head, config.head_dim)
        layers = range(config.n_layer)
        cache = Cache(*([torch.randn(shape, device=device).to(self.dtype) for _ in layers] for _ in "kv"))
        ids = torch.zeros(n, window, dtype=torch.int64, device=device)
        first, offset = torch.full((n,), position, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        index = torch.arange(n, device=device)[:, None]
        places = torch.arange(window, device=device) + position

        @torch.inference_mode()
        def run() -> None:
            draw(self._head(self._step(ids, first, offset, cache)), index, places, Drawing())

        return run


class _Wave:
    """The images of one job while they are drawn: tokens, guesses, caches, and how far each image has come."""

    def __init__(self, engine: PortableEngine, job: Job, widest: int) -> None:
        config, device = engine.config, engine.device
        self.engine, self.drawing = engine, job.drawing
        self.tokens = job.tokens.to(device, copy=True)
        self.index = job.index.to(device)
        self.known = self.tokens >= 0
        self.pass_starts = torch.zeros_like(self.known)
        # After its last unknown token nothing of an image has to be looked at.
        places = torch.arange(1, config.n_pixels + 1, device=device)
        self.end = (~self.known * places).amax(1)
        # position: the next one of each image to decide. Everything before it is in `tokens`; inputs up to the one
        # before the last decided token are in the cache.
        self.position = self._skip_tail(_leading_known(self.known), torch.arange(len(self.tokens), device=device))
        self.alive = torch.arange(len(self.tokens), device=device)  # images that have a lane in the caches
        self.guesses = torch.cat([self.tokens.clamp(min=0), self.tokens.new_zeros(len(self.tokens), widest)], 1)
        self.scored = self.position.clone()  # one past the last position that has been drawn, rightly or not
        self.wrong = torch.full_like(self.position, -1)  # what the last decided token was taken for, if for another
        self.lanes = _Lanes(engine, job, self.position, widest)
        self.draft = None if job.draft is None else _Lanes(_portable(job.draft), job, self.position, widest)
        self._drop_finished()

    def finished_rows(self) -> int:
        return int(self.position.min()) // self.engine.config.width

    def advance(self, width: int) -> float:
        """One pass: scores a window of every unfinished image and keeps the guesses that agree with the draw.
        Returns how many tokens each image kept, on average."""
        engine, n_pixels = self.engine, self.engine.config.n_pixels
        alive = self.alive
        position = self.position[alive]
        if self.draft is not None:
            self._guess_with(self.draft, width)
        else:
            self._guess(width)
        window = position[:, None] + torch.arange(width, device=engine.device)  # may run past the last pixel
        inside = window < n_pixels
        ids = torch.cat([self._input(position)[:, None], self.guesses[alive[:, None], window[:, :-1]]], 1)
        scores = self.lanes.logits(ids, position)
        index = self.index[alive]
        drawn = draw(scores, index[:, None], window, self.drawing)
        at = window.clamp(max=n_pixels - 1)
        drawn = torch.where(self.known[alive[:, None], at], self.tokens[alive[:, None], at], drawn)
        # Slot j is decided if all guesses before it were right; the first always is.
        right = (self.guesses[alive[:, None], window] == drawn)[:, :-1] & inside[:, 1:]
        kept = (1 + right.long().cumprod(1).sum(1)) * (position < n_pixels)
        decided = torch.arange(width, device=engine.device) < kept[:, None]
        image = alive[:, None].expand_as(window)
        self.tokens[image[decided], window[decided]] = drawn[decided]
        last = (position + kept - 1).clamp(min=0)
        taken_for = self.guesses[alive, last]
        self.guesses[image, window] = torch.where(self.known[image, at], self.guesses[image, window], drawn)
        self.wrong[alive] = torch.where(taken_for == self.guesses[alive, last], -1, taken_for)
        self.scored[alive] = position + width
        unfinished = position < n_pixels
        self.pass_starts[alive[unfinished], position[unfinished]] = True
        self.position[alive] = self._skip_tail(position + kept, alive)
        self._drop_finished()
        return float(kept.sum() / unfinished.sum())

    def _skip_tail(self, position: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.where(position >= self.end[images], self.engine.config.n_pixels, position)

    def _guess(self, width: int) -> None:
        """Guesses for a window: what the last pass drew there, except that a draw which repeats the token that turned
        out wrong, and every position not drawn yet, takes the token to its left."""
        alive, n_pixels = self.alive, self.engine.config.n_pixels
        slots = self.position[alive][:, None] + torch.arange(-1, width - 1, device=self.engine.device)
        image, inside = alive[:, None], slots.clamp(0, n_pixels - 1)
        drawn = self.guesses[image, slots.clamp(min=0)]
        copies = (slots >= self.scored[image]) | (drawn == self.wrong[image])
        copies &= (slots < n_pixels) & ~self.known[image, inside]
        copies[:, 0] = False
        place = torch.arange(width, device=self.engine.device).expand_as(slots)
        source = place.masked_fill(copies, 0).cummax(1).values
        self._note_guesses(image.expand_as(slots)[:, 1:], slots[:, 1:], drawn.gather(1, source)[:, 1:])

    def _guess_with(self, draft: _Lanes, width: int) -> None:
        """Guesses for a window from a smaller model, which draws them one at a time with the same noise."""
        position, index, last = self.position[self.alive], self.index[self.alive], self.engine.config.n_pixels - 1
        # Of the tokens decided since its last pass it may not have read the last two. At position 0 there is but one
        # input.
        first = (position - 1).clamp(min=0)
        ids = torch.stack([self._input(first), self._input(position.clamp(max=last))], 1)
        logits = draft.logits(ids, first)[torch.arange(len(position), device=self.engine.device), position - first]
        for place in range(width - 1):
            slots = position + place
            guess = draw(logits, index, slots, self.drawing)
            self._note_guesses(self.alive, slots, guess)
            if place + 2 < width:
                ids = self.guesses[self.alive, slots][:, None]
                logits = draft.logits(ids, slots + 1)[:, 0]

    def _input(self, position: torch.Tensor) -> torch.Tensor:
        """What the model reads to score a decided position: the token before it, or start."""
        token = self.tokens[self.alive, (position - 1).clamp(min=0)]
        return torch.where(position > 0, token, self.engine.config.start_token)

    def _note_guesses(self, images: torch.Tensor, slots: torch.Tensor, guess: torch.Tensor) -> None:
        n_pixels = self.engine.config.n_pixels
        unknown = (slots < n_pixels) & ~self.known[images, slots.clamp(max=n_pixels - 1)]
        self.guesses[images[unknown], slots[unknown]] = guess[unknown]

    def _drop_finished(self) -> None:
        """Finished images keep their lane, unused, until half of the lanes are: compacting copies the caches."""
        still = self.position[self.alive] < self.engine.config.n_pixels
        if 2 * int(still.sum()) > len(still):
            return
        keep = torch.nonzero(still).flatten()
        self.alive = self.alive[keep]
        self.lanes.keep(keep)
        if self.draft is not None:
            self.draft.keep(keep)


class _Lanes:
    """The caches of a wave on one engine. With guidance every image has two lanes: with its prompt and without."""

    def __init__(self, engine: PortableEngine, job: Job, position: torch.Tensor, widest: int) -> None:
        self.engine, self.scale = engine, job.drawing.guidance_scale
        # A draft that cannot read the prompt guesses without it.
        if job.prompt is not None and engine.config.prompt_length != job.prompt.shape[1]:
            job, self.scale = replace(job, prompt=None), None
        prompts = [job.prompt] if self.scale is None else [job.prompt, None]
        slots = engine.config.context + widest
        self.caches = [_prefill(engine, job, prompt, position, slots) for prompt in prompts]

    def logits(self, ids: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """float32 [n, W, n_colors], guided: of inputs ids [n, W] that score positions first … first + W − 1."""
        engine = self.engine
        found = [
            finite(engine._head(engine._step(ids, first + offset, offset, cache)), engine)
            for cache, offset in self.caches
        ]
        return found[0] if self.scale is None else guide(found[0], found[1], self.scale)

    def keep(self, rows: torch.Tensor) -> None:
        self.caches = [(cache.rows(rows), offset[rows]) for cache, offset in self.caches]


def _portable(engine: Engine) -> PortableEngine:
    if not isinstance(engine, PortableEngine):
        raise ValueError(f"the portable engine takes drafts from portable engines, not from {engine.name}")
    return engine


def _leading_known(known: torch.Tensor) -> torch.Tensor:
    """[n]: how many leading tokens of each image are known."""
    return known.long().cumprod(1).sum(1)


def _prefill(
    engine: PortableEngine, job: Job, prompt: torch.Tensor | None, position: torch.Tensor, slots: int
) -> tuple[Cache, torch.Tensor]:
    """A cache [n, slots] that holds all inputs before each image's first unknown token but one, computed once for each
    source, and the prompt offsets [n]. The last input before a position is fed by the pass that decides it."""
    config, device = engine.config, engine.device
    # A source's images are neighbours with the same prefix: its first image stands for all.
    firsts = torch.nonzero(torch.cat([torch.tensor([True], device="cpu"), job.source[1:] != job.source[:-1]])).flatten()
    ids, offset = engine._sequence(job.tokens[firsts].clamp(min=0), None if prompt is None else prompt[firsts])
    shape = (len(firsts), slots, config.n_head, config.head_dim)
    cache = Cache(
        [torch.zeros(shape, dtype=engine.dtype, device=device) for _ in range(config.n_layer)],
        [torch.zeros(shape, dtype=engine.dtype, device=device) for _ in range(config.n_layer)],
    )
    # Shorter prefixes are padded by what follows: those slots are overwritten before anything looks at them.
    needed = torch.where(position[firsts.to(device)] < config.n_pixels, position[firsts.to(device)] + offset, 0)
    longest = int(needed.max())
    for first in range(0, longest, _PREFILL_WINDOW):
        window = ids[:, first : min(first + _PREFILL_WINDOW, longest)]
        engine._step(window, torch.full_like(offset, first), offset, cache)
    member = torch.searchsorted(firsts, torch.arange(len(job.tokens), device="cpu"), right=True) - 1
    member = member.to(device)
    if len(firsts) == len(job.tokens):
        return cache, offset
    return cache.rows(member), offset[member]
