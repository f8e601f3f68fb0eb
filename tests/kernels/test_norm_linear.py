"""Norm + linear equals its plain twin: one row and many, every ending, sizes that no block divides."""

import pytest
import torch
from either_way import GPU, device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.kernels.launch import table
from fastigpt.kernels.norm_linear import norm_linear, uses_cublas
from fastigpt.kernels.pairs import Turns, in_halves, side_by_side
from fastigpt.ops.kv_cache import quantize_kv_reference
from fastigpt.ops.norm_linear import norm_linear_reference

FEW = {
    "norm_linear": [
        {"upto": 1, "block_m": 16, "block_n": 8, "block_k": 16, "stages": 1, "warps": 4, "early": True, "apart": False},
        {"block_m": 16, "block_n": 32, "block_k": 32, "stages": 1, "warps": 4, "early": False, "apart": True},
    ],
    "cublas": [{"from_rows": 10**9}],
}
MANY = {"cublas": [{"from_rows": 1}]}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def tensors(generator, device, rows, width, n, dtype):
    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return normal(rows, width), normal(n, width).to(dtype) / width**0.5, normal(width).to(dtype), normal(n).to(dtype)


def close(got, expected, dtype):
    torch.testing.assert_close(got.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("configs", [FEW, MANY], ids=["kernel", "cublas"])
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"gain": True, "activation": "quick_gelu", "bias": True}),
        (torch.float16, {"gain": True, "bias": True}),
        (torch.float32, {"residual": True, "bias": True}),
        (torch.float16, {"residual": True}),
        (torch.float32, {"gain": True, "activation": "gelu", "bias": True}),
        (torch.float16, {"activation": "gelu"}),
        (torch.float32, {"gain": True, "activation": "gated_silu"}),
        (torch.float16, {"gain": True, "activation": "gated_silu", "bias": True}),
    ],
    ids=str,
)
def test_layer_equals_the_twin(generator, device, configs, rows, dtype, options):
    width, n = 47, 75
    n_out = n
    if options.get("activation") == "gated_silu":
        n, n_out = 150, 75
    x, weight, gain, bias = tensors(generator, device, rows, width, n, dtype)
    options = {**options, "gain": gain if "gain" in options else None, "bias": bias if "bias" in options else None}
    if options.get("residual"):
        out = torch.randn(rows, n, generator=generator).to(device)
    else:
        out = torch.full((rows, n_out), float("nan"), dtype=dtype, device=device)
    x = x if options["gain"] is not None else x.to(dtype)
    expected = norm_linear_reference(x, weight, out.clone(), **options)
    close(norm_linear(x, weight, out, configs=configs, **options), expected, dtype)


@pytest.mark.parametrize("lanes, window", [(1, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_and_values_go_into_the_cache(generator, device, lanes, window, dtype):
    n_head, head_dim, capacity = 3, 8, 6
    width = n_head * head_dim
    x, weight, gain, bias = tensors(generator, device, lanes * window, width, 3 * width, dtype)
    slots = torch.tensor([2, 0, -1, capacity - 1][:lanes], dtype=torch.int32, device=device)

    def caches():
        return tuple(torch.full((lanes, n_head, capacity, head_dim), 7.0, dtype=dtype, device=device) for _ in range(2))

    got, expected = caches(), caches()
    shared = {"gain": gain, "bias": bias, "slots": slots, "window": window}
    q = torch.full((lanes * window, width), float("nan"), dtype=dtype, device=device)
    q_expected = norm_linear_reference(x, weight, q.clone(), kv_cache=expected, **shared)
    norm_linear(x, weight, q, kv_cache=got, configs=FEW, **shared)
    close(q, q_expected, dtype)
    for a, b in zip(got, expected):
        close(a, b, dtype)
        assert torch.equal(a == 7.0, b == 7.0)  # nothing else was touched


@pytest.mark.parametrize("configs", [FEW, MANY], ids=["kernel", "cublas"])
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "ending", [{"gain": True, "activation": "gated_silu"}, {"residual": True}, {"gain": True}], ids=str
)
def test_int8_weights_have_a_scale_for_each_output(generator, device, configs, rows, dtype, ending):
    width, n = 47, 78
    x, weight, gain, bias = tensors(generator, device, rows, width, n, torch.float32)
    weight, scale = quantize_kv_reference(weight, torch.int8)
    options = {**ending, "gain": gain if "gain" in ending else None, "bias": bias, "weight_scale": scale}
    if ending.get("residual"):
        x, out = x.to(dtype), torch.randn(rows, n, generator=generator).to(device)
    else:
        out = torch.full((rows, 39 if "activation" in ending else n), float("nan"), dtype=dtype, device=device)
    memory = torch.full((rows * (width + n) + n * width,), float("nan"), dtype=dtype, device=device)
    expected = norm_linear_reference(x, weight, out.clone(), **options)
    close(norm_linear(x, weight, out, configs=configs, scratch=memory, **options), expected, dtype)


def make_turns(generator, device, head_dim, columns, lanes, window):
    """A table of any numbers; some lanes stand so that their last rows are past its end."""
    table = torch.randn(11, head_dim // 2, 2, generator=generator).to(device)
    first = torch.randint(0, 11, (lanes,), generator=generator, dtype=torch.int32).to(device)
    return Turns(table, first, window, columns)


@pytest.mark.parametrize("configs", [FEW, MANY], ids=["kernel", "cublas"])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(3, 3, 8), (4, 2, 6), (2, 1, 100)])
@pytest.mark.parametrize("lanes, window", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_and_keys_are_turned(generator, device, configs, n_head, n_kv_head, head_dim, lanes, window, dtype):
    """Two groups of lanes stand alike, as those of a guided canvas do."""
    width, n = 40, (n_head + 2 * n_kv_head) * head_dim
    x, weight, gain, bias = tensors(generator, device, 2 * lanes * window, width, n, dtype)
    turns = make_turns(generator, device, head_dim, (n_head + n_kv_head) * head_dim, lanes, window)
    out = torch.full((len(x), n), float("nan"), dtype=dtype, device=device)
    options = {"gain": gain, "bias": bias, "turns": turns}
    expected = norm_linear_reference(x, weight, out.clone(), **options)
    close(norm_linear(x, weight, out, configs=configs, **options), expected, dtype)
    plain = norm_linear_reference(x, weight, out.clone(), gain=gain, bias=bias)
    assert torch.equal(plain[:, turns.columns :], expected[:, turns.columns :])
    assert not torch.allclose(plain[:, : turns.columns], expected[:, : turns.columns], atol=0.1)


@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(6, 2, 8), (3, 3, 10), (5, 1, 12)])
@pytest.mark.parametrize("window", [1, 3])
def test_fewer_heads_are_turned_and_go_into_the_cache(generator, device, n_head, n_kv_head, head_dim, window):
    lanes, capacity, width = 4, 6, 40
    n = (n_head + 2 * n_kv_head) * head_dim
    x, weight, gain, bias = tensors(generator, device, lanes * window, width, n, torch.float32)
    slots = torch.tensor([2, 0, -1, capacity - 1], dtype=torch.int32, device=device)
    turns = make_turns(generator, device, head_dim, (n_head + n_kv_head) * head_dim, 2, window)

    def caches():
        return tuple(torch.full((lanes, n_kv_head, capacity, head_dim), 7.0, device=device) for _ in range(2))

    got, expected = caches(), caches()
    shared = {"gain": gain, "bias": bias, "slots": slots, "window": window, "turns": turns}
    q = torch.full((lanes * window, n_head * head_dim), float("nan"), device=device)
    q_expected = norm_linear_reference(x, weight, q.clone(), kv_cache=expected, **shared)
    norm_linear(x, weight, q, kv_cache=got, configs=FEW, **shared)
    close(q, q_expected, torch.float32)
    for a, b in zip(got, expected):
        close(a, b, torch.float32)
        assert torch.equal(a == 7.0, b == 7.0)  # nothing else was touched


def test_pairs_are_laid_side_by_side_and_back():
    x = torch.arange(24.0).view(2, 12)
    assert side_by_side(x, -1)[0].tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert torch.equal(in_halves(side_by_side(x, -1)), x)
    assert torch.equal(side_by_side(x.T.contiguous()), side_by_side(x, -1).T)


def test_one_row_in_bfloat16(generator, device):
    """Of activations that bfloat16 holds, so that nothing is rounded before the product; as float32 the interpreter is
    right for it."""
    x, weight, gain, bias = tensors(generator, device, 1, 64, 40, torch.bfloat16)
    x, gain = x.bfloat16().float(), 2 * gain.sign()
    out = torch.full((1, 40), float("nan"), device=device)
    options = {"gain": gain, "bias": bias, "activation": "quick_gelu"}
    expected = norm_linear_reference(x, weight, out.clone(), **options)
    close(norm_linear(x, weight, out, configs=FEW, **options), expected, torch.float32)


def test_choice_of_cublas_comes_from_the_configuration():
    configs = table("default")
    threshold = configs["cublas"][0]["from_rows"]
    assert uses_cublas(threshold, configs) and not uses_cublas(threshold - 1, configs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(8, 5)}, "weight"),
        ({"weight": torch.zeros(8, 4, dtype=torch.int8)}, "int8"),
        ({"out": torch.zeros(2, 7)}, "out"),
        ({"residual": True, "out": torch.zeros(2, 8, dtype=torch.float16)}, "float32"),
        ({"gain": torch.zeros(5)}, "gain"),
        ({"weight": torch.zeros(7, 4), "activation": "gated_silu"}, "no pairs"),
        ({"activation": "gated_silu"}, "out"),
        ({"turns": Turns(torch.zeros(3, 1, 2), torch.zeros(1), 1, 4)}, "int32"),
        ({"turns": Turns(torch.zeros(3, 1, 2), torch.zeros(1, dtype=torch.int32), 1, 10)}, "10 of 8"),
        ({"turns": Turns(torch.zeros(3, 2, 2), torch.zeros(1, dtype=torch.int32), 1, 6)}, "no heads of 4"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(8, 4), "out": torch.zeros(2, 8)}
    with pytest.raises(ValueError, match=message):
        norm_linear(**{**arguments, **change}, configs=FEW)


@pytest.mark.parametrize("layer", [{"activation": "quick_gelu"}, {"residual": True}, {}], ids=str)
def test_what_a_row_comes_to_is_the_same_in_every_configuration_and_batch(generator, device, layer):
    """With the norm inside and apart, in blocks of all sizes, alone and among others. Bit for bit on a GPU, in bfloat16
    and all that ships; the interpreter has an order of its own, so there a few configurations are near each other."""
    dtype = torch.bfloat16 if GPU else torch.float16
    rows, width, n = (130, 512, 1536) if GPU else (18, 300, 40)
    choices = [row for name in ("sm90", "default", "fixed") for row in table(name)["norm_linear"]]
    choices = choices if GPU else FEW["norm_linear"]
    x, weight, gain, _ = tensors(generator, device, rows, width, n, dtype)
    before = torch.randn(rows, n, generator=generator).to(device)
    found = []
    for count in (rows, 1, 17):
        for row in choices:
            out = before[:count].clone() if layer.get("residual") else before[:count].to(dtype)
            norm_linear(x[:count], weight, out, configs=FEW, gain=gain, config=row, **layer)
            found.append(out[0])
    assert torch.isfinite(found[0].float()).all()
    for each in found[1:]:
        if GPU:
            assert torch.equal(each, found[0])
        else:
            close(each, found[0], dtype)
