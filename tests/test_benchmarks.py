"""What benchmarks/ measures is work, not its launch; and peers are measured only where they do the same work."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "baselines"))

import bench_decode_attention
import bench_sample
import bench_step
import decode_peers

from fastigpt.bench import timing
from fastigpt.bench.machine import Machine

MACHINE = Machine("x", 1, 1e9, {"float32": 1e9, "bfloat16": 1e9}, {})


class Benchmark:
    """As much of pytest-benchmark's fixture as a benchmark needs: it writes down when the timed work ends."""

    def __init__(self, events):
        self.events, self.extra_info = events, {}
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=1.0))

    def pedantic(self, work, rounds=1, warmup_rounds=0, **options):
        for _ in range(rounds + warmup_rounds):
            work()
            self.events.append("end")


class Peer:
    """Launches and leaves the work under way."""

    dtype = kv_dtype = torch.bfloat16

    def __init__(self, events):
        self.events = events

    def prepared_pass(self, **options):
        return lambda: self.events.append("launch")


@pytest.fixture
def events(monkeypatch):
    """What happened, in order: launches, waits for the device, ends of what is timed."""
    found = []
    for module in (bench_step, timing):
        monkeypatch.setattr(module, "synchronize", lambda device: found.append("wait"))
    return found


def test_a_pass_is_timed_until_it_is_done(events):
    bench_step.bench_pass(Benchmark(events), Peer(events), MACHINE, torch.device("cuda"), 1, 32)
    assert events == ["launch", "wait", "end"] * 6


def test_passes_of_whole_images_are_timed_until_they_are_done(events):
    bench_sample.from_passes(Benchmark(events), Peer(events), 1, torch.device("cuda"))
    assert events == (["wait", "launch", "wait"] * 3 + ["end"]) * 4


Q = torch.randn(2, 3, 1, 64)
K, V = (torch.randn(2, 3, 32, 64) for _ in range(2))


@pytest.fixture
def flashinfer(monkeypatch):
    """A module that reads a paged cache as FlashInfer documents it; the real one needs a GPU."""

    class Wrapper:
        def __init__(self, workspace, layout, use_cuda_graph, **buffers):
            assert layout == "HND" and use_cuda_graph and len(buffers) == 3

        def plan(self, indptr, indices, last, qo_heads, kv_heads, head_dim, page_size, **dtypes):
            assert all(x.dtype == torch.int32 for x in (indptr, indices, last))
            self.rows = [indices[a:b].tolist() for a, b in zip(indptr.tolist(), indptr.tolist()[1:])]
            self.last, self.page, self.heads = last.tolist(), page_size, kv_heads

        def run(self, q, cache, out):
            for b, pages in enumerate(self.rows):
                keys = (len(pages) - 1) * self.page + self.last[b]
                k, v = (torch.cat([x[page] for page in pages], 1)[:, :keys] for x in cache)  # [heads, keys, head_dim]
                assert k.shape[0] == self.heads
                out[b] = torch.einsum("hk,hkd->hd", (torch.einsum("hd,hkd->hk", q[b], k) / 8).softmax(-1), v)
            return out

    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper))
    monkeypatch.setattr(decode_peers, "_workspace", lambda: torch.empty(0))
    monkeypatch.setattr(decode_peers, "DEVICE", "cpu")


def test_sdpa_and_flashinfer_are_given_the_same_work(flashinfer):
    for name in ("sdpa", "flashinfer"):
        assert decode_peers.wrong(decode_peers.PEERS[name](Q, K, V), Q, K, V) < 1e-5, name
    other = decode_peers.sdpa(Q, V, K)
    assert decode_peers.wrong(other, Q, K, V) > bench_decode_attention.TOLERANCE  # the check can fail


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_flex_attention_is_given_the_same_work(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(decode_peers, "_compiled_flex", lambda: flex_attention)
    with torch.compiler.set_stance("force_eager"):
        assert decode_peers.wrong(decode_peers.flex(Q, K, V), Q, K, V) < 1e-5


def test_peers_that_cannot_be_measured_say_why(monkeypatch):
    assert "96" in decode_peers.why_not("flex", 96) and decode_peers.why_not("flex", 64) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert decode_peers.why_not("flashinfer", 64) == "is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "96" in decode_peers.why_not("flashinfer", 96) and decode_peers.why_not("flashinfer", 128) is None


def test_a_peer_that_does_other_work_is_not_measured(monkeypatch):
    monkeypatch.setattr(bench_decode_attention, "DEVICE", "cpu")
    monkeypatch.setattr(bench_decode_attention, "KEYS", 32)
    monkeypatch.setattr(bench_decode_attention, "copies_needed", lambda size, device: 1)
    monkeypatch.setattr(bench_decode_attention, "graph_seconds", lambda calls: 2e-6)
    peers = {"sdpa": decode_peers.sdpa, "flex": lambda q, k, v: decode_peers.sdpa(q, v, k)}
    monkeypatch.setattr(bench_decode_attention, "PEERS", peers)
    found = bench_decode_attention.peers(2, 3, 64)
    assert found["sdpa_microseconds"] == 2.0 and "wrong by" in found["flex_microseconds"]
