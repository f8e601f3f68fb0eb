"""Sessions, on every engine: a canvas is the same whatever shares its session, whenever it came, wherever it lies."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from canvases import N, alone, draw_until_stopped, finish, finish_from, mixed_requests
from conftest import PROMPTED, SMALLER, engine, exact, fill, random_tokens, random_weights, requests

from fastigpt.engine import loop
from fastigpt.sampling import Drawing, guide

# --- independence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, "auto"])
def test_canvases_that_join_and_leave_at_random_equal_the_same_canvas_drawn_alone(tested, truth, window):
    rng = random.Random(7)
    wanted = mixed_requests(tested, 24, seed=1)
    expected = [alone(truth, request).tokens[0] for request in wanted]
    waiting, running, seen = list(range(len(wanted))), {}, 0
    with closing(tested.open(5, window=window)) as session:
        while waiting or running:
            joining = waiting[: rng.randrange(5 - len(running) + 1)] or ([] if running else waiting[:1])
            running |= dict(zip(session.add([wanted[image] for image in joining]), joining))
            waiting = waiting[len(joining) :]
            decided = {advance.slot: advance.decided for advance in session.step(0.0)}
            assert decided.keys() >= running.keys()
            for slot, image in list(running.items()):
                filled = session.read([slot])
                given, found = wanted[image].tokens, filled.tokens[0]
                assert torch.equal(found[given >= 0], given[given >= 0])
                assert torch.equal(found[: decided[slot]], expected[image][: decided[slot]]), image
                if decided[slot] == N:
                    assert torch.equal(found, expected[image])
                    seen += 1
                elif rng.random() < 0.05 and image % 3:  # abandoned, and drawn anew later
                    waiting.append(image)
                else:
                    continue
                session.remove(slot)
                del running[slot]
    assert seen == len(wanted)


def test_tokens_do_not_depend_on_the_capacity(tested, truth):
    wanted = mixed_requests(tested, 6, seed=2)
    expected = torch.cat([alone(truth, request).tokens for request in wanted])
    for capacity in (1, 2, 6, 9):
        filled, batch = loop.run(tested, wanted, batch_size=capacity)
        assert torch.equal(filled.tokens, expected) and batch == min(capacity, 6)
    with closing(tested.open(40)) as session:  # more slots than canvases
        assert torch.equal(finish(session, session.add(wanted)).tokens, expected)


def test_equal_requests_of_one_call_share_what_they_read_and_differ_by_their_index(tested, truth):
    tokens = random_tokens(PROMPTED, 1).repeat(4, 1)
    tokens[:, 6:] = -1
    drawing = Drawing(seed=3, guidance_scale=2.0)
    wanted = requests(tested, tokens, drawing, prompt=torch.tensor([[1, 2, 3]] * 4), first_index=5)
    with closing(tested.open(4, window=2)) as session:
        found = finish(session, session.add(wanted)).tokens
    assert torch.equal(found, torch.cat([alone(truth, request).tokens for request in wanted]))
    assert len(torch.unique(found, dim=0)) == 4


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_prefixes_of_any_length_end_at_the_same_position(tested, truth, length):
    """They share a batch with others, and as negative prefixes too."""
    start = tested.spec.unconditional
    assert tested.spec.prefix_length == 4
    prefix = (1, 2, 3, *start)[-length:]
    given = requests(tested, torch.full((3, N), -1), Drawing(seed=4), prompt=torch.tensor([[0, 4, 1]] * 3))
    wanted = [
        given[0],
        replace(given[1], prefix=prefix),
        replace(given[2], negative=prefix, drawing=Drawing(seed=4, guidance_scale=1.7)),
    ]
    with closing(tested.open(3, window=3)) as session:
        found = finish(session, session.add(wanted)).tokens
    assert torch.equal(found, torch.cat([alone(truth, request).tokens for request in wanted]))


def test_a_prefix_of_any_length_gives_the_references_logits(tested, truth):
    tokens = random_tokens(PROMPTED, 2)
    for length in (1, 2, 4):
        prefix = torch.tensor([[1, 2, 3, 5], [4, 4, 0, 5]])[:, -length:]
        assert (tested.logits(tokens, prefix) - truth.logits(tokens, prefix)).abs().max() <= 1e-4
        for layer in range(PROMPTED.n_layer + 1):
            difference = tested.hidden(tokens, layer, prefix) - truth.hidden(tokens, layer, prefix)
            assert difference.abs().max() <= 1e-4


# --- slots -------------------------------------------------------------------------------------------------------


def test_more_canvases_than_free_slots_are_refused_and_change_nothing(tested):
    wanted = mixed_requests(tested, 4, seed=3)
    with closing(tested.open(3)) as session:
        with pytest.raises(ValueError, match="4 canvases for 3 free slots"):
            session.add(wanted)
        slots = session.add(wanted[:2])
        assert session.add([]) == []
        with pytest.raises(ValueError, match="2 canvases for 1 free slots"):
            session.add(wanted[2:])
        with pytest.raises(ValueError, match="free slots"):
            session.fork(slots[0], [1, 2, 3])
        slots += session.add(wanted[2:3])
        assert sorted(slots) == [0, 1, 2]
        found = finish(session, slots).tokens
    assert torch.equal(found, loop.run(tested, wanted[:3])[0].tokens)


def test_a_slot_is_free_as_soon_as_its_canvas_is_removed_finished_or_not(tested):
    wanted = mixed_requests(tested, 12, seed=4)
    expected = loop.run(tested, wanted)[0].tokens
    with closing(tested.open(2, window=3)) as session:
        (kept,) = session.add(wanted[:1])
        for request, tokens in zip(wanted[1:], expected[1:]):
            (slot,) = session.add([request])
            session.step(0.0)
            session.remove(slot)  # in the middle
            (slot,) = session.add([request])
            assert torch.equal(finish(session, [slot]).tokens[0], tokens)
            session.remove(slot)
        assert torch.equal(finish(session, [kept]).tokens[0], expected[0])


def test_unfinished_canvases_can_be_read(tested, truth):
    (request,) = requests(tested, torch.full((1, N), -1), Drawing(seed=6))
    request.tokens[5], request.tokens[9] = 2, 7
    expected = alone(truth, request).tokens[0]
    with closing(tested.open(2, window=1)) as session:
        slots = session.add([replace(request, stop=8), replace(request, stop=3)])
        draw_until_stopped(session, {slots[0]: 8, slots[1]: 3})
        found = session.read(slots[::-1])
        for tokens, starts, stop in zip(found.tokens, found.pass_starts, (3, 8)):
            assert torch.equal(tokens[:stop], expected[:stop])
            rest = [request.tokens[p] for p in range(stop, N)]
            assert tokens[stop:].tolist() == rest  # −1, and the known ones
            assert not starts[stop:].any() and bool(starts[0])
        assert found.tokens.dtype == torch.int64 and found.pass_starts.dtype == torch.bool
        found.tokens[:] = 0  # what was read is the caller's
        assert torch.equal(finish_from(session, slots)[0], expected)


@pytest.mark.parametrize("window", [1, 4, "auto"])
def test_a_canvas_stops_and_goes_on_wherever_it_is_told(tested, truth, window):
    rng = random.Random(5)
    wanted = mixed_requests(tested, 6, seed=5)
    expected = torch.cat([alone(truth, request).tokens for request in wanted])
    stops = [sorted(rng.sample(range(N), 3)) for _ in wanted]
    with closing(tested.open(6, window=window)) as session:
        slots = session.add([replace(request, stop=stop[0]) for request, stop in zip(wanted, stops)])
        for turn in (1, 2, 3):
            at = {slot: stop[turn - 1] for slot, stop in zip(slots, stops)}
            draw_until_stopped(session, at)
            for slot, request, tokens in zip(slots, wanted, expected):
                found = session.read([slot]).tokens[0]
                assert torch.equal(found[: at[slot]], tokens[: at[slot]])
                assert torch.equal(found[at[slot] :], request.tokens[at[slot] :])
            for slot, stop in zip(slots, stops):
                session.resume(slot, stop[turn] if turn < 3 else N)
        assert torch.equal(finish(session, slots).tokens, expected)


def test_a_stop_before_the_first_unknown_token_waits_there(tested, truth):
    tokens = random_tokens(PROMPTED, 1)
    tokens[:, 10:] = -1
    (request,) = requests(tested, tokens, Drawing(seed=2))
    with closing(tested.open(1)) as session:
        (slot,) = session.add([replace(request, stop=4)])
        (advance,) = session.step(0.0)
        assert advance.slot == slot and advance.decided >= 4
        assert torch.equal(session.read([slot]).tokens, tokens)
        session.resume(slot, N)
        assert torch.equal(finish(session, [slot]).tokens, alone(truth, request).tokens)


# --- fork --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("at", [0, 5, 15])
def test_forks_have_the_past_of_their_canvas_and_futures_of_their_own(tested, truth, at, guidance):
    tokens = torch.full((2, N), -1)
    tokens[:, 7] = 3
    drawing = Drawing(seed=8, guidance_scale=guidance)
    wanted = requests(tested, tokens, drawing, prompt=torch.tensor([[1, 2, 0], [3, 0, 0]]))
    indices = [40, 41, 42]
    past = loop.run(truth, [replace(wanted[0], stop=at)])[0].tokens
    futures = [replace(wanted[0], tokens=past[0], index=index) for index in indices]
    expected = torch.cat([alone(truth, request).tokens for request in futures])
    with closing(tested.open(4, window=3)) as session:
        first, other = session.add([replace(wanted[0], stop=at), wanted[1]])
        draw_until_stopped(session, {first: at})
        slots = session.fork(first, indices)
        assert slots[0] == first and len({*slots, other}) == 4
        assert torch.equal(session.read(slots).tokens, past.expand(3, -1))
        assert torch.equal(finish_from(session, slots), expected)
        assert torch.equal(finish(session, [other]).tokens, alone(truth, wanted[1]).tokens)


def test_a_fork_takes_the_log_likelihood_and_the_passes_along(tested):
    tokens = random_tokens(PROMPTED, 1)
    tokens[:, [1, 6]] = -1
    (request,) = requests(tested, tokens, Drawing(seed=8), stop=5, score=True)
    with closing(tested.open(3, window=1)) as session:
        (slot,) = session.add([request])
        draw_until_stopped(session, {slot: 5})
        before = session.read([slot])
        after = session.read(session.fork(slot, [1, 2, 3]))
        for column in ("tokens", "pass_starts", "log_likelihood"):
            assert torch.equal(getattr(after, column), getattr(before, column).expand_as(getattr(after, column)))
        assert before.log_likelihood[0] < 0 and before.pass_starts.any()


# --- log-likelihood ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("guidance", [None, 1.8])
def test_the_log_likelihood_is_that_of_the_known_tokens_behind_the_first_unknown_one(tested, truth, guidance, window):
    """Under the model's own distribution, whatever the temperature and the filters that draw the others."""
    tokens = random_tokens(PROMPTED, 3, seed=4)
    tokens[:, [2, 3, 8]] = -1
    tokens[1, -1] = -1
    tokens[2, :] = random_tokens(PROMPTED, 1)  # nothing unknown: nothing to score
    prompt = torch.tensor([[1, 2, 0]] * 3)
    drawing = Drawing(seed=5, temperature=0.7, top_k=3, guidance_scale=guidance)
    wanted = requests(tested, tokens, drawing, prompt=prompt, score=True)
    plain = requests(tested, tokens, drawing, prompt=prompt)
    with closing(tested.open(4, window=window)) as session:
        slots = session.add([replace(request, stop=10) for request in wanted] + [plain[0]])
        draw_until_stopped(session, dict.fromkeys(slots[:3], 10))
        part = session.read(slots).log_likelihood
        for slot in slots[:3]:
            session.resume(slot, N)
        found = finish(session, slots)
        session.remove(slots[1])
        slots[1:2] = session.add(wanted[1:2])
        again = finish(session, slots).log_likelihood
    assert torch.allclose(again, found.log_likelihood, atol=1e-5, rtol=0)
    assert torch.equal(found.tokens[:3], torch.cat([alone(truth, request).tokens for request in plain]))
    unconditional = torch.tensor([truth.spec.unconditional]).expand(3, -1)
    prefix = torch.tensor([request.prefix for request in wanted])
    logits = truth.logits(found.tokens[:3], prefix)
    if guidance is not None:
        logits = guide(logits, truth.logits(found.tokens[:3], unconditional), guidance)
    nats = logits.double().log_softmax(-1).gather(2, found.tokens[:3, :, None])[..., 0]
    behind = (tokens >= 0) & ((tokens < 0).cumsum(1) > 0)
    assert found.log_likelihood.dtype == torch.float64
    assert torch.allclose(found.log_likelihood[:3], (nats * behind).sum(1), atol=1e-4, rtol=0)
    assert torch.allclose(part[:3], (nats * behind)[:, :10].sum(1), atol=1e-4, rtol=0)
    assert found.log_likelihood[2] == 0 and found.log_likelihood[3] == 0 and part[3] == 0
    assert (found.log_likelihood[:2] < -1).all()


# --- drafts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readable", [False, True])
def test_a_draft_guesses_for_canvases_that_join_leave_fork_and_stop(backend, truth, readable):
    tested, config = exact(backend), PROMPTED if readable else SMALLER
    draft = tested if readable else exact(backend, config, seed=5)
    wanted = mixed_requests(tested, 8, seed=6)
    expected = [alone(truth, request).tokens[0] for request in wanted]
    with closing(tested.open(3, window=4, draft=draft)) as session:
        first = session.add([replace(wanted[0], stop=6), wanted[1]])
        draw_until_stopped(session, {first[0]: 6})
        forked = session.fork(first[0], [wanted[0].index, 99])
        assert torch.equal(finish_from(session, forked)[0], expected[0])
        for slot in forked:
            session.remove(slot)
        for a, b in ((2, 3), (4, 5), (6, 7)):
            slots = session.add([wanted[a], wanted[b]])
            assert torch.equal(finish(session, slots).tokens, torch.stack([expected[a], expected[b]]))
            for slot in slots:
                session.remove(slot)
        assert torch.equal(finish(session, first[1:]).tokens[0], expected[1])


def test_a_draft_of_another_backend_is_refused(backend, truth):
    with pytest.raises(ValueError, match="reference"):
        exact(backend).open(1, draft=truth)


@pytest.mark.parametrize("window", [0, -1, True, 2.0, "wide", None])
def test_impossible_windows_are_refused(tested, window):
    with pytest.raises((TypeError, ValueError), match="window"):
        tested.open(1, window=window)


def test_a_window_beyond_the_canvas_is_the_canvas(tested, truth):
    tokens = torch.full((2, N), -1)
    found = fill(tested, tokens, Drawing(seed=3), window=10**8)
    assert torch.equal(found.tokens, fill(truth, tokens, Drawing(seed=3)).tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("portable", "float32")])
def test_a_thousand_requests_that_join_and_leave_get_what_they_get_alone(backend, dtype):
    """Mixed seeds, temperatures, filters, prompts and guidance, on an engine's own arithmetic."""
    tested = engine(backend, PROMPTED, random_weights(PROMPTED, 31), dtype=dtype, kv_dtype=dtype)
    count = 1000 if backend == "cpu" else 200
    rng, wanted = random.Random(3), mixed_requests(tested, count, seed=4)
    waiting, running, found = list(range(count)), {}, {}
    with closing(tested.open(40)) as session:
        while waiting or running:
            joining = waiting[: rng.randrange(40 - len(running) + 1)] or ([] if running else waiting[:1])
            running |= dict(zip(session.add([wanted[image] for image in joining]), joining))
            waiting = waiting[len(joining) :]
            decided = {advance.slot: advance.decided for advance in session.step(0.0)}
            done = [slot for slot in running if decided[slot] == N]
            for slot in done:
                found[running.pop(slot)] = session.read([slot]).tokens[0]
                session.remove(slot)
    for image, request in enumerate(wanted):
        assert torch.equal(found[image], alone(tested, request).tokens[0]), image
