"""Decode attention equals its plain twin: windows, positions, splits (empty ones too), head dims, caches, prefixes."""

import pytest
import torch
from either_way import device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.kernels.decode_attention import decode_attention, heads_of_a_program
from fastigpt.kernels.prefix_attention import make_prefix, plan_prefix
from fastigpt.ops.decode_attention import decode_attention_reference
from fastigpt.ops.kv_cache import quantize_kv_reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def config(block_s=16, splits=1, block_m=16, prefix_splits=1):
    row = {"block_s": block_s, "splits": splits, "stages": 1, "warps": 4}
    prefix = {"block_m": block_m, "block_s": block_s, "splits": prefix_splits, "stages": 1, "warps": 4}
    return {"decode_attention": [row], "prefix_attention": [prefix]}


def draw(generator, device, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(device, dtype)


def poisoned(x, lanes_used):
    """Everything after the keys in use is NaN: a kernel that looks there shows it."""
    x = x.clone()
    for lane, used in enumerate(lanes_used):
        x[lane, :, max(used, 0) :] = float("nan")
    return x


def close(got, expected, dtype):
    torch.testing.assert_close(got.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("splits", [1, 3])
def test_one_token_equals_the_twin(generator, device, dtype, head_dim, splits):
    # Positions: the first slot, inside a block, on its edge, the last slot of a full cache, a finished image.
    slots = [0, 20, 31, 36, -1]
    n, heads, capacity = len(slots), 2, 37
    q = draw(generator, device, n, 1, heads, head_dim, dtype=dtype)
    k, v = (draw(generator, device, n, heads, capacity, head_dim, dtype=dtype) for _ in range(2))
    used = [s + 1 for s in slots]
    out = torch.full_like(q, float("nan"))
    slots = torch.tensor(slots, dtype=torch.int32, device=device)
    got = decode_attention(q, poisoned(k, used), poisoned(v, used), slots, configs=config(splits=splits), out=out)
    assert got.data_ptr() == out.data_ptr()
    close(got, decode_attention_reference(q, k, v, slots), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window, splits", [(2, 1), (5, 4), (16, 1), (32, 2)])
def test_window_is_causal_among_itself(generator, device, dtype, window, splits):
    n, heads, head_dim, capacity = 3, 2, 64, 50
    slots = torch.tensor([0, 7, capacity - window], dtype=torch.int32, device=device)
    q = draw(generator, device, n, window, heads, head_dim, dtype=dtype)
    k, v = (draw(generator, device, n, heads, capacity, head_dim, dtype=dtype) for _ in range(2))
    used = (slots + window).tolist()
    got = decode_attention(q, poisoned(k, used), poisoned(v, used), slots, configs=config(splits=splits))
    close(got, decode_attention_reference(q, k, v, slots), dtype)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 100), (7, 1, 16)])
@pytest.mark.parametrize("window, splits", [(1, 1), (3, 2), (16, 1)])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8])
def test_heads_that_share_their_keys(generator, device, heads, kv_heads, head_dim, window, splits, cache_dtype):
    slots, capacity = [0, 20, 30, -1], 37
    n, dtype = len(slots), torch.float16 if cache_dtype == torch.float16 else torch.float32
    fused = draw(generator, device, n, window, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q = fused[:, :, :heads]  # rows are apart
    k, v = (draw(generator, device, n, kv_heads, capacity, head_dim) for _ in range(2))
    scales = {}
    if cache_dtype == torch.int8:
        (k, k_scale), (v, v_scale) = (quantize_kv_reference(x, cache_dtype) for x in (k, v))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    k, v = k.to(cache_dtype), v.to(cache_dtype)
    used = [s + window if s >= 0 else 0 for s in slots]
    hidden = {name: poisoned(x, used) for name, x in scales.items()} or {"k": poisoned(k, used), "v": poisoned(v, used)}
    given_k, given_v = hidden.pop("k", k), hidden.pop("v", v)
    out = torch.full((n, window, heads, head_dim), float("nan"), dtype=dtype, device=device)
    slots = torch.tensor(slots, dtype=torch.int32, device=device)
    got = decode_attention(q, given_k, given_v, slots, configs=config(splits=splits), out=out, **hidden)
    expected = decode_attention_reference(q, k, v, slots, **scales)
    torch.testing.assert_close(
        got[:3].float(), expected[:3].float(), atol=3e-3 if dtype == torch.float16 else 1e-5, rtol=3e-3
    )


def test_a_program_takes_as_many_heads_as_it_has_room_for():
    half, windows = torch.bfloat16, (1, 2, 4, 8, 32, 64)
    assert [heads_of_a_program(7, window, half) for window in (1, 4, 5, 32)] == [7, 7, 1, 1]
    assert [heads_of_a_program(16, window, half) for window in windows] == [16, 16, 8, 4, 1, 1]
    assert [heads_of_a_program(16, window, torch.float32) for window in windows] == [16, 8, 4, 2, 1, 1]
    assert heads_of_a_program(1, 1, half) == 1


@pytest.mark.parametrize("window", [1, 3])
def test_heads_that_share_their_keys_share_a_prefix(generator, device, window):
    n, heads, kv_heads, head_dim, source = 4, 6, 2, 20, [1, 0, -1, 1]
    q = draw(generator, device, n, window, heads, head_dim)
    k, v = (draw(generator, device, n, kv_heads, 20, head_dim) for _ in range(2))
    prefix_k, prefix_v = (draw(generator, device, 2, kv_heads, 40, head_dim) for _ in range(2))
    lengths = torch.tensor([40, 17], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 5, 9, 2], dtype=torch.int32, device=device)
    configs, used = config(splits=2, prefix_splits=2), lengths.tolist()
    prefix = make_prefix(
        poisoned(prefix_k, used), poisoned(prefix_v, used), lengths, source, window, configs, q.dtype, n_head=heads
    )
    for scratch in (prefix.part_m, prefix.part_l, prefix.part_acc):
        scratch.fill_(float("nan"))
    got = decode_attention(q, k, v, slots, configs=configs, prefix=prefix)
    expected = decode_attention_reference(
        q, k, v, slots, prefix_k=prefix_k, prefix_v=prefix_v, lengths=lengths, source=source
    )
    close(got, expected, torch.float32)


@pytest.mark.parametrize("window", [1, 2])
def test_heads_may_be_padded(generator, device, window):
    """With zeros, for wider loads: their scale is then not that of their width."""
    q = draw(generator, device, 2, window, 2, 10)
    k, v, prefix_k, prefix_v = (draw(generator, device, 2, 2, 20, 10) for _ in range(4))
    slots = torch.tensor([3, 11], dtype=torch.int32, device=device)
    lengths = torch.tensor([20, 4], dtype=torch.int32, device=device)
    padded = [torch.nn.functional.pad(x, (0, 6)) for x in (q, k, v, prefix_k, prefix_v)]
    prefix = make_prefix(*padded[3:], lengths, [0, 1], window, config(), q.dtype)
    got = decode_attention(*padded[:3], slots, configs=config(), prefix=prefix, scale=10**-0.5)
    shared = {"prefix_k": prefix_k, "prefix_v": prefix_v, "lengths": lengths, "source": [0, 1]}
    close(got[..., :10], decode_attention_reference(q, k, v, slots, **shared), torch.float32)
    assert not got[..., 10:].any()


def test_window_past_the_end_of_the_cache_reads_nothing_there(generator, device):
    q = draw(generator, device, 1, 4, 1, 64)
    k, v = (draw(generator, device, 1, 1, 8, 64) for _ in range(2))
    slots = torch.tensor([6], dtype=torch.int32, device=device)  # rows 2 and 3 of the window have no slot
    got = decode_attention(q, k, v, slots, configs=config())
    close(got[:, :2], decode_attention_reference(q, k, v, slots)[:, :2], torch.float32)
    assert got.isfinite().all()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_keys_that_a_query_may_not_look_at_may_be_anything(generator, device, cache_dtype):
    """What a wrong guess leads to may overflow; the queries before it know nothing of it, those behind it do."""
    n, window, head_dim = 2, 4, 16
    q = draw(generator, device, n, window, 1, head_dim)
    k, v = (draw(generator, device, n, 1, 40, head_dim) for _ in range(2))
    slots = torch.tensor([30, 3], dtype=torch.int32, device=device)
    scales, values = {}, (v,)
    if cache_dtype == torch.int8:
        (k, k_scale), (v, v_scale) = (quantize_kv_reference(x, cache_dtype) for x in (k, v))
        scales, values = {"k_scale": k_scale, "v_scale": v_scale}, (v_scale,)
    expected = decode_attention_reference(q, k, v, slots, **scales)
    for lane, first in enumerate(slots.tolist()):
        for x in values:
            x[lane, 0, first + 2] = float("inf")
    got = decode_attention(q, k, v, slots, configs=config(splits=2), **scales)
    close(got[:, :2], expected[:, :2], torch.float32)
    assert not got[:, 2:].isfinite().any(-1).any()


@pytest.mark.parametrize("window", [1, 4])
def test_queries_may_be_part_of_a_fused_qkv(generator, device, window):
    n, heads, head_dim = 7, 2, 64
    qkv = draw(generator, device, n * window, 3 * heads * head_dim)
    q = qkv[:, : heads * head_dim].view(n, window, heads, head_dim)
    k, v = (draw(generator, device, n, heads, 20, head_dim) for _ in range(2))
    slots = torch.arange(n, dtype=torch.int32, device=device)
    got = decode_attention(q, k, v, slots, configs=config(splits=2))
    close(got, decode_attention_reference(q.contiguous(), k, v, slots), torch.float32)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("window", [1, 3])
def test_eight_bit_cache_equals_the_twin(generator, device, cache_dtype, window):
    n, heads, head_dim, capacity = 2, 2, 64, 20
    q = draw(generator, device, n, window, heads, head_dim)
    k, k_scale = quantize_kv_reference(draw(generator, device, n, heads, capacity, head_dim), cache_dtype)
    v, v_scale = quantize_kv_reference(draw(generator, device, n, heads, capacity, head_dim), cache_dtype)
    slots = torch.tensor([3, capacity - window], dtype=torch.int32, device=device)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    got = decode_attention(q, k, v, slots, configs=config(splits=2), **scales)
    close(got, decode_attention_reference(q, k, v, slots, **scales), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window, splits, prefix_splits", [(1, 1, 1), (1, 2, 3), (4, 1, 2), (4, 3, 1)])
def test_shared_prefix_is_merged(generator, device, dtype, window, splits, prefix_splits):
    source = [0, 0, 0, 1, 2, 2]  # of different lengths, one empty
    n, heads, head_dim, capacity, length = len(source), 2, 64, 20, 40
    q = draw(generator, device, n, window, heads, head_dim, dtype=dtype)
    k, v = (draw(generator, device, n, heads, capacity, head_dim, dtype=dtype) for _ in range(2))
    prefix_k, prefix_v = (draw(generator, device, 3, heads, length, head_dim, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([length, 0, 17], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 5, 9, 2, 0, 16], dtype=torch.int32, device=device)
    configs = config(splits=splits, prefix_splits=prefix_splits)
    used = lengths.tolist()
    prefix = make_prefix(poisoned(prefix_k, used), poisoned(prefix_v, used), lengths, source, window, configs, q.dtype)
    for scratch in (prefix.part_m, prefix.part_l, prefix.part_acc):
        scratch.fill_(float("nan"))
    got = decode_attention(q, k, v, slots, configs=configs, prefix=prefix)
    expected = decode_attention_reference(
        q, k, v, slots, prefix_k=prefix_k, prefix_v=prefix_v, lengths=lengths, source=source
    )
    close(got, expected, dtype)


def test_scratch_is_left_ready_for_the_next_launch(generator, device):
    q = draw(generator, device, 2, 1, 2, 64)
    k, v = (draw(generator, device, 2, 2, 30, 64) for _ in range(2))
    parts = [torch.full((3, 2, 2), float("nan"), device=device) for _ in range(2)]
    parts.append(torch.full((3, 2, 2, 64), float("nan"), device=device))
    arrivals = torch.zeros(4, dtype=torch.int32, device=device)
    for slot in (4, 29):
        slots = torch.full((2,), slot, dtype=torch.int32, device=device)
        got = decode_attention(q, k, v, slots, configs=config(splits=3), scratch=(*parts, arrivals))
        close(got, decode_attention_reference(q, k, v, slots), torch.float32)
        assert not arrivals.any()


def test_result_of_an_image_does_not_depend_on_its_neighbours_or_the_window(generator, device):
    """Nor on how many programs share its keys, bit for bit."""
    k, v = (draw(generator, device, 3, 2, 40, 64) for _ in range(2))
    q = draw(generator, device, 3, 4, 2, 64)
    slots = torch.tensor([3, 30, 11], dtype=torch.int32, device=device)
    together = decode_attention(q, k, v, slots, configs=config(splits=1))
    for splits in (1, 2):
        alone = decode_attention(q[1:2], k[1:2], v[1:2], slots[1:2], configs=config(splits=splits))
        assert torch.equal(together[1:2], alone)
        for j in range(q.shape[1]):
            one = decode_attention(q[:, j : j + 1].contiguous(), k, v, slots + j, configs=config(splits=splits))
            assert torch.equal(one, together[:, j : j + 1])


@pytest.mark.parametrize("splits, prefix_splits", [(1, 1), (2, 3)])
def test_result_of_an_image_does_not_depend_on_whether_it_shares_its_prefix(generator, device, splits, prefix_splits):
    """Of a prefix that ends where a block of keys does, bit for bit."""
    n, heads, head_dim, length = 3, 2, 64, 32
    q = draw(generator, device, n, 2, heads, head_dim)
    prefix_k, prefix_v = (draw(generator, device, 1, heads, length, head_dim) for _ in range(2))
    k, v = (draw(generator, device, n, heads, 40, head_dim) for _ in range(2))
    slots = torch.tensor([0, 17, 30], dtype=torch.int32, device=device)
    configs = config(splits=splits, prefix_splits=prefix_splits)
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    prefix = make_prefix(prefix_k, prefix_v, lengths, [0] * n, 2, configs, q.dtype)
    shared = decode_attention(q, k, v, slots, configs=configs, prefix=prefix)
    k, v = (torch.cat([x.expand(n, -1, -1, -1), y], 2) for x, y in ((prefix_k, k), (prefix_v, v)))
    assert torch.equal(shared, decode_attention(q, k, v, slots + length, configs=configs))


@pytest.mark.parametrize("window", [1, 4])
def test_lanes_change_their_prefix_without_another_launch_plan(generator, device, window):
    """In any order, with lanes that read none; nothing that a captured graph holds on to is replaced."""
    n, heads, head_dim = 5, 2, 16
    q = draw(generator, device, n, window, heads, head_dim)
    k, v = (draw(generator, device, n, heads, 20, head_dim) for _ in range(2))
    prefix_k, prefix_v = (draw(generator, device, 3, heads, 40, head_dim) for _ in range(2))
    lengths = torch.tensor([40, 7, 17], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 5, 9, -1, 16], dtype=torch.int32, device=device)
    configs = config(splits=2, prefix_splits=2, block_m=16)
    prefix = make_prefix(prefix_k, prefix_v, lengths, [-1] * n, window, configs, q.dtype)
    for source in ([-1] * n, [2, 0, 2, 1, 0], [1, -1, -1, 2, 1], [0, 1, 2, 0, 1], [0] * n):
        prefix.assign(source, window)
        for scratch in (prefix.part_m, prefix.part_l, prefix.part_acc):
            scratch.fill_(float("nan"))
        got = decode_attention(q, k, v, slots, configs=configs, prefix=prefix)
        expected = decode_attention_reference(
            q, k, v, slots, prefix_k=prefix_k, prefix_v=prefix_v, lengths=lengths, source=source
        )
        close(got[slots >= 0], expected[slots >= 0], torch.float32)


def test_plan_covers_every_row_once():
    source = [0, 0, 0, 2, 5, 5]
    blocks, order = plan_prefix(source, window=3, block_m=4)
    covered = sorted((row, source) for source, first, count in blocks for row in range(first, first + count))
    assert order == list(range(6)) and covered == [(row, source[row // 3]) for row in range(18)]
    assert all(count <= 4 for _, _, count in blocks)
    blocks, order = plan_prefix([5, -1, 0, 5, 0, 0], window=3, block_m=4)
    assert order == [2, 4, 5, 0, 3] and sum(count for _, _, count in blocks) == 15


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"k_cache": torch.zeros(2, 2, 8, 32)}, "k_cache"),
        ({"k_cache": torch.zeros(2, 3, 8, 64), "v_cache": torch.zeros(2, 3, 8, 64)}, "2 heads .* cannot share 3"),
        ({name: torch.zeros(2, 2, 8, 64, dtype=torch.int8) for name in ("k_cache", "v_cache")}, "scales"),
        ({"k_cache": torch.zeros(2, 2, 64, 8).transpose(2, 3)}, "contiguous"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "q": torch.zeros(2, 1, 2, 64),
        "k_cache": torch.zeros(2, 2, 8, 64),
        "v_cache": torch.zeros(2, 2, 8, 64),
        "slots": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, **change}, configs=config())
