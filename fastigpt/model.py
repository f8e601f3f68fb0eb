"""The model a user holds: images, tokens and prompts in, images out. Checks arguments, then hands jobs to an engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt import checkpoint, images, waves
from fastigpt.arguments import output_kind, prompt_ids, token_array, whole, window_size
from fastigpt.bundled import bundled_palette
from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Engine, Job, OnRow
from fastigpt.engine.choose import build
from fastigpt.palette import Palette
from fastigpt.particles import CANDIDATE, MOST
from fastigpt.particles import run as run_particles
from fastigpt.prompts import Vocabulary
from fastigpt.sampling import checked_drawing, fresh_seed
from fastigpt.streaming import RowStream
from fastigpt.waves import Stats

_SCORING_BATCH = 16  # images scored at a time by nll and features


class ImageGPT:
    """An Image GPT with an engine. Made by `from_pretrained`, `from_config` or `fastigpt.load`; safe to share between
    threads.

    config, palette (None if the checkpoint has none), vocabulary (None if the model reads no prompt), name, device,
    dtype, backend say what it is.
    """

    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        palette: Palette | None = None,
        vocabulary: Vocabulary | None = None,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        kv_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
    ) -> None:
        self.config, self.weights, self.palette, self.vocabulary, self.name = config, weights, palette, vocabulary, name
        self.engine: Engine = build(config, weights, backend=backend, device=device, dtype=dtype, kv_dtype=kv_dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        kv_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> ImageGPT:
        """Loads a local directory or a hub id: config.json; model.safetensors, whole or sharded, or pytorch_model.bin;
        the palette from preprocessor_config.json, clusters.npy or kmeans_centers.npy.

        device None: CUDA if there is one. dtype, kv_dtype None: what the engine does best. Raises CheckpointError.
        """
        folder = checkpoint.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        found = checkpoint.read(folder)
        return cls(
            found.config,
            found.weights,
            palette=found.palette,
            vocabulary=found.vocabulary,
            name=os.fspath(name_or_path),
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            backend=backend,
        )

    @classmethod
    def from_config(
        cls,
        config: ImageGPTConfig,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        kv_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
    ) -> ImageGPT:
        """Random weights, as transformers initialises them: normal with deviation 0.02, norms 1. For trying shapes and
        measuring; 512-colour models get the bundled palette, so that they can draw (noise)."""
        generator = torch.Generator().manual_seed(whole("seed", seed, 0, 2**63 - 1))
        weights = {
            name: torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)
            for name, shape in config.tensor_shapes().items()
        }
        palette = bundled_palette()
        return cls(
            config,
            weights,
            palette=palette if palette.n_colors == config.n_colors else None,
            name="random weights",
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            backend=backend,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a directory that `from_pretrained` and transformers open. Files are written beside and renamed."""
        checkpoint.write(directory, self.config, self.weights, self.palette, self.vocabulary)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def backend(self) -> str:
        return self.engine.name

    def __repr__(self) -> str:
        c = self.config
        return (
            f"ImageGPT({self.name!r}, {c.n_layer} layers × {c.n_embd}, {c.height}×{c.width}, "
            f"backend={self.backend!r}, device={str(self.device)!r}, dtype={self.dtype})"
        )

    # --- drawing -------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int = 1,
        *,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        window: int | str = "auto",
        draft: ImageGPT | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Draws n images.

        prompt: one for all or one for each, for models that read text; guidance_scale (≥ 0) strengthens it.
        seed: image k of a job is always the same picture: `sample(1, seed=s, first_index=k)`. None draws a seed; it is
        in `image.info["seed"]` of each PIL image and in the stats.
        temperature ≥ 0 (0: argmax), top_k ≥ 1, top_p in (0, 1]: as in transformers, applied in that order.
        output_type: "pil" list of images | "np" uint8 [n, H, W, 3] | "pt" uint8 [n, 3, H, W] | "tokens" int64 [n, H·W].
        batch_size: images at a time (None: what fits memory); window: tokens per pass (fixed-point sampling); draft: a
        smaller model with the same palette that guesses the windows. None of them changes the result. progress: None
        shows a bar if stderr is a terminal. return_stats: also returns Stats.
        """
        count = whole("n", n, 1)
        kind = self._checked_output(output_type)
        tokens = torch.full((count, self.config.n_pixels), -1, dtype=torch.int64)
        job, limit = self._job(
            tokens, prompt, guidance_scale, seed, first_index, temperature, top_k, top_p, batch_size, window, draft
        )
        filled, stats = self._run(job, limit, progress)
        result = self._output(filled, kind, stats.seed, int(job.index[0]))
        return (result, stats) if return_stats else result

    def complete(
        self,
        images: Any,
        n: int = 1,
        *,
        rows: int | None = None,
        mask: Any = None,
        particles: int = 1,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        window: int | str = "auto",
        draft: ImageGPT | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Draws n results for each image, keeping what is known exactly (as the palette has it); result j of image i
        comes at i·n + j.

        images: as for `encode`. What to draw anew, one of: rows = keep the first `rows` rows; mask (bool, True = draw
        anew) [H, W] or [n_images, H, W] at the size of the canvas or of the images; transparent parts of the images.
        particles: candidates per result. 1 draws each unknown cell from what is before it; more are resampled by how
        well they predict the known cells after the hole (see particles.py), and take as many times longer and more.
        Where nothing known follows the unknown cells they change nothing. prompt: one for all or one for each image.
        The other arguments are those of `sample`.
        """
        count = whole("n", n, 1)
        candidates = whole("particles", particles, 1, MOST)
        kind = self._checked_output(output_type)
        pictures = _pictures(images)
        known = self.known_cells(pictures, rows=rows, mask=mask)
        if prompt is not None and not isinstance(prompt, str):
            prompt = [text for text in prompt for _ in range(count)]
            if len(prompt) != len(pictures) * count:
                raise ValueError(f"prompt has {len(prompt) // count} entries for {len(pictures)} images")
        tokens = self._encode(pictures).masked_fill(~known, -1).repeat_interleave(count, 0)
        job, limit = self._job(
            tokens, prompt, guidance_scale, seed, first_index, temperature, top_k, top_p, batch_size, window, draft
        )
        filled, stats = self._run(job, limit, progress, particles=candidates)
        result = self._output(filled, kind, stats.seed, int(job.index[0]))
        return (result, stats) if return_stats else result

    def fill(
        self,
        tokens: torch.Tensor,
        *,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        window: int | str = "auto",
        draft: ImageGPT | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        on_row: OnRow | None = None,
        return_stats: bool = False,
    ) -> Any:
        """int64 [B, H·W]: the unknown tokens drawn in raster order, the known ones kept exactly.

        tokens: int64 [B, H·W], −1 = draw. on_row(images, row, tokens) is called with every finished row of every wave:
        a range of images, the row's number and its tokens int64 [len(images), W]. The other arguments are `sample`'s.
        """
        checked = token_array("tokens", tokens, self.config, unknown=True, whole_canvas=True)
        job, limit = self._job(
            checked, prompt, guidance_scale, seed, first_index, temperature, top_k, top_p, batch_size, window, draft
        )
        filled, stats = self._run(job, limit, progress, on_row=on_row)
        return (filled, stats) if return_stats else filled

    def _run(
        self, job: Job, limit: int | None, progress: bool | None, *, on_row: OnRow | None = None, particles: int = 1
    ) -> tuple[torch.Tensor, Stats]:
        count = len(job.tokens)
        if particles == 1:
            filled, seconds, count_waves = waves.run(
                self.engine, job, batch_size=limit, on_row=on_row, progress=progress
            )
        else:
            whole("first_index", int(job.index[0]), 0, CANDIDATE - count)  # above it the candidates have their noise
            filled, seconds, count_waves = run_particles(
                self.engine, job, particles, batch_size=limit, progress=progress
            )
        canvas = (count, self.config.height, self.config.width)
        drawn = (job.tokens < 0).view(canvas)
        return filled.tokens, Stats(job.drawing.seed, drawn, filled.pass_starts.view(canvas), seconds, count_waves)

    def _job(
        self,
        tokens: torch.Tensor,
        prompt: str | Sequence[str] | None,
        guidance_scale: float | None,
        seed: int | None,
        first_index: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        batch_size: int | None,
        window: int | str,
        draft: ImageGPT | str | os.PathLike[str] | None,
    ) -> tuple[Job, int | None]:
        """A job of checked arguments, and how many images to draw at a time."""
        count = len(tokens)
        used = fresh_seed() if seed is None else seed
        drawing = checked_drawing(used, temperature, top_k, top_p, guidance_scale)
        if guidance_scale is not None and prompt is None:
            raise ValueError("guidance_scale was given without a prompt to follow")
        start = whole("first_index", first_index, 0, 2**63 - count)
        words = prompt_ids(prompt, count, self.vocabulary)
        job = Job(
            tokens=tokens,
            index=torch.arange(count) + start,  # up to 2⁶³ − 1, which arange could not end behind
            source=waves.sources(tokens, words),
            prompt=words,
            drawing=drawing,
            window=window_size(window, self.config.n_pixels),
            draft=None if draft is None else self._drafting(draft),
        )
        return job, None if batch_size is None else whole("batch_size", batch_size, 1)

    def stream(
        self,
        tokens_or_n: torch.Tensor | int,
        *,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        window: int | str = "auto",
        draft: ImageGPT | str | os.PathLike[str] | None = None,
    ) -> RowStream:
        """`fill` (or `sample`, for a number) as an iterator of finished rows: (images, row, tokens), a range of images
        of the job, the row's number, and its tokens int64 [len(images), W]; every row of every image comes once.

        The work runs in a thread of its own, at most 32 rows ahead, and ends when the iterator is closed or dropped;
        arguments are checked at once. Any number of threads may sample, fill and stream from one model at the same
        time: each job gets the tokens it would get alone, and its own memory (a cache for all images of its wave).
        """
        if isinstance(tokens_or_n, (torch.Tensor, np.ndarray)):
            tokens = token_array("tokens_or_n", tokens_or_n, self.config, unknown=True, whole_canvas=True)
        else:
            tokens = torch.full((whole("tokens_or_n", tokens_or_n, 1), self.config.n_pixels), -1, dtype=torch.int64)
        job, limit = self._job(
            tokens, prompt, guidance_scale, seed, first_index, temperature, top_k, top_p, batch_size, window, draft
        )
        return RowStream(
            lambda on_row: waves.run(self.engine, job, batch_size=limit, on_row=on_row, progress=False),
            job.drawing.seed,
        )

    def _drafting(self, draft: ImageGPT | str | os.PathLike[str]) -> Engine:
        """The engine of a smaller model that may draft for this one."""
        if not isinstance(draft, ImageGPT):
            draft = _loaded_draft(os.fspath(draft), str(self.device), self.backend)
        mine, theirs = self.config, draft.config
        if (mine.height, mine.width, mine.n_colors) != (theirs.height, theirs.width, theirs.n_colors):
            raise ValueError(
                f"draft draws {theirs.height}×{theirs.width} in {theirs.n_colors} colours, "
                f"this model {mine.height}×{mine.width} in {mine.n_colors}"
            )
        if self.palette is not None and draft.palette is not None and self.palette != draft.palette:
            raise ValueError("draft has another palette: its tokens mean other colours")
        if (draft.backend, draft.device) != (self.backend, self.device):
            raise ValueError(
                f"draft runs on {draft.backend} ({draft.device}), this model on {self.backend} ({self.device})"
            )
        return draft.engine

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_return_sequences: int = 1,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        window: int | str = "auto",
    ) -> torch.Tensor:
        """int64 [B · num_return_sequences, T]: as transformers' generate, faster. Ids begin with the start token.

        input_ids: int64 [B, 1 + known pixels]. Without max_length or max_new_tokens the whole canvas is drawn.
        do_sample=False takes the argmax. The seed comes from `seed`, else from `generator`, else from the system.
        """
        config = self.config
        given = self._checked_ids(input_ids)
        copies = whole("num_return_sequences", num_return_sequences, 1)
        if max_length is not None and max_new_tokens is not None:
            raise ValueError("give max_length or max_new_tokens, not both")
        end = config.n_pixels + 1
        if max_length is not None:
            end = whole("max_length", max_length, given.shape[1] + 1, config.n_pixels + 1)
        if max_new_tokens is not None:
            end = given.shape[1] + whole("max_new_tokens", max_new_tokens, 1, config.n_pixels + 1 - given.shape[1])
        if not do_sample and copies > 1:
            raise ValueError(f"num_return_sequences is {copies}, but without do_sample all would be the same")
        if seed is None:
            seed = fresh_seed() if generator is None else int(torch.randint(0, 2**63 - 1, (), generator=generator))
        tokens = torch.full((len(given) * copies, config.n_pixels), -1, dtype=torch.int64)
        tokens[:, : given.shape[1] - 1] = given[:, 1:].repeat_interleave(copies, 0)
        tokens[:, end - 1 :] = 0  # beyond max_length nothing is drawn: whatever is known there is never looked at
        filters = (temperature, top_k, top_p) if do_sample else (0.0, None, None)
        job, limit = self._job(tokens, None, None, seed, 0, *filters, batch_size, window, None)
        filled, _ = self._run(job, limit, progress=False)
        start = torch.full((len(filled), 1), config.start_token, dtype=torch.int64)
        return torch.cat([start, filled[:, : end - 1]], 1).to(input_ids.device)

    def _checked_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        config = self.config
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.int64:
            raise TypeError(f"input_ids must be an int64 tensor, not {getattr(input_ids, 'dtype', type(input_ids))}")
        if input_ids.ndim != 2 or len(input_ids) == 0 or not 1 <= input_ids.shape[1] <= config.n_pixels:
            raise ValueError(f"input_ids must be [B, 1 to {config.n_pixels}], not {list(input_ids.shape)}")
        if bool((input_ids[:, 0] != config.start_token).any()):
            raise ValueError(f"input_ids must begin with the start token, {config.start_token}")
        if input_ids.shape[1] > 1:
            token_array("input_ids after the start token", input_ids[:, 1:], config)
        return input_ids.cpu()

    # --- images and tokens ---------------------------------------------------------------------------------------

    def encode(self, images: Any) -> torch.Tensor:
        """int64 [n, H·W]: images of any size as tokens. PIL images of any mode, uint8 arrays [(n,) H, W, 3], uint8
        tensors [(n,) 3, H, W], or a list of them; resized to the canvas as transformers' PIL processor does."""
        return self._encode(_pictures(images))

    def _encode(self, pictures: list[Image.Image]) -> torch.Tensor:
        height, width = self.config.height, self.config.width
        pixels = np.stack([images.to_canvas(picture, height, width) for picture in pictures])
        tokens = self._palette().encode(pixels)
        return torch.from_numpy(tokens).view(len(pictures), self.config.n_pixels)

    def known_cells(self, pictures: Any, *, rows: int | None = None, mask: Any = None) -> torch.Tensor:
        """bool [n, H·W], True = keep: the cells of each image that `complete` would keep for the same arguments."""
        height, width = self.config.height, self.config.width
        pictures = images.as_image_list(pictures)
        if rows is not None and mask is not None:
            raise ValueError("give rows or mask, not both")
        if rows is not None:
            top = np.arange(height) < whole("rows", rows, 0, height)
            kept = np.broadcast_to(top[:, None], (len(pictures), height, width)).copy()
        elif mask is not None:
            kept = ~images.mask_cells(mask, [picture.size for picture in pictures], height, width)
        else:
            holes = [images.transparent_cells(picture, height, width) for picture in pictures]
            if not any(hole is not None and hole.any() for hole in holes):
                raise ValueError("say what to draw anew: rows=, mask=, or images with transparent parts")
            kept = np.stack([np.ones((height, width), bool) if hole is None else ~hole for hole in holes])
        return torch.from_numpy(kept).flatten(1)

    def decode(self, tokens: Any) -> np.ndarray:
        """uint8 [n, H, W, 3] from tokens int64 [n, H·W]."""
        palette = self._palette()
        checked = token_array("tokens", tokens, self.config, whole_canvas=True)
        return palette.decode(checked.view(-1, self.config.height, self.config.width).numpy())

    def _palette(self) -> Palette:
        if self.palette is None:
            raise ValueError(
                f"the checkpoint {self.name!r} has no palette (preprocessor_config.json or clusters.npy), "
                'so it can read and write tokens only (output_type="tokens")'
            )
        return self.palette

    def _checked_output(self, output_type: str) -> str:
        kind = output_kind(output_type)
        if kind != "tokens":
            self._palette()
        return kind

    def _output(self, tokens: torch.Tensor, kind: str, seed: int, first_index: int) -> Any:
        if kind == "tokens":
            return tokens
        pixels = self.decode(tokens)
        if kind == "np":
            return pixels
        if kind == "pt":
            return torch.from_numpy(pixels).movedim(-1, 1).contiguous()
        result = []
        for k, image in enumerate(pixels):
            picture = Image.fromarray(image)
            picture.info.update(seed=str(seed), index=str(first_index + k), model=self.name)
            result.append(picture)
        return result

    # --- scores --------------------------------------------------------------------------------------------------

    def logits(self, tokens: torch.Tensor, *, prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """float32 [B, T, n_colors]: [:, i] scores token i given tokens[:, :i]. tokens: int64 [B, T], T ≤ H·W, without
        the start token."""
        checked = token_array("tokens", tokens, self.config)
        return self.engine.logits(checked, prompt_ids(prompt, len(checked), self.vocabulary)).float()

    def nll(self, tokens: torch.Tensor, *, prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """float32 [B]: mean negative log-likelihood, nats per token. tokens: int64 [B, T], T ≤ H·W."""
        checked = token_array("tokens", tokens, self.config)
        words = prompt_ids(prompt, len(checked), self.vocabulary)
        parts = []
        for first in range(0, len(checked), _SCORING_BATCH):
            batch = slice(first, first + _SCORING_BATCH)
            logits = self.engine.logits(checked[batch], None if words is None else words[batch]).float()
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
        """float32 [n, n_embd] (pool="mean") or [n, H·W, n_embd] (pool=None): the normed hidden state after `layer`
        blocks (0 to n_layer; None: the middle one), as in the paper's linear probes."""
        depth = self.config.n_layer // 2 if layer is None else whole("layer", layer, 0, self.config.n_layer)
        if pool not in ("mean", None):
            raise ValueError(f'pool must be "mean" or None, not {pool!r}')
        if isinstance(images_or_tokens, torch.Tensor) and images_or_tokens.dtype == torch.int64:
            tokens = token_array("tokens", images_or_tokens, self.config, whole_canvas=True)
        else:
            tokens = self.encode(images_or_tokens)
        words = prompt_ids(prompt, len(tokens), self.vocabulary)
        parts = []
        for first in range(0, len(tokens), _SCORING_BATCH):
            batch = slice(first, first + _SCORING_BATCH)
            hidden = self.engine.hidden(tokens[batch], depth, None if words is None else words[batch]).float().cpu()
            parts.append(hidden.mean(1) if pool == "mean" else hidden)
        return torch.cat(parts)


@lru_cache(maxsize=1)
def _loaded_draft(name: str, device: str, backend: str) -> ImageGPT:
    """A loop of calls with the same draft loads it once."""
    return ImageGPT.from_pretrained(name, device=device, backend=backend)


def _pictures(given: Any) -> list[Image.Image]:
    return images.as_image_list(given)
