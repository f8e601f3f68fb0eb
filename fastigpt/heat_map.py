"""Fixed-point sampling as a picture: where on the canvas passes of the model began."""

from __future__ import annotations

import io

import matplotlib
import torch
from PIL import Image

from fastigpt.job import Stats

matplotlib.use("Agg")


def draw_heat_map(stats: Stats) -> Image.Image:
    """For every cell of the canvas, the share of images in which a pass began there: dark where the next tokens were
    foreseen, bright where each cost a pass of its own."""
    import matplotlib.pyplot as plt

    drawn = stats.drawn.sum(0)
    share = torch.where(drawn > 0, stats.pass_starts.sum(0) / drawn.clamp(min=1), torch.nan)
    figure, axes = plt.subplots(figsize=(5.2, 4.4))
    picture = axes.imshow(share.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of images in which a pass began here")
    axes.set_title(f"{stats.tokens_per_pass:.2f} tokens per pass, {len(stats.drawn)} images")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return Image.open(buffer)
