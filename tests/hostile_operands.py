"""Run by test_operands.py in a process of its own, so that a crash is seen: every tensor argument of every operator, in
every form that a tensor can have without its numbers lying at its address, or otherwise than expected.

A form is either worked out, and the result is that of the plain tensor, or refused with a ValueError or TypeError that
names the argument, before anything is changed. Prints what is neither and exits with its number.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastigpt
import fastigpt.ops as ops
from fastigpt import Palette

warnings.simplefilter("ignore")
torch.set_num_threads(1)
Tensor = torch.Tensor
Call = tuple[Callable[..., Any], dict[str, Any]]


def emptied(x: Tensor, left: int) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(left)
    return y


def negated(x: Tensor) -> Tensor:
    y = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert y.is_neg() and torch.equal(y, x)
    return y


class Subclass(torch.Tensor):
    pass


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


# Forms whose numbers are those of x: the result must be that of x, or it is refused.
SAME: dict[str, Callable[[Tensor], Any]] = {
    "negated": negated,
    "negated and strided": lambda x: negated(torch.stack([x, x], -1))[..., 0],
    "negated and read backwards": lambda x: negated(x.flip(0)).flip(0),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "part of a larger one": lambda x: torch.cat([x, x])[len(x) :],
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}
# Forms that have no such numbers: refused.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "freed": lambda x: emptied(x, 0),
    "cut": lambda x: emptied(x, x.untyped_storage().nbytes() - 1),
    "freed and strided": lambda x: emptied(torch.stack([x, x], -1), 0)[..., 0],
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "complex": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "bool": lambda x: x.bool(),
    "no dimensions": lambda x: x.flatten()[0],
    "another length": lambda x: torch.cat([x, x]),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def decode(cache: torch.dtype, number: torch.dtype = torch.float32) -> Call:
    arguments = {name: random(2, 1, 2, 8).to(number) for name in "qkv"}
    arguments |= {name: random(2, 2, 6, 8).mul(9).to(cache) for name in ("k_cache", "v_cache")}
    arguments["positions"] = torch.tensor([1, 3], dtype=torch.int32)
    arguments |= {name: random(2, 2, 3, 8).mul(9).to(cache) for name in ("prefix_k", "prefix_v")}
    arguments["prefix_lengths"] = torch.tensor([3, 1], dtype=torch.int32)
    if cache in (torch.int8, torch.float8_e4m3fn):
        arguments |= {name: random(2, 2, 6).abs() for name in ("k_scale", "v_scale")}
        arguments |= {name: random(2, 2, 3).abs() for name in ("prefix_k_scale", "prefix_v_scale")}
    return ops.decode_attention, arguments


def head(number: torch.dtype = torch.float32) -> Call:
    i = torch.arange(3)
    arguments = {"hidden": random(3, 8).to(number), "gain": random(8).abs(), "weight": random(11, 8).to(number)}
    arguments |= {"index": i + 5, "position": i + 1, "known": i - 2, "unconditional": random(3, 8).flip(0).to(number)}
    return lambda **a: ops.sample_head(**a, seed=5, guidance_scale=1.5), arguments


CALLS: dict[str, Callable[[], Call]] = {
    "causal_attention": lambda: (
        ops.causal_attention,
        {"q": random(2, 3, 2, 8), "k": random(2, 5, 2, 8), "v": random(2, 5, 2, 8)},
    ),
    "decode_attention": lambda: decode(torch.float32),
    "decode_attention int8": lambda: decode(torch.int8),
    "decode_attention float16": lambda: decode(torch.float16, torch.float16),
    "sample_head": head,
    "sample_head float16": lambda: head(torch.float16),
    "ops.nearest_centroid": lambda: (ops.nearest_centroid, {"points": random(300, 3), "centroids": random(70, 3)}),
    "nearest_centroid": lambda: (
        fastigpt.nearest_centroid,
        {"points": random(300, 3), "centroids": random(70, 3)},
    ),
    "cosine": lambda: (
        lambda points, centroids: fastigpt.nearest_centroid(points, centroids, metric="cosine"),
        {"points": random(300, 3), "centroids": random(70, 3)},
    ),
    "Palette.encode": lambda: (
        Palette(np.linspace(-1, 1, 27).reshape(9, 3)).encode,
        {"pixels": torch.arange(60, dtype=torch.uint8).view(5, 4, 3)},
    ),
    "Palette.decode": lambda: (
        Palette(np.linspace(-1, 1, 27).reshape(9, 3)).decode,
        {"tokens": torch.arange(9).view(3, 3)},
    ),
}
# What is another good argument for some: numpy arrays, other dtypes and other lengths.
GOOD = {
    *((name, form) for name in ("nearest_centroid", "cosine") for form in ("numpy", "another length")),
    ("ops.nearest_centroid", "another length"),
    *((f"Palette.{what}", form) for what in ("encode", "decode") for form in ("numpy", "another length")),
    ("Palette.decode", "no dimensions"),
    *(("sample_head" + number, form) for number in ("", " float16") for form in ("another length of weight",)),
}
PLAIN_FUNCTIONS = ("nearest_centroid", "cosine", "Palette.encode", "Palette.decode")
CHANGED = ("k_cache", "v_cache", "k_scale", "v_scale")
failures = cases = 0


def wrong(*what: object) -> None:
    global failures
    failures += 1
    print(*what, flush=True)


def check(name: str, argument: str, form: str, make: Callable[[Tensor], Any], same: bool) -> None:
    global cases
    function, arguments = CALLS[name]()
    if form == "fake" and name not in PLAIN_FUNCTIONS:
        return  # PyTorch itself refuses a fake tensor among others on the way to an operator
    try:
        given = make(arguments[argument])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return  # there is no such form of this tensor
    cases += 1
    plain = {key: value.clone() for key, value in arguments.items()}
    expected = function(**plain)
    passed = arguments | {argument: given}
    place = f"{name}, {argument} {form}:"
    try:
        with torch.no_grad():
            found = function(**passed)
    except (ValueError, TypeError) as error:
        if argument not in str(error) and not (argument in ("q", "hidden", "k_cache") and "must" in str(error)):
            wrong(place, "the argument is not named in", error)
        for key in CHANGED:
            if (
                key in arguments
                and key != argument
                and not torch.equal(arguments[key].float(), CALLS[name]()[1][key].float())
            ):
                wrong(place, "refused, but", key, "was changed")
        return
    except BaseException:
        wrong(place, traceback.format_exc().strip().splitlines()[-1])
        return
    if not same:
        if (name, form) not in GOOD and (name, f"{form} of {argument}") not in GOOD:
            wrong(place, "accepted")
        return
    if not torch.equal(torch.as_tensor(found).detach().float(), expected.float()):
        wrong(place, "another result")
    for key in CHANGED:
        if key in arguments and not torch.equal(passed[key].detach().float(), plain[key].float()):
            wrong(place, key, "is another one afterwards")


for name, call in CALLS.items():
    for argument in call()[1]:
        for forms, same in ((SAME, True), (WRONG, False)):
            for form, make in forms.items():
                check(name, argument, form, make, same)
print(cases, "cases,", failures, "wrong")
sys.exit(min(failures, 255))
