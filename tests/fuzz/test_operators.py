"""Operators and nearest_centroid, given tensors of any dtype, shape, stride, layout and device: a right result, or a
ValueError or TypeError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import Case, survive
from hostile import harmless, tensor, value, without_values

import fastigpt
from fastigpt import ops


def floats(case: Case, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.getrandbits(31))
    return torch.randn(shape, generator=generator).to(dtype)


def twisted(case: Case, arguments: dict[str, Any], most: int = 2) -> dict[str, Any]:
    """The arguments with up to `most` of them made hostile."""
    arguments = dict(arguments)
    for name in case.sample(sorted(arguments), case.randint(0, most)):
        given = arguments[name]
        arguments[name] = tensor(case, given) if isinstance(given, torch.Tensor) else value(case)
    return case.say(arguments)


def run(operator: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
    """The operator's result. What does not fit its schema is refused by PyTorch, which names the argument, what was
    found and what was expected, but with a RuntimeError of its own."""
    try:
        return operator(**given)
    except RuntimeError as error:
        if "() Expected a value of type" in str(error):
            raise TypeError(str(error)) from None
        raise


def as_numpy(x: Any) -> Any:
    """x as a numpy array where PyTorch makes one of it."""
    try:
        return x.numpy()
    except Exception:
        return x


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    assert found.device == expected.device and found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def nearest(case: Case) -> None:
    shape = case.choice([(7, 3), (1, 3), (40, 16), (2, 3, 4, 3), (5, 1), (300, 64)])
    dtype = case.choice([torch.float32, torch.float16, torch.bfloat16])
    points = floats(case, *shape, dtype=dtype)
    given = {"points": points, "centroids": floats(case, case.choice([1, 5, 40]), shape[-1], dtype=dtype)}
    given = twisted(case, given)
    as_operator = case.random() < 0.5
    if not as_operator and case.random() < 0.3:
        given = {name: as_numpy(x) for name, x in given.items()}
    options = {} if as_operator else twisted(case, {"metric": "l2", "threads": 1, "isa": "auto"}, most=1)
    call = ops.nearest_centroid if as_operator else fastigpt.nearest_centroid
    found = run(call, {**given, **options})
    if isinstance(found, torch.Tensor) and found.is_meta:
        return
    if options.get("metric", "l2") == "l2":
        x, c = (torch.as_tensor(harmless(torch.as_tensor(each))).double() for each in given.values())
        distances = (x[..., None, :] - c).square().sum(-1)
        chosen = distances.gather(-1, torch.as_tensor(found)[..., None])[..., 0]
        same(chosen, distances.amin(-1), 1e-12)


def causal(case: Case) -> None:
    dtype = case.choice([torch.float32, torch.bfloat16, torch.float16])
    length = case.choice([1, 3, 9])
    given = {name: floats(case, 2, length, 2, 8, dtype=dtype) for name in "qkv"}
    given = twisted(case, given)
    found = run(ops.causal_attention, given)
    if not found.is_meta:
        same(found, ops.causal_attention(*(harmless(x) for x in given.values())), 1e-2)


def decode(case: Case) -> None:
    n, window, heads, dim, capacity = 2, case.choice([1, 4]), 2, 8, 12
    dtype = case.choice([torch.float32, torch.bfloat16, torch.float16])
    cache_dtype = case.choice([dtype, torch.int8, torch.float8_e4m3fn])
    given: dict[str, Any] = {name: floats(case, n, window, heads, dim, dtype=dtype) for name in "qkv"}
    for name in ("k_cache", "v_cache"):
        given[name] = floats(case, n, heads, capacity, dim).mul(9).to(cache_dtype)
    given["positions"] = torch.tensor([case.randrange(9), 3], dtype=torch.int32)
    scaled = cache_dtype != dtype
    if scaled:
        given |= {name: floats(case, n, heads, capacity).abs() for name in ("k_scale", "v_scale")}
    if case.random() < 0.5:
        given |= {f"prefix_{x}": floats(case, 1, heads, 5, dim).to(cache_dtype) for x in "kv"}
        given["prefix_lengths"] = torch.tensor([4], dtype=torch.int32)
        if scaled:
            given |= {f"prefix_{x}_scale": floats(case, 1, heads, 5).abs() for x in "kv"}
    given = twisted(case, given)
    hollow = any(without_values(x) for x in given.values())
    copies = {} if hollow else {name: harmless(x) for name, x in given.items()}
    found = run(ops.decode_attention, given)
    if found.is_meta:
        return
    assert not hollow, "an argument without values gave a result"
    same(found, ops.decode_attention(**copies), 2e-2)
    for name in ("k_cache", "v_cache"):
        same(given[name].float(), copies[name].float(), 2e-2)


def head(case: Case) -> None:
    n, width, colours = 3, 8, 5
    dtype = case.choice([torch.float32, torch.bfloat16, torch.float16])
    given: dict[str, Any] = {
        "hidden": floats(case, n, width, dtype=dtype),
        "gain": floats(case, width),
        "weight": floats(case, colours, width, dtype=dtype),
        "index": torch.arange(n),
        "position": torch.arange(n),
        "seed": case.getrandbits(62),
        "temperature": case.choice([0.0, 1.0, 0.5]),
        "top_k": case.choice([None, 2]),
        "top_p": case.choice([None, 0.7]),
        "guidance_scale": case.choice([1.0, 2.0]),
        "epsilon": 1e-5,
    }
    if case.random() < 0.5:
        given |= {"known": torch.tensor([-1, 2, -1]), "unconditional": floats(case, n, width, dtype=dtype)}
    given = twisted(case, given)
    found = run(ops.sample_head, given)
    if found.is_meta:
        return
    copies = {name: harmless(x) for name, x in given.items()}
    same(found, ops.sample_head(**copies))
    if not (given.get("known") is not None and bool((copies["known"] >= colours).any())):
        assert found.dtype == torch.int64 and bool(((found >= 0) & (found < len(copies["weight"]))).all()), found


def palette(case: Case) -> None:
    colours = np.random.default_rng(case.getrandbits(32)).uniform(-1, 1, (case.choice([1, 2, 16]), 3))
    clusters: Any = torch.from_numpy(colours).float() if case.random() < 0.5 else colours.astype(np.float32)
    if case.random() < 0.4:
        clusters = tensor(case, torch.as_tensor(clusters))
    case.say(clusters)
    made = fastigpt.Palette(clusters, value_range=(-1, 1))
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    given = twisted(case, {"images": images, "tokens": torch.randint(0, made.n_colors, (2, 4, 4))}, most=2)
    if case.random() < 0.3:
        given = {name: as_numpy(x) for name, x in given.items()}
    which, call = case.choice([("images", made.encode), ("tokens", made.decode)])
    found = call(given[which])
    expected = call(harmless(torch.as_tensor(given[which])))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("kind", [nearest, causal, decode, head, palette], ids=lambda kind: kind.__name__)
def test_operators_are_right_or_refuse(kind):
    survive(kind, cases=300)
