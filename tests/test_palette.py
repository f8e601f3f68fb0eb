"""A palette encodes every colour exactly, as transformers does up to its rounding, and takes whatever holds pixels."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from fastigpt.codecs.palette import Palette
from fastigpt.errors import CheckpointError

PHOTOS = {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}


def random_clusters(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 3)).astype(np.float32)


def level_clusters(n: int, seed: int = 1) -> np.ndarray:
    """Clusters that are colours of 0 … 255, as rounded palettes are: many pixels lie exactly between two, or nearly."""
    return (np.random.default_rng(seed).integers(0, 256, (n, 3)) / 127.5 - 1).astype(np.float32)


def exact_distances(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """[n, K], (255 · distance)² in integers of 2⁻⁶⁰: exact for clusters that are multiples of 2⁻³⁰ (object dtype)."""
    unit = 1 << 30
    c = np.array([[int(255 * int(np.float64(v) * unit)) for v in row] for row in clusters], dtype=object)
    x = (2 * pixels.astype(np.int64) - 255).astype(object) * unit
    return ((x[:, None] - c[None]) ** 2).sum(axis=2)


def brute_force(pixels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Plain twin: float64 argmin, in units where points and 255 · clusters are exact; ties decided in integers."""
    found = np.empty(len(pixels), np.int64)
    centres = 255 * clusters.astype(np.float64)
    squares = (centres**2).sum(axis=1)
    for start in range(0, len(pixels), 8192):
        x = 2 * pixels[start : start + 8192].astype(np.float64) - 255
        d = squares - 2 * (x @ centres.T)  # rounding about 1e-10 at most
        low = d.min(axis=1, keepdims=True)
        near = d <= low + 1e-8
        found[start : start + len(x)] = d.argmin(axis=1)
        for i in np.flatnonzero(near.sum(axis=1) > 1):
            close = np.flatnonzero(near[i])
            exact = exact_distances(pixels[start + i : start + i + 1], clusters[close])[0]
            found[start + i] = close[min(range(len(close)), key=lambda j: (exact[j], j))]
    return found


def fixed_point(clusters: np.ndarray) -> np.ndarray:
    """The same clusters rounded to multiples of 2⁻³⁰, which all but the tiniest float32 of [−1, 1] are."""
    return (np.rint(clusters.astype(np.float64) * (1 << 30)) / (1 << 30)).astype(np.float32)


@pytest.mark.parametrize("make", [random_clusters, level_clusters])
@pytest.mark.parametrize("n", [1, 2, 3, 100, 512, 700])
def test_encode_is_exact_on_random_colours(make, n: int) -> None:
    clusters = fixed_point(make(n))
    pixels = np.random.default_rng(n).integers(0, 256, (20000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Palette(clusters).encode(pixels), brute_force(pixels, clusters))


def test_all_colours_of_a_channel_plane_are_exact() -> None:
    """Every colour of three full planes (196,608), with a palette on a regular grid, where ties are everywhere."""
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 36)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    clusters = fixed_point((grid / 127.5 - 1).astype(np.float32))
    plane = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1).reshape(-1, 2)
    for channel, level in enumerate((0, 126, 255)):
        pixels = np.insert(plane, channel, level, axis=1).astype(np.uint8)
        np.testing.assert_array_equal(Palette(clusters).encode(pixels), brute_force(pixels, clusters))


def test_ties_and_duplicates_take_the_lowest_token() -> None:
    clusters = np.array([[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5], [-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]], np.float32)
    tokens = Palette(clusters).encode(np.array([[0, 0, 0], [255, 255, 255], [255, 127, 0], [0, 128, 255]], np.uint8))
    assert tokens.tolist() == [1, 0, 1, 0]
    mirrored = np.array([[0.3, 0, 0], [-0.3, 0, 0], [0, 0.3, 0]], np.float32)
    # 2p − 255 of (127, 127, 255) is (−1, −1, 255), nearest the second; (128, 128, 0): the first, tied with the third.
    assert Palette(mirrored).encode(np.array([[127, 127, 255], [128, 128, 0]], np.uint8)).tolist() == [1, 0]


def agrees_up_to_rounding(tokens: np.ndarray, theirs: np.ndarray, pixels: np.ndarray, clusters: np.ndarray) -> int:
    """Every pixel on which they differ must be one whose two distances differ by less than float32 can hold. Returns
    the number of such pixels."""
    differ = np.flatnonzero(tokens != theirs)
    x = pixels.reshape(-1, 3)[differ].astype(np.float64) / 127.5 - 1
    mine = ((x - clusters[tokens[differ]]) ** 2).sum(axis=1)
    other = ((x - clusters[theirs[differ]]) ** 2).sum(axis=1)
    assert (mine <= other + 1e-15).all() and (other - mine < 2e-6).all()
    return len(differ)


@pytest.mark.parametrize("name", [*PHOTOS, "random"])
def test_encode_equals_transformers_pil_processor(name: str) -> None:
    module = pytest.importorskip("transformers.models.imagegpt.image_processing_pil_imagegpt")
    photo = PHOTOS.get(name, np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    photo = photo[:256, :256]
    clusters = random_clusters(512)
    tokens = Palette(clusters).encode(photo).reshape(-1)
    processor = module.ImageGPTImageProcessorPil(clusters=clusters, do_resize=False)
    theirs = np.asarray(processor(Image.fromarray(photo))["input_ids"]).reshape(-1)
    assert agrees_up_to_rounding(tokens, theirs, photo, clusters) < 1e-3 * len(tokens)


@pytest.mark.parametrize("name", [*PHOTOS, "random"])
def test_encode_equals_transformers_torch_arithmetic(name: str) -> None:
    """The torchvision-backed processor, step by step: torchvision need not be installed."""
    photo = PHOTOS.get(name, np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    photo = photo[:256, :256]
    clusters = random_clusters(512)
    tokens = Palette(clusters).encode(torch.from_numpy(photo.copy())).reshape(-1)
    mean, std = (torch.tensor([0.5] * 3) * (1.0 / (1 / 255)) for _ in range(2))
    a = ((torch.from_numpy(photo.copy()).float() - mean) / std).reshape(-1, 3)
    b = torch.from_numpy(clusters).t()
    theirs = ((a**2).sum(dim=1)[:, None] - 2 * (a @ b) + (b**2).sum(dim=0)[None]).argmin(dim=1)
    assert agrees_up_to_rounding(tokens.numpy(), theirs.numpy(), photo, clusters) < 1e-3 * len(tokens)


def test_transformers_processors_turn_exact_ties_around() -> None:
    """Why equality holds up to rounding only: with clusters that are pixel values, thousands of pixels are tied or
    nearly so, and the two float32 processors settle those by rounding."""
    module = pytest.importorskip("transformers.models.imagegpt.image_processing_pil_imagegpt")
    photo, clusters = PHOTOS["astronaut"][:256, :256], level_clusters(512)
    tokens = Palette(clusters).encode(photo).reshape(-1)
    processor = module.ImageGPTImageProcessorPil(clusters=clusters, do_resize=False)
    theirs = np.asarray(processor(Image.fromarray(photo))["input_ids"]).reshape(-1)
    assert agrees_up_to_rounding(tokens, theirs, photo, clusters) > 0


def test_every_kind_of_pixels() -> None:
    palette = Palette(random_clusters(64))
    photo = PHOTOS["coffee"][:60, :80]
    tokens = palette.encode(photo)
    assert tokens.shape == (60, 80) and tokens.dtype == np.int64 and isinstance(tokens, np.ndarray)
    tensor = palette.encode(torch.from_numpy(photo.copy()))
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and np.array_equal(tensor.numpy(), tokens)
    image = Image.fromarray(photo)
    np.testing.assert_array_equal(palette.encode(image), tokens)
    np.testing.assert_array_equal(palette.encode([image, image]), np.stack([tokens, tokens]))
    np.testing.assert_array_equal(palette.encode(np.stack([photo, photo])), np.stack([tokens, tokens]))
    np.testing.assert_array_equal(palette.encode(photo[0, 0]), tokens[0, 0])
    grey = image.convert("L")
    np.testing.assert_array_equal(palette.encode(grey), palette.encode(np.asarray(grey.convert("RGB"))))
    assert palette.encode(np.zeros((0, 4, 3), np.uint8)).shape == (0, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_strides(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4), label="shape"))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    wide = rng.integers(0, 256, tuple(2 * s + 1 for s in (*shape, 3)), dtype=np.uint8)
    pixels = wide[tuple(slice(1, 2 * s + 1, 2) for s in (*shape, 3))]
    for axis in range(pixels.ndim):
        if data.draw(st.booleans(), label=f"flip {axis}"):
            pixels = np.flip(pixels, axis)
    pixels.setflags(write=False)
    found = SMALL.encode(pixels)
    flat = np.ascontiguousarray(pixels).reshape(-1, 3)
    np.testing.assert_array_equal(found, SMALL.encode(flat).reshape(pixels.shape[:-1]))
    np.testing.assert_array_equal(SMALL.encode(flat), brute_force(flat, SMALL.clusters))


SMALL = Palette(fixed_point(random_clusters(37, seed=2)))


def test_large_images_and_threads() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (3, 301, 203, 4), dtype=np.uint8)
    view = pixels[:, 5:, ::-1, :3]
    one = SMALL.encode(view, threads=1)
    assert np.array_equal(one, SMALL.encode(view, threads=3))
    np.testing.assert_array_equal(one.reshape(-1), SMALL.encode(np.ascontiguousarray(view).reshape(-1, 3)))


def test_decode_is_the_colour_of_the_token() -> None:
    palette = Palette(random_clusters(64))
    np.testing.assert_array_equal(palette.colors, np.clip(np.rint(127.5 * (palette.clusters + 1)), 0, 255))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 5))
    np.testing.assert_array_equal(palette.decode(tokens), palette.colors[tokens])
    tensor = palette.decode(torch.from_numpy(tokens))
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), palette.colors[tokens])
    assert palette.decode(np.zeros((0,), np.int64)).shape == (0, 3)
    # Colours that are clusters come back unchanged.
    exact = Palette(level_clusters(50))
    np.testing.assert_array_equal(exact.decode(exact.encode(exact.colors)), exact.colors)


def test_fit_finds_separate_colours_and_is_deterministic() -> None:
    rng = np.random.default_rng(0)
    centres = rng.permutation(np.stack(np.meshgrid(*[[30, 120, 220]] * 3), axis=-1).reshape(-1, 3))
    pixels = (centres[rng.integers(0, 27, 20000)] + rng.integers(-8, 9, (20000, 3))).astype(np.uint8)
    palette = Palette.fit([pixels.reshape(100, 200, 3), Image.fromarray(pixels[:400].reshape(20, 20, 3))], n_colors=27)
    distance = np.abs(palette.colors[:, None].astype(int) - centres[None]).max(axis=2)
    assert (distance.min(axis=0) <= 1).sum() >= 21  # k-means may leave two blobs to one centre
    photo = PHOTOS["coffee"][::8, ::8]
    first, second, other = (Palette.fit(torch.from_numpy(photo.copy()), 64, seed) for seed in (5, 5, 6))
    assert first == second and hash(first) == hash(second) and first != other
    error = np.abs(first.decode(first.encode(photo)).astype(int) - photo).mean()
    assert error < 6, error


def test_fit_takes_files_grey_images_and_whatever_else_holds_a_picture(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) // 16 * 80
    sprite = np.zeros((8, 8, 4), np.uint8)
    sprite[..., 1] = 250  # nobody sees it
    sprite[2:4] = (255, 0, 0, 255)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(sprite).save(tmp_path / "sprite.png")
    tensor = torch.from_numpy(grey.copy())
    forms = [grey, tensor, tensor[None, None], grey / 255, tmp_path / "grey.png", str(tmp_path / "grey.png")]
    for form in [*forms, Image.open(tmp_path / "grey.png"), forms]:
        found = Palette.fit(form, 4).colors
        assert sorted(found.tolist()) == [[0] * 3, [80] * 3, [160] * 3, [240] * 3]
    assert sorted(Palette.fit([tmp_path / "sprite.png"], 2).colors.tolist()) == [[255, 0, 0], [255, 255, 255]]
    assert Palette.fit([grey, sprite[2:4]], 5).n_colors == 5


def test_fit_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    for images, error, says in [
        (tmp_path / "no.png", ValueError, r"no\.png"),
        ([], ValueError, "images is empty"),
        (3, TypeError, "int"),
        (np.zeros((4, 4), np.int64), TypeError, "int64"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), ValueError, "meta"),
    ]:
        with pytest.raises(error, match=says):
            Palette.fit(images, 1)
    with pytest.raises(ValueError, match="4 different colours, fewer than n_colors = 5"):
        Palette.fit(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.uint8), 5)
    with pytest.raises(ValueError, match="n_colors must be"):
        Palette.fit(PHOTOS["coffee"], 0)
    with pytest.raises(TypeError, match="uint8"):
        Palette.fit(np.zeros((4, 3), np.float32), 1)


def test_equality_copies_and_files(tmp_path: Path) -> None:
    palette = Palette(random_clusters(20))
    palette.encode(PHOTOS["coffee"][:4, :4])
    assert palette == Palette(torch.from_numpy(palette.clusters.copy())) == Palette(palette.clusters.tolist())
    assert palette != Palette(random_clusters(21)) and palette != "palette"
    assert pickle.loads(pickle.dumps(palette)) == palette == copy.deepcopy(palette)
    assert len(palette) == palette.n_colors == 20 and repr(palette) == "Palette(20 colors)"
    with pytest.raises(ValueError, match="read-only"):
        palette.clusters[0, 0] = 0
    with pytest.raises(ValueError, match="read-only"):
        palette.colors[0, 0] = 0
    np.save(tmp_path / "kmeans_centers.npy", palette.clusters)
    assert Palette.from_file(tmp_path / "kmeans_centers.npy") == palette


def test_bad_files_are_named_and_never_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    path = tmp_path / "clusters.npy"
    np.save(path, np.array([Hostile()], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"clusters\.npy"):
        Palette.from_file(path)
    assert not (tmp_path / "ran").exists()
    np.save(path, random_clusters(8))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"clusters\.npy"):
        Palette.from_file(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"clusters\.npy"):
        Palette.from_file(path)
    np.savez(tmp_path / "two.npz", random_clusters(8), random_clusters(8))
    with pytest.raises(CheckpointError, match="archive"):
        Palette.from_file(tmp_path / "two.npz")
    np.save(path, np.full((8, 3), np.nan))
    with pytest.raises(CheckpointError, match=r"clusters\.npy: clusters must be finite; row 0"):
        Palette.from_file(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Palette.from_file(tmp_path / "none.npy")


@pytest.mark.parametrize(
    ("clusters", "says"),
    [
        (np.zeros((0, 3)), r"not \[0, 3\]"),
        (np.zeros((5, 4)), r"not \[5, 4\]"),
        (np.zeros(3), r"not \[3\]"),
        (np.zeros((70000, 3)), "65536"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), "row 1 is"),
        (np.array([[np.inf, 0, 0]]), "finite"),
        (np.array([[0.0, 0, 255]]), r"lie in \[-1, 1\]; found 0 to 255"),
        ([["a", "b", "c"]], "must be numbers"),
        ([[0, 0, 0], [0, 0]], "must be numbers"),
        (None, "shape"),
    ],
)
def test_bad_clusters_are_named(clusters: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Palette(clusters)


def test_bad_pixels_and_tokens_are_named() -> None:
    for pixels, error, says in [
        (np.zeros((4, 4, 3)), TypeError, "pixels must be .*uint8"),
        (np.zeros((4, 4, 3), np.float32), TypeError, "pixels must be uint8"),
        (np.zeros((4, 4), np.uint8), ValueError, r"channels last\), not \[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, "channels last"),
        (np.array(0, np.uint8), ValueError, "channels last"),
        ([[0, 0, 0]], TypeError, "numpy array"),
        (Image.new("RGBA", (4, 4)), ValueError, "RGBA"),
        (Image.new("I;16", (4, 4)), ValueError, "I;16"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], ValueError, "one size"),
    ]:
        with pytest.raises(error, match=says):
            SMALL.encode(pixels)
    for tokens, error, says in [
        (np.array([0, 37]), ValueError, r"0 … 36; found 37"),
        (torch.tensor([-1, 3]), ValueError, "found -1"),
        (np.array([0.0]), TypeError, "integers, not float64"),
        (torch.tensor([True]), TypeError, "integers, not torch.bool"),
        ([0, 1], TypeError, "numpy array"),
    ]:
        with pytest.raises(error, match=says):
            SMALL.decode(tokens)
