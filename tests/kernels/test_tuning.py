"""The tuner: what is fast and wrong never wins, and every kernel that is tuned is compared with its twin."""

import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from either_way import INTERPRETED, device, pytestmark  # noqa: F401

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tune
from twins import difference

from benchmarks.acceptance import stand_in
from fastigpt.kernels import launch
from fastigpt.kernels import norm_linear as kernel


@pytest.fixture
def gpu():
    """A GPU, or its stand-in."""
    if INTERPRETED:
        with stand_in.gpu():
            yield
    else:
        yield


TABLE = {**launch.table("default"), "cublas": [{"from_rows": 10**9}]}


def choice(launcher, candidates, residual=False):
    """Of norm_linear, on a layer of 20 outputs; candidates say how fast they are made to be."""
    x, weight = torch.randn(1, 48, device="cuda").bfloat16(), torch.randn(20, 48, device="cuda").bfloat16()

    def calls(candidate):
        out = torch.zeros(1, 20, device="cuda")
        config = {"block_m": 16, "block_k": 64, "stages": 2, "warps": 8, "early": True, "apart": False, **candidate}
        return [[partial(launcher, x, weight, out, configs=TABLE, config=config, residual=residual)]]

    return tune.Choice("norm_linear", 0, candidates, calls)


def norm_linear(x, weight, out, *, config, **options):
    """The kernel with a fault: blocks of 32 outputs add what is not theirs."""
    kernel.norm_linear(x, weight, out, config=config, **options)
    if config["block_n"] == 32:
        out[0, 3] += 1.0
    return out


@pytest.fixture
def timed(monkeypatch):
    """The wider a block, the faster it seems; which blocks were timed."""
    found = []

    def seconds(calls, **options):
        found.append(calls[0].keywords["config"]["block_n"])
        return 1 / found[-1]

    monkeypatch.setattr(tune, "graph_seconds", seconds)
    return found


CANDIDATES = [{"block_n": 8}, {"block_n": 32}, {"block_n": 16}]


def test_what_is_fast_and_wrong_never_wins(gpu, timed, capsys):
    forever = math.inf
    assert tune.best(choice(kernel.norm_linear, CANDIDATES), forever) == {"block_n": 32}
    timed.clear()
    assert tune.best(choice(norm_linear, CANDIDATES), forever) == {"block_n": 16}
    assert timed == [8, 16] and "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("residual", [False, True])
def test_a_result_that_is_left_out_is_wrong(gpu, timed, residual):
    def norm_linear(x, weight, out, **options):
        return out

    assert tune.best(choice(norm_linear, CANDIDATES, residual), math.inf) is None and not timed


def test_where_no_time_is_left_the_row_stays(gpu, timed):
    assert tune.best(choice(kernel.norm_linear, CANDIDATES), time.monotonic() - 1) is None


def test_a_row_that_was_chosen_keeps_what_work_it_is_for(gpu, timed, monkeypatch):
    monkeypatch.setattr(tune, "choices", lambda table: [choice(kernel.norm_linear, CANDIDATES)])
    monkeypatch.setattr(tune, "crossing", lambda table: 64)
    monkeypatch.setattr(tune, "overlap_pays", lambda table: True)
    kept = []
    old = launch.table(launch.family(torch.device("cuda")))
    table = tune.tune(math.inf, lambda table: kept.append(table))
    assert table["norm_linear"][0] == {**old["norm_linear"][0], "block_n": 32} and kept[-1] == table
    assert table["norm_linear"][1:] == old["norm_linear"][1:] and table["cublas"] == [{"from_rows": 64}]


@pytest.mark.parametrize("same", [True, False])
def test_launches_overlap_only_if_the_tokens_are_the_same(monkeypatch, same):
    steps = {False: (2.0, torch.tensor([1, 2])), True: (1.0, torch.tensor([1, 2 if same else 3]))}
    monkeypatch.setattr(tune, "step", lambda table, overlap, n: steps[overlap])
    assert tune.overlap_pays({}) is same


def test_every_kernel_that_is_tuned_is_compared_with_its_twin(gpu, monkeypatch):
    """One candidate of every row, on small shapes; each is a kernel that the comparison knows."""
    small = {"WIDTHS": (32,), "IMAGES": (1, 1, 2), "HEADS": ((1, 16),), "SEQUENCES": (1, 20, 1)}
    for name, value in small.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune.bench_decode_attention, "KEYS", 32)
    monkeypatch.setattr(tune.bench_decode_attention, "copies_needed", lambda size, device: 1)
    monkeypatch.setattr(tune.bench_norm_linear, "copies_needed", lambda size, device: 1)
    found = {}
    for each in tune.choices(launch.table("default")):
        for calls in each.calls(each.candidates[0]):
            found[each.kernel] = max(found.get(each.kernel, 0.0), difference(calls[0]))
    assert set(found) == {"norm_linear", "decode_attention", "causal_attention"}
    assert all(off <= tune.TOLERANCE for off in found.values()), found
