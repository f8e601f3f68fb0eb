"""Every way to search a codebook gives the argmin of real arithmetic; an index object is as good as the function."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_nearest_centroid import brute_force

import fastigpt
import fastigpt.nearest as nearest
from fastigpt import _C
from fastigpt.nearest import NearestCentroid, address_of, nearest_centroid

ISAS = [isa for isa in _C.supported_isas() if isa != "amx"]  # which searches as avx512vnni does
WAYS = ("automatic", "scan", "float32", "int8", "tree", "grid", "table")


def ways(isa: str, points: np.ndarray, k: int) -> list[str]:
    """Those that can search these points."""
    dim = points.shape[1]
    possible = {
        "int8": isa == "avx512vnni" and dim <= 1024,
        "tree": dim <= 16,
        "grid": dim == 3 and k <= 65536,
        "table": dim == 3 and points.dtype == np.uint8,
    }
    return [way for way in WAYS if possible.get(way, True)]


def search(
    index: object, points: np.ndarray, way: str, isa: str = "auto", threads: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    found, distances = np.full(len(points), -7), np.full(len(points), np.nan, np.float32)
    where = address_of(points), str(points.dtype), points.shape, points.strides
    assert index.search(*where, address_of(found), address_of(distances), isa, threads, way) == -1  # type: ignore[attr-defined]
    return found, distances


def made(centroids: np.ndarray, metric: str = "l2") -> object:
    return _C.CentroidIndex(address_of(centroids), *centroids.shape, metric == "cosine")


def check_all_ways(points: np.ndarray, centroids: np.ndarray) -> None:
    expected = brute_force(points, centroids)
    truth = ((points.astype(np.float64) - centroids.astype(np.float64)[expected]) ** 2).sum(axis=1)
    for isa in ISAS:
        for way in ways(isa, points, len(centroids)):
            found, distances = search(made(centroids), points, way, isa)
            np.testing.assert_array_equal(found, expected, f"{way} {isa}")
            with np.errstate(over="ignore"):
                np.testing.assert_array_max_ulp(distances, truth.astype(np.float32), 1)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 67, 256])
def test_every_way_finds_the_nearest_of_random_points(dim: int) -> None:
    rng = np.random.default_rng(dim)
    for n, k in ((1, 40), (9, 1), (65, 97), (150, 700)):
        check_all_ways(*(rng.standard_normal((m, dim)).astype(np.float32) for m in (n, k)))


@pytest.mark.parametrize("dim", [3, 8, 16, 33])
def test_every_way_gives_ties_to_the_lowest_index(dim: int) -> None:
    rng = np.random.default_rng(dim)
    some = rng.integers(0, 4, (90, dim)).astype(np.float32)
    centroids = np.concatenate([some, some[::-1], some])  # duplicates
    pairs = rng.integers(0, len(centroids), (2, 120))
    bisectors = (centroids[pairs[0]] + centroids[pairs[1]]) / np.float32(2)
    check_all_ways(bisectors, centroids)
    check_all_ways(rng.integers(0, 5, (120, dim), dtype=np.uint8), centroids)
    check_all_ways(bisectors[:20], np.zeros((70, dim), np.float32))
    check_all_ways(bisectors[:20] + np.float32(1e5), centroids + np.float32(1e5))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-15, 1e-12, 1e-11, 1e11, 1e13, 1e18, 1e30])
def test_every_way_bears_tiny_and_huge_numbers(scale: float) -> None:
    rng = np.random.default_rng(1)
    for dim in (3, 7, 40):
        points, centroids = ((rng.uniform(-1, 1, (n, dim)) * scale).astype(np.float32) for n in (80, 120))
        far = np.concatenate([points, (points * rng.choice([1e-3, 10, 1e4, 1e7], (80, 1))).astype(np.float32)])
        with np.errstate(over="ignore"):
            far = far[np.isfinite(far).all(axis=1)]
        check_all_ways(far, centroids)
        mixed = np.concatenate([centroids, rng.standard_normal((20, dim)).astype(np.float32)])
        check_all_ways(np.concatenate([points, rng.standard_normal((20, dim)).astype(np.float32)]), mixed)


def int8_scores(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those of csrc/nearest/int8_book.cpp in float64, how far they are from the truth, and the bound of that."""
    c, x = (rows.astype(np.float64) - centroids.mean(axis=0, dtype=np.float64) for rows in (centroids, points))
    s, u = (np.abs(rows).max() / 127 for rows in (c, x))
    q, p = np.rint(c / s), np.rint(x / u)
    f, e = c - s * q, x - u * p
    scores = ((c**2).sum(axis=1) / 2 - (c * f).sum(axis=1))[None] - u * s * (p @ q.T)
    truth = (c**2).sum(axis=1) / 2 - x @ c.T + (e * x).sum(axis=1)[:, None]
    distance = np.sqrt(((x[:, None] - c[None]) ** 2).sum(axis=2))
    size_e, size_f = np.linalg.norm(e, axis=1)[:, None], np.linalg.norm(f, axis=1)[None]
    return scores, np.abs(scores - truth), distance * (size_e + size_f) + size_e * size_f


def near_misses(dim: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of centroids on either side of a point, the farther one by a little, that int8 confuses: their coordinates
    lie between two of its steps."""
    middles = rng.integers(-50, 50, (60, dim)).astype(np.float64)
    apart = rng.uniform(0.2, 0.5, (60, dim)) * rng.choice([-1, 1], (60, dim))
    closer, farther = middles + apart * 0.98, middles - apart
    edge = np.full((1, dim), 127.0)  # so that a step of int8 is 1
    centroids = np.concatenate([edge, -edge, farther, closer]).astype(np.float32)
    return (middles + rng.uniform(-0.02, 0.02, middles.shape)).astype(np.float32), centroids


def straight_errors(dim: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The proof's inequality as an equation: the errors of int8 all point from the nearest centroid to the point."""
    sign = rng.choice([-1.0, 1.0], (60, dim))
    points = rng.integers(-50, 50, (60, dim)) - 0.49 * sign
    points[0] = 127 * sign[0]  # so that a step of the points is 1
    away = rng.choice([-1.0, 1.0], (60, dim))
    away[:, : 2 + dim // 50] *= 2  # farther than 1.02 in every dimension
    closer, rival, edge = points - 1.02 * sign, points - away, np.full((1, dim), 127.0)
    half = np.concatenate([edge, np.clip(rival, -127, 127), np.clip(closer, -127, 127)])
    return points.astype(np.float32), np.concatenate([half, -half]).astype(np.float32)  # their mean is 0


@pytest.mark.parametrize("dim", [4, 7, 8, 15, 33, 128])
@pytest.mark.parametrize("make", [near_misses, straight_errors])
def test_int8_scores_that_are_wrong_do_not_decide(
    dim: int, make: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
) -> None:
    points, centroids = make(dim, np.random.default_rng(dim))
    expected = brute_force(points, centroids)
    wrong = int8_scores(points, centroids)[0].argmin(axis=1) != expected
    assert wrong.mean() > 0.1, "else this test shows nothing"
    check_all_ways(points, centroids)


@pytest.mark.parametrize("dim", [3, 8, 33, 128])
def test_the_bound_of_int8_scores_holds_and_is_met(dim: int) -> None:
    rng = np.random.default_rng(dim)
    usual = [rng.standard_normal((n, dim)).astype(np.float32) for n in (200, 300)]
    for points, centroids in (usual, near_misses(dim, rng), straight_errors(dim, rng)):
        _, error, bound = int8_scores(points, centroids)
        assert (error <= bound * (1 + 1e-9)).all()
    assert (error / (bound + 1e-9)).max() > 0.99


@pytest.mark.parametrize("dim", [3, 8, 32])
def test_results_depend_neither_on_batch_nor_on_threads(dim: int) -> None:
    rng = np.random.default_rng(dim)
    points, centroids = (rng.standard_normal((n, dim)).astype(np.float32) for n in (1500, 900))
    index = made(centroids)
    for way in ways(ISAS[-1], points, 900):
        whole = search(index, points, way)
        for threads, step in ((1, 1), (1, 7), (3, 129), (2, 1000)):
            if step == 1 and way in ("float32", "int8"):
                step = 31
            parts = [search(index, points[i : i + step], way, threads=threads) for i in range(0, 1500, step)]
            for one, pieces in zip(whole, zip(*parts)):
                np.testing.assert_array_equal(one, np.concatenate(pieces))


def test_uint8_colours_get_the_same_with_and_without_a_table() -> None:
    """As many pixels as make the index build one, on the way."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (80_000, 3), dtype=np.uint8)
    for centroids in (
        rng.uniform(-20, 275, (300, 3)).astype(np.float32),
        rng.integers(0, 9, (40, 3)).astype(np.float32),
    ):
        index = NearestCentroid(centroids)
        first, before = index.search(pixels), index.nbytes
        again = [index.search(pixels, return_distances=True) for _ in range(3)]
        assert index.nbytes > before + (1 << 20)
        floats = nearest_centroid(pixels.astype(np.float32), centroids, return_distances=True)
        np.testing.assert_array_equal(first, floats[0])
        for found in again:
            np.testing.assert_array_equal(found, floats)


@pytest.mark.parametrize("far", [1e4, 2e5, 1e20])
def test_uint8_colours_against_centroids_far_away(far: float) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (300, 3), dtype=np.uint8)
    centroids = (rng.uniform(-1, 1, (40, 3)) * far).astype(np.float32)
    np.testing.assert_array_equal(nearest_centroid(pixels, centroids), brute_force(pixels, centroids))


def test_an_impossible_way_is_refused() -> None:
    points = np.zeros((4, 20), np.float32)
    for way in ("tree", "grid", "table"):
        with pytest.raises(ValueError, match="cannot search"):
            search(made(points), points, way)
    with pytest.raises(ValueError, match="not 'best'"):
        search(made(points), points, "best")
    if ISAS[-1] == "avx512vnni":
        with pytest.raises(ValueError, match="cannot search"):
            search(made(points), points, "int8", isa="avx512")


# --- the index object ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_an_index_finds_what_the_function_finds(metric: nearest.Metric) -> None:
    rng = np.random.default_rng(4)
    points, centroids = (rng.standard_normal((n, 12)).astype(np.float32) for n in (700, 400))
    expected = nearest_centroid(points, centroids, metric=metric, return_distances=True)
    index = fastigpt.NearestCentroid(centroids, metric=metric)
    assert (index.n_centroids, index.dim, index.metric, len(index)) == (400, 12, metric, 400)
    assert repr(index) == f"NearestCentroid(400 centroids of 12, {metric}, cpu)"
    centroids[:] = 0  # it has a copy
    for one in (index, pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        for a, b in zip(one.search(points, return_distances=True), expected):
            np.testing.assert_array_equal(a, b)
        tensor = torch.from_numpy(points).view(7, 100, 12)
        found = one.search(tensor)
        assert isinstance(found, torch.Tensor) and np.array_equal(found.flatten(), expected[0])
        assert np.array_equal(one.search(points[3], threads=1), expected[0][3])


def test_an_index_takes_centroids_of_every_kind() -> None:
    rng = np.random.default_rng(5)
    points = rng.standard_normal((50, 4)).astype(np.float32)
    wide = rng.integers(0, 9, (60, 8))
    for centroids in (wide.astype(np.uint8)[::2, ::2], torch.tensor(wide).bfloat16()[::2, ::2], wide[::2, ::2] / 9):
        kept = (
            centroids.astype(np.float32)
            if not isinstance(centroids, torch.Tensor) and centroids.dtype == float
            else centroids
        )
        expected = brute_force(
            points, np.asarray(torch.as_tensor(kept.copy() if isinstance(kept, np.ndarray) else kept).float())
        )
        np.testing.assert_array_equal(NearestCentroid(kept).search(points), expected)


def test_many_threads_may_search_one_index() -> None:
    rng = np.random.default_rng(6)
    points, centroids = (rng.standard_normal((n, 3)).astype(np.float32) for n in (40_000, 500))
    expected = nearest_centroid(points, centroids)
    index, results = NearestCentroid(centroids), []
    workers = [threading.Thread(target=lambda: results.append(index.search(points, threads=2))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(np.array_equal(found, expected) for found in results)


@pytest.mark.parametrize(
    ("centroids", "metric", "error", "says"),
    [
        ([[0.0, 1.0]], "l2", TypeError, "centroids must be a numpy array"),
        (np.zeros((0, 3), np.float32), "l2", ValueError, "centroids must have shape"),
        (np.full((2, 3), np.nan, np.float32), "l2", ValueError, r"must be finite; found nan at \[0, 0\]"),
        (np.array([[1, 0], [0, 0]], np.float32), "cosine", ValueError, "row 1 is"),
        (np.eye(3, dtype=np.float32), "l1", ValueError, "metric must be"),
    ],
)
def test_bad_centroids_of_an_index_are_named(centroids: object, metric: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        NearestCentroid(centroids, metric=metric)  # type: ignore[arg-type]


def test_bad_points_of_an_index_are_named() -> None:
    index = NearestCentroid(np.eye(3, dtype=np.float32))
    for points, error, says in [
        (np.zeros((4, 2), np.float32), ValueError, r"points must have shape \[\.\.\., 3\], not \[4, 2\]"),
        (np.array(1, np.float32), ValueError, "points must have shape"),
        (np.zeros((4, 3)), TypeError, "not float64"),
        (np.full((2, 3), np.inf, np.float32), ValueError, r"points must be finite; the one at \[0\] is not"),
    ]:
        with pytest.raises(error, match=says):
            index.search(points)
    with pytest.raises(ValueError, match="threads must be"):
        index.search(np.zeros((1, 3), np.float32), threads=0)


# --- what the function keeps ------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_recent", ())


@pytest.mark.usefixtures("nothing_kept")
def test_a_codebook_is_made_ready_once_and_told_by_its_content() -> None:
    rng = np.random.default_rng(7)
    points, centroids = (rng.standard_normal((n, 5)).astype(np.float32) for n in (30, 20))
    nearest_centroid(points, centroids)
    [kept] = nearest._recent
    for same in (centroids.copy(), torch.from_numpy(centroids), np.repeat(centroids, 2, 0)[::2]):
        nearest_centroid(points, same)
        assert nearest._recent == (kept,)
    nearest_centroid(points, centroids, metric="cosine")
    nearest_centroid(points[:, :4], np.ascontiguousarray(centroids.reshape(25, 4)))
    assert len(nearest._recent) == 3


@pytest.mark.usefixtures("nothing_kept")
def test_a_codebook_changed_in_place_is_another_one() -> None:
    """Also by ways that no version counter sees."""
    rng = np.random.default_rng(8)
    points, centroids = (rng.standard_normal((n, 3)).astype(np.float32) for n in (200, 100))
    tensor = torch.from_numpy(centroids)
    for change in (lambda: centroids.__imul__(-1), lambda: tensor.data.neg_(), lambda: tensor.add_(0.5)):
        for _ in range(2):
            np.testing.assert_array_equal(nearest_centroid(points, tensor), brute_force(points, centroids))
        change()
    centroids[-1, -1] = np.nan
    with pytest.raises(ValueError, match="centroids must be finite"):
        nearest_centroid(points, tensor)


@pytest.mark.usefixtures("nothing_kept")
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    points = rng.standard_normal((20, 6)).astype(np.float32)
    books = [rng.standard_normal((30, 6)).astype(np.float32) for _ in range(12)]
    for book in books:
        nearest_centroid(points, book)
    assert len(nearest._recent) == nearest._KEPT == 8
    nearest_centroid(points, books[6])
    assert nearest._recent[0].holds(address_of(books[6]), (30, 6), "l2") and len(nearest._recent) == 8
    monkeypatch.setattr(nearest, "_KEPT_BYTES", 3 * nearest._recent[0].nbytes)
    nearest_centroid(points, books[0])
    assert 0 < len(nearest._recent) <= 3
    assert sum(index.nbytes for index in nearest._recent) <= nearest._KEPT_BYTES
    large = rng.standard_normal((2000, 6)).astype(np.float32)
    nearest_centroid(points, large)
    assert not any(index.n_centroids == 2000 for index in nearest._recent)
    np.testing.assert_array_equal(nearest_centroid(points, large), brute_force(points, large))
