"""The VQ's networks in C++ are held to their plain twins, `VQNetworks` in float64."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from test_vq import TINY, random_vq

from fastigpt import _C
from fastigpt.codecs.vq import VQCodec
from fastigpt.codecs.vq_cpu import CpuVQ
from fastigpt.codecs.vq_networks import PlainVQ, VQConfig

ISAS = _C.supported_isas()
CASES = {
    # Networks and heights and widths of pictures in entries: rows wider than a thread takes at once, pictures of many
    # strips and of two places, latents and entries that fill no panel, levels that keep and that change their width.
    "tiny": (TINY, [(3, 5), (1, 2), (45, 7), (2, 230)]),
    "three levels": (VQConfig(32, (1, 1, 2), 2, 40, 16, 3), [(4, 3), (1, 9)]),
    "wide": (VQConfig(64, (2, 3), 1, 24, 16, 8), [(7, 6)]),
    "panels and strips": (VQConfig(64, (1, 1), 1, 32, 16, 4), [(33, 52)]),
    "as published": (VQConfig(32, (1, 1, 2, 2, 4), 2, 64, 16, 8), [(2, 3)]),
}


def entries_of(config: VQConfig, height: int, width: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return scale * torch.randn(height * width, config.code_dim, generator=generator)


def exactly(config: VQConfig, weights: dict[str, torch.Tensor]) -> PlainVQ:
    return PlainVQ(config, {name: x.double() for name, x in weights.items()})


def decoded(config: VQConfig, weights: dict[str, torch.Tensor], entries: torch.Tensor, height: int) -> torch.Tensor:
    given = entries.double().T.reshape(1, -1, height, len(entries) // height)
    return exactly(config, weights).decoder(given)[0].permute(1, 2, 0)


def pixels_of(config: VQConfig, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(height * config.patch, width * config.patch, 3, generator=generator) * 2 - 1


def encoded(config: VQConfig, weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    return exactly(config, weights).encoder(pixels.double().permute(2, 0, 1)[None])[0].flatten(1).T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_twin(name: str, isa: str) -> None:
    config, sizes = CASES[name]
    weights = random_vq(config)
    exact = CpuVQ(config, weights, torch.float32, isa=isa)
    half = CpuVQ(config, weights, torch.bfloat16, isa=isa)
    for height, width in sizes:
        entries, pixels = entries_of(config, height, width), pixels_of(config, height, width)
        for threads in (1, 5):
            assert torch.equal(
                exact.decode(entries, height, width, threads=threads), exact.decode(entries, height, width)
            )
            assert torch.equal(half.encode(pixels, threads=threads), half.encode(pixels))
        for expected, found, rounded in (
            (decoded(config, weights, entries, height), *(of.decode(entries, height, width) for of in (exact, half))),
            (encoded(config, weights, pixels), *(of.encode(pixels) for of in (exact, half))),
        ):
            assert expected.std() > 0.1 and found.shape == expected.shape
            assert (found - expected).abs().max() <= 2e-5
            error = (rounded - expected).abs()
            if height * width > 4:  # norms over two numbers make any rounding as large as they are
                assert 1e-4 < error.mean() < 0.02 and error.max() < 0.2


@pytest.mark.parametrize("isa", ISAS)
def test_large_numbers_and_means_change_nothing(isa: str) -> None:
    """Attention whose weights are nearly 0 and 1, activations far out on both sides, means that norms take away."""
    weights = random_vq()
    for name in weights:
        if name.endswith((".q.weight", ".k.weight")):
            weights[name] *= 6
        if name.endswith("norm1.weight"):
            weights[name] *= 30
        if name.endswith(("conv_in.bias", "conv1.bias")):
            weights[name] += 3
    entries = entries_of(TINY, 5, 6, 4.0)
    expected = decoded(TINY, weights, entries, 5)
    found = CpuVQ(TINY, weights, torch.float32, isa=isa).decode(entries, 5, 6)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_neither_threads_nor_other_pictures_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    config = VQConfig(32, (1, 2), 1, 32, 20, 4)
    networks = CpuVQ(config, random_vq(config), dtype, isa=isa)
    sizes = [(3, 5), (50, 9), (2, 210), (9, 8)]

    def both(i: int, threads: int) -> torch.Tensor:
        pixels = networks.decode(entries_of(config, *sizes[i]), *sizes[i], threads=threads)
        latents = networks.encode(pixels_of(config, *sizes[i]), threads=threads)
        return torch.cat([pixels.flatten(), latents.flatten()])

    alone = [both(i, 1) for i in range(len(sizes))]
    for threads in (1, 2, 3, 7):
        for i in (1, 0, 3, 2, 0):
            assert torch.equal(both(i, threads), alone[i])
        networks.rest()
    # What a picture was worked out in is poison for the next one.
    networks.decode(torch.full((450, 4), torch.nan), 50, 9)
    networks.encode(torch.full((100, 18, 3), torch.nan))
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = both(i, 2)

    together = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(len(sizes)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_may_be_stored_in_any_way(stored: torch.dtype) -> None:
    weights = {
        name: x.to(stored).contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
        for name, x in random_vq().items()
    }
    entries = entries_of(TINY, 3, 4)
    networks, pixels = CpuVQ(TINY, weights, torch.float32), pixels_of(TINY, 3, 4)
    assert (networks.decode(entries, 3, 4) - decoded(TINY, weights, entries, 3)).abs().max() <= 2e-5
    assert (networks.encode(pixels) - encoded(TINY, weights, pixels)).abs().max() <= 2e-5


def test_bad_arguments_are_refused() -> None:
    weights = random_vq()
    networks = CpuVQ(TINY, weights, torch.float32)
    for entries in (torch.zeros(6, 5), torch.zeros(7, 4), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"entries must have shape \[6, 4\]"):
            networks.decode(entries, 2, 3)
    for shape in ((4, 6), (3, 4, 6), (3, 6, 3), (4, 5, 3), (1, 4, 6, 3)):
        with pytest.raises(ValueError, match=r"pixels must have shape \[h · 2, w · 2, 3\]"):
            networks.encode(torch.zeros(shape))
    for use in (lambda: networks.decode(torch.zeros(6, 4), 2, 3, threads=0),
                lambda: networks.encode(torch.zeros(4, 6, 3), threads=0)):  # fmt: skip
        with pytest.raises(ValueError, match="threads must be"):
            use()
    with pytest.raises(ValueError, match=r"dtype must be .*float16"):
        CpuVQ(TINY, weights, torch.float16)
    with pytest.raises(ValueError, match="isa must be"):
        CpuVQ(TINY, weights, torch.float32, isa="mmx")
    name = "decoder.mid.0.conv1.weight"
    with pytest.raises(ValueError, match=rf"{name} must have shape \[64, 64, 3, 3\]"):
        CpuVQ(TINY, {**weights, name: weights[name][:, :32]}, torch.float32)


def test_tensors_that_do_not_fit_are_told_of_before_anything_is_read() -> None:
    """Of the class below, which is loaded tensor by tensor."""

    def both(**other: tuple[int, ...]) -> None:
        networks = _C.VqNetworks("float32", "auto")
        shapes = {name: other.get(name, shape) for name, shape in TINY.layer_shapes().items()}
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if shape}
        for name, tensor in tensors.items():
            networks.load(name, tensor.data_ptr(), "float32", list(tensor.shape), 1)
        entries, pixels, latents = torch.zeros(4, 4), torch.empty(4, 4, 3), torch.empty(4, 4)
        networks.decode(entries.data_ptr(), 2, 2, 4, pixels.data_ptr(), 1)
        networks.encode(pixels.data_ptr(), 4, 4, 4, latents.data_ptr(), 1)

    both()
    for name, shape, message in (
        ("decoder.conv_in.weight", (), "decoder.conv_in.weight is missing"),
        ("decoder.conv_in.bias", (), "decoder.conv_in.bias is missing"),
        ("decoder.conv_in.bias", (7,), "decoder.conv_in.bias has 7 numbers, not 64"),
        ("decoder.norm_out.weight", (64,), "decoder.norm_out.weight has 64 numbers, not 32"),
        ("decoder.mid.0.conv1.weight", (64, 96, 3, 3), "another width"),
        ("decoder.mid.2.conv2.weight", (32, 64, 3, 3), "has 64 numbers, not 32"),
        ("decoder.conv_out.weight", (4, 32, 3, 3), "has 3 numbers, not 4"),
        ("decoder.conv_out.weight", (3, 32, 5, 5), "a convolution of size 5"),
        ("decoder.conv_blocks.0.upsample.conv.weight", (64, 64, 1, 1), "a convolution of size 1"),
        ("decoder.conv_out.weight", (3, 32), "neither a vector nor of a convolution"),
        ("encoder.conv_in.weight", (), "encoder.conv_in.weight is missing"),
        ("encoder.mid.1.q.weight", (32, 64, 1, 1), "has 64 numbers, not 32"),
        ("quant_conv.weight", (), "quant_conv.weight is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            both(**{name: shape})


def test_what_is_of_another_width_than_the_caller_says_is_not_written() -> None:
    networks = _C.VqNetworks("float32", "auto")
    for name, shape in TINY.layer_shapes().items():
        networks.load(name, torch.zeros(shape).data_ptr(), "float32", list(shape), 1)
    numbers = torch.zeros(4, 4, 40)
    with pytest.raises(ValueError, match="quant_conv is of another width"):
        networks.encode(numbers.data_ptr(), 4, 4, 5, numbers.data_ptr(), 1)
    with pytest.raises(ValueError, match="of odd size"):
        networks.encode(numbers.data_ptr(), 4, 3, 4, numbers.data_ptr(), 1)
    with pytest.raises(ValueError, match="another width"):
        networks.decode(numbers.data_ptr(), 2, 2, 33, numbers.data_ptr(), 1)


def test_codecs_are_copied_without_what_they_made() -> None:
    codec = VQCodec(TINY, random_vq(), 4, 5)
    tokens = torch.randint(0, 20, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = codec.decode(tokens)
    for again in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec), copy.copy(codec)):
        assert np.array_equal(again.decode(tokens), expected) and torch.equal(
            again.encode(expected), codec.encode(expected)
        )
