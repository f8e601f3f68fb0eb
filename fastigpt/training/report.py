"""What a training run leaves for people to look at: a log, a plot of the loss, grids of samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from fastigpt.codecs.palette import Palette
from fastigpt.engine import loop
from fastigpt.engine.portable import PortableEngine
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.files import replacing
from fastigpt.job import Request
from fastigpt.prompts import Vocabulary
from fastigpt.sampling import Drawing

COLUMNS = ("step", "images", "seconds", "learning_rate", "loss", "gradient_norm", "held_out", "held_out_prompt")
_EDGE = 4  # images along the side of a grid


def write_log(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue())


def plot(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "held_out", "held_out_prompt"):
        known = [row for row in rows if name in row]
        if known:
            axes.plot([row["images"] for row in known], [row[name] for row in known], label=name.replace("_", " "))
    scale = "log" if all(row["loss"] > 0 for row in rows) else "linear"  # one colour is never a surprise
    axes.set(xlabel="images", ylabel="nats per token", yscale=scale)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def sample_grid(
    path: Path,
    config: ImageGPTConfig,
    weights: dict[str, torch.Tensor],
    palette: Palette,
    vocabulary: Vocabulary | None,
    *,
    seed: int,
    device: torch.device,
) -> None:
    """Draws 4 × 4 images: the vocabulary's examples first, the rest without a prompt."""
    engine = PortableEngine(image_gpt.spec(config), image_gpt.canonical(config, weights), device=device)
    examples = vocabulary.examples[: _EDGE * _EDGE] if vocabulary else ()
    prompts = [vocabulary.encode(text) for text in examples] if vocabulary else []
    prompts += [[]] * (_EDGE * _EDGE - len(prompts))
    empty, drawing = torch.full((config.n_pixels,), -1), Drawing(seed=seed)
    requests = [Request(empty, k, drawing, image_gpt.prefix(config, words)) for k, words in enumerate(prompts)]
    drawn, _ = loop.run(engine, requests)
    height, width = config.height, config.width
    tiles = palette.decode(drawn.tokens.view(_EDGE, _EDGE, height, width)).numpy()
    grid = tiles.transpose(0, 2, 1, 3, 4).reshape(_EDGE * height, _EDGE * width, 3)
    with replacing(path) as temporary:
        picture = Image.fromarray(grid)
        picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST).save(temporary)
