"""Sessions of the GPU engine: canvases that come, go, fork, stop and are scored at any time equal those that are drawn
alone, and nothing is held longer than it is needed.
"""

import gc
import random
import threading
import weakref

import pytest
import torch
from conftest import random_tokens, random_weights
from drawn import BLOCKS, PROMPTED, SMALL, both, empty, fill, requests
from either_way import GPU, device, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.engine.reference import ReferenceEngine
from fastigpt.engine.triton import TritonEngine
from fastigpt.engine.triton import batch as batches
from fastigpt.engine.triton.passes import Passes
from fastigpt.errors import CheckpointError
from fastigpt.families import image_gpt
from fastigpt.sampling import Drawing

WAIT = 120.0  # seconds after which a thread that should have gone on has stopped for ever

WAYS = [
    Drawing(seed=1),
    Drawing(seed=2, temperature=0.7, top_k=3),
    Drawing(seed=2**64 - 1, guidance_scale=2.0),
    Drawing(seed=4, temperature=0.0),
    Drawing(seed=5, top_p=0.6, guidance_scale=0.5),
    Drawing(seed=6, temperature=1.5),
]


def mixed():
    """Requests that differ in all that a request may: known tokens, prompts, drawings."""
    tokens, known = empty(PROMPTED, 6), random_tokens(PROMPTED, 6, seed=3)
    tokens[1, :2], tokens[2, 4], tokens[3, :1] = known[1, :2], known[2, 4], known[3, :1]
    prompts = [[1, 2], None, [3, 0], [1, 2], [1, 2], None]
    return requests(PROMPTED, tokens, WAYS, prompts)


def finish(session, slots, seconds=0.0):
    """Steps until these slots are at their ends; how far they came."""
    while True:
        decided = {advance.slot: advance.decided for advance in session.step(seconds)}
        if all(decided[slot] >= end for slot, end in slots.items()):
            return decided


@pytest.mark.parametrize("blocks, window, count", [("image gpt", 1, 3), ("image gpt", 3, 6), ("llama", 3, 4)])
def test_canvases_that_join_and_leave_at_any_time_equal_those_drawn_alone(device, blocks, window, count):
    reference, engine = both(BLOCKS[blocks], device, 1)
    asked, chance = mixed()[:count], random.Random(window)
    wanted = fill(reference, asked).tokens
    session = engine.open(3, window=window)
    waiting, image_of, found = list(range(len(asked))), {}, {}
    while waiting or image_of:
        if waiting and len(image_of) < 3 and (not image_of or chance.random() < 0.6):
            image = waiting.pop(0)
            [slot] = session.add([asked[image]])
            image_of[slot] = image
        for advance in session.step(0.0):
            if advance.decided == PROMPTED.n_pixels:
                found[image_of.pop(advance.slot)] = session.read([advance.slot]).tokens[0]
                session.remove(advance.slot)
            elif chance.random() < 0.1:  # given up, to be drawn again from its start
                waiting.append(image_of.pop(advance.slot))
                session.remove(advance.slot)
    session.close()
    assert torch.equal(torch.stack([found[image] for image in range(len(asked))]), wanted)


def test_more_canvases_than_slots_are_refused_and_change_nothing(device):
    _, engine = both(SMALL, device, 2)
    session = engine.open(3)  # its batch has a slot more, which is not the session's
    asked = requests(SMALL, empty(SMALL, 4), Drawing())
    session.add(asked[:2])
    with pytest.raises(ValueError, match="2 canvases for 1 free slots"):
        session.add(asked[2:])
    with pytest.raises(ValueError, match="3 canvases for 1 free slots"):
        session.fork(0, [1, 2, 3, 4])
    assert session.add(asked[2:3]) == [2]


@pytest.mark.parametrize("blocks, drafted", [("image gpt", False), ("image gpt", True), ("llama", True)])
def test_forks_have_the_same_past_and_futures_of_their_own(device, blocks, drafted):
    reference, engine = both(BLOCKS[blocks], device, 3)
    asked = requests(PROMPTED, empty(PROMPTED, 1), Drawing(seed=7, guidance_scale=1.5), [[1, 2]], stop=2)
    found = []
    for each, options in ((reference, {}), (engine, {"window": 2, "draft": engine if drafted else None})):
        session = each.open(3, **options)
        [slot] = session.add(asked)
        finish(session, {slot: 2})
        slots = session.fork(slot, [5, 6, 7])
        for forked in slots:
            session.resume(forked, PROMPTED.n_pixels)
        finish(session, dict.fromkeys(slots, PROMPTED.n_pixels))
        found.append(session.read(slots).tokens)
        session.close()
    assert slots[0] == slot and torch.equal(found[0], found[1])
    assert (found[1][:, :2] == found[1][0, :2]).all() and len(found[1].unique(dim=0)) > 1


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_fork_copies_eight_bit_caches_too(device, kv_dtype):
    _, engine = both(SMALL, device, 10, kv_dtype=kv_dtype)
    [asked] = requests(SMALL, empty(SMALL, 1), Drawing(seed=3), stop=5)
    session = engine.open(2, window=1)
    [slot] = session.add([asked])
    finish(session, {slot: 5})
    slots = session.fork(slot, [asked.index, asked.index])
    for each in slots:
        session.resume(each, SMALL.n_pixels)
    finish(session, dict.fromkeys(slots, SMALL.n_pixels))
    one, other = session.read(slots).tokens
    assert torch.equal(one, other) and (one >= 0).all()


@pytest.mark.parametrize("window", [1, 4])
def test_nothing_is_drawn_or_passed_behind_a_stop(device, window):
    reference, engine = both(SMALL, device, 4)
    tokens = empty(SMALL, 3)
    tokens[1, 4:], tokens[2, 3:6] = 2, 1
    asked = requests(SMALL, tokens, Drawing(seed=9), stop=5)
    session, truth = engine.open(3, window=window), reference.open(3)
    slots = session.add(asked)
    assert truth.add(asked) == slots
    for stop in (5, 9):
        for each in (session, truth):
            for slot in slots:
                each.resume(slot, stop)
            decided = finish(each, dict.fromkeys(slots, stop))
        assert decided == dict.fromkeys(slots, stop)
        found = session.read(slots)
        assert torch.equal(found.tokens, truth.read(slots).tokens)
        assert not found.pass_starts[:, stop:].any() and not found.pass_starts[1, 4:].any()
    assert window > 1 or found.pass_starts.sum(1).tolist() == [9, 4, 9]


@pytest.mark.parametrize(
    "blocks, window, scale",
    [*(("image gpt", window, scale) for window in (1, 3) for scale in (None, 1.5)), ("llama", 3, 1.5)],
)
def test_scores_equal_the_reference(device, blocks, window, scale):
    """Also of known tokens after the last unknown one; where nobody asked there are none."""
    reference, engine = both(BLOCKS[blocks], device, 5)
    tokens = empty(PROMPTED, 3)
    tokens[:, 1::2], tokens[1, :3], tokens[1, 3], tokens[1, 4:] = 2, 1, -1, 3
    drawing = Drawing(seed=3, temperature=0.5, top_k=2, guidance_scale=scale)
    asked = requests(PROMPTED, tokens, drawing, [[1, 2], [3, 0], [1, 2]], score=True)
    asked[2] = requests(PROMPTED, tokens[2:], drawing, [[1, 2]])[0]
    found, wanted = fill(engine, asked, window=window), fill(reference, asked)
    assert torch.equal(found.tokens, wanted.tokens)
    assert found.log_likelihood.dtype == torch.float64
    torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood, atol=1e-4, rtol=0)
    assert (found.log_likelihood[:2] < 0).all() and found.log_likelihood[2] == 0


def test_passes_that_were_launched_too_many_change_nothing(device, monkeypatch):
    """On a GPU launches are of several passes, and a second is made before the first is done."""
    monkeypatch.setattr(Passes, "at_once", 4)
    reference, engine = both(PROMPTED, device, 1)
    asked = mixed()[:3]
    session = engine.open(3, window=1)
    session._ahead = 2
    slots = session.add(asked)
    finish(session, dict.fromkeys(slots, PROMPTED.n_pixels))
    found = session.read(slots)
    assert torch.equal(found.tokens, fill(reference, asked).tokens)
    assert (found.pass_starts == (torch.stack([request.tokens for request in asked]) < 0)).all(1)[[0, 1]].all()


@pytest.mark.skipif(GPU, reason="whole blocks of keys are shared, and those of a GPU are longer than these prefixes")
@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_equal_requests_share_is_read_and_stored_once(device, blocks, monkeypatch):
    reference, engine = both(BLOCKS[blocks], device, 6)
    read, original = [], batches.prefill

    def counted(model, cache, sequences):
        read.append(len(sequences))
        original(model, cache, sequences)

    monkeypatch.setattr(batches, "prefill", counted)
    tokens = empty(PROMPTED, 4)
    tokens[:, :2] = 1
    asked = requests(PROMPTED, tokens, Drawing(seed=8), [[1, 2]] * 4)
    session = engine.open(4, window=2)
    slots = session.add(asked[:3])
    assert sum(read) == 1 and session._batch.seats.store.readers == 3
    session.remove(slots[0])
    assert session.add(asked[3:]) == [0] and sum(read) == 1  # it is still there
    slots = [0, 1, 2]
    finish(session, dict.fromkeys(slots, PROMPTED.n_pixels))
    wanted = fill(reference, [asked[3], asked[1], asked[2]])
    assert torch.equal(session.read(slots).tokens, wanted.tokens)
    session.close()
    assert session._batch.seats.store.readers == 0


def test_coming_and_going_replaces_no_memory(device):
    """Graphs hold on to addresses: after the first guided canvas they stay what they are."""
    _, engine = both(PROMPTED, device, 6)
    session = engine.open(2, window=1)
    asked = mixed()

    def addresses():
        seats, passes = session._batch.seats, session._batch.passes_of(1)
        tensors = [*seats.canvases.tensors().values(), *seats.cache.layer(0)[:2], passes.x, passes.inputs]
        if passes.prefixes:
            tensors += [passes.prefixes[0].blocks, passes.prefixes[0].order, passes.prefixes[0].source]
        return [x.data_ptr() for x in tensors]

    session.add([asked[2], asked[2]])
    session.step(0.0)
    before, kind = addresses(), session._batch.kind
    for request in (asked[0], asked[4]):
        session.remove(0)
        session.add([request])
        session.step(0.0)
    assert addresses() == before
    assert session._batch.kind.shared == kind.shared and session._batch.kind.steps.guided


def test_two_jobs_whose_rows_wait_for_each_other_end(device):
    """As two streams that are zipped do: no lock is held while a row is handed out."""
    _, engine = both(SMALL, device, 7)
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    found: dict[int, torch.Tensor] = {}

    def work(mine):
        def on_row(images, row, tokens):
            assert turns[mine].acquire(timeout=WAIT)
            turns[1 - mine].release()

        asked = requests(SMALL, empty(SMALL, 1), Drawing(seed=mine))
        found[mine] = fill(engine, asked, on_row=on_row, window=1).tokens

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    for seed in range(2):
        asked = requests(SMALL, empty(SMALL, 1), Drawing(seed=seed))
        assert torch.equal(found[seed], fill(engine, asked, window=1).tokens)


def test_nested_sessions_of_one_shape_leak_nothing(device):
    _, engine = both(SMALL, device, 8)
    asked = requests(SMALL, empty(SMALL, 1), Drawing(seed=1), stop=1)
    gc.collect()
    gc.disable()
    try:
        sessions = [engine.open(1, window=1) for _ in range(4)]
        seen = [weakref.ref(session._batch.seats.canvases) for session in sessions]
        for session in sessions:
            session.add(asked)
            session.step(0.0)
        for session in sessions:
            session.close()
            session.close()
        del session, sessions
        assert sum(canvases() is not None for canvases in seen) == len(engine._pool._idle) == 2
        del engine
        assert all(canvases() is None for canvases in seen)
    finally:
        gc.enable()


def test_memory_is_free_as_soon_as_nobody_needs_it(device):
    """Without the garbage collector: a GPU that is full does not call it."""
    _, engine = both(SMALL, device, 19)
    tokens = random_tokens(SMALL, 1)
    tokens[:, -1] = -1
    gc.collect()
    gc.disable()
    try:
        fill(engine, requests(SMALL, tokens, Drawing()), window=2, draft=engine)
        batch, draft = engine._pool._idle[0]
        parts = [
            batch,
            draft,
            *(part for each in (batch, draft.batch) for part in (each.seats.cache, *each.passes.values())),
        ]
        kept = [weakref.ref(part) for part in parts]
        del batch, draft, parts
        engine._pool._idle.clear()
        assert [ref() for ref in kept] == [None] * len(kept) and len(kept) == 6
        run, engine = engine.prepared_pass(n=1, position=2), weakref.ref(engine)
        run()
        del run
        assert engine() is None
    finally:
        gc.enable()


def test_an_error_in_a_callback_leaves_the_engine_usable(device):
    reference, engine = both(SMALL, device, 9)
    asked = requests(SMALL, empty(SMALL, 2), Drawing(seed=1))

    def fail(images, row, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(engine, asked, on_row=fail)
    assert torch.equal(fill(engine, asked).tokens, fill(reference, asked).tokens)
    assert len(engine._pool._idle) == 1


def test_guesses_that_lead_to_no_finite_logits_do_no_harm(device):
    """A draft that always guesses the one token whose embedding is infinite, and which the model never draws."""
    spec, weights = image_gpt.spec(SMALL), image_gpt.canonical(SMALL, random_weights(SMALL, seed=21))
    weights = {name: x.clone() for name, x in weights.items()}
    weights["head.weight"][6] = 0
    stubborn = {name: torch.zeros_like(x) for name, x in weights.items()}
    stubborn["norm"], stubborn["positions"] = torch.ones_like(weights["norm"]), torch.ones_like(weights["positions"])
    stubborn["head.weight"][6] = 1
    reference = ReferenceEngine(spec, weights)
    engine, draft = (TritonEngine(spec, each, device=device, dtype=torch.float32) for each in (weights, stubborn))
    # Engines refuse such weights, so they come later.
    reference.weights["token.embedding"][6, 0] = engine.model.head.wte[6, 0] = float("inf")
    asked = requests(SMALL, empty(SMALL, 1), Drawing(temperature=0.0))
    filled = fill(engine, asked, window=3, draft=draft)
    assert torch.equal(filled.tokens, fill(reference, asked).tokens) and filled.pass_starts.all()
    spoilt = empty(SMALL, 2)
    spoilt[1, 1] = 6
    session = engine.open(2, window=1)
    slots = session.add(requests(SMALL, spoilt, Drawing(temperature=0.0)))
    for _ in range(2):  # until it is removed
        with pytest.raises(CheckpointError, match="not finite"):
            finish(session, {slots[1]: SMALL.n_pixels})
    session.remove(slots[1])
    finish(session, {slots[0]: SMALL.n_pixels})
    assert torch.equal(session.read(slots[:1]).tokens, filled.tokens[:1])
