"""Nobody's picture depends on who else is there: random requests at once, each held to what it gets alone."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import openai
import pytest
from live import Live, live, pixels, png
from served_models import tiny_model

PROMPTS = ("", "a red house", "blue", "a tree", "red blue tree")


def request(rng: random.Random) -> tuple[dict[str, Any], np.ndarray | None, np.ndarray | None]:
    """Parameters, and of an edit the photograph and what to draw anew in it."""
    prompt = rng.choice(PROMPTS)
    extra: dict[str, Any] = {"seed": rng.choice([0, 1, 2**53, 2**64 - 1]), "first_index": rng.choice([0, 3, 2**40])}
    for name, values in (("temperature", (0, 0.7, 1.3)), ("top_k", (1, 5)), ("top_p", (0.5, 0.9))):
        if rng.random() < 0.3:
            extra[name] = rng.choice(values)
    if prompt and rng.random() < 0.5:
        extra["guidance_scale"] = rng.choice([0, 1.5, 4])
    asked = {"prompt": prompt, "n": rng.choice([1, 1, 1, 2, 5]), "extra_body": extra}
    if rng.random() < 0.6:
        return asked, None, None
    noise = np.random.default_rng(rng.randrange(2**32))
    return asked, noise.integers(0, 256, (12, 8, 3), np.uint8), noise.random((12, 8)) < rng.choice([0.1, 0.5, 0.9])


def alone(server: Live, asked: dict[str, Any], photo: np.ndarray | None, hole: np.ndarray | None) -> np.ndarray:
    how = {**asked["extra_body"], "prompt": asked["prompt"] or None, "output_type": "np"}
    if photo is None:
        return server.model.sample(asked["n"], **how)
    return server.model.complete(photo, asked["n"], mask=hole, **how)


async def once(
    server: Live, client: openai.AsyncOpenAI, rng: random.Random, wanted: tuple[Any, ...], expected: np.ndarray
) -> str:
    """Asks in one way or another; "same", or "left"."""
    asked, photo, hole = wanted
    call: Any = client.images.generate
    if photo is not None:
        call = client.images.edit
        alpha = np.where(hole, 0, 255).astype(np.uint8)
        asked = {**asked, "image": png(photo), "mask": png(np.dstack([photo, alpha]))}
    await asyncio.sleep(0)
    manner = rng.choice(["whole", "whole", "stream", "leave"])
    if manner == "whole":
        answer = await call(**asked)
        assert np.array_equal([pixels(image.b64_json) for image in answer.data], expected)
        return "same"
    stream = await call(**asked, stream=True, partial_images=rng.randrange(4))
    if manner == "leave":
        async for _ in stream:
            break
        await stream.close()
        return "left"
    finished = [event.b64_json async for event in stream if event.type.endswith(".completed")]
    assert np.array_equal([pixels(picture) for picture in finished], expected)
    return "same"


def check(count: int, seed: int) -> None:
    rng = random.Random(seed)
    with live(tiny_model(), capacity=7, max_queue=5 * count) as server:
        wanted = [request(rng) for _ in range(count)]
        expected = [alone(server, *one) for one in wanted]

        async def work() -> list[str]:
            async with server.asynchronous(timeout=300) as client:
                return await asyncio.gather(
                    *(once(server, client, random.Random(i), *both) for i, both in enumerate(zip(wanted, expected)))
                )

        found = asyncio.run(work())
        assert found.count("same") > count / 2 and found.count("left") > count / 10
        assert server.batch.counts.failures == 0


def test_60_requests_at_once_get_what_they_get_alone():
    check(60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_200_requests_at_once_get_what_they_get_alone(seed):
    check(200, seed)
