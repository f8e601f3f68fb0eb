"""Fixed-point sampling as a picture: where on the canvas passes of the model began."""

from __future__ import annotations

import io

import torch
from matplotlib.figure import Figure
from PIL import Image


def draw_heat_map(drawn: torch.Tensor, pass_starts: torch.Tensor, images: int) -> Image.Image:
    """For every cell of the canvas, the share of images in which a pass began there: dark where the next tokens were
    foreseen, bright where each cost a pass of its own. drawn, pass_starts: int64 [h, w], the grid of tokens: in how
    many of the images a token was drawn there, and a pass began there (`stats.drawn.sum(0)`,
    `stats.pass_starts.sum(0)`)."""
    share = torch.where(drawn > 0, pass_starts / drawn.clamp(min=1), torch.nan)
    figure = Figure(figsize=(5.2, 4.4))
    axes = figure.subplots()
    picture = axes.imshow(share.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of images in which a pass began here")
    tokens_per_pass = int(drawn.sum()) / max(1, int(pass_starts.sum()))
    axes.set_title(f"{tokens_per_pass:.2f} tokens per pass, {images} image{'' if images == 1 else 's'}")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return Image.open(buffer)
