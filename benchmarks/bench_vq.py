"""The networks of a VQ beside the same layers in PyTorch: oneDNN's convolutions, channels last.

    pytest benchmarks/bench_vq.py --benchmark-only -s
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/bench_vq.py --isa avx2 --dtype float32

The second holds both to one instruction set (oneDNN calls AVX512-BF16 AVX512_CORE_BF16) and prints seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
from race import on_cpu, race

from fastigpt import _C
from fastigpt.bench.timing import timed, typical
from fastigpt.codecs.vq_cpu import CpuVQ
from fastigpt.codecs.vq_networks import PlainVQ, VQConfig, draws

NETWORKS = {
    # Networks and their grid: as Janus-Pro and LlamaGen have it at 384 × 384, and that of scenes-128.
    "vq-16 384": (VQConfig(), 24),
    "scenes-128": (VQConfig(base=32, multipliers=(1, 1, 2, 4), res_blocks=1, latent=64, n_codes=1024), 16),
}


# What is timed: codes to pixels in the dtype of the model, pixels to what codes are looked for with always in float32.
WORK = [("decoder", "bfloat16"), ("decoder", "float32"), ("encoder", "float32")]


def made_up(config: VQConfig) -> dict[str, torch.Tensor]:
    """Tensors with which results are numbers of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in config.layer_shapes().items():
        noise = torch.randn(shape, generator=generator) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        found[name] = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise
    return found


def operations(config: VQConfig, grid: int, network: str) -> float:
    """Of the convolutions of one picture, as the formula has them: all weights for each place."""
    total, finest = 0.0, len(config.multipliers) - 1
    for name, shape in config.layer_shapes().items():
        if len(shape) == 4 and draws(name) == (network == "decoder"):
            level = int(name.split(".")[2]) if ".conv_blocks." in name else 0
            if network == "decoder":
                level = finest if name.startswith("decoder.conv_out") else level + ("upsample" in name)
            elif ".conv_blocks." in name:
                level = finest - level - ("downsample" in name)
            else:
                level = finest if name.startswith("encoder.conv_in") else 0
            total += 2 * torch.Size(shape).numel() * (grid * 2**level) ** 2
    return total


def both(
    name: str, network: str, dtype: torch.dtype, isa: str = "auto"
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """Ours, PyTorch's, and bytes of the network's weights."""
    config, grid = NETWORKS[name]
    weights = {n: x for n, x in made_up(config).items() if draws(n) == (network == "decoder")}
    generator, side = torch.Generator().manual_seed(1), grid * config.patch
    ours = CpuVQ(config, weights, dtype, isa=isa)
    layouts = {4: torch.channels_last}
    theirs = PlainVQ(
        config,
        {n: x.to(dtype, memory_format=layouts.get(x.ndim, torch.contiguous_format)) for n, x in weights.items()},
    )
    size = sum(x.numel() for x in weights.values()) * dtype.itemsize
    if network == "decoder":
        entries = torch.randn(grid * grid, config.code_dim, generator=generator)
        given, theirs_of = entries.T.reshape(1, -1, grid, grid).to(dtype), theirs.decoder
        return lambda: ours.decode(entries, grid, grid), torch.inference_mode()(lambda: theirs_of(given).float()), size
    pixels = 2 * torch.rand(side, side, 3, generator=generator) - 1
    given, theirs_of = pixels.permute(2, 0, 1)[None].to(dtype), theirs.encoder
    return lambda: ours.encode(pixels), torch.inference_mode()(lambda: theirs_of(given).float()), size


@on_cpu
@pytest.mark.parametrize(("network", "dtype"), WORK)
@pytest.mark.parametrize("name", NETWORKS)
def bench_vq(benchmark, machine, name, network, dtype):
    benchmark.group = f"one picture, {name}, {network}"
    if dtype == "bfloat16" and "avx512vnni" not in _C.supported_isas():
        pytest.skip("bfloat16 is not multiplied here")
    ours, theirs, size = both(name, network, getattr(torch, dtype))
    race(
        benchmark, machine, [ours], {"PyTorch": [theirs]}, moved=size,
        operations=operations(*NETWORKS[name], network), dtype=getattr(torch, dtype),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vq", choices=NETWORKS, default="vq-16 384")
    parser.add_argument("--network", choices=("decoder", "encoder"), default="decoder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--isa", default="auto")
    options = parser.parse_args()
    ours, theirs, _ = both(options.vq, options.network, getattr(torch, options.dtype), options.isa)
    times: dict[str, list[float]] = {"PyTorch": [], "fastigpt": []}
    for round_ in range(options.rounds + 1):
        for name, call in (("PyTorch", theirs), ("fastigpt", ours)):
            seconds = timed(call)[1]
            if round_:
                times[name].append(seconds)
    gflop = operations(*NETWORKS[options.vq], options.network) / 1e9
    for name, found in times.items():
        median, spread = typical(found)
        print(f"{name}: {median:.4f} s ± {100 * spread:.0f} % ({min(found):.4f} to {max(found):.4f}), "
              f"{gflop / median:.0f} GFLOP/s of {gflop:.0f} GFLOP")  # fmt: skip


if __name__ == "__main__":
    main()
