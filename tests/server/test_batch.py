"""The running batch: everybody gets what they would get alone, in turns, and whoever leaves, leaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from served_models import CONFIG, EMPTY, Gate, N, tiny_model

from fastigpt import ImageGPT
from fastigpt.job import Request
from fastigpt.server.batch import Batch, Draining, QueueFull
from fastigpt.server.ticket import Done, Event, Failed, Rows, Ticket, TimeLimit


@contextmanager
def running(model: ImageGPT, **options: Any) -> Iterator[Batch]:
    batch = Batch(model, **options)
    batch.start()
    try:
        yield batch
    finally:
        if isinstance(model.engine, Gate):
            model.engine.let_all()
        assert batch.drain(60)
        assert batch.running == batch.waiting == 0


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work(), 300)

    return asyncio.run(bounded())


async def all_events(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket.events()]


async def drawn(ticket: Ticket) -> torch.Tensor:
    """int64 [n, N]: the images of a ticket."""
    found = {event.image: event.tokens async for event in ticket.events() if isinstance(event, Done)}
    return torch.stack([found[i] for i in range(len(ticket.requests))])


def mixed(rng: random.Random) -> tuple[torch.Tensor, dict[str, Any]]:
    """Canvases and options of a request of any kind."""
    canvas = torch.tensor([rng.randrange(CONFIG.n_colors) for _ in range(N)])
    canvas[[i for i in range(N) if rng.random() < rng.choice([0.2, 0.8, 1.0])]] = -1
    options: dict[str, Any] = {
        "seed": rng.choice([0, 7, 2**64 - 1]),
        "first_index": rng.choice([0, 5, 2**40]),
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "top_k": rng.choice([None, 3]),
        "top_p": rng.choice([None, 0.8]),
    }
    if rng.random() < 0.6:
        options["prompt"] = rng.choice(["red house", "blue", "a tree"])
        if rng.random() < 0.5:
            options["guidance_scale"] = rng.choice([0.0, 2.0])
            if rng.random() < 0.5:
                options["negative_prompt"] = "blue tree"
    return canvas.repeat(rng.choice([1, 1, 2, 5]), 1), options


def alone(model: ImageGPT, requests: list[Request]) -> torch.Tensor:
    from fastigpt.engine import loop

    return torch.cat([loop.run(model.engine, [request], batch_size=1, window=1)[0].tokens for request in requests])


def test_everybody_gets_the_tokens_they_get_alone(backend):
    model, rng = tiny_model(backend, dtype="float32"), random.Random(1)
    wanted = [
        model.requests(canvases, **options)
        for canvases, options in (mixed(rng) for _ in range(20 if backend == "cpu" else 5))
    ]
    expected = [alone(model, requests) for requests in wanted]

    async def work() -> None:
        async def one(i: int) -> None:
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            ticket = batch.submit(wanted[i], rows=i % 2 == 0)
            if i % 5 == 4:
                return ticket.cancel()
            assert torch.equal(await drawn(ticket), expected[i])

        await asyncio.gather(*(one(i) for i in range(len(wanted))))

    with running(model, capacity=5, max_queue=100) as batch:
        run(work)


def test_it_draws_what_the_library_draws():
    model = tiny_model()
    with running(model, capacity=3) as batch:
        options: dict[str, Any] = {"seed": 3, "first_index": 9, "prompt": "red house", "guidance_scale": 1.5}
        found = run(lambda: _submitted(batch, model.requests(EMPTY.repeat(4, 1), **options)))
    assert torch.equal(found, model.sample(4, output_type="tokens", **options))


async def _submitted(batch: Batch, requests: list[Request]) -> torch.Tensor:
    return await drawn(batch.submit(requests))


def test_rows_come_in_order_without_gaps_and_are_those_of_the_picture():
    model = tiny_model()
    canvases = EMPTY.repeat(3, 1)
    canvases[:, :9] = 5  # two rows and a bit are known
    with running(model, capacity=2) as batch:

        async def work() -> list[Event]:
            return await all_events(batch.submit(model.requests(canvases, seed=1), rows=True))

        events = run(work)
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    done = set()
    for event in events:
        assert not isinstance(event, Failed) and event.image not in done
        if isinstance(event, Rows):
            assert event.first_row == sum(len(part) for part in rows[event.image])
            rows[event.image].append(event.tokens)
        else:
            assert torch.equal(torch.cat(rows[event.image]).flatten(), event.tokens) and event.passes >= 1
            done.add(event.image)
    assert done == {0, 1, 2}


def test_whoever_comes_later_joins_those_who_are_there():
    """Two canvases are drawn side by side, and the second came when the first had begun."""
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        first = batch.submit(model.requests(EMPTY, seed=1), rows=True)
        gate.let(12)
        events = first.events()
        assert isinstance(await anext(events), Rows)
        second = batch.submit(model.requests(EMPTY, seed=2), rows=True)
        gate.let(8)
        theirs = second.events()
        assert isinstance(await anext(theirs), Rows) and batch.running == 2
        gate.let_all()
        async for _ in events:
            pass
        async for _ in theirs:
            pass

    with gate.closed(), running(model, capacity=2) as batch:
        run(work)


def test_requests_take_turns_in_slots():
    """One slot; a request for four images comes before a single one."""
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        first = batch.submit(model.requests(EMPTY, seed=0))
        many = batch.submit(model.requests(EMPTY.repeat(4, 1), seed=1))
        one = batch.submit(model.requests(EMPTY, seed=2))
        gate.let_all()
        await asyncio.gather(drawn(first), drawn(many), drawn(one))

    with gate.closed(), running(model, capacity=1) as batch:
        gate.added.clear()
        run(work)
    assert [request.drawing.seed for request in gate.added] == [0, 1, 2, 1, 1, 1]


def test_who_gives_up_frees_slots_and_queue():
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        leaving = batch.submit(model.requests(EMPTY.repeat(4, 1)), rows=True)
        staying = batch.submit(model.requests(EMPTY, seed=5))
        gate.let(8)
        assert isinstance(await anext(leaving.events()), Rows)
        assert (batch.running, batch.waiting) == (2, 3)
        leaving.cancel()
        leaving.cancel()
        assert not [event for event in await all_events(leaving) if isinstance(event, Done)]
        gate.let_all()
        assert torch.equal(await drawn(staying), model.sample(1, seed=5, output_type="tokens"))
        assert batch.counts.cancelled == 4 and batch.counts.images == 1
        assert (batch.running, batch.waiting) == (0, 0)

    with gate.closed(), running(model, capacity=2) as batch:
        run(work)


def test_a_full_queue_is_told_and_what_fits_is_taken():
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        tickets = [batch.submit(model.requests(EMPTY.repeat(3, 1)))]  # 2 slots and 1 that waits
        tickets.append(batch.submit(model.requests(EMPTY.repeat(3, 1))))
        with pytest.raises(QueueFull) as caught:
            batch.submit(model.requests(EMPTY))
        assert 1 <= caught.value.retry_after <= 60
        gate.let_all()
        for ticket in tickets:
            assert len(await drawn(ticket)) == 3
        assert len(await drawn(batch.submit(model.requests(EMPTY.repeat(6, 1))))) == 6

    with gate.closed(), running(model, capacity=2, max_queue=4) as batch:
        run(work)


def test_a_request_that_takes_too_long_fails_alone():
    model, now = tiny_model(), [0.0]
    gate = Gate(model)

    async def work() -> None:
        late = batch.submit(model.requests(EMPTY.repeat(3, 1)))
        now[0] = 6.0
        other = batch.submit(model.requests(EMPTY, seed=4))
        now[0] = 11.0
        gate.let_all()
        (event,) = [event for event in await all_events(late) if not isinstance(event, Done)]
        assert isinstance(event, Failed) and isinstance(event.error, TimeLimit)
        assert torch.equal(await drawn(other), model.sample(1, seed=4, output_type="tokens"))

    with gate.closed(), running(model, capacity=1, timeout=10, clock=lambda: now[0]) as batch:
        run(work)


def test_a_failure_fails_what_is_in_the_session_and_the_others_go_on():
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        inside = batch.submit(model.requests(EMPTY.repeat(3, 1)))  # one of its canvases still waits
        outside = batch.submit(model.requests(EMPTY, seed=8))
        later = batch.submit(model.requests(EMPTY, seed=9))
        gate.error = RuntimeError("the device is gone")
        gate.let_all()
        (event,) = await all_events(inside)
        assert isinstance(event, Failed) and "device is gone" in str(event.error)
        for ticket, seed in ((outside, 8), (later, 9)):
            events = await all_events(ticket)
            if not isinstance(events[0], Failed):  # it was in the second slot, or it came after
                assert torch.equal(events[0].tokens[None], model.sample(1, seed=seed, output_type="tokens"))
        assert batch.counts.failures == 1 and batch.open
        assert len(await drawn(batch.submit(model.requests(EMPTY)))) == 1

    with gate.closed(), running(model, capacity=2) as batch:
        run(work)


def test_an_engine_that_opens_no_session_fails_requests_and_is_asked_again():
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        opened = model.engine.open
        gate.error = RuntimeError("gone")
        first = batch.submit(model.requests(EMPTY))
        model.engine.open = lambda *_: (_ for _ in ()).throw(MemoryError("no room"))  # type: ignore[method-assign]
        gate.let_all()
        assert isinstance((await all_events(first))[0], Failed)
        (event,) = await all_events(batch.submit(model.requests(EMPTY)))
        assert isinstance(event, Failed) and isinstance(event.error, MemoryError)
        model.engine.open = opened  # type: ignore[method-assign]
        assert len(await drawn(batch.submit(model.requests(EMPTY)))) == 1

    with gate.closed(), running(model, capacity=2) as batch:
        run(work)


def test_draining_finishes_what_is_there_and_takes_no_more():
    model = tiny_model()
    gate = Gate(model)

    async def work() -> None:
        ticket = batch.submit(model.requests(EMPTY.repeat(5, 1), seed=6))
        assert not batch.drain(0)
        with pytest.raises(Draining):
            batch.submit(model.requests(EMPTY))
        gate.let_all()
        assert torch.equal(await drawn(ticket), model.sample(5, seed=6, output_type="tokens"))
        assert batch.drain(60) and not batch.open

    with gate.closed(), running(model, capacity=2) as batch:
        run(work)


def test_a_canvas_without_holes_comes_back_as_it_is():
    model = tiny_model()
    known = torch.arange(N)[None] % CONFIG.n_colors
    with running(model, capacity=2) as batch:
        assert torch.equal(run(lambda: _submitted(batch, model.requests(known))), known)


@pytest.mark.parametrize("numbers", [{"capacity": 0}, {"max_queue": -1}, {"timeout": 0}, {"timeout": float("nan")}])
def test_numbers_that_no_batch_can_have_are_refused(numbers):
    with pytest.raises(ValueError, match="needs at least 1 slot"):
        Batch(tiny_model(), **numbers)


def test_an_engine_that_cannot_draw_is_noticed_at_the_start():
    model = tiny_model()
    Gate(model).error = RuntimeError("no such instruction")
    with pytest.raises(RuntimeError, match="no such instruction"):
        Batch(model).start()


def test_requests_name_what_is_wrong_with_a_negative_prompt():
    model = tiny_model()
    with pytest.raises(ValueError, match="negative_prompt was given without guidance_scale"):
        model.requests(EMPTY, prompt="red", negative_prompt="blue")
