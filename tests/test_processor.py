"""preprocessor_config.json is followed as transformers' PIL processor follows it, or refused by name; palettes of any
range are read as their range says, and one that two ranges would explain is not guessed at."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights
from PIL import Image

import fastigpt
from fastigpt import CheckpointError, ImageGPT, ImageGPTConfig, Palette

SQUARE = ImageGPTConfig(n_layer=1, n_head=1, n_embd=16, height=8, width=8, n_colors=64)
CLUSTERS = np.random.default_rng(1).uniform(-1, 1, (64, 3)).astype(np.float32)
LEVELS = 127.5 * (CLUSTERS.astype(np.float64) + 1)
PHOTO = Image.fromarray(np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 50), 3)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

FOLLOWED = {
    "as published": (CLUSTERS, {}),
    "as published in 2022": (CLUSTERS, {"feature_extractor_type": "ImageGPTFeatureExtractor", "size": 8}),
    "nothing but clusters": (CLUSTERS, dict.fromkeys(("do_normalize", "do_resize", "resample", "do_rescale"), None)),
    "do_normalize false": (LEVELS / 255, {"do_normalize": False}),
    "neither": (LEVELS, {"do_normalize": False, "do_rescale": False}),
    "mean 0, std 1": (LEVELS / 255, {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}),
    "one mean for all": (LEVELS / 255 - 0.25, {"image_mean": 0.25, "image_std": 1.0}),
    "a mean for each channel": (LEVELS / 255 - MEAN, {"image_mean": MEAN.tolist(), "image_std": [1.0] * 3}),
    "ImageNet's": ((LEVELS / 255 - MEAN) / STD, {"image_mean": MEAN.tolist(), "image_std": STD.tolist()}),
    "wide blue": ((LEVELS / 255) / [1, 1, 0.1], {"image_mean": [0] * 3, "image_std": [1, 1, 0.1]}),
    "levels": ((LEVELS - 127.5) / 127.5, {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
    "rescale_factor": (LEVELS / 100, {"rescale_factor": 0.01, "do_normalize": False}),
    **{f"resample {i}": (CLUSTERS, {"resample": i}) for i in range(6)},
    "size as a list": (CLUSTERS, {"size": [8, 8]}),
}


def checkpoint(folder: Path, clusters: np.ndarray, change: dict, config: ImageGPTConfig = SQUARE) -> Path:
    ImageGPT(config, random_weights(config), backend="portable").save_pretrained(folder)
    data = {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": clusters.tolist(),
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": config.height, "width": config.width},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(data | change))
    return folder


def load(folder: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(folder, backend="portable", device="cpu")


def theirs(folder: Path, image: Image.Image) -> torch.Tensor:
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil as Processor

    return torch.tensor(np.asarray(Processor.from_pretrained(folder)(images=image, return_tensors="np")["input_ids"]))


@pytest.mark.parametrize("name", FOLLOWED)
def test_tokens_are_transformers(tmp_path, name):
    clusters, change = FOLLOWED[name]
    folder = checkpoint(tmp_path / "m", np.asarray(clusters), change)
    model = load(folder)
    got = model.encode(PHOTO)
    if change.get("do_resize", True) is not None:  # without a size theirs resizes to 256 × 256
        assert torch.equal(got, theirs(folder, PHOTO))
    # The colours that are drawn are those of the clusters, whatever their range.
    assert np.abs(model.palette.colors - LEVELS).max() <= 0.51
    # What is saved says the same, to us and to transformers.
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.palette == model.palette and again.preprocessing == model.preprocessing
    assert torch.equal(again.encode(PHOTO), got) and torch.equal(theirs(tmp_path / "again", PHOTO), got)
    assert pickle.loads(pickle.dumps(model.palette)) == model.palette


def test_images_that_may_not_be_resized(tmp_path):
    model = load(checkpoint(tmp_path, CLUSTERS, {"do_resize": False}))
    fitting = PHOTO.resize((8, 8))
    assert torch.equal(model.encode(fitting), theirs(tmp_path, fitting))
    with pytest.raises(ValueError, match=r"images must be 8 × 8, not 70 × 50.*do_resize"):
        model.encode([fitting, PHOTO])
    with pytest.raises(ValueError, match="do_resize"):
        model.complete(PHOTO, rows=4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"do_color_quantize": False}, "do_color_quantize is false"),
        ({"size": {"height": 16, "width": 8}}, "size is 16 × 8, the model's canvas 8 × 8"),
        ({"size": 256}, "size is 256 × 256"),
        ({"size": {"shortest_edge": 8}}, "shortest_edge"),
    ],
)
def test_what_cannot_be_done_to_images_is_refused_by_name_and_tokens_are_not(tmp_path, change, word):
    model = load(checkpoint(tmp_path, CLUSTERS, change))
    assert len(model.sample(1, seed=0)) == 1
    for call in (lambda: model.encode(PHOTO), lambda: model.complete(PHOTO, rows=2), lambda: model.features([PHOTO])):
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: ") as caught:
            call()
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"resample": 6}, "resample"),
        ({"resample": -1}, "resample"),
        ({"resample": True}, "resample"),
        ({"resample": "bilinear"}, "resample"),
        ({"do_normalize": 1}, "do_normalize"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"size": {"height": "8", "width": 8}}, "size"),
        ({"size": [8, 8, 8]}, "size"),
        ({"size": 0}, "size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": -1.0}, "image_std"),
        ({"image_mean": float("nan")}, "image_mean"),
        ({"image_std": 10**400}, "image_std"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": [[1]]}, "rescale_factor"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
        ({"do_normalize": False}, "[0, 1]"),  # clusters of [−1, 1] after all
    ],
)
def test_impossible_values_are_named(tmp_path, change, word):
    checkpoint(tmp_path, CLUSTERS, change)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: ") as caught:
        load(tmp_path)
    assert word in str(caught.value)


def test_the_size_of_images_tells_the_canvas(tmp_path):
    """Where n_positions alone does not: 3 × 5 pixels, or 4 × 3 and three positions more."""
    odd = ImageGPTConfig(n_layer=1, n_head=1, n_embd=16, height=3, width=5, n_colors=64)
    checkpoint(tmp_path, CLUSTERS, {})
    for size in ((3, 5), (4, 3)):
        checkpoint(tmp_path, CLUSTERS, {"size": {"height": size[0], "width": size[1]}}, odd)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["fastigpt"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = load(tmp_path)
        assert (model.config.height, model.config.width) == size and model.encode(PHOTO).shape == (1, size[0] * size[1])
        assert torch.equal(model.encode(PHOTO), theirs(tmp_path, PHOTO))


# --- palettes ----------------------------------------------------------------------------------------------------


def nearest(pixels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((pixels[..., None, :] - centres) ** 2).sum(-1).argmin(-1)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (-1, 1), (-0.5, 0.5), (16, 235)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_palette_is_read_in_the_range_that_is_said(tmp_path, low, high, dtype):
    rng = np.random.default_rng(0)
    centres = (low + rng.random((100, 3)) * (high - low)).astype(dtype)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    want = nearest(low + pixels / 255 * (high - low), centres.astype(np.float64))
    np.save(tmp_path / "p.npy", centres)
    for palette in (
        Palette(centres, value_range=(low, high)),
        Palette(torch.from_numpy(centres), value_range=(low, high)),
        Palette(centres.tolist(), value_range=[low, high]),
        Palette.from_file(tmp_path / "p.npy", value_range=(low, high)),
        Palette.from_file(str(tmp_path / "p.npy"), value_range=(low, high)),
    ):
        assert (palette.encode(pixels) == want).mean() > 0.999
        assert np.abs(palette.colors - (centres.astype(np.float64) - low) / (high - low) * 255).max() <= 0.51


@pytest.mark.parametrize(
    "clusters",
    [
        np.random.default_rng(0).random((512, 3)).astype(np.float32),
        np.array([[0, 0, 0], [1, 1, 1]], np.uint8),
        np.array([[False, True, False]]),
        np.zeros((3, 3)),
        np.ones((1, 3), np.float16),
        [[0.25, 0.5, 1]],
    ],
)
def test_a_palette_in_0_to_1_is_not_guessed_at(tmp_path, clusters):
    with pytest.raises(ValueError, match=r"value_range=\(0, 1\) or value_range=\(-1, 1\)"):
        Palette(clusters)
    np.save(tmp_path / "p.npy", clusters)
    with pytest.raises(CheckpointError, match=r"p\.npy: .*value_range"):
        Palette.from_file(tmp_path / "p.npy")
    assert Palette(clusters, value_range=(0, 1)) == Palette(2 * np.asarray(clusters, float) - 1, value_range=(-1, 1))


def test_a_palette_of_0_to_255_is_read_when_that_is_said():
    with pytest.raises(ValueError, match=r"value_range=\(0, 255\)"):
        Palette(np.array([[0, 0, 0], [9, 80, 255]], np.uint8))
    palette = Palette(np.array([[0, 0, 0], [9, 80, 255]], np.uint8), value_range=(0, 255))
    assert palette.colors.tolist() == [[0, 0, 0], [9, 80, 255]]


IMPOSSIBLE_RANGES = [(1, 0), (0, 0), 3, (0,), (0, 1, 2), (0, float("nan")), ("a", "b"), (0, [1, 2])]


@pytest.mark.parametrize("value_range", IMPOSSIBLE_RANGES)
def test_impossible_ranges_are_refused(value_range):
    with pytest.raises(ValueError, match="value_range"):
        Palette([[0.0, 0.5, 1.0]], value_range=value_range)


def test_a_palette_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]; found 0 to 255"):
        Palette([[0, 0, 255]], value_range=(0, 1))


def test_what_the_processor_says_holds_for_an_array_beside_it(tmp_path):
    checkpoint(tmp_path, CLUSTERS, {"clusters": None, "do_normalize": False})
    np.save(tmp_path / "clusters.npy", (LEVELS / 255).astype(np.float32))
    assert np.abs(load(tmp_path).palette.clusters - CLUSTERS).max() < 1e-6
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"clusters\.npy: .*do_normalize"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["numpy", "strided", "tensor", "pil", "list"])
def test_channels_that_weigh_differently(kind):
    """Every kind of pixels, by the exact search."""
    weights = np.array([1.0, 0.5, 0.1])
    palette = Palette(CLUSTERS * weights, value_range=((-weights).tolist(), weights.tolist()))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    given = {
        "numpy": pixels,
        "strided": np.repeat(pixels, 2, 1)[:, ::2],
        "tensor": torch.from_numpy(pixels),
        "pil": Image.fromarray(pixels),
        "list": [Image.fromarray(pixels)],
    }[kind]
    want = nearest((pixels / 127.5 - 1) * weights, CLUSTERS * weights)
    got = np.asarray(palette.encode(given)).reshape(want.shape)
    assert (got == want).all()
    assert palette != Palette(CLUSTERS)


def test_training_keeps_bright_palettes(tmp_path):
    """Colours of bright images lie in [0, 1] and are meant in [−1, 1]: whoever made them says so."""
    bright = np.random.default_rng(0).integers(128, 256, (400, 3)).astype(np.uint8)
    palette = Palette.fit(bright, 16)
    assert palette.colors.min() >= 127
    weights = random_weights(TINY)
    colors = Palette(np.abs(CLUSTERS[:9]), value_range=(-1, 1))
    ImageGPT(TINY, weights, palette=colors, backend="portable").save_pretrained(tmp_path)
    assert fastigpt.load(tmp_path, backend="portable").palette == colors
    assert pickle.loads(pickle.dumps(colors)) == colors
