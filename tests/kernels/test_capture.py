"""Graphs: a replay draws what launches one by one draw, nobody captures or compiles beside anybody else, and a graph is
a few passes.

Where there is no GPU a stand-in records what is launched in a capture and replays it; it refuses what CUDA refuses.
"""

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from drawn import PROMPTED, SMALL, both, empty, fill, requests
from either_way import INTERPRETED, pytestmark  # noqa: F401

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.acceptance import stand_in
from fastigpt import ops
from fastigpt.engine.triton import graphs, passes
from fastigpt.kernels import launching
from fastigpt.ops import devices
from fastigpt.sampling import Drawing

CONFIGS = {"configs": "interpreter"} if INTERPRETED else {}


@pytest.fixture
def captures():
    """What was captured, on a GPU or its stand-in."""
    if INTERPRETED:
        with stand_in.gpu() as found:
            yield found
    else:
        yield None


on_stand_in = pytest.mark.skipif(not INTERPRETED, reason="looks into graphs, which only the stand-in lets one do")


def engines(config, seed):
    return both(config, torch.device("cuda"), seed, **CONFIGS)


def asked(config, n=2):
    return requests(config, empty(config, n), Drawing(seed=1))


def captured(session):
    """Captures the graph of the session's width, and replays nothing."""
    batch = session._batch
    with graphs.launching(torch.device("cuda")):
        batch.passes_of(session._tuner.width()).runner(batch.kind, None, batch.stream)


@pytest.mark.parametrize("window, scale", [(1, None), (3, 1.5)])
def test_replayed_graphs_draw_the_tokens_of_the_reference(captures, monkeypatch, window, scale):
    monkeypatch.setattr(passes, "AT_ONCE", 2)
    reference, engine = engines(PROMPTED, 2)
    tokens = empty(PROMPTED, 2)
    tokens[0, :2] = 1
    wanted = requests(PROMPTED, tokens, Drawing(seed=5, guidance_scale=scale, top_k=3), [[1, 2], [3, 0]])
    assert torch.equal(fill(engine, wanted, window=window).tokens, fill(reference, wanted).tokens)


def test_replayed_graphs_of_a_draft_draw_the_tokens_of_the_reference(captures, monkeypatch):
    monkeypatch.setattr(passes, "AT_ONCE", 2)
    reference, engine = engines(SMALL, 3)
    _, draft = engines(SMALL, 4)
    filled = fill(engine, asked(SMALL, 1), window=2, draft=draft)
    assert torch.equal(filled.tokens, fill(reference, asked(SMALL, 1)).tokens)


@on_stand_in
def test_a_graph_is_a_few_passes(captures):
    """Of the small preset at one token per pass a thousand launches, not four thousand."""
    _, engine = engines(SMALL, 2)
    for window, passes_at_once in ((1, 8), (2, 4), (8, 1), (32, 1)):
        captured(engine.open(1, window=window))
        kernels = 5 * SMALL.n_layer + 1  # of a pass
        assert captures.graphs[-1].kernels == passes_at_once * kernels, window
    assert passes.AT_ONCE * (5 * 24 + 1) < 1000


@on_stand_in
def test_a_session_captures_on_a_stream_of_its_own(captures):
    _, engine = engines(SMALL, 2)
    sessions = [engine.open(1, window=1) for _ in range(2)]
    for session in sessions:
        captured(session)
    first, second = (graph.stream for graph in captures.graphs)
    assert first is not None and first is not second


@on_stand_in
@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(captures, enabled):
    """And whatever happens in it, the collector is left as it was found."""

    def fail():
        raise KeyError("in a capture")

    (gc.enable if enabled else gc.disable)()
    try:
        graph = graphs.capture(lambda: None, torch.cuda.Stream())
        assert graph.collecting is False and gc.isenabled() == enabled
        with pytest.raises(KeyError):
            graphs.capture(fail, torch.cuda.Stream())
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def alone():
    """Whether this thread keeps all others from launching."""
    taken = []

    def try_it():
        taken.append(launching._ALONE.acquire(blocking=False))
        if taken[0]:
            launching._ALONE.release()

    other = threading.Thread(target=try_it)
    other.start()
    other.join()
    return not taken[0]


@on_stand_in
def test_one_capture_at_a_time_in_a_process(captures):
    found = []
    captures.meanwhile = lambda: found.append(alone())
    _, engine = engines(SMALL, 2)
    captured(engine.open(1, window=1))
    engine.prepared_pass(n=1, position=2)
    assert found == [True] * len(captures.graphs) and len(found) == 2 and not alone()


@on_stand_in
def test_a_capture_beside_another_would_be_noticed(captures):
    def another():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass

    with pytest.raises(stand_in.StandInError, match="while another is open"):
        graphs.capture(another, torch.cuda.Stream())


@on_stand_in
@pytest.mark.parametrize("visit", [torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.nonzero, bool])
def test_a_capture_that_visits_the_host_would_be_noticed(captures, visit):
    with pytest.raises(stand_in.StandInError, match="host"):
        graphs.capture(lambda: visit(torch.ones(1)), torch.cuda.Stream())


@on_stand_in
def test_a_kernel_that_was_not_rehearsed_would_be_noticed(captures, monkeypatch):
    monkeypatch.setattr(passes.Passes, "rehearse", lambda self, run: None)
    _, engine = engines(SMALL, 2)
    with pytest.raises(stand_in.StandInError, match="compiled while a graph is captured"):
        fill(engine, asked(SMALL))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter says when a kernel runs")
def test_whoever_launches_is_alone(monkeypatch):
    """Engines and operators: Triton compiles at the first launch, and CPython 3.11 cannot bear two threads that do."""
    from triton.runtime.interpreter import GridExecutor

    found, run = [], GridExecutor.__call__

    def launched(self, *arguments, **options):
        found.append(alone())
        return run(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    _, engine = both(SMALL, torch.device("cpu"), 2)
    fill(engine, requests(SMALL, empty(SMALL, 1), Drawing(seed=1), stop=1))
    engine.logits(torch.zeros((1, 4), dtype=torch.int64))
    engine.hidden(torch.zeros((1, 4), dtype=torch.int64), 1)
    engine.prepared_pass(n=1, position=2)()
    by_engine = len(found)
    monkeypatch.setattr(devices, "by_triton", lambda x: True)
    q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
    cache = [torch.zeros(1, 2, 4, 16) for _ in range(2)]
    ops.decode_attention(q, k, v, *cache, torch.zeros(1, dtype=torch.int32))
    ops.causal_attention(q, k, v)
    ops.sample_head(torch.randn(1, 8), torch.ones(8), torch.randn(3, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(
        1, dtype=torch.int64), 1)  # fmt: skip
    assert by_engine > 10 and len(found) >= by_engine + 4 and all(found)
