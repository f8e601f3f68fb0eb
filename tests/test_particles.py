"""Particles: candidates that know what comes after the hole, their weights, their resampling, their noise."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CACHED, PROMPTED, TINY, prefixes, random_tokens, random_weights
from PIL import Image
from typer.testing import CliRunner

import fastigpt
from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.cli import app
from fastigpt.particles import effective_sample_size, systematic
from fastigpt.prompts import Vocabulary
from fastigpt.sampling import Drawing, draw, guide, noise_bits
from fastigpt.scenes import scenes
from fastigpt.training.data import HELD_OUT_SEED

VOCABULARY = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
HOLE = torch.zeros(4, 4, dtype=torch.bool)  # rows without unknown cells before, between and after; known cells after
HOLE[0, 2] = HOLE[1, 1:3] = HOLE[3, 0] = HOLE[3, 2] = True


def make(config: ImageGPTConfig = TINY, backend: str = "reference", **kwargs: object) -> ImageGPT:
    palette = Palette(np.random.default_rng(1).uniform(-1, 1, (config.n_colors, 3)).astype(np.float32))
    vocabulary = VOCABULARY if config.n_words else None
    weights = random_weights(config)
    return ImageGPT(config, weights, palette=palette, vocabulary=vocabulary, backend=backend, **kwargs)


def pictures(model: ImageGPT, n: int = 2, seed: int = 3) -> np.ndarray:
    return model.decode(random_tokens(model.config, n, seed))


def complete(model: ImageGPT, *, n_images: int = 2, mask: object = HOLE, seed: int = 5, **kwargs: object):
    images = pictures(model, n_images)
    return model.complete(images, mask=mask, seed=seed, output_type="tokens", **kwargs)


# --- weights and resampling --------------------------------------------------------------------------------------


def test_effective_sample_size_is_between_one_and_all():
    weights = torch.tensor([[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]], dtype=torch.float64)
    assert effective_sample_size(weights).tolist() == [1, 4, 2]


def test_systematic_resampling_gives_each_candidate_its_share_rounded_up_or_down():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 7, generator=generator, dtype=torch.float64) ** 4
    weights /= weights.sum(1, keepdim=True)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    ancestors = systematic(weights, uniform, 16)
    assert bool((ancestors.diff(dim=1) >= 0).all())
    copies = torch.nn.functional.one_hot(ancestors, 7).sum(1)
    assert bool(((copies - 16 * weights).abs() < 1).all())
    many = torch.arange(4000, dtype=torch.float64).add(0.5) / 4000
    mean = torch.nn.functional.one_hot(systematic(weights[:1].expand(4000, 7), many, 16), 7).sum(1).double().mean(0)
    torch.testing.assert_close(mean, 16 * weights[0], atol=2e-3, rtol=0)


def test_systematic_resampling_never_takes_a_candidate_of_weight_zero():
    weights = torch.tensor([[0, 0.5, 0, 0.5, 0]], dtype=torch.float64)
    for u in (2.0**-25, 0.5, 1 - 2.0**-25):
        assert systematic(weights, torch.tensor([u], dtype=torch.float64), 4).tolist() == [[1, 1, 3, 3]]


# --- the whole, against a plain twin -----------------------------------------------------------------------------


def plain_twin(
    model: ImageGPT, tokens: torch.Tensor, index: int, k: int, drawing: Drawing, prompt=None
) -> torch.Tensor:
    """One result, cell by cell and candidate by candidate, as the module's documentation says."""
    height, width = model.config.height, model.config.width
    known = tokens >= 0

    def logits_at(x: torch.Tensor, position: int) -> torch.Tensor:
        given = x[None, : position + 1].clamp(min=0)
        c = model.engine.logits(given, None if prompt is None else prefixes(model.engine, prompt))[0, -1]
        if drawing.guidance_scale is None:
            return c
        return guide(c, model.engine.logits(given)[0, -1], drawing.guidance_scale)

    def uniform(row: int) -> float:
        bits = int(noise_bits(drawing.seed, torch.tensor(index), torch.tensor(2**31 + row), 1)[0])
        return ((bits >> 8) + 0.5) / 2**24

    def points(weights: list[float], u: float, count: int) -> list[int]:
        edges = list(itertools.accumulate(weights))
        return [next(i for i, e in enumerate(edges) if e >= (j + u) / count) for j in range(count)]

    first = int((~known).long().argmax())
    evidence = [i for i in range(len(tokens)) if known[i] and i > first]
    last = evidence[-1] if evidence else -1
    rows = sorted({i // width for i in range(len(tokens)) if not known[i]})
    paths, logw, candidate_index = [tokens.clone() for _ in range(k)], [0.0] * k, [index + c * 2**48 for c in range(k)]
    weighted = [r for r in rows if any(not known[i] and i < last for i in range(r * width, (r + 1) * width))]
    for r in weighted:
        end = next((s for s in rows if s > r), height)
        for c in range(k):
            for i in range(r * width, end * width):
                logits = logits_at(paths[c], i)
                if known[i]:
                    logw[c] += float(logits.log_softmax(-1)[tokens[i]]) if i in evidence else 0.0
                else:
                    paths[c][i] = draw(logits[None], torch.tensor([candidate_index[c]]), torch.tensor([i]), drawing)[0]
        total = math.log(sum(math.exp(w) for w in logw))
        share = [math.exp(w - total) for w in logw]
        if r == weighted[-1]:
            chosen = points(share, uniform(height), 1)[0]
        elif 1 / sum(w * w for w in share) < k / 2:
            paths = [paths[a].clone() for a in points(share, uniform(r), k)]
            logw = [0.0] * k
    if not weighted:
        chosen = 0
    for i in range(len(tokens)):
        if paths[chosen][i] < 0:
            logits = logits_at(paths[chosen], i)
            position = torch.tensor([i])
            paths[chosen][i] = draw(logits[None], torch.tensor([candidate_index[chosen]]), position, drawing)[0]
    return paths[chosen]


@pytest.mark.parametrize("tail", [False, True], ids=["evidence at the end", "unknown at the end"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "top_k": 4}, {"guidance_scale": 2.5}], ids=str)
def test_results_are_those_of_the_plain_twin(options, tail):
    model = make(PROMPTED if "guidance_scale" in options else TINY, dtype=torch.float64)
    text = "a red house" if "guidance_scale" in options else None
    mask = HOLE.clone()
    mask[3, 3] = tail
    k, found = 5, complete(model, n=6, mask=mask, particles=5, first_index=9, prompt=text, **options)
    given = model.encode(pictures(model)).masked_fill(mask.flatten(), -1).repeat_interleave(6, 0)
    words = None if text is None else torch.tensor([VOCABULARY.encode(text)])
    drawing = Drawing(seed=5, **options)
    for r in range(12):
        assert found[r].tolist() == plain_twin(model, given[r], 9 + r, k, drawing, words).tolist(), r


def test_the_distribution_is_the_exact_conditional():
    """2 × 3 cells, two colours, three of them unknown: the eight completions, counted, beside the model's own odds."""
    config = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=2, width=3, n_colors=2)
    weights = random_weights(config, seed=9)
    weights["lm_head.weight"] *= 3
    palette = Palette(np.array([[-1, -1, -1], [1, 1, 1]], np.float32))
    model = ImageGPT(config, weights, palette=palette, backend=CACHED[-1], dtype="float32")
    unknown = torch.tensor([0, 1, 3])
    known = torch.zeros(6, dtype=torch.int64)
    cases = known.repeat(8, 1)
    cases[:, unknown] = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    exact = (-6 * model.nll(cases).double()).softmax(0)
    mask = torch.zeros(6, dtype=torch.bool).index_fill(0, unknown, True).view(2, 3)

    def distance(k: int, n: int = 2000) -> float:
        drawn = model.complete(model.decode(known[None]), n, mask=mask, particles=k, seed=1, output_type="tokens")
        assert torch.equal(drawn[:, ~mask.flatten()], known[~mask.flatten()].expand(n, 3))
        number = (drawn[:, unknown] * torch.tensor([4, 2, 1])).sum(1)
        return float((number.bincount(minlength=8) / n - exact).abs().sum() / 2)

    plain, few, many = distance(1), distance(4), distance(32)
    assert plain > 0.35 and plain > 2 * few and few > many and many < 0.03


@pytest.mark.slow
def test_known_cells_after_a_hole_in_scenes_are_likelier_with_candidates():
    """The cells that candidates are weighed by, on average; the whole image gains too, but not in so few."""
    model = fastigpt.load()
    images = np.stack([image for image, _, _ in itertools.islice(scenes(HELD_OUT_SEED, 20_000), 12)])
    mask = np.zeros((32, 32), bool)
    mask[8:12, 8:24] = True
    after = torch.from_numpy(~mask.ravel() & (mask.ravel().cumsum() > 0))
    mean = []
    for k in (1, 8):
        tokens = model.complete(images, 2, mask=mask, particles=k, seed=0, output_type="tokens")
        assert torch.equal(tokens[::2, ~mask.ravel()], model.encode(images)[:, ~mask.ravel()])
        nats = model.logits(tokens).double().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        mean.append(float(nats[:, after].sum(1).mean()))
    assert mean[1] > mean[0] + 2


# --- the noise contract ------------------------------------------------------------------------------------------


def test_one_candidate_is_plain_forcing(backend):
    model = make(backend=backend)
    given = model.encode(pictures(model)).masked_fill(HOLE.flatten(), -1).repeat_interleave(3, 0)
    assert torch.equal(complete(model, n=3), model.fill(given, seed=5))
    assert torch.equal(complete(model, n=3, particles=1), complete(model, n=3))


def test_results_do_not_depend_on_batch_window_or_neighbours(backend):
    model = make(backend=backend, dtype="float32")
    whole = complete(model, n=5, particles=6)
    assert not torch.equal(whole, complete(model, n=5))
    assert torch.equal(whole, complete(model, n=5, particles=6, batch_size=4))
    assert torch.equal(whole, complete(model, n=5, particles=6, batch_size=1, window=3))
    assert torch.equal(whole[:5], complete(model, n_images=1, n=5, particles=6))
    second = model.complete(
        pictures(model)[1:], mask=HOLE, seed=5, first_index=7, particles=6, output_type="tokens", batch_size=8
    )
    assert torch.equal(whole[7:8], second)
    assert torch.equal(whole, complete(make(dtype="float32"), n=5, particles=6))  # the reference engine's


def test_each_image_has_its_own_hole():
    model = make()
    masks = torch.stack([HOLE, HOLE.T, torch.arange(16).view(4, 4) >= 8, torch.zeros(4, 4, dtype=torch.bool)])
    together = complete(model, n_images=4, mask=masks, particles=4)
    for i in range(4):
        alone = model.complete(
            pictures(model, 4)[i], mask=masks[i], particles=4, seed=5, first_index=i, output_type="tokens"
        )
        assert torch.equal(together[i], alone[0])
    assert torch.equal(together[3], model.encode(pictures(model, 4))[3])


def test_without_known_cells_after_the_hole_results_are_plain(backend):
    model = make(backend=backend)
    assert torch.equal(complete(model, mask=None, rows=2, n=3, particles=8), complete(model, mask=None, rows=2, n=3))


def test_at_temperature_zero_candidates_are_one():
    model = make()
    assert torch.equal(complete(model, temperature=0, particles=8), complete(model, temperature=0))


def test_stats_count_the_passes_of_the_candidate_that_was_picked():
    model = make()
    _, stats = complete(model, particles=3, return_stats=True)
    assert stats.pass_starts.shape == (2, 4, 4) and stats.passes.tolist() == [5, 5]  # reference: one for each cell


# --- bad input, command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("particles", "error", "message"),
    [
        (0, ValueError, "particles must be between 1 and 32768, not 0"),
        (2**15 + 1, ValueError, "particles must be"),
        (True, TypeError, "particles must be an int"),
        (2.0, TypeError, "particles must be an int"),
        ("4", TypeError, "particles must be an int"),
    ],
)
def test_bad_numbers_of_particles_are_named(particles, error, message):
    with pytest.raises(error, match=message):
        complete(make(), particles=particles)


def test_indices_that_would_meet_the_candidates_are_refused():
    with pytest.raises(ValueError, match="first_index"):
        complete(make(), particles=2, first_index=2**48 - 1)
    complete(make(), particles=2, first_index=2**48 - 2)
    complete(make(), first_index=2**48)


def test_the_command_line_completes_with_particles(tmp_path: Path):
    model = make(backend="portable")
    model.save_pretrained(tmp_path / "tiny")
    Image.fromarray(pictures(model, 1)[0]).save(tmp_path / "image.png")
    Image.fromarray(HOLE.numpy().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    out = tmp_path / "out.npz"
    arguments = ["complete", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "-n", 3, "--particles", 4]
    arguments += ["--seed", 2, "--model", tmp_path / "tiny", "--backend", "portable", "--out", out, "--json"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.output)["images"] == 3
    expected = complete(model, n_images=1, n=3, particles=4, seed=2)
    with np.load(out) as archive:
        assert np.array_equal(archive["arr_0"], model.decode(expected))
