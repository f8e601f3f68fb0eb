"""nearest_centroid returns the argmin of real arithmetic, on every instruction set, for every layout and dtype."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastigpt import _C
from fastigpt.nearest import nearest_centroid

ISAS = [isa for isa in _C.supported_isas() if isa != "amx"]  # which searches as avx512vnni does


def brute_force(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Plain twin: argmin of the float64 distances; where float64 cannot tell two apart, of fractions."""
    found = np.empty(len(points), np.int64)
    for i, x in enumerate(points.astype(np.float64)):
        d = ((x - centroids.astype(np.float64)) ** 2).sum(axis=1)
        close = np.flatnonzero(d <= d.min() * (1 + 1e-12))
        exact = [sum((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in zip(x, centroids[j])) for j in close]
        found[i] = close[exact.index(min(exact))] if len(close) > 1 else close[0]
    return found


def check(points: np.ndarray, centroids: np.ndarray, **kwargs: object) -> None:
    expected = brute_force(points, centroids)
    for isa in ISAS:
        found, distances = nearest_centroid(points, centroids, return_distances=True, isa=isa, **kwargs)  # type: ignore[call-overload]
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64 and distances.dtype == np.float32
        truth = ((points.astype(np.float64) - centroids.astype(np.float64)[expected]) ** 2).sum(axis=1)
        with np.errstate(over="ignore"):
            np.testing.assert_array_max_ulp(distances, truth.astype(np.float32), 1)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 32, 256])
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 512, 2049])
def test_random_points_get_the_index_of_the_brute_force(dim: int, k: int) -> None:
    rng = np.random.default_rng(dim * 10007 + k)
    points, centroids = (rng.standard_normal((n, dim)).astype(np.float32) for n in (131, k))
    check(points, centroids)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_data_far_from_the_origin(offset: float) -> None:
    rng = np.random.default_rng(3)
    points, centroids = (rng.standard_normal((n, 4)).astype(np.float32) + np.float32(offset) for n in (300, 700))
    check(points, centroids)


def test_uint8_points_in_many_dimensions() -> None:
    rng = np.random.default_rng(4)
    for dim in (1, 3, 4, 27):
        points = rng.integers(0, 256, (300, dim), dtype=np.uint8)
        check(points, rng.uniform(0, 255, (400, dim)).astype(np.float32))
        check(points, rng.integers(0, 256, (400, dim)).astype(np.float32))  # ties abound


def test_points_on_bisectors_take_the_lowest_index() -> None:
    rng = np.random.default_rng(5)
    centroids = rng.integers(-64, 64, (50, 3)).astype(np.float32)
    pairs = rng.integers(0, 50, (400, 2))
    check((centroids[pairs[:, 0]] + centroids[pairs[:, 1]]) / np.float32(2), centroids)
    corners = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], np.float32)
    check(np.zeros((3, 3), np.float32), corners)
    # Equal in real arithmetic, unequal in float64 sums taken in order.
    permuted = np.array([[0.1, 0.7, 1e-4], [1e-4, 0.1, 0.7], [0.7, 1e-4, 0.1]], np.float32)
    check(np.zeros((1, 3), np.float32), permuted)


def test_duplicate_centroids_take_the_lowest_index() -> None:
    rng = np.random.default_rng(6)
    some = rng.standard_normal((40, 8)).astype(np.float32)
    check(rng.standard_normal((200, 8)).astype(np.float32), np.concatenate([some, some[::-1], some]))
    check(rng.standard_normal((20, 8)).astype(np.float32), np.zeros((300, 8), np.float32))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e-20, 1e18, 1e25, 3e38])
def test_extreme_values(scale: float) -> None:
    rng = np.random.default_rng(7)
    points = (rng.uniform(-1, 1, (60, 5)) * scale).astype(np.float32)
    centroids = (rng.uniform(-1, 1, (90, 5)) * scale).astype(np.float32)
    check(points, centroids)
    mixed = np.concatenate([centroids, rng.standard_normal((20, 5)).astype(np.float32)])
    check(np.concatenate([points, rng.standard_normal((20, 5)).astype(np.float32)]), mixed)


def test_widened_dtypes_equal_their_float32_values() -> None:
    rng = np.random.default_rng(8)
    centroids = rng.standard_normal((100, 6)).astype(np.float32)
    bits = torch.from_numpy(rng.integers(0, 1 << 16, (3000, 6), dtype=np.uint16).view(np.int16))
    for dtype in (torch.float16, torch.bfloat16):
        points = bits.view(dtype)
        points = points[points.isfinite().all(dim=1)]
        found = nearest_centroid(points, torch.from_numpy(centroids))
        assert torch.equal(found, nearest_centroid(points.float(), torch.from_numpy(centroids)))
    half = rng.standard_normal((50, 6)).astype(np.float16)
    check(half, centroids)
    narrow = centroids.astype(np.float16)
    np.testing.assert_array_equal(nearest_centroid(half, narrow), brute_force(half, narrow))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_strides(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4), label="shape"))
    dim, k = data.draw(st.integers(1, 9), label="dim"), data.draw(st.integers(1, 70), label="k")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    dtype = data.draw(st.sampled_from([np.uint8, np.float32, np.float16]), label="dtype")
    wide = rng.integers(0, 50, tuple(2 * s + 1 for s in (*shape, dim))).astype(dtype)
    points = wide[tuple(slice(1, 2 * s + 1, 2) for s in (*shape, dim))]
    for axis in range(points.ndim):
        if data.draw(st.booleans(), label=f"flip {axis}"):
            points = np.flip(points, axis)
    points = np.moveaxis(points, 0, -2) if points.ndim > 2 and data.draw(st.booleans(), label="move") else points
    points.setflags(write=False)
    centroids = rng.integers(0, 50, (k, dim)).astype(np.float32)
    found = nearest_centroid(points, centroids, isa=data.draw(st.sampled_from(ISAS)), threads=2)
    assert found.shape == points.shape[:-1]
    flat = np.ascontiguousarray(points).reshape(-1, dim)
    np.testing.assert_array_equal(found.reshape(-1), brute_force(flat, centroids))


def test_slices_of_images_are_read_in_place() -> None:
    rng = np.random.default_rng(9)
    image = rng.integers(0, 256, (40, 50, 4), dtype=np.uint8)
    centroids = rng.integers(0, 256, (30, 3)).astype(np.float32)
    crop = image[3:37:2, ::-1, :3]
    expected = brute_force(np.ascontiguousarray(crop).reshape(-1, 3), centroids).reshape(crop.shape[:2])
    np.testing.assert_array_equal(nearest_centroid(crop, centroids), expected)
    planar = torch.from_numpy(image).permute(2, 0, 1).contiguous()[:3].permute(1, 2, 0)  # channel-first storage
    assert torch.equal(
        nearest_centroid(planar[3:37:2].flip(1), torch.from_numpy(centroids)), torch.from_numpy(expected)
    )
    repeated = torch.from_numpy(image[0, 0, :3]).expand(5, 3)  # stride 0
    assert len(set(nearest_centroid(repeated, centroids).tolist())) == 1


def test_threads_and_instruction_sets_do_not_change_the_result() -> None:
    rng = np.random.default_rng(10)
    points, centroids = (rng.standard_normal((n, 8)).astype(np.float32) for n in (5003, 3001))
    first = nearest_centroid(points, centroids, return_distances=True, isa="generic", threads=1)
    for isa in ISAS:
        for threads in (1, 2, 5):
            found = nearest_centroid(points, centroids, return_distances=True, isa=isa, threads=threads)
            assert all(np.array_equal(a, b) for a, b in zip(first, found))


def test_cosine_is_l2_on_normalised_rows() -> None:
    rng = np.random.default_rng(11)
    points, centroids = (rng.standard_normal((n, 16)).astype(np.float32) for n in (500, 300))
    points[7] = 0

    def unit(rows: np.ndarray) -> np.ndarray:
        wide = rows.astype(np.float64)
        return (wide / np.sqrt((wide**2).sum(axis=1, keepdims=True))).astype(np.float32)

    with np.errstate(invalid="ignore"):
        normal = unit(points)
    normal[7] = 0
    found, distances = nearest_centroid(points, centroids, metric="cosine", return_distances=True)
    keep = np.arange(500) != 7
    np.testing.assert_array_equal(found[keep], brute_force(normal[keep], unit(centroids)))
    similarity = (normal[keep].astype(np.float64) * unit(centroids)[found[keep]]).sum(axis=1)
    np.testing.assert_allclose(distances[keep], 2 - 2 * similarity, atol=1e-6)
    assert found[7] == 0 and distances[7] == 1


def test_same_framework_comes_back() -> None:
    centroids = np.eye(3, dtype=np.float32)
    assert nearest_centroid(np.zeros((0, 3), np.float32), centroids).shape == (0,)
    assert nearest_centroid(centroids[1], centroids).shape == () and nearest_centroid(centroids[1], centroids) == 1
    tensor = torch.eye(3, requires_grad=True)
    found, distances = nearest_centroid(tensor, torch.eye(3), return_distances=True)
    assert found.dtype == torch.int64 and found.tolist() == [0, 1, 2] and distances.dtype == torch.float32


FLOATS, EYE = np.zeros((4, 3), np.float32), np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("points", "centroids", "error", "says"),
    [
        ([[0.0, 0.0, 0.0]], EYE, TypeError, "points must be a numpy array, a torch tensor or the like, not list"),
        (FLOATS.astype(np.float64), EYE, TypeError, "points must be one of uint8, .*, not float64"),
        (FLOATS.astype(np.int64), EYE, TypeError, "not int64"),
        (FLOATS.astype(">f4"), EYE, TypeError, "not >f4"),
        (torch.zeros(2, 3, dtype=torch.complex64), EYE, TypeError, "not complex64"),
        (torch.zeros(4, 3).to_sparse(), EYE, TypeError, "dense"),
        (torch.zeros(4, 3, device="meta"), EYE, ValueError, "not on meta"),
        (np.array(1, np.float32), EYE, ValueError, r"points must have shape \[\.\.\., D\]"),
        (np.zeros((4, 0), np.float32), EYE, ValueError, "D of at least 1"),
        (FLOATS, np.zeros((0, 3), np.float32), ValueError, "centroids must have shape"),
        (FLOATS, np.zeros(3, np.float32), ValueError, "centroids must have shape"),
        (FLOATS, np.zeros((2, 2, 3), np.float32), ValueError, "centroids must have shape"),
        (FLOATS, np.zeros((2, 4), np.float32), ValueError, r"\[4, 3\] and \[2, 4\]"),
        (FLOATS, EYE * np.nan, ValueError, r"centroids must be finite; found nan at \[0, 0\]"),
        (FLOATS, np.where(EYE > 0, np.inf, EYE).astype(np.float32), ValueError, "centroids must be finite; found inf"),
    ],
)
def test_bad_input_is_named(points: object, centroids: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        nearest_centroid(points, centroids)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_points_that_are_not_finite_are_named(value: float, isa: str) -> None:
    points = np.zeros((9, 70, 3), np.float32)
    points[4, 66, 1] = value
    with pytest.raises(ValueError, match=r"points must be finite; the one at \[4, 66\] is not"):
        nearest_centroid(points, EYE, isa=isa)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="metric must be"):
        nearest_centroid(FLOATS, EYE, metric="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be"):
        nearest_centroid(FLOATS, EYE, threads=0)
    with pytest.raises(ValueError, match="isa must be"):
        nearest_centroid(FLOATS, EYE, isa="sse")
    with pytest.raises(ValueError, match="row 1 is"):
        nearest_centroid(FLOATS, np.array([[1, 0, 0], [0, 0, 0]], np.float32), metric="cosine")


class Foreign:
    """An array of another framework, as far as this library can see: DLPack, and a namespace to make more."""

    def __init__(self, values: object) -> None:
        self.values = np.from_dlpack(values) if isinstance(values, torch.Tensor) else values

    def __dlpack__(self, **kwargs: object) -> object:
        return self.values.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()

    def __array_namespace__(self) -> type:
        return ForeignNamespace


class ForeignNamespace:
    from_dlpack = Foreign


def test_dlpack_arrays_come_back_as_their_own_kind() -> None:
    rng = np.random.default_rng(12)
    points, centroids = (rng.standard_normal((n, 5)).astype(np.float32) for n in (40, 30))
    found, distances = nearest_centroid(Foreign(points), Foreign(centroids), return_distances=True)
    assert isinstance(found, Foreign) and isinstance(distances, Foreign)
    np.testing.assert_array_equal(found.values, brute_force(points, centroids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_jax_arrays_come_back_as_jax_arrays(dtype: str) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    points = np.random.default_rng().uniform(0, 9, (5, 20, 3)).astype(np.float32)
    centroids = np.random.default_rng().uniform(0, 9, (17, 3)).astype(np.float32)
    theirs = jax.numpy.asarray(points).astype(dtype)
    index, distances = nearest_centroid(theirs, jax.numpy.asarray(centroids), return_distances=True)
    assert isinstance(index, jax.Array) and isinstance(distances, jax.Array)
    expected = nearest_centroid(np.asarray(theirs.astype("float32")), centroids, return_distances=True)
    np.testing.assert_array_equal(index, expected[0])
    np.testing.assert_allclose(distances, expected[1], rtol=1e-5, atol=1e-6)


def test_grid_and_tree_meet_points_outside_and_on_their_borders() -> None:
    """Three dimensions: cells of a grid, and the tree beyond it. Centroids on few levels, so that borders are met."""
    rng = np.random.default_rng(13)
    for k in (64, 65, 512, 2048, 2049):
        centroids = rng.integers(0, 16, (k, 3)).astype(np.float32)
        inside = rng.integers(-8, 40, (500, 3)).astype(np.float32) / 2
        outside = (rng.standard_normal((100, 3)) * rng.choice([1, 100, 1e4, 1e20], (100, 1))).astype(np.float32)
        check(np.concatenate([inside, outside]), centroids)
    flat = centroids.copy()
    flat[:, 1] = 3  # no extent along one axis
    check(inside, flat)
    far = centroids + np.float32(1e6)  # cells that float32 cannot tell apart
    check(inside + np.float32(1e6), far)


def test_tree_gives_way_to_brute_force_where_it_opens_too_much() -> None:
    rng = np.random.default_rng(14)
    points, centroids = (rng.standard_normal((n, 16)).astype(np.float32) for n in (3000, 600))
    sphere = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    check(points, sphere.astype(np.float32), threads=1)
