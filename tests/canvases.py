"""Canvases of every kind for the tests of sessions, and how they are drawn."""

from __future__ import annotations

import random

import torch
from conftest import PROMPTED, random_tokens, requests

from fastigpt.engine import Engine, Session, loop
from fastigpt.job import Filled, Request
from fastigpt.sampling import Drawing

N = PROMPTED.n_pixels


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


def draw_until_stopped(session: Session, stops: dict[int, int]) -> None:
    """Draws until every slot of `stops` has come as far as it says there."""
    while True:
        decided = {advance.slot: advance.decided for advance in session.step(loop.SLICE)}
        if all(decided[slot] >= stop for slot, stop in stops.items()):
            return


def finish(session: Session, slots: list[int]) -> Filled:
    draw_until_stopped(session, dict.fromkeys(slots, N))
    return session.read(slots)


def finish_from(session: Session, slots: list[int]) -> torch.Tensor:
    for slot in slots:
        session.resume(slot, N)
    return finish(session, slots).tokens
