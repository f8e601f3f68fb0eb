"""POST /v1/images/generations with the official client, against a server that listens."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import torch
from live import Live, live, pixels, png, records
from PIL import Image
from served_models import Gate, tiny_model

from fastigpt.server.service import Drawn, Settings


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(tiny_model(), tiny_model(vocabulary=None), settings=Settings(aliases={"gpt-image-2": "tiny"})) as found:
        yield found


def test_the_pictures_are_those_of_sample(server):
    how = {"seed": 2**64 - 1, "temperature": 0.9, "top_k": 5, "top_p": 0.9, "guidance_scale": 1.5, "first_index": 7}
    answer = server.client().images.generate(prompt="A red house!", n=10, extra_body=how)
    expected = server.model.sample(10, prompt="a red house", output_type="np", **how)
    assert np.array_equal([pixels(image.b64_json) for image in answer.data], expected)
    assert answer.seed == 2**64 - 1 and [image.index for image in answer.data] == list(range(7, 17))
    assert (answer.size, answer.output_format, answer.background, answer.quality) == ("4x6", "png", "opaque", "auto")
    usage = answer.usage
    assert usage.input_tokens == usage.input_tokens_details.text_tokens == 3
    assert usage.output_tokens == usage.output_tokens_details.image_tokens == 240 and usage.total_tokens == 243
    assert answer._request_id.startswith("req_")


def test_a_negative_prompt_leads_away(server):
    how = {"seed": 1, "guidance_scale": 2.0, "negative_prompt": "a blue tree"}
    found = server.client().images.generate(prompt="a red house", extra_body=how)
    (request,) = server.model.requests(torch.full((1, 24), -1), prompt="a red house", **how)
    assert request.negative != server.model.engine.spec.unconditional
    from fastigpt.engine import loop

    tokens = loop.run(server.model.engine, [request])[0].tokens
    assert np.array_equal(pixels(found.data[0].b64_json), server.model.decode(tokens)[0])


def test_the_drawn_seed_is_told_and_draws_the_same_again(server):
    client = server.client()
    first, second = (client.images.generate(prompt="") for _ in range(2))
    assert first.seed != second.seed and max(first.seed, second.seed) < 2**53  # every reader of JSON keeps it
    again = client.images.generate(prompt=" ", extra_body={"seed": first.seed})
    assert again.data[0].b64_json == first.data[0].b64_json
    told = Image.open(io.BytesIO(base64.b64decode(first.data[0].b64_json))).info
    assert told["seed"] == str(first.seed) and told["index"] == "0" and told["model"] == "tiny"


def test_null_is_as_good_as_nothing(server):
    body = dict.fromkeys(("model", "n", "size", "stream", "seed", "temperature", "top_k", "quality", "unheard_of"))
    answer = server.post("/v1/images/generations", json={"prompt": "", **body})
    assert answer.status_code == 200 and "x-fastigpt-ignored" not in answer.headers


@pytest.mark.parametrize("size, scale", [("auto", 1), ("4x6", 1), ("8x12", 2), ("1364x2046", 341)])
def test_sizes_are_whole_multiples_without_interpolation(server, size, scale):
    answer = server.client().images.generate(prompt="", size=size, extra_body={"seed": 1})
    expected = server.model.sample(1, seed=1, output_type="np")[0].repeat(scale, 0).repeat(scale, 1)
    assert np.array_equal(pixels(answer.data[0].b64_json), expected)
    assert answer.size == f"{4 * scale}x{6 * scale}"


@pytest.mark.parametrize("size", ["1024x1024", "4x7", "8x6", "0x0", "1368x2052", "huge", "4x6x1", "-4x-6", "04x06 "])
def test_other_sizes_are_refused_and_those_that_work_named(server, size):
    with pytest.raises(openai.BadRequestError, match=r"draws 4x6.*up to 341 \(1364x2046\)") as caught:
        server.client().images.generate(prompt="", size=size)
    assert caught.value.param == "size" and caught.value.code == "invalid_value"


@pytest.mark.parametrize("format, compression", [("png", None), ("webp", 100), ("webp", 10), ("jpeg", 0), ("jpeg", 95)])
def test_formats(server, format, compression):
    how = {} if compression is None else {"output_compression": compression}
    answer = server.client().images.generate(
        prompt="", size="64x96", output_format=format, extra_body={"seed": 1}, **how
    )
    file = base64.b64decode(answer.data[0].b64_json)
    assert Image.open(io.BytesIO(file)).format == format.upper() and answer.output_format == format
    expected = server.model.sample(1, seed=1, output_type="np")[0].repeat(16, 0).repeat(16, 1)
    error = np.abs(pixels(answer.data[0].b64_json).astype(int) - expected).mean()
    assert error == 0 if format == "png" or (format, compression) == ("webp", 100) else error < 40


def test_models(server):
    client = server.client()
    first, second = client.models.list().data
    assert (first.id, second.id, first.owned_by, first.object) == ("tiny", "second", "fastigpt", "model")
    assert first.size == "4x6" and first.words == ["a", "red", "blue", "house", "tree"] and not first.moderated
    assert client.models.retrieve("tiny").id == client.models.retrieve("gpt-image-2").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is tiny, second"):
        client.models.retrieve("openai/imagegpt-small")


def test_the_first_model_draws_unless_another_is_named(server):
    client = server.client()
    pictures = [
        client.images.generate(prompt="a tree", extra_body={"seed": 1}, **how).data[0].b64_json
        for how in ({}, {"model": "tiny"}, {"model": "gpt-image-2"})
    ]
    assert pictures[0] == pictures[1] == pictures[2]
    assert client.images.generate(prompt="", model="second").data
    with pytest.raises(openai.BadRequestError, match="second reads no text: 'prompt' must be empty"):
        client.images.generate(prompt="a tree", model="second")
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="", model="dall-e-3")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_what_has_no_effect_is_told(server):
    raw = server.client().images.with_raw_response.generate(
        prompt="", quality="high", style="vivid", user="me", moderation="low", response_format="b64_json"
    )
    assert raw.headers["x-fastigpt-ignored"] == "moderation, quality, style, user"
    assert raw.parse().quality == "high"
    answer = server.post("/v1/images/generations", json={"prompt": "", "safety_identifier": "u1"})
    assert answer.json()["safety_identifier"] == "u1"


def test_a_stream_shows_the_real_rows_and_then_the_picture(server):
    how = {"seed": 4, "first_index": 2}
    events = list(server.client().images.generate(prompt="", stream=True, partial_images=2, n=3, extra_body=how))
    expected = server.model.sample(3, output_type="np", **how)
    assert [event.type.partition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"] * 3
    for image in range(3):
        first, second, last = events[3 * image : 3 * image + 3]
        assert (first.partial_image_index, second.partial_image_index) == (0, 1)
        assert np.array_equal(pixels(last.b64_json), expected[image])
        for event, rows in ((first, 2), (second, 4)):
            shown = expected[image].copy()
            shown[rows:] = 128
            assert np.array_equal(pixels(event.b64_json), shown)
        assert last.usage.output_tokens == 24 and last.seed == 4 and last.index == 2 + image and last.size == "4x6"


def test_a_stream_without_partial_images_is_one_event(server):
    (event,) = server.client().images.generate(prompt="a red house", stream=True, extra_body={"seed": 5})
    assert event.type == "image_generation.completed" and event.output_format == "png" and event.created_at > 0
    assert np.array_equal(
        pixels(event.b64_json), server.model.sample(1, prompt="a red house", seed=5, output_type="np")[0]
    )


def test_the_asynchronous_client(server):
    async def work() -> None:
        async with server.asynchronous() as client:
            answers = await asyncio.gather(
                *(client.images.generate(prompt="", extra_body={"seed": k}) for k in range(8))
            )
            for k, answer in enumerate(answers):
                assert np.array_equal(
                    pixels(answer.data[0].b64_json), server.model.sample(1, seed=k, output_type="np")[0]
                )
            stream = await client.images.generate(prompt="", stream=True, partial_images=1)
            assert [event.type async for event in stream][-1] == "image_generation.completed"

    asyncio.run(work())


def test_rows_are_sent_while_the_picture_is_being_drawn():
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        gate.let(13)  # of 24 passes
        events = iter(server.client().images.generate(prompt="", stream=True, partial_images=1))
        assert next(events).type == "image_generation.partial_image"
        assert server.batch.running == 1
        gate.let_all()
        assert next(events).type == "image_generation.completed" and not list(events)


def test_a_failure_in_the_middle_of_a_stream_is_an_event():
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        gate.let(13)
        events = iter(server.client().images.generate(prompt="", stream=True, partial_images=1))
        next(events)
        gate.error = RuntimeError("/secret/place: the device is gone")
        gate.let_all()
        with pytest.raises(openai.APIError, match="its log tells more") as caught:
            next(events)
        assert caught.value.code == "server_error" and "secret" not in str(caught.value)
        assert server.client().images.generate(prompt="").data


def test_a_full_queue_is_waited_for_by_the_client():
    """The official client hears 429 with Retry-After, waits, and gets its picture."""
    model = tiny_model()
    gate = Gate(model)
    with live(model, capacity=1, max_queue=0) as server, records() as log, gate.closed():

        async def work() -> None:
            async with server.asynchronous() as client, server.asynchronous(max_retries=5) as patient:
                first = asyncio.ensure_future(client.images.generate(prompt="", extra_body={"seed": 1}))
                await asyncio.to_thread(gate.stands.wait, 60)
                with pytest.raises(openai.RateLimitError) as caught:
                    await client.images.generate(prompt="")
                assert caught.value.code == "rate_limit_exceeded" and caught.value.type == "rate_limit_error"
                assert caught.value.response.headers["retry-after"] == "1"
                log.records.clear()
                second = asyncio.ensure_future(patient.images.generate(prompt="", extra_body={"seed": 2}))
                await asyncio.to_thread(log.wait, lambda record: getattr(record, "status", 0) == 429)
                gate.let_all()
                for k, answer in enumerate([await first, await second], 1):
                    expected = server.model.sample(1, seed=k, output_type="np")[0]
                    assert np.array_equal(pixels(answer.data[0].b64_json), expected)

        asyncio.run(work())


def test_the_bundled_model():
    import fastigpt

    with live(fastigpt.load()) as server:
        answer = server.client().images.generate(
            prompt="a red house on snow at night", size="1024x1024", n=2, extra_body={"seed": 3, "guidance_scale": 2.0}
        )
        expected = server.model.sample(
            2, prompt="a red house on snow at night", seed=3, guidance_scale=2.0, output_type="np"
        )
    assert np.array_equal([pixels(image.b64_json) for image in answer.data], expected.repeat(32, 1).repeat(32, 2))


def test_pictures_are_signed_by_whatever_the_operator_brings():
    """Finished ones and partial ones, each with what it was drawn from."""
    signed = []

    def sign(picture: bytes, format: str, drawn: Drawn) -> bytes:
        signed.append((format, drawn))
        return picture + b"signed"

    with live(settings=Settings(sign=sign)) as server:
        client, how = server.client(), {"seed": 5, "first_index": 8}
        answer = client.images.generate(prompt="", n=2, output_format="webp", extra_body=how)
        assert all(base64.b64decode(image.b64_json).endswith(b"signed") for image in answer.data)
        assert sorted(signed, key=lambda one: one[1].index) == [
            ("webp", Drawn("tiny", 5, 8)),
            ("webp", Drawn("tiny", 5, 9)),
        ]
        signed.clear()
        events = list(client.images.generate(prompt="", stream=True, partial_images=1, extra_body=how))
        assert [base64.b64decode(event.b64_json).endswith(b"signed") for event in events] == [True, True]
        photo = png(np.zeros((6, 4, 3), np.uint8))
        client.images.edit(image=photo, prompt="", extra_body={**how, "rows": 2})
        assert signed[-1] == ("png", Drawn("tiny", 5, 8, (photo,)))
        assert "fastigpt_sign_seconds_count 5.0" in server.get("/metrics").text
