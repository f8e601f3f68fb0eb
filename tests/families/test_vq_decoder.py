"""The VQ's decoder in C++ is held to its plain twin, `VQNetworks.decoder` in float64."""

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
from fastigpt.codecs.vq_decoder import CpuVQDecoder
from fastigpt.codecs.vq_networks import PlainVQ, VQConfig

ISAS = _C.supported_isas()
CASES = {
    # Networks and heights and widths of pictures in entries: rows wider than a thread takes at once, pictures of many
    # strips and of one place, latents and entries that fill no panel, levels that keep and that change their width.
    "tiny": (TINY, [(3, 5), (1, 1), (45, 7), (2, 230)]),
    "three levels": (VQConfig(32, (1, 1, 2), 2, 40, 16, 3), [(4, 3), (1, 9)]),
    "wide": (VQConfig(64, (2, 3), 1, 24, 16, 8), [(7, 6)]),
    "as published": (VQConfig(32, (1, 1, 2, 2, 4), 2, 64, 16, 8), [(2, 3)]),
}


def entries_of(config: VQConfig, height: int, width: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return scale * torch.randn(height * width, config.code_dim, generator=generator)


def twin(config: VQConfig, weights: dict[str, torch.Tensor], entries: torch.Tensor, height: int) -> torch.Tensor:
    networks = PlainVQ(config, {name: x.double() for name, x in weights.items()})
    return networks.decoder(entries.double().T.reshape(1, -1, height, len(entries) // height))[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_twin(name: str, isa: str) -> None:
    config, sizes = CASES[name]
    weights = random_vq(config)
    exact = CpuVQDecoder(config, weights, torch.float32, isa=isa)
    half = CpuVQDecoder(config, weights, torch.bfloat16, isa=isa)
    for height, width in sizes:
        entries = entries_of(config, height, width)
        expected = twin(config, weights, entries, height)
        assert expected.std() > 0.1
        assert (exact(entries, height, width) - expected).abs().max() <= 2e-5
        error = (half(entries, height, width) - expected).abs()
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
    expected = twin(TINY, weights, entries, 5)
    found = CpuVQDecoder(TINY, weights, torch.float32, isa=isa)(entries, 5, 6)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_neither_threads_nor_other_pictures_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    config = VQConfig(32, (1, 2), 1, 32, 20, 4)
    decoder = CpuVQDecoder(config, random_vq(config), dtype, isa=isa)
    sizes = [(3, 5), (50, 9), (2, 210), (9, 8)]
    alone = [decoder(entries_of(config, *size), *size, threads=1) for size in sizes]
    for threads in (1, 2, 3, 7):
        for i in (1, 0, 3, 2, 0):
            assert torch.equal(decoder(entries_of(config, *sizes[i]), *sizes[i], threads=threads), alone[i])
    # What a picture was worked out in is poison for the next one.
    decoder(torch.full((450, 4), torch.nan), 50, 9)
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = decoder(entries_of(config, *sizes[i]), *sizes[i], threads=2)

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
    found = CpuVQDecoder(TINY, weights, torch.float32)(entries, 3, 4)
    assert (found - twin(TINY, weights, entries, 3)).abs().max() <= 2e-5


def test_bad_arguments_are_refused() -> None:
    weights = random_vq()
    decoder = CpuVQDecoder(TINY, weights, torch.float32)
    for entries, height in ((torch.zeros(6, 5), 2), (torch.zeros(7, 4), 2), (torch.zeros(2, 3, 4), 2)):
        with pytest.raises(ValueError, match=r"entries must have shape \[6, 4\]"):
            decoder(entries, height, 3)
    with pytest.raises(ValueError, match="threads must be"):
        decoder(torch.zeros(6, 4), 2, 3, threads=0)
    with pytest.raises(ValueError, match=r"dtype must be .*float16"):
        CpuVQDecoder(TINY, weights, torch.float16)
    with pytest.raises(ValueError, match="isa must be"):
        CpuVQDecoder(TINY, weights, torch.float32, isa="mmx")
    name = "decoder.mid.0.conv1.weight"
    with pytest.raises(ValueError, match=rf"{name} must have shape \[64, 64, 3, 3\]"):
        CpuVQDecoder(TINY, {**weights, name: weights[name][:, :32]}, torch.float32)


def test_tensors_that_do_not_fit_are_told_of_before_anything_is_read() -> None:
    """Of the class below, which is loaded tensor by tensor."""

    def decode(**other: tuple[int, ...]) -> None:
        decoder = _C.VqDecoder("float32", "auto")
        shapes = {name: other.get(name, shape) for name, shape in TINY.tensor_shapes().items()}
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if shape}
        for name, tensor in tensors.items():
            if name.startswith(("decoder.", "post_quant_conv.")):
                decoder.load(name, tensor.data_ptr(), "float32", list(tensor.shape), 1)
        pixels = torch.empty(4, 4, 3)
        decoder.decode(torch.zeros(4, 4).data_ptr(), 2, 2, 4, pixels.data_ptr(), 1)

    decode()
    for name, shape, message in (
        ("decoder.conv_in.weight", (), "decoder.conv_in.weight is missing"),
        ("decoder.conv_in.bias", (), "decoder.conv_in.bias is missing"),
        ("decoder.conv_in.bias", (7,), "decoder.conv_in.bias has 7 numbers, not 64"),
        ("decoder.norm_out.weight", (64,), "decoder.norm_out.weight has 64 numbers, not 32"),
        ("decoder.mid.0.conv1.weight", (64, 96, 3, 3), "another width"),
        ("decoder.mid.2.conv2.weight", (32, 64, 3, 3), "32 numbers|has 64 numbers, not 32"),
        ("decoder.conv_out.weight", (4, 32, 3, 3), "has 3 numbers, not 4|not of pixels"),
        ("decoder.conv_out.weight", (3, 32, 5, 5), "a convolution of size 5"),
        ("decoder.conv_out.weight", (3, 32), "neither a vector nor of a convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(**{name: shape})


def test_codecs_are_copied_without_what_they_made() -> None:
    codec = VQCodec(TINY, random_vq(), 4, 5)
    tokens = torch.randint(0, 20, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = codec.decode(tokens)
    for again in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec), copy.copy(codec)):
        assert np.array_equal(again.decode(tokens), expected) and torch.equal(
            again.encode(expected), codec.encode(expected)
        )
