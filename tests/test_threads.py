"""Threads that are asked for: how many may be, what happens where the system refuses them, and that operators share one
pool."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from conftest import TINY, random_weights

import fastigpt
from fastigpt import _C
from fastigpt.engine.cpu import CpuEngine
from fastigpt.families import image_gpt
from fastigpt.nearest import check_threads

POINTS, CENTROIDS = np.zeros((4, 3), np.float32), np.eye(3, dtype=np.float32)
PARTS = image_gpt.spec(TINY), image_gpt.canonical(TINY, random_weights(TINY))
PALETTE = fastigpt.Palette(CENTROIDS, value_range=(0, 1))
ASKING = {
    "nearest_centroid": lambda threads: fastigpt.nearest_centroid(POINTS, CENTROIDS, threads=threads),
    "Palette.encode": lambda threads: PALETTE.encode(POINTS.astype(np.uint8), threads=threads),
    "CpuEngine": lambda threads: CpuEngine(
        image_gpt.spec(TINY), image_gpt.canonical(TINY, random_weights(TINY)), threads=threads
    ),
}


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize(
    ("threads", "error"),
    [(n, ValueError) for n in (0, -1, 1025, 2**31, 2**32 + 1, 2**40, 2**100, 10**5000)]
    + [(x, TypeError) for x in (True, 1.5, "2", np.array([1, 2]), float("nan"))],
    ids=lambda value: str(value)[:20] if not isinstance(value, int) or value < 10**99 else "huge",
)
def test_impossible_numbers_of_threads_are_refused_by_name(name: str, threads: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="threads must be"):
        ASKING[name](threads)


def test_numbers_of_threads_may_be_numpys() -> None:
    assert check_threads(np.int64(3)) == 3 and check_threads(None) == 0
    assert CpuEngine(*PARTS, threads=np.int32(2)).threads == 2  # type: ignore[arg-type]


IN_A_NEW_PROCESS = """
import resource
import numpy as np, torch, fastigpt
from fastigpt import _C, ImageGPT, ImageGPTConfig
from fastigpt.engine.cpu import CpuEngine
from fastigpt.families import image_gpt

def mapped():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10

torch.set_num_threads(1)
model = ImageGPT.from_config(ImageGPTConfig(2, 2, 32, height=4, width=4, n_colors=33), seed=1, backend="cpu")
rng = np.random.default_rng(0)
points, centroids = rng.standard_normal((40_000, 3)).astype("f4"), rng.standard_normal((64, 3)).astype("f4")
pixels, clusters = rng.integers(0, 256, (100, 1000, 3), dtype="u1"), rng.uniform(-1, 1, (9, 3))

def uses(threads):
    parts = image_gpt.spec(model.config), image_gpt.canonical(model.config, model.weights)
    model.engine = CpuEngine(*parts, threads=threads)
    return [
        model.sample(4, seed=3, output_type="tokens", progress=False).tolist(),
        fastigpt.nearest_centroid(points, centroids, threads=threads).tolist(),
        fastigpt.Palette(clusters, value_range=(-1, 1)).encode(pixels, threads=threads).tolist(),
        len(_C.read_bandwidth(1 << 20, threads, 2)),
    ]

expected = uses(1)
assert _C.helper_threads() == 0 and model.engine.threads == 1
# A thread's stack is as large as RLIMIT_STACK was when the process began: there is room for none.
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (mapped() + (96 << 20), hard))
assert uses(4) == expected
assert _C.helper_threads() == 0 and model.engine.threads == 1, (_C.helper_threads(), model.engine.threads)
resource.setrlimit(resource.RLIMIT_AS, (mapped() + (200 << 20), hard))
assert uses(4) == expected
assert 0 < _C.helper_threads() < 3 or 1 < model.engine.threads < 4, (_C.helper_threads(), model.engine.threads)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert uses(4) == expected
assert _C.helper_threads() == 3 and model.engine.threads == 4
# One pool, whoever asks for how many.
for threads in (2, 5, 3, 1, 4):
    assert uses(threads) == expected
assert _C.helper_threads() == 4
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_refused_threads_are_done_without_and_operators_share_one_pool() -> None:
    import resource

    stack, (_, hard) = 128 << 20, resource.getrlimit(resource.RLIMIT_STACK)
    if 0 <= hard < stack:
        pytest.skip("the system allows no large stacks")

    def large_stacks() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))

    ran = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS],
        preexec_fn=large_stacks, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.strip() == "done", ran.stderr[-4000:]


def test_bandwidth_names_what_it_needs() -> None:
    for arguments in ((1, 1, 1), (1 << 20, 0, 1), (1 << 20, 1025, 1), (1 << 20, 1, 0)):
        with pytest.raises(ValueError, match="read_bandwidth needs"):
            _C.read_bandwidth(*arguments)
