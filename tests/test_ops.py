"""The public operators: opcheck, fullgraph compilation, values against plain formulas, and errors before any work."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import fastigpt.ops as ops
from fastigpt import _C
from fastigpt.ops.decode_attention import Stored, in_pytorch
from fastigpt.ops.decode_attention import on_cpu as decode_on_cpu
from fastigpt.ops.sample_head import on_cpu as sample_on_cpu
from fastigpt.ops.sample_head import sample_head_reference
from fastigpt.sampling import Drawing, draw, filter_logits, guide, gumbel_noise

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def causal(dtype=torch.float32, tq=3, tk=5):
    return tuple(torch.randn(2, t, 2, 8, dtype=dtype) for t in (tq, tk, tk))


def decode(cache_dtype=torch.float32, window=2, prefix=True, n=4):
    q, k, v = (torch.randn(n, window, 2, 8) for _ in range(3))
    shape = (n, 2, 6, 8)
    arguments = (q, k, v, *(torch.randn(shape).to(cache_dtype) for _ in range(2)))
    options = {}
    if cache_dtype != torch.float32:
        options |= {"k_scale": torch.rand(shape[:-1]), "v_scale": torch.rand(shape[:-1])}
    if prefix:
        p = (2, 2, 3, 8)
        options |= {"prefix_k": torch.randn(p).to(cache_dtype), "prefix_v": torch.randn(p).to(cache_dtype)}
        options["prefix_lengths"] = torch.tensor([3, 1], dtype=torch.int32)
        if cache_dtype != torch.float32:
            options |= {"prefix_k_scale": torch.rand(p[:-1]), "prefix_v_scale": torch.rand(p[:-1])}
    positions = torch.tensor([0, 1, 4, 2][:n], dtype=torch.int32)
    return (*arguments, positions), options


def sample(n=3):
    hidden, gain, weight = torch.randn(n, 8), torch.rand(8), torch.randn(11, 8)
    return hidden, gain, weight, torch.arange(n) + 2**40, torch.arange(n), -5


CALLS = {
    "causal_attention": (lambda: (causal(), {})),
    "decode_attention": decode,
    "sample_head": (lambda: (sample(), {"temperature": 0.8, "top_k": 5, "known": torch.tensor([-1, 4, -1])})),
    "nearest_centroid": (lambda: ((torch.rand(4, 3), torch.rand(5, 3)), {})),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    arguments, options = CALLS[name]()
    torch.library.opcheck(getattr(torch.ops.fastigpt, name).default, arguments, options, test_utils=TESTS)


def test_opcheck_of_an_eight_bit_cache():
    arguments, options = decode(torch.int8)
    torch.library.opcheck(torch.ops.fastigpt.decode_attention.default, arguments, options, test_utils=TESTS)


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_compilation(name):
    arguments, options = CALLS[name]()
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    function = getattr(ops, name)
    compiled = torch.compile(lambda *a, **o: function(*a, **o), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*copies, **options), function(*arguments, **options))
    for a, b in zip(copies, arguments):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)  # caches changed alike


def plain_attention(q, k, v):
    """One query, one head: q [D], k, v [S, D]."""
    return (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_causal_attention_is_the_formula(dtype, tolerance):
    q, k, v = causal(dtype)
    got = ops.causal_attention(q, k, v)
    assert got.is_contiguous() and got.dtype == dtype
    for b in range(2):
        for i in range(3):
            for h in range(2):
                keys, values = k[b, : 3 + i, h].float(), v[b, : 3 + i, h].float()
                expected = plain_attention(q[b, i, h].float(), keys, values)
                torch.testing.assert_close(got[b, i, h].float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_decode_attention_appends_and_attends(cache_dtype):
    (q, k, v, k_cache, v_cache, positions), options = decode(cache_dtype)
    if cache_dtype == torch.float32:  # slots no query may see hold NaN
        for b, first in enumerate(positions.tolist()):
            k_cache[b, :, first:], v_cache[b, :, first:] = math.nan, math.nan
    before = k_cache.clone()
    got = ops.decode_attention(q, k, v, k_cache, v_cache, positions, **options)

    def value(x, scale, *at):
        return x[at].float() if scale is None else x[at].float() * scale[at][..., None]

    scales = [options.get(name) for name in ("k_scale", "v_scale", "prefix_k_scale", "prefix_v_scale")]
    for b, first in enumerate(positions.tolist()):
        new = value(k_cache, scales[0], b, slice(None), slice(first, first + 2)).transpose(0, 1)
        torch.testing.assert_close(new, k[b], atol={torch.float32: 0, torch.int8: 0.02}.get(cache_dtype, 0.2), rtol=0)
        assert torch.equal(k_cache[b, :, :first].float(), before[b, :, :first].float())
        source, used = b // 2, int(options["prefix_lengths"][b // 2])
        for j in range(2):
            for h in range(2):
                parts = [
                    torch.cat([value(p, ps, source, h, slice(used)), value(c, cs, b, h, slice(first + j + 1))])
                    for p, ps, c, cs in (
                        (options["prefix_k"], scales[2], k_cache, scales[0]),
                        (options["prefix_v"], scales[3], v_cache, scales[1]),
                    )
                ]
                torch.testing.assert_close(got[b, j, h], plain_attention(q[b, j, h], *parts), atol=1e-4, rtol=1e-4)


def test_sample_head_is_norm_head_and_draw():
    hidden, gain, weight, index, position, seed = sample()
    x = hidden * torch.rsqrt((hidden**2).mean(-1, keepdim=True) + 1e-5) * gain
    drawing = Drawing(seed=2**64 + seed, temperature=0.8, top_p=0.9)
    expected = draw(x @ weight.T, index, position, drawing)
    assert torch.equal(
        ops.sample_head(hidden, gain, weight, index, position, seed, temperature=0.8, top_p=0.9), expected
    )
    known = torch.tensor([-1, 7, -1])
    got = ops.sample_head(hidden, gain, weight, index, position, seed, temperature=0.8, top_p=0.9, known=known)
    assert got.tolist() == [int(expected[0]), 7, int(expected[2])]
    # Guided with scale 0, only the hidden states without the prompt count.
    other = torch.randn_like(hidden)
    guided = ops.sample_head(other, gain, weight, index, position, seed, unconditional=hidden, guidance_scale=0.0)
    assert torch.equal(guided, ops.sample_head(hidden, gain, weight, index, position, seed))


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize(
    "hidden_type, weight_type", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("n, width, colours", [(1, 512, 512), (3, 8, 11), (37, 40, 65), (16, 33, 1)])
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6},
    {"top_k": 9, "top_p": 0.8, "guidance_scale": 1.7},
])  # fmt: skip
def test_the_extensions_head_equals_its_twin(n, width, colours, hidden_type, weight_type, options, isa):
    hidden, other = torch.randn(2, n, width).to(getattr(torch, hidden_type)).unbind(0)
    gain, weight = torch.rand(width, dtype=torch.bfloat16), torch.randn(colours, width).to(getattr(torch, weight_type))
    index, position = torch.arange(n) * 2**40 - 5, torch.randint(0, 1024, (n,))
    drawing = Drawing(**({"seed": 2**64 - 9} | options))
    without = other if drawing.guidance_scale is not None else None
    arguments = (hidden, gain, weight, index, position, without, drawing, 1e-5)
    got, expected = sample_on_cpu(*arguments, isa=isa), sample_head_reference(*arguments)
    assert (got != expected).sum() <= 1
    if not torch.equal(got, expected):  # float32 sums in another order may turn a draw that is nearly undecided
        logits = [F.rms_norm(x.float(), (width,), gain.float(), 1e-5) @ weight.float().T for x in (hidden, other)]
        scores = filter_logits(logits[0] if without is None else guide(*logits, drawing.guidance_scale), drawing)
        if drawing.temperature:
            scores += gumbel_noise(drawing.seed, index, position, colours)
        assert (scores.amax(-1) - scores.gather(-1, got[:, None])[:, 0]).max() < 1e-4


def test_a_head_without_finite_logits_is_refused():
    hidden, gain, weight, index, position, seed = sample()
    for bad in (math.nan, math.inf):
        weight[3, 2] = bad
        with pytest.raises(ValueError, match="finite logits"):
            ops.sample_head(hidden, gain, weight, index, position, seed, top_p=0.5)
    with pytest.raises(ValueError, match="position must be from 0 to 4294967295, found -1"):
        ops.sample_head(hidden, gain, torch.randn(11, 8), index, position - 1, seed)


@pytest.mark.parametrize("window, start", [(1, 5), (4, 2), (4, 0), (6, 0)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_decode_attention_of_images_at_one_position(window, start, dtype, tolerance):
    """The path without a copy: nothing behind the window is read, nothing but the window is written."""
    q, k, v = (torch.randn(3, window, 2, 24, dtype=dtype) for _ in range(3))
    k_cache, v_cache = torch.randn(2, 3, 2, 7, 24, dtype=dtype)
    k_cache[:, :, start:], v_cache[:, :, start:] = math.nan, math.nan
    keys, values = (torch.cat([old[:, :, :start].transpose(1, 2), new], 1) for old, new in ((k_cache, k), (v_cache, v)))
    got = ops.decode_attention(q, k, v, k_cache, v_cache, torch.full((3,), start, dtype=torch.int32))
    assert got.is_contiguous() and got.dtype == dtype
    for cache, expected in ((k_cache, keys), (v_cache, values)):
        assert torch.equal(cache[:, :, : start + window].transpose(1, 2), expected)
        assert cache[:, :, start + window :].isnan().all()
    for b in range(3):
        for j in range(window):
            for h in range(2):
                parts = [x[b, : start + j + 1, h].float() for x in (keys, values)]
                expected = plain_attention(q[b, j, h].float(), *parts)
                torch.testing.assert_close(got[b, j, h].float(), expected, atol=tolerance, rtol=tolerance)


def rows_of(shape, dtype, used):
    """Keys and values of a cache or prefix: what is not in use is NaN, or in int8 a scale of NaN."""
    k, v = (
        torch.randn(shape).to(dtype) if dtype != torch.int8 else torch.randint(-127, 128, shape).to(dtype) for _ in "kv"
    )
    k_scale, v_scale = (torch.rand(shape[:-1]) / 50 if dtype == torch.int8 else None for _ in "kv")
    for b, end in enumerate(used):
        for x in (k, v) if dtype != torch.int8 else (k_scale, v_scale):
            x[b, :, end:] = math.nan
    return Stored(k, v, k_scale, v_scale)


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize(
    "number, stored", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8"), ("bfloat16", "int8")]
)
@pytest.mark.parametrize("head_dim, n_head, n, window, capacity, sources", [
    (64, 2, 3, 1, 200, 0), (64, 1, 1, 1, 1, 0), (8, 3, 2, 2, 130, 2), (24, 2, 4, 3, 65, 1), (96, 1, 2, 5, 97, 0),
    (128, 2, 2, 8, 70, 2), (80, 1, 1, 7, 7, 1), (5, 2, 3, 66, 150, 0), (64, 1, 2, 64, 129, 1),
])  # fmt: skip
def test_the_extensions_decode_equals_its_twin(head_dim, n_head, n, window, capacity, sources, number, stored, isa):
    number, stored = getattr(torch, number), getattr(torch, stored)
    positions = torch.randint(0, capacity - window + 1, (n,), dtype=torch.int32)
    q, k, v = torch.randn(n, window, 3, n_head, head_dim).to(number).unbind(2)  # parts of a fused projection
    cache = rows_of((n, n_head, capacity, head_dim), stored, positions.tolist())
    prefix = lengths = None
    if sources:
        lengths = torch.randint(0, 34, (sources,), dtype=torch.int32)
        prefix = rows_of((sources, n_head, 33, head_dim), stored, lengths.tolist())
    copy = Stored(*(x if x is None else x.clone() for x in cache))
    got = decode_on_cpu(q, k, v, cache, positions, prefix, lengths, isa=isa)
    expected = in_pytorch(q, k, v, copy, positions, prefix, lengths)
    assert got.is_contiguous() and got.dtype == number
    tolerance = 2e-5 if number == torch.float32 else 1e-2
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance)
    for mine, twins in zip(cache, copy):
        assert mine is None or torch.equal(torch.nan_to_num(mine.float(), 7), torch.nan_to_num(twins.float(), 7))


def test_decode_attention_is_the_same_on_any_number_of_threads_and_from_several():
    q, k, v = torch.randn(16, 1, 3, 8, 64).unbind(2)
    caches = torch.randn(2, 16, 8, 300, 64)
    positions = torch.full((16,), 250, dtype=torch.int32)

    def decoded(_=None):
        return ops.decode_attention(q, k, v, *caches, positions)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = decoded()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(alone, other) for other in pool.map(decoded, range(8)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(2, 1, 2, 8)}, ValueError, "k must have shape"),
        ({"q": torch.zeros(4, 2, 2, 8, dtype=torch.float64)}, TypeError, "q must be float32"),
        ({"k_cache": torch.zeros(4, 2, 6, 8, dtype=torch.int8)}, TypeError, "v_cache must be int8"),
        ({"k_cache": torch.zeros(4, 2, 8, 6).transpose(2, 3)}, ValueError, "v_cache must have shape|contiguous"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, TypeError, "positions must be int32"),
        ({"positions": torch.tensor([0, 0, 5, 0], dtype=torch.int32)}, ValueError, "between 0 and 4 .*not 5"),
        ({"positions": torch.tensor([0, -1, 0, 0], dtype=torch.int32)}, ValueError, "not -1"),
        ({"q": torch.zeros(4, 2, 2, 8, device="meta")}, ValueError, "q on meta"),
        ({"prefix_k": torch.zeros(3, 2, 3, 8)}, ValueError, "3 sources"),
        ({"prefix_v": None}, ValueError, "prefix_v"),
        ({"prefix_lengths": torch.tensor([4, 0], dtype=torch.int32)}, ValueError, "prefix_lengths .* not 4"),
        ({"k_scale": torch.zeros(4, 2, 6)}, ValueError, "k_scale must be left out"),
    ],
)
def test_decode_attention_names_what_is_wrong(change, error, message):
    arguments, options = decode()
    names = ("q", "k", "v", "k_cache", "v_cache", "positions")
    with pytest.raises(error, match=message):
        ops.decode_attention(**{**dict(zip(names, arguments)), **options, **change})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda q, k, v: (q[0], k, v), ValueError, "q must be"),
        (lambda q, k, v: (k, q, q), ValueError, "at least 5"),
        (lambda q, k, v: (q, k, v[:, :4]), ValueError, "v must have shape"),
        (lambda q, k, v: (q.half(), k, v), TypeError, "k must be float16"),
        (lambda q, k, v: (q.int(), k, v), TypeError, "int32"),
        (lambda q, k, v: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v), ValueError, "contiguous"),
    ],
)
def test_causal_attention_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.causal_attention(*arguments(*causal()))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.zeros(3, 7)}, ValueError, "gain"),
        ({"weight": torch.zeros(5, 7)}, ValueError, "weight"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, TypeError, "index"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, ValueError, "position"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"unconditional": torch.zeros(3, 7)}, ValueError, "unconditional"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale"),
        ({"hidden": torch.full((3, 8), math.nan)}, ValueError, "finite"),
        ({"position": torch.tensor([0, -1, 2])}, ValueError, "position"),
    ],
)
def test_sample_head_names_what_is_wrong(change, error, message):
    names = ("hidden", "gain", "weight", "index", "position", "seed")
    with pytest.raises(error, match=message):
        ops.sample_head(**{**dict(zip(names, sample())), **change})
