"""Sessions, on every engine: a canvas is the same whatever shares its session, whenever it came, wherever it lies."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from conftest import CACHED, PROMPTED, TINY, engine, fill, random_tokens, random_weights, requests

from fastigpt import CheckpointError, ImageGPTConfig
from fastigpt.engine import Engine, Session, loop
from fastigpt.engine.window import WIDTHS
from fastigpt.job import Filled, Request
from fastigpt.sampling import Drawing, guide

N = PROMPTED.n_pixels
SMALLER = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=4, width=4, n_colors=9)


@pytest.fixture(params=["reference", *CACHED])
def tested(request: pytest.FixtureRequest) -> Engine:
    return exact(request.param)


def exact(backend: str, config: ImageGPTConfig = PROMPTED, seed: int = 31) -> Engine:
    return engine(backend, config, random_weights(config, seed), dtype="float32", kv_dtype="float32")


@pytest.fixture(scope="module")
def truth() -> Engine:
    return exact("reference")


def mixed_requests(tested: Engine, count: int, seed: int = 0) -> list[Request]:
    """Canvases that differ in all that a request can: mask, seed, index, temperature, filters, prompt, guidance."""
    rng = random.Random(seed)
    tokens = random_tokens(PROMPTED, count, seed)
    found = []
    for i in range(count):
        canvas = tokens[i].clone()
        share = rng.choice([0.3, 0.7, 1.0])
        canvas[[p for p in range(N) if rng.random() < share]] = -1
        if rng.random() < 0.3:
            canvas[: rng.randrange(N)] = tokens[0, 0]
        scale = rng.choice([None, None, 0.0, 1.5, 3.0])
        drawing = Drawing(
            seed=rng.choice([0, 1, 2**63, 2**64 - 1]),
            temperature=rng.choice([0.0, 0.6, 1.0, 1.4]),
            top_k=rng.choice([None, None, 1, 4, 100]),
            top_p=rng.choice([None, None, 0.5, 0.9]),
            guidance_scale=scale,
        )
        words = [rng.randrange(PROMPTED.n_words) for _ in range(PROMPTED.prompt_length)]
        prompt = torch.tensor([words]) if rng.random() < 0.6 else None
        index = rng.choice([i, 2**40 + i, 2**63 - 1 - i])
        found += requests(tested, canvas[None], drawing, prompt=prompt, first_index=index)
    return found


def alone(tested: Engine, request: Request) -> Filled:
    return loop.run(tested, [request], batch_size=1, window=1)[0]


def finish(session: Session, slots: list[int]) -> Filled:
    loop.draw_until_stopped(session, dict.fromkeys(slots, N))
    return session.read(slots)


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
        loop.draw_until_stopped(session, {slots[0]: 8, slots[1]: 3})
        found = session.read(slots[::-1])
        for tokens, starts, stop in zip(found.tokens, found.pass_starts, (3, 8)):
            assert torch.equal(tokens[:stop], expected[:stop])
            rest = [request.tokens[p] for p in range(stop, N)]
            assert tokens[stop:].tolist() == rest  # −1, and the known ones
            assert not starts[stop:].any() and bool(starts[0])
        assert found.tokens.dtype == torch.int64 and found.pass_starts.dtype == torch.bool
        found.tokens[:] = 0  # what was read is the caller's
        assert torch.equal(finish_from(session, slots)[0], expected)


def finish_from(session: Session, slots: list[int]) -> torch.Tensor:
    for slot in slots:
        session.resume(slot, N)
    return finish(session, slots).tokens


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
            loop.draw_until_stopped(session, at)
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
        loop.draw_until_stopped(session, {first: at})
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
        loop.draw_until_stopped(session, {slot: 5})
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
        loop.draw_until_stopped(session, dict.fromkeys(slots[:3], 10))
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
        loop.draw_until_stopped(session, {first[0]: 6})
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
    with pytest.raises(ValueError, match="window"):
        tested.open(1, window=window)


def test_a_window_beyond_the_canvas_is_the_canvas(tested, truth):
    tokens = torch.full((2, N), -1)
    found = fill(tested, tokens, Drawing(seed=3), window=10**8)
    assert torch.equal(found.tokens, fill(truth, tokens, Drawing(seed=3)).tokens)


# --- the engine behind them --------------------------------------------------------------------------------------


def test_sessions_of_one_engine_can_be_used_in_turns(tested, truth):
    wanted = mixed_requests(tested, 6, seed=9)
    expected = torch.cat([alone(truth, request).tokens for request in wanted])
    sessions = [tested.open(2, window=2) for _ in range(3)]
    slots = [session.add(wanted[2 * i : 2 * i + 2]) for i, session in enumerate(sessions)]
    for _ in range(3):
        for session in sessions:
            session.step(0.0)
    sessions[1].close()
    for i in (2, 0):
        assert torch.equal(finish(sessions[i], slots[i]).tokens, expected[2 * i : 2 * i + 2])
        sessions[i].close()


def test_a_callback_may_draw_from_the_engine_it_watches(tested, truth):
    """Sessions of the same shape inside one another, three deep."""
    wanted = requests(tested, torch.full((2, N), -1), Drawing(seed=3), first_index=10)
    expected, inner = loop.run(truth, wanted)[0].tokens, []

    def draw_again(depth: int) -> torch.Tensor:
        def on_row(images: range, row: int, tokens: torch.Tensor) -> None:
            if row == 1 and depth > 0:
                inner.append(draw_again(depth - 1))

        return loop.run(tested, wanted, on_row=on_row)[0].tokens

    assert torch.equal(draw_again(2), expected)
    assert len(inner) == 2 and all(torch.equal(tokens, expected) for tokens in inner)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_a_callback_that_raises_leaves_the_engine_usable(tested, error):
    wanted = mixed_requests(tested, 5, seed=10)
    expected = loop.run(tested, wanted)[0].tokens

    def fail(*_: object) -> None:
        raise error

    for callback in ({"on_row": fail}, {"on_done": fail}):
        with pytest.raises(error):
            loop.run(tested, wanted, batch_size=2, **callback)
    assert torch.equal(loop.run(tested, wanted, batch_size=2)[0].tokens, expected)


def test_a_slot_that_falls_free_takes_the_next_canvas(tested, truth):
    """Canvases that need few tokens leave early; what waits takes their slots while the others are being drawn."""
    tokens = random_tokens(PROMPTED, 7)
    tokens[0], tokens[1:, -1] = -1, -1
    wanted = requests(tested, tokens, Drawing(seed=2))
    added: list[int] = []

    class Counting:
        def __init__(self, session: Session) -> None:
            self.session = session

        def __getattr__(self, name: str) -> object:
            return getattr(self.session, name)

        def add(self, some: list[Request]) -> list[int]:
            added.append(len(some))
            return self.session.add(some)

        def step(self, seconds: float) -> object:
            return self.session.step(0.0)

    class Engine:
        spec = tested.spec

        def open(self, capacity: int, **options: object) -> Counting:
            return Counting(tested.open(capacity, **options))

    done: list[int] = []
    filled, batch = loop.run(Engine(), wanted, batch_size=2, window=1, on_done=done.append)
    assert torch.equal(filled.tokens, loop.run(truth, wanted)[0].tokens)
    assert batch == 2 and sum(done) == 7
    assert added == [2, 1, 1, 1, 1, 1]


def test_rows_of_a_job_in_several_turns_come_once_each_and_final(tested):
    wanted = mixed_requests(tested, 7, seed=11)
    rows: dict[tuple[int, int], torch.Tensor] = {}

    def on_row(images: range, row: int, tokens: torch.Tensor) -> None:
        for image, line in zip(images, tokens, strict=True):
            assert (image, row) not in rows and (row == 0 or (image, row - 1) in rows)
            rows[image, row] = line.clone()

    filled, _ = loop.run(tested, wanted, batch_size=3, window=3, on_row=on_row)
    assert rows.keys() == {(image, row) for image in range(7) for row in range(4)}
    for image, canvas in enumerate(filled.tokens):
        assert torch.equal(torch.cat([rows[image, row] for row in range(4)]), canvas)


# --- numbers that are not finite ---------------------------------------------------------------------------------


def overflowing(backend: str) -> Engine:
    """A model in which token 8 at position 5 is infinite, and everything else is as always."""
    weights = random_weights(TINY, 12)
    weights["transformer.wte.weight"][8, 0] = weights["transformer.wpe.weight"][6, 0] = 3e38
    weights["lm_head.weight"][8] = 0
    return engine(backend, TINY, weights, dtype="float32", kv_dtype="float32")


EMPTY = torch.full((1, 16), -1)


def with_known(*tokens: int) -> torch.Tensor:
    canvas = EMPTY.clone()
    canvas[0, : len(tokens)] = torch.tensor(tokens)
    return canvas


@pytest.mark.parametrize("removed", [False, True])
def test_logits_that_are_not_finite_raise_and_spoil_no_slot(tested, removed):
    """removed: before anything noticed."""
    broken, drawing = overflowing(tested.name), Drawing(temperature=0.0)
    ahead, spoilt, empty = (
        requests(broken, tokens, drawing)[0]
        for tokens in (with_known(1, 2, 3, 4, 5, 6, 7), with_known(1, 2, 3, 4, 5, 8, 7), EMPTY)
    )
    with closing(broken.open(2, window=4)) as session:
        slots = session.add([ahead]) + session.add([spoilt])
        for _ in range(0 if removed else 2):
            with pytest.raises(CheckpointError, match="not finite"):
                finish(session, slots)
        session.remove(slots[1])
        slots[1:] = session.add([empty])
        found = finish(session, slots).tokens
    assert torch.equal(found, torch.cat([alone(broken, request).tokens for request in (ahead, empty)]))


def test_guesses_that_lead_to_no_finite_logits_do_no_harm(tested):
    """A window's first guess is the token to the left: here the one that overflows at the next position."""
    broken, drawing = overflowing(tested.name), Drawing(temperature=0.0)
    ahead, guessing, empty = (
        requests(broken, tokens, drawing)[0]
        for tokens in (with_known(1, 2, 3, 4, 5, 6, 7), with_known(1, 2, 3, 4, 8), EMPTY)
    )
    expected = [alone(broken, request).tokens[0] for request in (ahead, guessing, empty)]
    assert expected[1][5] != 8
    for window in (2, 4, 16, "auto"):
        with closing(broken.open(2, window=window)) as session:
            slots = session.add([ahead]) + session.add([guessing])
            session.step(0.0)
            session.remove(slots[1])
            slots[1:] = session.add([empty])
            assert torch.equal(finish(session, slots).tokens, torch.stack([expected[0], expected[2]]))
            session.remove(slots[1])
            slots[1:] = session.add([guessing])
            assert torch.equal(finish(session, slots).tokens, torch.stack(expected[:2]))


def test_what_an_engine_found_out_about_windows_outlives_a_session():
    tested = exact("portable")
    with closing(tested.open(3)) as session:
        for width in WIDTHS * 3:
            session.tuner.record(width, seconds=1.0 if width == 4 else 100.0, kept=1.0)
    with closing(tested.open(3)) as session:
        assert session.tuner.width() == 4
    for other in (tested.open(2), tested.open(3, draft=exact("portable", SMALLER))):  # other costs, other guesses
        with closing(other) as session:
            assert session.tuner.width() == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torchs_default_device_and_dtype_change_nothing(tested, device):
    wanted = mixed_requests(tested, 3, seed=12)
    scored, tokens = [replace(request, score=True) for request in wanted], random_tokens(PROMPTED, 2)
    expected = [loop.run(tested, some, batch_size=2)[0] for some in (wanted, scored)]
    logits, hidden = tested.logits(tokens), tested.hidden(tokens, 1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            found = [loop.run(tested, some, batch_size=2)[0] for some in (wanted, scored)]
            again = tested.logits(tokens), tested.hidden(tokens, 1)
            tested.prepared_pass(n=2, position=3, window=2)()
    finally:
        torch.set_default_dtype(torch.float32)
    for before, after in zip(expected, found):
        assert torch.equal(before.tokens, after.tokens)
        assert torch.allclose(before.log_likelihood, after.log_likelihood, atol=1e-9)
    assert torch.equal(again[0], logits) and torch.equal(again[1], hidden)
