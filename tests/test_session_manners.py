"""What engines promise about sessions beyond their tokens: callbacks, errors, numbers that are not finite, defaults."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from canvases import N, alone, finish, mixed_requests
from conftest import PROMPTED, SMALLER, TINY, engine, exact, random_tokens, random_weights, requests

from fastigpt import CheckpointError
from fastigpt.engine import Engine, Session, loop
from fastigpt.engine.window import WIDTHS
from fastigpt.job import Request
from fastigpt.sampling import Drawing


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
