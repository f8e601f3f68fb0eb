"""What the pages of families state of memory is counted from the shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastigpt.bench.floor import kv_bytes_per_token, parameters
from fastigpt.bench.models import SHAPES
from fastigpt.codecs.vq import VQConfig

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {"janus-pro-1b": "Janus-Pro-1B", "janus-pro-7b": "Janus-Pro-7B"} | {
    name: "LlamaGen-" + name.partition("-")[2].upper() for name in SHAPES if name.startswith("llamagen")
}


@pytest.mark.parametrize("name", SHAPES)
def test_pages_state_the_memory_of_every_size(name):
    spec, page = SHAPES[name], DOCS / ("janus.md" if name.startswith("janus") else "llamagen.md")
    count = parameters(spec)
    cache = 2 * spec.n_positions * kv_bytes_per_token(spec, torch.bfloat16)
    row = f"| {ROWS[name]} | {count / 1e6:.0f} M | {2 * count / 1e9:.1f} GB | {cache / 1e9:.2f} GB |"
    assert row in page.read_text()


def test_pages_state_the_memory_of_the_vq():
    numbers = sum(torch.Size(shape).numel() for shape in VQConfig().tensor_shapes().values())
    for page, size, kind in (("janus.md", 2, "bfloat16"), ("llamagen.md", 4, "float32")):
        assert f"The VQ is {size * numbers / 1e9:.2f} GB more, in {kind}" in (DOCS / page).read_text()


def test_the_page_states_the_memory_of_words():
    small, large = (
        2 * SHAPES[f"janus-pro-{size}"].n_prefix_tokens * SHAPES[f"janus-pro-{size}"].width for size in ("1b", "7b")
    )
    assert (
        f"({small / 1e9:.2f} GB of the 1B's weights, {large / 1e9:.2f} of the 7B's)" in (DOCS / "janus.md").read_text()
    )
