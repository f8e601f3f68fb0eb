"""What this library promises of every family, on models of Llama's blocks with a VQ: the noise contract, windows,
streams, particles, masks, drafts and half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastigpt
from fastigpt.cli import app
from fastigpt.families.llamagen import LlamaGen, read_file
from fastigpt.model import Model

FILE = Path(__file__).parent / "llamagen_golden" / "c2i_tiny_64.pt"
OPTIONS = {"label": 3, "guidance_scale": 3.0, "seed": 5, "top_k": 100}


@pytest.fixture(scope="module")
def pretrained() -> LlamaGen:
    return read_file(FILE, n_head=4)


@pytest.fixture(scope="module", params=["portable", "cpu"])
def model(request: pytest.FixtureRequest, pretrained: LlamaGen) -> Model:
    return Model(pretrained, device="cpu", backend=request.param, dtype="float32")


@pytest.fixture(scope="module")
def drawn(model: Model) -> torch.Tensor:
    return model.sample(5, output_type="tokens", window=1, **OPTIONS)


def test_image_k_of_a_job_is_that_image_drawn_alone(model, drawn):
    for k in (0, 3):
        assert torch.equal(drawn[k], model.sample(1, first_index=k, output_type="tokens", **OPTIONS)[0])
    assert len(torch.unique(drawn, dim=0)) == 5


@pytest.mark.parametrize("how", [{"batch_size": 2}, {"window": 5}, {"window": "auto"}, {"window": 64}])
def test_tokens_depend_neither_on_the_batch_nor_on_the_window(model, drawn, how):
    assert torch.equal(model.sample(5, output_type="tokens", **OPTIONS, **how), drawn)


def test_the_reference_draws_the_same(pretrained, drawn):
    reference = Model(pretrained, device="cpu", backend="reference")
    assert torch.equal(reference.sample(1, output_type="tokens", **OPTIONS)[0], drawn[0])


def test_a_draft_changes_no_token_and_saves_passes(model, drawn):
    found, stats = model.sample(5, draft=model, window=4, output_type="tokens", return_stats=True, **OPTIONS)
    assert torch.equal(found, drawn) and stats.tokens_per_pass > 3.5


def test_rows_are_streamed_as_they_are_decided(model, drawn):
    with model.stream(2, **OPTIONS) as rows:
        found = torch.zeros(2, 8, 8, dtype=torch.int64)
        for images, row, tokens in rows:
            found[images.start : images.stop, row] = tokens
    assert torch.equal(found.flatten(1), drawn[:2])


def test_previews_become_the_image(model, drawn):
    canvas = drawn[:1].clone()
    canvas[:, 32:] = -1
    seen = model.preview(canvas)
    assert (seen[:, 32:] == 128).all() and (seen[:, :32] != 128).any()
    assert np.array_equal(model.preview(drawn[:1]), model.decode(drawn[:1]))


@pytest.mark.parametrize("particles", [1, 3])
def test_what_a_mask_keeps_is_kept(model, drawn, particles):
    image = model.decode(drawn[:1])[0]
    mask = np.zeros((64, 64), bool)
    mask[16:24, 8:40] = True  # whole patches
    found = model.complete(image, 2, mask=mask, particles=particles, output_type="tokens", **OPTIONS)
    kept = model.known_cells(image, mask=mask)[0]
    assert int(kept.sum()) == 60 and torch.equal(found[:, kept], model.encode(image)[:, kept].expand(2, -1))
    assert torch.equal(
        found, model.complete(image, 2, mask=mask, particles=particles, window=3, output_type="tokens", **OPTIONS)
    )


def test_scores_of_a_class(model, drawn):
    logits = model.engine.logits(drawn, torch.full((5, 1), 3))
    expected = torch.nn.functional.cross_entropy(logits.mT, drawn, reduction="none").mean(1)
    assert torch.allclose(model.nll(drawn, prompt="3"), expected, atol=1e-5)
    assert (model.nll(drawn, prompt="3") - model.nll(drawn)).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["portable", "cpu"])
def test_uniform_logits_draw_uniform_tokens(pretrained, backend):
    """The distribution that is drawn is the model's: here every token is equally likely."""
    weights = {**pretrained.weights, "output.weight": torch.zeros_like(pretrained.weights["output.weight"])}
    even = Model(LlamaGen(pretrained.config, weights), device="cpu", backend=backend, dtype="float32")
    tokens = even.sample(64, label=1, guidance_scale=2.0, seed=0, output_type="tokens", window=8)
    counts = torch.bincount(tokens.flatten(), minlength=256).double()
    mean = counts.mean()
    chi_squared = float(((counts - mean) ** 2 / mean).sum())
    assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6  # its deviation is √510


def test_bfloat16_stays_near(pretrained, model, drawn):
    low = Model(pretrained, device="cpu", backend=model.backend, dtype="bfloat16")
    prefix = torch.full((5, 1), 3)
    ours, exact = low.engine.logits(drawn, prefix), model.engine.logits(drawn, prefix)
    divergence = torch.nn.functional.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True)
    assert (ours - exact).norm() <= 3e-2 * exact.norm() and float(divergence) * 256 <= 1e-2


def test_the_command_line_draws_a_class(pretrained, tmp_path):
    pretrained.write(tmp_path / "model")
    arguments = ["sample", "--model", str(tmp_path / "model"), "-n", "2", "--seed", "5", "--guidance-scale", "3"]
    results = []
    for what in (["--label", "3"], ["--prompt", "3"]):
        out = tmp_path / f"{what[0]}.png"
        found = CliRunner().invoke(app, [*arguments, *what, "--device", "cpu", "--out", str(out)])
        assert found.exit_code == 0, found.output
        results.append(out.read_bytes()[-2000:])
    assert results[0] == results[1]
    assert isinstance(fastigpt.load(tmp_path / "model", device="cpu").config.n_classes, int)
