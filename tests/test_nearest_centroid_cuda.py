"""The CUDA kernels compile for the GPUs we name without spilling, and give the CPU's answers where there is a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastigpt.codecs.palette import Palette
from fastigpt.nearest import few_axes, nearest_centroid

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "nearest_centroid_cuda.cu"

# What is asked of the kernels here, on a GPU, and in test_nearest_centroid_cuda_host.py without one.
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
DIMS = [1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 100, 256]
SIZES = [1, 2, 63, 512, 5000]  # K
PIXELS = [0, 1, 3, 4, 5, 1 << 20]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(arch: str, tmp_path: Path) -> None:
    csrc = SOURCE.parents[1]
    include = [f"-I{csrc / 'include'}", f"-I{csrc}"]
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", "-Xptxas=-v", *include, "-cubin", str(SOURCE)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "nearest_centroid.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    properties = r"Function properties for (\S+)\n *(\d+) bytes stack frame, (\d+) bytes spill stores.*\n"
    found = re.findall(properties + r".*?Used (\d+) registers", done.stderr)
    for name, stack, spilled, registers in found:
        kernel = re.search(
            r"(nearest_few_dimensions|nearest_many_dimensions|rgb_lookup_packed|rgb_lookup)(ILi\d+ELi\d+E)?E", name
        )
        label = "".join(kernel.groups("")) if kernel else name
        print(f"{arch} {label}: {registers} registers, {spilled} bytes spilled, {stack} of stack")
    assert len(found) == 7
    assert all(int(spilled) == 0 and int(stack) == 0 for _, stack, spilled, _ in found)


def test_axes_that_are_one_run_in_memory_are_not_copied() -> None:
    images = torch.zeros(2, 3, 4, 5, 3)
    for view in (images, images[:, :, 1:], images[:, 1:, :, :2], images[..., :2], images.flatten(0, 3)):
        assert few_axes(view) is view
    scattered = torch.zeros(2, 3, 4, 5, 6, 3)[:, :2, :3, :4, :5]
    assert few_axes(scattered) is not scattered and torch.equal(few_axes(scattered), scattered)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("k", SIZES)
def test_cuda_equals_cpu(dtype: torch.dtype, dim: int, k: int) -> None:
    generator = torch.Generator().manual_seed(dim * 7919 + k)
    points = (torch.rand(3, 11, 37, dim, generator=generator) * 255).to(dtype)[:, ::2, :35]
    centroids = torch.randint(0, 256, (k, dim), generator=generator).float()  # ties and duplicates among them
    expected, least = nearest_centroid(points, centroids, return_distances=True)
    found, distances = nearest_centroid(points.cuda(), centroids.cuda(), return_distances=True)
    assert torch.equal(found.cpu(), expected)
    np.testing.assert_array_max_ulp(distances.cpu().numpy(), least.numpy(), 1)


@pytest.mark.gpu
def test_cuda_points_that_are_not_finite_get_no_index() -> None:
    points = torch.tensor([[0.0, 0, 0], [float("nan"), 0, 0], [0, float("inf"), 0]], device="cuda")
    found, distances = nearest_centroid(points, torch.eye(3, device="cuda"), return_distances=True)
    assert found.tolist() == [0, -1, -1] and distances[1:].isnan().all()


@pytest.mark.gpu
def test_cuda_cosine_equals_cpu() -> None:
    points, centroids = torch.randn(500, 16), torch.randn(300, 16)
    found = nearest_centroid(points.cuda(), centroids.cuda(), metric="cosine").cpu()
    assert (found == nearest_centroid(points, centroids, metric="cosine")).float().mean() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("n", PIXELS)
def test_cuda_palette_equals_cpu(n: int) -> None:
    palette = Palette(np.random.default_rng(0).uniform(-1, 1, (512, 3)))
    pixels = torch.randint(0, 256, (n + 8, 4), dtype=torch.uint8)
    packed = pixels[:, :3].contiguous()
    for view, same in ((packed[:n], packed.cuda()[:n]), (packed[1 : n + 1], packed.cuda()[1 : n + 1])):
        assert torch.equal(palette.encode(same).cpu(), palette.encode(view))
    assert torch.equal(palette.encode(pixels.cuda()[8:, :3]).cpu(), palette.encode(pixels[8:, :3]))


@pytest.mark.gpu
def test_cuda_runs_on_the_callers_stream_inside_a_graph() -> None:
    points, centroids = torch.rand(4096, 3, device="cuda"), torch.rand(512, 3, device="cuda")
    nearest_centroid(points, centroids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nearest_centroid(points, centroids)
    points.copy_(torch.rand(4096, 3))
    graph.replay()
    assert torch.equal(found, nearest_centroid(points, centroids))
    with pytest.raises(ValueError, match="one device"):
        nearest_centroid(points, centroids.cpu())
