"""The CUDA kernels of the nearest centroid, run on the CPU (csrc/cuda/host): they give the CPU's answers for what
test_nearest_centroid_cuda.py asks on a GPU, at small sizes, without races and without a step outside their memory; and
bugs that are put into a copy of them are found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_host import CSRC, Case, build, needs_compiler, search
from test_nearest_centroid_cuda import DIMS, DTYPES, PIXELS, SIZES, SOURCE

from fastigpt import _C
from fastigpt.codecs.palette import Palette
from fastigpt.nearest import address_of, nearest_centroid

pytestmark = needs_compiler

RUNNER = CSRC / "tests" / "run_nearest_centroid.cpp"
SMALL_SIZES = [min(k, 1030) for k in SIZES]  # more than one tile of centroids, in each kernel
PALETTE = Palette(np.random.default_rng(0).uniform(-1, 1, (16, 3)))


def colours() -> _C.RgbTable:
    """The table that the palette looks its colours up in."""
    clusters = 255 * PALETTE.clusters.astype(np.float64)
    levels = np.tile(2.0 * np.arange(256) - 255.0, (3, 1))
    return _C.RgbTable(address_of(clusters), len(clusters), address_of(levels), "auto", 1)


def expected(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """The plain twin: the CPU's."""
    if isinstance(case.book, torch.Tensor):
        indices, distances = nearest_centroid(case.points, case.book, return_distances=True, threads=1)
        return indices.numpy(), distances.numpy() if case.distances else None
    return PALETTE.encode(case.points, threads=1).numpy(), None


def differs(case: Case, found: tuple[np.ndarray, np.ndarray]) -> bool:
    indices, distances = expected(case)
    if not np.array_equal(found[0], indices):
        return True
    return distances is not None and not (np.abs(found[1] - distances) <= np.spacing(distances)).all()


def check(program: Path, cases: Sequence[Case], **environment: str) -> None:
    results = search(program, cases, **environment)
    assert not isinstance(results, str), results[:4000]
    for case, found in zip(cases, results, strict=True):
        assert not differs(case, found), (case.points.shape, case.points.dtype, case.book)


def random_case(dtype: torch.dtype, dim: int, k: int, *, distances: bool = True) -> Case:
    """A view as on the GPU, of fewer points: more than one block of 64 and not a multiple of it."""
    generator = torch.Generator().manual_seed(dim * 7919 + k)
    points = (torch.rand(3, 5, 28, dim, generator=generator) * 255).to(dtype)[:, ::2, 1:26:3]
    centroids = torch.randint(0, 256, (k, dim), generator=generator).float()  # ties and duplicates among them
    return Case(points, centroids, distances)


def pixel_cases(n: int, table: _C.RgbTable) -> list[Case]:
    pixels = torch.randint(0, 256, (n + 8, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = pixels[:, :3].contiguous()
    return [Case(view, table, False) for view in (packed[:n], packed[1 : n + 1], pixels[8:, :3])]


def all_ties(n: int, k: int, dim: int) -> Case:
    """Every point is equally far from several centroids. The lowest of them is odd: a reduction in halves finds it in
    its last step."""
    generator = torch.Generator().manual_seed(dim)
    some = torch.randint(0, 4, (k // 3, dim), generator=generator).float()
    book = torch.cat([some, some.flip(0), some])
    points = torch.randint(0, 4, (20 * n, dim), generator=generator).to(torch.uint8)
    points = points[nearest_centroid(points, book) % 2 == 1][:n].contiguous()
    assert len(points) == n
    return Case(points, book)


def small_cases() -> list[Case]:
    """Each kernel once; more than one tile of centroids, more than one block, ends that do not come out even."""
    cases = [random_case(torch.uint8, 3, 1030), random_case(torch.float32, 13, 63), random_case(torch.float16, 17, 70)]
    cases += [all_ties(2, 70, 17), all_ties(5, 300, 16), *pixel_cases(9, colours())]
    several_blocks = torch.rand(1026, 3, generator=torch.Generator().manual_seed(0))
    return [*cases, Case(several_blocks, several_blocks[:50] + 0.01)]


def test_small_searches_without_races(tmp_path: Path) -> None:
    check(build(tmp_path / "races", "races", RUNNER, SOURCE), small_cases())


@pytest.fixture(scope="module", params=["races", "bounds"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nearest") / request.param, request.param, RUNNER, SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_the_cpus(program: Path, dtype: torch.dtype) -> None:
    """For every number of dimensions and centroids. Where threads meet does not depend on the dtype, so that races are
    looked for with one dtype for each of those shapes."""
    shapes = list(itertools.product(DIMS, SMALL_SIZES))
    if program.name == "races":
        shapes = shapes[DTYPES.index(dtype) :: len(DTYPES)]
    cases = [random_case(dtype, dim, k, distances=i % 2 == 0) for i, (dim, k) in enumerate(shapes)]
    check(program, cases)


@pytest.mark.slow
def test_small_searches_do_not_depend_on_what_memory_held_before(program: Path) -> None:
    check(program, small_cases())
    check(program, small_cases(), FASTIGPT_CUDA_BORN="0")


@pytest.mark.slow
def test_colours_are_the_cpus(program: Path) -> None:
    table = colours()
    check(program, [case for n in PIXELS for case in pixel_cases(min(n, 1 << 10), table)])


@pytest.mark.slow
def test_points_that_are_not_finite_get_no_index(program: Path) -> None:
    for dim in (3, 13, 17):
        points = torch.zeros(3, dim)
        points[1, 0], points[2, 1] = torch.nan, torch.inf
        [(indices, distances)] = search(program, [Case(points, torch.eye(dim))])
        assert indices.tolist() == [0, -1, -1] and np.isnan(distances[1:]).all() and distances[0] == 1


@pytest.mark.slow
def test_cosine_is_the_cpus(program: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(90, 16, generator=generator), torch.randn(300, 16, generator=generator)
    unit = [(rows.double() / rows.double().norm(dim=1, keepdim=True)).float() for rows in (points, centroids)]
    [(indices, _)] = search(program, [Case(*unit)])
    assert np.array_equal(indices, nearest_centroid(points, centroids, metric="cosine").numpy())


# Bugs put into a copy of the source: what stands there, what stands there then (BUG: this one is asked for), who finds
# it, by what it says; "" for a wrong answer.
RACE, OUTSIDE = "data race", "heap-buffer-overflow"
TIES = "(d2 < exact) exact = d2, index[p]", "(BUG ? d2 <= exact : d2 < exact) exact = d2, index[p]"
LAST = "first + p >= view.n) break", "first + p >= view.n + BUG) break"
BUGS: dict[str, tuple[str, str, str, str]] = {
    "a tile is read before all of it is there": (
        "view.dim + d] : 0;\n    }\n    __syncthreads();",
        "view.dim + d] : 0;\n    }\n    if (!BUG) __syncthreads();",
        "races",
        RACE,
    ),
    "a tile is overwritten while it is read": (
        "min(kTile, k - start);\n    __syncthreads();",
        "min(kTile, k - start);\n    if (!BUG) __syncthreads();",
        "races",
        RACE,
    ),
    "a slice is overwritten while it is read": (
        "d0 += kDepth) {\n      __syncthreads();",
        "d0 += kDepth) {\n      if (!BUG) __syncthreads();",
        "races",
        RACE,
    ),
    "corners are read before they are there": (
        "index[i];\n  }\n  __syncthreads();",
        "index[i];\n  }\n  if (!BUG) __syncthreads();",
        "races",
        RACE,
    ),
    "a reduction without its barriers": (
        "half /= 2) {\n        __syncthreads();",
        "half /= 2) {\n        if (!BUG) __syncthreads();",
        "races",
        RACE,
    ),
    "a reduction is read before it is done": (
        "__syncthreads();\n      winner = low_index[0];",
        "if (!BUG) __syncthreads();\n      winner = low_index[0];",
        "races",
        RACE,
    ),
    "a reduction begins while the last one is read": (
        "winner = low_index[0];\n      __syncthreads();",
        "winner = low_index[0];\n      if (!BUG) __syncthreads();",
        "races",
        RACE,
    ),
    "two blocks write the same points": (
        "int64_t(blockIdx.x) * kSide;",
        "int64_t(blockIdx.x) * (kSide - BUG);",
        "races",
        RACE,
    ),
    "a barrier that some threads leave out": (
        "view.dim + d] : 0;\n      }\n      __syncthreads();",
        "view.dim + d] : 0;\n      }\n      if (!(BUG && threadIdx.x == 7)) __syncthreads();",
        "bounds",
        "threads meet at different barriers",
    ),
    "a tile is filled past its end": (
        "i < here * kRow; i += kThreads",
        "i < here * kRow + 4 * (BUG && start + here < k); i += kThreads",
        "bounds",
        "use-after-poison",
    ),
    "a row of shared memory too far": ("cs[i % kDepth][at] =", "cs[i % kDepth + BUG][at] =", "bounds", "out of bounds"),
    "the last point and one more": (
        "first + p >= view.n) break",
        "first + p >= view.n + BUG) break",
        "bounds",
        OUTSIDE,
    ),
    "the last centroid and one more": (
        "inside && start + at < k ?",
        "inside && start + at < k + BUG ?",
        "bounds",
        OUTSIDE,
    ),
    "four pixels where fewer are left": ("quads = view.n / 4;", "quads = (view.n + 3 * BUG) / 4;", "bounds", OUTSIDE),
    "padding is left as it was born": (
        "reinterpret_cast<float*>(tile)[i] = d <",
        "if (!BUG || d < view.dim) reinterpret_cast<float*>(tile)[i] = d <",
        "bounds",
        "",
    ),
    "of ties the last wins": (
        "if (d2 < exact) exact = d2, index[p]",
        "if (BUG ? d2 <= exact : d2 < exact) exact = d2, index[p]",
        "bounds",
        "",
    ),
    "of ties any wins, in a reduction": (
        "j < low_index[threadIdx.x]))",
        "(BUG ? j > low_index[threadIdx.x] : j < low_index[threadIdx.x])))",
        "bounds",
        "",
    ),
    "float32 has the last word": ("return second <=", "return !BUG && second <=", "bounds", ""),
    "half is read as an integer": ("return __half2float(", "return BUG ? p[0] : __half2float(", "bounds", ""),
}


def with_bugs(source: Path, copy: Path) -> Path:
    """A copy that does as the source does, unless BUG in the environment asks for one of BUGS, counted from 1."""
    text = source.read_text()
    for number, (old, new, _, _) in enumerate(BUGS.values(), 1):
        assert text.count(old) == 1, old
        text = text.replace(old, new.replace("BUG", f"(bug == {number})"))
    head = '#include <cstdlib>\nstatic const int bug = std::getenv("BUG") ? std::atoi(std::getenv("BUG")) : 0;\n'
    copy.write_text(head + text)
    return copy


def nearly_ties() -> Case:
    """Pairs of centroids that differ in the last place of float32."""
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(20, 8, generator=generator)
    return Case(torch.rand(40, 8, generator=generator), torch.cat([some, some.nextafter(torch.ones(1))]))


@pytest.mark.slow
@pytest.mark.parametrize("watch", ["races", "bounds"])
def test_bugs_are_found(watch: str, tmp_path: Path) -> None:
    program = build(tmp_path / watch, watch, RUNNER, with_bugs(SOURCE, tmp_path / SOURCE.name))
    cases = [nearly_ties(), *small_cases()]
    check(program, cases)
    missed = []
    for number, (name, (_, _, finder, says)) in enumerate(BUGS.items(), 1):
        if finder != watch:
            continue
        found = search(program, cases, BUG=str(number))
        if isinstance(found, str):
            caught = bool(says) and says in found
        else:
            caught = not says and any(map(differs, cases, found))
        if not caught:
            missed.append(f"{name}: {found[:2000] if isinstance(found, str) else 'all went well'}")
    assert not missed, "\n".join(missed)
