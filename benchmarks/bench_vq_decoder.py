"""The decoder of a VQ, codes to pixels, beside the same layers in PyTorch: oneDNN's convolutions, channels last.

    pytest benchmarks/bench_vq_decoder.py --benchmark-only -s
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/bench_vq_decoder.py --isa avx2 --dtype float32

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
from fastigpt.codecs.vq_decoder import CpuVQDecoder, draws
from fastigpt.codecs.vq_networks import PlainVQ, VQConfig

NETWORKS = {
    # Networks and their grid: as Janus-Pro and LlamaGen have it at 384 × 384, and that of scenes-128.
    "vq-16 384": (VQConfig(), 24),
    "scenes-128": (VQConfig(base=32, multipliers=(1, 1, 2, 4), res_blocks=1, latent=64, n_codes=1024), 16),
}


def made_up(config: VQConfig) -> dict[str, torch.Tensor]:
    """The decoder's tensors, with which pixels are numbers of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in config.tensor_shapes().items():
        if draws(name):
            noise = torch.randn(shape, generator=generator) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
            found[name] = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise
    return found


def operations(config: VQConfig, grid: int) -> float:
    """Of the convolutions of one picture, as the formula has them: nine weights for each place and pair of channels."""
    total = 0.0
    for name, shape in config.tensor_shapes().items():
        if draws(name) and len(shape) == 4:
            level = int(name.split(".")[2]) if ".conv_blocks." in name else 0
            level += "upsample" in name
            side = grid * 2 ** (len(config.multipliers) - 1 if name.startswith("decoder.conv_out") else level)
            total += 2 * torch.Size(shape).numel() * side**2
    return total


def both(name: str, dtype: torch.dtype, isa: str = "auto") -> tuple[Callable[[], object], Callable[[], object], int]:
    """Ours, PyTorch's, and bytes of the decoder's weights."""
    config, grid = NETWORKS[name]
    weights = made_up(config)
    entries = torch.randn(grid * grid, config.code_dim, generator=torch.Generator().manual_seed(1))
    decoder = CpuVQDecoder(config, weights, dtype, isa=isa)
    theirs = PlainVQ(
        config,
        {
            n: x.to(dtype, memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
            for n, x in weights.items()
        },
    )
    x = entries.T.reshape(1, -1, grid, grid).to(dtype)

    def peer() -> object:
        with torch.inference_mode():
            return theirs.decoder(x)[0].float()

    size = sum(x.numel() for x in weights.values()) * dtype.itemsize
    return lambda: decoder(entries, grid, grid), peer, size


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", NETWORKS)
def bench_vq_decoder(benchmark, machine, name, dtype):
    benchmark.group = f"decoding one picture, {name}"
    if dtype == torch.bfloat16 and "avx512vnni" not in _C.supported_isas():
        pytest.skip("bfloat16 is not multiplied here")
    ours, theirs, size = both(name, dtype)
    race(
        benchmark, machine, [ours], {"PyTorch": [theirs]}, moved=size, operations=operations(*NETWORKS[name]),
        dtype=dtype,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", choices=NETWORKS, default="vq-16 384")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--isa", default="auto")
    options = parser.parse_args()
    ours, theirs, _ = both(options.network, getattr(torch, options.dtype), options.isa)
    times: dict[str, list[float]] = {"PyTorch": [], "fastigpt": []}
    for round_ in range(options.rounds + 1):
        for name, call in (("PyTorch", theirs), ("fastigpt", ours)):
            seconds = timed(call)[1]
            if round_:
                times[name].append(seconds)
    gflop = operations(*NETWORKS[options.network]) / 1e9
    for name, found in times.items():
        median, spread = typical(found)
        print(f"{name}: {median:.4f} s ± {100 * spread:.0f} % ({min(found):.4f} to {max(found):.4f}), "
              f"{gflop / median:.0f} GFLOP/s of {gflop:.0f} GFLOP")  # fmt: skip


if __name__ == "__main__":
    main()
